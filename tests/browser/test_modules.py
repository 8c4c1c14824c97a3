"""Single modules of the page, called in the browser."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from browser.helpers import Visit
from trigflow.conditions.text import plain

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def call(browser: Any, port: int) -> Iterator[Call]:
    """`call("wall.js", "m.wallGrid(...)")` evaluates an expression with the module as `m` and further values as `a`."""
    context = browser.new_context(reduced_motion="reduce")
    seen = Visit(context.new_page(), port)
    seen.open()

    def evaluate(module: str, expression: str, *values: Any) -> Any:
        script = f"async (a) => {{ const m = await import('http://{seen.origin}/page/{module}'); return {expression} }}"
        return seen.page.evaluate(script, list(values))

    yield evaluate
    context.close()


@pytest.mark.parametrize(
    ("room", "shape", "most", "grid"),
    [
        ((880, 640), [1, 8, 8], 64, (9, 7)),
        ((360, 360), [1, 8, 8], 64, (8, 8)),
        ((360, 360), [3, 32, 32], 1, (1, 1)),
        ((30, 30), [3, 32, 32], 64, (1, 1)),
        ((1000, 300), [3, 64, 128], 64, (10, 6)),
        ((900, 900), [3, 1024, 1024], 64, (1, 1)),
    ],
)
def test_wall_grid(call: Call, room: tuple[int, int], shape: list[int], most: int, grid: tuple[int, int]) -> None:
    found = call("wall.js", "m.wallGrid(...a)", *room, shape, most)
    assert (found["columns"], found["rows"]) == grid


def test_steps_and_even_numbers(call: Call) -> None:
    steps = call("slider.js", "m.stepsBetween(1, 64, 18)")
    assert steps[:9] == list(range(1, 10))
    assert {18, 64} <= set(steps)
    assert steps == sorted(set(steps))
    assert len(steps) < 32
    assert call("slider.js", "m.stepsBetween(4, 4, 4)") == [4]
    scales = call("slider.js", "m.evenly(1, 2, 0.05)")
    assert scales == pytest.approx(np.linspace(1, 2, 21))
    assert call("slider.js", "m.evenly(1, 1.01, 0.05)") == [1, 1.01]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_of_all_kinds_of_pictures(call: Call, channels: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, channels, 2, 4), dtype=np.uint8)
    script = """(() => {
        const image = new ImageData(9, 5)
        for (let k = 0; k < 3; k++) m.place(image, a[0], k, a[1], 5 * (k % 2), 3 * Math.floor(k / 2))
        return Array.from(image.data)
    })()"""
    image = np.array(call("frame.js", script, pictures.ravel().tolist(), [channels, 2, 4])).reshape(5, 9, 4)
    for k, (left, top) in enumerate([(0, 0), (5, 0), (0, 3)]):
        cell = image[top : top + 2, left : left + 4].transpose(2, 0, 1)
        colours = {1: pictures[k][[0, 0, 0]], 3: pictures[k], 4: pictures[k][:3]}[channels]
        assert np.array_equal(cell[:3], colours)
        assert np.array_equal(cell[3], pictures[k][3] if channels == 4 else np.full((2, 4), 255))
    assert not image[:, 4].any()  # the gap
    assert not image[3:, 5:].any()  # no fourth picture


def test_small_pictures_are_crisp_and_large_ones_smooth(call: Call) -> None:
    script = """(() => {
        const box = document.createElement("div")
        box.style.cssText = "width: 300px; height: 200px; position: relative"
        const canvas = document.createElement("canvas")
        box.append(canvas)
        document.body.append(box)
        const picture = new m.Picture(canvas)
        const [n, c, h, w] = a[0]
        const frame = { header: { shape: a[0] }, pixels: new Uint8Array(n * c * h * w).fill(100) }
        picture.show(frame, m.squareGrid(n))
        const rendering = getComputedStyle(canvas).imageRendering
        const found = { rendering, wide: canvas.style.width, high: canvas.style.height }
        const copy = picture.copy()
        box.remove()
        return { ...found, size: [canvas.width, canvas.height], copy: [copy.width, copy.height] }
    })()"""
    assert call("canvas.js", script, [1, 1, 8, 8]) == {
        "rendering": "pixelated", "wide": "200px", "high": "200px", "size": [8, 8], "copy": [512, 512],
    }  # fmt: skip
    assert call("canvas.js", script, [4, 3, 8, 8])["size"] == [17, 17]
    assert call("canvas.js", script, [4, 3, 8, 8])["wide"] == "187px"  # eleven dots for each pixel
    large = call("canvas.js", script, [1, 3, 256, 512])
    assert (large["rendering"], large["wide"], large["high"]) == ("auto", "300px", "150px")
    assert large["copy"] == [512, 256]


def test_parts_of_the_time_add_up(call: Call) -> None:
    times = {"asked": 100, "ready": 112, "received": 140, "unpacked": 141, "begun": 150, "painted": 152}
    frame = {"header": {"ms": {"queue": 3, "network": 9, "encode": 1}}, "times": times}
    parts = call("latency.js", "m.partsOf(a[0])", frame)
    assert parts == {
        "held": 12, "transport": 15, "queue": 3, "network": 9, "encode": 1, "paint": 3, "display": 9, "total": 52, "wall": 40,
    }  # fmt: skip
    frame["header"]["ms"]["queue"] = 50  # it took over the place of an older request
    parts = call("latency.js", "m.partsOf(a[0])", frame)
    assert (parts["queue"], parts["transport"]) == (18, 0)
    assert sum(parts[part] for part in parts if part not in ("total", "wall")) == parts["total"]


def test_percentiles_and_rate_of_the_last_seconds(call: Call) -> None:
    script = """(() => {
        const figures = new m.Figures()
        for (let k = 0; k <= 100; k++) {
            const painted = 100 * k
            const [asked, received] = [painted - k, painted]
            const times = { asked, ready: asked, received, unpacked: received, begun: received, painted }
            figures.add({ header: { ms: { queue: 0, network: 0, encode: 0 } }, times })
        }
        return [figures.rate(10000), figures.count(10000), figures.percentile("total", 0.5), figures.percentile("total", 1)]
    })()"""
    assert call("latency.js", script) == [10, 51, 75, 100]
    assert call("latency.js", "new m.Figures().percentile('total', 0.5)") is None
    assert call("latency.js", "[m.inMs(null), m.inMs(0.04), m.inMs(9.94), m.inMs(9.96), m.inMs(123.4)]") == [
        "–", "0.0", "9.9", "10", "123",
    ]  # fmt: skip


def test_scene_and_address(call: Call) -> None:
    model = {"classes": 10, "steps": [1, 64], "default_steps": 2, "guidance": [1, 1], "shape": [1, 8, 8], "pixels": True}
    other = {**model, "default_steps": 18, "guidance": [1, 10]}
    limits = {"frame_images": 64, "mixed_labels": 4}
    info = {"default": "student", "models": {"student": model, "teacher": other}, "limits": limits}
    scene = call("scene.js", "m.firstScene(a[0])", info)
    there = {**scene, "view": "race", "seed": 9, "walk": [1.5, -0.25], "mix": {"2": 10, "7": 90}, "guidance": 3}
    back = call("scene.js", "m.fromFragment('#' + m.toFragment(a[0]), a[1], a[2])", there, scene, info)
    assert back == there
    order = call("scene.js", "m.orderOf(...a)", {**there, "view": "walk", "model": "teacher"}, info, "teacher", 4)
    assert order == {
        "model": "teacher", "count": 4, "seed": 9, "first": 0, "walk": [1.5, -0.25], "guidance": 3, "steps": 18,
        "labels": {"2": 10, "7": 90},
    }  # fmt: skip
    assert call("scene.js", "m.orderOf(...a).guidance", there, info, "teacher", 4) == 1  # a race is on equal terms
    drawn = {**there, "view": "draw", "prompt": "a&b", "toward": "c=d", "share": 30, "strength": 0.35, "keep": 2}
    words = {**info, "models": {name: {**found, "prompt_bytes": 9} for name, found in info["models"].items()}}
    assert call("scene.js", "m.fromFragment('#' + m.toFragment(a[0]), a[1], a[2])", drawn, scene, words) == drawn
    assert call("scene.js", "m.orderOf(...a).prompt", drawn, words, "teacher", 4) == {"a&b": 0.7, "c=d": 0.3}
    keeps = [call("scene.js", "m.keepsOf(a[0])", {"shape": [3, 8, 6], "pixels": pixels}) for pixels in (True, False)]
    assert keeps == [[None, "gray", 2], [None]]
    for mix, labels in (({"2": 0, "7": 5}, 7), ({"2": 0, "7": 0}, 2), ({"4": 1}, 4), ({}, None)):
        assert call("scene.js", "m.orderOf(...a).labels ?? null", {**there, "mix": mix}, info, "student", 1) == labels


def test_texts_as_the_server_reads_them(call: Call) -> None:
    for text in ("  two \t words\n", "e\u0301", "", "قلب  أحمر", "🐳"):
        assert call("prompt.js", "m.plain(a[0])", text) == plain(text)
    for text, most, fine in (("cat", 3, True), ("cats", 3, False), ("🐳", 4, True), ("🐳", 3, False), ("a\x07", 9, False)):
        assert (call("prompt.js", "m.problem(...a)", text, most) == "") is fine
    assert call("prompt.js", "m.problem('\\ud83d', 9)") != ""
    assert call("prompt.js", "m.problem('x'.repeat(1e7), 9)").startswith("Too long: 10000000")


@pytest.mark.parametrize("version", [1, 2])
def test_numpy_files(call: Call, version: int) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pictures, version=(version, 0))
    script = """(() => {
        const { shape, pixels } = m.unpackNpy(new Uint8Array(a[0]).buffer)
        return [shape, Array.from(pixels)]
    })()"""
    assert call("frame.js", script, list(buffer.getvalue())) == [[2, 3, 4, 5], pictures.ravel().tolist()]


PAINTED = """(() => {
    const painting = new m.Painting(a[0])
    for (const [kind, colour, size, ...points] of a[1]) {
        if (kind in painting) { painting[kind](); continue }
        painting.begin({ kind, colour, size })
        for (const point of points) painting.to(...point)
        painting.end()
    }
    const { image, mask, masked, undoable, blank } = painting
    return { pixels: Array.from(image.data), mask: Array.from(mask), masked, undoable, blank }
})()"""


def test_strokes(call: Call) -> None:
    """A stroke covers what lies within half its size of its way, softly at the edge, marks at half of that or more."""
    h, w, red = 9, 12, [200, 30, 10]

    def painted(*strokes: Any, channels: int = 3) -> Any:
        return call("paint.js", PAINTED, [channels, h, w], list(strokes))

    way = [(2.5, 3.5), (9.5, 6.5)]
    for size in (1, 3, 4):
        found = painted(["paint", red, size, *way])
        a, b = np.array(way)
        centres = np.stack(np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5), -1) - a
        part = np.clip(centres @ (b - a) / ((b - a) ** 2).sum(), 0, 1)
        share = np.clip(size / 2 + 0.5 - np.linalg.norm(centres - part[..., None] * (b - a), axis=-1), 0, 1)
        expected = 255 + share[..., None] * (np.array(red) - 255)
        pixels = np.array(found["pixels"]).reshape(h, w, 4)
        assert np.abs(pixels[..., :3] - expected).max() <= 0.51
        assert (pixels[..., 3] == 255).all()
        again = painted(["paint", red, size, *way, way[0]])
        assert again["pixels"] == found["pixels"]  # there and back is no more than there
        marked = painted(["redraw", red, size, *way])
        assert np.array_equal(np.array(marked["mask"]).reshape(h, w), 255 * (share >= 0.5))
        assert marked["pixels"] == [255] * (4 * h * w)
        assert painted(["redraw", red, size, *way], ["unmark", red, size, *way]) | {"undoable": 0} == painted() | {
            "undoable": 0
        }
    gray = np.array(painted(["paint", red, 1, (2.2, 3.9)], channels=1)["pixels"]).reshape(h, w, 4)
    assert gray[3, 2].tolist() == [*[round(0.299 * 200 + 0.587 * 30 + 0.114 * 10)] * 3, 255]  # the pixel that it is in
    beside = painted(["paint", red, 2, (-3, -3), (-9, 40)])
    assert (beside["blank"], beside["undoable"]) == (True, True)


def test_undo_has_an_end(call: Call) -> None:
    dots = [["paint", [0, 0, 0], 1, (k % 8 + 0.5, k // 8 + 0.5)] for k in range(60)]
    undo = [["undo"]]
    for times, left in ((0, 60), (1, 59), (49, 11), (50, 10), (70, 10)):
        found = call("paint.js", PAINTED, [1, 8, 8], dots + undo * times)
        assert np.count_nonzero(np.array(found["pixels"]).reshape(8, 8, 4)[..., 0] == 0) == left
        assert found["undoable"] is (times < 50)


def test_means_of_blocks(call: Call) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), dtype=np.uint8)
    found = call(
        "photo.js", "Array.from(m.means(new ImageData(new Uint8ClampedArray(a[0]), 6, 4), 2).data)", pixels.ravel().tolist()
    )
    assert np.abs(np.array(found).reshape(2, 3, 4) - pixels.reshape(2, 2, 3, 2, 4).mean((1, 3))).max() <= 0.5


def test_who_is_faster(call: Call) -> None:
    verdict = "m.verdict(a[0], a[1], ['student', 'teacher'])"
    assert call("race.js", verdict, 10, 235) == "The student is 24× as fast as the teacher."
    assert call("race.js", verdict, 30, 10) == "The teacher is 3.0× as fast as the student."
    assert call("race.js", verdict, None, 10) == ""


def test_angles_stay_on_the_torus(call: Call) -> None:
    angles = call("walk.js", "a.map(m.wrapped)", 0, 3.2, -3.2, 100, -7)
    assert angles == pytest.approx([np.angle(np.exp(1j * angle)) for angle in (0, 3.2, -3.2, 100, -7)])
