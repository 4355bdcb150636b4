"""A browser without a screen, for the tests that look at pages: Chromium, Debian's or another."""

from __future__ import annotations

import os
import shutil

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def browser_program() -> str:
    named = os.environ.get("IOUBAL_BROWSER")
    found = named or next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if found is None:
        message = "no Chromium (Debian: apt install chromium; or IOUBAL_BROWSER=/path/to/it)"
        if os.environ.get("IOUBAL_BROWSER_REQUIRED", "0") not in ("", "0"):
            pytest.fail(message)
        pytest.skip(message)
    return found
