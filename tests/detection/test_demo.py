"""`ioubal demo` from images to the page, with few of them."""

from __future__ import annotations

import json

import pytest

from ioubal_kernels.experiments import demo

SMALL = [
    "--set", "data.image_size=[64, 64]", "--set", "train.iterations=4", "--set", "train.batch_size=4",
    "--set", "train.eval_every=2", "--set", "train.device=cpu", "--set", "train.amp=off", "--set", "data.workers=0",
    "--set", "loss.calibration_batches=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"TRAIN_IMAGES": 12, "VAL_IMAGES": 4, "IMAGE_SIZE": 64}.items():
        monkeypatch.setattr(demo, name, value)


def test_demo(ioubal, tmp_path):
    out = tmp_path / "a b" / "demo"
    code, shown, err = ioubal("demo", "-o", out, *SMALL)
    assert (code, err) == (0, "")
    assert "baseline" in shown and "IoU-balanced" in shown and "AP90" in shown
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(part.startswith("data:") for part in page.split('src="')[1:])
    logs = {}
    for name in ("baseline", "both"):
        metrics = json.loads((out / name / "metrics.json").read_text())
        assert f"<td>{100 * metrics['AP']:.1f}</td>" in page
        logs[name] = [json.loads(line) for line in (out / name / "log.jsonl").read_text().splitlines()]
    positives = {n: [r["positives"] for r in log if r["event"] == "step"] for n, log in logs.items()}
    assert positives["baseline"] == positives["both"]  # the same images in the same order
    # A second demo in the same folder replaces the first, and reuses its images.
    images = {p: p.stat().st_mtime_ns for p in (out / "data").rglob("*") if p.is_file()}
    assert ioubal("demo", "-o", out, *SMALL)[0] == 0
    assert {p: p.stat().st_mtime_ns for p in images} == images


def test_demo_leaves_other_peoples_folders_alone(ioubal, tmp_path):
    (tmp_path / "baseline").mkdir()
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, err = ioubal("demo", "-o", tmp_path, *SMALL)
    assert code == 2
    assert "thesis.tex" in err
    assert {p.name for p in tmp_path.iterdir()} == {"baseline", "thesis.tex"}
