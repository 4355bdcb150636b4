"""What the paper reports: the figures of Tables 1 to 7, in per cent, beside which ours are shown.

Source: Wu, Yang, Wang and Li, "IoU-balanced loss functions for single-stage object detection". Keys of `TABLES` are
table, row (a detector) and arm; see `grid.py` for both.
"""

from __future__ import annotations

_SHORT = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_LONG = (*_SHORT, "AP60", "AP70", "AP80", "AP90")
_VOC = ("AP", "AP50", "AP60", "AP70", "AP80", "AP90")

Figures = dict[str, float]


def _rows(names: tuple[str, ...], text: str) -> dict[str, dict[str, Figures]]:
    """Lines `row arm value ...`, a value for every name."""
    found: dict[str, dict[str, Figures]] = {}
    for line in text.strip().splitlines():
        row, arm, *values = line.split()
        found.setdefault(row, {})[arm] = dict(zip(names, map(float, values), strict=True))
    return found


TABLES: dict[str, dict[str, dict[str, Figures]]] = {
    # COCO test-dev. The baselines are the toolbox's.
    "table1": _rows(
        _SHORT,
        """
        faster_rcnn_r50 baseline 36.2 58.5 38.9 21.0 38.9 45.3
        faster_rcnn_r101 baseline 38.8 60.9 42.1 22.6 42.4 48.5
        foveabox_r50 baseline 37.0 56.7 39.1 20.3 40.0 45.6
        ssd300 baseline 25.7 44.2 26.4 7.0 27.1 41.5
        ssd512 baseline 29.6 49.5 31.2 11.7 33.0 44.2
        retinanet_r50 baseline 35.9 55.8 38.4 19.9 38.8 45.0
        retinanet_r101 baseline 38.1 58.5 40.8 21.2 41.5 48.2
        retinanet_x101 baseline 39.4 60.2 42.3 22.5 42.8 49.8
        foveabox_r50 both 38.0 56.9 40.1 21.2 40.8 46.7
        ssd300 both 27.4 45.0 28.8 8.5 28.9 43.0
        ssd512 both 30.9 50.1 32.9 12.6 34.5 45.1
        retinanet_r50 both 37.0 56.2 39.7 20.6 39.8 46.3
        retinanet_r101 both 39.2 58.7 42.3 21.5 42.4 49.4
        retinanet_x101 both 40.5 60.3 43.6 23.0 43.7 51.0
        """,
    ),
    # COCO val-2017, image scale [600, 1000].
    "table2": _rows(
        _LONG,
        """
        retinanet_r50 baseline 34.4 53.9 36.6 17.2 38.2 48.0 49.2 41.9 30.0 11.2
        retinanet_r50 cls 35.1 54.6 37.5 18.4 38.5 47.8 50.2 42.7 31.0 11.4
        retinanet_r50 loc 35.2 53.7 37.6 17.9 39.3 48.5 49.3 42.3 31.8 13.1
        retinanet_r50 both 35.7 54.3 38.0 17.7 39.4 48.8 50.0 43.0 32.1 13.5
        """,
    ),
    "table3": _rows(
        ("AP",),
        """
        retinanet_r50 baseline 34.4
        retinanet_r50 eta-1 34.7
        retinanet_r50 eta-1.4 35.0
        retinanet_r50 eta-1.5 35.1
        retinanet_r50 eta-1.6 34.9
        retinanet_r50 lambda-0.5 35.0
        retinanet_r50 lambda-1 35.1
        retinanet_r50 lambda-1.5 35.2
        retinanet_r50 lambda-1.8 35.1
        """,
    ),
    # COCO val-2017, image scale [800, 1333].
    "table4": _rows(
        _LONG,
        """
        retinanet_r18 baseline 30.8 49.6 32.4 16.1 34.0 40.7 45.0 37.6 26.1 8.6
        retinanet_r50 baseline 35.6 55.5 38.3 20.0 39.6 46.8 51.0 43.2 31.1 11.3
        retinanet_r101 baseline 37.7 57.5 40.4 21.1 42.2 49.5 53.3 46.0 33.7 13.0
        retinanet_x101 baseline 39.0 59.4 41.7 22.6 43.4 50.9 55.2 47.6 34.9 14.1
        retinanet_r18 both 32.0 49.7 34.0 16.3 34.8 43.3 45.8 39.0 28.0 10.6
        retinanet_r50 both 36.7 55.7 39.3 20.7 40.6 48.0 51.5 44.3 32.8 13.9
        retinanet_r101 both 38.8 58.0 41.6 21.1 43.1 51.3 54.1 46.9 35.3 15.4
        retinanet_x101 both 40.4 60.2 43.1 23.2 44.8 52.2 55.9 48.6 36.9 16.3
        """,
    ),
    # VOC2007 test, 11-point metric.
    "table5": _rows(
        _VOC,
        """
        ssd300 baseline 49.3 77.3 71.8 60.8 42.4 14.0
        ssd512 baseline 51.3 80.2 75.3 64.6 44.2 12.7
        retinanet_r50 baseline 51.9 79.5 74.9 64.3 44.7 16.5
        retinanet_r101 baseline 54.7 80.8 76.7 66.6 49.5 20.3
        retinanet_x101 baseline 56.2 82.0 78.3 68.2 51.6 22.0
        ssd300 both 50.6 77.8 72.4 62.4 44.9 14.7
        ssd512 both 52.8 80.6 75.8 66.1 47.0 16.1
        retinanet_r50 both 53.3 79.8 75.1 65.4 47.6 19.4
        retinanet_r101 both 56.0 81.0 77.0 68.0 51.1 23.1
        retinanet_x101 both 57.7 82.1 78.3 69.5 53.7 25.1
        """,
    ),
    # Cityscapes val.
    "table6": _rows(
        _SHORT,
        """
        retinanet_r50 baseline 39.1 64.1 38.5 15.7 40.0 59.1
        retinanet_r101 baseline 39.7 64.6 40.6 15.1 40.3 60.5
        retinanet_r50 both 40.3 64.6 41.3 17.6 40.9 60.3
        retinanet_r101 both 40.7 65.2 41.8 16.0 41.1 62.3
        """,
    ),
    # COCO val-2017, image scale [600, 1000].
    "table7": _rows(
        _LONG,
        """
        faster_rcnn_r50 baseline 35.7 56.8 38.5 18.8 39.7 47.4 52.1 43.9 30.6 9.3
        faster_rcnn_r50 cls 36.1 57.4 38.8 19.5 40.0 48.0 52.5 44.8 31.1 9.4
        faster_rcnn_r50 loc 36.3 56.6 39.3 18.7 40.5 48.4 52.3 45.0 32.0 10.5
        faster_rcnn_r50 both 36.3 57.0 39.1 19.0 40.1 48.8 52.5 44.8 31.6 10.3
        """,
    ),
}

W_LOC = {0.0: 1.0, 0.5: 1.575, 1.0: 2.226, 1.5: 3.049, 1.8: 3.649}
"""Table 3: w_loc by lambda, RetinaNet R50 on COCO; Figure 2 is drawn with them."""


def figures(table: str, row: str, arm: str) -> Figures:
    """The paper's figures in per cent by metric; empty where it has none."""
    return TABLES[table].get(row, {}).get(arm, {})
