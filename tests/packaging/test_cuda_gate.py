"""The gate on the machine code finds what it should, on listings made up for it."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

LISTING = """
.text._Z4goodPf:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*0030*/              @UP0 STG.E.EF.128 desc[UR4][R2.64], R4 ;            &req={1} &wr=0x2    ?trans4;
        /*0040*/                   RED.E.ADD.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0050*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_rn_f64_full) ;
        /*0060*/                   EXIT ;
        /*0070*/                   NOP ;
.text._Z3badPf:
        /*0000*/                   LDL R4, [R1+0x10] ;
        /*0010*/                   STL.64 [R1], R4 ;
        /*0020*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
        /*0030*/                   ATOMG.E.ADD.F64.RN.STRONG.GPU PT, R2, desc[UR4][R2.64], R6 ;
        /*0040*/                   ATOMS.CAST.SPIN P0, [R4], R6, R7 ;
        /*0050*/                   CALL.REL.NOINC `($__internal_1_$__cuda_sm20_div_u64) ;
        /*0060*/                   CALL.REL.NOINC `($__internal_2_$__cuda_sm20_rem_s64) ;
"""


def test_scan(cuda_code: ModuleType) -> None:
    """Modifiers and predicates around it do not hide a wide access; integer atomics and double division are allowed."""
    found = dict(cuda_code.scan(LISTING.splitlines(keepends=True)))
    assert found["_Z4goodPf"] == cuda_code.Figures(0, 0, 0, None, 7, 1, 1, 0, 0, 0)
    assert found["_Z3badPf"] == cuda_code.Figures(0, 0, 0, None, 7, 0, 0, 2, 3, 2)


def test_spills_from_the_build_report(cuda_code: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "one.ptxas.txt"
    report.write_text(
        "ptxas info    : Compiling entry function '_Z3badPf' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z3badPf\n"
        "    8 bytes stack frame, 12 bytes spill stores, 24 bytes spill loads\n"
        "ptxas info    : Used 32 registers, used 0 barriers\n"
    )
    assert cuda_code.spills([report]) == {("sm_80", "_Z3badPf"): 36}


def test_short_names(cuda_code: ModuleType) -> None:
    mangled = "_ZN6ioubal52_GLOBAL__N__7f500811_14_placeholder_cu_cf1fa79d_44964rowsIfLi4EEEvPKT_"
    templated = "_ZN6ioubal4cuda4fillINS0_8BFloat16ELNS0_6LayoutE2EEEvNS0_5TableE"
    names = {mangled: "rows<float, 4>", templated: "fill<BFloat16, (Layout)2>", "_Z4goodPf": "good"}
    assert cuda_code.short_names(names) == names


def good(cuda_code: ModuleType, **changed: int) -> dict:
    figures = {"registers": 42, "instructions": 100, "wide_loads": 2} | changed
    return {"rows<4>": {"sm_90": cuda_code.Figures(**figures)}}


BREACHES = {
    "registers": ("registers", 49, "rows<4> [sm_90]: 49 registers, budget 48"),
    "instructions": ("instructions", 129, "rows<4> [sm_90]: 129 instructions, budget 128"),
    "wide": ("wide_loads", 0, "rows<4> [sm_90]: no 16-byte loads any more"),
    "stack": ("stack", 8, "rows<4> [sm_90]: 8 bytes of stack or local memory"),
    "spills": ("spills", 4, "rows<4> [sm_90]: 4 bytes spilled"),
    "local memory": ("local_instructions", 3, "rows<4> [sm_90]: 3 local memory instructions"),
    "float atomics": ("float_atomics", 1, "rows<4> [sm_90]: 1 atomic additions of floats: their order is not fixed"),
    "64-bit division": ("divisions", 1, "rows<4> [sm_90]: 1 64-bit integer divisions"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_each_breach_is_named(cuda_code: ModuleType, name: str) -> None:
    """And forgiven where the budget allows it by name; another nvcc's registers and instructions are not compared."""
    figure, value, words = BREACHES[name]
    worse = good(cuda_code, **{figure: value})
    budget = cuda_code.new_budget(good(cuda_code), {"nvcc": None, "kernels": {}}, "13.0")
    assert cuda_code.violations(good(cuda_code), budget, "13.0") == []
    assert cuda_code.violations(worse, budget, "13.0") == [words]
    number = name in ("registers", "instructions")
    assert cuda_code.violations(worse, budget, "13.1") == ([] if number else [words])
    if name in cuda_code.ALLOWABLE:
        budget["kernels"]["rows<4>"]["allow"] = {name: value}
        assert cuda_code.violations(worse, budget, "13.0") == []
        budget["kernels"]["rows<4>"]["allow"] = {name: value - 1}
        assert cuda_code.violations(worse, budget, "13.0") == [words]


def test_a_spill_is_one_breach(cuda_code: ModuleType) -> None:
    """The stack that it lies on and the instructions that move it are no others."""
    table = good(cuda_code, spills=36, stack=8, local_instructions=9)
    budget = cuda_code.new_budget(table, {"nvcc": None, "kernels": {}}, "13.0")
    assert cuda_code.violations(table, budget, "13.0") == ["rows<4> [sm_90]: 36 bytes spilled"]


def test_kernels_without_budget_and_budgets_without_kernel(cuda_code: ModuleType) -> None:
    empty = {"nvcc": None, "kernels": {}}
    assert cuda_code.violations(good(cuda_code), empty, "13.0") == [
        "there is no budget yet; --write makes one of the present figures"
    ]
    budget = {"nvcc": "13.0", "kernels": {"planes<*>": {"registers": {}}}}
    assert cuda_code.violations(good(cuda_code), budget, "13.0") == [
        "rows<4>: not in the budget",
        "planes<*>: in the budget, but not in the library",
    ]
    assert cuda_code.violations(good(cuda_code), {"nvcc": "13.0", "kernels": {"rows<*>": {}}}, "13.0") == []


def test_written_budget(cuda_code: ModuleType, tmp_path: Path) -> None:
    """Rounded up; what is decided by hand and what was not built now stays."""
    kept = {"rows<4>": {"registers": {"sm_80": 40, "sm_90": 96}, "wide": ["stores"], "allow": {"stack": 8}}, "gone": {}}
    written = cuda_code.new_budget(good(cuda_code), {"nvcc": "12.9", "kernels": kept}, "13.0")
    assert written == {
        "nvcc": "13.0",
        "kernels": {
            "rows<4>": {
                "registers": {"sm_80": 40, "sm_90": 48},
                "instructions": 128,
                "wide": ["stores"],
                "allow": {"stack": 8},
            }
        },
    }
    path = tmp_path / "budget.json"
    cuda_code.write_budget(written, path)
    assert cuda_code.load_budget(path) == written
    written["kernels"]["rows<4>"]["allow"] = {"everything": 1}
    cuda_code.write_budget(written, path)
    with pytest.raises(cuda_code.Missing, match="rows<4>: allow knows stack, .*, not everything"):
        cuda_code.load_budget(path)


def test_a_pattern_covers_several_kernels(cuda_code: ModuleType) -> None:
    table = {f"rows<{n}>": {"sm_90": cuda_code.Figures(registers=n, instructions=n, wide_loads=1)} for n in (30, 50)}
    written = cuda_code.new_budget(table, {"nvcc": "13.0", "kernels": {"rows<*>": {"wide": ["loads"]}}}, "13.0")
    assert written["kernels"] == {"rows<*>": {"registers": {"sm_90": 56}, "instructions": 64, "wide": ["loads"]}}
    assert cuda_code.violations(table, written, "13.0") == []


def test_without_a_library_the_program_says_why(
    cuda_code: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "_build_info.json").write_text('{"cuda": {"built": false, "reason": "no nvcc found"}}')
    assert cuda_code.main(["--library", str(tmp_path / "_ioubal_cuda.so")]) == 2
    assert capsys.readouterr().err == "cuda-code: _ioubal_cuda.so was not built: no nvcc found\n"
