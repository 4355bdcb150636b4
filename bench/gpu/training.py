"""GPU check: a short training with the CUDA kernels follows the one with the reference.

How far may two curves lie apart? Differences grow from step to step, so the tolerance is measured: two runs with the
reference differ by what convolutions leave to chance, and a third one, whose localisation loss is scaled by one part of
the gradient budget, by what the kernels' rounding may do. The tested curve must stay within FACTOR times the largest of
these differences so far: one draw of a growing difference tells its order of magnitude, no more. Chaos may make that
tolerance wide in the end; `sharp_steps` counts the steps at which it is below one per cent of the loss, where a wrong
gradient would show.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from ioubal_kernels import testing

from .sections import NotRun, Plan, Tally

NEEDED = ("torchvision", "yaml", "PIL", "rich")  # nothing is evaluated, so no pycocotools
FACTOR = 10.0
PARTS = ("cls", "loc")
SHARP, SHARP_STEPS = 0.01, 5  # of the loss; fewer steps than that say nothing


def curve(plan: Plan, data: str, run: Path, backend: str, w_loc: float) -> list[list[float]]:
    """(classification, localisation) of every step of one run."""
    from ioubal_kernels.detection.presets import preset
    from ioubal_kernels.detection.progress import Reporter
    from ioubal_kernels.detection.train import train

    config = preset("retinanet_tiny")
    size = plan.few(128, 64)
    values: dict[str, Any] = {
        "data.path": data, "data.image_size": [size, size], "data.workers": 0, "train.iterations": plan.few(60, 4),
        "train.batch_size": plan.few(8, 2), "train.log_every": 1, "train.checkpoint_every": 1000,
        "train.eval_every": 0, "train.amp": "off", "train.device": plan.device, "loss.w_loc": w_loc,
        "loss.backend": backend,
        # Adam divides by the gradients' size: it makes whole steps of what is rounding, and the curves part at once.
        "optim.name": "sgd", "optim.lr": 0.01,
    }  # fmt: skip
    for key, value in values.items():
        config.set(key, value)
    train(config, run, reporter=Reporter(quiet=True))
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[float(r[part]) for part in PARTS] for r in records if r["event"] == "step"]


def apart(a: list[list[float]], b: list[list[float]]) -> torch.Tensor:
    """The largest difference up to each step, (steps, parts)."""
    return (torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)).abs().cummax(0).values


def compare(tested: list[list[float]], reference: list[list[list[float]]]) -> dict[str, Any]:
    """Raises AssertionError where the tested curve leaves the tolerance; else the figures for the report.

    reference: the curve itself, its repetition, the one with the perturbed loss.
    """
    base = reference[0]
    spread = torch.maximum(apart(base, reference[1]), apart(base, reference[2]))
    size = torch.tensor(base, dtype=torch.float64).abs()
    allowed = FACTOR * spread + testing.LOSS_BUDGET[torch.float32] * size
    found = apart(tested, base)
    worst = (found / allowed).max()
    facts = {
        "steps": len(base),
        "sharp_steps": int((allowed < SHARP * size).all(1).sum()),
        "tolerance": f"{FACTOR:g} x the largest difference so far of the reference's own runs, + the loss budget",
        "worst_share_of_tolerance": round(float(worst), 4),
        "largest_difference": dict(zip(PARTS, found[-1].tolist(), strict=True)),
        "largest_run_to_run": dict(zip(PARTS, spread[-1].tolist(), strict=True)),
        "first": base[0],
        "last": base[-1],
    }
    assert bool(torch.isfinite(found).all()), "a loss is not finite"
    assert float(worst) <= 1.0, f"the curves part by {float(worst):.2f} of the tolerance: {facts}"
    return facts


def training(tally: Tally) -> None:
    plan = tally.plan
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise NotRun(f"the trainer's packages are not all installed: {', '.join(missing)}")
    from ioubal_kernels.detection.data import make_synthetic

    # Less left to chance is a sharper tolerance, and TF32's steps of 5e-4 would make jumps of roundings.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False, allow_tf32=False):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            size = plan.few(128, 64)
            data = make_synthetic(
                root / "set", train=plan.few(160, 8), val=0, size=size, classes=3, workers=plan.few(8, 1)
            )
            # Longer than a rounding of the loss, shorter than what anybody would call another loss.
            perturbed = 1.0 + testing.GRADIENT_BUDGET[torch.float32]
            runs = (("reference", 1.0), ("reference", 1.0), ("reference", perturbed))
            wanted = [curve(plan, data, root / f"run{i}", *run) for i, run in enumerate(runs)]
            tested = curve(plan, data, root / "tested", plan.backend, 1.0)
    facts = tally.check("the curves", lambda: compare(tested, wanted))
    if facts is not None:
        tally.facts |= facts
        if facts["sharp_steps"] < min(SHARP_STEPS, facts["steps"] // 2):
            raise NotRun("the reference's own runs part too early for a judgement")
