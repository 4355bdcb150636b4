"""What `train_step` trains: the trainer's own model, loader, optimiser and EMA on a synthetic set, and its step.

Nothing is downloaded: the weights are random, the images are the built-in synthetic set's. The learning rate is 0: the
optimiser does all its work, and every step of every loss stage sees the same weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from ioubal_kernels.detection.anchors import choose_anchor_scale, network_boxes
from ioubal_kernels.detection.architectures import MODELS
from ioubal_kernels.detection.data import Batch, TrainLoader, load_pair, make_synthetic
from ioubal_kernels.detection.ema import ModelEma
from ioubal_kernels.detection.models import PreparedImages, build_model
from ioubal_kernels.detection.objective import apply_loss, autocast, to_device
from ioubal_kernels.detection.optim import clip_gradients, make_optimizer, set_learning_rate
from ioubal_kernels.detection.predict import transform_config
from ioubal_kernels.detection.presets import preset
from ioubal_kernels.detection.resources import choose_workers, resolve_amp, resolve_device
from ioubal_kernels.integrations.torchvision.retinanet import raw_maps

SYNTHETIC_CLASSES = 8  # what the synthetic set has at most; a model may have more
LARGEST_IMAGE = 640  # pixels of the synthetic images' sides: about COCO's
ROTATED = 3  # batches that the steps take in turn
Mark = Callable[[str], None]  # says that the segment of this name has ended
Targets = tuple[list[Tensor], list[Tensor]]  # boxes N x (G, 4) and labels N x (G,)


@dataclass(frozen=True)
class Spec:
    """What was asked for, in plain values: it travels to another process as JSON.

    Attributes:
        model: a preset's name, which is the model's.
        size: height and width of the network's input, padded by the loader to multiples of 32.
        frozen: the form that a backbone file gives (fixed BatchNorm, stem not trained, towers without GroupNorm).
    """

    model: str
    size: tuple[int, int]
    batch: int
    classes: int
    device: str
    amp: str
    workers: int | str
    frozen: bool = False


def make_data(spec: Spec, folder: str) -> str:
    """A synthetic set of a few batches; returns its path."""
    return make_synthetic(
        f"{folder}/set",
        train=(ROTATED + 1) * spec.batch,
        val=0,
        size=min(LARGEST_IMAGE, max(32, *spec.size)),
        classes=min(spec.classes, SYNTHETIC_CLASSES),
        workers=1,
    )


class HeadMaps(NamedTuple):
    """Raw outputs, one map per level: logits (N, A*K, H, W), deltas (N, A*4, H, W)."""

    cls_logits: list[Tensor]
    bbox_deltas: list[Tensor]


class Case:
    """Everything a step needs.

    Attributes:
        batches: ROTATED batches on the host, of the trainer's loader: the same for every stage.
        loader: the trainer's, with its workers; what it gives is waited for and let go.
        load_ms: what one batch takes to decode and augment without workers, median.
    """

    def __init__(self, spec: Spec, data: str) -> None:
        self.spec = spec
        config = preset(spec.model)
        values: dict[str, Any] = {
            "data.path": data, "data.image_size": list(spec.size), "data.workers": spec.workers,
            "train.batch_size": spec.batch, "train.device": spec.device, "train.amp": spec.amp, "loss.w_loc": 1.0,
        }  # fmt: skip
        for key, value in values.items():
            config.set(key, value)
        config.validate()
        self.config = config
        self.device = resolve_device(spec.device)
        self.amp = resolve_amp(spec.amp, self.device)
        self.workers = choose_workers(spec.workers, self.device)
        dataset = load_pair(data).training
        transform = transform_config(config)
        _, _, strides, octaves, scale = MODELS[spec.model]
        scale = scale or choose_anchor_scale(*network_boxes(dataset, transform), strides, octaves).scale
        torch.manual_seed(config.train.seed)
        model = build_model(spec.model, spec.classes, anchor_scale=scale, norm="frozen" if spec.frozen else "batch")
        apply_loss(model, config.loss)
        memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
        self.model = model.to(self.device, memory_format=memory_format).train()
        self.optimizer = make_optimizer(self.model, config.optim)
        set_learning_rate(self.optimizer, 0.0)
        self.ema = ModelEma(self.model, config.train.ema)
        # A set that fits into memory would be decoded once; a set of ordinary size is decoded for every batch.
        loaders = [
            TrainLoader(dataset, transform, spec.batch, seed=config.train.seed, workers=n, cache="none")
            for n in (0, self.workers)
        ]
        self.batches: list[Batch] = []
        seconds, here = [], iter(loaders[0])
        for _ in range(ROTATED):
            began = time.perf_counter()
            self.batches.append(next(here))
            seconds.append(time.perf_counter() - began)
        self._anchors: dict[tuple[int, int], Tensor] = {}
        self.load_ms = statistics.median(seconds) * 1e3
        self.loader = loaders[1]

    def moved(self, number: int) -> tuple[PreparedImages, Targets]:
        """Images (N, 3, H, W) and targets of the batch of this round, on the device."""
        images, boxes, labels = to_device(self.batches[number % ROTATED], self.device, self.config.train.channels_last)
        return images, (boxes, labels)

    def forward(self, images: PreparedImages) -> HeadMaps:
        """Raw head maps, under the autocast of the trainer."""
        network = self.model.network
        with autocast(self.device, self.amp), raw_maps(network):
            outputs = network.head(list(network.backbone(images.tensors).values()))
        return HeadMaps(outputs["cls_logits"], outputs["bbox_regression"])

    def anchors(self, maps: HeadMaps) -> Tensor:
        """Anchors (R, 4), the same for every image. Made once for a size: no stage pays for them."""
        height, width = maps.bbox_deltas[0].shape[-2:]
        if (height, width) not in self._anchors:
            stride = MODELS[self.spec.model].strides[0]  # the loader pads to multiples of 32
            image = torch.zeros(1, 3, height * stride, width * stride, device=self.device)
            generator = self.model.network.anchor_generator
            images = ImageList(image, [tuple(image.shape[-2:])])
            self._anchors[height, width] = generator(images, maps.bbox_deltas)[0]
        return self._anchors[height, width]

    def finish(self, loss: Tensor) -> None:
        """What follows the backward in the trainer: clipping, one transfer of figures, the step, the EMA."""
        norm = clip_gradients(self.model, self.config.optim.clip)
        figures = torch.stack([loss.detach().double(), norm.double()])
        if not all(map(torch.isfinite, figures.cpu())):
            raise RuntimeError(f"the loss or its gradient's norm is not finite: {figures.tolist()}")
        self.optimizer.step()
        self.ema.update(self.model)

    def facts(self) -> dict[str, Any]:
        """What a row says of the case."""
        height, width = self.batches[0].images.shape[-2:]
        with torch.no_grad():
            maps = self.forward(self.moved(0)[0])
        logits = sum(level[0].numel() for level in maps.cls_logits)
        return {
            "case": "train step",
            **{k: v for k, v in asdict(self.spec).items() if k not in ("device", "amp")},
            "size": list(self.spec.size),
            "padded_size": [height, width],
            "anchors_per_image": logits // self.spec.classes,
            "boxes_per_image": round(
                sum(len(t["boxes"]) for b in self.batches for t in b.targets) / (ROTATED * self.spec.batch), 2
            ),
            "dtype": str(self.amp or torch.float32).removeprefix("torch."),
            "map_dtype": str(maps.cls_logits[0].dtype).removeprefix("torch."),
            "workers": self.workers,
            "load_ms_without_workers": round(self.load_ms, 3),
            "data": f"synthetic set, {ROTATED} batches in turn, decoded for every batch",
            "weights": "random, the same in every step",
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }


def leaves_of(maps: HeadMaps, images: int | None = None) -> HeadMaps:
    """The maps (of the first images) cut off from the network: the same memory, gradients of their own."""
    return HeadMaps(*([level.detach()[:images].requires_grad_() for level in part] for part in maps))


Stage = Callable[[Case, HeadMaps, Targets, "Mark | None"], Tensor]


def whole_step(case: Case, stage: Stage, number: int, batches: Iterator[Batch]) -> Tensor:
    """The step as a training loop runs it; returns the loss."""
    next(batches)
    images, targets = case.moved(number)
    maps = case.forward(images)
    loss = stage(case, maps, targets, None)
    case.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    case.finish(loss)
    return loss.detach()


def divided_step(case: Case, stage: Stage, number: int, batches: Iterator[Batch], mark: Mark) -> Tensor:
    """The same step cut at the head maps, so that each part of its backward ends somewhere.

    The loss stage works on leaves that share the maps' memory; their gradients are what enters the network's backward,
    as they would without the cut.
    """
    next(batches)
    mark("data")
    images, targets = case.moved(number)
    mark("to device")
    maps = case.forward(images)
    mark("forward")
    leaves = leaves_of(maps)
    loss = stage(case, leaves, targets, mark)
    mark("loss")
    loss.backward()
    mark("loss backward")
    case.optimizer.zero_grad(set_to_none=True)
    outputs, cut = [*maps.cls_logits, *maps.bbox_deltas], [*leaves.cls_logits, *leaves.bbox_deltas]
    torch.autograd.backward(outputs, [leaf.grad for leaf in cut])
    mark("backward")
    case.finish(loss)
    mark("optimiser")
    return loss.detach()
