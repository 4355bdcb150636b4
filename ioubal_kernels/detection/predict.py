"""A trained model and a dataset: detections in the pixels of the image files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint import find_checkpoint
from .config import Config, InferenceConfig
from .data import Batch, Dataset, boxes_to_original, describe, eval_loader, load_dataset
from .errors import UsageError
from .evaluate import ImageDetections, evaluate_detections, without_unread
from .models import Detector
from .objective import autocast, images_to_device
from .processes import Processes
from .progress import Reporter
from .resources import choose_workers, resolve_amp, resolve_device, transform_config
from .results import check_results_path, save_coco_results
from .unused_keys import refuse_unused
from .weights import load_weights, new_detector


@dataclass
class TrainedModel:
    """What a checkpoint holds, ready to run: the evaluated weights, the configuration and the class names."""

    model: Detector
    config: Config
    classes: tuple[str, ...]
    step: int
    path: Path
    anchor_scale: float
    category_ids: Sequence[int | str] | None  # the training data's own, None in a checkpoint that has none


def model_from_state(state: dict[str, Any], path: Path, device: torch.device) -> TrainedModel:
    """Rebuild the evaluated model of a checkpoint.

    Raises:
        UsageError: the checkpoint's parts do not fit together; keys and shapes are listed.
    """
    try:
        config = Config()
        config.update(json.loads(state["config"]), str(path))
        classes = tuple(state["classes"])
        weights, anchor_scale, step = state["ema"]["model"], float(state["anchor_scale"]), int(state["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path}: not a checkpoint of this trainer ({type(error).__name__}: {error})") from error
    # The weights are in the checkpoint: the file the training started from is not needed to rebuild the network.
    model = new_detector(config, len(classes), anchor_scale)
    load_weights(model, weights, path)
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=memory_format).eval()
    return TrainedModel(model, config, classes, step, path, anchor_scale, state.get("category_ids"))


def open_trained(target: str, changes: Iterable[tuple[str, Any]] = ()) -> TrainedModel:
    """The evaluated model of a run's folder or a checkpoint file, on the CPU.

    Args:
        changes: (key, value) over the checkpoint's configuration.

    Raises:
        UsageError: there is none, its parts do not fit together, or a key or value is wrong or has no effect.
    """
    path, state = find_checkpoint(target)
    trained = model_from_state(state, path, torch.device("cpu"))
    changes = list(changes)
    for key, value in changes:
        trained.config.set(key, value)
    trained.config.validate()
    refuse_unused((key for key, _ in changes), trained.config)
    return trained


def detect(
    trained: TrainedModel, dataset: Dataset, device: torch.device, reporter: Reporter, task: str
) -> list[ImageDetections]:
    """Detections of a trained model on every image of a data set, by the model's configuration."""
    config = trained.config
    loader = make_eval_loader(config, dataset, choose_workers(config.data.workers, device), "none")
    amp = resolve_amp(config.train.amp, device)
    with reporter.task(task, len(dataset)) as progress:
        return predict_dataset(trained.model.to(device), loader, config.inference, device, amp, progress.advance_to)


def predict_batch(
    model: Detector, batch: Batch, device: torch.device, amp: torch.dtype | None
) -> list[ImageDetections]:
    """Detections of one batch of `eval_loader`."""
    with torch.inference_mode(), autocast(device, amp):
        outputs = model(images_to_device(batch, device, channels_last=True))
    return [
        ImageDetections(
            target["image_id"],
            boxes_to_original(output["boxes"].float().cpu(), target),
            output["scores"].float().cpu(),
            output["labels"].cpu(),
        )
        for output, target in zip(outputs, batch.targets, strict=True)
    ]


def apply_inference(model: Detector, inference: InferenceConfig) -> None:
    """Give the network the configuration's way from outputs to detections."""
    model.set_inference(
        score_threshold=inference.score_threshold,
        candidates=inference.candidates,
        nms_threshold=inference.nms_threshold,
        max_detections=inference.max_detections,
    )


def predict_dataset(
    model: Detector,
    loader: Iterable[Batch],
    inference: InferenceConfig,
    device: torch.device,
    amp: torch.dtype | None,
    on_batch: Callable[[int], None] | None = None,
) -> list[ImageDetections]:
    """Detections of every image of an evaluation loader. `on_batch(images done)` may raise to stop."""
    apply_inference(model, inference)
    was_training = model.training
    model.eval()
    detections: list[ImageDetections] = []
    try:
        for batch in loader:
            detections += predict_batch(model, batch, device, amp)
            if on_batch is not None:
                on_batch(len(detections))
    finally:
        model.train(was_training)
    return detections


def make_eval_loader(
    config: Config, dataset: Dataset, workers: int, cache: str, processes: Processes | None = None
) -> Iterable[Batch]:
    """The evaluation loader of a configuration: whole batches of the sorted images, dealt to the processes."""
    processes = processes or Processes()
    return eval_loader(
        dataset,
        transform_config(config),
        config.inference.batch_size,
        workers=workers,
        rank=processes.rank,
        world_size=processes.world_size,
        on_bad_image=config.data.on_bad_image,
        cache=cache,
        timeout=config.data.timeout,
    )


def evaluate_checkpoint(
    target: str,
    data: str,
    split: str | None,
    changes: list[tuple[str, Any]],
    reporter: Reporter,
    *,
    save_results: str | None = None,
    voc07: bool | None = None,
) -> dict[str, Any]:
    """The metrics of `ioubal eval`; of a split without annotations only the counts "images" and "detections".

    Args:
        target: a run's folder or a checkpoint file.
        data, split: the dataset's folder and split (None: the run's own on its data, else the default one).
        changes: (key, value) over the checkpoint's configuration: device, number format, inference.
        reporter: where messages go.
        save_results: a COCO result file to write, see `coco_results`; required for a split without annotations.
        voc07: also the metric of VOC 2007; None: for Pascal VOC folders.

    Raises:
        UsageError, DataError: the checkpoint or the data cannot be used; classes that the model does not know are
            named.
        OutputError: the result file cannot be written.
    """
    if save_results is not None:
        check_results_path(Path(save_results))
    trained = open_trained(target, changes)
    config = trained.config
    device = resolve_device(config.train.device)
    if split is None and config.data.path is not None and Path(data).resolve() == Path(config.data.path).resolve():
        split = config.data.eval_split  # what the run itself was evaluated on
    dataset = load_dataset(
        data,
        split,
        config.data.format,
        role="eval",
        classes=trained.classes,
        category_ids=trained.category_ids,
        allow_symlinks=config.data.allow_symlinks,
    )
    if not dataset.labelled and save_results is None:
        raise UsageError(
            f"--split {dataset.split}: it has no annotations, so there is nothing to measure: expected "
            "--save-results FILE.json, which writes the detections"
        )
    reporter.info(describe(dataset))
    reporter.info(f"{trained.path}: {config.model.name}, step {trained.step}, loss {config.loss.label()}, {device}")
    detections = detect(trained, dataset, device, reporter, "evaluate")
    if save_results is not None:
        count = save_coco_results(Path(save_results), dataset, detections)
        reporter.info(f"{count} detections on {len(dataset)} images in {save_results}")
        if not dataset.labelled:
            return {"images": len(dataset), "detections": count}
    dataset = without_unread(dataset, detections, config.data.bad_image_limit, reporter)
    return evaluate_detections(dataset, detections, voc07=voc07)
