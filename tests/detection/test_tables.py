"""Metrics on the terminal."""

from __future__ import annotations

from rich.console import Console

from ioubal_kernels.detection.evaluate import MAIN_METRICS
from ioubal_kernels.detection.tables import metrics_table


def test_table_shows_what_could_not_be_measured():
    values = {**dict.fromkeys(MAIN_METRICS, 0.25), "APl": None, "AP": 0.5}
    console = Console(record=True, width=120, file=open("/dev/null", "w"))
    console.print(metrics_table({"r": values}))
    row = [cell.strip() for cell in console.export_text().splitlines()[3].strip("│").split("│")]
    assert row[0] == "r"
    assert row[1] == "50.0"
    assert row[2] == "25.0"
    assert row[-1] == "-"
