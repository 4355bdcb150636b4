"""The `ioubal` program: its options, one clear error out. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from .._version import __version__
from ..detection.errors import TrainerError

CONTEXT = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="ioubal",
    help="Train and compare detectors with IoU-balanced losses.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT,
)
data_app = typer.Typer(help="Make and check datasets.", no_args_is_help=True, context_settings=CONTEXT)
app.add_typer(data_app, name="data")


def run(arguments: Sequence[str]) -> int:
    """Parse and run; returns the exit code."""
    try:
        app(list(arguments), prog_name="ioubal")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """Turn exceptions into one message on stderr and the exit code; IOUBAL_TRACEBACK=1 shows the traceback instead."""

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> None:
        warnings.showwarning = _show_warning
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, typer.BadParameter):
            raise
        except BrokenPipeError:
            # Whoever read the output has gone. Python would complain once more when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(3) from None
        except BaseException as error:
            if os.environ.get("IOUBAL_TRACEBACK", "0") not in ("", "0"):
                raise
            code, message = _explain(error)
            print(f"error: {message}", file=sys.stderr)
            raise typer.Exit(code) from None

    return wrapper


def _explain(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an exception."""
    if isinstance(error, KeyboardInterrupt):  # first: it may have stopped an import that the next line would repeat
        return 130, "interrupted"
    if isinstance(error, TrainerError):
        return error.exit_code, str(error)
    from ..detection.data import DataError

    if isinstance(error, DataError):
        return 2, str(error)
    if isinstance(error, OSError):
        return 3, f"{error.filename or 'input/output'}: {error.strerror or error}"
    hint = "(IOUBAL_TRACEBACK=1 shows where)"
    return 1, f"{type(error).__name__}: {error} {hint}"


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _version(value: bool) -> None:
    if value:
        print(f"ioubal {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("doctor")
@guarded
def doctor_command() -> None:
    """Show what this installation has and lacks."""
    from .. import doctor

    raise typer.Exit(doctor.main())


@app.command("bench", help="Measure the losses: list, run, compare, report, train-step.")
def bench_command() -> None:
    """In the list of commands only: the benchmark is a layer above this one, and the program calls it before."""


@app.command("configs")
@guarded
def configs_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this one as YAML.")] = None,
) -> None:
    """List the named configurations, or print one as YAML, with what its keys mean, to start a file from."""
    from ..detection.presets import PRESETS, preset

    if name is not None:
        print(preset(name).to_documented_yaml(), end="")
        return
    for key, (text, _) in PRESETS.items():
        print(f"{key:30} {text}")
