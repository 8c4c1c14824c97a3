"""The page loads, shows frames, and follows hand, keys and sliders."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from browser.helpers import Visit

Open = Callable[..., Visit]


def test_loads_and_shows_the_first_picture(visit: Open, port: int) -> None:
    seen = visit(port)
    asked = seen.settle()
    assert (asked["walk"], asked["seed"], asked["labels"], asked["steps"]) == ([0, 0], 0, 3, 2)
    assert asked["format"] == "raw"
    assert seen.page.evaluate("performance.getEntriesByName('first-frame').length") == 1
    assert seen.page.inner_text("#about") == "Student and teacher · 8 × 8 pixels · 10 classes"
    assert {address.split("/", 3)[3] for address in seen.requests} >= {"", "page/main.js", "page/style.css", "v1/model"}
    assert len(seen.sockets) == 1  # the teacher has no stream before a race


def test_nothing_reaches_another_origin(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    seen.ignored = ("Content Security Policy", "violates the")
    blocked = seen.page.evaluate(
        """() => new Promise(resolve => {
            document.addEventListener("securitypolicyviolation", event => resolve(event.effectiveDirective))
            fetch("http://localhost:9/").catch(() => {})
        })"""
    )
    assert blocked == "connect-src"
    assert seen.page.locator("script:not([src]), style, [style*=url], [onclick]").count() == 0
    seen.requests = [address for address in seen.requests if "localhost:9" not in address]


def test_dragging_walks(visit: Open, port: int) -> None:
    seen = visit(port)
    before = seen.settle()
    first = seen.canvas()
    seen.drag(120, -60)
    seen.until(lambda: seen.last()["walk"][0] > 0.4, "the end of the drag")
    after = seen.settle()
    box = seen.page.locator("#stage").bounding_box()
    scale = 2.4 / min(box["width"], box["height"])
    assert after["walk"] == pytest.approx([120 * scale, -60 * scale], abs=0.02)
    assert {**after, "walk": 0, "id": 0, "taken": 0} == {**before, "walk": 0, "id": 0, "taken": 0}
    assert not np.array_equal(seen.canvas(), first)


def test_a_frame_is_taken_before_the_next_is_asked_for(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    seen.drag(200, 0, steps=30)
    seen.settle()
    ids = [asked["id"] for asked in seen.asked]
    taken = [asked["taken"] for asked in seen.asked if asked["taken"] is not None]
    assert ids == list(range(len(ids)))
    assert taken == sorted(taken)
    assert all(asked["taken"] is None or asked["taken"] < asked["id"] for asked in seen.asked)


def test_a_flick_goes_on_and_comes_to_rest(visit: Open, port: int) -> None:
    seen = visit(port, reduced_motion="no-preference")
    seen.page.locator("#drift").click()  # motion is welcome, so that it drifts at first
    assert seen.page.locator("#drift").get_attribute("aria-pressed") == "false"
    seen.page.locator("#home").click()
    seen.settle()
    x, y = seen.center()

    def flick() -> bool:  # moves that come late, on a busy machine, are a slow drag: try again
        seen.page.mouse.move(x, y)
        seen.page.mouse.down()
        for k in range(1, 8):
            seen.page.mouse.move(x + 15 * k, y)
        released = seen.last()["walk"][0]
        seen.page.mouse.up()
        seen.page.wait_for_timeout(500)
        return seen.last()["walk"][0] > released + 0.02

    seen.until(flick, "the flick")
    seen.settle()


def test_drift_walks_by_itself(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    assert len(seen.asked) == 1  # reduced motion: it stands still
    seen.page.locator("#drift").click()
    seen.until(lambda: len(seen.asked) > 4, "frames of the drift")
    seen.page.locator("#stage").focus()
    seen.page.keyboard.press(" ")
    assert seen.page.locator("#drift").get_attribute("aria-pressed") == "false"
    assert seen.settle()["walk"] != [0, 0]


def test_keys_walk(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    seen.page.locator("#stage").focus()
    for keys, walk in (("ArrowRight", [0.06, 0]), ("ArrowDown", [0.06, 0.06]), ("Shift+ArrowLeft", [-0.18, 0.06])):
        seen.page.keyboard.press(keys)
        seen.until(lambda walk=walk: seen.last()["walk"] == pytest.approx(walk), f"the walk after {keys}")
    seen.settle()
    seen.page.keyboard.press("Home")
    seen.until(lambda: seen.last()["walk"] == [0, 0], "the way home")
    seen.page.keyboard.press("n")
    seen.until(lambda: seen.last()["seed"] != 0, "new noise")
    assert seen.page.input_value("#seed") == str(seen.settle()["seed"])


def test_the_walk_has_no_seam(visit: Open, port: int) -> None:
    seen = visit(port, "#walk=3.14,0")
    before = seen.drawn(seen.settle()).astype(int)
    seen.page.locator("#stage").focus()
    seen.page.keyboard.press("ArrowRight")
    seen.until(lambda: seen.last()["walk"][0] == pytest.approx(3.2 - 2 * np.pi), "the other side")
    near = np.abs(seen.drawn(seen.settle()) - before).mean()  # answers: a canvas is known but for rounding
    seen.page.keyboard.press("Home")
    seen.until(lambda: seen.last()["walk"] == [0, 0], "the way home")
    assert 0 < near < np.abs(seen.drawn(seen.settle()) - before).mean() / 3


def test_everything_can_be_reached_by_keys(visit: Open, port: int) -> None:
    seen = visit(port, "#view=race&mix=3:70,5:30")
    seen.settle()
    reached = set()
    for _ in range(40):
        seen.page.keyboard.press("Tab")
        what = """() => {
            const { activeElement: element } = document
            if (element === document.body) return ["", true]
            const { outlineStyle, boxShadow } = getComputedStyle(element)
            const label = element.ariaLabel || element.labels?.[0]?.textContent || element.textContent
            return [label.trim(), outlineStyle !== "none" || element.type === "range" || element.type === "radio"]
        }"""
        name, visible = seen.page.evaluate(what)
        if name:
            assert visible, f"no focus to be seen: {name}"
            reached.add(name)
    expected = {"Race", "Dark theme", "Noise space", "Drift", "New noise", "Home", "Save", *map(str, range(10))}
    expected |= {"Steps of the student", "Steps of the teacher", "Pictures at once", "Seed", "Picture"}
    expected |= {"Where the time goes", "Keys", "Remove 3", "Remove 5"}
    assert expected <= reached


# Sliders -------------------------------------------------------------------------------------------------------------


def test_steps(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    first = seen.canvas()
    seen.slide("Steps of the student", times=2)
    seen.until(lambda: seen.last()["steps"] == 4, "four steps")
    seen.settle()
    assert not np.array_equal(seen.canvas(), first)
    assert seen.page.get_by_role("slider", name="Steps of the student").get_attribute("aria-valuetext") == "4"


def test_mix(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    seen.page.get_by_role("button", name="7", exact=True).click()
    seen.until(lambda: seen.last()["labels"] == {"3": 100, "7": 100}, "a mix of both")
    seen.settle()
    both = seen.canvas()
    seen.slide("7", "ArrowLeft", times=60)
    seen.until(lambda: seen.last()["labels"] == {"3": 100, "7": 40}, "less of the seven")
    seen.settle()
    assert not np.array_equal(seen.canvas(), both)
    assert seen.page.get_by_role("slider", name="7", exact=True).get_attribute("aria-valuetext") == "29 %"
    seen.slide("3", "Home")
    seen.until(lambda: seen.last()["labels"] == 7, "only the seven is left")
    for name in ("3", "7"):
        seen.page.get_by_role("button", name=name, exact=True).click()
    seen.until(lambda: "labels" not in seen.last(), "all classes in turn")
    seen.settle()
    for name in "0123":
        seen.page.get_by_role("button", name=name, exact=True).click()
    assert seen.page.get_by_role("button", name="4", exact=True).is_disabled()  # four classes are the limit
    seen.until(lambda: len(seen.last()["labels"]) == 4, "four classes")
    seen.settle()


def test_guidance_of_the_teacher(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    assert not seen.page.get_by_role("slider", name="Guidance").is_visible()  # this student takes none
    seen.view("Teacher")
    seen.until(lambda: seen.asked[-1]["model"] == "teacher", "the teacher")
    seen.settle("teacher")
    plain = seen.canvas()
    seen.slide("Guidance", "PageUp")
    seen.until(lambda: seen.last("teacher")["guidance"] > 1, "guidance")
    seen.settle("teacher")
    assert not np.array_equal(seen.canvas(), plain)
    seen.view("Student")
    seen.until(lambda: seen.asked[-1]["model"] == "student", "the student")
    assert seen.settle()["guidance"] == 1


def test_pictures_at_once_and_numbers(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.slide("Pictures at once", times=2)
    seen.until(lambda: bool(seen.asked) and seen.last()["count"] == 9, "nine pictures")
    seen.settle()
    nine = seen.pictures().astype(int)
    assert nine.shape == (9, 8, 8)
    seen.page.fill("#picture", "5")
    seen.slide("Pictures at once", "Home")
    seen.until(lambda: (seen.last()["first"], seen.last()["count"]) == (5, 1), "picture 5 alone")
    seen.settle()
    assert np.abs(seen.pictures()[0] - nine[5]).max() <= 1
    seen.page.fill("#seed", "")
    seen.page.fill("#seed", "77")
    seen.until(lambda: seen.last()["seed"] == 77, "another seed")
    seen.settle()


def test_a_place_is_in_the_address(visit: Open, port: int) -> None:
    seen = visit(port, "#seed=5&walk=0.5000,-1.2500&mix=2:60,4:40&steps=student:3&count=4&picture=2")
    asked = seen.settle()
    assert asked["labels"] == {"2": 60, "4": 40}
    assert (asked["seed"], asked["walk"], asked["steps"], asked["count"]) == (5, [0.5, -1.25], 3, 4)
    assert asked["first"] == 2
    seen.page.locator("#home").click()
    seen.until(lambda: "walk=0.0000,0.0000" in seen.page.url, "the new place in the address")
    assert "mix=2:60,4:40" in seen.page.url


def test_an_address_is_followed_while_the_walk_goes_on(visit: Open, port: int) -> None:
    seen = visit(port, "#seed=5")
    seen.settle()
    seen.page.locator("#drift").click()
    for seed in range(10, 20):
        seen.page.evaluate(f"location.hash = '#seed={seed}'")
        seen.until(lambda seed=seed: seen.last()["seed"] == seed, f"seed {seed}")


def test_an_address_that_makes_no_sense_is_put_right(visit: Open, port: int) -> None:
    seen = visit(port, "#view=sea&model=x&seed=-1&walk=NaN,1&mix=99:1,3:999,a:b&guidance=x&steps=student:900,y:1&count=1e9")
    asked = seen.settle()
    assert (asked["seed"], asked["walk"], asked["steps"], asked["count"]) == (0, [0, 0], 2, 1)
    assert "labels" not in asked


def test_latency_adds_up(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    seen.page.get_by_text("Where the time goes").click()
    seen.drag(80, 80, steps=20)
    seen.until(lambda: seen.page.inner_text("#times .total td:last-child") != "–", "figures")
    seen.until(lambda: seen.page.inner_text("#rate") not in ("–", "0"), "frames a second")
    rows = seen.page.locator("#times tbody tr").all_inner_texts()
    assert [row.split("\n")[0] for row in rows] == [
        "Held back", "Transport", "Queue", "Neural network", "Encoding", "Decode, paint", "Display", "All",
    ]  # fmt: skip
    medians = [float(row.split("\t")[-2]) for row in rows]
    assert min(medians) >= 0
    assert max(medians[:-1]) <= medians[-1]
