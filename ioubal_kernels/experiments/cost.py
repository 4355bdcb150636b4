"""What the method costs: time and memory of a training step, eager and fused, and the trained models' time per image.

Training is measured in processes of their own, one after the other (`main`), because the peak memory of a process
cannot be reset. Rounds alternate, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..detection.config import Config
from ..detection.data import Dataset, TrainLoader, load_pair
from ..detection.errors import TrainerError
from ..detection.objective import apply_loss
from ..detection.predict import apply_inference, make_eval_loader, open_trained, predict_batch
from ..detection.presets import load_config
from ..detection.processes import Processes
from ..detection.progress import Reporter
from ..detection.resources import resolve_amp, resolve_device, transform_config
from ..detection.starting import fit_anchors
from ..detection.stepping import Stepper
from ..detection.weights import new_detector
from .study import RowStudy, Run

BACKENDS = {"eager": "reference", "fused": "auto"}
ROUNDS, WARM_UP, STEPS = 3, 3, 10
IMAGES = 40


def measure(
    row: RowStudy, folder: Path, reporter: Reporter, *, proceed: Callable[[], bool] = lambda: True
) -> dict[str, Any] | None:
    """Cost of a row's first arm and of its method (the arm "both", else the last one).

    Args:
        row: with finished runs.
        folder: for the files of the processes.
        proceed: asked before each process; False gives the measurement up.

    Returns:
        "training": {arm: {"eager" or "fused": {"ms", "rounds_ms" (medians), "peak_mib"}}}, "inference_ms": {arm: an
        image's}, "device", "threads", "batch_size", "image_size", "memory" (what the peak is of); None where it was
        given up.
    """
    base = row.arms[0]
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    arms = row.compared
    total = ROUNDS * len(arms) * len(BACKENDS)
    with reporter.task(f"cost of {row.label}", total) as task:
        for _ in range(ROUNDS):
            for arm in arms:
                for name, backend in BACKENDS.items():
                    if not proceed():
                        return None
                    own = found.setdefault(arm.name, {}).setdefault(name, [])
                    own.append(_in_a_process(arm.runs[0], row.data_path, backend, folder))
                    task.advance_to(sum(len(r) for by_arm in found.values() for r in by_arm.values()))
    training = {
        arm: {
            name: {
                "ms": statistics.median(ms for each in repeats for ms in each["ms"]),
                "rounds_ms": [statistics.median(each["ms"]) for each in repeats],
                "peak_mib": statistics.median(each["peak_mib"] for each in repeats),
            }
            for name, repeats in by_backend.items()
        }
        for arm, by_backend in found.items()
    }
    one = found[base.name]["fused"][0]
    runs = {arm.name: arm.runs[0] for arm in row.arms}
    inference = inference_times(runs, row.dataset) if row.dataset is not None and proceed() else {}
    return {
        "training": training,
        "inference_ms": inference,
        **{key: one[key] for key in ("device", "threads", "batch_size", "image_size", "memory")},
    }


def _in_a_process(run: Run, data: str | None, backend: str, folder: Path) -> dict[str, Any]:
    config_file = folder / "cost.yaml"
    config_file.write_text(run.config.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", __name__, str(config_file), str(data or run.config.data.path), backend]
    w_loc = run.end.get("w_loc", 1.0)
    done = subprocess.run([*command, str(w_loc)], capture_output=True, text=True, check=False)
    config_file.unlink(missing_ok=True)
    if done.returncode != 0:
        raise TrainerError(f"measuring the cost of {run.folder} with {backend} failed:\n{done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def inference_times(runs: Mapping[str, Run], dataset: Dataset) -> dict[str, float]:
    """Median time per image of each trained model in ms, one image at a time: network, post-processing and NMS on a
    prepared image. The models take turns, image by image.
    """
    trained = {name: open_trained(str(run.folder)) for name, run in runs.items()}
    first = next(iter(trained.values())).config
    device = resolve_device(first.train.device)
    amp = resolve_amp(first.train.amp, device)
    step = max(1, len(dataset) // IMAGES)
    config = replace(first, inference=replace(first.inference, batch_size=1))
    batches = list(make_eval_loader(config, replace(dataset, records=dataset.records[::step][:IMAGES]), 0, "none"))
    times: dict[str, list[float]] = {name: [] for name in trained}
    for each in trained.values():
        apply_inference(each.model.to(device).eval(), each.config.inference)
    for number, batch in enumerate(batches):
        for name, each in trained.items():
            began = now(device)
            predict_batch(each.model, batch, device, amp)
            if number >= min(WARM_UP, len(batches) - 1):
                times[name].append(now(device) - began)
    return {name: 1000 * statistics.median(found) for name, found in times.items()}


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def training_cost(config: Config, data: str, w_loc: float) -> dict[str, Any]:
    """Times of training steps from the untrained model (loss, backward and optimiser; images are loaded before) and the
    peak memory: of the GPU's allocator, on a CPU of the whole process.
    """
    device = resolve_device(config.train.device)
    pair = load_pair(data, config.data.train_split, config.data.eval_split, config.data.format, check_files=False)
    quiet = Reporter(quiet=True)
    torch.manual_seed(config.train.seed)
    fit = fit_anchors(config, pair.training, config.model.anchor_scale, quiet)
    detector = new_detector(config, pair.training.num_classes, fit.scale)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    detector = detector.to(device, memory_format=memory_format).train()
    apply_loss(detector, config.loss, w_loc=w_loc)
    loader = TrainLoader(pair.training, transform_config(config), config.train.batch_size, seed=config.train.seed)
    amp = resolve_amp(config.train.amp, device)
    stepper = Stepper(detector, config, Processes(device=device), amp, 1000)
    batches = [batch for _, batch in zip(range(4), loader)]
    times = []
    for step in range(WARM_UP + STEPS):
        began = now(device)
        stepper.run(step, [batches[step % len(batches)]], False)
        if step >= WARM_UP:
            times.append(1000 * (now(device) - began))
    height, width = batches[0].images.shape[-2:]
    if device.type == "cuda":
        peak, memory = torch.cuda.max_memory_allocated(device) / 2**20, "GPU, allocated"
    else:
        peak, memory = _peak_resident_mib(), "process, resident"
    return {
        "ms": times,
        "peak_mib": peak,
        "memory": memory,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "batch_size": config.train.batch_size,
        "image_size": [int(height), int(width)],
    }


def _peak_resident_mib() -> float:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def main(arguments: list[str]) -> int:
    """What the processes run: prints one line of JSON."""
    file, data, backend, w_loc = arguments
    config = load_config(file)
    config.set("loss.backend", backend)
    print(json.dumps(training_cost(config, data, float(w_loc))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
