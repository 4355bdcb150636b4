"""The built site: no warning, no broken link, nothing fetched from elsewhere, every public name in the reference.

Needs the extra `docs` (`make test` installs it); without mkdocs these tests are skipped.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from chromium import OPTIONS, browser_program
from doc_pages import DOCS, ROOT

import ioubal_kernels as ik

for module in ("mkdocs", "material", "mkdocstrings"):
    pytest.importorskip(module, reason="needs the extra docs: pip install -c constraints.txt '.[docs]'")

FETCHED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "video": "src"}


class Page(HTMLParser):
    """What a page names: `links` (of <a>), `fetched` (what a browser loads by itself), `ids`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if values.get("id"):
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag in FETCHED and values.get(FETCHED[tag]):
            self.fetched.append(values[FETCHED[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it, into a folder of its own, behind proxies that refuse."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder],
        cwd=ROOT, env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert "WARNING" not in done.stderr and "ERROR" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_built(site: Path) -> None:
    missing = [page.name for page in DOCS.glob("*.md") if not (site / page.with_suffix(".html").name).is_file()]
    assert missing == []


def test_every_link_and_picture_is_there(site: Path, pages: dict[Path, Page]) -> None:
    seen, broken = 0, []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin at the server's root
            continue
        for target in (*page.links, *page.fetched):
            address, anchor = urldefrag(target)
            if re.match(r"[a-z]+:", address) or target == ".":
                continue
            seen += 1
            file = path if not address else (path.parent / unquote(address.split("?")[0])).resolve()
            if not file.is_file() or site not in file.parents:
                broken.append(f"{path.name}: {target}")
            # The ids of a report's page are made by its own script.
            elif anchor and file in pages and file.name != "report.html" and unquote(anchor) not in pages[file].ids:
                broken.append(f"{path.name}: {target} (no such place)")
    assert seen > 200
    assert broken == []


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    outside = [f"{path.name}: {t}" for path, page in pages.items() for t in page.fetched if re.match(r"(\w+:)?//", t)]
    assert outside == []
    styles = list(site.rglob("*.css"))
    assert styles
    for path in styles:
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", path.read_text(encoding="utf-8")), path.name


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html)).strip()


@pytest.mark.parametrize("name", ik.__all__)
def test_every_public_name_is_in_the_reference(site: Path, name: str) -> None:
    """With its docstring: a heading of its own, and text below it that is more than the signature."""
    html = (site / "api.html").read_text(encoding="utf-8")
    entries = re.split(r'(?=<h[2-4] id="ioubal_kernels\.)', html)
    (entry,) = [part for part in entries if re.match(rf'<h[2-4] id="ioubal_kernels\.{re.escape(name)}"', part)]
    (contents,) = re.findall(r'<div class="doc doc-contents[^"]*">(.*?)(?:<h[2-4]|\Z)', entry, re.DOTALL)[:1]
    docstring = text_of(re.sub(r'<div class="[^"]*doc-signature.*?</div>', "", contents, count=1, flags=re.DOTALL))
    assert len(docstring) > 30, docstring


def test_arguments_are_listed(site: Path) -> None:
    """The sections of the docstrings are understood, not run together as prose."""
    html = (site / "api.html").read_text(encoding="utf-8")
    entry = html.split('id="ioubal_kernels.iou_balanced_detection_loss"')[1].split("<h3 ")[0]
    for section in ("Parameters:", "Returns:", "Raises:"):
        assert section in entry
    for argument in ("cls_logits", "normalizer_scope", "grad_scale"):
        assert re.search(rf"<li [^>]*>\s*<b><code>[^<]*\b{argument}\b", entry), argument


def test_the_pages_show_the_stored_results() -> None:
    """`python tools/docs_figures.py` would change nothing."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "docs_figures.py", "--check"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"run python tools/docs_figures.py: {done.stdout}{done.stderr}"


def test_figure_2_is_the_drawn_one() -> None:
    """The stored picture has the curves that the package draws now; its letters depend on matplotlib's version."""
    pytest.importorskip("matplotlib")
    from ioubal_kernels.experiments.figures import plot_gradient_norms

    def curves(svg: str) -> list[str]:
        return re.findall(r'<path d="([^"]+)" clip-path', svg)

    stored, drawn = (DOCS / "figure_2.svg").read_text(encoding="utf-8"), plot_gradient_norms(None).svg
    assert len(curves(stored)) >= 10
    assert curves(stored) == curves(drawn)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_site_in_a_browser(site: Path, width: int) -> None:
    """Nothing is asked of another server, nothing fails, no page is wider than the window, and the search finds."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = browser_program()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_address[1]}/"
    problems: list[str] = []
    requested: list[str] = []
    overflow: dict[str, int] = {}
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=program, args=OPTIONS)
            page = browser.new_page(viewport={"width": width, "height": 900})
            page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("request", lambda request: requested.append(request.url))
            for source in sorted(DOCS.glob("*.md")):
                page.goto(home + source.with_suffix(".html").name)
                overflow[source.stem] = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            page.goto(home + "index.html?q=match_fovea")
            page.locator(".md-search-result__link").first.wait_for(state="attached", timeout=20_000)
            browser.close()
    finally:
        server.shutdown()
        server.server_close()
    assert problems == []
    assert [url for url in requested if not url.startswith((home, "data:", "blob:"))] == []
    assert {name: pixels for name, pixels in overflow.items() if pixels > 0} == {}
