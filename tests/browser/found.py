"""Whether there is a browser to drive, and where."""

from __future__ import annotations

import importlib.util
import os
import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")
VARIABLE = "TRIGFLOW_BROWSER"
"""`required` in the environment: tests of the page fail where they would otherwise be left out."""


def chromium() -> str | None:
    """Path of the browser that is installed on this machine; Playwright's own download is not used."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def missing() -> str | None:
    """What is missing, or None."""
    if importlib.util.find_spec("playwright") is None:
        return "no playwright"
    if chromium() is None:
        return "no chromium"
    return None


def required() -> bool:
    """Whether to fail for what is missing."""
    return os.environ.get(VARIABLE) == "required"
