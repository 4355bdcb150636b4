"""Rows as text: what a run prints at its end."""

from __future__ import annotations

from .measure import MEASURED
from .timing import Row
from .work import COPY


def milliseconds(value: float) -> str:
    return f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms" if value >= 1 else f"{value * 1e3:.1f} us"


def name_of(row: Row) -> str:
    """Path, phase, backend and threads of a row."""
    name = row.get("path", row["name"])
    if row.get("phase") and row["path"] != COPY:
        name += f", {row['phase']}"
    if row.get("backend") not in (None, "reference"):
        name += f" [{row['backend']}]"
    return name + (f", {row['threads']} threads" if row.get("threads", 1) > 1 else "")


def line_of(row: Row) -> str:
    if row["result"] != MEASURED:
        reason = f": {row['reason'][:120]}" if "reason" in row else ""
        return f"  {name_of(row):58.58s} {row['result']}{reason}"
    per = next((f"{v:9.3f} ns/{k[7:]}" for k, v in row.items() if k.startswith("ns_per_")), "")
    extra = f"  {row['extra_memory_x_logits']:6.2f}x memory" if "extra_memory_x_logits" in row else ""
    return f"  {name_of(row):58.58s} {milliseconds(row['median_ms']):>10s} {row['x_copy']:8.2f} x copy {per}{extra}"


def summary(rows: list[Row]) -> list[str]:
    """A block a case, in the order of the rows."""
    lines: list[str] = []
    for name in dict.fromkeys(row["name"] for row in rows):
        lines += [name, *(line_of(row) for row in rows if row["name"] == name)]
    return lines
