"""The training-step benchmark: the divided step is the step, wrong stages get no figure, rows survive what happens."""

from __future__ import annotations

import dataclasses
import json
import signal

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import ops
from ioubal_kernels.bench import machine, timing, train_step, train_step_case, train_step_measure, train_step_stages

pytestmark = pytest.mark.skipif(ops.load_error("cpu") is not None, reason="needs the CPU library")
SMALL = ("--device", "cpu", "--size", "64x96", "--batch", "2", "--classes", "3", "--workers", "0", "--amp", "off")
QUICK = (*SMALL, "--rounds", "2", "--no-memory")
STAGES = {stage.name: stage for stage in train_step_stages.STAGES}
NAMES = {"format", "name", "path", "phase"}
FIGURES = {"min_ms", "median_ms", "q80_ms", "segments", "images_per_second", "loss_stage", "loss_stage_share"}


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> train_step_case.Case:
    spec = train_step_case.Spec("retinanet_tiny", (64, 96), 2, 3, "cpu", "off", 0)
    return train_step_case.Case(spec, train_step_case.make_data(spec, str(tmp_path_factory.mktemp("data"))))


def forbid(constant: str) -> float:
    raise AssertionError(f"{constant} is no JSON")


def run(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    code = train_step.main([*arguments, "--output", str(tmp_path / "rows")])
    path = tmp_path / "rows" / f"{machine.slug(machine.cpu_model())}.jsonl"
    return code, [json.loads(line, parse_constant=forbid) for line in path.read_text().splitlines()]


def with_stage(monkeypatch, name: str, wrap) -> None:
    """Puts wrap(stage's function) in place of a stage's function."""
    changed = [dataclasses.replace(s, run=wrap(s.run)) if s.name == name else s for s in STAGES.values()]
    monkeypatch.setattr(train_step_stages, "STAGES", tuple(changed))


# ---------------------------------------------------------------------------------------------- the steps


def gradients(case, step, *arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and every parameter's gradient before clipping."""
    torch.manual_seed(0)
    loss = step(case, *arguments)
    return loss, {name: p.grad.clone() for name, p in case.model.named_parameters()}


@pytest.mark.parametrize("name", STAGES)
def test_the_divided_step_is_the_step(case, name, monkeypatch):
    monkeypatch.setattr(case, "finish", lambda loss: None)
    batches, marks = iter(case.loader), []
    stage = STAGES[name].run
    loss, want = gradients(case, train_step_case.whole_step, stage, 1, batches)
    divided, got = gradients(case, train_step_case.divided_step, stage, 1, batches, marks.append)
    assert tuple(marks) == train_step_measure.SEGMENTS
    assert torch.equal(divided, loss)
    assert len(want) > 50 and all(bool(g.any()) for g in want.values())
    for parameter, gradient in want.items():
        assert torch.equal(got[parameter], gradient), parameter  # the same operations on the same numbers


def test_a_wrong_cut_would_show(case, monkeypatch):
    """The test above sees a tenth of a per cent in one level's gradient, and where it belongs."""
    monkeypatch.setattr(case, "finish", lambda loss: None)
    batches, stage = iter(case.loader), STAGES["fused"].run

    def scaled(case, maps, targets, mark):
        maps.bbox_deltas[1].register_hook(lambda g: g * 1.001)
        return stage(case, maps, targets, mark)

    _, want = gradients(case, train_step_case.whole_step, stage, 1, batches)
    _, got = gradients(case, train_step_case.divided_step, scaled, 1, batches, lambda name: None)
    off = [n for n, g in want.items() if not torch.equal(got[n], g)]
    assert "network.head.regression_head.conv.0.0.weight" in off
    assert not any(name.startswith("network.head.classification_head") for name in off)


def test_every_step_sees_the_same_weights(case):
    before = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    losses = [train_step_case.whole_step(case, STAGES["fused"].run, 0, iter(case.loader)) for _ in range(2)]
    assert torch.equal(*losses)
    assert all(torch.equal(p, before[name]) for name, p in case.model.named_parameters())
    moments = [state["exp_avg"] for state in case.optimizer.state.values()]  # the optimiser did work
    assert len(moments) == len(before) and all(bool(m.any()) for m in moments)


def test_what_a_loss_that_is_not_finite_does(case):
    with pytest.raises(RuntimeError, match="not finite"):
        case.finish(torch.tensor(float("nan")))


def test_matching_ends_where_the_objective_calls_the_loss(case, monkeypatch):
    names = []
    original = ik.iou_balanced_detection_loss
    images, targets = case.moved(0)
    maps = case.forward(images)
    train_step_stages.fused(case, maps, targets, names.append)
    assert names == ["matching"] and ik.iou_balanced_detection_loss is original
    monkeypatch.setattr(case.model.network, "compute_loss", lambda *a: original)
    with pytest.raises(RuntimeError, match="0 times instead of once"):
        train_step_stages.fused(case, maps, targets, names.append)


# ---------------------------------------------------------------------------------------------- memory


def test_what_is_kept_for_the_backward_counts_prepared_gradients(case):
    images, targets = case.moved(0)
    with torch.no_grad():
        maps = case.forward(images)
    size = sum(t.nbytes for part in maps for t in part) / train_step_measure.MIB
    found = {n: train_step_measure.saved_for_backward(case, s, maps, targets) for n, s in STAGES.items()}
    for name, facts in found.items():
        # Ours keeps the gradients of all maps, the others at least one more tensor of the logits' size.
        assert facts["saved_besides_maps_mib"] >= 0.99 * size * (1.0 if name == "fused" else 0.5), (name, facts)
        assert facts["saved_mib"] >= facts["saved_besides_maps_mib"]


def test_what_a_dropped_part_of_the_graph_saved_is_not_counted(case):
    def stage(case, maps, targets, mark):
        square = maps.cls_logits[0] ** 2  # keeps the leaf, which is a map
        weight = (square.exp() * 2.0).sum().detach()  # its graph, which saved the exponential, is gone
        return (square.sigmoid() * weight).sum()  # keeps the sigmoid and a scalar

    images, targets = case.moved(0)
    with torch.no_grad():
        maps = case.forward(images)
    stage = dataclasses.replace(STAGES["eager"], run=stage)
    found = train_step_measure.saved_for_backward(case, stage, maps, targets)
    level = maps.cls_logits[0].nbytes / train_step_measure.MIB
    assert found["saved_mib"] == pytest.approx(2 * level, abs=2e-3)
    assert found["saved_besides_maps_mib"] == pytest.approx(level, abs=2e-3)


@pytest.mark.slow
@pytest.mark.skipif(not train_step_measure.sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_of_a_process_of_its_own(tmp_path):
    spec = train_step_case.Spec("retinanet_tiny", (256, 256), 2, 150, "cpu", "off", 0)
    case = train_step_case.Case(spec, train_step_case.make_data(spec, str(tmp_path)))
    with torch.no_grad():
        maps = case.forward(case.moved(0)[0])
    gradient_bytes = sum(t.nbytes for part in maps for t in part)
    found = train_step_measure.host_peak_of(case, STAGES["fused"])
    # One gradient of each map (15 MB), and less than a copy of them besides; the counting is that coarse.
    assert gradient_bytes - 2**20 <= found < 2 * gradient_bytes


# ---------------------------------------------------------------------------------------------- what a GPU takes


def test_the_defaults_of_a_gpu():
    spec = train_step.spec_of(train_step.make_parser().parse_args(["--device", "cuda"]))
    wanted = train_step_case.Spec("retinanet_r50_fpn", (800, 1333), 16, 80, "cuda", "auto", "auto")
    assert spec == wanted


def test_the_clock_waits_for_a_gpu_at_every_mark(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(None))
    clock = train_step_measure.Clock(torch.device("cuda"))
    clock.mark("first")
    clock.mark("second")
    assert len(waits) == 3 and list(clock.seconds) == ["first", "second"] and min(clock.seconds.values()) > 0.0
    train_step_measure.Clock(torch.device("cpu")).mark("first")
    assert len(waits) == 3


def test_the_device_peak_is_that_of_the_loss_stage_alone(case, monkeypatch):
    done = []
    for name, value in (("synchronize", None), ("reset_peak_memory_stats", None), ("memory_allocated", 100)):
        monkeypatch.setattr(torch.cuda, name, lambda n=name, v=value: done.append(n) or v)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: done.append("max_memory_allocated") or 350)
    recorded = dataclasses.replace(STAGES["fused"], run=lambda *a: done.append("stage") or STAGES["fused"].run(*a))
    images, targets = case.moved(0)
    assert train_step_measure.device_peak(case, recorded, case.forward(images), targets) == 250
    assert done == [
        "stage", "synchronize", "reset_peak_memory_stats", "memory_allocated", "stage", "synchronize",
        "max_memory_allocated",
    ]  # fmt: skip


def test_facts_of_a_gpu_leave_its_momentary_state_out(monkeypatch):
    found = {"device": "NVIDIA X", "driver": "1.2", "power_w": 3.0, "sm_clock_mhz": 4.0, "torch": "t"}
    monkeypatch.setattr(machine, "gpu_facts", lambda: found)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    facts = train_step.machine_facts("cuda")
    assert facts["device"] == "NVIDIA X" and facts["cpu"] == machine.cpu_model() and facts["driver"] == "1.2"
    assert facts["allocator"] == "expandable_segments:True" and {"power_w", "sm_clock_mhz"}.isdisjoint(facts)
    assert {"threads", "heap", "commit", "torchvision", "tf32"} <= set(facts)


# ---------------------------------------------------------------------------------------------- the program


def test_rows_and_table(tmp_path, capsys):
    code, rows = run(tmp_path, *QUICK)
    assert code == 0 and [row["stage"] for row in rows] == list(STAGES)
    for row in rows:
        assert {"device", "cpu", "commit", "torch", "torchvision", "threads", "heap", "workers", "dtype"} <= set(row)
        assert NAMES | FIGURES <= set(row) and row["result"] == "measured" and row["rounds"] == 2
        assert row["parity"].startswith("float64 oracle") and row["learning_rate"] == 0.0
        assert row["size"] == [64, 96] and row["batch"] == 2 and row["classes"] == 3
        assert set(row["segments"]) == set(train_step_measure.SEGMENTS)
        for q in (row, row["loss_stage"], row["divided_step"], *row["segments"].values()):
            assert 0.0 < q["min_ms"] <= q["median_ms"] <= q["q80_ms"]
        assert row["images_per_second"] == pytest.approx(2e3 / row["median_ms"], rel=1e-3)
        assert 0.0 < row["loss_stage_share"] < 1.0
        assert row["peak_memory"] == "not asked for" and row["saved_besides_maps_mib"] > 0.0
    assert rows[0]["step_x_fused"] == rows[0]["loss_stage_x_fused"] == 1.0
    assert "another loss" in rows[2]["computes"] and "torchvision" in rows[2]["matcher"]
    out = capsys.readouterr().out
    for word in ("median ms", "whole step", "images per second", "share of the whole step", "3 rows appended"):
        assert word in out


def test_without_save_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    assert train_step.main([*SMALL, "--rounds", "1", "--no-memory"]) == 0
    assert list(tmp_path.iterdir()) == []


WRONG = {
    "the loss": lambda loss: loss * 1.001,
    "the gradient": lambda loss: loss * 1.001 - loss.detach() * 0.001,
    "NaN": lambda loss: loss * float("nan"),
}


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_stage_is_found(case, name, fault):
    images, targets = case.moved(0)
    with torch.no_grad():
        maps = case.forward(images)
    right = STAGES[name]
    train_step_stages.check_parity(case, right, maps, targets)
    broken = dataclasses.replace(right, run=lambda *a: WRONG[fault](right.run(*a)))
    with pytest.raises(AssertionError):
        train_step_stages.check_parity(case, broken, maps, targets)


def test_a_wrong_stage_gets_no_figure_and_fails_the_run(tmp_path, monkeypatch, capsys):
    with_stage(monkeypatch, "eager", lambda right: lambda *a: WRONG["the gradient"](right(*a)))
    code, rows = run(tmp_path, *QUICK)
    assert code == 1 and [row["result"] for row in rows] == ["measured", "wrong", "measured"]
    assert not (FIGURES | {"saved_mib", "parity"}) & set(rows[1]) and "elements are wrong" in rows[1]["reason"]
    assert "eager: wrong: " in capsys.readouterr().out


def after_calls(right, count: int, act):
    """The stage's function, which acts instead in the call after so many."""
    calls = []

    def counted(*arguments):
        calls.append(None)
        if len(calls) > count:
            act()
        return right(*arguments)

    return counted


# A stage is called once for parity, once for what it saves, and twice in each round, of which the first is untold.
BEFORE_ROUND_2 = 2 + 2 + 2


def test_ctrl_c_leaves_what_was_measured_and_a_mark(tmp_path, monkeypatch):
    interrupt = lambda: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with_stage(monkeypatch, "eager", lambda right: after_calls(right, BEFORE_ROUND_2, interrupt))
    code, rows = run(tmp_path, *SMALL, "--no-memory", "--rounds", "50")
    assert code == 130 and [row["result"] for row in rows] == ["measured"] * 3 + ["interrupted"]
    assert [row["rounds"] for row in rows[:3]] == [2, 1, 1] and rows[0]["rounds_asked"] == 50
    assert "1 of 50 rounds" in rows[3]["reason"] and "device" in rows[3] and not FIGURES & set(rows[3])


def test_ctrl_c_before_the_first_round(tmp_path, monkeypatch):
    with_stage(monkeypatch, "fused", lambda right: after_calls(right, 0, lambda: signal.raise_signal(signal.SIGINT)))
    code, rows = run(tmp_path, *QUICK)
    assert code == 130 and [row["result"] for row in rows] == ["interrupted"] and rows[0]["batch"] == 2


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("made to")


def test_out_of_memory_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    with_stage(monkeypatch, "eager", lambda right: after_calls(right, BEFORE_ROUND_2, raise_out_of_memory))
    code, rows = run(tmp_path, *QUICK)
    assert code == 0 and [row["result"] for row in rows] == ["measured", "out of memory", "measured"]
    assert not FIGURES & set(rows[1]) and [rows[0]["rounds"], rows[2]["rounds"]] == [2, 2]


def test_a_model_that_does_not_fit_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(train_step_case.Case, "forward", lambda self, images: torch.empty(1 << 60))
    code, rows = run(tmp_path, *QUICK)
    assert code == 1 and [row["result"] for row in rows] == ["out of memory"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line(tmp_path, capsys):
    assert train_step.main(["--device", "cuda"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "no usable GPU" in captured.err
    code, rows = run(tmp_path, "--device", "cuda")
    assert code == 2 and [row["result"] for row in rows] == ["no device"] and rows[0]["asked_device"] == "cuda"
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [("--size", "800"), ("--size", "8x8"), ("--batch", "0"), ("--rounds", "-1"), ("--workers", "x"), ("--model", "r"),
     ("--frozen", "--device", "cpu")],
)  # fmt: skip
def test_wrong_options(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        train_step.main(list(arguments))
    assert stop.value.code == 2 and f"argument {arguments[0]}" in capsys.readouterr().err or "--frozen" in arguments


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train_step.main([*QUICK, "--output", str(tmp_path / "file" / "rows")]) == 3
    assert len(capsys.readouterr().err.splitlines()) == 1
