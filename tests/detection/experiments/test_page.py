"""The page: one file with everything in it, true to the numbers, and the pictures in it well-formed."""

from __future__ import annotations

import base64
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from ioubal_kernels.detection.data import load_pair, make_synthetic
from ioubal_kernels.detection.errors import OutputError, UsageError
from ioubal_kernels.detection.presets import load_config
from ioubal_kernels.experiments import figures
from ioubal_kernels.experiments.cost import BACKENDS, inference_times, training_cost
from ioubal_kernels.experiments.drawing import colors, smooth
from ioubal_kernels.experiments.page import _gradient_norms, write_page
from ioubal_kernels.experiments.pictures import choose_images, detections_svg
from ioubal_kernels.experiments.report import report
from ioubal_kernels.experiments.results import save_results
from ioubal_kernels.experiments.study import study_of_plan, study_of_runs

SVG = "{http://www.w3.org/2000/svg}"
MEASURED = {"ms": 12.34, "rounds_ms": [12.0, 13.0], "peak_mib": 321.0}
COST = {
    "training": {arm: dict.fromkeys(BACKENDS, MEASURED) for arm in ("baseline", "both")},
    "inference_ms": {"baseline": 3.21, "both": 3.45, "control": 3.3},
    "device": "cpu", "threads": 2, "batch_size": 4, "image_size": [64, 64], "memory": "process, resident",
}  # fmt: skip


@pytest.fixture(scope="module")
def study(reproduction):
    study = study_of_plan(reproduction.plan, reproduction.folder, command="ioubal reproduce table2 <options>")
    study.rows[0].cost = COST
    return study


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_page(study, folder / "report.html", notes=["a <note>"], plots=folder / "plots")
    return folder / "report.html"


def move_data(run: Path, to: Path) -> None:
    """Say in a run's configuration that its data is elsewhere, and leave the place alone to tell which it is."""
    config = load_config(str(run / "config.yaml"))
    config.set("data.path", str(to))
    (run / "config.yaml").write_text(config.to_yaml())
    log = (run / "log.jsonl").read_text().replace('"eval_data"', '"other"')
    (run / "log.jsonl").write_text(log)


def embedded(text: str) -> list[str]:
    """The SVG pictures in a page."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    return [base64.b64decode(data).decode() for data in found]


def test_nothing_is_loaded_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    for attribute, value in re.findall(r'\b(src|href|xlink:href|action|srcset)="([^"]*)"', text):
        assert value.startswith(("data:", "#")), (attribute, value[:80])
    assert "<script" not in text and "@import" not in text and "url(" not in text
    for svg in embedded(text):
        for value in re.findall(r'href="([^"]*)"', svg):
            assert value.startswith(("data:", "#"))


def test_it_shows_every_figure_and_the_numbers(page, study):
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"<h3>([^<]+)</h3>", text)
    for start in (
        "Figure 1: ", "Figure 2: ", "Figure 3a: ", "Figure 3b: ", "Figure 4: ", "The weight of ", "The normaliser ",
        "Rank correlation ", "Losses while ", "Average precision while ", "Average precision by ", "Cost: ",
    ):  # fmt: skip
        assert sum(heading.startswith(start) for heading in headings) == 1, start
    assert "a &lt;note&gt;" in text
    assert "ioubal reproduce table2 &lt;options&gt;" in text
    assert "12.3" in text and "321" in text
    assert study.runs[0].start["versions"]["torch"] in text
    assert "loss.w_loc: 1.0 -&gt; 2.0" in text  # what the control changes of the baseline
    pictures = embedded(text)
    assert len(pictures) == len(list((page.parent / "plots").glob("*.svg"))) == 11
    for svg in pictures:
        assert ElementTree.fromstring(svg).tag == f"{SVG}svg"
    files = {path.read_text(encoding="utf-8") for path in (page.parent / "plots").iterdir()}
    assert files == set(pictures)


def test_the_same_runs_give_the_same_plots(study):
    assert figures.plot_losses(study.rows[0]).svg == figures.plot_losses(study.rows[0]).svg


def test_one_run_alone(study, tmp_path):
    """Without anything to compare with, without kept detections, and when its data has gone."""
    run = shutil.copytree(study.runs[0].folder, tmp_path / "run")
    (run / "detections.npz").unlink()
    text = report([run]).read_text(encoding="utf-8")
    assert "kept no detections" in text and "Figure 3a" not in text
    move_data(run, tmp_path / "gone")
    text = report([run]).read_text(encoding="utf-8")
    assert "No pictures: " in text and "gone" in text
    assert "Figure 2" in text  # Eq. 13 and 14 need no data
    other = make_synthetic(tmp_path / "other", train=4, val=2, size=64, classes=3, seed=9, workers=1)
    move_data(run, Path(other))
    assert "is not the data set that" in report([run]).read_text(encoding="utf-8")


def test_figure_2_without_positives_says_so(study, monkeypatch):
    """The first batches of real data may be without boxes; the page comes all the same."""
    none = [(torch.zeros(0, 4), torch.zeros(0, 4))] * 4
    monkeypatch.setattr("ioubal_kernels.detection.models.Detector.collect_deltas", lambda *a, **k: none)
    plot = _gradient_norms(study)
    assert "No points: the first batches of the training images have no positives." in plot.caption
    assert "Points: " not in plot.caption and ElementTree.fromstring(plot.svg).tag == f"{SVG}svg"


def test_detections_beside_the_ground_truth(tiny_data, study):
    dataset = load_pair(tiny_data).evaluation
    chosen = choose_images(dataset, 3)
    found = {"<a>": study.runs[0].detections, "b": study.runs[1].detections}
    scores = sorted((s for item in found["<a>"] if item.image_id in chosen for s in item.scores.tolist()), reverse=True)
    threshold = scores[min(4, len(scores) - 1)]
    root = ElementTree.fromstring(detections_svg(dataset, found, chosen, threshold))
    titles = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "title"]
    assert titles == ["ground truth", "<a>", "b"]
    shown = [title.text for title in root.iter(f"{SVG}title")]
    truth = [record for record in dataset.records if record.id in chosen]
    assert sum("score" not in text for text in shown) == sum(len(record.boxes) for record in truth)
    expected = sum(
        s >= threshold for items in found.values() for i in items if i.image_id in chosen for s in i.scores.tolist()
    )
    assert sum("score" in text for text in shown) == expected > 0
    assert len(list(root.iter(f"{SVG}image"))) == 3  # each photograph once, however often it is shown


def test_images_with_boxes_are_chosen(tiny_data):
    dataset = load_pair(tiny_data).evaluation
    assert len(choose_images(dataset, 3)) == 3
    assert len(set(choose_images(dataset, 100))) == len(dataset)


def test_colors_and_smoothing():
    names = ["baseline", "both", *(f"x{i}" for i in range(12))]
    assert colors(names)["baseline"] != colors(names)["both"]
    assert set(colors(names)) == set(names)
    assert smooth([1.0] * 30).tolist() == pytest.approx([1.0] * 30)
    assert smooth([0.0, 3.0, 0.0], share=0.5).tolist() == pytest.approx([1.5, 1.0, 1.5])


def test_cost_is_measured(study, tiny_data):
    run = study.rows[0].arm("both").runs[0]
    found = training_cost(run.config, tiny_data, run.end["w_loc"])
    assert len(found["ms"]) > 5 and all(ms > 0 for ms in found["ms"])
    assert found["peak_mib"] > 50 and found["image_size"] == [64, 64]
    times = inference_times({"one": run, "two": study.runs[0]}, load_pair(tiny_data).evaluation)
    assert set(times) == {"one", "two"} and all(ms > 0 for ms in times.values())


@pytest.mark.parametrize("what", ["several", "kind", "folder", "mixed"])
def test_mistakes(what, study, reproduction, tmp_path):
    runs = [run.folder for run in study.runs]
    if what == "several":
        with pytest.raises(UsageError, match=r"-o FILE.html: expected the page's name with several runs"):
            report(runs)
    elif what == "kind":
        with pytest.raises(UsageError, match=r"expected the name of an HTML file, got .*page.pdf"):
            report(runs, tmp_path / "page.pdf")
    elif what == "folder":
        with pytest.raises(OutputError, match="does not exist"):
            report(runs, tmp_path / "none" / "page.html")
    else:
        save_results(study, reproduction.folder)
        with pytest.raises(UsageError, match="is a reproduction with a page of its own: expected it alone"):
            report([reproduction.folder, runs[0]], tmp_path / "page.html")


def test_two_detectors_on_one_page(study, reproduction, tmp_path):
    """Runs of different data sets are rows of their own."""
    other = shutil.copytree(study.runs[0].folder, tmp_path / "other")
    shutil.copytree(study.rows[0].dataset.root, tmp_path / "elsewhere")
    move_data(other, tmp_path / "elsewhere")
    made = study_of_runs([study.runs[0].folder, other], title="two")
    assert [row.data for row in made.rows] == [study.rows[0].dataset.root.rsplit("/", 1)[-1], "elsewhere"]
    page = write_page(made, tmp_path / "two.html").read_text(encoding="utf-8")
    assert "Results: retinanet_tiny on elsewhere" in page
