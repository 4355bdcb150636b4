"""The pieces of a GPU check: sections, their tally, and the run of them in a process that may die.

A kernel that reads out of bounds takes its CUDA context with it, and one that waits for ever takes its process. So the
sections run in a child; a section that kills it or does not end has failed, and a new child goes on with the next.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

KEPT_FAILURES = 20
PASSED, FAILED, NOT_RUN, PARTLY = "passed", "failed", "not run", "partly run"
LATE, CLOSED = "late", "closed"  # instead of a child's message
STARTING = 60.0  # seconds for a child to import torch and say its first word


class NotRun(Exception):
    """A section cannot run here; the message is the reason."""


class ContextDied(Exception):
    """The CUDA context is lost: nothing more can run in this process."""


@dataclass
class Plan:
    """What the sections are run with."""

    device: str  # "cuda", or "cpu" in a dry run
    backend: str
    small: bool  # a dry run: few and small cases
    deadline: float  # on time.monotonic(), of one clock for all processes of a machine

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def few(self, full: int, dry: int) -> int:
        return dry if self.small else full

    def only_cuda(self) -> None:
        if self.device != "cuda":
            raise NotRun("needs a GPU")


@dataclass
class Tally:
    """A section's count of checks. Every check that begins is counted, passed or not."""

    plan: Plan
    planned: int = 0
    done: int = 0
    failures: list[str] = field(default_factory=list)
    failed: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def check(self, name: str, call: Callable[[], Any]) -> Any:
        """Runs one check; whatever it raises is a failure, except what ends the section or the process."""
        self.done += 1
        try:
            return call()
        except (NotRun, KeyboardInterrupt):
            raise
        except Exception as error:
            self.failed += 1
            if len(self.failures) < KEPT_FAILURES:
                self.failures.append(f"{name}: {type(error).__name__}: {error}"[:600])
            if self.plan.device == "cuda" and not alive():
                raise ContextDied(self.failures[-1]) from error
        return None

    def each(self, cases: Iterable[tuple[str, Callable[[], Any]]]) -> None:
        """Checks until the time is up; what is left then is planned and not done."""
        cases = list(cases)
        self.planned += len(cases)
        for name, call in cases:
            if self.plan.left() < 0:
                return
            self.check(name, call)

    def result(self) -> dict[str, Any]:
        """The section's entry in the report: passed only if everything planned was done and nothing failed."""
        planned = max(self.planned, self.done)
        if self.failed:
            verdict = FAILED
        elif self.done == 0:
            verdict = NOT_RUN
        else:
            verdict = PASSED if self.done == planned else PARTLY
        entry = {"result": verdict, "checks": self.done, "planned": planned, "failed": self.failed}
        if verdict in (NOT_RUN, PARTLY):
            entry["reason"] = "out of time" if planned else "there was nothing to check"
        if self.failures:
            entry["failures"] = self.failures
        return {**entry, **self.facts}


def alive() -> bool:
    """Whether the CUDA context still works."""
    try:
        torch.cuda.synchronize()
        return float(torch.ones(4, device="cuda").sum()) == 4.0
    except RuntimeError:
        return False


def run_section(run: Callable[[Tally], None], plan: Plan) -> tuple[dict[str, Any], bool]:
    """One section's entry, and whether this process can go on."""
    tally, usable = Tally(plan), True
    began = time.monotonic()
    try:
        run(tally)
        if plan.device == "cuda":
            torch.cuda.synchronize()  # an error of the last kernel belongs here
        entry = tally.result()
    except NotRun as reason:
        entry = tally.result()
        if entry["result"] != FAILED:
            entry |= {"result": PARTLY if tally.done else NOT_RUN, "reason": str(reason)}
    except ContextDied as error:
        reason = f"the CUDA context was lost: {error}"[:600]
        entry, usable = {**tally.result(), "result": FAILED, "reason": reason}, False
    except Exception as error:
        usable = plan.device != "cuda" or alive()
        entry = {**tally.result(), "result": FAILED, "reason": f"{type(error).__name__}: {error}"[:600]}
    return {**entry, "seconds": round(time.monotonic() - began, 2)}, usable


@dataclass(frozen=True)
class Section:
    name: str
    run: Callable[[Tally], None]
    limit: float = 120.0  # seconds after which it hangs


def child(connection: Connection, sections: list[Section], plan: Plan) -> None:
    """Runs sections in turn and sends (name, None) before and (name, entry) after each."""
    for section in sections:
        connection.send((section.name, None))
        if plan.left() < 2.0:
            connection.send((section.name, {"result": NOT_RUN, "reason": "out of time", "seconds": 0.0}))
            continue
        # Between two checks a section ends by itself, before it counts as hanging.
        soon = min(plan.deadline, time.monotonic() + 0.8 * section.limit)
        entry, usable = run_section(section.run, replace(plan, deadline=soon))
        connection.send((section.name, entry))
        if not usable:
            break
    connection.close()


def shared_out(sections: list[Section], jobs: int) -> list[list[Section]]:
    """The sections in at most `jobs` lists that take about as long as each other, each list in their order."""
    lists: list[list[Section]] = [[] for _ in range(max(min(jobs, len(sections)), 1))]
    for section in sorted(sections, key=lambda each: -each.limit):
        min(lists, key=lambda each: sum(s.limit for s in each)).append(section)
    return [sorted(each, key=sections.index) for each in lists]


def run_all(
    sections: list[Section],
    plan: Plan,
    on_entry: Callable[[str, dict[str, Any]], None],
    grace: float = 15.0,
    jobs: int = 1,
) -> None:
    """Runs every section in child processes, `jobs` side by side; on_entry hears of each as it ends, one at a time.

    A child that dies or exceeds a section's limit (or the deadline by `grace` seconds) fails that section.
    """
    one_at_a_time = threading.Lock()

    def tell(name: str, entry: dict[str, Any]) -> None:
        with one_at_a_time:
            on_entry(name, entry)

    lists = shared_out(sections, jobs)
    if len(lists) == 1:
        return run_in_turn(lists[0], plan, tell, grace)
    with ThreadPoolExecutor(len(lists)) as pool:
        try:
            list(pool.map(lambda each: run_in_turn(each, plan, tell, grace), lists))
        except BaseException:
            plan.deadline = 0.0  # for the other threads: nothing new is begun
            raise


def run_in_turn(left: list[Section], plan: Plan, on_entry: Callable[[str, dict[str, Any]], None], grace: float) -> None:
    """One list of sections, in one child as long as it lives."""
    while left:
        if plan.left() < 2.0:
            for section in left:
                on_entry(section.name, {"result": NOT_RUN, "reason": "out of time", "seconds": 0.0})
            return
        run_child(left, plan, on_entry, grace)


def run_child(left: list[Section], plan: Plan, on_entry: Callable[[str, dict[str, Any]], None], grace: float) -> None:
    """One child's life. Removes from `left` what it did and, if it did not end well, the section it ended in."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(theirs, list(left), plan))
    process.start()
    theirs.close()
    began, heard, running, message = time.monotonic(), False, False, None
    try:
        while left:
            limit = left[0].limit if running else STARTING
            message = receive(ours, min(limit, max(plan.left(), 0.0) + grace))
            if message in (LATE, CLOSED):
                break
            heard, (name, entry) = True, message
            running, began = entry is None, time.monotonic()
            if entry is not None:
                on_entry(name, entry)
                left.pop(0)
        if message == LATE:
            on_entry(left.pop(0).name, failed_by("did not end in its time: stopped", began))
        elif message == CLOSED and (running or not heard):
            process.join(STARTING)
            on_entry(left.pop(0).name, failed_by(f"its process died (exit code {process.exitcode})", began))
        process.join(0.0 if message == LATE else 10.0)
    finally:
        process.kill()
        process.join()
        ours.close()


def failed_by(reason: str, began: float) -> dict[str, Any]:
    return {"result": FAILED, "reason": reason, "seconds": round(time.monotonic() - began, 2)}


def receive(connection: Connection, seconds: float) -> Any:
    """The next message; LATE when the time is over, CLOSED when the other end is gone."""
    try:
        return connection.recv() if connection.poll(seconds) else LATE
    except (EOFError, OSError):
        return CLOSED
