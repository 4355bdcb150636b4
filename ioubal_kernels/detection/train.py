"""The training run: set-up with every check first, then a loop that can be stopped and resumed at any step."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import rundir
from .architectures import MODELS
from .checkpoint import atomic_write_text, load_newest_checkpoint, save_checkpoint
from .config import Config
from .data import Batch, DatasetPair, TrainLoader, describe, load_pair
from .errors import Interrupted, NonFiniteError, UsageError
from .evaluate import MAIN_METRICS, ImageDetections, evaluate_detections, percent, without_unread
from .objective import apply_loss, calibrate, large_factor
from .predict import make_eval_loader, predict_dataset
from .processes import Processes, launched_as, started
from .progress import Reporter
from .provenance import provenance, weights_digest
from .resources import check_backend, choose_cache, choose_workers, resolve_amp, resolve_device
from .results import DETECTIONS_FILE, save_detections
from .resuming import CALIBRATED_KEYS, changes_since, key_of, require_allowed
from .signals import SAVED_OR_LOST, StopSignal
from .starting import (
    Source,
    fit_anchors,
    make_train_loader,
    number_of_steps,
    point_out,
    require_boxes,
    source_of,
    start_from,
    with_norm_kept,
    with_norm_of,
)
from .state import pack_state, unpack_config
from .stepping import Stepper
from .tensorboard import FigureWriter
from .weights import load_weights, new_detector


@dataclass
class TrainResult:
    """What a finished run reports: the evaluated metrics (None without an evaluation split), steps and seconds."""

    metrics: dict[str, Any] | None
    steps: int
    seconds: float
    w_loc: float
    run: Path


def train(
    config: Config,
    run: Path,
    *,
    resume: bool = False,
    allow_config_change: bool = False,
    reporter: Reporter | None = None,
) -> TrainResult:
    """Train, evaluate and leave everything in `run`: config.yaml, log.jsonl, checkpoints/, metrics.json.

    Started by torchrun, every process calls this alike: they share each step's batch, and the first one writes.

    Args:
        config: the whole configuration; config.data.path names the dataset.
        run: the run's folder; must not hold another run unless resuming.
        resume: continue from the newest intact checkpoint. On the CPU the result is bit for bit that of an
            uninterrupted run.
        allow_config_change: resume although the configuration differs from the checkpoint's.

    Raises:
        UsageError, DataError: bad configuration or data, before anything is written.
        OutputError: the folder cannot be written.
        NonFiniteError: the loss became NaN; RUN/nonfinite-*.json has the batch.
        Interrupted: SIGINT, SIGTERM or SIGHUP; a checkpoint was saved.
    """
    reporter = reporter or Reporter()
    config.validate()
    if config.data.path is None:
        where = "--data DIR; without -c, --resume takes the run's configuration" if resume else "--data DIR"
        raise UsageError(f"data.path: no dataset given ({where})")
    if not resume and rundir.holds_run(run):
        raise UsageError(f"{run} already holds a run: continue it with --resume or choose another folder with -o")
    config.require_start()
    config = config.copy()
    config.data.path = os.path.abspath(config.data.path)  # the run is read from other folders, too
    device = resolve_device(config.train.device)
    check_backend(config.loss.backend, device)
    if config.model.norm == "sync" and device.type != "cuda" and launched_as()[1] > 1:
        raise UsageError(f"model.norm: sync needs GPUs, got {device}; group does not depend on the number of processes")
    source = None if resume else source_of(config)
    config = with_norm_of(source, config)
    with ExitStack() as stack:
        processes = stack.enter_context(started(device, config.train.timeout))
        if not processes.first:
            reporter = Reporter(quiet=True)
        pair = load_pair(
            config.data.path,
            config.data.train_split,
            config.data.eval_split,
            config.data.format,
            allow_symlinks=config.data.allow_symlinks,
        )
        reporter.info(describe(pair.training, pair.evaluation))
        require_boxes(pair, reporter)
        loader = make_train_loader(config, pair.training, processes)
        point_out(config, number_of_steps(config, loader.batches_per_epoch), reporter)
        if processes.first:
            rundir.prepare_run_folder(run)
            stack.enter_context(rundir.RunLock(run))
        processes.wait()
        stop = stack.enter_context(StopSignal(*(SAVED_OR_LOST if processes.first else ())))
        trainer = _Trainer(config, run, pair, loader, processes, reporter, stop, source)
        return trainer.run_to_end(resume, allow_config_change)


class _Trainer:
    """One run's objects. `step` counts the optimisation steps so far, skipped ones included."""

    def __init__(
        self,
        config: Config,
        run: Path,
        pair: DatasetPair,
        loader: TrainLoader,
        processes: Processes,
        reporter: Reporter,
        stop: StopSignal,
        source: Source | None,
    ) -> None:
        """source: the checkpoint of model.init_from."""
        self.source = source
        self.config, self.run, self.pair, self.loader, self.processes = config, run, pair, loader, processes
        self.fingerprints = pair.fingerprints()
        self.reporter, self.stop, self.device = reporter, stop, processes.device
        self.log = rundir.RunLog(run) if processes.first else rundir.NoLog()
        self.figures = FigureWriter(run if config.train.tensorboard and processes.first else None)
        self.log_warned = False
        self.amp = resolve_amp(config.train.amp, self.device)
        self.workers = choose_workers(config.data.workers, self.device)
        self.total = number_of_steps(config, loader.batches_per_epoch)
        self.step, self.skipped, self.w_loc, self.rpn_w_loc = 0, 0, 1.0, 1.0
        self.changes: list[str] = []  # what differs from the checkpoint that the run goes on from, "key: old -> new"
        self.seconds_before = 0.0
        self.began = time.monotonic()
        self.metrics: dict[str, Any] | None = None
        self.metrics_step = -1
        self.found: list[ImageDetections] = []  # of the last evaluation
        self.eval_loader: Iterable[Batch] | None = None

    # Set-up

    def run_to_end(self, resume: bool, allow_config_change: bool) -> TrainResult:
        saved = self._load_saved(allow_config_change) if resume else None
        if resume and saved is None:
            self.source = source_of(self.config)
            self.config = with_norm_of(self.source, self.config)
        self._build(saved)
        self.log.write(
            "resume" if saved else "start",
            step=self.step,
            loss=self.config.loss.label(),
            anchor_scale=self.anchor_fit.scale,
            anchor_coverage=self.anchor_fit.covered,
            device=str(self.device),
            amp=str(self.amp or torch.float32),
            workers=self.workers,
            threads=torch.get_num_threads(),
            iterations=self.total,
            processes=self.processes.world_size,
            **self.fingerprints,
            weights=weights_digest(self.detector),
            changes=self.changes,
            **provenance(self.device),
        )
        if self.processes.first and (self.changes or not saved):
            atomic_write_text(self.run / rundir.CONFIG_FILE, self.config.to_yaml())
        if self.processes.first and self.step < self.total:
            (self.run / rundir.METRICS_FILE).unlink(missing_ok=True)  # of a shorter run that goes on
        if {key_of(change) for change in self.changes} & CALIBRATED_KEYS or not saved:
            self._calibrate()
        self._apply_loss()
        with self.figures:
            self._loop()
            return self._finish()

    def _load_saved(self, allow_config_change: bool) -> dict[str, Any] | None:
        found = load_newest_checkpoint(self.run / rundir.CHECKPOINTS)
        if found is None:
            self.reporter.info(f"{self.run} holds no checkpoint yet: starting from the beginning")
            return None
        path, saved = found
        self.config = with_norm_kept(unpack_config(saved, path), self.config)
        images = self.loader.state_dict()["num_samples"]
        data = self.pair.training.classes, self.fingerprints, images
        self.changes = changes_since(saved, path, self.config, *data, self.processes.world_size)
        require_allowed(self.changes, path, allow_config_change, self.reporter)
        self.reporter.info(f"continuing from {path.name}")
        return saved

    def _build(self, saved: dict[str, Any] | None) -> None:
        config, dataset = self.config, self.pair.training
        torch.manual_seed(config.train.seed)
        wanted = config.model.anchor_scale if saved is None else saved["anchor_scale"]
        self.anchor_fit = fit_anchors(config, dataset, wanted, self.reporter)
        detector = new_detector(config, dataset.num_classes, self.anchor_fit.scale, backbone_file=saved is None)
        if saved is None and self.source is not None:
            start_from(self.source, detector, self.reporter)
        self.source = None  # its weights are no longer needed
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.detector = detector.to(self.device, memory_format=memory_format).train()
        self._apply_loss()
        if config.train.compile:
            # In place: parameters keep their names.
            self.detector.network.backbone.compile()
        self.stepper = Stepper(self.detector, config, self.processes, self.amp, self.total)
        parameters = sum(p.numel() for p in self.detector.parameters())
        processes = f", {self.processes.world_size} processes" if self.processes.several else ""
        self.reporter.info(
            f"{config.model.name}: {parameters / 1e6:.2f} M parameters, loss {config.loss.label()}, {self.device}, "
            f"{'bfloat16' if self.amp else 'float32'}, {torch.get_num_threads()} threads, {self.workers} loaders"
            f"{processes}"
        )
        if saved is not None:
            self._restore(saved)

    def _apply_loss(self) -> None:
        apply_loss(
            self.detector,
            self.config.loss,
            w_loc=self.w_loc,
            rpn_w_loc=self.rpn_w_loc,
            process_group=self.processes.group,
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        stepper = self.stepper
        load_weights(self.detector, saved["model"], self.run)
        # The saved state has the saved configuration's numbers: weight decay and momentum are this one's.
        numbers = [{k: v for k, v in group.items() if k != "params"} for group in stepper.optimizer.param_groups]
        stepper.optimizer.load_state_dict(saved["optimizer"])
        for group, own in zip(stepper.optimizer.param_groups, numbers, strict=True):
            group.update(own)
        load_weights(stepper.ema.module, saved["ema"]["model"], self.run)
        stepper.ema.load_state_dict(saved["ema"])
        self.loader.load_state_dict(saved["loader"])
        self.step, self.skipped = saved["step"], saved["skipped"]
        self.w_loc, self.rpn_w_loc = saved["w_loc"], saved["rpn_w_loc"]
        self.seconds_before = saved["seconds"]

    def _calibrate(self) -> None:
        loss = self.config.loss
        proposals = loss.rpn and MODELS[self.config.model.name].family == "faster_rcnn"
        self.w_loc = self._factor("w_loc", loss.w_loc, rpn=False)
        self.rpn_w_loc = self._factor("rpn_w_loc", loss.rpn_w_loc, rpn=True) if proposals else 1.0

    def _factor(self, name: str, setting: float | str, *, rpn: bool) -> float:
        """The configured value of w_loc, or what the next batches say: those of all processes."""
        if setting != "auto":
            return float(setting)
        count = self.config.loss.calibration_batches
        state = self.loader.state_dict()
        batches = (batch for _, batch in zip(range(count), self.loader))
        options = self.device, self.amp, self.config.train.channels_last
        value = calibrate(self.detector, batches, self.config.loss, *options, rpn=rpn, processes=self.processes)
        # The batches that were looked at are trained on as well.
        self.loader.load_state_dict(state)
        # What a run started from is not kept: one that goes on with another loss has its trained weights alone.
        trained = f", with the weights after step {self.step}" if self.step else ""
        self.reporter.info(f"{name} {value:.3f}, calibrated on {count} batches{trained}")
        if doubt := large_factor(name, value):
            self.reporter.warn(doubt)
        self.log.write(name, step=self.step, value=value)
        return value

    # The loop

    def _loop(self) -> None:
        total, every = self.total, self.config.train
        if self.step >= total:
            return
        batches = self._batches()
        with self.reporter.task(f"train {self.config.loss.label()}", total, self.step) as task:
            while self.step < total:
                record, stop = self._train_step([next(batches) for _ in range(every.accumulate)])
                if self.step % every.log_every == 0 or self.step == total or self._watched(self.step):
                    self._log_step(record)
                    task.advance_to(self.step, f"cls {record['cls']:.3f} loc {record['loc']:.3f}")
                due = every.eval_every and self.step % every.eval_every == 0 and self.step < total
                if self.step % every.checkpoint_every == 0 or self.step == total or due:
                    self._save()
                if stop or (self.stop.number is not None and not self.processes.several):
                    self._interrupt()
                if due:
                    self._evaluate()
        batches.close()

    def _batches(self) -> Iterator[Batch]:
        """The loader's batches. A loader process ended by the signal that also stops this one is no error."""
        iterator = iter(self.loader)
        while True:
            try:
                batch = next(iterator)
            except RuntimeError:
                if self.stop.number is None or self.processes.several:
                    raise
                self._interrupt()
            for path, message in batch.bad:
                self.reporter.warn(f"image skipped: {path}: {message}")
                self.log.write("bad_image", step=self.step, path=path, message=message)
            yield batch

    def _train_step(self, batches: list[Batch]) -> tuple[dict[str, Any], bool]:
        """One step; its record, and whether any process was told to stop."""
        record, finite, stop = self.stepper.run(
            self.step, batches, self.stop.number is not None, watch=self._watched(self.step + 1)
        )
        if not finite:
            self._non_finite(batches, record)
        self.step += 1
        return record, stop

    def _watched(self, step: int) -> bool:
        """Whether the normalisers of this step (1-based) are measured: the first and every multiple."""
        every = self.config.train.watch_every
        return every > 0 and (step == 1 or step % every == 0)

    def _non_finite(self, batches: list[Batch], record: dict[str, Any]) -> None:
        """Leave the batch out, or stop, as train.nan_policy says; either way each process's batch is on record."""
        self.skipped += 1
        allowed = self.stepper.allowed
        images = [int(t["image_id"]) for batch in batches for t in batch.targets]
        names = {r.id: r.name for r in self.pair.training.records}
        dump = {
            **{k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()},
            "w_loc": self.w_loc,
            "image_ids": images,
            "images": [names.get(i, "?") for i in images],
            "images_finite": [bool(torch.isfinite(image).all()) for batch in batches for image in batch.images],
            "skipped": self.skipped,
        }
        rank = f"-{self.processes.rank}" if self.processes.several else ""
        path = self.run / f"nonfinite-{record['step']:08d}{rank}.json"
        atomic_write_text(path, json.dumps(dump, indent=1) + "\n")
        self.log.write("nonfinite", **dump)
        what = (
            f"step {record['step']}: classification {record['cls']}, localization {record['loc']}, gradient norm "
            f"{record['grad_norm']}"
        )
        if self.skipped > allowed:
            raise NonFiniteError(
                f"{what}: not finite; batch and loss parts are in {path}"
                + (
                    f" (train.nan_policy allows {allowed} skipped batches)"
                    if allowed
                    else " (train.nan_policy=skip:N goes on)"
                )
            )
        self.reporter.warn(f"{what}: not finite, batch left out ({self.skipped} of at most {allowed}); see {path}")

    def _log_step(self, record: dict[str, Any]) -> None:
        self.log.write("step", **record, seconds=round(self._seconds(), 3))
        self.figures.write(self.step, {f"train/{name}": value for name, value in record.items() if name != "step"})
        if self.log.failed and not self.log_warned:
            self.reporter.warn(self.log.failed)
            self.log_warned = True

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def _save(self) -> None:
        if not self.processes.first:
            return
        state = pack_state(
            config=self.config,
            classes=self.pair.training.classes,
            category_ids=self.pair.training.category_ids,
            fingerprints=self.fingerprints,
            anchor_scale=self.anchor_fit.scale,
            detector=self.detector,
            optimizer=self.stepper.optimizer,
            ema=self.stepper.ema,
            loader=self.loader,
            step=self.step,
            skipped=self.skipped,
            w_loc=self.w_loc,
            rpn_w_loc=self.rpn_w_loc,
            processes=self.processes.world_size,
            seconds=self._seconds(),
        )
        save_checkpoint(self.run / rundir.CHECKPOINTS, self.step, state)

    def _interrupt(self) -> None:
        """Save and stop, all processes at the same step. The batches in hand are used up or not at all, so that nothing
        is lost or repeated.
        """
        self._save()
        # None ends before the first has written: torchrun ends all when one has.
        self.processes.wait()
        number = self.stop.number or signal.SIGTERM
        self.log.write("interrupted", step=self.step, signal=number)
        raise Interrupted(f"stopped by signal {number} at step {self.step}; --resume -o {self.run} continues", number)

    # Evaluation

    def _evaluate(self) -> None:
        dataset = self.pair.evaluation
        if dataset is None or self.metrics_step == self.step:
            return
        if self.eval_loader is None:  # kept, with its cached images, for the next evaluation
            cache = choose_cache(self.config.data.cache, dataset, self.config)
            self.eval_loader = make_eval_loader(self.config, dataset, self.workers, cache, self.processes)

        module = self.stepper.ema.module
        self.processes.share_buffers(module)
        # Every process asks the others after each batch whether to stop; some have one batch less.
        rounds = -(-len(dataset) // (self.config.inference.batch_size * self.processes.world_size))
        with self.reporter.task("evaluate", len(dataset)) as task:

            def on_batch(done: int) -> None:
                nonlocal rounds
                rounds -= 1
                task.advance_to(min(done * self.processes.world_size, len(dataset)))
                if self.processes.any(self.stop.number is not None):
                    self._interrupt()

            detections = predict_dataset(
                module, self.eval_loader, self.config.inference, self.device, self.amp, on_batch
            )
            while rounds > 0:
                on_batch(len(detections))
        parts = self.processes.gather(detections)
        metrics = None
        if self.processes.first:
            everything = [item for part in parts for item in part]
            read = without_unread(dataset, everything, self.config.data.bad_image_limit, self.reporter)
            metrics = evaluate_detections(read, everything)
        self.metrics = self.processes.from_first(metrics)
        self.metrics_step = self.step
        if self.processes.first:
            self.found = everything
        self.log.write("eval", step=self.step, split=dataset.split, metrics=self.metrics)
        self.figures.write(self.step, {f"eval/{name}": self.metrics[name] for name in MAIN_METRICS})
        figures = "  ".join(f"{name} {percent(self.metrics[name])}" for name in ("AP", "AP50", "AP75", "AP90"))
        self.reporter.info(f"step {self.step}, {dataset.split}: {figures}")

    def _finish(self) -> TrainResult:
        self._evaluate()
        seconds = self._seconds()
        if self.metrics is not None and self.processes.first:
            save_detections(self.run / DETECTIONS_FILE, self.found)
            atomic_write_text(
                self.run / rundir.METRICS_FILE, json.dumps(self.metrics, indent=1, allow_nan=False) + "\n"
            )
        self.log.write("end", step=self.step, seconds=round(seconds, 3), w_loc=self.w_loc)
        return TrainResult(self.metrics, self.step, seconds, self.w_loc, self.run)
