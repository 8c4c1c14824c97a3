"""Checkpoints whose files are not what was written."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from fault_cases.runs import Bench, Trial, copy, expect, last_lines, newest, one_line, read

WAYS = ("bit flipped", "truncated", "emptied", "gone")


def damages(bench: Bench, count: int) -> Iterator[Trial]:
    """The newest checkpoint of a run is damaged, and at last all of them."""
    for i in range(count - 2):
        way = WAYS[0] if i % 2 else WAYS[1 + i // 2 % 3]
        yield Trial(f"checkpoint {i}, {way}", functools.partial(_one, bench, i, way))
    for i in range(count - 2, count):
        yield Trial(f"checkpoint {i}, all bit flipped", functools.partial(_all, bench, i))


def _one(bench: Bench, index: int, way: str, folder: Path) -> dict[str, Any]:
    """Refused by `--resume`; `--resume auto` says so in a line and goes on from the one before."""
    random = bench.random("damage", index)
    out = copy(bench.finished(), folder / "run")
    files = sorted(path for path in newest(out).rglob("*") if path.is_file())
    file = random.choice(files)
    before = read(file) if file.suffix == ".json" else None
    harm(file, way, random)
    if before is not None and way == WAYS[0] and _reads(file) == before:
        return {"harmless": 1}  # another way to write the same number
    strict = bench.start(out, "--resume")
    if way == "gone" and file.name == "state.json":  # written last: without it there is no checkpoint
        strict.ends_well()
        bench.check_same(out)
        return {"unfinished": 1}
    said = strict.ends_with_one_line()
    expect(newest(out).name in said, f"the checkpoint is not named: {said}")
    command = bench.resume(out)
    warned = [line for line in command.said().splitlines() if "warning" in line]
    expect(len(warned) == 1 and newest(out).name in warned[0], f"not one warning: {last_lines(command.said())}")
    bench.check_same(out)
    return {"refused": 1}


def _all(bench: Bench, index: int, folder: Path) -> dict[str, Any]:
    """Nothing is left to go on from: `--resume auto` begins anew, and ends the same."""
    random = bench.random("damage", index)
    out = copy(bench.finished(), folder / "run")
    for path in sorted((out / "checkpoints").glob("*/*.safetensors")):
        harm(path, WAYS[0], random)
    said = one_line(_refused(bench, out))
    bench.resume(out)
    bench.check_same(out)
    expect("checksum" in said, f"no word of a checksum: {said}")
    return {"refused": 1}


def _refused(bench: Bench, out: Path) -> str:
    command = bench.start(out, "--resume")
    command.ends_with_one_line()
    return command.said()


def _reads(file: Path) -> Any:
    try:
        return read(file)
    except ValueError:
        return None


def harm(file: Path, way: str, random: Random) -> None:
    """Damage a file in one of `WAYS`."""
    content = bytearray(file.read_bytes())
    if way == "gone":
        file.unlink()
        return
    if way == "bit flipped":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    elif way == "truncated":
        del content[random.randrange(1, len(content)) :]
    else:
        content.clear()
    file.write_bytes(content)
