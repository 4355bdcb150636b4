"""What a training starts from, how long it is, what a step is made of, and what it writes for others."""

from __future__ import annotations

import copy
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ioubal_kernels.detection import train as train_module
from ioubal_kernels.detection.checkpoint import find_checkpoint, save_checkpoint
from ioubal_kernels.detection.data import load_pair, make_synthetic
from ioubal_kernels.detection.errors import Interrupted, UsageError
from ioubal_kernels.detection.evaluate import MAIN_METRICS
from ioubal_kernels.detection.objective import to_device
from ioubal_kernels.detection.predict import make_eval_loader
from ioubal_kernels.detection.presets import load_config, preset
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.detection.rundir import holds_run, read_log
from ioubal_kernels.detection.starting import source_of, with_norm_of
from ioubal_kernels.detection.train import train


class Messages(Reporter):
    """Keeps what a user would read."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def info(self, text: str) -> None:
        self.lines.append(text)


class Built(Exception):
    """Carries the trainer out of a run that is ready for its first step."""


@pytest.fixture
def build(monkeypatch, tmp_path):
    """`trainer, lines = build(config)`: a run as far as its first step."""

    def call(config, **options):
        def stop(trainer):
            raise Built(trainer)

        messages = Messages()
        with monkeypatch.context() as patch, pytest.raises(Built) as caught:
            patch.setattr(train_module._Trainer, "_loop", stop)
            train(config, options.pop("folder", tmp_path / "built"), reporter=messages, **options)
        return caught.value.args[0], messages.lines

    return call


def run(config, folder, **options):
    return train(config, Path(folder), reporter=Reporter(quiet=True), **options)


def steps(folder) -> list[dict]:
    return [r for r in read_log(Path(folder)) if r["event"] == "step"]


# ------------------------------------------------------------------------------------------ starting weights


@pytest.fixture(scope="module")
def source(tiny_data, tmp_path_factory) -> Path:
    """A run of two steps, from scratch, with three classes."""
    config = preset("retinanet_tiny")
    for key, value in {
        "data.path": tiny_data, "data.image_size": [64, 64], "data.workers": 0, "train.iterations": 2,
        "train.batch_size": 4, "train.eval_every": 0, "train.amp": "off", "train.device": "cpu", "loss.w_loc": 2.0,
    }.items():  # fmt: skip
        config.set(key, value)
    folder = tmp_path_factory.mktemp("source") / "run"
    run(config, folder)
    return folder


def test_init_from_takes_all_but_a_head_for_other_classes(build, tiny_config, source, tmp_path):
    data = make_synthetic(tmp_path / "five", train=8, val=2, size=64, classes=5, seed=3, workers=1)
    trainer, lines = build(tiny_config(**{"data.path": data, "model.init_from": str(source)}))
    path, saved = find_checkpoint(source)
    averaged = saved["ema"]["model"]
    new = {k for k, v in trainer.detector.state_dict().items() if v.shape != averaged[k].shape}
    assert new == {f"network.head.classification_head.cls_logits.{part}" for part in ("weight", "bias")}
    for name, value in trainer.detector.state_dict().items():
        assert name in new or torch.equal(value, averaged[name]), name
    assert f"starting from {path}; of other shapes, and new: {', '.join(sorted(new))}" in lines
    bias = trainer.detector.network.head.classification_head.cls_logits.bias
    assert bias.shape == (9 * 5,) and bias.detach().sigmoid().max() < 0.02  # the prior of a fresh head
    # The evaluated weights start from there as well.
    own = trainer.detector.state_dict()
    for name, value in trainer.stepper.ema.module.state_dict().items():
        assert torch.equal(value, own[name]), name


def test_init_from_the_same_classes_is_complete_and_recorded(build, tiny_config, source, tmp_path):
    file = find_checkpoint(source)[0]  # a checkpoint file instead of a run's folder
    trainer, lines = build(tiny_config(**{"model.init_from": str(file)}))
    assert f"starting from {file}" in lines
    averaged = find_checkpoint(source)[1]["ema"]["model"]
    for name, value in trainer.detector.state_dict().items():
        assert torch.equal(value, averaged[name]), name
    # BatchNorm, as in the run it starts from, and the new run's configuration says so by itself.
    assert all(p.requires_grad for p in trainer.detector.parameters())
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in trainer.detector.modules())
    saved = load_config(str(tmp_path / "built/config.yaml"))
    assert saved.model.norm == "batch" and saved.model.init_from == str(file)


def test_a_run_that_started_from_another_resumes_without_it(tiny_config, source, tmp_path):
    shutil.copytree(source, tmp_path / "old")
    config = tiny_config(**{"model.init_from": str(tmp_path / "old"), "train.iterations": 2, "loss.w_loc": 2.0})
    run(config, tmp_path / "new")
    shutil.rmtree(tmp_path / "old")
    longer = load_config(str(tmp_path / "new/config.yaml"))
    longer.set("train.iterations", 3)
    assert run(longer, tmp_path / "new", resume=True, allow_config_change=True).steps == 3
    with pytest.raises(UsageError, match=r"model.init_from: .*old is neither a run's folder nor a checkpoint file"):
        run(config, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_line_that_began_a_run_resumes_it(tiny_config, tmp_path):
    """With norm: auto, which then meant the source's: no other configuration."""
    once = {"train.iterations": 1, "loss.w_loc": 2.0}
    run(tiny_config(**{**once, "model.norm": "group"}), tmp_path / "source")
    began = tiny_config(**{**once, "model.init_from": str(tmp_path / "source")})
    run(began, tmp_path / "run")
    assert load_config(str(tmp_path / "run/config.yaml")).model.norm == "group"
    assert run(began, tmp_path / "run", resume=True).steps == 1


def test_init_from_another_architecture_is_refused_before_anything_is_written(tiny_config, source, tmp_path):
    config = tiny_config(**{"model.init_from": str(source)})
    config.set("model.name", "foveabox_tiny")
    with pytest.raises(UsageError, match=r"step-00000002.pt holds a retinanet_tiny, expected foveabox_tiny"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    config = tiny_config(**{"model.init_from": str(source), "model.norm": "group"})
    with pytest.raises(UsageError, match=r"the weights do not fit the model: missing \[.*unexpected \[.*running_mean"):
        run(config, tmp_path / "run")
    assert not holds_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("start", "norm", "want"),
    [
        ({"backbone_file": "resnet50-0676ba61.pth"}, "auto", "frozen"),
        ({"from_scratch": True}, "auto", "batch"),
        ({"from_scratch": True, "norm": "group"}, "auto", "group"),
        ({"backbone_file": "a.pth", "norm": "sync"}, "auto", "sync"),
        ({"from_scratch": True}, "group", "group"),  # what a user says stays
    ],
)
def test_the_normalisation_is_that_of_the_starting_weights(tmp_path, start, norm, want):
    """A head start must be built as its source was: with a backbone file frozen and bare, from scratch normalised."""
    source = preset("retinanet_r50_fpn")
    for key, value in start.items():
        source.set(f"model.{key}", value)
    save_checkpoint(tmp_path / "checkpoints", 1, {"config": source.to_json()})
    config = preset("table6_retinanet_r50")
    config.set("model.init_from", str(tmp_path))
    config.set("model.norm", norm)
    found = with_norm_of(source_of(config), config)
    assert found.model.norm == want and found.model.built_norm == want
    assert config.model.norm == norm  # the caller's is left alone


def test_a_full_size_detector_needs_a_start(ioubal, tiny_data, tmp_path):
    words = ("train", "--data", tiny_data, "-c", "retinanet_r18_fpn", "-o", tmp_path / "run")
    code, _, err = ioubal(*words)
    assert code == 2 and "retinanet_r18_fpn starts from ImageNet weights" in err and "--from-scratch" in err
    code, _, err = ioubal(*words, "--init-from", tmp_path / "no")
    assert code == 2 and err == f"error: model.init_from: {tmp_path / 'no'} is neither a run's folder nor a " + (
        "checkpoint file\n"
    )
    assert not (tmp_path / "run").exists()


def test_sync_is_batch_norm_in_one_process(build, tiny_config):
    trainer, _ = build(tiny_config(**{"model.norm": "sync"}))
    assert any(isinstance(m, torch.nn.SyncBatchNorm) for m in trainer.detector.modules())
    record, finite, _ = trainer.stepper.run(0, [next(iter(trainer.loader))], False)
    assert finite and record["grad_norm"] > 0


# ------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("name", ["retinanet_tiny", "ssd_tiny"])
def test_accumulated_gradients_are_the_mean_of_the_batches(build, tiny_config, name):
    """Per element, against each batch's own backward; their norm and the logged losses as well. (One batch of eight is
    something else: losses are normalised and BatchNorm's statistics taken within a batch.)
    """
    config = tiny_config(**{"train.accumulate": 2, "optim.clip": 0.0, "loss.w_loc": 2.0, "model.name": name})
    trainer, _ = build(config)
    batches = [batch for _, batch in zip(range(2), trainer.loader)]
    assert batches[0].targets[0]["image_id"] != batches[1].targets[0]["image_id"]
    alone = copy.deepcopy(trainer.detector)
    gradients, losses, positives = [], [], []
    for batch in batches:
        alone.zero_grad()
        parts = alone(*to_device(batch, torch.device("cpu"), True))
        sum(parts.values()).backward()
        gradients.append([p.grad.clone() for p in alone.parameters()])
        losses.append({k: float(v.detach()) for k, v in parts.items()})
        positives.append(int(alone.statistics()["positives"]))
    record, finite, stop = trainer.stepper.run(0, batches, False)
    assert finite and not stop
    squares = 0.0
    for (key, parameter), first, second in zip(trainer.detector.named_parameters(), *gradients, strict=True):
        want = (first + second) / 2
        squares += float(want.double().square().sum())
        scale = float(want.abs().max())
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=key)
    assert record["grad_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    # One batch's gradient is another one: the test would notice if only the last counted.
    assert record["grad_norm"] != pytest.approx(sum(float(g.double().square().sum()) for g in gradients[1]) ** 0.5)
    for part in ("cls", "loc"):
        assert record[part] == pytest.approx((losses[0][part] + losses[1][part]) / 2, rel=1e-5)
    assert record["positives"] == sum(positives)


@pytest.mark.parametrize(
    ("epochs", "accumulate", "steps"), [(1.0, 1, 4), (1.5, 1, 6), (3, 2, 6), (0.01, 1, 1), (None, 2, 10)]
)
def test_epochs_are_passes_over_the_data(build, tiny_config, epochs, accumulate, steps):
    """16 images in batches of 4: four batches a pass, whatever the number of iterations says."""
    changes = {} if epochs is None else {"train.epochs": epochs}
    trainer, _ = build(tiny_config(**{"train.accumulate": accumulate, "loss.w_loc": 2.0, **changes}))
    assert trainer.total == steps
    assert read_log(trainer.run)[0]["iterations"] == steps


def test_the_rate_is_scaled_to_the_images_of_a_step(tiny_config, tmp_path):
    """base_batch 16, steps of 4 x 2 images: half of the rate, after a warm-up of two steps from a quarter."""
    config = tiny_config(
        **{
            "optim.name": "sgd", "optim.lr": 0.02, "optim.base_batch": 16, "train.accumulate": 2, "loss.w_loc": 2.0,
            "optim.warmup_steps": 2, "optim.warmup_start": 0.25, "optim.schedule": "multistep",
            "optim.milestones": [0.75], "train.epochs": 2,
        }
    )  # fmt: skip
    run(config, tmp_path / "run")
    rates = [0.25 + 0.75 / 3, 0.25 + 0.75 * 2 / 3, 1.0, 0.1]
    assert [r["lr"] for r in steps(tmp_path / "run")] == pytest.approx([0.01 * rate for rate in rates])


@pytest.mark.parametrize(("name", "size"), [("ssd_tiny", 100), ("ssd300_vgg16", 300), ("retinanet_tiny", 100)])
def test_ssd_images_are_not_padded(tiny_data, name, size):
    """300 stays 300: SSD's default boxes are shares of the input. The others' are padded to a multiple of 32."""
    config = preset(name)
    config.set("data.image_size", [size, size])
    dataset = load_pair(tiny_data, None, None, "auto").evaluation
    batch = next(iter(make_eval_loader(config, dataset, 0, "none")))
    assert batch.images.shape[-2:] == ((size, size) if "ssd" in name else (128, 128))


# ------------------------------------------------------------------------------------------ around it


def test_without_torchrun_the_process_is_left_alone(tiny_config, tmp_path, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    before, threads = dict(os.environ), torch.get_num_threads()
    started: list[object] = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: started.append(a))
    run(tiny_config(**{"train.iterations": 1, "loss.w_loc": 2.0}), tmp_path / "run")
    assert not started and not torch.distributed.is_initialized()
    assert dict(os.environ) == before and torch.get_num_threads() == threads
    log = read_log(tmp_path / "run")
    assert log[0]["processes"] == 1 and not (tmp_path / "run/tensorboard").exists()


@pytest.mark.parametrize(("factor", "lambda_", "warned"), [(2.0, 1.5, True), (1.0, 1.5, False), (2.0, 0.0, False)])
def test_a_factor_beside_eq_7_is_pointed_out(build, tiny_config, monkeypatch, factor, lambda_, warned):
    lines: list[str] = []
    monkeypatch.setattr(Messages, "warn", lambda self, text: lines.append(text))
    build(tiny_config(**{"loss.normalize_loc": True, "loss.w_loc": factor, "loss.lambda_": lambda_}))
    found = [line for line in lines if line.startswith("loss.w_loc=2 with loss.normalize_loc: Eq. 7 keeps")]
    assert len(found) == warned


@pytest.mark.parametrize(
    ("key", "value", "epochs", "shown"),
    [
        ("warmup_steps", 12, 3, "optim.warmup_steps=12: the warm-up is not over when the run of 12 steps ends: the "
         "learning rate comes to 94 % of optim.lr, and optim.schedule has no effect"),
        ("warmup_steps", 11, 3, None),
        ("warmup", 1.0, 1, "optim.warmup=1: the warm-up is not over when the run of 4 steps ends"),
        ("warmup", 0.8, 1, None),
    ],
)  # fmt: skip
def test_a_warm_up_as_long_as_the_run_is_pointed_out(build, tiny_config, monkeypatch, key, value, epochs, shown):
    """From a quarter of the rate, step 12 of 12: 1/4 + 3/4 * 12/13 of it."""
    lines: list[str] = []
    monkeypatch.setattr(Messages, "warn", lambda self, text: lines.append(text))
    changes = {f"optim.{key}": value, "optim.warmup_start": 0.25, "train.epochs": epochs, "loss.w_loc": 2.0}
    build(tiny_config(**changes))
    found = [line for line in lines if "warm-up" in line]
    assert (found == []) if shown is None else (len(found) == 1 and found[0].startswith(shown))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    found = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert all(len({e.step for e in values}) == len(values) for values in found.values()), "a step has two values"
    return {tag: {e.step: e.value for e in values} for tag, values in found.items()}


def test_tensorboard_has_the_figures_of_the_log(tiny_config, tmp_path, monkeypatch):
    """Also after an interruption, whose last steps are done again: each step has one value, the one in the log."""
    pytest.importorskip("tensorboard")
    real = train_module._Trainer._train_step

    def step(trainer, batches):
        if trainer.step == 3:
            raise Interrupted("power cut", 9)  # two steps after the last checkpoint
        return real(trainer, batches)

    changes = {"train.tensorboard": True, "train.iterations": 5, "train.checkpoint_every": 2, "loss.w_loc": 2.0}
    config, folder = tiny_config(**changes), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(train_module._Trainer, "_train_step", step)
        run(config, folder)
    before = scalars(folder / "tensorboard")
    assert list(before["train/cls"]) == [1, 2, 3]
    metrics = run(config, folder, resume=True).metrics
    got, log = scalars(folder / "tensorboard"), steps(folder)
    names = ("cls", "loc", "grad_norm", "positives", "mean_iou", "lr")
    assert {f"train/{name}" for name in names} <= got.keys()
    for name in names:
        assert list(got[f"train/{name}"]) == [1, 2, 3, 4, 5]
        for record in log:
            assert got[f"train/{name}"][record["step"]] == pytest.approx(record[name], rel=1e-6), name
    for name in MAIN_METRICS:
        if metrics[name] is None:
            assert f"eval/{name}" not in got
        else:
            assert got[f"eval/{name}"] == {5: pytest.approx(metrics[name], rel=1e-6)}
    assert "eval/AP50" in got


def test_tensorboard_that_is_not_installed_is_one_line(ioubal, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    words = ("train", "--data", tiny_data, "-o", tmp_path / "run", "--set", "data.image_size=[64,64]")
    code, _, err = ioubal(*words, "--set", "train.tensorboard=true", "--workers", "0", "--device", "cpu")
    assert code == 2 and err.startswith("error: train.tensorboard: needs the package tensorboard: pip install tensor")
    assert err.count("\n") == 1 and not holds_run(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="inductor needs a C++ compiler")
def test_compile_changes_nothing_but_speed(tiny_config, tmp_path, monkeypatch):
    """Two steps: losses, gradient norms, the names and nearly the bits of the weights. SGD: Adam makes whole steps of
    rounding.
    """
    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module: (compiled.append(type(module).__name__), real(module))
    )
    for name in ("eager", "compiled"):
        assert not compiled
        config = tiny_config(
            **{
                "train.compile": name == "compiled", "train.iterations": 2, "optim.name": "sgd", "optim.lr": 0.01,
                "optim.warmup": 0.0, "loss.w_loc": 2.0,
            }
        )  # fmt: skip
        run(config, tmp_path / name)
    assert compiled == ["TinyBackbone"]
    for eager, other in zip(steps(tmp_path / "eager"), steps(tmp_path / "compiled"), strict=True):
        for key in ("cls", "loc", "grad_norm", "mean_iou"):
            assert other[key] == pytest.approx(eager[key], rel=1e-3), key
    states = [find_checkpoint(tmp_path / name)[1]["model"] for name in ("eager", "compiled")]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-3, atol=1e-5, msg=key)
