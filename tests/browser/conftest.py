"""A browser for all tests of the page, and a page for each of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from browser.found import chromium, missing, required
from browser.helpers import LIMITS, Visit
from serve.helpers import StubDrawer, running, student, teacher
from trigflow.serve.app import create_app
from trigflow.serve.offers import Offer, offer_of


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window. The sandbox needs a user that is not root.

    For no longer than a module: while Playwright is there the thread has a running event loop, and other tests start theirs.
    """
    if reason := missing():
        if required():
            pytest.exit(f"the page cannot be tested: {reason}", 1)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=options)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Visit]]:
    """`visit(port, fragment, **options)` opens the page; options are those of Playwright's `new_context`.

    Motion is reduced unless a test wants it, so that nothing moves by itself. At the end there must have been no error in
    the console and no request to anywhere else.
    """
    with contextlib.ExitStack() as stack:

        def open_(port: int, fragment: str = "", **options: Any) -> Visit:
            options = {"viewport": {"width": 1000, "height": 700}, "reduced_motion": "reduce", **options}
            context = browser.new_context(**options)
            visit = Visit(context.new_page(), port)
            stack.callback(context.close)
            stack.callback(visit.check)
            visit.open(fragment)
            return visit

        yield open_


@pytest.fixture(scope="module")
def port(browser: Any) -> Iterator[int]:
    """A server of a student and its teacher, with random weights; none where there is no browser for it."""
    app = create_app([offer_of(student(), LIMITS), offer_of(teacher(), LIMITS)], LIMITS)
    with running(app) as port:
        yield port


@pytest.fixture
def drawer() -> Iterator[StubDrawer]:
    """Draws noise, and waits where a test tells it to."""
    drawer = StubDrawer()
    yield drawer
    drawer.release()


@pytest.fixture
def app(drawer: StubDrawer) -> FastAPI:
    """A student whose drawer obeys the test."""
    return create_app([offer_of(student(), LIMITS, drawer)], LIMITS)


@pytest.fixture
def race_app(drawer: StubDrawer) -> FastAPI:
    """A student, and a teacher whose drawer obeys the test."""
    offers: list[Offer] = [offer_of(student(), LIMITS, StubDrawer()), offer_of(teacher(), LIMITS, drawer)]
    return create_app(offers, LIMITS)
