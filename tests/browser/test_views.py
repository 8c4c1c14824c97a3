"""The wall, the race, and saving what is seen."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from fastapi import FastAPI
from PIL import Image

from browser.helpers import Pixels, Visit
from serve.helpers import StubDrawer, running

Open = Callable[..., Visit]


def test_wall(visit: Open, port: int) -> None:
    seen = visit(port, "#mix=")
    seen.settle()
    seen.view("Wall")
    seen.until(lambda: seen.last()["count"] > 20, "many pictures")
    asked = seen.settle()
    pictures = seen.pictures()
    assert len(pictures) == asked["count"] <= 64
    assert np.ptp(pictures, axis=(1, 2)).min() > 0  # every place is taken
    assert not seen.page.get_by_role("slider", name="Pictures at once").is_visible()
    seen.slide("Steps of the student", "Home")
    seen.until(lambda: seen.last()["steps"] == 1, "one step")
    seen.settle()
    seen.drag(100, 50)
    seen.until(lambda: seen.last()["walk"][0] > 0.3, "a walk of all of them")
    seen.settle()


def test_a_picture_of_the_wall_can_be_walked_from(visit: Open, port: int) -> None:
    seen = visit(port, "#view=wall&mix=")
    asked = seen.settle()
    wall = seen.pictures().astype(int)
    box = seen.page.locator("#first canvas").bounding_box()
    columns = -(-seen.canvas().shape[1] // 9)
    rows = asked["count"] // columns
    seen.page.mouse.click(box["x"] + 2.5 * box["width"] / columns, box["y"] + 1.5 * box["height"] / rows)
    seen.until(lambda: seen.last()["count"] == 1, "one picture")
    chosen = seen.settle()
    assert chosen["first"] == columns + 2
    assert np.abs(seen.pictures()[0] - wall[columns + 2]).max() <= 1
    assert seen.page.get_by_role("radio", name="Walk").is_checked()
    assert seen.page.input_value("#picture") == str(columns + 2)


def test_race(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    seen.view("Race")
    seen.settle()
    teacher = seen.settle("teacher", "second")
    assert teacher == {**seen.last(), "model": "teacher", "steps": 18, "id": teacher["id"], "taken": teacher["taken"]}
    assert len(seen.sockets) == 2
    seen.drag(60, 60)
    seen.until(lambda: seen.last("teacher")["walk"] == seen.last()["walk"] != [0, 0], "both walk")
    seen.settle()
    seen.settle("teacher", "second")
    for figure, model in (("first", "Student"), ("second", "Teacher")):
        assert seen.page.inner_text(f"#{figure} .name") == model
        seen.until(lambda f=figure: seen.milliseconds(f"#{f} .time") > 0, f"the clock of the {model}")
        assert "network" in seen.page.inner_text(f"#{figure} .part")
    seen.until(lambda: "as fast as the" in seen.page.inner_text("#verdict"), "who is faster")
    seen.slide("Steps of the teacher", "Home")
    seen.until(lambda: seen.last("teacher")["steps"] == 1, "steps of the teacher")
    assert seen.last()["steps"] == 2
    seen.settle("teacher", "second")
    seen.view("Walk")
    assert not seen.page.locator("#second").is_visible()


def test_a_clock_runs_while_its_picture_is_drawn(visit: Open, race_app: FastAPI, drawer: StubDrawer) -> None:
    with running(race_app) as port:
        seen = visit(port, "#view=race")
        seen.settle()
        seen.settle("teacher", "second")
        clock = seen.page.locator("#second .track.running")
        seen.until(lambda: clock.count() == 0, "rest")
        drawer.hold()
        before = seen.last()
        seen.page.locator("#new").click()
        seen.until(lambda: seen.last() != before, "a request")
        seen.settle()  # the student is done
        seen.until(lambda: clock.count() == 1, "a clock that runs")
        seen.until(lambda: seen.page.locator("#first .track.running").count() == 0, "a clock that stands")

        def time(figure: str) -> float:
            return float(seen.page.inner_text(f"#{figure} .time"))

        stopped, early = time("first"), time("second")
        seen.until(lambda: time("second") > early + 50, "a later time")
        assert time("first") == stopped
        drawer.release()
        seen.settle("teacher", "second")
        seen.until(lambda: clock.count() == 0, "a clock that stands")
        assert time("second") > early + 50
        assert time("second") > stopped


def test_a_clock_never_falls_back_to_the_time_of_the_picture_before(visit: Open, race_app: FastAPI, drawer: StubDrawer) -> None:
    with running(race_app) as port:
        seen = visit(port, "#view=race")
        seen.settle()
        seen.settle("teacher", "second")
        clock = seen.page.locator("#second .track.running")
        seen.until(lambda: clock.count() == 0, "rest")
        seen.page.evaluate(
            """() => {
              window.times = []
              const time = document.querySelector("#second .time")
              const note = () => window.times.push(Number(time.textContent))
              new MutationObserver(note).observe(time, { childList: true, characterData: true, subtree: true })
            }"""
        )
        drawer.hold()
        before = seen.last("teacher")
        seen.page.locator("#new").click()
        seen.until(lambda: seen.last("teacher") != before, "a request")
        seen.until(lambda: seen.milliseconds("#second .time") > 300, "a time far above the last one")
        drawer.release()
        seen.settle("teacher", "second")
        seen.until(lambda: clock.count() == 0, "a clock that stands")
        times = seen.page.evaluate("() => window.times")
        late = times[next(i for i, time in enumerate(times) if time > 300) :]
        assert min(late) > 300  # the frame that has arrived is awaited until it is painted


# Saving --------------------------------------------------------------------------------------------------------------


def saved(seen: Visit, folder: Path) -> tuple[str, Pixels]:
    with seen.page.expect_download() as download:
        seen.page.locator("#save").click()
    path = folder / "saved.png"
    download.value.save_as(path)
    return download.value.suggested_filename, np.asarray(Image.open(io.BytesIO(path.read_bytes())).convert("RGBA"))


def enlarged(canvas: Pixels, scale: int) -> Pixels:
    return canvas.repeat(scale, axis=0).repeat(scale, axis=1)


def test_save_one(visit: Open, port: int, tmp_path: Path) -> None:
    seen = visit(port, "#seed=6")
    seen.settle()
    name, picture = saved(seen, tmp_path)
    assert name == "trigflow-walk-6-0.png"
    assert np.array_equal(picture, enlarged(seen.canvas(), 64))


def test_save_the_race(visit: Open, port: int, tmp_path: Path) -> None:
    seen = visit(port, "#view=race")
    seen.settle()
    seen.settle("teacher", "second")
    _, picture = saved(seen, tmp_path)
    assert picture.shape == (512, 512 + 32 + 512, 4)
    assert np.array_equal(picture[:, :512], enlarged(seen.canvas("first"), 64))
    assert np.array_equal(picture[:, -512:], enlarged(seen.canvas("second"), 64))
    assert not picture[:, 512:-512].any()
