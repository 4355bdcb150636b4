"""The gate on the GPU machine code: `python tools/cuda_code.py` reads _ioubal_cuda.so and holds it to its budget.

No GPU is needed. Of every kernel and architecture it reads registers, stack and spills, and from the instructions
themselves (of SCANNED, else of the newest architecture built) what costs most when it creeps in: local memory, loads
and stores that are no longer 16 bytes wide, atomic additions of floats (whose order is not fixed), 64-bit integer
divisions (a subroutine of about 70 instructions; double precision's divisions and roots are subroutines, too, but
allowed).

The budget is tests/packaging/cuda_budget.json: registers per kernel and architecture, instructions, which kernels have
wide loads and stores. A key may be a pattern (`dense_*`); "allow" says how much of what the rules forbid a kernel may
do, such as {"spills": 40}, in bytes.
After a change that is meant, `--write` puts in the present figures, rounded up, and new kernels; "wide" and "allow" of
a kernel that is there already are changed by hand only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "ioubal_kernels" / "_ioubal_cuda.so"
BUDGET = ROOT / "tests" / "packaging" / "cuda_budget.json"
SCANNED = ("sm_80", "sm_90")  # disassembling all architectures would be some 100 MB of text and say little more
REGISTER_STEP = 8  # what the hardware allocates by
INSTRUCTION_STEP = 32
ALLOWABLE = ("stack", "spills", "local memory", "float atomics", "64-bit division")

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)(.*)")
FLOAT_ATOMIC = re.compile(r"(?:RED|ATOM)\w*\..*\b(?:B?F16|F16x2|F32|F64)|ATOM\w*\.CAST")  # CAST: the loop for floats
DIVISION = re.compile(r"__cuda_sm\w+?_(?:div|rem)_[us]64")


class Missing(Exception):
    """A tool or file that the gate needs is not there; the message says which."""


@dataclass
class Figures:
    """What the machine code of one kernel for one architecture is. None: not looked at."""

    registers: int = 0
    stack: int = 0  # bytes
    local: int = 0  # bytes of static local memory
    spills: int | None = None  # bytes stored and loaded
    instructions: int | None = None  # without NOPs; subroutines included
    wide_loads: int | None = None
    wide_stores: int | None = None
    local_instructions: int | None = None
    float_atomics: int | None = None
    divisions: int | None = None  # calls of 64-bit integer division or remainder

    def worse_of(self, other: Figures) -> None:
        """Two kernels of one name, in two sources: the worse figures stand. Few wide accesses are worse than many."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine is None or theirs is None:
                setattr(self, field.name, theirs if mine is None else mine)
            else:
                setattr(self, field.name, (min if field.name.startswith("wide") else max)(mine, theirs))


Table = dict[str, dict[str, Figures]]  # kernel -> architecture -> figures


def find_tool(name: str) -> str:
    """On PATH, in the CUDA toolkit, or in the triton package, which brings the disassemblers that pip's nvcc lacks."""
    toolkits = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home, "bin") for home in toolkits if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = [shutil.which(name), *(shutil.which(str(place / name)) for place in places)]
    for path in found:
        if path is not None:
            return path
    raise Missing(f"{name} is not on PATH, in CUDA_HOME or in the triton package")


def output_of(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise Missing(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """`rows<float, 4, (Layout)0>` for each mangled name: no parameters, no namespaces of ours."""
    names = sorted(set(mangled))
    demangler = shutil.which("c++filt") or find_tool("cu++filt")
    shown = output_of([demangler, "-p"], input="\n".join(names)).splitlines()
    return {
        name: re.sub(r"ioubal::|cuda::|\(anonymous namespace\)::|^void ", "", text) for name, text in zip(names, shown)
    }


def resources(library: Path) -> Iterator[tuple[str, str, Figures]]:
    """(architecture, mangled kernel, figures) of all machine code in the library."""
    architecture = kernel = ""
    for line in output_of([find_tool("cuobjdump"), "--dump-resource-usage", str(library)]).splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):$", line):
            kernel = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", line):
            yield architecture, kernel, Figures(*map(int, found.groups()))


def spills(reports: Iterable[Path]) -> dict[tuple[str, str], int]:
    """(architecture, mangled kernel) -> bytes, from what ptxas -v said in the build."""
    found: dict[tuple[str, str], int] = {}
    for report in reports:
        architecture = kernel = ""
        for line in report.read_text(encoding="utf-8").splitlines():
            if entry := re.search(r"Compiling entry function '(\S+)' for '(\w+)'", line):
                kernel, architecture = entry.groups()
            elif entry := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
                found[architecture, kernel] = found.get((architecture, kernel), 0) + sum(map(int, entry.groups()))
    return found


def scan(listing: Iterable[str]) -> Iterator[tuple[str, Figures]]:
    """(mangled kernel, what its instructions show) of one disassembled file."""
    kernel, seen = "", Figures()
    for line in listing:
        if line.startswith(".text."):
            if kernel:
                yield kernel, seen
            kernel = line[len(".text.") :].rstrip().rstrip(":")
            seen = Figures(0, 0, 0, None, 0, 0, 0, 0, 0, 0)
            continue
        found = INSTRUCTION.match(line)
        if found is None or found[1] == "NOP":
            continue
        opcode, operands = found.groups()
        name, _, modifiers = opcode.partition(".")
        seen.instructions += 1
        wide = "128" in modifiers.split(".") or "256" in modifiers.split(".")
        seen.wide_loads += wide and name == "LDG"
        seen.wide_stores += wide and name == "STG"
        seen.local_instructions += name in ("LDL", "STL")
        seen.float_atomics += FLOAT_ATOMIC.match(opcode) is not None
        seen.divisions += name.startswith("CALL") and DIVISION.search(operands) is not None
    if kernel:
        yield kernel, seen


def disassembled(file: Path) -> list[tuple[str, Figures]]:
    """What `scan` finds in one file of machine code; the listing, megabytes, is read as it is made."""
    command = [find_tool("nvdisasm"), "-c", "-ndf", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as listing:
        found = list(scan(listing.stdout))
    if listing.returncode != 0:
        raise Missing(f"{' '.join(command)} failed")
    return found


def instructions(library: Path, architectures: list[str]) -> Iterator[tuple[str, str, Figures]]:
    """(architecture, mangled kernel, what its instructions show) of the code for these architectures."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        for architecture in architectures:
            output_of([find_tool("cuobjdump"), "-xelf", f".{architecture}.", str(library)], cwd=folder)
        files = sorted(Path(folder).iterdir(), key=lambda file: -file.stat().st_size)
        for file, kernels in zip(files, pool.map(disassembled, files)):
            yield from ((file.suffixes[-2][1:], kernel, figures) for kernel, figures in kernels)


def build_info(library: Path) -> dict:
    try:
        return json.loads((library.parent / "_build_info.json").read_text(encoding="utf-8"))["cuda"]
    except (OSError, ValueError, KeyError):
        return {}


def read(library: Path = LIBRARY) -> Table:
    """Everything this gate knows of a library. Missing, with the reason, where it cannot be read."""
    if not library.is_file():
        reason = build_info(library).get("reason")
        raise Missing(f"{library.name} was not built" + (f": {reason}" if reason else ""))
    found = list(resources(library))
    built = sorted({architecture for architecture, _, _ in found}, key=lambda name: int(re.sub(r"\D", "", name)))
    spilled = spills((ROOT / "build" / build_info(library).get("folder", "none")).glob("*.ptxas.txt"))
    for architecture, kernel, figures in found:
        figures.spills = spilled.get((architecture, kernel))
    found += instructions(library, [name for name in SCANNED if name in built] or built[-1:])
    names = short_names(kernel for _, kernel, _ in found)
    table: Table = {}
    for architecture, kernel, figures in found:
        table.setdefault(names[kernel], {}).setdefault(architecture, Figures()).worse_of(figures)
    return dict(sorted(table.items()))


def entry_for(kernel: str, kernels: dict[str, dict]) -> tuple[str, dict] | None:
    """The budget's key and entry: the very name, else the first pattern that matches."""
    if kernel in kernels:
        return kernel, kernels[kernel]
    return next(((key, entry) for key, entry in kernels.items() if "*" in key and fnmatchcase(kernel, key)), None)


def breaches_of(figures: Figures, architecture: str, entry: dict, comparable: bool) -> Iterator[str]:
    """What one kernel's code for one architecture breaks of the rules and of its budget."""
    spilled = bool(figures.spills)  # which explains a stack and the use of local memory: once is enough
    rules = {
        "stack": (0 if spilled else figures.stack + figures.local, "bytes of stack or local memory"),
        "spills": (figures.spills, "bytes spilled"),
        "local memory": (0 if spilled else figures.local_instructions, "local memory instructions"),
        "float atomics": (figures.float_atomics, "atomic additions of floats: their order is not fixed"),
        "64-bit division": (figures.divisions, "64-bit integer divisions"),
    }
    for rule, (count, what) in rules.items():
        if (count or 0) > entry.get("allow", {}).get(rule, 0):
            yield f"{count} {what}"
    for kind in entry.get("wide", ()):
        if getattr(figures, f"wide_{kind}") == 0:
            yield f"no 16-byte {kind} any more"
    limits = {"registers": entry.get("registers", {}).get(architecture), "instructions": entry.get("instructions")}
    for name, limit in limits.items():
        if comparable and limit is not None and (getattr(figures, name) or 0) > limit:
            yield f"{getattr(figures, name)} {name}, budget {limit}"


def violations(table: Table, budget: dict, nvcc: str | None = None) -> list[str]:
    """What breaks the rules or the budget, a line each. Numbers hold for the budget's nvcc only, the rules always."""
    kernels, used = budget["kernels"], set()
    found = [] if kernels else ["there is no budget yet; --write makes one of the present figures"]
    comparable = nvcc is None or nvcc == budget["nvcc"]
    for kernel, by_architecture in table.items():
        matched = entry_for(kernel, kernels)
        if matched is None and kernels:
            found.append(f"{kernel}: not in the budget")
        key, entry = matched or ("", {})
        used.add(key)
        breaches: dict[str, list[str]] = {}  # what -> where
        for architecture, figures in by_architecture.items():
            for breach in breaches_of(figures, architecture, entry, comparable):
                breaches.setdefault(breach, []).append(architecture)
        found += [f"{kernel} [{' '.join(where)}]: {breach}" for breach, where in breaches.items()]
    return found + [f"{key}: in the budget, but not in the library" for key in kernels if key not in used]


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def new_budget(table: Table, old: dict, nvcc: str) -> dict:
    """The present figures, rounded up. Of the old stay patterns, "wide", "allow" and architectures not built now."""
    kernels = {}
    for kernel, by_architecture in table.items():
        key, before = entry_for(kernel, old["kernels"]) or (kernel, {})
        entry = kernels.setdefault(key, {"registers": dict(before.get("registers", {})) if key == kernel else {}})
        for architecture, figures in by_architecture.items():
            least = entry["registers"].get(architecture, 0) if key != kernel else 0
            entry["registers"][architecture] = max(least, round_up(figures.registers, REGISTER_STEP))
        scanned = [figures for figures in by_architecture.values() if figures.instructions is not None]
        counts = [round_up(figures.instructions, INSTRUCTION_STEP) for figures in scanned]
        entry["instructions"] = max([*counts, entry.get("instructions", 0)])
        wide = [kind for kind in ("loads", "stores") if all(getattr(each, f"wide_{kind}") for each in scanned)]
        entry["wide"] = before.get("wide", wide)
        if before.get("allow"):
            entry["allow"] = before["allow"]
    return {"nvcc": nvcc, "kernels": kernels}


def write_budget(budget: dict, path: Path) -> None:
    """One line per kernel, so that a change of the figures reads well as a difference."""
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in budget["kernels"].items())
    path.write_text(
        f'{{\n  "nvcc": {json.dumps(budget["nvcc"])},\n  "kernels": {{\n{lines}\n  }}\n}}\n', encoding="utf-8"
    )


def load_budget(path: Path = BUDGET) -> dict:
    budget = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"nvcc": None, "kernels": {}}
    for key, entry in budget["kernels"].items():
        unknown = set(entry.get("allow", ())) - set(ALLOWABLE)
        if unknown:
            raise Missing(f"{path.name}: {key}: allow knows {', '.join(ALLOWABLE)}, not {', '.join(sorted(unknown))}")
    return budget


def rows(table: Table) -> Iterator[str]:
    """The figures as text: registers of each architecture, then the instructions of those that were scanned."""
    built = sorted({name for each in table.values() for name in each}, key=lambda name: int(re.sub(r"\D", "", name)))
    width = max(map(len, table), default=0)
    heads = "".join(f"{name:>8}" for name in built)
    yield f"{'registers':{width}}{heads}  instructions, 16-byte loads/stores"
    for kernel, by_architecture in table.items():
        numbers = "".join(f"{by_architecture[name].registers if name in by_architecture else '':>8}" for name in built)
        scanned = [
            f"{name}: {each.instructions}, {each.wide_loads}/{each.wide_stores}"
            for name, each in by_architecture.items()
            if each.instructions is not None
        ]
        yield f"{kernel:{width}}{numbers}  {'   '.join(scanned)}"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--library", type=Path, default=LIBRARY, help="may be an object file of the build, too")
    parser.add_argument("--budget", type=Path, default=BUDGET)
    parser.add_argument("--write", action="store_true", help="make the present figures the budget")
    chosen = parser.parse_args(arguments)
    try:
        table, budget = read(chosen.library), load_budget(chosen.budget)
        nvcc = build_info(chosen.library).get("nvcc")
        if chosen.write:
            budget = new_budget(table, budget, nvcc)
            write_budget(budget, chosen.budget)
    except Missing as missing:
        print(f"cuda-code: {missing}", file=sys.stderr)
        return 2
    print("\n".join(rows(table)))
    if nvcc != budget["nvcc"]:
        print(f"cuda-code: built by nvcc {nvcc}, budget of {budget['nvcc']}: numbers are not compared", file=sys.stderr)
    found = violations(table, budget, nvcc)
    for line in found:
        print(f"cuda-code: {line}", file=sys.stderr)
    print(f"cuda-code: {len(table)} kernels, {len(found)} violations", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
