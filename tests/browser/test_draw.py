"""The view in which one paints: what is painted is what is sent, and what comes back is what is shown."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from browser.helpers import LIMITS, Pixels, Visit
from browser.test_looks import CONTRAST, PHONE, WIDTHS
from browser.test_views import enlarged, saved
from deploy.reading import reading
from serve.helpers import StubDrawer, running, student
from trigflow.serve.app import create_app
from trigflow.serve.offers import offer_of

Open = Callable[..., Visit]
TOKEN = "a-token.of_enough~letters"
WHITE, RED, BLUE = (255, 255, 255), (0xE5, 0x32, 0x2D), (0x2F, 0x7D, 0xE1)
LUMINANCE = np.array([0.299, 0.587, 0.114])
SLOW = """() => {
    const { fetch } = window
    window.under = 0
    window.most = 0
    window.fetch = async (...request) => {
        window.most = Math.max(window.most, ++window.under)
        try { return await fetch(...request) } finally { window.under-- }
    }
}"""
"""Counts requests under way."""
GIVE = """([kind, bytes, name, type]) => {
    const transfer = new DataTransfer()
    transfer.items.add(new File([new Uint8Array(bytes)], name, { type }))
    const options = { bubbles: true, cancelable: true }
    const event = kind === "paste"
        ? new ClipboardEvent(kind, { ...options, clipboardData: transfer })
        : new DragEvent(kind, { ...options, dataTransfer: transfer })
    return document.querySelector("#easel canvas").dispatchEvent(event)
}"""
"""Drops or pastes a file; whether the browser would go on with it."""


@pytest.fixture(scope="module")
def colours(browser: Any) -> Iterator[int]:
    """A server of a student of 8x8 pictures in colours that reads words of up to 15 bytes."""
    with running(create_app([offer_of(reading(), LIMITS)], LIMITS)) as port:
        yield port


# What is there -------------------------------------------------------------------------------------------------------


def painted(seen: Visit) -> Pixels:
    """The painting, (h, w, 3); with stripes where it is marked."""
    return seen.canvas("easel")[..., :3]


def shown(seen: Visit) -> Pixels:
    """The result, (h, w, 3)."""
    return seen.canvas()[..., :3]


def near(pixels: Pixels, expected: Pixels, levels: int = 1) -> bool:
    """Whether they differ by so many levels at most; before its first frame a canvas has another size."""
    return pixels.shape == expected.shape and bool(np.abs(pixels.astype(int) - expected).max() <= levels)


def file_of(text: str) -> Pixels:
    """The pixels of a file in base64, (h, w, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def rows(pictures: Pixels) -> Pixels:
    """The first of some pictures (n, c, h, w) as the canvas has it, (h, w, 3)."""
    return np.broadcast_to(pictures[0].transpose(1, 2, 0), (*pictures.shape[2:], 3))


def settle(seen: Visit, **expected: Any) -> dict[str, Any]:
    """Wait until the result of an edit of what is painted, with these fields, is shown, byte for byte; that request.

    A field of None is one that is not sent. What is to be painted must be there already: a file that was just opened is not. A
    painting with marks is told from the request, as there are stripes on the canvas.
    """

    def asked() -> bool:
        if not seen.edits or any(seen.edits[-1].get(name) != value for name, value in expected.items()):
            return False
        sent, there = file_of(seen.edits[-1]["picture"]), painted(seen)
        if sent.shape != there.shape:
            return len(sent) * seen.edits[-1].get("keep", 0) == len(there)
        return "mask" in seen.edits[-1] or np.array_equal(sent, there)

    answers: dict[int, Pixels] = {}

    def settled() -> bool:
        if not asked():
            return False
        newest = len(seen.edits)
        if newest not in answers:
            answers[newest] = rows(seen.answer("edit", seen.edits[newest - 1]))
        return np.array_equal(shown(seen), answers[newest])

    seen.until(asked, f"an edit of the painting with {expected}")
    seen.until(settled, "its result, byte for byte")
    return seen.edits[-1]


def stroke(seen: Visit, *points: tuple[float, float], touch: bool = False) -> None:
    """A stroke by mouse, or by a finger, along points in pixels of the painting."""
    box = seen.page.locator("#easel canvas").bounding_box()
    h, w = painted(seen).shape[:2]
    places = [(box["x"] + x / w * box["width"], box["y"] + y / h * box["height"]) for x, y in points]
    if touch:
        devtools = seen.page.context.new_cdp_session(seen.page)
        for kind, place in [("touchStart", places[0]), *(("touchMove", place) for place in places[1:]), ("touchEnd", None)]:
            where = [] if place is None else [{"x": place[0], "y": place[1]}]
            devtools.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})
        return
    seen.page.mouse.move(*places[0])
    seen.page.mouse.down()
    for place in places[1:]:
        seen.page.mouse.move(*place, steps=4)
    seen.page.mouse.up()


def choose(seen: Visit, name: str) -> None:
    """Choose a colour, a brush or what is kept."""
    seen.page.get_by_role("radio", name=name, exact=True).check(force=True)


def png(pixels: Any, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(buffer, format, **({"quality": 100} if format == "JPEG" else {}))
    return buffer.getvalue()


def noise(h: int, w: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def open_file(seen: Visit, content: bytes, name: str = "photo.png") -> None:
    with seen.page.expect_file_chooser() as chooser:
        seen.page.get_by_role("button", name="Open", exact=True).click()
    chooser.value.set_files({"name": name, "mimeType": "image/png", "buffer": content})


def notice(seen: Visit) -> str:
    box = seen.page.locator("#notice")
    return str(box.inner_text()) if box.is_visible() else ""


# Strokes -------------------------------------------------------------------------------------------------------------


def test_a_stroke_becomes_a_picture(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw&prompt=red&seed=5&picture=2&walk=0.5000,-0.2500&steps=student:3")
    blank = settle(seen)
    assert (painted(seen) == 255).all()
    assert blank | {"picture": ""} == {
        "model": "student", "count": 1, "seed": 5, "first": 2, "walk": [0.5, -0.25], "guidance": blank["guidance"], "steps": 3,
        "prompt": "red", "strength": 0.7, "format": "npy", "picture": "",
    }  # fmt: skip
    choose(seen, "Red")
    stroke(seen, (1.5, 3.5), (6.5, 3.5))
    expected = np.full((8, 8, 3), 255)
    expected[3, 1:7] = RED
    seen.until(lambda: np.array_equal(painted(seen), expected), "the stroke")
    before = shown(seen)
    asked = settle(seen)
    assert np.array_equal(file_of(asked["picture"]), expected)
    assert asked | {"picture": ""} == blank | {"picture": ""}
    assert not np.array_equal(before, shown(seen)) or len(seen.edits) > 2
    seen.until(lambda: seen.milliseconds("#delay") > 0, "a time")
    assert len(seen.sockets) == 0
    assert "seen" in seen.page.get_attribute("#stage", "class")


def test_the_picture_follows_everything_that_is_set(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw")
    first = settle(seen)
    assert "prompt" not in first
    seen.page.fill("#prompt", "blue")
    settle(seen, prompt="blue")
    seen.page.fill("#seed", "9")
    settle(seen, prompt="blue", seed=9)
    seen.slide("Steps", times=2)
    settle(seen, steps=4)
    seen.slide("Variation", times=25)
    settle(seen, walk=[pytest.approx(np.pi / 4), 0])
    seen.slide("Strength", "ArrowLeft", times=4)
    weaker = settle(seen, strength=0.5)
    seen.page.locator("#stage").focus()
    seen.page.keyboard.press("n")
    seen.until(lambda: seen.edits[-1]["seed"] != 9, "new noise")
    assert settle(seen) | {"seed": 9} == weaker


def test_several_pictures_of_one_painting(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw&count=4&seed=3")
    seen.until(lambda: seen.canvas().shape[:2] == (17, 17), "four pictures")
    pictures = seen.answer("edit", seen.edits[-1])
    assert np.array_equal(shown(seen)[9:, :8], pictures[2].transpose(1, 2, 0))
    box = seen.page.locator("#first canvas").bounding_box()
    seen.page.mouse.click(box["x"] + 0.25 * box["width"], box["y"] + 0.75 * box["height"])
    chosen = settle(seen, count=1, first=2)
    assert np.abs(rows(seen.answer("edit", chosen)).astype(int) - pictures[2].transpose(1, 2, 0)).max() <= 1
    assert seen.page.get_by_role("radio", name="Draw", exact=True).is_checked()


def test_the_newest_painting_wins(visit: Open) -> None:
    drawer = StubDrawer()
    with running(create_app([offer_of(student(), LIMITS, drawer)], LIMITS)) as port:
        seen = visit(port, "#view=draw")
        settle(seen)
        seen.page.evaluate(SLOW)
        drawn, asked = len(drawer.batches), len(seen.edits)
        drawer.hold()
        stroke(seen, (0.5, 0.5), (7.5, 0.5), (7.5, 7.5), (0.5, 7.5))
        assert len(seen.edits) == asked + 1
        drawer.release()
        seen.until(lambda: len(seen.edits) == asked + 2, "the newest")
        settle(seen)
        assert len(drawer.batches) == drawn + 3  # the one in the making, the newest, and the answer it is compared with
        assert seen.page.evaluate("window.most") == 1
        frame = np.zeros((8, 8, 3), int) + 255
        frame[0] = frame[7] = frame[:, 7] = 0
        assert np.array_equal(file_of(seen.edits[-1]["picture"]), frame)


def test_soft_brushes_cover_a_pixel_once_a_stroke(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw")
    settle(seen)
    seen.slide("Size", times=2)
    stroke(seen, (4, 4))
    once = painted(seen)
    assert (once[3:5, 3:5] == 0).all()
    assert 0 < once[2, 3, 0] < 255
    seen.page.locator("#clear").click()
    stroke(seen, (4, 4), (4.01, 4), (4, 4))
    assert np.abs(painted(seen).astype(int) - once).max() <= 4
    settle(seen)


def test_pens_and_fingers(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw", **PHONE)
    settle(seen)
    stroke(seen, (0.5, 2.5), (3.5, 2.5), (7.5, 2.5), touch=True)
    expected = np.full((8, 8, 3), 255)
    expected[2] = 0
    seen.until(lambda: np.array_equal(painted(seen), expected), "the stroke of the finger")
    assert seen.page.evaluate("scrollY") == 0
    settle(seen)
    box = seen.page.locator("#easel canvas").bounding_box()
    devtools = seen.page.context.new_cdp_session(seen.page)
    for kind, x in (("mousePressed", 0.5), ("mouseMoved", 4.5), ("mouseReleased", 4.5)):
        where = {"x": box["x"] + x / 8 * box["width"], "y": box["y"] + 5.5 / 8 * box["height"]}
        held = {"button": "left", "buttons": 0 if kind == "mouseReleased" else 1, "clickCount": 1, "pointerType": "pen"}
        devtools.send("Input.dispatchMouseEvent", {"type": kind, **where, **held})
    expected[5, :5] = 0
    seen.until(lambda: np.array_equal(painted(seen), expected), "the stroke of the pen")
    settle(seen)


# Marks, undo, and what is kept ---------------------------------------------------------------------------------------


def test_what_is_not_marked_stays_byte_for_byte(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw&prompt=red")
    photo = noise(8, 8)
    open_file(seen, png(photo))
    seen.until(lambda: np.array_equal(painted(seen), photo), "the photo")
    settle(seen)
    choose(seen, "Redraw")
    stroke(seen, (2.5, 1.5), (5.5, 1.5), (5.5, 4.5))
    anew = np.zeros((8, 8), bool)
    anew[1, 2:6] = anew[1:5, 5] = True
    seen.until(lambda: "mask" in seen.edits[-1] and (file_of(seen.edits[-1]["mask"])[..., 0] == 255 * anew).all(), "the mask")
    asked = settle(seen, strength=1)
    assert np.array_equal(file_of(asked["picture"]), photo)
    assert np.array_equal(shown(seen)[~anew], photo[~anew])
    assert (shown(seen)[anew] != photo[anew]).any(axis=1).all()
    assert (painted(seen)[anew] != photo[anew]).any(axis=1).all()  # stripes
    assert np.array_equal(painted(seen)[~anew], photo[~anew])
    assert seen.page.get_by_role("slider", name="Strength").get_attribute("aria-valuetext") == "1.00"
    assert seen.page.get_by_role("radio", name="2 × 2").is_disabled()
    assert "Only what is marked" in seen.page.inner_text("#kept")

    choose(seen, "Unmark")
    stroke(seen, (2.5, 1.5), (4.5, 1.5))
    anew[1, 2:5] = False
    seen.until(lambda: (file_of(seen.edits[-1].get("mask", asked["mask"]))[..., 0] == 255 * anew).all(), "a smaller mask")
    settle(seen, strength=1)
    assert np.array_equal(shown(seen)[~anew], photo[~anew])
    seen.page.get_by_role("button", name="Unmark all").click()
    settle(seen, mask=None, strength=0.7)
    assert np.array_equal(painted(seen), photo)
    assert not seen.page.locator("#unmark").is_visible()
    assert seen.page.evaluate("document.activeElement.ariaLabel") == "Painting"  # the focus is not lost with the button


def test_undo(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw")
    settle(seen)
    undo = seen.page.locator("#undo")
    assert undo.get_attribute("aria-disabled") == "true"
    past = [painted(seen)]
    for k, colour in enumerate(("Red", "Blue", "Green")):
        choose(seen, colour)
        stroke(seen, (0.5, k + 0.5), (7.5, k + 0.5))
        past.append(painted(seen))
    choose(seen, "Redraw")
    stroke(seen, (3.5, 3.5))
    seen.page.locator("#clear").click()
    seen.until(lambda: (painted(seen) == 255).all(), "a blank canvas")
    settle(seen, mask=None)
    undo.click()
    seen.until(lambda: "mask" in seen.edits[-1], "the mark is back")
    seen.page.locator("#easel canvas").focus()
    seen.page.keyboard.press("Control+z")
    seen.until(lambda: np.array_equal(painted(seen), past[-1]), "the painting without the mark")
    past.pop()
    settle(seen, mask=None)
    for key in ("Control+z", "Meta+z", "Control+z"):
        seen.page.keyboard.press(key)
        seen.until(lambda: np.array_equal(painted(seen), past[-1]), "one stroke less")
        past.pop()
        settle(seen)
    assert undo.get_attribute("aria-disabled") == "true"
    asked = len(seen.edits)
    undo.click(force=True)
    seen.page.keyboard.press("Control+z")
    seen.page.wait_for_timeout(100)
    assert len(seen.edits) == asked
    stroke(seen, (0.5, 0.5))
    black = painted(seen)
    seen.page.locator("#prompt").fill("red")
    seen.page.keyboard.press("Control+z")  # of the text
    assert np.array_equal(painted(seen), black)


def test_light_and_dark_are_kept(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw&prompt=red")
    photo = noise(8, 8, 1)
    open_file(seen, png(photo))
    seen.until(lambda: np.array_equal(painted(seen), photo), "the photo")
    settle(seen)
    choose(seen, "Gray")
    settle(seen, keep="gray", strength=1)
    gray = np.round(photo @ LUMINANCE)
    assert np.abs(shown(seen) @ LUMINANCE - gray).max() <= 0.5 + 1e-6
    assert np.abs(shown(seen).astype(int) - photo).max() > 20  # other colours
    assert "Light and dark stay" in seen.page.inner_text("#kept")
    choose(seen, "2 × 2")
    asked = settle(seen, keep=2, strength=1)
    means = photo.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(file_of(asked["picture"]) - means).max() <= 0.5
    assert np.abs(shown(seen).reshape(4, 2, 4, 2, 3).mean((1, 3)) - file_of(asked["picture"])).max() <= 0.5 + 1e-6
    choose(seen, "Nothing")
    settle(seen, keep=None, strength=0.7)


def test_a_model_of_grays(visit: Open, port: int) -> None:
    seen = visit(port, "#view=draw")
    settle(seen, labels=3)
    assert seen.page.get_by_role("radio", name="Gray", exact=True).count() == 0
    seen.page.get_by_label("Another colour").evaluate(
        "input => { input.value = '#ff0000'; input.dispatchEvent(new Event('input', { bubbles: true })) }"
    )
    stroke(seen, (2.5, 2.5))
    assert painted(seen)[2, 2].tolist() == [76, 76, 76]
    settle(seen)
    photo = noise(8, 8)
    open_file(seen, png(photo))
    level = np.asarray(Image.fromarray(photo).convert("L"))
    seen.until(lambda: np.array_equal(painted(seen), np.stack([level] * 3, -1)), "the photo in grays")
    settle(seen)
    seen.page.get_by_role("button", name="7", exact=True).click()
    settle(seen, labels={"3": 100, "7": 100})
    seen.view("Teacher")
    settle(seen, model="teacher", steps=18)


# Pictures from elsewhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["open", "drop", "paste"])
def test_a_photo(visit: Open, colours: int, how: str) -> None:
    seen = visit(colours, "#view=draw")
    settle(seen)
    small = noise(8, 8, 2)
    wide = np.concatenate([noise(32, 16), small.repeat(4, 0).repeat(4, 1), noise(32, 16)], 1)
    if how == "open":
        open_file(seen, png(wide))
    else:
        prevented = not seen.page.evaluate(GIVE, [how, list(png(wide)), "photo.png", "image/png"])
        assert prevented
    seen.until(lambda: near(painted(seen), small), "the middle of it, scaled")
    settle(seen)
    open_file(seen, b"no picture at all")
    seen.until(lambda: "no picture that this browser can open" in notice(seen), "what is wrong with the file")
    assert near(painted(seen), small)
    open_file(seen, png(np.full((9, 5, 3), (30, 60, 90)), "JPEG"), "photo.jpg")
    seen.until(lambda: np.abs(painted(seen).astype(int) - (30, 60, 90)).max() <= 3, "another photo, upright")
    seen.until(lambda: notice(seen) == "", "no notice")
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[2] = (10, 20, 30, 255)
    open_file(seen, png(clear))
    seen.until(lambda: (painted(seen)[0] == 255).all() and (painted(seen)[2] == (10, 20, 30)).all(), "white for nothing")
    settle(seen)


def test_a_picture_becomes_the_painting(visit: Open, colours: int) -> None:
    seen = visit(colours, "#prompt=red&seed=4")
    seen.until(lambda: seen.canvas().shape[0] == 8, "a picture")
    seen.until(lambda: seen.page.locator("#stage.seen").count() == 1, "a picture that is seen")
    walked = shown(seen)
    seen.page.locator("#paint").click()
    seen.until(lambda: np.array_equal(painted(seen), walked), "the picture of the walk as the painting")
    settle(seen, prompt="red", seed=4)
    assert seen.page.get_by_role("radio", name="Draw", exact=True).is_checked()
    assert not seen.page.locator("#paint").is_visible()
    result = shown(seen)
    assert not np.array_equal(result, walked)
    seen.page.get_by_role("button", name="Use this picture").click()
    seen.until(lambda: np.array_equal(painted(seen), result), "the result as the painting")
    settle(seen)
    seen.page.locator("#undo").click()
    seen.until(lambda: np.array_equal(painted(seen), walked), "the way back")
    asked, streams = len(seen.asked), len(seen.sockets)
    seen.view("Walk")
    seen.until(lambda: len(seen.asked) > asked, "frames again")
    edits = len(seen.edits)
    seen.until(lambda: np.array_equal(shown(seen), walked), "the walk goes on")
    assert len(seen.sockets) == streams + 1
    assert len(seen.edits) == edits
    assert not seen.page.locator("#easel").is_visible()
    seen.until(lambda: notice(seen) == "", "no notice")


def test_save_and_copy_the_result(visit: Open, colours: int, tmp_path: Path) -> None:
    seen = visit(
        colours, "#view=draw&prompt=red&toward=blue&share=25&seed=7", permissions=["clipboard-read", "clipboard-write"]
    )
    settle(seen)
    stroke(seen, (1.5, 1.5), (6.5, 6.5))
    settle(seen)
    name, picture = saved(seen, tmp_path)
    assert name == "trigflow-red-75-blue-25-7-0.png"
    assert np.array_equal(picture[..., :3], enlarged(shown(seen), 64))
    seen.page.locator("#copy").click()
    seen.until(lambda: seen.page.inner_text("#copied") == "Copied", "word that it is copied")


# Keys, phones, and what is read aloud --------------------------------------------------------------------------------


def test_by_keyboard_alone(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw")
    settle(seen)
    reached: dict[str, bool] = {}
    seen.page.locator("#prompt").focus()
    what = """() => {
        const { activeElement: element } = document
        const { outlineStyle, boxShadow } = getComputedStyle(element)
        const { outlineStyle: beside } = getComputedStyle(element.nextElementSibling ?? element)
        const seen = [outlineStyle, beside].some((style) => style !== "none") || element.type === "range"
        return [element.ariaLabel || element.labels?.[0]?.textContent || element.textContent.trim(), seen]
    }"""
    for _ in range(26):
        seen.page.keyboard.press("Tab")
        name, visible = seen.page.evaluate(what)
        reached[name] = visible
    expected = [
        "Painting",
        "Paint",
        "Black",
        "Another colour",
        "Size",
        "Noise space",
        "Undo",
        "Clear",
        "Open",
        "Use this picture",
    ]
    expected += ["Drift", "Save", "Strength", "Nothing", "Steps"]
    assert [name for name in reached if name in expected] == expected
    assert [name for name in expected if not reached[name]] == []

    canvas = seen.page.locator("#easel canvas")
    canvas.focus()
    assert seen.page.locator("#easel .ring").is_visible()
    press = seen.page.keyboard.press
    for key in ("Shift+ArrowLeft", "Shift+ArrowLeft", "ArrowUp"):
        press(key)
    assert seen.page.inner_text("#spot") == "Column 1, row 4"
    press(" ")
    expected_pixels = np.full((8, 8, 3), 255)
    expected_pixels[3, 0] = 0
    seen.until(lambda: np.array_equal(painted(seen), expected_pixels), "a dot")
    settle(seen)
    for _ in range(7):
        press("Shift+Tab")
        if seen.page.evaluate("document.activeElement.name") == "swatch":
            break
    seen.page.get_by_role("radio", name="Black").focus()
    for _ in range(2):
        press("ArrowRight")
    canvas.focus()
    press("ArrowDown")
    seen.page.keyboard.down(" ")
    press("ArrowRight")
    press("ArrowRight")
    seen.page.keyboard.up(" ")
    press("ArrowRight")
    expected_pixels[4, :3] = RED
    seen.until(lambda: np.array_equal(painted(seen), expected_pixels), "a line")
    assert settle(seen)["walk"] == [0, 0]  # it is the brush that moves
    seen.page.locator("#undo").focus()
    press("Enter")
    expected_pixels[4, :3] = 255
    seen.until(lambda: np.array_equal(painted(seen), expected_pixels), "the dot alone")
    assert seen.page.evaluate("document.activeElement.id") == "undo"
    assert "Space paints" in seen.page.evaluate("document.getElementById('easel-keys').textContent")


@pytest.mark.parametrize("width", [390, 360, 320])
def test_a_narrow_screen(visit: Open, colours: int, width: int) -> None:
    seen = visit(colours, "#view=draw&prompt=red&toward=blue", **{**PHONE, "viewport": {"width": width, "height": 740}})
    settle(seen)
    stroke(seen, (1.5, 1.5), (6.5, 6.5), touch=True)
    settle(seen)
    choose(seen, "Redraw")
    stroke(seen, (1.5, 6.5), touch=True)
    seen.until(lambda: seen.page.locator("#unmark").is_visible(), "a button for the marks")
    assert seen.page.evaluate(WIDTHS) == [width, width]
    easel, result = (seen.page.locator(selector).bounding_box() for selector in ("#easel canvas", "#first canvas"))
    assert easel["y"] + easel["height"] <= result["y"]
    assert easel["width"] >= 0.6 * width
    assert result["y"] < 740  # in sight while one paints
    for selector in ("#deeds button", "#strip button:not([hidden])", "#text > *", "#toward", "#kinds label"):
        for element in seen.page.locator(selector).all():
            box = element.bounding_box()
            assert min(box["width"], box["height"]) >= 30
            assert 0 <= box["x"] <= box["x"] + box["width"] <= width
    for swatch in seen.page.locator("#swatches label").all():
        assert swatch.bounding_box()["width"] >= 24
    seen.page.set_viewport_size({"width": 740, "height": 360})
    seen.until(lambda: seen.page.evaluate(WIDTHS) == [740, 740], "the other way round")
    easel, result = (seen.page.locator(selector).bounding_box() for selector in ("#easel canvas", "#first canvas"))
    assert easel["x"] + easel["width"] <= result["x"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(visit: Open, colours: int, scheme: str) -> None:
    seen = visit(colours, "#view=draw&prompt=red&toward=blue", color_scheme=scheme)
    settle(seen)
    found = seen.page.evaluate(CONTRAST)
    assert {"Redraw", "Strength", "Use this picture", "Blend", "Toward it"} <= {text for _, text in found}
    assert [text for ratio, text in found if ratio < 4.5 and text != "Undo"] == []


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_by_itself(visit: Open, port: int, motion: str) -> None:
    seen = visit(port, "#view=draw", reduced_motion=motion)
    settle(seen)
    asked = len(seen.edits)
    seen.page.wait_for_timeout(300)
    assert len(seen.edits) == asked
    seen.page.locator("#drift").click()
    seen.until(lambda: len(seen.edits) > asked + 1 and seen.edits[-1]["walk"] != [0, 0], "a drift that was asked for")


# The address, and two texts ------------------------------------------------------------------------------------------


def test_the_address_holds_the_view(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw&strength=0.4&keep=2&prompt=red&toward=blue&share=30&seed=8")
    asked = settle(seen, strength=0.4, keep=2, prompt={"red": 0.7, "blue": 0.3}, seed=8)
    assert seen.page.get_by_role("radio", name="2 × 2").is_checked()
    assert seen.page.input_value("#toward") == "blue"
    choose(seen, "4 × 4")
    seen.slide("Toward it", times=5)
    seen.slide("Strength", times=1)
    settle(seen, keep=4, prompt={"red": 0.65, "blue": 0.35}, strength=1)
    seen.until(lambda: "share=35" in seen.page.url and "keep=4" in seen.page.url, "the address")
    seen.page.reload()
    settle(seen, keep=4, prompt={"red": 0.65, "blue": 0.35}, strength=1, seed=asked["seed"])
    seen.page.evaluate("location.hash = '#view=draw&strength=7&keep=3&share=101&seed=1'")
    settle(seen, keep=4, prompt={"red": 0.65, "blue": 0.35}, strength=1, seed=1)


def test_the_painting_is_there_after_loading_again(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw")
    settle(seen)
    seen.page.reload()
    settle(seen)
    assert seen.page.evaluate("sessionStorage.length") == 0  # nothing to keep
    choose(seen, "Red")
    stroke(seen, (1.5, 1.5), (6.5, 1.5))
    before = painted(seen)
    choose(seen, "Redraw")
    stroke(seen, (4.5, 6.5))
    seen.until(lambda: "mask" in seen.edits[-1], "a mark")
    marked, asked = painted(seen), seen.edits[-1]
    seen.page.reload()
    seen.until(lambda: np.array_equal(painted(seen), marked), "painting and marks")
    assert settle(seen, mask=asked["mask"])["picture"] == asked["picture"]
    seen.page.get_by_role("button", name="Unmark all").click()
    seen.until(lambda: np.array_equal(painted(seen), before), "the painting")
    assert seen.page.evaluate("localStorage.getItem('trigflow-painting')") is None
    for kept in ("no base64,!", "AAAA,AAAA"):
        seen.page.add_init_script(f"sessionStorage.setItem('trigflow-painting', '{kept}')")
        seen.page.reload()
        settle(seen)
        assert (painted(seen) == 255).all()


def test_two_texts(visit: Open, colours: int) -> None:
    seen = visit(colours, "#prompt=red")

    def asks(prompt: Any) -> None:
        seen.until(lambda: bool(seen.asked) and seen.last().get("prompt") == prompt, f"frames of {prompt}")
        expected = rows(
            seen.answer("images", {k: v for k, v in seen.last().items() if k not in ("id", "taken")} | {"format": "npy"})
        )
        seen.until(lambda: near(shown(seen), expected), f"the picture of {prompt}")

    asks("red")
    blend = seen.page.get_by_role("button", name="Blend")
    assert blend.get_attribute("aria-expanded") == "false"
    blend.click()
    assert blend.get_attribute("aria-expanded") == "true"
    assert seen.page.evaluate("document.activeElement.id") == "toward"
    seen.page.keyboard.type("blue")
    asks({"red": 0.5, "blue": 0.5})
    assert seen.page.locator("#first canvas").get_attribute("aria-label") == "red 50 %, blue 50 %, Student"
    seen.slide("Toward it", "ArrowLeft", times=20)
    asks({"red": 0.7, "blue": 0.3})
    seen.slide("Toward it", "Home")
    asks("red")
    seen.slide("Toward it", "End")
    asks("blue")
    seen.slide("Toward it", "ArrowLeft", times=10)
    asks({"red": 0.1, "blue": 0.9})
    seen.page.fill("#toward", "x" * 16)
    seen.until(lambda: "Too long: 16 bytes" in seen.page.inner_text("#unfit"), "what is wrong")
    assert seen.page.get_attribute("#toward", "aria-invalid") == "true"
    asks({"red": 0.1, "blue": 0.9})
    seen.page.fill("#toward", "sea")
    asks({"red": 0.1, "sea": 0.9})
    assert seen.page.inner_text("#unfit") == ""
    seen.page.fill("#prompt", "")
    asks({"": 0.1, "sea": 0.9})
    seen.page.fill("#prompt", "sea")
    asks("sea")
    seen.view("Race")
    seen.until(lambda: {asked["steps"] for asked in seen.asked[-4:]} >= {1, 2}, "both")
    seen.page.fill("#prompt", "sun")
    seen.until(lambda: {a["steps"] for a in seen.asked if a.get("prompt") == {"sun": 0.1, "sea": 0.9}} == {1, 2}, "both mix")
    blend.click()
    asks_alone = "the first text alone"
    seen.until(lambda: seen.last().get("prompt") == "sun", asks_alone)
    assert not seen.page.locator("#toward").is_visible()
    seen.until(lambda: "prompt=sun" in seen.page.url and "toward" not in seen.page.url, "the address")
    blend.click()
    seen.until(lambda: seen.last().get("prompt") == {"sun": 0.1, "sea": 0.9}, "what was there before")


# What goes wrong -----------------------------------------------------------------------------------------------------


def test_what_the_server_refuses_is_said_and_the_painting_stays(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw")
    settle(seen)
    seen.ignored = ("422",)
    place = seen.page.locator("#easel canvas").bounding_box()
    # a real refusal: the request is changed on its way
    seen.page.route(
        "**/v1/edit", lambda route: route.continue_(post_data=json.dumps({**route.request.post_data_json, "steps": 900}))
    )
    choose(seen, "Red")
    stroke(seen, (0.5, 3.5), (7.5, 3.5))
    seen.until(lambda: "steps 900 for the student" in notice(seen), "the server's words")
    assert not seen.page.get_by_role("button", name="Try now").is_visible()
    assert seen.page.locator("#easel canvas").bounding_box() == place  # nothing moves under the hand
    red = np.full((8, 8, 3), 255)
    red[3] = RED
    assert np.array_equal(painted(seen), red)
    seen.page.unroute("**/v1/edit")
    choose(seen, "Blue")
    stroke(seen, (0.5, 5.5), (7.5, 5.5))
    red[5] = BLUE
    settle(seen)
    assert np.array_equal(painted(seen), red)
    seen.until(lambda: notice(seen) == "", "no notice")


def test_a_busy_server_is_asked_again(visit: Open, colours: int) -> None:
    seen = visit(colours, "#view=draw")
    settle(seen)
    seen.ignored = ("503", "429", "Failed to load resource")
    refusal = {"detail": "the server is shutting down; expected it to run; try again later"}
    seen.page.route("**/v1/edit", lambda route: route.fulfill(status=503, headers={"Retry-After": "60"}, json=refusal))
    stroke(seen, (0.5, 3.5), (7.5, 3.5))
    seen.until(lambda: "shutting down" in notice(seen), "the server's words")
    assert "Trying again in" in notice(seen)
    asked = len(seen.edits)
    stroke(seen, (0.5, 4.5), (7.5, 4.5))
    seen.page.wait_for_timeout(200)
    assert len(seen.edits) == asked  # it said when
    black = np.full((8, 8, 3), 255)
    black[3:5] = 0
    assert np.array_equal(painted(seen), black)
    seen.page.unroute("**/v1/edit")
    seen.page.get_by_role("button", name="Try now").click()
    settle(seen)
    seen.until(lambda: notice(seen) == "", "no notice")
    seen.page.route("**/v1/edit", lambda route: route.abort())
    stroke(seen, (0.5, 6.5))
    seen.until(lambda: "does not answer" in notice(seen), "that nobody answers")
    seen.page.unroute("**/v1/edit")
    settle(seen)  # by itself
    seen.until(lambda: notice(seen) == "", "no notice")


def test_a_batch_that_fails(visit: Open) -> None:
    drawer = StubDrawer()
    with running(create_app([offer_of(student(), LIMITS, drawer)], LIMITS)) as port:
        seen = visit(port, "#view=draw")
        settle(seen)
        seen.ignored = ("500",)
        drawer.fail = True
        stroke(seen, (3.5, 3.5))
        seen.until(lambda: "status 500" in notice(seen), "the status")
        drawer.fail = False
        settle(seen)
        seen.until(lambda: notice(seen) == "", "no notice")


def test_token(visit: Open) -> None:
    with running(create_app([offer_of(student(), LIMITS, StubDrawer())], LIMITS, token=TOKEN)) as port:
        seen = visit(port, "#view=draw")
        seen.token = TOKEN
        seen.ignored = ("401",)
        seen.page.locator("#locked input").fill(TOKEN)
        seen.page.keyboard.press("Enter")
        settle(seen)
        seen.page.evaluate("sessionStorage.setItem('trigflow-token', 'wrong-wrong-wrong-wrong')")
        stroke(seen, (3.5, 3.5))
        seen.page.get_by_role("dialog", name="Token").wait_for()
        seen.page.locator("#locked input").fill(TOKEN)
        seen.page.keyboard.press("Enter")
        settle(seen)
        assert painted(seen)[3, 3].tolist() == [0, 0, 0]


def test_models_that_draw_no_such_pictures_have_no_such_view(visit: Open, port: int) -> None:
    seen = visit(port)
    seen.settle()
    expression = "async info => (await import('./page/scene.js')).viewsOf(info)"
    model = {"steps": [2, 2], "prompt_bytes": 0}
    for shapes, draw in ([(3, 8, 8)], True), ([(4, 8, 8)], False), ([(64,)], False), ([(3, 8, 8), (3, 9, 8)], False):
        models = {f"model{k}": {**model, "shape": list(shape)} for k, shape in enumerate(shapes)}
        views = seen.page.evaluate(expression.replace("./page", f"http://{seen.origin}/page"), {"models": models})
        assert ("draw" in views) is draw
