"""What mkdocs does for the documentation site beyond its settings (named in mkdocs.yml as a hook).

The pages of docs/ are read on the site and in the repository alike. There, links may lead out of docs/; the stored
results that they name become a part of the site, at the same place below it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
RESULTS = re.compile(r"\]\(\.\./(bench/results/[^)#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add every stored result that a page links to."""
    named = {
        name
        for page in files.documentation_pages()
        for name in RESULTS.findall(Path(page.abs_src_path).read_text(encoding="utf-8"))
    }
    for name in sorted(named):
        if (ROOT / name).is_file():  # a name that is not there stays a broken link, which the build reports
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Those links, as seen from the site's top folder, where all pages of docs/ lie."""
    return RESULTS.sub(r"](\1", markdown)
