"""Reference statistics in files: EDM's, EDM2's and our own; what is damaged or dangerous is refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trigflow.evaluation import ReferenceStatistics, gaussian_statistics, read_reference, write_reference
from trigflow.runtime.errors import UserError


def moments(d: int = 5, seed: int = 0) -> dict[str, Any]:
    features = np.random.default_rng(seed).standard_normal((40, d))
    return {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}


def refused(path: Path, *features: str) -> str:
    with pytest.raises(UserError) as caught:
        read_reference(path, *features)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# .npz ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_statistics_as_edm_writes_them(tmp_path: Path, dtype: Any, save: Any) -> None:
    expected = {name: array.astype(dtype) for name, array in moments().items()}
    save(tmp_path / "ref.npz", **expected)
    found = read_reference(tmp_path / "ref.npz")
    assert np.array_equal(found.statistics.mean.numpy(), expected["mu"])
    assert np.array_equal(found.statistics.covariance.numpy(), expected["sigma"])
    assert found.statistics.mean.dtype == found.statistics.covariance.dtype == torch.float64
    assert (found.statistics.n, found.extractor, found.data) == (0, "inception", "")
    assert found.features is None
    assert found.fd_real is None


def test_written_files_are_read_back_and_hold_what_others_look_for(tmp_path: Path) -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    written = ReferenceStatistics(gaussian_statistics(features), features[:7], 0.25, "pixels", "photos.zip")
    write_reference(tmp_path / "ref.npz", written)
    found = read_reference(tmp_path / "ref.npz")
    assert torch.equal(found.statistics.mean, written.statistics.mean)
    assert torch.equal(found.statistics.covariance, written.statistics.covariance)
    assert found.features is not None
    assert torch.equal(found.features, features[:7])
    assert (found.statistics.n, found.fd_real, found.extractor, found.data) == (30, 0.25, "pixels", "photos.zip")
    with np.load(tmp_path / "ref.npz") as plain:  # as EDM's fid.py does
        assert np.array_equal(plain["mu"], written.statistics.mean.numpy())
        assert plain["sigma"].shape == (4, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["ref.npz"]


def test_features_of_another_kind_are_refused(tmp_path: Path) -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    write_reference(tmp_path / "ref.npz", ReferenceStatistics(gaussian_statistics(features), extractor="dinov2"))
    assert read_reference(tmp_path / "ref.npz", "dinov2").extractor == "dinov2"
    assert "is of the features 'dinov2'; expected 'inception'" in refused(tmp_path / "ref.npz", "inception")


def test_a_file_that_does_not_say_its_features_is_taken_at_the_users_word(tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", **moments())
    assert read_reference(tmp_path / "ref.npz", "dinov2").extractor == "dinov2"


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def damaged_moments() -> dict[str, tuple[dict[str, Any], str]]:
    good = moments()
    lopsided = good["sigma"].copy()
    lopsided[0, 1] += 1
    return {
        "no sigma": ({"mu": good["mu"]}, "holds no 'mu' and 'sigma'"),
        "shapes": ({"mu": good["mu"][:4], "sigma": good["sigma"]}, r"mean of shape (4,) and a covariance of shape (5, 5)"),
        "scalar": ({"mu": np.float64(1), "sigma": np.float64(1)}, "mean of shape ()"),
        "empty": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "mean of shape (0,)"),
        "whole numbers": ({name: array.astype(int) for name, array in good.items()}, "has a mean of shape"),
        "not finite": ({**good, "mu": good["mu"] * np.nan}, "not finite"),
        "not symmetric": ({**good, "sigma": lopsided}, "no covariance"),
        "negative variance": ({**good, "sigma": -good["sigma"]}, "no covariance"),
        "text for a number": ({**good, "n": np.str_("many")}, "holds no number 'n'"),
        "number for a text": ({**good, "extractor": np.float64(1)}, "holds no text 'extractor'"),
        "short features": ({**good, "features": np.zeros((3, 4))}, "holds features of type float64 and shape (3, 4)"),
    }


@pytest.mark.parametrize("case", damaged_moments())
def test_npz_that_hold_something_else(tmp_path: Path, case: str) -> None:
    arrays, message = damaged_moments()[case]
    np.savez(tmp_path / "ref.npz", **arrays)
    assert message in refused(tmp_path / "ref.npz")


def test_arrays_of_objects_are_refused_and_nothing_in_them_is_run(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.array([Trap(tmp_path / "sprung")], dtype=object), sigma=np.eye(1))
    assert "damaged array 'mu'" in refused(path)
    assert not (tmp_path / "sprung").exists()


def test_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "ref.npz"
    np.savez(path, **moments())
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert "is damaged" in refused(path)
    place = whole.index(b"NUMPY") + 200
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert "damaged array" in refused(path)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu.npy", b"\x93NUMPY\x01\x00" + buffer.getvalue()[8:])
        archive.writestr("sigma.npy", b"")
    assert "mu" in refused(path)


def test_no_file_at_all(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "ref.npz")
    assert "is a folder; expected a .npz or .pkl; write one with trigflow reference" in refused(tmp_path)
    (tmp_path / "empty").write_bytes(b"")
    assert "is empty; expected reference statistics of EDM or EDM2" in refused(tmp_path / "empty")


# .pkl ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_statistics_as_edm2_writes_them(tmp_path: Path, protocol: int) -> None:
    content = {"num_images": 40, "fid": moments(5), "fd_dinov2": moments(3, seed=1)}
    path = tmp_path / "img512.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    for features, name in ((None, "fid"), ("inception", "fid"), ("dinov2", "fd_dinov2")):
        found = read_reference(path, features)
        assert np.array_equal(found.statistics.mean.numpy(), content[name]["mu"])
        assert np.array_equal(found.statistics.covariance.numpy(), content[name]["sigma"])
        assert (found.statistics.n, found.extractor) == (40, features or "inception")


def test_pickles_without_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "ref.pkl"
    path.write_bytes(pickle.dumps({"fd_dinov2": moments()}))
    assert read_reference(path).extractor == "dinov2"
    assert "no statistics of the features 'inception'; expected one of dinov2" in refused(path, "inception")
    for content in ({}, [], {"fid": 3}, {"fid": {"mu": 3, "sigma": 4}}, {"fid": {"mu": np.zeros(3)}}):
        path.write_bytes(pickle.dumps(content))
        assert "expected statistics with a mean" in refused(path)


def test_pickles_that_would_run_something(tmp_path: Path) -> None:
    path = tmp_path / "ref.pkl"
    path.write_bytes(pickle.dumps({"fid": {**moments(), "mu": Trap(tmp_path / "sprung")}}))
    assert "mkdir" in refused(path)
    assert not (tmp_path / "sprung").exists()


def test_pickles_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "ref.pkl"
    whole = pickle.dumps({"fid": moments(20)})
    for length in (1, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path)
