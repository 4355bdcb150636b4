"""`ioubal report`: a page of runs that are finished, whoever trained them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..detection.errors import OutputError, UsageError
from ..detection.progress import Reporter
from .page import tables_of, write_page
from .results import RESULTS_FILE, load_results
from .study import study_of_runs
from .tables import to_rich


def report(
    folders: Sequence[Path], out: Path | None = None, *, title: str | None = None, reporter: Reporter | None = None
) -> Path:
    """Write the page and show its tables.

    Args:
        folders: of runs, or of one reproduction.
        out: the HTML file; None: report.html in the one folder.
        title: of the page.
        reporter: where tables go.

    Returns:
        The page's path.

    Raises:
        UsageError: a folder is no finished run; several folders without `out`, or one of them a reproduction.
        OutputError: the page cannot be written.
    """
    reporter = reporter or Reporter()
    reproductions = [folder for folder in folders if (folder / RESULTS_FILE).is_file()]
    if reproductions and len(folders) > 1:
        raise UsageError(f"report: {reproductions[0]} is a reproduction with a page of its own: expected it alone")
    if out is None and len(folders) != 1:
        raise UsageError("report: -o FILE.html: expected the page's name with several runs")
    out = out or folders[0] / "report.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"report: -o: expected the name of an HTML file, got {out}")
    missing = [folder for folder in folders if not folder.is_dir()]
    if missing:
        raise UsageError(f"report: {missing[0]}: expected the folder of a run or of a reproduction, found none")
    if not out.parent.is_dir():
        raise OutputError(f"cannot write {out}: the folder {out.parent} does not exist")
    if reproductions:
        study = load_results(folders[0])
        study.title = title or study.title
    else:
        names = ", ".join(folder.resolve().name for folder in folders[:4]) + (", ..." if len(folders) > 4 else "")
        study = study_of_runs(folders, title=title or f"Runs: {names}")
    for row in study.rows:
        if row.dataset_problem is not None:
            reporter.warn(f"no pictures and no figures of detections for {row.label}: {row.dataset_problem}")
    for table in tables_of(study):
        reporter.show(to_rich(table))
    return write_page(study, out)
