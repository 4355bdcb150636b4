"""Says which packages an existing environment lacks for a Makefile target: `python tools/check_env.py [EXTRA ...]`.

Reads the requirements from pyproject.toml, so there is no second list. When something is missing: exit status 1 and one
pip line.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def requirements(extras: list[str]) -> list[str]:
    """Requirements of the build, the package and its `extras`.

    Python has a TOML parser from 3.11 on only; these plain lists need none.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = []
    for name in ("requires", "dependencies", *extras):
        listed = re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
        if listed is None:
            raise SystemExit(f"check_env: pyproject.toml has no list named {name!r}")
        found += re.findall(r'"([^"]+)"', listed[1])
    return found


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: '2.11.0+cu130' is (2, 11, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].strip(".").split("."))


def problem(requirement: str) -> str | None:
    """What is wrong with the installed version, or None. Knows >= and ==, the only two that pyproject.toml uses."""
    name, relation, wanted = re.match(r"([\w-]+)(?:(>=|==)(.+))?$", requirement).groups()
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    if relation is None:
        return None
    have, want = release(version), release(wanted)
    return None if (have >= want if relation == ">=" else have == want) else f"found {version}"


def main(extras: list[str]) -> int:
    missing = {requirement: text for requirement in requirements(extras) if (text := problem(requirement))}
    if not missing:
        return 0
    print(f"{sys.executable} lacks {len(missing)} of the packages that are needed here:", file=sys.stderr)
    for requirement, text in missing.items():
        print(f"  {requirement:24} {text}", file=sys.stderr)
    wanted = " ".join(f"'{requirement}'" for requirement in missing)
    print(f"Install them with: '{sys.executable}' -m pip install -c constraints.txt {wanted}", file=sys.stderr)
    print("or run make without PYTHON= to have everything set up in .venv.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
