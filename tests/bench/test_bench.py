"""`ioubal bench`: dry runs of its cases, rows that claim nothing wrong, tables from rows alone."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import ioubal_kernels as ik
from ioubal_kernels import cli, ops, testing
from ioubal_kernels.bench import (
    cases,
    inputs,
    machine,
    measure,
    memory,
    neighbour,
    peers,
    program,
    report,
    results,
    retinanet,
    run,
    timing,
    work,
)

ROOT = Path(__file__).resolve().parents[2]
NEEDS_CPU = pytest.mark.skipif(ops.load_error("cpu") is not None, reason="needs the CPU library")
NEEDS_TORCHVISION = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
FACTS = {
    "format", "run", "commit", "version", "torch", "python", "device", "isa", "threads", "heap", "name", "path",
    "phase", "rounds", "calls", "sets", "min_ms", "q20_ms", "median_ms", "q80_ms", "x_copy", "eager_wall_ms", "result",
}  # fmt: skip
OWN = FACTS | {"backend", "parity", "computes", "peak_extra_bytes", "torch_ops"}


def dry(tmp_path: Path, *arguments: str) -> tuple[int, list[dict]]:
    code = run.main(["--dry-run", "--device", "cpu", "--rounds", "2", "--output", str(tmp_path), *arguments])
    files = list(tmp_path.glob("*.jsonl"))
    return code, [json.loads(line) for file in files for line in file.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- the program


def test_the_program_lists_its_commands_and_refuses_others(capsys, monkeypatch):
    assert program.main([]) == 2 and "train-step" in capsys.readouterr().err
    assert cli.main(["bench", "--help"]) == 0 and "compare" in capsys.readouterr().out
    assert cli.main(["bench", "lst"]) == 2 and "no command 'lst'" in capsys.readouterr().err
    assert cli.main(["bench", "run", "--only", "no such case", "--device", "cpu", "--dry-run"]) == 2
    assert "names no case" in capsys.readouterr().err
    assert program.main(["run", "--rounds", "0", "--dry-run"]) == 2 and "positive" in capsys.readouterr().err
    assert program.main(["run", "--backend", "triton", "--device", "cpu", "--dry-run"]) == 2
    assert "does not run on cpu" in capsys.readouterr().err
    monkeypatch.setattr(run, "chosen_device", lambda options: "cuda")
    assert program.main(["run", "--undisturbed", "--dry-run"]) == 2 and "is for a CPU" in capsys.readouterr().err


def test_the_list_covers_what_is_promised(capsys):
    assert program.main(["list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert len(set(names)) == len(names)
    for batch in (1, 2, 4, 8, 16):
        for layout in testing.LAYOUTS:
            for dtype in ("float32", "bfloat16", "float16"):
                assert f"retinanet/b{batch}/{layout}/{dtype}" in names
    for part in ("k20/", "k1203/", "ssd300", "ssd512", "faster-rcnn", "matching/", "stage/", "small/", "smooth-l1"):
        assert any(part in name for name in names), part
    first = [case.name for case in cases.all_cases("cuda")[:6]]
    assert all("b16" in name for name in first), "a GPU's large batches come first"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_nothing_written(tmp_path, capsys):
    assert run.main(["--device", "cuda", "--dry-run", "--output", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "no usable GPU" in captured.err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- rows


@NEEDS_CPU
@NEEDS_TORCHVISION
@pytest.mark.parametrize(
    "only",
    [
        "retinanet/b2/nchw/bfloat16", "retinanet/b1/channels_last/float32", "retinanet/k20/b1/flat/float32",
        "softmax/faster-rcnn/8192x81/float16", "softmax/lvis", "smooth-l1/1048576/bfloat16", "decode/200700/float32",
        "small/flat", "matching/b1/g10", "stage/b1/nchw/float32",
    ],
)  # fmt: skip
def test_every_kind_of_case_runs_and_its_rows_are_whole(only, tmp_path):
    code, rows = dry(tmp_path, "--only", only)
    assert code == 0 and rows
    for row in rows:
        assert row["result"] == "measured", row
        assert set(row) >= (FACTS if row["path"] == work.COPY else FACTS | {"parity", "computes"}), row
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["q80_ms"] and row["dry_run"]
    ours = [row for row in rows if row.get("backend") == "cpu"]
    assert ours and all(set(row) >= OWN for row in ours)


@NEEDS_CPU
@NEEDS_TORCHVISION
def test_the_headline_case_has_all_its_paths(tmp_path, monkeypatch):
    """Without what compiles: that takes half a minute."""
    monkeypatch.setattr(peers, "PEERS", tuple(peer for peer in peers.PEERS if "compile" not in peer.name))
    code, rows = dry(tmp_path, "--only", "retinanet/b1/flat/float32", "--isa", "all")
    assert code == 0
    found = {(row["path"], row.get("phase")): row for row in rows}
    phases = (work.BOTH, work.INFERENCE, work.FORWARD, work.BACKWARD, work.OTHER)
    assert {("fused", phase) for phase in phases} <= set(found)
    for path in ("fused, in place", "fused, gamma 1.5", "fused, portable", "reference backend", "torchvision heads"):
        assert (path, work.BOTH) in found, path
    by_path = {row["path"]: row for row in rows}
    absent = [by_path[name] for name in ("apex focal_loss", "mmcv sigmoid_focal_loss")]
    for row in absent:
        assert row["result"] in ("not installed", "failed", "measured")
        assert row["result"] == "measured" or ("median_ms" not in row and row["reason"])
    fused, place = found["fused", work.BOTH], by_path["fused, in place"]
    assert 1.0 < fused["extra_memory_x_logits"] < 1.2 and place["extra_memory_x_logits"] < 0.2
    assert fused["saved_bytes"] < 1.2 * fused["peak_extra_bytes"] and fused["torch_ops"] > 0


@NEEDS_CPU
def test_a_wrong_path_gets_no_figure(tmp_path, monkeypatch):
    def wrong(self, heads, results, what, **options):
        raise AssertionError("made wrong")

    monkeypatch.setattr(retinanet.Oracle, "check", wrong)
    code, rows = dry(tmp_path, "--only", "retinanet/b2/flat/float16")
    mine = [row for row in rows if row.get("backend") == "cpu"]
    assert code == 1 and [row["result"] for row in mine] == ["wrong"]
    assert "median_ms" not in mine[0] and mine[0]["reason"] == "made wrong"


@NEEDS_CPU
@NEEDS_TORCHVISION
def test_a_peer_with_another_gradient_is_found_out():
    """The value hardly depends on eta; the gradient does."""
    flat = inputs.with_logits(inputs.targets(0, ((9, 9), (3, 3)), 2, "cpu"), torch.float32, "flat", 0)
    oracle = retinanet.Oracle(flat)
    right = next(peer for peer in peers.PEERS if peer.name == "eager PyTorch (README)")
    heads = flat.requiring_grad()
    oracle.check_peer(right, heads, right.make(heads).both(), 2)
    other = work.Work(lambda: peers.eager.eager_loss(*heads.arguments(), eta=0.5), heads.heads())
    with pytest.raises(AssertionError, match="off by"):
        oracle.check_peer(right, heads, other.both(), 2)


@NEEDS_CPU
def test_out_of_memory_and_out_of_time(tmp_path, monkeypatch, capsys):
    def too_large(heads, backend, isa=None, **options):
        raise torch.OutOfMemoryError("made too large")

    with monkeypatch.context() as patched:
        patched.setattr(retinanet, "fused", too_large)
        code, rows = dry(tmp_path, "--only", "retinanet/b2/flat/float16")
        mine = [row for row in rows if row.get("backend") == "cpu"]
        assert code == 0 and [row["result"] for row in mine] == ["out of memory"]
    code, rows = dry(tmp_path / "none", "--budget", "0.0001")
    assert code == 0 and rows == [] and "not run, out of time" in capsys.readouterr().out


@NEEDS_CPU
def test_an_interrupt_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    right, calls = measure.measure, []

    def stops(case, bench):
        calls.append(case.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return right(case, bench)

    monkeypatch.setattr(measure, "measure", stops)
    code, rows = dry(tmp_path, "--only", "decode/")
    assert code == 130 and "interrupted" in capsys.readouterr().err
    assert rows[-1]["result"] == "interrupted" and rows[-1]["name"] == calls[1]
    assert {row["result"] for row in rows[:-1]} == {"measured"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory by Linux's means")
def test_too_large_an_allocation_raises_where_the_system_would_kill():
    with memory.within_memory("cpu"), pytest.raises((RuntimeError, MemoryError)) as found:
        torch.ones(1 << 42)
    assert memory.is_out_of_memory(found.value)
    assert not memory.is_out_of_memory(RuntimeError("another"))


def test_memory_is_what_the_allocator_gave():
    x = torch.zeros(1 << 16, requires_grad=True)

    def losses() -> list[torch.Tensor]:
        return [(x * 2).square().sum()]

    found = memory.footprint(work.Work(losses, [x]), "cpu")
    size = x.nbytes  # x * 2 is kept for the backward; the backward has temporaries
    assert size <= found["saved_bytes"] < 1.1 * size and 2 * size <= found["peak_extra_bytes"] < 4.5 * size


def test_slow_paths_drop_out_of_the_race():
    times = iter([1.0, 0.001] + [1.0, 0.001] * 3 + [0.001] * 20)
    paths = {"slow": timing.TimedPath(lambda r: None), "fast": timing.TimedPath(lambda r: None)}
    found = timing.race(paths, 10, lambda call, number: next(times), seconds=2.0)
    assert len(found["slow"]) == timing.LEAST_ROUNDS and len(found["fast"]) == 10
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {
        "min_ms": 1e3, "q20_ms": 2e3, "median_ms": 3e3, "q80_ms": 5e3,
    }  # fmt: skip
    assert timing.quantiles([k / 1e3 for k in range(10, 0, -1)]) == pytest.approx(
        {"min_ms": 1, "q20_ms": 3, "median_ms": 5.5, "q80_ms": 9}
    )


def test_the_figures_of_a_row_by_hand(monkeypatch):
    """1000 float32 logits, 8000 bytes copied in 1 ms. Forward and backward read them and write gradients in 2 ms, half
    of the copy's rate; inference, as long, only reads them, a quarter of it.
    """
    problem = work.Problem({}, [], 1000, torch.float32, 1, {work.BOTH: 12_000, work.INFERENCE: 4_000_000})
    extra = {work.BOTH: 4200, work.INFERENCE: 0}
    timed = {
        phase: timing.TimedPath(lambda n: None, {"phase": phase, "peak_extra_bytes": size})
        for phase, size in extra.items()
    }
    times = {work.COPY: [1e-3] * 3, work.BOTH: [2e-3] * 3, work.INFERENCE: [2e-3] * 3}
    monkeypatch.setattr(timing, "race", lambda *arguments: times)
    copy, fused, inference = measure.race(timed, problem, work.Bench("cpu", ("cpu",)), "x")
    assert (copy["bytes"], fused["bytes"], inference["gb_per_s"]) == (8000, 12_000, 2.0)
    assert (fused["x_copy"], fused["ns_per_logit"], fused["extra_memory_x_logits"]) == (2.0, 2000.0, 1.05)
    shares = [row["share_of_copy_rate"] for row in (copy, fused, inference)]
    assert shares == [1, 0.5, 0.25]


class Shared(neighbour.Neighbour):
    """A core that is shared or not as `idle` says, one entry a question; it never waits."""

    def __init__(self, idle: list[bool]) -> None:
        self.idle = iter(idle)

    def is_idle(self) -> bool:
        return next(self.idle)

    def wait(self, seconds: float = 0) -> bool:
        return self.is_idle()


def test_calls_that_share_the_core_are_repeated():
    calls, prepared = [], []
    path = timing.TimedPath(calls.append, {}, prepared.append)
    clock = lambda call, number: call(number) or float(len(calls))  # noqa: E731
    # Round 1: shared after the first call, before the second one. Round 2 at once.
    core = Shared([True, False, False, True, True, True, True])
    assert timing.race({"path": path}, 2, clock, neighbour=core) == {"path": [4.0, 5.0]}
    assert calls == prepared == [0, 1, 1, 1, 2] and path.disturbed == 0  # round 0 warms up, whatever the neighbour does
    calls.clear()
    assert timing.race({"path": path}, 1, clock, neighbour=Shared([False] * timing.TRIES)) == {
        "path": [1.0 + timing.TRIES]
    }
    assert path.disturbed == 1
    # A path that takes its seconds anyway is not repeated.
    slow = timing.TimedPath(lambda number: None)
    timing.race({"slow": slow}, 3, lambda call, number: 1.0, seconds=2.0, neighbour=Shared([False] * 3))
    assert slow.disturbed == timing.LEAST_ROUNDS


def test_a_neighbour_makes_the_probe_slow():
    probes = [40.0, 41.0, 60.0, 40.5, 41.0]
    core = neighbour.Neighbour(lambda: probes.pop(0), first_probes=5)
    assert core.alone == 40.0
    probes += [58.0, 41.0, 58.0]
    assert core.is_idle()  # two interrupts
    probes += [52.0, 46.0, 58.0]
    assert not core.is_idle()
    probes += [50.0] * 3 + [41.0] * 3
    assert core.wait()
    probes += [50.0] * 3
    assert not core.wait(seconds=0.0)
    probes += [30.0] * 3 + [36.0] * 3  # it was never alone before
    assert core.is_idle() and not core.is_idle()
    assert neighbour.probe_of_torch()() > 0


# ---------------------------------------------------------------------------------------------- peers


def test_the_static_form_is_the_same_loss():
    heads = inputs.retinanet_inputs(torch.float32, "flat", 0, small=True, images=3)
    heads.matched_idxs[:, :9] = 0
    cls, loc = peers.static_loss(*peers.padded(heads).arguments())
    want = ik.iou_balanced_detection_loss(*heads.double().arguments(), backend="reference")
    torch.testing.assert_close(cls.double(), want.classification, rtol=1e-5, atol=0)
    torch.testing.assert_close(loc.double(), want.localization, rtol=1e-5, atol=0)


def test_the_grid_of_anchors():
    anchors = inputs.grid_anchors(testing.RETINANET_LEVELS, "cpu")
    assert anchors.shape == (inputs.ANCHORS, 4)
    width, height = (anchors[:, 2] - anchors[:, 0]), (anchors[:, 3] - anchors[:, 1])
    areas = (width * height)[: inputs.PER_LOCATION].sqrt()
    torch.testing.assert_close(areas.sort()[0][::3], 32 * 2 ** (torch.arange(3) / 3))
    assert anchors[0, :2].add(anchors[0, 2:]).abs().max() < 1e-4  # around the first location


# ---------------------------------------------------------------------------------------------- compare and report


def stored(path: str, x_copy: float, commit: str, name: str = "retinanet/b1/flat/float32", **more) -> dict:
    ms = 10.0 * x_copy
    return {
        "format": timing.FORMAT, "run": f"2026-01-0{commit[-1]}T00:00:00Z", "commit": commit, "device": "A CPU",
        "isa": "AVX2", "threads": 1, "heap": "warm", "torch": "2.11", "name": name, "path": path, "phase": work.BOTH,
        "min_ms": ms * 0.98, "q20_ms": ms * 0.99, "median_ms": ms, "q80_ms": ms * 1.01, "x_copy": x_copy,
        "ns_per_logit": x_copy, "extra_memory_x_logits": 1.05, "peak_extra_bytes": 1 << 26, "eager_wall_ms": ms,
        "result": "measured", **more,
    }  # fmt: skip


def write(folder: Path, rows: list[dict]) -> Path:
    timing.append_rows("a-cpu", rows, folder)
    return folder


def test_compare_shows_what_changed(tmp_path, capsys):
    rows = [stored("copy of the logits", 1.0, c) for c in ("aaa1", "bbb2")]
    rows += [stored("fused", 2.0, "aaa1"), stored("fused", 1.5, "bbb2")]
    rows += [stored("eager", 30.0, "aaa1"), stored("eager", 30.1, "bbb2"), stored("gone", 3.0, "aaa1")]
    folder = str(write(tmp_path, rows))
    assert program.main(["compare", "aaa", "bbb", "--results", folder]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "fused" in line)
    assert "faster" in line and "0.750" in line and "1 rows of A have no counterpart" in out
    assert not any(word in next(line for line in out.splitlines() if "eager" in line) for word in ("faster", "slower"))
    assert program.main(["compare", "bbb", "aaa", "--results", folder, "--changed"]) == 0
    out = capsys.readouterr().out
    assert "slower" in out and "eager" not in out
    assert program.main(["compare", "aaa", "ccc", "--results", folder]) == 2
    assert "'ccc'" in (error := capsys.readouterr().err) and "bbb2" in error
    (tmp_path / "a-cpu.jsonl").write_text("{broken\n")
    assert program.main(["compare", "aaa", "bbb", "--results", folder]) == 2
    assert "a-cpu.jsonl, line 1" in capsys.readouterr().err


README = """before
<!-- bench cpu heads -->
old
<!-- end of bench cpu heads -->
between
<!-- bench gpu heads -->
<!-- end of bench gpu heads -->
"""


def test_the_report_holds_the_rows_and_nothing_else(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    (tmp_path / "README.md").write_text(README)
    rows = [
        stored("copy of the logits", 1.0, "aaa1"),
        stored("fused", 1.25, "aaa1"),
        stored("torchvision heads", 50, "aaa1"),
    ]
    rows += [stored("fused", 9.0, "aaa2", dry_run=True), {"format": timing.FORMAT, "run": "z", "result": "wrong"}]
    rows += [stored(path, x, "aaa1", f"retinanet/b{b}/flat/float32") for b in (2, 4) for path, x in (("fused", 1.2),)]
    folder = write(tmp_path / "rows", rows)
    arguments = ["report", "--results", str(folder), "--root", str(tmp_path)]
    assert program.main([*arguments, "--check"]) == 1 and "README.md would change" in capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() == README
    assert program.main(arguments) == 0
    text = (tmp_path / "README.md").read_text()
    assert "| **fused, flat** | 12.5 ms | 1.25 | 1.25 | 1.00 | 1.05x |" in text and "commit aaa1" in text
    assert "| torchvision heads (plain losses) | 500.0 ms | 50.00 | 50.00 | 40.00 | 1.05x |" in text
    assert "old" not in text and report.NOT_MEASURED in text and text.startswith("before\n") and "between" in text
    assert {path.name for path in (tmp_path / "docs").iterdir()} == {"cost.png", "scaling.png"}
    assert program.main([*arguments, "--check"]) == 0
    (tmp_path / "README.md").write_text("<!-- bench cpu heads -->\n")
    assert program.main(arguments) == 2 and "no end" in capsys.readouterr().err
    (tmp_path / "README.md").write_text("<!-- bench cpu x -->\n<!-- end of bench cpu x -->\n")
    assert program.main(arguments) == 2 and "no block 'cpu x'" in capsys.readouterr().err
    (tmp_path / "README.md").unlink()
    assert program.main(arguments) == 2 and "not a checkout" in capsys.readouterr().err


@pytest.mark.skipif(not (ROOT / "bench" / "results").is_dir(), reason="an installed package")
def test_the_readmes_are_what_the_stored_rows_say(capsys):
    if not results.load():
        pytest.skip("no rows of today's format")
    assert program.main(["report", "--check"]) == 0, f"run `ioubal bench report`: {capsys.readouterr().out}"


def test_stored_rows_are_valid():
    rows = results.load()
    for row in rows:
        assert {"run", "commit", "device", "name", "result"} <= set(row)
        assert row["result"] != "measured" or (row["median_ms"] > 0 and math.isfinite(row.get("x_copy", 1.0)))
        assert row["result"] == "measured" or "median_ms" not in row


def test_two_threads_are_held_against_one_thread_of_their_own_run():
    rows = [stored("fused", 4.0, "aaa1"), stored("fused", 2.0, "aaa1", threads=2)]
    rows += [stored("copy of the logits", 1.0, "aaa1"), stored("copy of the logits", 0.8, "aaa1", threads=2)]
    rows += [stored("fused", 3.0, "aaa2"), stored("copy of the logits", 1.2, "aaa2")]
    table = report.threads_table(results.Stored(rows, "A CPU"))
    assert "| retinanet/b1/flat/float32 | 2.00 | 1.25 | 1.60 |" in table
    assert report.threads_table(results.Stored(rows[1:], "A CPU")) == report.NOT_MEASURED


def test_the_newest_row_of_a_device_is_found():
    rows = [stored("fused", 2.0, "aaa1"), stored("fused", 1.0, "aaa2"), stored("fused", 3.0, "aaa2", threads=2)]
    found = results.Stored(rows, "A CPU")
    assert found.find("retinanet/b1/flat/float32", "fused")["x_copy"] == 1.0
    assert found.find("retinanet/b1/flat/float32", "fused", threads=2)["x_copy"] == 3.0
    assert found.find("retinanet/b1/flat/float32", "fused", heap="default") is None
    assert results.devices(rows, gpu=False) == ["A CPU"] and results.devices(rows, gpu=True) == []
    assert machine.slug("A CPU") == "a-cpu"
    few = [{**stored("fused", 2.0, "aaa1"), "device": "Another", "run": "2099-01-01T00:00:00Z"}]
    assert results.devices(few + rows, gpu=False) == ["A CPU", "Another"]


def test_ours_on_a_gpu_are_the_cuda_kernels():
    """Triton's rows are there too, and newer."""
    row = {**stored("fused", 1.0, "aaa1", backend="cuda"), "capability": "9.0"}
    found = results.Stored([row, {**row, "backend": "triton", "run": "2099-01-01T00:00:00Z"}], "A CPU")
    assert found.find(row["name"], "fused")["backend"] == "cuda"
    assert found.find(row["name"], "fused", backend="triton")["run"].startswith("2099")
