"""Phones, dark and light, and models that take less."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from fastapi import FastAPI

from browser.helpers import LIMITS, Visit
from serve.helpers import StubDrawer, running, student, teacher
from trigflow.conditions import Conditioner
from trigflow.networks import UNet
from trigflow.serve.app import create_app
from trigflow.serve.offers import offer_of

Open = Callable[..., Visit]
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 3}
BOXES = """() => Array.from(
    document.querySelectorAll("#strip button:not([hidden]), .chip, #views"), (one) => one.getBoundingClientRect().toJSON()
)"""

CONTRAST = """() => {
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number)
    const light = ([r, g, b]) => {
        const linear = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    }
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const colour = numbers(getComputedStyle(element).backgroundColor)
            if (colour[3] !== 0) return colour
        }
        return [255, 255, 255]
    }
    const found = []
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())
        if (!own || !element.checkVisibility() || element.closest("#hint, .unseen, :disabled")) continue
        const [a, b] = [numbers(getComputedStyle(element).color), behind(element)].map(light)
        found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.textContent.trim()])
    }
    return found
}"""
"""Contrast of every text that is seen with what lies behind it, and the text."""
WIDTHS = "[document.scrollingElement.scrollWidth, innerWidth]"


def test_a_phone_needs_no_scrolling_to_the_side(visit: Open, port: int) -> None:
    seen = visit(port, "#mix=1:1,2:1", **PHONE)
    seen.settle()
    seen.page.get_by_text("Where the time goes").click()
    for width in (390, 320):
        seen.page.set_viewport_size({"width": width, "height": 844})
        for view in ("Wall", "Race", "Walk"):
            seen.view(view)
            seen.until(lambda width=width: seen.page.evaluate(WIDTHS) == [width, width], f"{view} in {width} pixels")
            for box in seen.page.evaluate(BOXES):
                assert min(box["width"], box["height"]) >= 36
                assert box["left"] >= 0
                assert box["right"] <= width


def test_a_finger_walks_and_does_not_scroll(visit: Open, port: int) -> None:
    seen = visit(port, **PHONE)
    seen.settle()
    x, y = seen.center()
    devtools = seen.page.context.new_cdp_session(seen.page)

    def touch(kind: str, *points: tuple[float, float]) -> None:
        where = [{"x": x + dx, "y": y + dy} for dx, dy in points]
        devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})

    touch("touchStart", (0, 0))
    for k in range(1, 9):
        touch("touchMove", (0, -10 * k))
    touch("touchEnd")
    seen.until(lambda: seen.last()["walk"][1] < -0.3, "the walk")
    assert seen.settle()["walk"][0] == 0
    assert seen.page.evaluate("scrollY") == 0


def test_the_picture_stays_in_sight_while_sliders_are_moved(visit: Open, port: int) -> None:
    seen = visit(port, **PHONE)
    seen.settle()
    seen.page.get_by_role("slider", name="Pictures at once").scroll_into_view_if_needed()
    seen.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    box = seen.page.locator("#stage").bounding_box()
    assert box["y"] >= -1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light(visit: Open, port: int, scheme: str) -> None:
    seen = visit(port, color_scheme=scheme)
    seen.settle()

    def brightness() -> float:
        shade = seen.page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
        return sum(shade[:3]) / 3

    switch = seen.page.get_by_role("button", name="Dark theme")
    assert (brightness() < 128) == (scheme == "dark")
    assert switch.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    switch.click()
    assert (brightness() < 128) == (scheme == "light")
    seen.page.reload()
    seen.settle()
    assert (brightness() < 128) == (scheme == "light")


def test_texts_can_be_read(visit: Open, port: int) -> None:
    """Contrast of at least 4.5 (WCAG 2.2, AA) between text and what lies behind it, in both themes."""
    for scheme in ("light", "dark"):
        seen = visit(port, "#view=race&mix=3:1,4:1", color_scheme=scheme)
        seen.settle()
        seen.page.get_by_text("Where the time goes").click()
        found = seen.page.evaluate(CONTRAST)
        assert len(found) > 30
        assert [text for ratio, text in found if ratio < 4.5] == []


# Models that take less -----------------------------------------------------------------------------------------------


def without_classes() -> FastAPI:
    model = student()
    conditioning = dataclasses.replace(model.spec.conditioning, num_classes=0)
    network = dataclasses.replace(model.spec, conditioning=conditioning)
    with torch.random.fork_rng():
        built = UNet(network).eval()  # type: ignore[arg-type]
    model = dataclasses.replace(model, network=built, spec=network, conditioner=Conditioner())
    return create_app([offer_of(model, LIMITS, StubDrawer())], LIMITS)


def test_a_student_alone_without_classes(visit: Open) -> None:
    with running(without_classes()) as port:
        seen = visit(port)
        asked = seen.settle()
        assert "labels" not in asked
        seen.view("Wall")
        seen.until(lambda: seen.last()["count"] > 1, "the wall")
        seen.settle()
        for absent in ("Classes", "Guidance", "Drawn by", "Race"):
            assert not seen.page.get_by_text(absent, exact=True).first.is_visible()
        assert [slider.get_attribute("id") for slider in seen.page.get_by_role("slider").all()] == ["slider-1"]


def test_a_teacher_alone(visit: Open) -> None:
    with running(create_app([offer_of(teacher(), LIMITS, StubDrawer())], LIMITS)) as port:
        seen = visit(port, "#view=race&guidance=2.5")
        asked = seen.settle("teacher")
        assert (asked["guidance"], asked["steps"]) == (2.5, 18)
        assert not seen.page.get_by_text("Race", exact=True).is_visible()
        assert seen.page.get_by_role("radio", name="Walk").is_checked()
        assert seen.page.get_by_role("slider", name="Guidance").get_attribute("aria-valuetext") == "2.50"
