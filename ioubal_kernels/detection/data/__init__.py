"""Datasets: COCO JSON, Pascal VOC, Cityscapes, the built-in synthetic set; checks, augmentation and batches.

pair = load_pair("path/to/dataset")
print(describe(pair.training, pair.evaluation))
for batch in TrainLoader(pair.training, TransformConfig(size=(192, 256)), batch_size=8): ...
"""

from .check import CheckReport, check_dataset, quick_check
from .convert import convert_dataset
from .detect import DatasetPair, describe, load_dataset, load_pair
from .loader import Batch, TrainLoader, boxes_to_original, eval_loader
from .records import BadImageError, DataError, Dataset, ImageRecord, make_record, to_coco_dict
from .synth import make_synthetic
from .transforms import TransformConfig

__all__ = [
    "BadImageError",
    "Batch",
    "CheckReport",
    "DataError",
    "Dataset",
    "DatasetPair",
    "ImageRecord",
    "TrainLoader",
    "TransformConfig",
    "boxes_to_original",
    "check_dataset",
    "convert_dataset",
    "describe",
    "eval_loader",
    "load_dataset",
    "load_pair",
    "make_record",
    "make_synthetic",
    "quick_check",
    "to_coco_dict",
]
