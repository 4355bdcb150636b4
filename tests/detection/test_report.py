"""The comparison page: one table, four pictures, everything inside the folder."""

from __future__ import annotations

import re

import pytest
import torch

from ioubal_kernels.detection.data import load_pair
from ioubal_kernels.detection.evaluate import ImageDetections, evaluate_detections
from ioubal_kernels.detection.plots import smooth
from ioubal_kernels.detection.report import RunSummary, metrics_table, write_report
from ioubal_kernels.detection.rundir import RunLog


@pytest.fixture
def runs(tiny_data, tmp_path):
    dataset = load_pair(tiny_data).evaluation
    summaries = []
    for name, shift in (("baseline", 6.0), ("<balanced>", 1.0)):
        found = [
            ImageDetections(
                r.id, torch.from_numpy(r.boxes) + shift, torch.full((len(r.labels),), 0.8), torch.from_numpy(r.labels)
            )
            for r in dataset.records
        ]  # fmt: skip
        metrics = evaluate_detections(dataset, found)
        folder = tmp_path / name.strip("<>")
        folder.mkdir()
        log = RunLog(folder)
        for step in range(1, 21):
            log.write("step", step=step, cls=1 / step, loc=0.5 / step)
        log.write("eval", step=20, metrics=metrics)
        summaries.append(RunSummary(name, folder, metrics, {"w_loc": "1.00"}, {d.image_id: d for d in found}))
    return dataset, summaries


def test_report(runs, tmp_path):
    dataset, summaries = runs
    page = write_report(tmp_path / "out", summaries, dataset, title="A & B", notes=["a note"])
    text = page.read_text(encoding="utf-8")
    links = re.findall(r'(?:src|href)="([^"]+)"', text)
    assert links == ["loss.png", "ap.png", "ap_by_threshold.png", "detections.png"]
    for link in links:
        data = (tmp_path / "out" / link).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(data) > 10_000
    assert "<title>A &amp; B</title>" in text
    assert "&lt;balanced&gt;" in text
    assert "<balanced>" not in text
    ap = summaries[0].metrics["AP"]
    assert f"<td>{100 * ap:.1f}</td>" in text
    assert f"<td>{100 * (summaries[1].metrics['AP'] - ap):+.1f}</td>" in text


def test_report_of_runs_that_found_nothing(runs, tmp_path):
    dataset, summaries = runs
    for summary in summaries:
        summary.metrics = evaluate_detections(dataset, [])
        summary.detections = {}
        (summary.folder / "log.jsonl").write_text("")
    assert write_report(tmp_path / "out", summaries[:1], dataset, title="t").is_file()
    assert write_report(tmp_path / "two", summaries, dataset, title="t").is_file()


def test_table_shows_what_could_not_be_measured(runs):
    from rich.console import Console

    _, summaries = runs
    console = Console(record=True, width=120, file=open("/dev/null", "w"))
    console.print(metrics_table({"r": {**summaries[0].metrics, "APl": None, "AP": 0.5}}))
    row = [cell.strip() for cell in console.export_text().splitlines()[3].strip("│").split("│")]
    assert row[0] == "r"
    assert row[1] == "50.0"
    assert row[-1] == "-"


def test_smooth_is_a_running_mean():
    assert smooth([1.0] * 30).tolist() == pytest.approx([1.0] * 30)
    assert smooth([0.0, 3.0, 0.0], share=0.5).tolist() == pytest.approx([1.5, 1.0, 1.5])
