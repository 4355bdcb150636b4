"""Build of the package: which folder is installed under which name, and the CPU library.

The CPU library is one plain shared library on torch's stable ABI, loaded with torch.ops.load_library. It contains no
Python, so one file serves every Python >= 3.10 and every torch >= 2.11, and the wheel is tagged py3-none-<platform>.
Without torch (an isolated build environment) or without a compiler the install succeeds as pure Python, and
`ioubal_kernels/_build_info.json` keeps the reason.

Choices, all read from the environment and printed:
  IOUBAL_BUILD_CPU=auto|0|1   auto (default): build if possible; 0: do not; 1: not being able to is an error
  CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, MAX_JOBS
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "ioubal_kernels"
INSTALLED_AS = {f"{PACKAGE}.bench": "bench"}  # package name -> top-level folder; a folder that is not there is left out
LIBRARY = f"{PACKAGE}._ioubal_cpu"
INFO = "_build_info.json"
MIN_TORCH = (2, 11)
# No instruction-set flag on any platform: the source picks the instruction set when it runs.
COMPILE = ["-O3", "-std=c++17", "-fPIC", "-fno-math-errno", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Icsrc"]
LINK = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]


class Unavailable(Exception):
    """The CPU library cannot be built; the message is the reason shown to the user."""


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


def find_compiler() -> tuple[list[str], str]:
    """Command of the C++ compiler ($CXX, else the first of c++, g++, clang++) and the first line of its --version."""
    chosen = shlex.split(os.environ.get("CXX", ""))
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


def run_compiler(command: list[str], what: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.stderr.strip():
        print(done.stderr.rstrip(), file=sys.stderr, flush=True)
    if done.returncode != 0:
        errors = [line.strip() for line in done.stderr.splitlines() if "error" in line]
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


def compile_object(compiler: list[str], flags: list[str], source: str, folder: Path) -> bool:
    """Compile one source into `folder` unless it is current; True if the compiler ran.

    Written aside and renamed, because builds may overlap.
    """
    stem = Path(source).stem
    product, dependencies = folder / f"{stem}.o", folder / f"{stem}.d"
    if is_current(product, dependencies):
        return False
    new_product, new_dependencies = (path.with_name(f"{path.name}.{os.getpid()}") for path in (product, dependencies))
    run_compiler(
        [
            *compiler,
            *flags,
            "-MMD",
            "-MT",
            "object",
            "-MF",
            str(new_dependencies),
            "-c",
            source,
            "-o",
            str(new_product),
        ],
        f"compiling {source}",
    )
    new_dependencies.replace(dependencies)
    new_product.replace(product)
    return True


def build_library(sources: list[str], cache: Path) -> tuple[Path, dict]:
    """Compile and link what has changed since the last build; returns the library and a description of the build."""
    if sys.platform == "win32":
        raise Unavailable("the CPU library is built on Linux and macOS only")
    if not sources:
        raise Unavailable("the sources csrc/cpu/*.cpp are missing")
    torch, torch_version = find_torch()
    compiler, compiler_version = find_compiler()
    user = {name: shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CXXFLAGS", "LDFLAGS")}
    flags = [*COMPILE, "-isystem", str(torch / "include"), *user["CPPFLAGS"], *user["CXXFLAGS"]]
    link = [*LINK, f"-L{torch / 'lib'}", *user["LDFLAGS"], "-ltorch", "-ltorch_cpu", "-lc10"]
    key = json.dumps([compiler, compiler_version, flags, link, torch_version])
    folder = (
        cache / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    )  # another compiler, torch or flag: another folder
    folder.mkdir(parents=True, exist_ok=True)
    jobs = min(len(sources), int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    say(f"CPU library: {compiler_version}, torch {torch_version}, {len(sources)} sources, {jobs} at a time")
    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        compiled = sum(pool.map(lambda source: compile_object(compiler, flags, source, folder), sources))
    objects = [folder / f"{Path(source).stem}.o" for source in sources]
    library, record = folder / "_ioubal_cpu.so", folder / "objects.txt"
    names = "\n".join(path.name for path in objects)  # a removed source must leave the library too
    stale = not library.exists() or not record.exists() or record.read_text(encoding="utf-8") != names
    if stale or any(path.stat().st_mtime_ns > library.stat().st_mtime_ns for path in objects):
        new = library.with_name(f"{library.name}.{os.getpid()}")
        run_compiler([*compiler, *map(str, objects), "-o", str(new), *link], "linking the CPU library")
        new.replace(library)
        record.write_text(names, encoding="utf-8")
        say(f"CPU library: {compiled} of {len(sources)} sources compiled, linked")
    else:
        say("CPU library: up to date")
    return library, {"compiler": compiler_version, "torch": torch_version, "flags": COMPILE[:-1]}


class BuildCpuLibrary(build_ext):
    """Builds the library with our own compiler calls: setuptools would add the flags Python itself was built with."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        mode = os.environ.get("IOUBAL_BUILD_CPU") or "auto"
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"ioubal: IOUBAL_BUILD_CPU: expected auto, 0 or 1, got {mode!r}")
        reason, details = None, {}
        try:
            if mode == "0":
                raise Unavailable("IOUBAL_BUILD_CPU=0 was set")
            library, details = build_library(self.extensions[0].sources, ROOT / "build")
        except Unavailable as error:
            reason = str(error)
            if mode == "1":
                raise SystemExit(
                    f"ioubal: the CPU library cannot be built: {reason} (IOUBAL_BUILD_CPU=1 makes this an error)"
                ) from None
            say(f"NOTE: no CPU library: {reason}. Installing pure Python: correct, but slower.")
        package = (
            self.get_finalized_command("build_py").get_package_dir(PACKAGE)
            if self.inplace
            else Path(self.build_lib, PACKAGE)
        )
        folder = Path(package)
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / "_ioubal_cpu.so"
        if reason is None:
            copy_if_changed(library, target)
        else:
            target.unlink(missing_ok=True)  # of an earlier build, of other sources
            self.extensions = []
            self.distribution.ext_modules = None  # so that the wheel is tagged as pure Python
        info = {"cpu": {"built": reason is None, "reason": reason, **details}}
        (folder / INFO).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), os.path.join(self.build_lib, PACKAGE, INFO)]


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


os.chdir(ROOT)  # sources and package folders are given relative to it
setup(
    packages=list(packages()),
    package_dir=packages(),
    ext_modules=[
        Extension(
            LIBRARY,
            sources=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
        )
    ],
    cmdclass={"build_ext": BuildCpuLibrary, "bdist_wheel": Wheel},
)
