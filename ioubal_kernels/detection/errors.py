"""The trainer's errors: one clear message each, and the exit code the command line gives for it."""

from __future__ import annotations


class TrainerError(Exception):
    """Base of the errors a user is expected to read; the command line prints the message without a traceback."""

    exit_code = 1


class UsageError(TrainerError, ValueError):
    """A wrong option, configuration or input file: exit code 2."""

    exit_code = 2


class OutputError(TrainerError, OSError):
    """Something could not be written or read back: exit code 3."""

    exit_code = 3


class NonFiniteError(TrainerError):
    """The loss or its gradient became NaN or infinite: exit code 1."""


class Interrupted(TrainerError):
    """SIGINT, SIGTERM or SIGHUP arrived and the run was saved: exit code 130, 143 or 129."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
