"""The page of a model of words: pictures follow each key, and what cannot be drawn changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI

from browser.helpers import LIMITS, Visit
from browser.test_looks import BOXES, CONTRAST, PHONE, WIDTHS
from browser.test_views import enlarged, saved
from serve.helpers import StubDrawer, reader, running
from trigflow.serve.app import create_app
from trigflow.serve.offers import offer_of

Open = Callable[..., Visit]
COPIED = """async () => {
    const [item] = await navigator.clipboard.read()
    const bitmap = await createImageBitmap(await item.getType("image/png"))
    return [item.types.join(), bitmap.width, bitmap.height]
}"""


@pytest.fixture(scope="module")
def words(browser: Any) -> Iterator[int]:
    """A server of a student and its teacher that read words of up to 23 bytes."""
    offers = [offer_of(reader(guidance_max=4.0), LIMITS), offer_of(reader("diffusion"), LIMITS)]
    with running(create_app(offers, LIMITS)) as port:
        yield port


def type_in(seen: Visit, text: str) -> None:
    """Type a text in place of what is there, key by key."""
    seen.page.locator("#prompt").click()  # waits until it is there
    seen.page.keyboard.press("Control+A")
    seen.page.keyboard.press("Delete")
    seen.page.keyboard.type(text)


def prompted(seen: Visit, prompt: str | None) -> dict[str, Any]:
    """Wait for the picture of this prompt, without words for None; the request for it."""
    seen.until(lambda: bool(seen.asked) and seen.last().get("prompt") == prompt, f"a request for {prompt}")
    return seen.settle()


def note(seen: Visit) -> str:
    text: str = seen.page.locator("#said").inner_text()
    return text


def past(seen: Visit) -> list[str]:
    found: list[str] = seen.page.locator("#past button").all_inner_texts()
    return found


def test_pictures_follow_each_key(visit: Open, words: int) -> None:
    seen = visit(words)
    first = prompted(seen, None)
    assert (first["guidance"], first["steps"], first["walk"], first["seed"]) == (2, 2, [0, 0], 0)
    before = seen.canvas()
    assert seen.page.evaluate("document.activeElement.id") == "prompt"  # one can type at once
    shown = []
    for k, letter in enumerate("cat"):
        seen.page.keyboard.type(letter)
        prompted(seen, "cat"[: k + 1])
        shown.append(seen.canvas())
    assert all(not np.array_equal(one, other) for one, other in zip([before, *shown], shown, strict=False))
    assert seen.page.locator("#first canvas").get_attribute("aria-label") == "cat, Student"
    asked = len(seen.asked)
    seen.page.keyboard.type(" ")
    seen.page.wait_for_timeout(100)
    assert len(seen.asked) == asked  # the same text as it is read
    assert seen.page.inner_text("#about") == "Student and teacher · 8 × 8 pixels · follows your words"


def test_the_newest_text_wins(visit: Open) -> None:
    drawer = StubDrawer()
    app = create_app([offer_of(reader(), LIMITS, drawer)], LIMITS)
    with running(app) as port:
        seen = visit(port)
        seen.settle()
        drawn = len(drawer.batches)
        drawer.hold()
        type_in(seen, "a green heart")
        seen.until(lambda: seen.last().get("prompt") == "a green heart", "the last text")
        assert len(drawer.batches) == drawn + 1
        drawer.release()
        seen.settle()
        assert len(drawer.batches) <= drawn + 3  # the one in the making, the newest, and the answer it is compared with


def test_empty_again_is_drawn_without_words(visit: Open, words: int) -> None:
    seen = visit(words)
    prompted(seen, None)
    first = seen.canvas()
    type_in(seen, "cat")
    prompted(seen, "cat")
    type_in(seen, "")
    prompted(seen, None)
    assert np.array_equal(seen.canvas(), first)
    assert seen.page.locator("#prompt").get_attribute("placeholder")


@pytest.mark.parametrize("text", ["قلب أحمر", "🐳🍎", "漢字", "e\u0301te\u0301"])
def test_any_script_and_emoji(visit: Open, words: int, text: str) -> None:
    seen = visit(words)
    prompted(seen, None)
    type_in(seen, text)
    prompted(seen, "été" if text[0] == "e" else text)
    direction = seen.page.evaluate("getComputedStyle(document.getElementById('prompt')).direction")
    assert direction == ("rtl" if text.startswith("ق") else "ltr")
    seen.page.keyboard.press("Enter")
    chip = seen.page.locator("#past button").first
    assert chip.evaluate("chip => getComputedStyle(chip).direction") == direction


@pytest.mark.parametrize(
    ("text", "words_of_note"),
    [
        ("x" * 10_000, "Too long: 10000"),
        ("x" * 24, "Too long: 24 bytes, and at most 23"),
        ("🐳" * 6, "24 bytes"),
        ("a\x07b", "printed"),
    ],
)
def test_what_cannot_be_drawn_leaves_the_picture(visit: Open, words: int, text: str, words_of_note: str) -> None:
    seen = visit(words)
    type_in(seen, "cat")
    prompted(seen, "cat")
    shown, asked = seen.canvas(), len(seen.asked)
    field = seen.page.locator("#prompt")
    field.fill(text)
    seen.until(lambda: words_of_note in note(seen), "a note")
    assert field.get_attribute("aria-invalid") == "true"
    assert seen.page.locator("#said").get_attribute("role") == "status"
    seen.page.wait_for_timeout(100)
    assert len(seen.asked) == asked
    assert np.array_equal(seen.canvas(), shown)
    assert not seen.page.locator("#notice").is_visible()
    seen.slide("Variation")  # what was drawn last goes on
    seen.until(lambda: seen.last()["walk"] != [0, 0], "the walk")
    assert prompted(seen, "cat")
    field.fill("dog")
    prompted(seen, "dog")
    assert "Too long" not in note(seen)
    assert field.get_attribute("aria-invalid") == "false"


def test_sliders(visit: Open, words: int) -> None:
    seen = visit(words)
    type_in(seen, "cat")
    first = prompted(seen, "cat")
    seen.slide("Variation", times=25)
    seen.until(lambda: seen.last()["walk"] == [pytest.approx(np.pi / 4), 0], "a quarter of the way")
    seen.slide("Guidance", "End")
    seen.until(lambda: seen.last()["guidance"] == 4, "guidance")
    seen.slide("Steps of the student", "Home")
    seen.until(lambda: seen.last()["steps"] == 1, "one step")
    prompted(seen, "cat")
    assert seen.last()["seed"] == first["seed"]
    seen.page.locator("#home").click()
    seen.until(lambda: seen.last()["walk"] == [0, 0], "the way home")
    assert seen.page.get_by_role("slider", name="Variation").get_attribute("aria-valuetext") == "0 %"


def test_one_step_two_steps_and_the_teacher_side_by_side(visit: Open, words: int) -> None:
    seen = visit(words, "#view=race&prompt=cat")
    seen.settle("teacher", "third")
    for figure, steps, name in (("first", 1, "1 step"), ("second", 2, "2 steps"), ("third", 18, "Teacher")):
        asked = next(
            one for one in reversed(seen.asked) if one["steps"] == steps and (one["model"] == "teacher") == (figure == "third")
        )
        assert (asked["prompt"], asked["guidance"]) == ("cat", 2)
        seen.until(lambda asked=asked, figure=figure: seen.shows(asked, figure), f"the picture of {name}")
        assert seen.page.inner_text(f"#{figure} .name") == name
        seen.until(lambda figure=figure: seen.milliseconds(f"#{figure} .time") > 0, "a time")
        assert seen.page.locator(f"#{figure} canvas").get_attribute("aria-label") == f"cat, {name}"
    seen.until(lambda: "student in 2 steps" in seen.page.inner_text("#verdict"), "who is faster")
    assert not seen.page.get_by_role("slider", name="Steps of the student").is_visible()
    assert seen.page.get_by_role("slider", name="Steps of the teacher").is_visible()
    type_in(seen, "dog")
    seen.until(lambda: seen.last("teacher").get("prompt") == "dog", "the teacher follows")
    seen.settle("teacher", "third")
    seen.view("Walk")
    assert [seen.page.locator(f"#{figure}").is_visible() for figure in ("first", "second", "third")] == [True, False, False]


def test_a_student_alone_races_against_itself(visit: Open) -> None:
    with running(create_app([offer_of(reader(), LIMITS)], LIMITS)) as port:
        seen = visit(port, "#view=race")
        seen.until(lambda: {asked["steps"] for asked in seen.asked} == {1, 2}, "both")
        assert len(seen.sockets) == 2
        assert not seen.page.get_by_role("slider", name="Guidance").is_visible()  # this one takes none
        seen.until(lambda: "as fast as" in seen.page.inner_text("#verdict"), "which is faster")


def test_history(visit: Open, words: int) -> None:
    seen = visit(words)
    seen.until(lambda: "kept here" in note(seen), "what is going to be there")
    for text in ("cat", "red apple"):
        type_in(seen, text)
        prompted(seen, text)
        seen.page.keyboard.press("Enter")
    assert past(seen) == ["red apple", "cat"]
    assert not note(seen)
    type_in(seen, "cats")
    seen.until(lambda: past(seen) == ["cats", "red apple", "cat"], "a text that rests is kept")
    seen.page.keyboard.type(" at night")
    seen.page.keyboard.press("Enter")
    assert past(seen) == ["cats at night", "red apple", "cat"]  # one that goes on takes the place
    type_in(seen, "dog")
    seen.page.locator("#past button", has_text="red apple").click()  # at once, while "dog" is not kept yet
    prompted(seen, "red apple")
    assert past(seen) == ["dog", "cats at night", "red apple", "cat"]
    assert seen.page.input_value("#prompt") == "red apple"
    seen.page.reload()
    seen.until(lambda: past(seen)[2:] == ["red apple", "cat"], "what was drawn, after loading again")
    seen.page.get_by_role("button", name="Forget").click()
    assert past(seen) == []
    assert seen.page.evaluate("localStorage.getItem('trigflow-prompts')") == "[]"
    assert seen.page.evaluate("document.activeElement.id") == "prompt"


@pytest.mark.parametrize("kept", ["no json", '{"a": 1}', json.dumps([3, None, "cat", "x" * 10_000])])
def test_a_history_that_makes_no_sense(visit: Open, words: int, kept: str) -> None:
    seen = visit(words)
    seen.page.evaluate("kept => localStorage.setItem('trigflow-prompts', kept)", kept)
    seen.page.reload()
    seen.settle()
    assert past(seen) == ["cat"] * ("cat" in kept)  # no more than this model reads


def test_the_address_holds_the_text(visit: Open, words: int) -> None:
    seen = visit(words, "#prompt=a%26b%20%F0%9F%90%B3")
    prompted(seen, "a&b 🐳")
    assert seen.page.input_value("#prompt") == "a&b 🐳"
    seen.page.locator("#home").click()
    seen.until(lambda: "prompt=a%26b%20%F0%9F%90%B3" in seen.page.url, "the text in the address")
    seen.page.evaluate("location.hash = '#prompt=dog'")
    prompted(seen, "dog")
    assert seen.page.input_value("#prompt") == "dog"
    seen.page.evaluate(f"location.hash = '#seed=3&prompt={'x' * 60}'")  # too long
    seen.until(lambda: seen.last()["seed"] == 3, "the rest of it")
    prompted(seen, "dog")


def test_copy_and_download(visit: Open, words: int, tmp_path: Path) -> None:
    seen = visit(words, "#prompt=a green heart 🐳", permissions=["clipboard-read", "clipboard-write"])
    prompted(seen, "a green heart 🐳")
    name, picture = saved(seen, tmp_path)
    assert name == "trigflow-a-green-heart-🐳-0-0.png"
    assert np.array_equal(picture, enlarged(seen.canvas(), 64))
    seen.page.locator("#copy").click()
    seen.until(lambda: seen.page.inner_text("#copied") == "Copied", "word that it is copied")
    assert seen.page.evaluate(COPIED) == ["image/png", 512, 512]
    seen.until(lambda: seen.page.inner_text("#copy").strip() == "Copy", "the button as before")


def test_a_browser_that_copies_no_pictures_has_no_button(visit: Open, words: int) -> None:
    seen = visit(words)
    seen.page.add_init_script("delete window.ClipboardItem")
    seen.page.reload()
    seen.settle()
    assert not seen.page.locator("#copy").is_visible()
    assert seen.page.locator("#save").is_visible()


def test_by_keyboard_alone(visit: Open, words: int) -> None:
    """Typing needs no Tab; what was drawn before, the picture and every button come after the field, in that order."""
    seen = visit(words)
    prompted(seen, None)
    seen.page.keyboard.type("snc cat")  # letters that are keys of the picture
    prompted(seen, "snc cat")
    assert seen.last()["seed"] == 0
    seen.page.keyboard.press("Enter")
    reached = []
    for _ in range(10):
        seen.page.keyboard.press("Tab")
        reached.append(seen.page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent.trim()"))
    assert reached[:4] == ["Blend", "snc cat", "Forget what was drawn before", "Noise space"]
    assert reached[4:] == ["Drift", "New noise", "Home", "Save", "Copy", "Paint"]
    for _ in range(10):
        seen.page.keyboard.press("Shift+Tab")
    seen.page.keyboard.press("Control+A")
    seen.page.keyboard.type("dog")
    prompted(seen, "dog")
    for _ in range(2):
        seen.page.keyboard.press("Tab")
    seen.until(lambda: past(seen) == ["dog", "snc cat"], "both")  # and the focus stays where it is
    seen.page.keyboard.press("Enter")
    prompted(seen, "snc cat")


def test_a_phone(visit: Open, words: int) -> None:
    seen = visit(words, "#prompt=cat", **PHONE)
    prompted(seen, "cat")
    assert seen.page.evaluate("document.activeElement.id") != "prompt"  # or its keyboard would hide the picture
    for text in ("a green heart", "قلب أحمر", "🐳🍎"):
        type_in(seen, text)
        prompted(seen, text)
        seen.page.keyboard.press("Enter")
    for width in (390, 320):
        seen.page.set_viewport_size({"width": width, "height": 844})
        for view in ("Wall", "Race", "Walk"):
            seen.view(view)
            seen.until(lambda width=width: seen.page.evaluate(WIDTHS) == [width, width], f"{view} in {width} pixels")
            for box in seen.page.evaluate(BOXES.replace(".chip, ", "#prompt, #stage, figure:not([hidden]), ")):
                assert min(box["width"], box["height"]) >= 36
                assert box["left"] >= 0
                assert box["right"] <= width
    seen.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert seen.page.locator("#prompt").bounding_box()["y"] >= -1  # field and picture stay in sight
    assert seen.page.locator("#prompt").evaluate("field => parseFloat(getComputedStyle(field).fontSize)") >= 16  # no zoom


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_nothing_moves_by_itself(visit: Open, words: int, motion: str) -> None:
    seen = visit(words, reduced_motion=motion)
    prompted(seen, None)
    type_in(seen, "cat")
    prompted(seen, "cat")
    asked = len(seen.asked)
    seen.page.wait_for_timeout(300)
    assert len(seen.asked) == asked
    assert seen.page.locator("#drift").get_attribute("aria-pressed") == "false"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(visit: Open, words: int, scheme: str) -> None:
    seen = visit(words, "#view=race&prompt=cat", color_scheme=scheme)
    seen.settle("teacher", "third")
    seen.page.locator("#prompt").press("Enter")
    found = seen.page.evaluate(CONTRAST)
    seen.page.fill("#prompt", "x" * 24)
    found += seen.page.evaluate(CONTRAST)
    assert {"cat", "Too long: 24 bytes, and at most 23 are read. The picture stays."} <= {text for _, text in found}
    assert [text for ratio, text in found if ratio < 4.5] == []


def test_models_of_no_words_have_no_field(visit: Open, app: FastAPI) -> None:
    with running(app) as port:
        seen = visit(port, "#prompt=cat")
        assert "prompt" not in seen.settle()
        assert not seen.page.locator("#words").is_visible()
        assert seen.page.get_by_role("slider", name="Variation").count() == 0
