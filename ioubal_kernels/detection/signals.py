"""SIGINT, SIGTERM and SIGHUP: the first asks the run to save and stop, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

SAVED_OR_LOST = (  # a training run's lines for StopSignal
    "stopping after this step, the run will be saved (a second signal stops at once and saves nothing)",
    "stopped at once: steps since the last checkpoint are lost",
)


class StopSignal:
    """`with StopSignal() as stop:` collects signals; `stop.number` is the first one's, or None.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Args:
        first, second: lines for stderr, written at once when the first and the second signal arrive.
    """

    def __init__(self, first: str = "", second: str = "") -> None:
        self.number: int | None = None
        self._lines = first, second
        self._previous: dict[int, object] = {}
        self._pid = os.getpid()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            # A forked loader process. A terminal's Ctrl-C reaches it as well, but the parent still needs its batches
            # and ends it itself.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        line = self._lines[self.number is not None]
        if line:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{line}\n".encode())  # print may have been interrupted half-way
        if self.number is not None:
            os._exit(128 + number)
        self.number = number

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
