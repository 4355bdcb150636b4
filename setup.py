"""Build of the package: which folder is installed under which name, and the compiled libraries.

Each library is one plain shared library on torch's stable ABI, loaded with torch.ops.load_library. It contains no
Python, so one file serves every Python >= 3.10 and every torch >= 2.11, and the wheel is tagged py3-none-<platform>.
The CUDA library needs nvcc, not a GPU. Without torch (an isolated build environment) or without a compiler the install
succeeds with what can be built, pure Python at the least, and `ioubal_kernels/_build_info.json` keeps the reasons.

Choices, all read from the environment and printed:
  IOUBAL_BUILD_CPU, IOUBAL_BUILD_CUDA=auto|0|1
                         auto (default): build if possible; 0: do not; 1: not being able to is an error
  TORCH_CUDA_ARCH_LIST   GPU architectures, in torch's syntax: "9.0", "8.0;9.0+PTX"; by default ARCHITECTURES below
  CUDA_HOME, CUDA_PATH   the CUDA toolkit; by default that of the nvcc on PATH, then /usr/local/cuda
  CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, NVCC_APPEND_FLAGS, MAX_JOBS
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "ioubal_kernels"
# package name -> top-level folder; a folder that is not there is left out
INSTALLED_AS = {f"{PACKAGE}.bench": "bench", f"{PACKAGE}.triton_kernels": "triton_kernels"}
INFO = "_build_info.json"
MIN_TORCH = (2, 11)
# No instruction-set flag on any platform: the source picks the instruction set when it runs.
COMMON = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
CPU_COMPILE = [*COMMON, "-fPIC", "-fno-math-errno"]
CPU_LINK = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
# USE_CUDA: without it the stable ABI's headers hide streams and CUDA errors. The runtime is linked statically, so that
# the library depends on no other copy of it than its own.
CUDA_COMPILE = [*COMMON, "-DUSE_CUDA", "-cudart=static", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
# Sources whose results are compared for equality: no product may be contracted into a multiply-add.
EXACT_SOURCES = "matching"  # what their names begin with
ARCHITECTURES = "7.5;8.0;9.0;10.0;12.0+PTX"
GENERATIONS = {  # names that torch takes for versions
    "Pascal": "6.0;6.1+PTX",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
LAUNCHERS = ("ccache", "sccache", "distcc")  # words that may stand before the compiler in CXX


class Unavailable(Exception):
    """The library cannot be built; the message is the reason shown to the user."""


@dataclass(frozen=True)
class Library:
    """One library of the package: IOUBAL_BUILD_<NAME>, _ioubal_<name>.so, its entry in the build information."""

    name: str
    sources: str  # a pattern
    toolchain: Callable[[Path, str], Toolchain]  # of torch's folder and version; raises Unavailable
    without: str  # what an installation without it means

    @property
    def title(self) -> str:
        return f"{self.name.upper()} library"

    @property
    def file(self) -> str:
        return f"_ioubal_{self.name}.so"


@dataclass(frozen=True)
class Toolchain:
    """How one library is compiled and linked here."""

    version: str
    compile: list[str]  # the command, up to source and output
    link: list[str]  # the command
    link_with: list[str]  # the libraries, which come last
    details: dict[str, object]  # for the build information
    exact: list[str]  # the options that forbid contraction
    threads: str | None = None  # the option with which one call of the compiler uses several cores
    report: str | None = None  # suffix of the file that keeps what the compiler prints


def say(text: str) -> None:
    print(f"ioubal: {text}", flush=True)


def find_torch() -> tuple[Path, str]:
    """Folder and version of the installed torch, without the seconds that importing it takes."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable(
            "torch was not installed in the build environment (pip isolates it; --no-build-isolation does not)"
        )
    folder = Path(spec.origin).parent
    found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (folder / "version.py").read_text(encoding="utf-8"))
    if found is None:
        raise Unavailable("the version of the installed torch could not be read from its version.py")
    if (int(found[2]), int(found[3])) < MIN_TORCH:
        raise Unavailable(f"building needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]}, found torch {found[1]}")
    return folder, found[1]


def words(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))


def find_compiler() -> tuple[list[str], str]:
    """Command of the C++ compiler ($CXX, else the first of c++, g++, clang++) and the first line of its --version."""
    chosen = words("CXX")
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        path = shutil.which(command[0])
        if path is None:
            continue
        version = subprocess.run([path, *command[1:], "--version"], capture_output=True, text=True)
        if version.returncode == 0:
            return [path, *command[1:]], (version.stdout.strip() or "unknown version").splitlines()[0]
    raise Unavailable(
        f"no C++ compiler found ({'CXX=' + shlex.join(chosen) if chosen else 'tried c++, g++ and clang++'})"
    )


def cpu_toolchain(torch: Path, torch_version: str) -> Toolchain:
    compiler, version = find_compiler()
    include = ["-Icsrc", "-isystem", str(torch / "include"), *words("CPPFLAGS"), *words("CXXFLAGS")]
    return Toolchain(
        version,
        compile=[*compiler, *CPU_COMPILE, *include],
        link=compiler,
        link_with=[*CPU_LINK, f"-L{torch / 'lib'}", *words("LDFLAGS"), "-ltorch", "-ltorch_cpu", "-lc10"],
        details={"compiler": version, "flags": CPU_COMPILE},
        exact=["-ffp-contract=off"],
    )


def find_nvcc() -> tuple[str, str]:
    """Path and release (such as "13.0") of nvcc. A folder named in the environment is the only one looked at."""
    named = [(name, os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if named:
        name, home = named[0]
        path, tried = shutil.which(str(Path(home, "bin", "nvcc"))), f"{name}={home}"
    else:
        path, tried = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc"), "tried PATH and /usr/local/cuda"
    if path is None:
        raise Unavailable(f"no nvcc found ({tried}); CUDA_HOME names the folder of a CUDA toolkit")
    asked = subprocess.run([path, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", asked.stdout)
    if asked.returncode != 0 or release is None:
        raise Unavailable(f"{path} --version failed or names no release")
    return path, release[1]


def architectures(nvcc: str) -> tuple[list[str], list[str]]:
    """What to compile for, as names ("sm_90", "compute_120" for PTX) and as flags.

    From the default leave out what this nvcc does not know; what TORCH_CUDA_ARCH_LIST asks for must be known.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    entries = [GENERATIONS.get(entry, entry) for entry in re.split("[; ]+", asked or ARCHITECTURES)]
    entries = [entry for entry in ";".join(entries).split(";") if entry]
    parsed = [re.fullmatch(r"(\d{1,2})\.(\d)([af]?)(\+PTX)?", entry) for entry in entries]
    if not parsed or None in parsed:
        raise SystemExit(
            f"ioubal: TORCH_CUDA_ARCH_LIST: expected versions such as '9.0' or '8.0;9.0+PTX', got {asked!r}"
        )
    numbers = {f"{major}{minor}{kind}": bool(ptx) for major, minor, kind, ptx in (each.groups() for each in parsed)}
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    unknown = [number for number in numbers if f"sm_{number.rstrip('af')}" not in known]
    if unknown and (asked or len(unknown) == len(numbers)):
        raise Unavailable(
            f"nvcc cannot compile for sm_{unknown[0]}{f' (TORCH_CUDA_ARCH_LIST={asked})' if asked else ''},"
            f" only for {', '.join(known) or 'nothing'}"
        )
    if unknown:
        numbers = {number: ptx for number, ptx in numbers.items() if number not in unknown}
        numbers[list(numbers)[-1]] = True  # PTX of the newest serves the GPUs that come later
    names = [f"sm_{number}" for number in numbers] + [f"compute_{number}" for number, ptx in numbers.items() if ptx]
    return names, [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in names]


def for_host(flags: list[str]) -> list[str]:
    """Flags that nvcc hands on to the host compiler, where a comma separates flags."""
    return [f"-Xcompiler={flag}" for flag in (each.replace(",", r"\,") for each in flags)]


def cuda_toolchain(torch: Path, torch_version: str) -> Toolchain:
    built_for = re.search(r"(?m)^cuda\b[^=]*= '(\d+)\.", (torch / "version.py").read_text(encoding="utf-8"))
    if built_for is None:
        raise Unavailable(f"torch {torch_version} is not a CUDA build")
    nvcc, release = find_nvcc()
    if release.split(".")[0] != built_for[1]:
        raise Unavailable(f"{nvcc} is of CUDA {release}, torch {torch_version} of CUDA {built_for[1]}")
    compiler, version = find_compiler()
    host = compiler[1:] if Path(compiler[0]).name in LAUNCHERS and len(compiler) > 1 else compiler
    names, targets = architectures(nvcc)
    command = [nvcc, f"-ccbin={host[0]}", *for_host(host[1:]), *targets]  # linking needs the targets, too
    include = ["-Icsrc", "-isystem", str(torch / "include"), *for_host(words("CPPFLAGS") + words("CXXFLAGS"))]
    return Toolchain(
        f"nvcc {release}, {version}, {' '.join(names)}",
        compile=[*command, *CUDA_COMPILE, *include],
        link=[*command, "-shared", "-cudart=static"],
        link_with=[f"-L{torch / 'lib'}", *for_host(words("LDFLAGS")), "-ltorch_cpu", "-ltorch_cuda"],
        details={"nvcc": release, "compiler": version, "architectures": names, "flags": CUDA_COMPILE},
        exact=["--fmad=false", *for_host(["-ffp-contract=off"])],
        threads="--threads",
        report=".ptxas.txt",
    )


LIBRARIES = (
    Library("cpu", "csrc/cpu/*.cpp", cpu_toolchain, "without it the losses are as correct, but slower"),
    Library("cuda", "csrc/cuda/*.cu", cuda_toolchain, "without it CUDA tensors go through slower code"),
)


def run_compiler(command: list[str], what: str, report: Path | None = None) -> None:
    """Run it and show what it complains of; `report` keeps all that it says."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if report is not None:
        report.write_text(done.stderr, encoding="utf-8")
    # ptxas -v: the resources of each function, four lines of them. A numbered remark, "(C1234)", is worth seeing.
    chatter = r"^(ptxas info +: (?!\(C\d).*|    \d+ bytes stack frame,.*)\n?"
    complaints = re.sub(chatter, "", done.stderr, flags=re.MULTILINE).strip()
    if complaints:
        print(complaints, file=sys.stderr, flush=True)
    if done.returncode != 0:
        telling = r"error|fatal|multiple definition|undefined reference"
        errors = [line.strip() for line in complaints.splitlines() if re.search(telling, line)]
        say("failed: " + shlex.join(command))
        raise Unavailable(f"{what} failed: {errors[0] if errors else f'exit status {done.returncode}'}")


def is_current(product: Path, dependency_file: Path) -> bool:
    """Whether the object file is newer than its source and every header that the compiler listed for it."""
    if not (product.exists() and dependency_file.exists()):
        return False
    listed = shlex.split(dependency_file.read_text(encoding="utf-8").replace("\\\n", " ").split(":", 1)[1])
    built = product.stat().st_mtime_ns
    try:
        return all((ROOT / name).stat().st_mtime_ns <= built for name in listed)
    except FileNotFoundError:  # a header was removed or renamed
        return False


def compile_object(tools: Toolchain, source: str, product: Path, options: list[str]) -> None:
    """Compile one source. Everything is written aside and renamed, because builds may overlap."""
    kept = [product, product.with_suffix(".d"), product.with_suffix(tools.report or ".txt")]
    aside = [path.with_name(f"{path.name}.{os.getpid()}") for path in kept]
    dependencies = ["-MMD", "-MT", "object", "-MF", str(aside[1])]
    if Path(source).name.startswith(EXACT_SOURCES):
        options = [*options, *tools.exact]
    command = [*tools.compile, *options, *dependencies, "-c", source, "-o", str(aside[0])]
    try:
        run_compiler(command, f"compiling {source}", aside[2] if tools.report else None)
        for path, new in reversed(list(zip(kept, aside))):  # the object last: its date stands for all
            if new.exists():
                new.replace(path)
    finally:
        for new in aside:
            new.unlink(missing_ok=True)


def build_library(library: Library, cache: Path) -> tuple[Path, dict]:
    """Compile and link what has changed since the last build; returns the library and a description of the build."""
    if sys.platform == "win32":
        raise Unavailable(f"the {library.title} is built on Linux and macOS only")
    sources = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob(library.sources))
    if not sources:
        raise Unavailable(f"the sources {library.sources} are missing")
    torch, torch_version = find_torch()
    tools = library.toolchain(torch, torch_version)
    nvcc_flags = [os.environ.get(f"NVCC_{place}_FLAGS", "") for place in ("PREPEND", "APPEND")]
    key = json.dumps(
        [tools.version, tools.compile, tools.exact, tools.link, tools.link_with, torch_version, nvcc_flags]
    )
    # Another compiler, torch or flag: another folder.
    folder = cache / f"{library.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = {source: folder / f"{Path(source).stem}.o" for source in sources}
    changed = [source for source, path in objects.items() if not is_current(path, path.with_suffix(".d"))]
    cores = max(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1), 1)
    jobs = max(min(len(changed), cores), 1)
    options = [f"{tools.threads}={-(-cores // jobs)}"] if tools.threads else []
    say(f"{library.title}: {tools.version}, torch {torch_version}, {len(sources)} sources, {jobs} at a time")
    if tools.threads and changed:
        say(
            f"compiling {len(changed)} of them takes minutes"
            " (TORCH_CUDA_ARCH_LIST=9.0: one architecture; IOUBAL_BUILD_CUDA=0: none)"
        )
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda source: compile_object(tools, source, objects[source], options), changed))
    product, record = folder / library.file, folder / "objects.txt"
    names = "\n".join(path.name for path in objects.values())  # a removed source must leave the library too
    stale = not product.exists() or not record.exists() or record.read_text(encoding="utf-8") != names
    if stale or any(path.stat().st_mtime_ns > product.stat().st_mtime_ns for path in objects.values()):
        new = product.with_name(f"{product.name}.{os.getpid()}")
        linked = [*tools.link, *map(str, objects.values()), "-o", str(new), *tools.link_with]
        run_compiler(linked, f"linking the {library.title}")
        new.replace(product)
        record.write_text(names, encoding="utf-8")
        say(f"{library.title}: {len(changed)} of {len(sources)} sources compiled, linked")
    else:
        say(f"{library.title}: up to date")
    return product, {"torch": torch_version, "folder": folder.name, **tools.details}


class BuildLibraries(build_ext):
    """Builds them with our own compiler calls: setuptools would add the flags Python itself was built with."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        build_py = self.get_finalized_command("build_py")
        folder = Path(build_py.get_package_dir(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE))
        folder.mkdir(parents=True, exist_ok=True)
        info = {library.name: install(library, folder) for library in LIBRARIES}
        (folder / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        built = [library.file for library in LIBRARIES if info[library.name]["built"]]
        self.extensions = [each for each in self.extensions if Path(self.get_ext_filename(each.name)).name in built]
        self.distribution.ext_modules = self.extensions or None  # none: the wheel is tagged as pure Python

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), os.path.join(self.build_lib, PACKAGE, INFO)]


def install(library: Library, folder: Path) -> dict[str, object]:
    """Build it as the environment asks, put it into `folder` or remove it there; returns the build information."""
    option = f"IOUBAL_BUILD_{library.name.upper()}"
    mode = os.environ.get(option) or "auto"
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"ioubal: {option}: expected auto, 0 or 1, got {mode!r}")
    try:
        if mode == "0":
            raise Unavailable(f"{option}=0 was set")
        product, details = build_library(library, ROOT / "build")
    except Unavailable as error:
        if mode == "1":
            raise SystemExit(
                f"ioubal: the {library.title} cannot be built: {error} ({option}=1 makes this an error)"
            ) from None
        say(f"NOTE: no {library.title}: {error}; {library.without}")
        (folder / library.file).unlink(missing_ok=True)  # of an earlier build, of other sources
        return {"built": False, "reason": str(error)}
    copy_if_changed(product, folder / library.file)
    return {"built": True, "reason": None, **details}


def copy_if_changed(source: Path, target: Path) -> None:
    """Copy by renaming: a process that has the old library mapped keeps it intact."""
    old, new = (target.stat() if target.exists() else None), source.stat()
    if old is not None and (old.st_mtime_ns, old.st_size) == (new.st_mtime_ns, new.st_size):
        return
    aside = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy2(source, aside)
    aside.replace(target)


class Wheel(bdist_wheel):
    """py3-none-<platform> with the library, py3-none-any without.

    The library depends on the platform, never on the Python version.
    """

    def run(self) -> None:
        shutil.rmtree(
            self.get_finalized_command("build").build_lib, ignore_errors=True
        )  # a removed module must not come back
        self.run_command("build_ext")  # first: only afterwards is it known whether there is a library
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def packages() -> dict[str, str]:
    """Every package and its folder: ioubal_kernels as it lies, the folders of INSTALLED_AS below their package name."""
    found = {name: name.replace(".", "/") for name in find_packages(str(ROOT), include=[PACKAGE, f"{PACKAGE}.*"])}
    for name, folder in INSTALLED_AS.items():
        if (ROOT / folder / "__init__.py").exists():
            found[name] = folder
            found.update(
                {f"{name}.{sub}": f"{folder}/{sub.replace('.', '/')}" for sub in find_packages(str(ROOT / folder))}
            )
    return found


os.chdir(ROOT)  # package folders are given relative to it
setup(
    packages=list(packages()),
    package_dir=packages(),
    ext_modules=[Extension(f"{PACKAGE}.{Path(library.file).stem}", sources=[]) for library in LIBRARIES],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
