"""What generated images are held against, in a file: statistics of the features of real images.

Two forms are read. None of them is executed, and pickled objects are never built:

* `.npz` with arrays `mu` `(d,)` and `sigma` `(d, d)`, as EDM and most tools for the FID write them. `write_reference` adds `n`,
  the names of the features and of the data, the distance between two halves of the real images, and, where they are wanted, the
  features of some of them; other tools pass over those.
* `.pkl` of EDM2, a dictionary from a metric (`fid`, `fd_dinov2`) to its `mu` and `sigma`.
"""

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trigflow.evaluation.frechet import GaussianStatistics
from trigflow.runtime.errors import UserError, first_line
from trigflow.runtime.files import replacing

EDM2_METRICS = {"fid": "inception", "fd_dinov2": "dinov2"}
"""Names of metrics in EDM2's files, and the features that they are distances of."""
MAX_BYTES = 8 << 30
"""Largest array that is read: the features of a million images at 2,048 dimensions."""
SYMMETRIC = 1e-5
"""How far a covariance may be from symmetric, relative to its largest entry; statistics in float32 are off by rounding."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Real images in feature space.

    Attributes:
        statistics: mean and covariance of their features; n is 0 where the file does not say it.
        features: features of the images, or of some of them, `(m, d)`, for precision and recall; None without.
        fd_real: Frechet distance between two halves of the images, see `Scores`; None where it was not measured.
        extractor: name of the features.
        data: name of the data set; empty where it is not known.
    """

    statistics: GaussianStatistics
    features: Tensor | None = None
    fd_real: float | None = None
    extractor: str = "inception"
    data: str = ""


def read_reference(path: str | Path, features: str | None = None) -> ReferenceStatistics:
    """The statistics in a `.npz` or `.pkl` file.

    Args:
        path: the file.
        features: which features, where the file says it or holds several; None takes what it holds, `inception` first.

    Raises:
        UserError: when the file is missing, damaged, no such file, or of other features.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"reference '{path}' is a folder; expected a .npz or .pkl; write one with trigflow reference")
    if not path.is_file():
        raise UserError(f"reference '{path}' does not exist; expected a file of statistics (.npz or .pkl); check the path")
    with path.open("rb") as file:
        packed = file.read(4) == b"PK\3\4"
    try:
        return _read_npz(path, features) if packed else _read_pickle(path, features)
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror or error})") from None


def write_reference(path: str | Path, reference: ReferenceStatistics) -> None:
    """Write a `.npz` atomically; `mu` and `sigma` are float64, features float32.

    Raises:
        UserError: when it cannot be written.
    """
    statistics = reference.statistics
    arrays: dict[str, Any] = {
        "mu": statistics.mean.cpu().numpy(),
        "sigma": statistics.covariance.cpu().numpy(),
        "n": np.int64(statistics.n),
        "extractor": np.str_(reference.extractor),
        "data": np.str_(reference.data),
    }
    if reference.fd_real is not None:
        arrays["fd_real"] = np.float64(reference.fd_real)
    if reference.features is not None:
        arrays["features"] = reference.features.cpu().float().numpy()
    with replacing(Path(path)) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _read_npz(path: Path, features: str | None) -> ReferenceStatistics:
    try:
        with zipfile.ZipFile(path) as archive:
            found = {name.removesuffix(".npy") for name in archive.namelist()}
            if not {"mu", "sigma"} <= found:
                raise _refusal(path, "holds no 'mu' and 'sigma'")
            wanted = found & {"mu", "sigma", "n", "extractor", "data", "fd_real", "features"}
            arrays = {name: _array(path, archive, name) for name in sorted(wanted)}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise _refusal(path, f"is damaged ({first_line(error)})") from None
    extractor = _single(path, arrays, "extractor") or features or "inception"
    if features is not None and features != extractor:
        raise UserError(
            f"reference '{path}' is of the features '{extractor}'; expected '{features}'; choose --features {extractor}, or "
            "another file"
        )
    statistics = _statistics(path, arrays["mu"], arrays["sigma"], int(_single(path, arrays, "n") or 0))
    kept = arrays.get("features")
    if kept is not None and (kept.dtype.kind != "f" or kept.ndim != 2 or kept.shape[1] != len(statistics.mean)):
        raise _refusal(path, f"holds features of type {kept.dtype} and shape {kept.shape}")
    return ReferenceStatistics(
        statistics,
        None if kept is None else torch.from_numpy(kept.astype(np.float32)),
        _single(path, arrays, "fd_real"),
        extractor,
        _single(path, arrays, "data") or "",
    )


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> Array:
    """An array of the archive; arrays of objects are refused."""
    info = archive.getinfo(f"{name}.npy")
    if info.file_size > MAX_BYTES:
        raise _refusal(path, f"unpacks to {info.file_size} bytes of '{name}'")
    if info.flag_bits & 1:
        raise _refusal(path, "is encrypted")
    try:
        data: Array = np.lib.format.read_array(io.BytesIO(archive.read(info)), allow_pickle=False)
    except MemoryError:
        raise _refusal(path, f"announces more numbers in '{name}' than it holds") from None
    except Exception as error:  # damaged headers end in all kinds of exceptions
        raise _refusal(path, f"has a damaged array '{name}' ({first_line(error)})") from None
    return data


def _single(path: Path, arrays: dict[str, Array], name: str) -> Any:
    """The text or number of this name; None without one."""
    if name not in arrays:
        return None
    array, text = arrays[name], name in ("extractor", "data")
    if array.shape != () or array.dtype.kind not in ("U" if text else "fiu") or not (text or np.isfinite(array)):
        raise _refusal(path, f"holds no {'text' if text else 'number'} '{name}'")
    return array.item()


def _read_pickle(path: Path, features: str | None) -> ReferenceStatistics:
    """Statistics of EDM2, read as data: see `trigflow.models.pretrained.unpickle`."""
    from trigflow.models.pretrained.records import ArrayShell, StoredArray, read_pickle
    from trigflow.models.pretrained.unpickle import Source

    with path.open("rb") as file:
        source = Source(path, file, "reference statistics of EDM or EDM2 (.npz or .pkl)")
        content = read_pickle(source)
        entries = content if isinstance(content, dict) else {}
        found = {EDM2_METRICS[name]: entry for name, entry in entries.items() if name in EDM2_METRICS}
        if not found:
            raise _refusal(path, f"holds none of {', '.join(EDM2_METRICS)}")
        extractor = features or next(name for name in EDM2_METRICS.values() if name in found)
        if extractor not in found:
            raise UserError(
                f"reference '{path}' has no statistics of the features '{extractor}'; expected one of {', '.join(found)}; "
                "choose one of those with --features"
            )
        arrays = {}
        for name in ("mu", "sigma"):
            entry = found[extractor].get(name) if isinstance(found[extractor], dict) else None
            array = entry.array if isinstance(entry, ArrayShell) else entry
            if not isinstance(array, StoredArray):
                raise _refusal(path, f"holds no array '{name}' for '{extractor}'")
            arrays[name] = array.read(source)
    count = entries.get("num_images")
    n = count if isinstance(count, int) else 0
    return ReferenceStatistics(_statistics(path, arrays["mu"], arrays["sigma"], n), extractor=extractor)


def _statistics(path: Path, mean: Array, covariance: Array, n: int) -> GaussianStatistics:
    shapes = mean.ndim == 1 and covariance.shape == (len(mean), len(mean)) and len(mean) > 0
    if not shapes or mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise _refusal(path, f"has a mean of shape {mean.shape} and a covariance of shape {covariance.shape}")
    mu, sigma = (torch.from_numpy(array.astype(np.float64)) for array in (mean, covariance))
    if not bool(mu.isfinite().all() and sigma.isfinite().all()):
        raise _refusal(path, "holds numbers that are not finite")
    if float((sigma - sigma.T).abs().max()) > SYMMETRIC * float(sigma.abs().max()) or bool((sigma.diag() < 0).any()):
        raise _refusal(path, "holds a 'sigma' that is no covariance")
    return GaussianStatistics(mu, sigma, n)


def _refusal(path: Path, fault: str) -> UserError:
    return UserError(
        f"reference '{path}' {fault}; expected statistics with a mean 'mu' (d,) and a covariance 'sigma' (d, d), in a .npz or "
        "in EDM2's .pkl; write one with: trigflow reference"
    )
