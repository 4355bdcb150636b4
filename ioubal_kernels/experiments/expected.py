"""How long a plan would take here: a few steps of each detector on random images, measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

import torch

from ..detection.architectures import MODELS
from ..detection.config import Config
from ..detection.data import Batch
from ..detection.objective import apply_loss
from ..detection.predict import predict_batch
from ..detection.processes import Processes
from ..detection.progress import Reporter
from ..detection.resources import resolve_amp, resolve_device
from ..detection.stepping import Stepper
from ..detection.weights import new_detector
from .cost import now
from .plans import Block, Job, Plan
from .reproduce import Resources, choose_resources, steps_of
from .runner import check_runs, is_finished
from .tables import Cells, to_rich

MAX_PIXELS = 320 * 320  # larger images are measured at this size and scaled by their pixels
CLASSES = 20
STARTING = 8.0  # seconds of a process before its first step: imports, data, calibration
WARM_UP, STEPS = 1, 2


def expected_seconds(plan: Plan, resources: Resources, done: Iterable[Job], reporter: Reporter) -> float:
    """Wall-clock seconds for the trainings of a plan that are not `done`.

    Measured with `resources.threads` threads and nothing beside; processes that share memory and caches are slower, so
    that this is a lower estimate where several run at a time.
    """
    finished = {job.folder for job in done}
    before = torch.get_num_threads()
    torch.set_num_threads(resources.threads)
    total = 0.0
    try:
        rows = [(block, row.name) for block in plan.blocks for row, _ in block.rows]
        with reporter.task("measure steps", len(rows)) as task:
            for number, (block, name) in enumerate(rows, start=1):
                own = [job for job in plan.jobs() if (job.block, job.row) == (block.name, name)]
                open_ = [job for job in own if job.folder not in finished]
                if open_:
                    step, image = seconds_per_step_and_image(open_[0].config)
                    total += sum(_run_seconds(job, block, step, image) for job in open_)
                task.advance_to(number)
    finally:
        torch.set_num_threads(before)
    return total / min(resources.processes, max(1, len(plan.jobs()) - len(finished)))


def _run_seconds(job: Job, block: Block, step: float, image: float) -> float:
    steps = steps_of(job, block)
    every = job.config.train.eval_every
    evaluations = 1 + ((steps - 1) // every if every else 0)
    return STARTING + steps * step + evaluations * block.images[1] * image


def seconds_per_step_and_image(config: Config) -> tuple[float, float]:
    """Of a training step with the configuration's batch, and of one image in evaluation."""
    device = resolve_device(config.train.device)
    data = config.data
    wanted = data.image_size or (data.short_side, data.long_side)
    factor = max(1.0, wanted[0] * wanted[1] / MAX_PIXELS)
    # SSD's full-size networks fit one size alone, which is small enough.
    fixed = MODELS[config.model.name].backbone == "vgg16"
    scale = 1.0 if fixed else factor**-0.5
    height, width = (edge if fixed else max(64, round(edge * scale / 32) * 32) for edge in wanted)
    factor = wanted[0] * wanted[1] / (height * width)
    detector = new_detector(config, CLASSES, 4.0).to(device).train()
    apply_loss(detector, config.loss)
    amp = resolve_amp(config.train.amp, device)
    stepper = Stepper(detector, config, Processes(device=device), amp, 1000)
    batch = _random_batch(config.train.batch_size, height, width)
    steps = []
    for step in range(WARM_UP + STEPS):
        began = now(device)
        stepper.run(step, [batch], False)
        steps.append(now(device) - began)
    detector.eval()
    images = []
    one = _random_batch(min(config.inference.batch_size, 8), height, width)
    for _ in range(2):
        began = now(device)
        predict_batch(detector, one, device, amp)
        images.append((now(device) - began) / len(one.targets))
    return factor * statistics.fmean(steps[WARM_UP:]), factor * min(images)


def _random_batch(count: int, height: int, width: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, height, width, generator=generator)
    targets = []
    for number in range(count):
        corner = torch.rand(6, 2, generator=generator) * torch.tensor([width, height]) * 0.7
        size = (0.08 + 0.22 * torch.rand(6, 2, generator=generator)) * min(height, width)
        targets.append(
            {
                "boxes": torch.cat([corner, corner + size], dim=1),
                "labels": torch.randint(CLASSES, (6,), generator=generator),
                "image_id": number,
                "orig_size": (height, width),
                "size": (height, width),
                "scale": (1.0, 1.0),
            }
        )
    return Batch(images, targets)


def show_plan(plan: Plan, folder: Path, processes: int | None, threads: int | None, reporter: Reporter) -> None:
    """The table that `--dry-run` prints: every arm, its trainings, what is finished, and the time that is left."""
    resources = choose_resources(plan, processes, threads)
    jobs = plan.jobs()
    check_runs(folder, plan)
    done = [job for job in jobs if is_finished(folder / job.folder)]
    finished = {job.folder for job in done}
    header = ["arm", "trainings", "finished", "steps", "loss"]
    for block in plan.blocks:
        where = block.title if block.data is not None else f"{block.title} (--data DIR)"
        for row, config in block.rows:
            rows = []
            for arm in row.arms:
                own = [job for job in jobs if (job.block, job.row, job.arm) == (block.name, row.name, arm.name)]
                ready = sum(job.folder in finished for job in own)
                loss = own[0].config.loss
                text = f"eta {loss.eta:g}, lambda {loss.lambda_:g}, w_loc {loss.w_loc}"
                text += ", Eq. 7" if loss.normalize_loc else ""
                rows.append([arm.label, str(len(own)), str(ready), str(steps_of(own[0], block)), text])
            model = "" if config.model.name == row.label else f" ({config.model.name})"
            title = f"{row.label}{model} on {where}: {block.images[0]} + {block.images[1]} images"
            reporter.show(to_rich(Cells(title, header, rows)))
    if len(done) == len(jobs):
        reporter.info(f"all {len(jobs)} trainings are finished in {folder}")
        return
    seconds = expected_seconds(plan, resources, done, reporter)
    reporter.info(
        f"{len(jobs) - len(done)} trainings to go, {resources.processes} at a time with {resources.threads} threads "
        f"each: about {duration(seconds)} on this machine, from a few measured steps; in {folder}"
    )


def duration(seconds: float) -> str:
    """For people: 95 s, 12 min, 7.5 h, 12 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"
