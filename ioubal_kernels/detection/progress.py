"""What a run shows: rich progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

PLAIN_INTERVAL = 10.0  # seconds between the lines of a task without a terminal


class Task:
    """Progress of one piece of work; `advance_to(done, note)` shows it."""

    def __init__(self, reporter: Reporter, name: str, total: int, start: int) -> None:
        self.reporter, self.name, self.total, self.start = reporter, name, total, start
        self._began = self._shown = time.monotonic()
        self._last = start  # progress of the last line

    def advance_to(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        ended = done >= self.total and self._last < self.total
        if not ended and now - self._shown < PLAIN_INTERVAL:
            return
        self._shown, self._last = now, done
        rate = (done - self.start) / max(now - self._began, 1e-9)
        left = f", {(self.total - done) / rate:.0f} s left" if rate > 0 and done < self.total else ""
        self.reporter.info(f"{self.name} {done}/{self.total}{left}{'  ' + note if note else ''}")


class _RichTask(Task):
    def __init__(self, reporter: Reporter, name: str, total: int, start: int, progress) -> None:
        super().__init__(reporter, name, total, start)
        self._progress = progress
        self._id = progress.add_task(name, total=total, completed=start, note="")

    def advance_to(self, done: int, note: str = "") -> None:
        self._progress.update(self._id, completed=done, note=note)


class Reporter:
    """Where a run's messages go. `quiet` drops everything but warnings, which then go to stderr: stdout is for JSON."""

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console

        self.quiet = quiet
        # A log that is no terminal gets whole lines, however long.
        width = None if sys.stdout.isatty() else 160
        self.console = Console(width=width, highlight=False, soft_wrap=not sys.stdout.isatty())
        self._progress = None

    def info(self, text: str) -> None:
        if not self.quiet:
            self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", style="yellow")

    def show(self, renderable: object) -> None:
        """A table or other rich object."""
        if not self.quiet:
            self._guard(lambda: self.console.print(renderable))

    def _print(self, text: str, style: str | None = None) -> None:
        console = self.console
        if self.quiet:
            from rich.console import Console

            console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._guard(lambda: console.print(text, style=style, markup=False))

    def _guard(self, write) -> None:
        """A closed pipe (rich exits at one) or a full log disk must not end a training: its files are elsewhere."""
        try:
            write()
        except (OSError, ValueError, SystemExit):
            self.quiet = True

    @contextmanager
    def task(self, name: str, total: int, start: int = 0) -> Iterator[Task]:
        """A progress bar while the block runs; a second one inside it is shown below."""
        if self.quiet or not self.console.is_terminal:
            yield Task(self, name, total, start) if not self.quiet else _SilentTask(self, name, total, start)
            return
        if self._progress is not None:
            task = _RichTask(self, name, total, start, self._progress)
            try:
                yield task
            finally:
                self._progress.remove_task(task._id)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        note = TextColumn("{task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        with Progress(*columns, console=self.console) as progress:
            self._progress = progress
            try:
                yield _RichTask(self, name, total, start, progress)
            finally:
                self._progress = None


class _SilentTask(Task):
    def advance_to(self, done: int, note: str = "") -> None:
        pass
