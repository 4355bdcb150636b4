"""`ioubal bench`: list, run, compare, report, train-step."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "list": "the cases that `run` measures",
    "run": "measure, and append the rows to bench/results/<device>.jsonl",
    "compare": "what changed between two commits or runs",
    "report": "the tables and pictures of the READMEs, from the stored rows",
    "train-step": "a whole training step, split into its parts",
}


def list_cases(arguments: Sequence[str]) -> int:
    """Prints a line a case, in the order of `run`."""
    from .cases import all_cases

    made = argparse.ArgumentParser(prog="ioubal bench list", description="The cases that `ioubal bench run` measures.")
    made.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="they come in another order (default cpu)"
    )
    made.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name contains one of these")
    options = made.parse_args(arguments)
    for case in all_cases(options.device):
        if not options.only or any(text in case.name for text in options.only):
            print(f"{case.name:42s} {case.what}")
    return 0


def usage() -> str:
    lines = [f"  {name:12s} {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: ioubal bench COMMAND [OPTIONS]", "", *lines, "", "`ioubal bench COMMAND --help` for more"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else ""
    if command in ("", "-h", "--help"):
        print(usage(), file=sys.stdout if command else sys.stderr)
        return 0 if command else 2
    if command not in COMMANDS:
        print(f"ioubal bench: no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    if command == "list":
        return list_cases(arguments[1:])
    module = importlib.import_module(f".{command.replace('-', '_')}", __package__)
    try:
        return int(module.main(arguments[1:]))
    except SystemExit as stop:  # of argparse
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print(f"ioubal bench {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise  # the program's
    except OSError as error:
        print(f"ioubal bench {command}: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
