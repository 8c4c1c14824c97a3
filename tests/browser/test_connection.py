"""The page never lags, comes back when the connection is lost, and asks for a token where it needs one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from fastapi import FastAPI

from browser.helpers import LIMITS, Visit
from serve.helpers import StubDrawer, running, student, wait_for
from trigflow.serve.app import create_app
from trigflow.serve.limits import Limits
from trigflow.serve.offers import offer_of

Open = Callable[..., Visit]
TOKEN = "a-token.of_enough~letters"


def test_what_is_shown_when_the_hand_stops_is_where_it_stopped(visit: Open, app: FastAPI, drawer: StubDrawer) -> None:
    def frames() -> float:
        count = app.state.service.metrics.registry.get_sample_value("trigflow_frames_total", {"model": "student"})
        return count or 0.0

    with running(app) as port:
        seen = visit(port)
        seen.settle()
        before, drawn, asked = frames(), len(drawer.batches), len(seen.asked)
        drawer.hold()  # from here on every picture takes as long as the test likes
        seen.drag(150, 30, steps=25)
        stopped = seen.page.locator("#map").get_attribute("aria-label")
        seen.until(lambda: len(seen.asked) >= asked + 2, "several requests")
        seen.until(lambda: label(seen.last()["walk"]) == stopped, "a request for the last place")
        assert len(drawer.batches) == drawn + 1  # one was in the making all the time
        drawer.release()
        seen.settle()
        assert frames() == before + 2  # that one, and the one of the last place


def label(walk: list[float]) -> str:
    return f"Place on the walk: {walk[0]:.2f}, {walk[1]:.2f}"


def test_a_page_that_is_hidden_takes_nothing(visit: Open, app: FastAPI, drawer: StubDrawer) -> None:
    with running(app) as port:
        seen = visit(port)
        seen.settle()
        before = len(drawer.batches)
        seen.page.evaluate("window.requestAnimationFrame = () => 1")  # what a browser does to a hidden tab
        seen.slide("Steps", times=3)
        wait_for(lambda: len(drawer.batches) > before)
        seen.page.wait_for_timeout(100)
        assert len(drawer.batches) == before + 1  # the first of them is drawn and never taken


def test_a_lost_connection_recovers(visit: Open, app: FastAPI) -> None:
    with running(app) as port:
        seen = visit(port)
        seen.settle()
    notice = seen.page.locator("#notice")
    seen.until(lambda: "Trying again in" in notice.inner_text(), "word that it is lost")
    assert seen.page.get_by_role("button", name="Try now").is_visible()
    seen.ignored = ("ERR_CONNECTION_REFUSED", "WebSocket connection to", "ERR_CONNECTION_RESET")
    seen.drag(100, 0)
    again = create_app([offer_of(student(), LIMITS, StubDrawer())], LIMITS)
    with running(again, port):
        seen.until(lambda: not notice.is_visible(), "a new connection")
        seen.until(lambda: seen.last()["walk"][0] > 0.3, "where it was dragged to meanwhile")
        seen.settle()
        first = seen.canvas()
        seen.drag(60, 60)
        seen.until(lambda: seen.last()["walk"][1] > 0.1, "the walk goes on")
        seen.settle()
        assert not np.array_equal(seen.canvas(), first)


def test_a_server_that_comes_back_with_another_model_gets_a_new_page(visit: Open, app: FastAPI) -> None:
    with running(app) as port:
        seen = visit(port, "#seed=4")
        seen.settle()
    seen.ignored = ("ERR_CONNECTION_REFUSED", "WebSocket connection to", "ERR_CONNECTION_RESET")
    fewer = Limits(steps=4)
    with running(create_app([offer_of(student(), fewer, StubDrawer())], fewer), port):
        slider = seen.page.get_by_role("slider", name="Steps")
        seen.until(lambda: slider.get_attribute("max") == "3", "a slider of four steps")
        assert seen.settle()["seed"] == 4


def test_a_frame_that_fails_is_told_and_tried_again(visit: Open, app: FastAPI, drawer: StubDrawer) -> None:
    with running(app) as port:
        seen = visit(port)
        seen.settle()
        drawer.fail = True
        seen.slide("Steps")
        notice = seen.page.locator("#notice")
        seen.until(lambda: "the frame could not be drawn" in notice.inner_text(), "the server's reason")
        drawer.fail = False
        seen.until(lambda: not notice.is_visible(), "a new connection")
        assert seen.settle()["steps"] == 3


def test_an_idle_page_sleeps_and_wakes(visit: Open, drawer: StubDrawer) -> None:
    limits = Limits(stream_idle_seconds=2)
    with running(create_app([offer_of(student(), limits, drawer)], limits)) as port:
        seen = visit(port)
        seen.settle()
        notice = seen.page.locator("#notice")
        seen.until(lambda: "Asleep" in notice.inner_text(), "sleep")
        assert len(seen.sockets) == 1
        seen.drag(50, 0)
        seen.until(lambda: len(seen.sockets) > 1, "a new stream")
        seen.settle()


def test_no_stream_is_left(visit: Open, drawer: StubDrawer) -> None:
    limits = Limits(streams=1)
    with running(create_app([offer_of(student(), limits, drawer)], limits)) as port:
        first = visit(port)
        first.settle()
        second = visit(port)
        second.ignored = ("WebSocket connection to",)
        notice = second.page.locator("#notice")
        second.until(lambda: "takes no further stream" in notice.inner_text(), "the reason")
        first.page.close()
        second.until(lambda: not notice.is_visible(), "a free place")
        second.settle()


def test_token(visit: Open, drawer: StubDrawer) -> None:
    with running(create_app([offer_of(student(), LIMITS, drawer)], LIMITS, token=TOKEN)) as port:
        seen = visit(port)
        seen.token = TOKEN
        seen.ignored = ("401",)
        dialog = seen.page.get_by_role("dialog", name="Token")
        dialog.wait_for()
        seen.page.keyboard.press("Escape")
        assert dialog.is_visible()
        for shown, says in (("wrong-" + TOKEN, "does not know this token"), (TOKEN, None)):
            seen.page.locator("#locked input").fill(shown)
            seen.page.keyboard.press("Enter")
            if says:
                seen.until(lambda says=says: says in dialog.inner_text(), "a second question")
        seen.settle()
        assert not dialog.is_visible()
        assert seen.page.evaluate("Object.values(sessionStorage)") == [TOKEN]
        assert seen.page.evaluate("Object.values(localStorage)") == []
        assert TOKEN not in "".join([seen.page.url, *seen.requests, *seen.sockets, seen.page.content()])
        seen.asked.clear()
        seen.page.reload()
        seen.settle()  # the tab still knows it
        assert not dialog.is_visible()


def test_a_token_that_changes_is_asked_for_again(visit: Open, app: FastAPI) -> None:
    with running(app) as port:
        seen = visit(port)
        seen.settle()
    seen.ignored = ("ERR_CONNECTION_REFUSED", "WebSocket connection to", "ERR_CONNECTION_RESET", "401")
    seen.token = TOKEN
    with running(create_app([offer_of(student(), LIMITS, StubDrawer())], LIMITS, token=TOKEN), port):
        seen.page.locator("#locked input").fill(TOKEN)
        seen.page.keyboard.press("Enter")
        seen.drag(40, 0)
        seen.until(lambda: seen.last()["walk"][0] > 0.1, "the walk goes on")
        seen.settle()
