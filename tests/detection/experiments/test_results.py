"""The numbers of a reproduction, read back from its files."""

from __future__ import annotations

import json
import shutil
import statistics

import pytest

from ioubal_kernels.detection.errors import UsageError
from ioubal_kernels.detection.presets import load_config
from ioubal_kernels.detection.results import load_detections, save_detections
from ioubal_kernels.detection.rundir import read_log
from ioubal_kernels.experiments.page import tables_of, write_tables
from ioubal_kernels.experiments.results import RESULTS_FILE, load_results, metric, save_results
from ioubal_kernels.experiments.study import load_run, study_of_plan, study_of_runs
from ioubal_kernels.experiments.tables import Cells, in_short, to_html, to_markdown


@pytest.fixture(scope="module")
def study(reproduction):
    return study_of_plan(reproduction.plan, reproduction.folder, command="ioubal reproduce table2 ...")


@pytest.fixture(scope="module")
def saved(study, reproduction):
    return json.loads(save_results(study, reproduction.folder).read_text())


def test_every_run_is_in_it(saved, reproduction):
    assert saved["table"] == "table2" and saved["command"] == "ioubal reproduce table2 ..."
    assert saved["trainings"] == {"finished": 6, "planned": 6}
    (row,) = saved["rows"]
    assert [arm["name"] for arm in row["arms"]] == ["baseline", "both", "control"]
    for arm in row["arms"]:
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        for run in arm["runs"]:
            folder = reproduction.folder / run["folder"]
            metrics = json.loads((folder / "metrics.json").read_text())
            assert run["metrics"]["AP50"] == pytest.approx(100 * metrics["AP50"], rel=1e-5)
        values = [run["metrics"]["AP50"] for run in arm["runs"]]
        assert arm["mean"]["AP50"]["mean"] == pytest.approx(statistics.fmean(values), rel=1e-5, abs=1e-9)
        assert arm["mean"]["AP50"]["sd"] == pytest.approx(statistics.stdev(values), rel=1e-4, abs=1e-6)
    assert row["arms"][1]["runs"][0]["loss"]["w_loc"] > 1
    assert row["arms"][2]["runs"][0]["loss"]["w_loc"] == 2.0
    assert row["versions"]["torch"] and row["machine"]["cpu"]


def test_differences_are_to_the_baseline(saved):
    base, both, _ = saved["rows"][0]["arms"]
    pairs = zip(both["runs"], base["runs"], strict=True)
    differences = [ours["metrics"]["AP75"] - plain["metrics"]["AP75"] for ours, plain in pairs]
    assert base["difference"] is None
    assert both["difference"]["AP75"]["mean"] == pytest.approx(statistics.fmean(differences), abs=1e-4)
    assert both["difference"]["AP75"]["p"] is None
    assert both["paper"]["AP75"] == 38.0


def test_arms_start_alike(saved, study):
    assert saved["rows"][0]["same_initialisation_and_data"] is True
    arms = saved["rows"][0]["arms"]
    for number in range(2):
        assert len({arm["runs"][number]["weights"] for arm in arms}) == 1
    assert arms[0]["runs"][0]["weights"] != arms[0]["runs"][1]["weights"]
    # And see the same images in the same order.
    positives = [[r["positives"] for r in arm.runs[0].events("step")] for arm in study.rows[0].arms]
    assert positives[0] == positives[1] == positives[2]


def test_normalisers_are_logged(study):
    for arm in study.rows[0].arms:
        steps = {record["step"]: record for record in arm.runs[0].events("step")}
        assert [step for step, record in steps.items() if "cls_normalizer" in record] == [1, 2, 4]
        # Untrained boxes overlap little: the weights are small, what makes up for them is large.
        assert 1.5 < steps[1]["cls_normalizer"] < 20 and 1.5 < steps[1]["loc_normalizer"] < 20
    both = study.rows[0].arm("both").runs[0]
    # One batch calibrated w_loc, the first of the training: Eq. 7's normaliser of the first step.
    assert both.end["w_loc"] == pytest.approx(both.events("step")[0]["loc_normalizer"], rel=1e-4)


def test_results_are_read_back_wherever_the_folder_is(saved, reproduction, tmp_path):
    copied = shutil.copytree(reproduction.folder, tmp_path / "copied")
    again = load_results(copied)
    assert [arm.label for arm in again.rows[0].arms] == ["baseline", "IoU-balanced", "baseline, Loc loss x 2"]
    assert again.table == "table2" and again.planned == 6
    assert json.loads(save_results(again, copied).read_text())["rows"] == saved["rows"]


@pytest.mark.parametrize("text", ["", "[]", '{"format": "other"}', '{"format": "ioubal_kernels results 1"}'])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / RESULTS_FILE).write_text(text)
    with pytest.raises(UsageError, match=r"results.json: not the results of a reproduction"):
        load_results(tmp_path)


def test_tables(study, reproduction):
    row = study.rows[0]
    text = write_tables(study, reproduction.folder).read_text()
    assert text.startswith("# Table 2: both losses, alone and together\n")
    base = statistics.fmean(metric(run, "AP50") for run in row.arms[0].runs)
    assert "| baseline | 2 | " in text and f" {base:.1f} ± " in text
    assert "the paper: RetinaNet R50 on COCO 2017" in text and " 34.4 |" in text
    assert "No tests below 6 seeds." in text and "checked by digests" in text
    first = tables_of(study)[0]
    assert all(len(cells) in (1, len(first.header)) for cells in first.rows)
    assert in_short(row).startswith("Against the baseline, 2 seeds. IoU-balanced: AP75 ")


def test_cells_are_escaped():
    table = Cells("a <b>", ["", "x|y"], [["<i>", "+1.0 [-1.0, +3.0] p 0.031"]], "note & more")
    shown = to_html(table)
    assert "<i>" not in shown and "&lt;i&gt;" in shown and "note &amp; more" in shown
    assert "+1.0<small>[-1.0, +3.0]</small><small>p 0.031</small>" in shown.replace(
        "</small><small> ", "</small><small>"
    )
    assert "x\\|y" in to_markdown(table)


def test_runs_named_by_hand_are_grouped(reproduction):
    folders = [reproduction.folder / job.folder for job in reproduction.plan.jobs()]
    study = study_of_runs([*folders[1:], folders[0]], title="mine")
    (row,) = study.rows
    assert row.label == "retinanet_tiny"
    assert row.arms[0].name == "baseline" and len(row.arms) == 3
    assert sorted(arm.name for arm in row.arms if arm.label == "IoU-balanced") == ["both"]
    assert [sorted(arm.by_seed) for arm in row.arms] == [[0, 1]] * 3
    assert row.same_start is True
    with pytest.raises(UsageError, match="the same training, seed 0, as"):
        study_of_runs([folders[0], folders[0]], title="twice")


def test_what_was_evaluated_makes_a_row(reproduction, tmp_path):
    """The images and boxes of the evaluation, not where they lie."""
    first, _, other = [reproduction.folder / job.folder for job in reproduction.plan.jobs()][:3]
    moved, changed = (shutil.copytree(other, tmp_path / name) for name in ("moved", "changed"))
    config = load_config(str(moved / "config.yaml"))
    config.set("data.path", "elsewhere")
    (moved / "config.yaml").write_text(config.to_yaml())
    assert len(study_of_runs([first, moved], title="two").rows) == 1
    start = next(record for record in read_log(changed) if record["event"] == "start")
    log = (changed / "log.jsonl").read_text().replace(start["eval_data"], "f" * 64)
    (changed / "log.jsonl").write_text(log)
    assert len(study_of_runs([first, changed], title="two").rows) == 2
    # What it was evaluated on last, where it went on with something else.
    with (changed / "log.jsonl").open("a") as file:
        file.write(json.dumps({**start, "event": "resume", "step": 4}) + "\n")
    assert len(study_of_runs([first, changed], title="two").rows) == 1


def test_what_was_evaluated_on_other_data_is_not_averaged(reproduction, saved, tmp_path):
    copied = shutil.copytree(reproduction.folder, tmp_path / "copied")
    log = copied / reproduction.plan.jobs()[3].folder / "log.jsonl"
    start = next(record for record in read_log(log.parent) if record["event"] == "start")
    log.write_text(log.read_text().replace(start["eval_data"], "f" * 64))
    for read in (lambda: study_of_plan(reproduction.plan, copied), lambda: load_results(copied)):
        with pytest.raises(UsageError, match=r"seed-1: evaluated on .* \(f{12}...\), expected the images and boxes of"):
            read()


def test_what_a_table_says_of_seeds_and_settings(reproduction, tmp_path):
    runs = {(job.arm, job.seed): reproduction.folder / job.folder for job in reproduction.plan.jobs()}
    study = study_of_runs([runs["baseline", 0], runs["baseline", 1], runs["both", 1]], title="uneven")
    assert in_short(study.rows[0]).startswith("Against the baseline, 1 seed.")
    study = study_of_runs([runs["baseline", 0], runs["both", 1]], title="no seed in common")
    (table,) = tables_of(study)[:1]
    assert study.rows[0].same_start is None and "digests" not in table.note and "interval" not in table.note
    assert in_short(study.rows[0]) == ""
    # Another learning rate is on record; a folder's name makes no baseline.
    faster = shutil.copytree(runs["both", 0], tmp_path / "baseline")
    config = load_config(str(faster / "config.yaml"))
    config.set("optim.lr", 0.5)
    (faster / "config.yaml").write_text(config.to_yaml())
    study = study_of_runs([faster, runs["baseline", 0], runs["both", 0]], title="rates")
    (row,) = study.rows
    assert row.arms[0].name == "baseline" and row.arms[0].runs[0].config.loss.label() == "baseline"
    assert len(row.arms) == 3
    notes = tables_of(study)[0].note
    assert "Not the loss alone differs: " in notes and "optim.lr: 0.003 -> 0.5" in notes


def test_a_configuration_that_changed_on_the_way_is_named(reproduction, tmp_path):
    run = shutil.copytree(reproduction.folder / reproduction.plan.jobs()[0].folder, tmp_path / "run")
    with (run / "log.jsonl").open("a") as log:
        log.write(json.dumps({"event": "resume", "step": 2, "changes": ["loss.eta: 1.5 -> 0.0"]}) + "\n")
    note = tables_of(study_of_runs([run], title="changed"))[0].note
    assert "baseline, seed 0, went on with another configuration: loss.eta: 1.5 -> 0.0." in note


def test_another_w_loc_makes_no_baseline(reproduction, tmp_path):
    """Named first, it would take the place of what the others are compared with."""
    baseline = reproduction.folder / reproduction.plan.jobs()[0].folder
    control = shutil.copytree(baseline, tmp_path / "control")
    config = load_config(str(control / "config.yaml"))
    assert config.loss.label() == "baseline"
    config.set("loss.w_loc", 2.0)
    (control / "config.yaml").write_text(config.to_yaml())
    (row,) = study_of_runs([control, baseline], title="two").rows
    assert [arm.label for arm in row.arms] == ["baseline", "baseline, w_loc 2"]
    config.set("loss.lambda_", 1.5)
    config.set("loss.normalize_loc", True)
    (control / "config.yaml").write_text(config.to_yaml())
    (row,) = study_of_runs([control, baseline], title="two").rows
    assert [arm.label for arm in row.arms] == ["baseline", "+ IoU-balanced Loc, Eq. 7"]


def test_unfinished_and_foreign_folders(reproduction, tmp_path):
    with pytest.raises(UsageError, match="expected the folder of a run or of a reproduction"):
        load_run(tmp_path)
    run = shutil.copytree(reproduction.folder / reproduction.plan.jobs()[0].folder, tmp_path / "run")
    (run / "metrics.json").write_text("{}")
    with pytest.raises(UsageError, match="not the metrics of a run"):
        load_run(run)
    (run / "metrics.json").unlink()
    (run / "log.jsonl").write_text("")
    with pytest.raises(UsageError, match="not finished .*--resume"):
        load_run(run)


def test_table_5_alone_takes_the_metric_of_2007(reproduction, tmp_path):
    run = shutil.copytree(reproduction.folder / reproduction.plan.jobs()[0].folder, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    voc = {"AP": 0.5, **{f"AP{percent}": percent / 1000 for percent in range(50, 100, 5)}, "per_class": {}}
    (run / "metrics.json").write_text(json.dumps({**metrics, "VOC07": voc}))
    assert load_run(run).metrics == load_run(run, "table1").metrics == {**metrics, "VOC07": voc}
    found = load_run(run, "table5")
    assert metric(found, "AP80") == pytest.approx(8.0) and found.metrics["thresholds"]["0.80"] == 0.08
    assert list(found.metrics["thresholds"]) == list(metrics["thresholds"])
    assert found.metrics["APs"] == metrics["APs"] and found.metrics["per_class"] == metrics["per_class"]


def test_a_run_without_evaluation_is_named_so(reproduction, tmp_path):
    run = shutil.copytree(reproduction.folder / reproduction.plan.jobs()[0].folder, tmp_path / "run")
    (run / "metrics.json").unlink()
    with pytest.raises(UsageError, match="was not evaluated, since its data had no split for that; `ioubal eval"):
        load_run(run)


def test_detections_are_kept(study, tmp_path):
    run = study.runs[0]
    found = run.detections
    assert len(found) == run.metrics["images"]
    assert sum(len(item.scores) for item in found) == run.metrics["detections"]
    save_detections(tmp_path / "again.npz", found)
    for one, other in zip(found, load_detections(tmp_path / "again.npz"), strict=True):
        assert one.image_id == other.image_id
        assert one.boxes.equal(other.boxes) and one.scores.equal(other.scores) and one.labels.equal(other.labels)
    save_detections(tmp_path / "none.npz", [])
    assert load_detections(tmp_path / "none.npz") == []
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 not an archive")
    for name in ("bad.npz", "missing.npz"):
        with pytest.raises(UsageError, match="not the detections of a run"):
            load_detections(tmp_path / name)
