"""Two gloo processes with half the batch each equal one process with the whole batch: the mean over ranks of losses and
gradients, and the global counts, for every scope."""

import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ioubal_kernels as ik
from ioubal_kernels import backends, testing

RANKS = 2
IMAGES = 4
SCOPES = ("batch", "level", "image")


def detection_options(scope: str, normalize: bool, group: object) -> dict:
    return {"normalizer_scope": scope, "normalize_loc": normalize, "w_loc": 2.0, "eps": 1e-3, "process_group": group}


def flat_inputs() -> tuple[testing.ClassificationInputs, testing.ClassificationInputs, tuple, torch.Tensor]:
    dtype = torch.float64
    c = testing.classification_inputs(21, 40, 4, dtype=dtype)
    s = testing.classification_inputs(22, 40, 4, dtype=dtype, softmax=True)
    return c, s, testing.delta_inputs(23, 40, dtype=dtype), c.scope_ids


def flat_losses(part: slice, group: object, backend: str) -> list[torch.Tensor]:
    """Loss and gradient of each flat function on a part of the rows. The parts hold different numbers of positives."""
    c, s, (pred, target), ids = flat_inputs()
    results = []
    for options in ({}, {"scope_ids": ids[part], "num_scopes": 3}):
        common = {"process_group": group, "backend": backend} | options
        for leaf, function in (
            (c.logits, lambda x, o: ik.iou_balanced_sigmoid_focal_loss(x, c.labels[part], c.iou[part], **o)),
            (s.logits, lambda x, o: ik.iou_balanced_cross_entropy(x, s.labels[part], s.iou[part], **o)),
            (pred, lambda x, o: ik.iou_balanced_smooth_l1_loss(x, target[part], normalize=True, **o)),
            (pred, lambda x, o: ik.iou_balanced_smooth_l1_loss(x, target[part], **o)),
        ):
            x = leaf.clone().requires_grad_()
            loss = function(x[part], common)
            loss.backward()
            results += [loss.detach(), x.grad]
    return results


def detection_losses(images: slice, scope: str, normalize: bool, group: object, backend: str) -> list[torch.Tensor]:
    d = testing.detection_inputs(20, IMAGES, layout="nchw", dtype=torch.float64)
    logits, deltas = ([t.clone().requires_grad_() for t in maps] for maps in (d.cls_logits, d.bbox_deltas))
    loss = ik.iou_balanced_detection_loss(
        [t[images] for t in logits],
        [t[images] for t in deltas],
        d.anchors,
        d.matched_idxs[images],
        d.gt_boxes[images],
        d.gt_labels[images],
        backend=backend,
        **detection_options(scope, normalize, group),
    )
    (loss.classification + 3 * loss.localization).backward()
    return [t.detach() for t in loss] + [t.grad for t in logits + deltas]


def everything(rank: int | None, group: object, backend: str) -> dict[str, list[torch.Tensor]]:
    """All cases on the whole batch (rank None) or on this rank's uneven share."""
    rows = slice(None) if rank is None else (slice(0, 13), slice(13, 40))[rank]
    images = slice(None) if rank is None else (slice(0, 1), slice(1, IMAGES))[rank]
    results = {"flat": flat_losses(rows, group, backend)}
    for scope in SCOPES:
        for normalize in (False, True):
            results[f"{scope}-{normalize}"] = detection_losses(images, scope, normalize, group, backend)
    # A rank without positives, and one without rows.
    share = slice(0, 40) if rank in (None, 0) else slice(0, 0)
    results["empty rank"] = flat_losses(share, group, backend)
    return results


def worker(rank: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/init", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
        )
        results = {name: everything(rank, "world", name) for name in names}
        module = ik.IoUBalancedSigmoidFocalLoss(process_group=dist.group.WORLD, backend="reference")
        c = flat_inputs()[0]
        results["group object"] = module(c.logits, c.labels, c.iou)
        torch.save(results, f"{folder}/{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.err").write_text(traceback.format_exc())
        raise


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Results of both ranks for every available backend, from one pair of processes."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without gloo")
    folder = tmp_path_factory.mktemp("ranks")
    names = [n for n in ("reference", "cpu") if backends.unavailable_reason(n) is None]
    # Scripts rather than multiprocessing: a child can run this file, but not import it from a test run.
    package_root = str(Path(ik.__file__).parents[1])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"GLOO_SOCKET_IFNAME": "lo"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder), *names], env=environment)
        for rank in range(RANKS)
    ]
    # Importing torch takes long on a busy machine; once started, the ranks themselves give up after 60 s.
    deadline = time.monotonic() + 120
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(deadline - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.err")))
    assert codes == [0] * RANKS, f"exit codes {codes}\n{errors}"
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_detection(scope: str, normalize: bool, ranks: list[dict], backend: str) -> None:
    want = detection_losses(slice(None), scope, normalize, None, "reference")
    parts = [rank[backend][f"{scope}-{normalize}"] for rank in ranks]
    for i in (0, 1):
        close(sum(p[i] for p in parts) / RANKS, want[i])
        assert parts[0][i] != parts[1][i]  # each rank returns its own share
    for p in parts:  # counts are global
        assert p[2] == want[2]
        torch.testing.assert_close(p[3], want[3])
    for i in range(4, len(want)):
        close(sum(p[i] for p in parts) / RANKS, want[i])


@pytest.mark.parametrize("case", ["flat", "empty rank"])
def test_flat(case: str, ranks: list[dict], backend: str) -> None:
    want = flat_losses(slice(None), None, "reference")
    parts = [rank[backend][case] for rank in ranks]
    for i, value in enumerate(want):
        close(sum(p[i] for p in parts) / RANKS, value)


def test_group_object(ranks: list[dict]) -> None:
    """Both ranks pass the whole batch: S, D and the count double, and each rank's loss is that of one process."""
    c = flat_inputs()[0]
    want = ik.iou_balanced_sigmoid_focal_loss(c.logits, c.labels, c.iou, backend="reference")
    for rank in ranks:
        close(rank["group object"], want)


def test_the_normalizer_matters() -> None:
    """The shares' own normalisers would give another gradient, so that the tests above can fail."""
    want = detection_losses(slice(None), "batch", False, None, "reference")[4]
    shares = (slice(0, 1), slice(1, IMAGES))
    parts = [detection_losses(images, "batch", False, None, "reference")[4] for images in shares]
    own = torch.cat([part[images] for part, images in zip(parts, shares)])
    assert (own / RANKS - want).abs().max() > 1e-3 * want.abs().max()


if __name__ == "__main__":
    worker(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
