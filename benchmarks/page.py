"""The page of `trigflow serve` in Chromium: how soon it shows a picture, how many a second, how long after the hand.

    python benchmarks/page.py --run runs/demo [--seconds 10] [--json FILE]

Starts `trigflow serve` in a process of its own, warms it up and drives the page over loopback, as a user does:

    first frame   seconds from opening the page, with an empty cache, to its first picture; for several openings
    walk          pictures painted in a second while the walk goes on, one picture at two steps
    slider        milliseconds from the browser's event of a slider that a mouse drags to the picture that follows from it,
                  two classes at two steps; a picture counts as there when it is on its canvas, at most one refresh before
                  the display shows it
    key           of a model that reads words, in place of the slider: the same from a key of a text that is typed, at two steps
                  where they can be chosen

Times are taken in the page by what it sends: a frame is acknowledged when it is painted, and every request knows the newest
event before it. Browser, server and this script share the machine; nothing else should run on it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from trigflow.runtime.files import write_json
from trigflow.runtime.machine import machine

TEXTS = ("green heart", "red apple", "blue circle", "a whale", "yellow star")
KEY_MS = 120
"""From one key to the next: a hundred words a minute."""
PROBE = """
window.seen = { frames: [], slides: [], event: null, events: new Map(), taken: -1 }
addEventListener("input", (event) => (seen.event = event.timeStamp), { capture: true })
const send = WebSocket.prototype.send
WebSocket.prototype.send = function (text) {
  const { id, taken } = JSON.parse(text)
  const now = performance.now()
  if (taken !== null && taken !== undefined && taken > seen.taken) {
    seen.taken = taken
    seen.frames.push(now)
    if (seen.events.has(taken)) seen.slides.push(now - seen.events.get(taken))
  }
  if (id !== undefined && seen.event !== null) {
    seen.events.set(id, seen.event)
    seen.event = null
  }
  return send.call(this, text)
}
"""


def percentile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def opened(browser: Browser, address: str) -> Page:
    """The page with its first picture, in a browser profile of its own; nothing moves by itself."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    page = context.new_page()
    page.add_init_script(PROBE)
    page.goto(address)
    while not page.evaluate("performance.getEntriesByName('first-frame').length"):
        page.wait_for_timeout(10)
    return page


def first_frames(browser: Browser, address: str, openings: int) -> list[float]:
    """Seconds from the start of the navigation to the first picture."""
    seconds = []
    for _ in range(openings):
        page = opened(browser, address)
        seconds.append(page.evaluate("performance.getEntriesByName('first-frame')[0].startTime") / 1000)
        page.context.close()
    return seconds


def walk(browser: Browser, address: str, seconds: float) -> float:
    """Pictures painted in a second."""
    page = opened(browser, f"{address}#count=1&steps=student:2")
    page.click("#drift")
    page.wait_for_timeout(1000)
    page.evaluate("seen.frames.length = 0")
    page.wait_for_timeout(1000 * seconds)
    times: list[float] = page.evaluate("seen.frames")
    page.context.close()
    return 1000 * (len(times) - 1) / (times[-1] - times[0])


def slider(browser: Browser, address: str, seconds: float) -> list[float]:
    """Milliseconds from every event that a picture followed from to that picture."""
    page = opened(browser, f"{address}#count=1&steps=student:2&mix=0:100,1:50")
    box = page.locator(".rows input").first.bounding_box()
    assert box is not None, "expected a model with classes"
    y, left, width = box["y"] + box["height"] / 2, box["x"] + 12, box["width"] - 24
    page.mouse.move(left + width, y)
    page.mouse.down()
    end, k = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        k += 1
        page.mouse.move(left + width * abs(1 - 0.02 * (k % 100)), y)
        page.wait_for_timeout(12)
    page.mouse.up()
    found: list[float] = page.evaluate("seen.slides")
    page.context.close()
    return found


def typing(browser: Browser, address: str, seconds: float) -> list[float]:
    """Milliseconds from every key that a picture followed from to that picture, for somebody who types fast."""
    page = opened(browser, f"{address}#count=1&steps=student:2")
    page.focus("#prompt")
    end = time.perf_counter() + seconds
    for text in itertools.cycle(TEXTS):
        if time.perf_counter() > end:
            break
        page.keyboard.type(text, delay=KEY_MS)
        page.keyboard.press("Control+A")
    found: list[float] = page.evaluate("seen.slides")
    page.context.close()
    return found


def reads_words(address: str) -> bool:
    """Whether what is served takes a prompt."""
    with urllib.request.urlopen(f"{address}v1/model") as answer:
        return any(model["prompt_bytes"] for model in json.load(answer)["models"].values())


def measure(browser: Browser, address: str, openings: int, seconds: float) -> dict[str, Any]:
    for part in (first_frames(browser, address, 2), [walk(browser, address, 1.0)]):
        assert part  # the server and the browser are warm
    firsts = first_frames(browser, address, openings)
    rate = walk(browser, address, seconds)
    words = reads_words(address)
    what, most = ("key", 80.0) if words else ("slider", 50.0)
    slides = (typing if words else slider)(browser, address, seconds)
    bars = [
        ("first frame, slowest opening, s", max(firsts), "<=", 1.0),
        *([] if words else [("walk, frames/s", rate, ">=", 30.0)]),
        (f"{what} to picture, 95th percentile, ms", percentile(slides, 0.95), "<=", most),
    ]
    return {
        "first_frame_s": {"median": percentile(firsts, 0.5), "each": firsts},
        "walk_frames_per_second": rate,
        f"{what}_ms": {
            "pictures": len(slides), "p50": percentile(slides, 0.5), "p95": percentile(slides, 0.95), "max": max(slides),
        },
        "bars": [
            {"what": what, "measured": value, "bar": f"{sign} {bar}", "met": value <= bar if sign == "<=" else value >= bar}
            for what, value, sign, bar in bars
        ],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a student that takes classes or words")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--variant", default="auto", help="as in trigflow serve")
    parser.add_argument("--threads", type=int, default=1, help="of the server; the browser wants the other cores")
    parser.add_argument("--openings", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=10.0, help="of walking, and of dragging a slider or typing")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "page.json")
    args = parser.parse_args()
    command = [sys.executable, "-m", "trigflow", "serve", str(args.run), "--port", "0", "--variant", args.variant]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    server = subprocess.Popen([*command, "--device", "cpu"], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = next(line for line in server.stdout if " at http://" in line)
        address = line.split(" at ")[1].split(",")[0]
        with sync_playwright() as playwright:
            options = ["--no-sandbox"] if os.geteuid() == 0 else []
            browser = playwright.chromium.launch(executable_path=args.chromium, args=options)
            figures = measure(browser, f"{address}/", args.openings, args.seconds)
            version = browser.version
            browser.close()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
    result = {
        "command": f"python benchmarks/page.py {shlex.join(sys.argv[1:])}".strip(),
        "machine": {**machine(), "chromium": version, "server_threads": args.threads},
        **figures,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    for bar in result["bars"]:
        print(f"{'met   ' if bar['met'] else 'MISSED'}  {bar['what']:40} {bar['measured']:8.3f}  {bar['bar']}")


if __name__ == "__main__":
    main()
