"""Training runs of ten steps: what they leave, resuming bit for bit, NaN policy, calibration."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ioubal_kernels.detection import train as train_module
from ioubal_kernels.detection.checkpoint import find_checkpoint, list_checkpoints
from ioubal_kernels.detection.data import TrainLoader, check_dataset
from ioubal_kernels.detection.errors import Interrupted, NonFiniteError, UsageError
from ioubal_kernels.detection.evaluate import MAIN_METRICS
from ioubal_kernels.detection.presets import load_config
from ioubal_kernels.detection.progress import Reporter
from ioubal_kernels.detection.rundir import data_on_record, read_log
from ioubal_kernels.detection.train import train

QUIET = Reporter(quiet=True)


def run(config, folder, **options):
    return train(config, Path(folder), reporter=QUIET, **options)


def flat(state, prefix="") -> dict[str, object]:
    """A nested state by dotted names."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{prefix}.{key}").items()}
    if isinstance(state, (list, tuple)):
        return {k: v for i, value in enumerate(state) for k, v in flat(value, f"{prefix}.{i}").items()}
    return {prefix: state}


def assert_same_state(first: Path, second: Path) -> None:
    """Everything in the newest checkpoints but time and the path of the data is equal to the last bit."""
    states = [flat(find_checkpoint(folder)[1]) for folder in (first, second)]
    for state in states:
        del state[".seconds"], state[".config"]
    assert states[0].keys() == states[1].keys()
    assert sum(isinstance(v, torch.Tensor) for v in states[0].values()) > 300
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name
        else:
            assert value == states[1][name], name


def steps(folder) -> list[dict]:
    return [
        {k: v for k, v in r.items() if k not in ("time", "seconds")} for r in read_log(folder) if r["event"] == "step"
    ]


@pytest.fixture
def stop_at(monkeypatch):
    """`stop_at(5)`: the next run is interrupted after its step 5 (0: never)."""
    real_step = train_module._Trainer._train_step
    limit = {"step": 0}

    def step(trainer, batch):
        record = real_step(trainer, batch)
        if trainer.step == limit["step"]:
            trainer.stop.number = 2
        return record

    monkeypatch.setattr(train_module._Trainer, "_train_step", step)
    return lambda number: limit.update(step=number)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """An uninterrupted run of ten steps: (configuration, folder, result)."""
    from ioubal_kernels.detection.presets import preset

    config = preset("retinanet_tiny")
    values = {
        "data.path": tiny_data, "data.image_size": [64, 64], "data.workers": 0, "train.iterations": 10,
        "train.batch_size": 4, "train.log_every": 1, "train.checkpoint_every": 4, "train.eval_every": 0,
        "train.amp": "off", "train.device": "cpu", "loss.calibration_batches": 2,
    }  # fmt: skip
    for key, value in values.items():
        config.set(key, value)
    folder = tmp_path_factory.mktemp("finished") / "run"
    return config, folder, run(config, folder)


def test_ten_steps_leave_everything(finished):
    config, folder, result = finished
    assert result.steps == 10
    files = {"config.yaml", "log.jsonl", "metrics.json", "detections.npz", "checkpoints", ".lock"}
    assert {p.name for p in folder.iterdir()} == files
    assert [p.name for p in list_checkpoints(folder / "checkpoints")] == ["step-00000010.pt", "step-00000008.pt"]
    assert load_config(str(folder / "config.yaml")) == config
    assert json.loads((folder / "metrics.json").read_text()) == result.metrics
    assert set(MAIN_METRICS) < set(result.metrics)
    log = read_log(folder)
    assert [r["event"] for r in log] == ["start", "w_loc"] + ["step"] * 10 + ["eval", "end"]
    assert [r["step"] for r in steps(folder)] == list(range(1, 11))
    for record in steps(folder):
        assert all(math.isfinite(record[key]) for key in ("cls", "loc", "grad_norm", "mean_iou", "lr"))
        assert record["positives"] > 0
        assert 0 < record["mean_iou"] < 1
    # 15 % of ten steps are two of warm-up: lr/3, 2 lr/3, lr, then down to almost 0
    assert [r["lr"] for r in steps(folder)[:3]] == pytest.approx([0.001, 0.002, 0.003])
    assert 0 < steps(folder)[-1]["lr"] < 0.0003


def test_training_moves_the_weights_and_lowers_the_loss(finished):
    _, folder, _ = finished
    first, last = steps(folder)[0], steps(folder)[-1]
    assert last["cls"] < 0.7 * first["cls"]


def test_the_saved_config_reproduces_the_run(finished, tmp_path):
    _, folder, _ = finished
    run(load_config(str(folder / "config.yaml")), tmp_path / "again")
    assert_same_state(folder, tmp_path / "again")
    assert steps(folder) == steps(tmp_path / "again")


@pytest.mark.parametrize(("interrupted_at", "workers_before", "workers_after"), [(3, 0, 2), (4, 2, 0), (9, 0, 0)])
def test_resume_is_bit_identical(finished, tmp_path, stop_at, interrupted_at, workers_before, workers_after):
    config, folder, result = finished
    before = load_config(str(folder / "config.yaml"))
    before.set("data.workers", workers_before)
    after = load_config(str(folder / "config.yaml"))
    after.set("data.workers", workers_after)
    stop_at(interrupted_at)
    with pytest.raises(Interrupted, match=f"at step {interrupted_at}; --resume") as stopped:
        run(before, tmp_path / "run")
    assert stopped.value.exit_code == 130
    stop_at(0)
    resumed = run(after, tmp_path / "run", resume=True)
    assert_same_state(folder, tmp_path / "run")
    assert steps(folder) == steps(tmp_path / "run")
    assert resumed.metrics == result.metrics
    assert resumed.w_loc == result.w_loc


def test_resume_of_a_finished_run_changes_nothing(finished, tmp_path):
    _, folder, result = finished
    shutil.copytree(folder, tmp_path / "run")
    resumed = run(load_config(str(folder / "config.yaml")), tmp_path / "run", resume=True)
    assert resumed.metrics == result.metrics
    assert_same_state(folder, tmp_path / "run")


def test_resume_after_a_crash_before_the_first_checkpoint(finished, tmp_path, monkeypatch):
    config, folder, _ = finished

    def crash(*args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(train_module._Trainer, "_save", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            run(config, tmp_path / "run")
    run(config, tmp_path / "run", resume=True)
    assert_same_state(folder, tmp_path / "run")
    assert steps(folder) == steps(tmp_path / "run")


def test_resume_falls_back_when_the_last_checkpoint_is_corrupt(finished, tmp_path):
    import os

    config, folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[0]
    os.truncate(newest, 1000)
    with pytest.warns(UserWarning, match="corrupt checkpoint passed over"):
        run(config, tmp_path / "run", resume=True)
    assert_same_state(folder, tmp_path / "run")


def test_a_changed_config_is_refused_with_its_diff(finished, tmp_path, monkeypatch):
    _, folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    changed = load_config(str(folder / "config.yaml"))
    changed.set("optim.lr", 0.5)
    changed.set("train.iterations", 12)
    with pytest.raises(
        UsageError, match=r"--allow-config-change(.|\n)*optim.lr: 0.003 -> 0.5\n *train.iterations: 10 -> 12"
    ):
        run(changed, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.json").is_file()
    changed.set("optim.weight_decay", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(train_module._Trainer, "_finish", lambda trainer: trainer)
        trainer = run(changed, tmp_path / "run", resume=True, allow_config_change=True)
    # The longer run is not finished by what the shorter one left.
    assert trainer.step == 12 and not (tmp_path / "run" / "metrics.json").exists()
    assert [g["weight_decay"] for g in trainer.stepper.optimizer.param_groups] == [0.01, 0.0]
    saved = load_config(str(tmp_path / "run" / "config.yaml"))
    assert saved == changed
    assert run(saved, tmp_path / "run", resume=True).steps == 12


@pytest.mark.parametrize(("key", "value"), [("optim.name", "sgd"), ("model.anchor_scale", 5.0), ("train.seed", 9)])
def test_what_a_checkpoint_depends_on_cannot_change(finished, tmp_path, key, value):
    _, folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    changed = load_config(str(folder / "config.yaml"))
    changed.set(key, value)
    with pytest.raises(UsageError, match=f"{key}: cannot change in a run"):
        run(changed, tmp_path / "run", resume=True, allow_config_change=True)


def test_a_changed_w_loc_counts(finished, tmp_path):
    _, folder, result = finished
    for setting in (2.5, "auto"):
        shutil.copytree(folder, tmp_path / str(setting))
        changed = load_config(str(folder / "config.yaml"))
        changed.set("train.iterations", 12)
        changed.set("loss.w_loc", setting)
        changed.set("loss.lambda_", 1.0 if setting == "auto" else 1.5)
        got = run(changed, tmp_path / str(setting), resume=True, allow_config_change=True)
        assert got.w_loc == 2.5 if setting == 2.5 else 1 < got.w_loc < result.w_loc


@pytest.mark.parametrize(("key", "value"), [("loss.beta", 0.5), ("loss.calibration_batches", 1)])
def test_what_w_loc_was_measured_with_changes_it(finished, tmp_path, monkeypatch, capsys, key, value):
    _, folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    changed = load_config(str(folder / "config.yaml"))
    changed.set("train.iterations", 11)
    changed.set(key, value)
    monkeypatch.setattr(train_module, "calibrate", lambda *a, **k: 7.0)
    result = train(changed, tmp_path / "run", resume=True, allow_config_change=True)
    assert result.w_loc == 7.0
    assert [r["step"] for r in read_log(tmp_path / "run") if r["event"] == "w_loc"] == [0, 10]
    shown = " ".join("".join(capsys.readouterr()).split())
    assert f"calibrated on {changed.loss.calibration_batches} batches, with the weights after step 10" in shown


def test_another_number_of_processes_is_a_change(finished, tmp_path, monkeypatch):
    config, folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    load = train_module.load_newest_checkpoint

    def of_two(folder):
        path, saved = load(folder)
        return path, {**saved, "processes": 2}

    monkeypatch.setattr(train_module, "load_newest_checkpoint", of_two)
    with pytest.raises(UsageError, match="processes: 2 -> 1"):
        run(config, tmp_path / "run", resume=True)


def test_what_a_checkpoint_says_goes_on(finished, tmp_path, monkeypatch, poison):
    """Its anchors, whatever would be chosen today, its time, and how many batches may still be skipped."""
    shutil.copytree(finished[1], tmp_path / "run")
    load = train_module.load_newest_checkpoint

    def edited(folder):
        path, saved = load(folder)
        return path, {**saved, "anchor_scale": 7.0, "seconds": 1000.0, "skipped": 2}

    monkeypatch.setattr(train_module, "load_newest_checkpoint", edited)
    config = load_config(str(tmp_path / "run" / "config.yaml"))
    config.set("train.nan_policy", "skip:2")
    config.set("train.iterations", 11)
    assert run(config, tmp_path / "run", resume=True, allow_config_change=True).seconds > 1000
    log = read_log(tmp_path / "run")
    assert log[-1]["seconds"] > 1000 and [r["anchor_scale"] for r in log if r["event"] == "resume"] == [7.0]
    config.set("train.iterations", 12)
    poison(12)
    with pytest.raises(NonFiniteError, match="allows 2 skipped batches"):
        run(config, tmp_path / "run", resume=True, allow_config_change=True)


def test_starting_weights_outlive_a_crash_before_the_first_checkpoint(finished, tmp_path, monkeypatch):
    config, folder, _ = finished
    config = config.copy()
    config.set("model.init_from", str(folder))

    def crash(*args):
        raise RuntimeError("power cut")

    digests = []
    for resume in (False, True):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            patch.setattr(train_module._Trainer, "_save", crash)
            run(config, tmp_path / "run", resume=resume)
        digests += [r["weights"] for r in read_log(tmp_path / "run") if r["event"] == "start"]
    assert len(digests) == 2 and digests[0] == digests[1]
    # The line that began the run goes on with it: what "auto" meant then is not a change.
    assert run(config, tmp_path / "run", resume=True).steps == 10
    assert run(config, tmp_path / "run", resume=True).steps == 10


def test_eq_7_needs_no_factor(tiny_config, tmp_path):
    config = tiny_config(**{"train.iterations": 1, "loss.normalize_loc": True})
    assert run(config, tmp_path / "run").w_loc == 1.0


def test_other_data_are_refused_on_resume(finished, tmp_path):
    from ioubal_kernels.detection.data import make_synthetic

    config, folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    other = load_config(str(folder / "config.yaml"))
    other.set("data.path", make_synthetic(tmp_path / "other", train=16, val=6, size=64, classes=3, seed=2, workers=1))
    with pytest.raises(UsageError, match="training data"):
        run(other, tmp_path / "run", resume=True)
    other.set("data.path", make_synthetic(tmp_path / "few", train=12, val=6, size=64, classes=3, workers=1))
    with pytest.raises(UsageError, match="number of training images: cannot change in a run(.|\n)*16 -> 12"):
        run(other, tmp_path / "run", resume=True, allow_config_change=True)


def test_other_data_to_evaluate_on_are_a_change(finished, tmp_path):
    config, folder, result = finished
    data = Path(shutil.copytree(config.data.path, tmp_path / "data"))
    shutil.copytree(folder, tmp_path / "run")
    config = config.copy()
    config.set("data.path", str(data))
    assert run(config, tmp_path / "run", resume=True).metrics == result.metrics
    file = data / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "annotations": content["annotations"][1:]}))
    with pytest.raises(
        UsageError, match=r"--allow-config-change(.|\n)*evaluation data .*: \w{12}\.\.\. -> \w{12}\.\.\.$"
    ):
        run(config, tmp_path / "run", resume=True)
    again = run(config, tmp_path / "run", resume=True, allow_config_change=True)
    assert again.metrics["boxes"] == result.metrics["boxes"] - 1
    assert read_log(tmp_path / "run")[0]["eval_data"] != data_on_record(read_log(tmp_path / "run"))["eval_data"]


def test_a_folder_with_a_run_is_not_overwritten(finished):
    config, folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(UsageError, match="already holds a run: continue it with --resume"):
        run(config, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_w_loc_is_calibrated_once_and_kept(finished):
    _, folder, result = finished
    assert result.w_loc > 1.5  # iou^1.5 < 1, so the factor that keeps the loss is above 1
    log = read_log(folder)
    assert [r["value"] for r in log if r["event"] == "w_loc"] == [result.w_loc]
    assert find_checkpoint(folder)[1]["w_loc"] == result.w_loc


def test_calibration_without_a_box_says_what_to_do(tiny_config, tmp_path, monkeypatch):
    none = [(torch.zeros(0, 4), torch.zeros(0, 4))] * 2
    monkeypatch.setattr("ioubal_kernels.detection.models.Detector.collect_deltas", lambda *a, **k: none)
    with pytest.raises(UsageError, match=r"loss.w_loc: auto: no box in the first 2 batches .*calibration_batches=N"):
        run(tiny_config(), tmp_path / "run")


def test_no_box_to_train_on_and_none_to_measure_on(tiny_config, tiny_data, tmp_path, capsys):
    data = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    for split in ("val", "train"):
        path = data / f"annotations/instances_{split}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "annotations": []}))
        config = tiny_config(**{"train.iterations": 1, "data.path": str(data)})
        config.set_loss("baseline")
        if split == "val":
            result = run(config, tmp_path / "run")
            assert result.metrics["AP"] is None
            assert "split 'val' has no boxes: there will be no AP" in " ".join("".join(capsys.readouterr()).split())
            continue
        with pytest.raises(UsageError, match="split 'train' has no box to train on"):
            run(config, tmp_path / "none")
        report = check_dataset(data)
        assert not report.ok and "split train: it has no box to train on" in report.problems


def test_the_data_is_found_from_elsewhere(tiny_config, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(tiny_data).parent)
    run(tiny_config(**{"train.iterations": 1, "data.path": Path(tiny_data).name}), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    config = load_config(str(tmp_path / "run" / "config.yaml"))
    assert config.data.path == str(tiny_data)
    assert run(config, tmp_path / "run", resume=True).steps == 1


def test_a_large_factor_is_pointed_out(tiny_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_module, "calibrate", lambda *a, **k: 164.8)
    run(tiny_config(**{"train.iterations": 1}), tmp_path / "run")
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "warning: w_loc 165 is large, since the untrained model's boxes hardly overlap" in shown


def test_calibration_keeps_the_first_loss(tiny_config, tmp_path):
    """With the same initialisation and first batch the localisation loss starts where the baseline's does."""
    first = {}
    for loss in ("baseline", "loc"):
        config = tiny_config(**{"train.iterations": 1, "loss.calibration_batches": 1})
        config.set_loss(loss)
        run(config, tmp_path / loss)
        first[loss] = steps(tmp_path / loss)[0]
    assert first["loc"]["loc"] == pytest.approx(first["baseline"]["loc"], rel=1e-4)
    assert first["loc"]["cls"] == pytest.approx(first["baseline"]["cls"], rel=1e-6)


def test_losses_share_initialisation_and_data_order(tiny_config, tmp_path):
    """The IoU weights change gradients: the first forward is the same, the second is not."""
    logs = {}
    for loss in ("baseline", "cls"):
        config = tiny_config(**{"train.iterations": 2})
        config.set_loss(loss)
        run(config, tmp_path / loss)
        logs[loss] = steps(tmp_path / loss)
    assert [r["positives"] for r in logs["cls"]] == [r["positives"] for r in logs["baseline"]]
    assert logs["cls"][0]["mean_iou"] == logs["baseline"][0]["mean_iou"]
    assert logs["cls"][0]["loc"] == logs["baseline"][0]["loc"]
    assert logs["cls"][1]["cls"] != logs["baseline"][1]["cls"]


@pytest.fixture
def poison(monkeypatch):
    """`poison(3, 5)`: the images of batches 3 and 5 (1-based) become NaN."""
    which: set[int] = set()
    real = TrainLoader.__iter__

    def batches(loader):
        done = loader.state_dict()
        number = (done["epoch"] * 16 + done["position"]) // 4
        for batch in real(loader):
            number += 1
            if number in which:
                batch = replace(batch, images=batch.images * math.nan)
            yield batch

    monkeypatch.setattr(TrainLoader, "__iter__", batches)
    return lambda *numbers: which.update(numbers)


def test_nan_stops_with_the_batch_on_record(tiny_config, tmp_path, poison):
    poison(3)
    with pytest.raises(NonFiniteError, match=r"step 3: classification nan.*nonfinite-00000003.json") as error:
        run(tiny_config(**{"loss.w_loc": 2.0}), tmp_path / "run")
    assert error.value.exit_code == 1
    dump = json.loads((tmp_path / "run" / "nonfinite-00000003.json").read_text())
    assert dump["cls"] == "nan"
    assert len(dump["image_ids"]) == len(dump["images"]) == 4
    assert dump["images_finite"] == [False] * 4
    assert dump["w_loc"] == 2.0


def test_nan_batches_are_skipped_up_to_the_limit(tiny_config, tmp_path, poison):
    poison(3, 5)
    config = tiny_config(**{"loss.w_loc": 2.0, "train.nan_policy": "skip:2"})
    result = run(config, tmp_path / "run")
    assert result.steps == 10
    assert [r["step"] for r in read_log(tmp_path / "run") if r["event"] == "nonfinite"] == [3, 5]
    state = find_checkpoint(tmp_path / "run")[1]
    assert state["skipped"] == 2
    for model in (state["model"], state["ema"]["model"]):
        assert all(torch.isfinite(v).all() for v in model.values())
    poison(7)
    with pytest.raises(NonFiniteError, match="allows 2 skipped batches"):
        run(config, tmp_path / "second")


def test_without_ema_the_trained_weights_are_evaluated(tiny_config, tmp_path):
    run(tiny_config(**{"train.ema": 0.0, "train.iterations": 2, "loss.w_loc": 2.0}), tmp_path / "run")
    state = find_checkpoint(tmp_path / "run")[1]
    for name, value in state["model"].items():
        assert torch.equal(value, state["ema"]["model"][name]), name


def test_sgd_multistep_and_the_reference_backend(tiny_config, tmp_path):
    changes = {"optim.name": "sgd", "optim.schedule": "multistep", "optim.milestones": [0.5], "optim.lr": 0.01}
    changes |= {
        "optim.warmup": 0.0,
        "loss.backend": "reference",
        "loss.normalizer_scope": "level",
        "train.iterations": 4,
    }
    run(tiny_config(**changes), tmp_path / "run")
    assert [r["lr"] for r in steps(tmp_path / "run")] == pytest.approx([0.01, 0.01, 0.001, 0.001])


def test_bf16_autocast_trains(tiny_config, tmp_path):
    run(tiny_config(**{"train.amp": "bf16", "train.iterations": 2, "loss.w_loc": 2.0}), tmp_path / "run")
    assert all(math.isfinite(r["cls"]) and r["grad_norm"] > 0 for r in steps(tmp_path / "run"))
