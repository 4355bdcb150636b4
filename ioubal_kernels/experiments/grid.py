"""The grid of trainings behind each of the paper's tables: rows (detectors) times arms (losses)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..detection.architectures import MODELS
from ..detection.config import Config
from ..detection.presets import PRESETS, preset

LONG = ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90", "APs", "APm", "APl")
PRIMARY = ("AP75", "AP80")
"""The outcomes that are tested, with Holm's correction for their number; all others are described."""


@dataclass(frozen=True)
class Arm:
    """One loss of a comparison.

    Attributes:
        name: in folders, files and options.
        label: in tables and legends.
        loss: "baseline", "cls", "loc" or "both": what `--loss` makes of the row's configuration.
        changes: more configuration values by dotted key.
    """

    name: str
    label: str
    loss: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def apply(self, config: Config) -> None:
        """Turn a row's configuration into this arm's."""
        config.set_loss(self.loss)
        for key, value in self.changes.items():
            config.set(key, value)


BASELINE = Arm("baseline", "baseline", "baseline")
CLS = Arm("cls", "+ IoU-balanced Cls", "cls")
LOC = Arm("loc", "+ IoU-balanced Loc", "loc")
BOTH = Arm("both", "IoU-balanced", "both")
# Weighting by IoU with a w_loc from the start of training ends with a larger localisation loss than the baseline's: is
# a larger loss all there is to it?
CONTROL = Arm("control", "baseline, Loc loss x 2", "baseline", {"loss.w_loc": 2.0})


def _exponents() -> tuple[Arm, ...]:
    """Table 3: eta alone, lambda alone with w_loc measured for each, and Eq. 7 in place of w_loc."""
    etas = [Arm(f"eta-{v:g}", f"eta {v:g}", "cls", {"loss.eta": v}) for v in (1.0, 1.4, 1.5, 1.6)]
    lambdas = [
        Arm(f"lambda-{v:g}", f"lambda {v:g}", "loc", {"loss.lambda_": v, "loss.w_loc": "auto"})
        for v in (0.5, 1.0, 1.5, 1.8)
    ]
    eq7 = {"loss.lambda_": 1.5, "loss.normalize_loc": True, "loss.w_loc": 1.0}
    return (BASELINE, *etas, *lambdas, Arm("eq7", "lambda 1.5, Eq. 7", "loc", eq7), CONTROL)


_COMPONENTS = (BASELINE, CLS, LOC, BOTH, CONTROL)
_PAIR = (BASELINE, BOTH, CONTROL)


@dataclass(frozen=True)
class Row:
    """A detector of a table.

    Attributes:
        name: the paper's row, a key of `paper.TABLES`.
        label: the detector in words.
        arms: of this row; the first one is what the others are compared with.
    """

    name: str
    label: str
    arms: tuple[Arm, ...]


@dataclass(frozen=True)
class Table:
    """One of the paper's tables.

    Attributes:
        title: in words.
        data: "coco", "voc" or "cityscapes".
        metrics: that are shown.
        rows: the paper's detectors.
        preset_of: the number of the table whose configurations it shares.
    """

    title: str
    data: str
    metrics: tuple[str, ...]
    rows: tuple[Row, ...]
    preset_of: str

    def preset_name(self, row: Row) -> str:
        """The full-size configuration of a row."""
        return f"{self.preset_of}_{row.name}"


LABELS = {
    "retinanet_r18": "RetinaNet R18",
    "retinanet_r50": "RetinaNet R50",
    "retinanet_r101": "RetinaNet R101",
    "retinanet_x101": "RetinaNet X101",
    "foveabox_r50": "FoveaBox R50",
    "ssd300": "SSD300",
    "ssd512": "SSD512",
    "faster_rcnn_r50": "Faster R-CNN R50",
    "faster_rcnn_r101": "Faster R-CNN R101",
}
_RETINANETS = ("retinanet_r50", "retinanet_r101", "retinanet_x101")


def _rows(names: tuple[str, ...], arms: tuple[Arm, ...] = _PAIR) -> tuple[Row, ...]:
    return tuple(Row(name, LABELS[name], arms) for name in names)


_SHORT = ("AP", "AP50", "AP75", "AP80", "APs", "APm", "APl")
_ONE = ("retinanet_r50",)
TABLES: dict[str, Table] = {
    "table1": Table(
        "Table 1: detectors on COCO",
        "coco",
        _SHORT,
        (
            *_rows((*_RETINANETS, "foveabox_r50", "ssd300", "ssd512")),
            *_rows(("faster_rcnn_r50", "faster_rcnn_r101"), (BASELINE,)),
        ),
        "table1",
    ),
    "table2": Table("Table 2: both losses, alone and together", "coco", LONG, _rows(_ONE, _COMPONENTS), "table2"),
    "table3": Table("Table 3: the exponents eta and lambda", "coco", LONG, _rows(_ONE, _exponents()), "table2"),
    "table4": Table("Table 4: backbones", "coco", LONG, _rows(("retinanet_r18", *_RETINANETS)), "table4"),
    "table5": Table(
        "Table 5: Pascal VOC, the metric of VOC 2007",
        "voc",
        ("AP", "AP50", "AP60", "AP70", "AP75", "AP80", "AP90"),
        _rows(("ssd300", "ssd512", *_RETINANETS)),
        "table5",
    ),
    "table6": Table("Table 6: Cityscapes", "cityscapes", _SHORT, _rows(_RETINANETS[:2]), "table6"),
    "table7": Table("Table 7: a two-stage detector", "coco", LONG, _rows(("faster_rcnn_r50",), _COMPONENTS), "table7"),
}


def full_rows(table: Table) -> list[tuple[Row, Config]]:
    """Every row with its full-size configuration."""
    return [(row, preset(table.preset_name(row))) for row in table.rows]


def tiny_rows(table: Table) -> list[tuple[Row, Config]]:
    """One row for each detector on the backbone that trains from scratch: what differs in size alone becomes one."""
    found: dict[str, tuple[Row, Config]] = {}
    for row in table.rows:
        name = table.preset_name(row)
        tiny = MODELS[PRESETS[name][1]["model"]["name"]].tiny
        if tiny not in found:
            found[tiny] = Row(row.name, tiny, row.arms), preset(f"{name}_tiny")
    return list(found.values())
