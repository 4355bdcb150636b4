"""The training run: set-up with every check first, then a loop that can be stopped and resumed at any step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import rundir
from .anchors import FITTING_IOU, AnchorFit, anchor_fit, choose_anchor_scale, network_boxes
from .checkpoint import atomic_write_text, load_newest_checkpoint, save_checkpoint
from .config import Config, config_diff, parse_nan_policy
from .data import Batch, Dataset, DatasetPair, TrainLoader, describe, load_pair
from .ema import ModelEma
from .errors import Interrupted, NonFiniteError, UsageError
from .evaluate import evaluate_detections, percent
from .models import MODEL_STRIDES, build_model
from .objective import autocast, calibrate, detection_loss, to_device
from .optim import clip_gradients, learning_rate, make_optimizer, set_learning_rate
from .predict import load_weights, make_eval_loader, predict_dataset, transform_config
from .progress import Reporter
from .resources import check_backend, choose_cache, choose_workers, resolve_amp, resolve_device
from .signals import StopSignal
from .state import pack_state, restore_random_state, unpack_config

COVERAGE_WARNING = 0.9


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
        Interrupted: SIGINT or SIGTERM; a checkpoint was saved.
    """
    reporter = reporter or Reporter()
    config.validate()
    if config.data.path is None:
        raise UsageError("data.path: no dataset given (--data DIR)")
    if not resume and rundir.holds_run(run):
        raise UsageError(f"{run} already holds a run: continue it with --resume or choose another folder with -o")
    device = resolve_device(config.train.device)
    check_backend(config.loss.backend, device)
    pair = load_pair(
        config.data.path,
        config.data.train_split,
        config.data.eval_split,
        config.data.format,
        allow_symlinks=config.data.allow_symlinks,
    )
    reporter.info(describe(pair.training, pair.evaluation))
    loader = _make_train_loader(config, pair.training, device)
    rundir.prepare_run_folder(run)
    with rundir.RunLock(run), StopSignal() as stop:
        return _Trainer(config, run, pair, loader, device, reporter, stop).run_to_end(resume, allow_config_change)


def _make_train_loader(config: Config, dataset: Dataset, device: torch.device) -> TrainLoader:
    return TrainLoader(
        dataset,
        transform_config(config),
        config.train.batch_size,
        seed=config.train.seed,
        workers=choose_workers(config.data.workers, device),
        on_bad_image=config.data.on_bad_image,
        bad_image_limit=config.data.bad_image_limit,
        cache=choose_cache(config.data.cache, dataset, config),
        timeout=config.data.timeout,
    )


class _Trainer:
    """One run's objects. `step` counts the batches used so far, skipped ones included."""

    def __init__(
        self,
        config: Config,
        run: Path,
        pair: DatasetPair,
        loader: TrainLoader,
        device: torch.device,
        reporter: Reporter,
        stop: StopSignal,
    ) -> None:
        self.config, self.run, self.pair, self.loader, self.device = config, run, pair, loader, device
        self.reporter, self.stop = reporter, stop
        self.log = rundir.RunLog(run)
        self.log_warned = False
        self.amp = resolve_amp(config.train.amp, device)
        self.workers = choose_workers(config.data.workers, device)
        self.step, self.skipped, self.w_loc = 0, 0, math.nan
        self.seconds_before = 0.0
        self.began = time.monotonic()
        self.metrics: dict[str, Any] | None = None
        self.metrics_step = -1
        self.eval_loader: Iterable[Batch] | None = None

    # Set-up

    def run_to_end(self, resume: bool, allow_config_change: bool) -> TrainResult:
        saved = self._load_saved(allow_config_change) if resume else None
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
            iterations=self.config.train.iterations,
            data=self.pair.training.fingerprint(),
        )
        if not saved:
            atomic_write_text(self.run / rundir.CONFIG_FILE, self.config.to_yaml())
            self._calibrate()
        self._loop()
        return self._finish()

    def _load_saved(self, allow_config_change: bool) -> dict[str, Any] | None:
        found = load_newest_checkpoint(self.run / rundir.CHECKPOINTS)
        if found is None:
            self.reporter.info(f"{self.run} holds no checkpoint yet: starting from the beginning")
            return None
        path, saved = found
        changes = config_diff(unpack_config(saved, path), self.config.to_dict())
        fingerprint = self.pair.training.fingerprint()
        if saved["data"] != fingerprint:
            changes.append(f"training data (classes, images, boxes): {saved['data'][:12]}... -> {fingerprint[:12]}...")
        if list(saved["classes"]) != list(self.pair.training.classes):
            raise UsageError(
                f"{path}: trained on classes {list(saved['classes'])}, the data has {list(self.pair.training.classes)}"
            )
        if changes and not allow_config_change:
            raise UsageError(
                f"{path}: the run was started differently; --allow-config-change continues all the same:\n  "
                + "\n  ".join(changes)
            )
        for change in changes:
            self.reporter.warn(f"continuing with a changed configuration: {change}")
        self.reporter.info(f"continuing from {path.name}")
        return saved

    def _build(self, saved: dict[str, Any] | None) -> None:
        config, dataset = self.config, self.pair.training
        torch.manual_seed(config.train.seed)
        self.anchor_fit = self._fit_anchors(dataset, saved)
        model = build_model(
            config.model.name,
            dataset.num_classes,
            self.anchor_fit.scale,
            backbone_file=config.model.backbone_file if saved is None else None,
            backbone_sha256=config.model.backbone_sha256,
            frozen_backbone=config.model.backbone_file is not None,
        )
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=memory_format).train()
        self.optimizer = make_optimizer(self.model, config.optim)
        self.ema = ModelEma(self.model, config.train.ema)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.reporter.info(
            f"{config.model.name}: {parameters / 1e6:.2f} M parameters, loss {config.loss.label()}, {self.device}, "
            f"{'bfloat16' if self.amp else 'float32'}, {torch.get_num_threads()} threads, {self.workers} loaders"
        )
        if saved is not None:
            self._restore(saved)

    def _restore(self, saved: dict[str, Any]) -> None:
        load_weights(self.model, saved["model"], self.run)
        self.optimizer.load_state_dict(saved["optimizer"])
        load_weights(self.ema.module, saved["ema"]["model"], self.run)
        self.ema.load_state_dict(saved["ema"])
        self.loader.load_state_dict(saved["loader"])
        self.step, self.skipped, self.w_loc = saved["step"], saved["skipped"], saved["w_loc"]
        self.seconds_before = saved["seconds"]
        restore_random_state(saved["random"])

    def _fit_anchors(self, dataset: Dataset, saved: dict[str, Any] | None) -> AnchorFit:
        boxes, sizes = network_boxes(dataset, transform_config(self.config))
        strides = MODEL_STRIDES[self.config.model.name]
        wanted = saved["anchor_scale"] if saved is not None else self.config.model.anchor_scale
        if wanted == "auto":
            fit = choose_anchor_scale(boxes, sizes, strides)
        else:
            fit = anchor_fit(boxes, sizes, strides, float(wanted))
        text = (
            f"anchors from {fit.scale:.2f} strides: {100 * fit.covered:.1f} % of the boxes have one with "
            f"IoU >= {FITTING_IOU}"
        )
        if fit.covered < COVERAGE_WARNING:
            self.reporter.warn(
                f"{text}; less than {100 * COVERAGE_WARNING:.0f} %: many objects are too small, too large or too long "
                "for them. Consider another data.image_size or model.anchor_scale"
            )
        else:
            self.reporter.info(text)
        return fit

    def _calibrate(self) -> None:
        loss = self.config.loss
        if loss.w_loc != "auto":
            self.w_loc = float(loss.w_loc)
            return
        state = self.loader.state_dict()
        self.w_loc = calibrate(
            self.model,
            (batch for _, batch in zip(range(loss.calibration_batches), self.loader)),
            loss,
            self.device,
            self.amp,
            self.config.train.channels_last,
        )
        # The batches that were looked at are trained on as well.
        self.loader.load_state_dict(state)
        self.reporter.info(f"w_loc {self.w_loc:.3f}, calibrated on {loss.calibration_batches} batches")
        self.log.write("w_loc", step=0, value=self.w_loc)

    # The loop

    def _loop(self) -> None:
        total, every = self.config.train.iterations, self.config.train
        if self.step >= total:
            return
        batches = self._batches()
        with self.reporter.task(f"train {self.config.loss.label()}", total, self.step) as task:
            while self.step < total:
                batch = next(batches)
                record = self._train_step(batch)
                if self.step % every.log_every == 0 or self.step == total:
                    self._log_step(record)
                    task.advance_to(self.step, f"cls {record['cls']:.3f} loc {record['loc']:.3f}")
                due = every.eval_every and self.step % every.eval_every == 0 and self.step < total
                if self.step % every.checkpoint_every == 0 or self.step == total or due:
                    self._save()
                if self.stop.number is not None:
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
                if self.stop.number is None:
                    raise
                self._interrupt()
            for path, message in batch.bad:
                self.reporter.warn(f"image skipped: {path}: {message}")
                self.log.write("bad_image", step=self.step, path=path, message=message)
            yield batch

    def _train_step(self, batch: Batch) -> dict[str, Any]:
        config = self.config
        rate = learning_rate(self.step, config.train.iterations, config.optim)
        set_learning_rate(self.optimizer, rate)
        allowed = parse_nan_policy(config.train.nan_policy)
        # A NaN image would stay in BatchNorm's running statistics for ever, although its batch is skipped.
        buffers = [b.clone() for b in self.model.buffers()] if allowed else []
        images, boxes, labels = to_device(batch, self.device, config.train.channels_last)
        with autocast(self.device, self.amp):
            maps = self.model(images)
        loss = detection_loss(self.model, maps, boxes, labels, config.loss, self.w_loc)
        self.optimizer.zero_grad(set_to_none=True)
        (loss.classification + loss.localization).backward()
        norm = clip_gradients(self.model, config.optim.clip)
        # One transfer for all figures: a GPU is asked once a step.
        cls, loc, gradient, positives, mean_iou = torch.stack(
            [
                t.detach().double()
                for t in (loss.classification, loss.localization, norm, loss.num_positives, loss.mean_iou)
            ]
        ).tolist()
        record = {
            "step": self.step + 1, "cls": cls, "loc": loc, "grad_norm": gradient, "positives": int(positives),
            "mean_iou": mean_iou, "lr": rate,
        }  # fmt: skip
        if math.isfinite(cls) and math.isfinite(loc) and math.isfinite(gradient):
            self.optimizer.step()
            self.ema.update(self.model)
        else:
            self._non_finite(batch, record, allowed)
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        self.step += 1
        return record

    def _non_finite(self, batch: Batch, record: dict[str, Any], allowed: int) -> None:
        """Leave the batch out, or stop, as train.nan_policy says; either way the batch is on record."""
        self.skipped += 1
        images = [int(t["image_id"]) for t in batch.targets]
        names = {r.id: r.name for r in self.pair.training.records}
        dump = {
            **{k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()},
            "w_loc": self.w_loc,
            "image_ids": images,
            "images": [names.get(i, "?") for i in images],
            "images_finite": [bool(torch.isfinite(image).all()) for image in batch.images],
            "skipped": self.skipped,
        }
        path = self.run / f"nonfinite-{record['step']:08d}.json"
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
        if self.log.failed and not self.log_warned:
            self.reporter.warn(self.log.failed)
            self.log_warned = True

    def _seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.began

    def _save(self) -> None:
        state = pack_state(
            config=self.config,
            classes=self.pair.training.classes,
            category_ids=self.pair.training.category_ids,
            fingerprint=self.pair.training.fingerprint(),
            anchor_scale=self.anchor_fit.scale,
            model=self.model,
            optimizer=self.optimizer,
            ema=self.ema,
            loader=self.loader,
            step=self.step,
            skipped=self.skipped,
            w_loc=self.w_loc,
            seconds=self._seconds(),
        )
        save_checkpoint(self.run / rundir.CHECKPOINTS, self.step, state)

    def _interrupt(self) -> None:
        """Save and stop. The batch in hand is used up or not at all, so that nothing is lost or repeated."""
        number = self.stop.number
        self._save()
        self.log.write("interrupted", step=self.step, signal=number)
        raise Interrupted(f"stopped by signal {number} at step {self.step}; --resume -o {self.run} continues", number)

    # Evaluation

    def _evaluate(self) -> None:
        dataset = self.pair.evaluation
        if dataset is None or self.metrics_step == self.step:
            return
        if self.eval_loader is None:  # kept, with its cached images, for the next evaluation
            cache = choose_cache(self.config.data.cache, dataset, self.config)
            self.eval_loader = make_eval_loader(self.config, dataset, self.workers, cache)

        with self.reporter.task("evaluate", len(dataset)) as task:

            def on_batch(done: int) -> None:
                task.advance_to(done)
                if self.stop.number is not None:
                    self._interrupt()

            detections = predict_dataset(
                self.ema.module, self.eval_loader, self.config.inference, self.device, self.amp, on_batch
            )
        self.metrics = evaluate_detections(dataset, detections, max_detections=self.config.inference.max_detections)
        self.metrics_step = self.step
        self.log.write("eval", step=self.step, split=dataset.split, metrics=self.metrics)
        figures = "  ".join(f"{name} {percent(self.metrics[name])}" for name in ("AP", "AP50", "AP75", "AP90"))
        self.reporter.info(f"step {self.step}, {dataset.split}: {figures}")

    def _finish(self) -> TrainResult:
        self._evaluate()
        seconds = self._seconds()
        if self.metrics is not None:
            atomic_write_text(self.run / "metrics.json", json.dumps(self.metrics, indent=1, allow_nan=False) + "\n")
        self.log.write("end", step=self.step, seconds=round(seconds, 3), w_loc=self.w_loc)
        return TrainResult(self.metrics, self.step, seconds, self.w_loc, self.run)
