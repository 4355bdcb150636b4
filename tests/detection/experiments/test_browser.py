"""The page in a real browser without a screen: every image loads, nothing is asked of the network, no errors.

Needs Chromium (Debian: apt install chromium; IOUBAL_BROWSER names another program of that kind). CI sets
IOUBAL_BROWSER_REQUIRED: there a missing browser is a failure.
"""

from __future__ import annotations

import pytest
from chromium import OPTIONS, browser_program

from ioubal_kernels.experiments.page import write_page
from ioubal_kernels.experiments.study import study_of_plan


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(width, reproduction, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    program = browser_program()
    study = study_of_plan(reproduction.plan, reproduction.folder)
    page_file = write_page(study, tmp_path / "report.html")
    problems: list[str] = []
    requested: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=OPTIONS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: problems.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("requestfailed", lambda request: problems.append(f"failed: {request.url[:100]}"))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(page_file.as_uri())
        page.wait_for_load_state("load")
        images = page.evaluate("[...document.images].map(i => [i.alt, i.complete, i.naturalWidth, i.clientWidth])")
        for summary in page.locator("summary").all():
            summary.click()
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        links = page.evaluate("[...document.querySelectorAll('nav a')].every(a => document.querySelector(a.hash))")
        browser.close()
    assert len(images) >= 10
    broken = [
        alt for alt, complete, natural, shown in images if not (complete and natural > 100 and 0 < shown <= width)
    ]
    assert not broken
    assert not problems
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    assert overflow <= 0  # wide tables scroll inside themselves
    assert links
