"""The GPU programs without a GPU: dry runs on the CPU kernels, reports that claim nothing they did not do."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time

import pytest
import torch

from ioubal_kernels import ops
from ioubal_kernels.bench import machine, timing
from ioubal_kernels.bench.gpu import arch as gpu_arch
from ioubal_kernels.bench.gpu import cases as gpu_cases
from ioubal_kernels.bench.gpu import check as gpu_check
from ioubal_kernels.bench.gpu import device as gpu_device
from ioubal_kernels.bench.gpu import sanitize as gpu_sanitize
from ioubal_kernels.bench.gpu import sections as gpu_sections
from ioubal_kernels.bench.gpu import training as gpu_training
from ioubal_kernels.bench.gpu import tune as gpu_tune
from ioubal_kernels.ops import library, with_triton

pytestmark = pytest.mark.skipif(ops.load_error("cpu") is not None, reason="needs the CPU library")
NEEDS_CUDA_LIBRARY = pytest.mark.skipif(ops.load_error("cuda") is not None, reason="needs the CUDA library")
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
RESULTS = {"passed", "failed", "not run", "partly run"}


def plan(seconds: float = 60.0) -> gpu_sections.Plan:
    return gpu_sections.Plan("cpu", "cpu", True, time.monotonic() + seconds)


# ---------------------------------------------------------------------------------------------- without a GPU


@WITHOUT_GPU
@pytest.mark.parametrize("program", (gpu_check, gpu_sanitize, gpu_tune, gpu_arch), ids=lambda p: p.__name__)
def test_without_a_gpu_one_line_and_nothing_written(program, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "gpu-check"])
    assert (program.main() if program is gpu_arch else program.main([])) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and "no usable GPU" in captured.err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- gpu_check

QUICK = "device,special functions,parity,edge cases,repeats,graphs,streams,memory,autocast,large"


def run_check(tmp_path, *arguments: str) -> tuple[int, dict]:
    path = tmp_path / "report.json"
    code = gpu_check.main(["--device", "cpu", "--no-child", "--output", str(path), *arguments])
    return code, json.loads(path.read_text())


def test_the_dry_run_reports_every_section(tmp_path, capsys):
    code, report = run_check(tmp_path, "--sections", QUICK)
    assert code == 0 and report["dry_run"] and report["verdict"] == "incomplete"
    assert {"device", "torch", "commit", "version", "run", "budget_s", "seconds"} <= set(report)
    sections = report["sections"]
    assert set(sections) == {section.name for section in gpu_check.SECTIONS}
    for name, entry in sections.items():
        assert entry["result"] in RESULTS, name
        if entry["result"] == "passed":
            assert entry["checks"] == entry["planned"] > 0 and entry["failed"] == 0, name
        else:
            assert entry["reason"], name
    assert {n for n, e in sections.items() if e["result"] == "passed"} == set(QUICK.split(",")) - {
        "graphs", "streams", "memory",
    }  # fmt: skip
    assert sections["training"]["reason"] == "not asked for" and sections["graphs"]["reason"] == "needs a GPU"
    assert "incomplete: 7 passed, 8 not run" in capsys.readouterr().out


def test_a_failed_case_fails_the_whole(tmp_path, monkeypatch):
    right = gpu_cases.check

    def wrong(case, backend, device):
        assert case.op != "smooth_l1", "made wrong"
        right(case, backend, device)

    monkeypatch.setattr(gpu_cases, "check", wrong)
    code, report = run_check(tmp_path, "--sections", "parity")
    entry = report["sections"]["parity"]
    assert code == 1 and report["verdict"] == "failed" and entry["result"] == "failed"
    assert 0 < entry["failed"] < entry["checks"] and "made wrong" in entry["failures"][0]


def test_out_of_time_is_never_passed(tmp_path):
    code, report = run_check(tmp_path, "--sections", "parity,edge cases", "--budget", "0.0001")
    assert code == 0 and report["verdict"] == "incomplete"
    assert {e["result"] for e in report["sections"].values()} == {"not run"}
    tally = gpu_sections.Tally(plan())
    tally.each([("first", lambda: setattr(tally.plan, "deadline", 0.0)), ("second", lambda: None)])
    assert tally.result()["result"] == "partly run" and tally.result()["checks"] == 1


def test_a_section_that_raises_or_cannot_run():
    def raises(tally):
        tally.check("fine", lambda: None)
        raise ValueError("broken")

    def absent(tally):
        raise gpu_sections.NotRun("needs what is not here")

    def nothing(tally):
        tally.each([])

    entry, usable = gpu_sections.run_section(raises, plan())
    assert entry["result"] == "failed" and "broken" in entry["reason"] and usable
    assert gpu_sections.run_section(absent, plan())[0]["result"] == "not run"
    assert gpu_sections.run_section(nothing, plan())[0]["result"] == "not run"


def section_passes(tally):
    tally.check("fine", lambda: None)


def section_dies(tally):
    os._exit(7)


def section_hangs(tally):
    time.sleep(100)


def test_a_section_that_dies_or_hangs_does_not_take_the_others_along():
    sections = [
        gpu_sections.Section("dies", section_dies),
        gpu_sections.Section("passes", section_passes),
        gpu_sections.Section("hangs", section_hangs, limit=1.0),
    ]
    found = {}
    gpu_sections.run_all(sections, plan(), lambda name, entry: found.update({name: entry}))
    assert list(found) == ["dies", "passes", "hangs"]
    assert found["dies"]["result"] == "failed" and "exit code 7" in found["dies"]["reason"]
    assert found["hangs"]["result"] == "failed" and "did not end" in found["hangs"]["reason"]
    assert found["passes"]["result"] == "passed"


def test_sections_side_by_side():
    """As many lists as jobs, about as long as each other; a process that dies costs its own section only."""
    sections = [
        gpu_sections.Section("long", section_passes, limit=90.0),
        gpu_sections.Section("dies", section_dies, limit=50.0),
        gpu_sections.Section("short", section_passes, limit=30.0),
    ]
    lists = gpu_sections.shared_out(sections, 2)
    assert [[section.name for section in each] for each in lists] == [["long"], ["dies", "short"]]
    assert gpu_sections.shared_out(sections, 1) == [sections] and len(gpu_sections.shared_out(sections, 8)) == 3
    told = []
    gpu_sections.run_all(sections, plan(), lambda name, entry: told.append((name, entry["result"])), jobs=2)
    assert sorted(told) == [("dies", "failed"), ("long", "passed"), ("short", "passed")]


def test_the_parity_matrix_is_large_and_its_names_tell_the_cases_apart():
    cases = gpu_cases.parity_cases()
    assert len(cases) >= 400 and len({case.name for case in cases}) == len(cases)
    ops = {"focal", "cross_entropy", "smooth_l1", "detection", "boxes", "match_anchors", "match_fovea"}
    assert {case.op for case in cases} == ops
    for word in ("float32", "bfloat16", "float16", "nchw", "channels_last", "padded", "listed", "fovea", "image"):
        assert any(word in case.name for case in cases), word


def test_triton_checks_every_two_options_together_in_parts():
    cases = gpu_cases.parity_cases()
    chosen = gpu_cases.pairwise(cases)

    def pairs(of):
        return {pair for c in of for pair in itertools.combinations(sorted({c.op, *c.name.split()}), 2)}

    assert len(set(chosen)) == len(chosen) < len(cases) / 4 and pairs(chosen) == pairs(cases)
    sections = gpu_check.sections_of("triton")
    parts = [section for section in sections if section.name.startswith("parity")]
    assert len(parts) == gpu_check.TRITON_PARTS and len(sections) == len(gpu_check.SECTIONS) - 1 + len(parts)
    done = []
    for section in parts:
        tally = gpu_sections.Tally(gpu_sections.Plan("cpu", "cpu", False, time.monotonic() + 60.0))
        tally.each = lambda checks: done.extend(name for name, _ in checks)
        section.run(tally)
    assert sorted(done) == sorted(case.name for case in chosen)


def test_training_curves_are_held_to_the_spread_of_the_reference():
    base = [[1.0, 0.5], [0.9, 0.4], [0.8, 0.3]]
    shifted = lambda by: [[a + by, b + by] for a, b in base]  # noqa: E731
    reference = [base, base, shifted(1e-5)]
    facts = gpu_training.compare(shifted(5e-5), reference)
    assert facts["steps"] == 3 and 0.4 < facts["worst_share_of_tolerance"] < 0.6
    with pytest.raises(AssertionError, match="part by"):
        gpu_training.compare(shifted(2e-4), reference)
    with pytest.raises(AssertionError):
        gpu_training.compare(shifted(float("nan")), reference)


def test_reports_hold_no_folders_and_are_whole(tmp_path):
    path = tmp_path / "new" / "report.json"
    text = "Frame in /opt" + "/lib/libx.so:12, forward/backward"
    gpu_device.write_report(path, {"lines": [text]})
    assert json.loads(path.read_text()) == {"lines": ["Frame in libx.so:12, forward/backward"]}
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert machine.slug("NVIDIA H200") == "nvidia-h200"


# ---------------------------------------------------------------------------------------------- sanitizers

RAN = "\n".join(f"case {i + 1}: a name" for i in range(64))
CLEAN = f"========= COMPUTE-SANITIZER\n{RAN}\n========= ERROR SUMMARY: 0 errors\n"
RACES = CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")


@pytest.mark.parametrize(
    ("output", "status", "result", "errors"),
    (
        (CLEAN, 0, "passed", 0),
        (RACES, 0, "passed", 0),
        (CLEAN.replace("0 errors", "3 errors"), 99, "failed", 3),
        (CLEAN.replace("0 errors", "1 error"), 0, "failed", 1),
        (CLEAN, 1, "failed", 0),  # the cases themselves failed
        (CLEAN.replace("case 64: a name\n", ""), 0, "partly run", 0),
        ("========= COMPUTE-SANITIZER\n========= Error: Device not supported\n", 1, "not run", None),
        ("Permission denied\n", 1, "not run", None),
        (RAN, None, "partly run", None),
        ("", None, "not run", None),
        (f"{RAN}\n========= Invalid __global__ read of size 4 bytes\n", None, "failed", 1),
    ),
)  # fmt: skip
def test_a_tools_verdict(output, status, result, errors):
    entry = gpu_sanitize.judge(output, status, 64)
    assert entry["result"] == result and entry.get("errors") == errors
    assert result == "passed" or entry["reason"]


def test_a_tool_is_stopped_in_time_and_sees_no_caching_allocator():
    echo = [sys.executable, "-c", "import os; print('case 1: ' + os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])"]
    assert gpu_sanitize.run_tool(echo, 1, 20)["cases"] == 1
    slow = [sys.executable, "-c", "import time; print('case 1: a', flush=True); time.sleep(60)"]
    entry = gpu_sanitize.run_tool(slow, 2, 1.0)
    assert entry["result"] == "partly run" and entry["cases"] == 1 and entry["seconds"] < 20


def test_the_sanitizers_cases_run(capsys):
    assert gpu_sanitize.main(["--run-cases", "--device", "cpu", "--cases", "24"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 24
    assert gpu_sanitize.CASES >= 60 and len(gpu_cases.small_cases(gpu_sanitize.CASES)) == gpu_sanitize.CASES


# ---------------------------------------------------------------------------------------------- gpu_tune


TUNED = (
    pytest.param("cuda", library, "choose_cuda_plan", marks=NEEDS_CUDA_LIBRARY),
    pytest.param("triton", with_triton, "choose_plan"),
)


@pytest.mark.parametrize("backend, module, function", TUNED)
def test_the_dry_run_of_every_plan(backend, module, function, tmp_path, monkeypatch, capsys):
    """Each plan is in force while its path is checked, and none afterwards."""
    plans = []
    monkeypatch.setattr(module, function, lambda **plan: plans.append(plan))
    path, name = tmp_path / "tune.json", "retinanet/b16/flat/bfloat16"
    assert gpu_tune.main(["--dry-run", "--backend", backend, "--only", name, "--output", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["backend"] == backend
    rows = report["rows"]
    assert report["dry_run"] and report["not_run"] == [] and {row["name"] for row in rows} == {name}
    assert plans[::2] == [row["plan"] for row in rows] and set(map(len, plans[1::2])) == {0}
    assert {} in plans[::2] and len({row["path"] for row in rows}) == len(rows) > 5
    assert all(row["result"] == "measured" and "x_copy" not in row for row in rows)
    assert "by rule" in capsys.readouterr().out


@NEEDS_CUDA_LIBRARY
def test_a_plan_that_fails(tmp_path, monkeypatch, capsys):
    def choose(**plan):
        if plan.get("iterations") == 8:
            raise RuntimeError("no such plan")

    monkeypatch.setattr(library, "choose_cuda_plan", choose)
    path = tmp_path / "tune.json"
    assert gpu_tune.main(["--dry-run", "--only", "retinanet/b16/nchw/float32", "--output", str(path)]) == 1
    results = {row["path"]: row["result"] for row in json.loads(path.read_text())["rows"]}
    assert results["iterations 8"] == "failed" and results["by rule"] == "measured"
    assert "no such plan" in capsys.readouterr().out


@NEEDS_CUDA_LIBRARY
@pytest.mark.parametrize("arguments", (["--only", "matching"], ["--rounds", "0"], ["--budget", "-1"]))
def test_tune_names_what_it_cannot_do(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_tune.main(["--dry-run", *arguments])
    assert stopped.value.code == 2 and arguments[0] in capsys.readouterr().err
