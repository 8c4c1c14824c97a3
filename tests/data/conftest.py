"""Images made on the spot, as a folder or as a zip of it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Save = Callable[..., Path]
Pack = Callable[[Path], Path]


@pytest.fixture
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The `datasets` library without a network and progress bars, and with a cache that goes with the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    datasets.disable_progress_bars()


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """`save("cats/1.png", value, size=(w, h))` writes an image of one gray level or colour under `tmp_path / "photos"`.

    An array or a Pillow image is written as it is.
    """

    def write(name: str, content: object, size: tuple[int, int] = (4, 4), **options: object) -> Path:
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            image = Image.fromarray(content)
        elif isinstance(content, Image.Image):
            image = content
        else:
            image = Image.new("L" if isinstance(content, int) else "RGB", size, content)
        image.save(path, **options)
        return path

    return write


def pack_zip(folder: Path) -> Path:
    path = folder.parent / "photos.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        # Written backwards, so that nothing can lean on the order inside.
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.fixture(params=["folder", "zip"])
def pack(request: pytest.FixtureRequest) -> Pack:
    """Hands a folder on as it is, or as a zip of its contents: every test that uses it runs with both."""
    return pack_zip if request.param == "zip" else lambda folder: folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TRIGFLOW_CACHE", str(folder))
    return folder
