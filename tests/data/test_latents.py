"""Latents as data: their normalization, what is drawn from them, their files, and training on them."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from training.tiny import differing, state_of, tiny_config
from trigflow.codecs import Latents, Pixels
from trigflow.codecs.vae import VAESource
from trigflow.data import ImageDataset, LatentDataset, measure_latents, open_dataset
from trigflow.models.model import Model, load
from trigflow.runtime.errors import UserError
from trigflow.training.trainer import Trainer

Pack = Callable[[Path], Path]


def moments(n: int = 12, side: int = 8, *, std: bool = True, seed: int = 0) -> Tensor:
    """Means around 1 and deviations around 0.5."""
    generator = torch.Generator().manual_seed(seed)
    means = 1 + 2 * torch.randn(n, 4, side, side, generator=generator)
    return torch.cat([means, torch.rand(n, 4, side, side, generator=generator)], dim=1) if std else means


def dataset(n: int = 12, **options: Any) -> LatentDataset:
    return LatentDataset("latents", moments(n, **options), torch.arange(n) % 2, ("cats", "dogs"))


def write(folder: Path, latents: Tensor, names: list[str] | None = None, content: object = None) -> Path:
    """One `.npy` a latent, and `dataset.json` if there is any content of it."""
    folder.mkdir(exist_ok=True)
    for name, latent in zip(names or [f"{i:03d}.npy" for i in range(len(latents))], latents, strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, latent.numpy())
    if content is not None:
        (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def stored_zip(folder: Path) -> Path:
    """The folder as a zip that nothing is compressed in."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


# What is drawn -------------------------------------------------------------------------------------------------------


def test_a_batch_is_drawn_from_the_posterior() -> None:
    data, indices = dataset(), torch.tensor([3, 0, 3])
    latents, labels = data.batch(indices, generator=torch.Generator().manual_seed(5))
    eps = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    assert latents.equal(data.values[indices, :4] + data.values[indices, 4:] * eps)
    assert labels is not None
    assert labels.tolist() == [1, 0, 1]
    assert not latents[0].equal(latents[2])
    assert data.batch(indices)[0].equal(data.values[indices, :4])


def test_means_alone_are_taken_as_they_are() -> None:
    data, generator = dataset(std=False), torch.Generator().manual_seed(5)
    assert data.batch(torch.tensor([1, 2]), generator=generator)[0].equal(data.values[1:3])
    assert not data.has_std
    assert data.shape == (4, 8, 8)


def test_the_measured_normalization() -> None:
    data = dataset(40)
    normalization = measure_latents(data)
    means, stds = data.values[:, :4].double(), data.values[:, 4:].double()
    torch.testing.assert_close(torch.tensor(normalization.raw_mean).double(), means.mean(dim=(0, 2, 3)))
    variance = means.var(dim=(0, 2, 3), correction=0) + stds.square().mean(dim=(0, 2, 3))
    torch.testing.assert_close(torch.tensor(normalization.raw_std).double(), variance.sqrt())
    generator = torch.Generator().manual_seed(0)
    x0 = normalization.encode(data.batch(torch.arange(40).repeat(20), generator=generator)[0])
    torch.testing.assert_close(x0.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=0.01)
    torch.testing.assert_close(x0.std(dim=(0, 2, 3)), torch.full((4,), 0.5), rtol=0, atol=0.01)


def test_which_codec_for_which_data() -> None:
    latents = dataset()
    images = ImageDataset("photos", torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4))
    assert latents.codec("measured", 0.5) == measure_latents(latents)
    assert latents.codec("edm2", 0.5) == Latents.edm2(latents.shape)
    assert images.codec("symmetric", 0.5) == Pixels.symmetric((3, 4, 4))
    symmetric = dataclasses.replace(latents, vae=VAESource(pixels="symmetric"))
    for data, kind in ((latents, "symmetric"), (symmetric, "edm2"), (images, "edm2")):
        with pytest.raises(UserError, match=r"set (it|data.normalize) to measured"):
            data.codec(kind, 0.5)  # type: ignore[arg-type]
    assert symmetric.codec("measured", 0.5).vae.pixels == "symmetric"  # type: ignore[union-attr]


def test_latents_that_do_not_vary_cannot_be_measured() -> None:
    constant = moments(std=False)
    constant[:, 2] = 0.1
    with pytest.raises(UserError, match=r"channel 2 .* is constant"):
        measure_latents(LatentDataset("flat", constant))
    with pytest.raises(UserError, match="holds no latents"):
        measure_latents(LatentDataset("none", constant[:0]))


def test_what_is_no_latent_data_set() -> None:
    for wrong in (moments()[:, :7], moments()[:, :3], moments().double(), moments()[0]):
        with pytest.raises(UserError, match="encode the images with: trigflow encode"):
            LatentDataset("wrong", wrong)
    with pytest.raises(UserError, match="one label a sample"):
        LatentDataset("wrong", moments(), torch.arange(3), ("a", "b", "c"))
    with pytest.raises(UserError, match=r"turn data\.flip off"):
        dataset().batch(torch.tensor([0]), flip=torch.tensor([True]))


def test_subsets_keep_the_deviations() -> None:
    data = dataset()
    part = data.subset(torch.tensor([4, 1]))
    assert part.values.equal(data.values[[4, 1]])
    assert part.labels is not None
    assert part.labels.tolist() == [0, 1]
    first, second = data.split(0.25, seed=1)
    assert (len(first), len(second)) == (3, 9)
    assert isinstance(first, LatentDataset)
    assert sorted(torch.cat([first.values, second.values])[:, 0, 0, 0].tolist()) == sorted(data.values[:, 0, 0, 0].tolist())


# Files ---------------------------------------------------------------------------------------------------------------


def test_a_folder_or_zip_of_latents(tmp_path: Path, pack: Pack) -> None:
    latents = moments(4)
    folder = write(tmp_path / "photos", latents, ["cats/0.npy", "cats/1.npy", "dogs/0.npy", "dogs/x/1.NPY"])
    data = open_dataset(pack(folder))
    assert isinstance(data, LatentDataset)
    assert data.values.equal(latents)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.class_names == ("cats", "dogs")
    assert data.vae == VAESource()


@pytest.mark.parametrize(("dtype", "order"), [("<f4", "C"), (">f4", "C"), ("<f2", "C"), ("<f8", "F"), ("<f4", "F")])
def test_any_float_is_read(tmp_path: Path, dtype: str, order: Any) -> None:
    latents = moments(1)[0].half().numpy()
    np.save(tmp_path / "0.npy", np.asarray(latents, dtype=dtype, order=order))
    assert open_dataset(tmp_path).values[0].numpy().tolist() == latents.astype(np.float32).tolist()


def test_dataset_json_names_labels_classes_and_autoencoder(tmp_path: Path, pack: Pack) -> None:
    vae = VAESource("some/vae", "symmetric", "0123")
    labels = [["000.npy", 1], ["001.npy", 0]]
    content = {"labels": labels, "latents": {"vae": vae.state(), "class_names": ["cats", "dogs", "eels"]}}
    data = open_dataset(pack(write(tmp_path / "photos", moments(2, std=False), content=content)))
    assert isinstance(data, LatentDataset)
    assert data.vae == vae
    assert data.class_names == ("cats", "dogs", "eels")
    assert data.labels is not None
    assert data.labels.tolist() == [1, 0]


def test_what_passes_the_memory_limit_stays_in_its_zip(tmp_path: Path) -> None:
    latents = moments(10)
    content = {"labels": [[f"{i:03d}.npy", i % 2] for i in range(10)]}
    folder = write(tmp_path / "latents", latents, content=content)
    limit = latents.nbytes / 2**30
    archive = stored_zip(folder)
    inside, outside = (open_dataset(archive, memory_limit_gib=limit), open_dataset(archive, memory_limit_gib=0.99 * limit))
    assert isinstance(inside, LatentDataset)
    assert isinstance(outside, LatentDataset)
    assert inside.rows is None
    assert outside.rows is not None
    assert (len(outside), outside.shape) == (10, (4, 8, 8))
    indices = torch.tensor([7, 2, 7])
    for data in (inside, outside, outside.subset(torch.arange(10)), pickle.loads(pickle.dumps(outside))):
        drawn, labels = data.batch(indices, generator=torch.Generator().manual_seed(1))
        expected, _ = inside.batch(indices, generator=torch.Generator().manual_seed(1))
        assert drawn.equal(expected)
        assert labels is not None
        assert labels.tolist() == [1, 0, 1]
        assert measure_latents(data) == measure_latents(inside)
    assert len(pickle.dumps(outside)) < latents.nbytes / 2
    first, second = outside.split(0.3, seed=0)
    assert first.batch(torch.arange(3))[0].equal(inside.split(0.3, seed=0)[0].batch(torch.arange(3))[0])
    assert len(second) == 7
    with pytest.raises(UserError, match="uncompressed zip"):
        open_dataset(folder, memory_limit_gib=0.99 * limit)
    with zipfile.ZipFile(tmp_path / "packed.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for file in folder.iterdir():
            packed.write(file, file.name)
    with pytest.raises(UserError, match="uncompressed zip"):
        open_dataset(tmp_path / "packed.zip", memory_limit_gib=0.99 * limit)


def test_a_file_that_is_cut_or_of_another_shape_is_not_left_in_its_zip(tmp_path: Path) -> None:
    folder = write(tmp_path / "latents", moments(4))
    whole = (folder / "002.npy").read_bytes()
    (folder / "002.npy").write_bytes(whole[:-4])
    with pytest.raises(UserError, match="zip of whole files"):
        open_dataset(stored_zip(folder), memory_limit_gib=1e-6)
    np.save(folder / "002.npy", moments(1, side=4)[0].numpy())
    with pytest.raises(UserError, match="latents differ in shape"):
        open_dataset(stored_zip(folder), memory_limit_gib=1e-6)
    bad = moments(1)[0]
    bad[0, 0, 0] = math.nan
    np.save(folder / "002.npy", bad.numpy())
    data = open_dataset(stored_zip(folder), memory_limit_gib=1e-6)
    assert bool(data.batch(torch.tensor([0, 3]))[0].isfinite().all())
    with pytest.raises(UserError, match="not finite"):
        data.batch(torch.tensor([0, 2]))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def huge_header() -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (4, 1 << 20, 1 << 20)})
    return file.getvalue() + bytes(64)


GOOD = npy(moments(1)[0].numpy())
NAN = moments(1)[0].numpy()
NAN[3, 0, 0] = math.nan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "1 of 3 latents .* corrupt or truncated: '001.npy'"),
        (GOOD + b"x", "corrupt or truncated"),
        (GOOD[:20], "corrupt or truncated"),
        (b"", "corrupt or truncated"),
        (b"PK\3\4" + GOOD, "corrupt or truncated"),
        (GOOD.replace(b"'shape'", b"'shave'"), "corrupt or truncated"),
        (huge_header(), "corrupt or truncated"),
        (npy(np.zeros((3, 8, 8), np.float32)), r"array of type float32 and shape \(3, 8, 8\)"),
        (npy(np.zeros((9, 8, 8), np.float32)), r"shape \(9, 8, 8\)"),
        (npy(np.zeros((8, 8), np.float32)), r"shape \(8, 8\)"),
        (npy(np.zeros((4, 0, 8), np.float32)), r"shape \(4, 0, 8\)"),
        (npy(np.zeros((8, 8, 8), np.int32)), "type int32"),
        (npy(np.zeros((8, 8, 8), np.complex64)), "type complex64"),
        (npy(moments(1, side=4)[0].numpy()), "latents differ in shape: '000.npy' is .* and '001.npy' is"),
        (npy(moments(1, std=False)[0].numpy()), "latents differ in shape"),
        (npy(NAN), "'001.npy' holds values that are not finite"),
        (npy(-moments(1)[0].numpy()), "negative standard deviations"),
    ],
)
def test_a_file_that_is_no_latent(tmp_path: Path, pack: Pack, content: bytes, message: str) -> None:
    folder = write(tmp_path / "photos", moments(3))
    (folder / "001.npy").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(pack(folder))
    assert "\n" not in str(error.value)


def test_pickled_objects_are_never_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", moments(2))
    trap = np.empty(1, dtype=object)
    trap[0] = Touch(tmp_path / "touched")
    np.save(folder / "001.npy", trap, allow_pickle=True)
    with pytest.raises(UserError, match="corrupt"):
        open_dataset(folder)
    assert not (tmp_path / "touched").exists()


def test_corrupt_latents_can_be_left_out(tmp_path: Path, pack: Pack) -> None:
    latents = moments(4)
    folder = write(tmp_path / "photos", latents, content={"labels": [[f"{i:03d}.npy", i] for i in range(4)]})
    (folder / "000.npy").write_bytes(GOOD[:-1])
    data = open_dataset(pack(folder), skip_corrupt=True)
    assert data.values.equal(latents[1:])
    assert data.skipped == ("000.npy",)
    assert data.labels is not None
    assert data.labels.tolist() == [1, 2, 3]
    for file in folder.glob("*.npy"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"all 4 latents .* are corrupt"):
        open_dataset(folder, skip_corrupt=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [["000.npy", 0]]}, "leaves out 1"),
        ({"labels": [["000.npy", 0], ["001.npy", 1], ["002.npy", 1]]}, "names 1 .*not there"),
        ({"labels": None, "latents": 3}, '"latents" that are none'),
        ({"labels": None, "latents": {"class_names": [1]}}, '"latents" that are none'),
        ({"labels": None, "latents": {"class_names": []}}, "an autoencoder saved as None"),
        (
            {"labels": [["000.npy", 0], ["001.npy", 1]], "latents": {"vae": VAESource().state(), "class_names": ["a"]}},
            "names 1 classes and has labels up to 1",
        ),
    ],
)
def test_a_dataset_json_that_does_not_match(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_dataset(write(tmp_path / "photos", moments(2), content=content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no table"),
        ("{", "cannot be read"),
        ('{"format": 99}', "update trigflow"),
        ("{}", "names no reader of captions"),
    ],
)
def test_a_damaged_cache_of_a_teacher(tmp_path: Path, content: str, message: str) -> None:
    stored_zip(write(tmp_path / "photos", moments(2))).rename(tmp_path / "latents.zip")
    with zipfile.ZipFile(tmp_path / "latents.zip", "a") as archive:
        archive.writestr("metadata.jsonl", json.dumps({"file_name": "000.npy", "text": "a cat"}))
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def test_latents_have_a_size_already(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", moments(2))
    with pytest.raises(UserError, match="encode the images anew"):
        open_dataset(folder, resize=4)
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    with pytest.raises(UserError, match=r"holds latents \('000.npy'\) and images \('a.png'\)"):
        open_dataset(folder)


# Training ------------------------------------------------------------------------------------------------------------


def trainer(folder: Path, changes: dict[str, Any] | None = None, **options: Any) -> Trainer:
    options = {"dataset": dataset(), **options}
    return Trainer(tiny_config(changes), folder, progress=False, **options)


def test_a_resumed_run_draws_the_same_latents(tmp_path: Path) -> None:
    straight = trainer(tmp_path / "straight")
    straight.run()
    trainer(tmp_path / "halted", {"loop.iterations": 3}).run()
    resumed = trainer(tmp_path / "halted", resume=True)
    assert resumed.iteration == 3
    resumed.run()
    assert differing(state_of(straight), state_of(resumed)) == []
    means = trainer(tmp_path / "means", dataset=dataclasses.replace(dataset(), values=dataset().values[:, :4]))
    means.run()
    assert differing(state_of(straight), state_of(means)) != []


def test_a_run_on_latents_says_so_in_its_model(tmp_path: Path) -> None:
    vae = VAESource("some/vae", "unit", "0123")
    trainer(tmp_path / "run", {"data.normalize": "edm2"}, dataset=dataclasses.replace(dataset(), vae=vae)).run()
    model = load(tmp_path / "run", "cpu")
    assert model.shape == (4, 8, 8)
    assert model.codec == Latents((4, 8, 8), vae=vae)
    assert model.class_names == ("cats", "dogs")
    latents = model.sample(3, steps=2, decode=False)
    assert latents.shape == (3, 4, 8, 8)
    assert latents.dtype == torch.float32


def test_without_its_autoencoder_a_run_goes_on_without_grids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    run = trainer(tmp_path / "run", {"loop.sample_every": 2})
    run.run()
    assert not (tmp_path / "run" / "samples").exists()
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert 'pip install "trigflow[latents]"' in warnings[0]
    assert (tmp_path / "run" / "model.json").is_file()


def test_settings_that_latents_do_not_take(tmp_path: Path) -> None:
    for changes, message in (
        ({"data.flip": True}, r"turn data\.flip off"),
        ({"data.normalize": "symmetric"}, r"set data\.normalize to measured"),
    ):
        with pytest.raises(UserError, match=message):
            trainer(tmp_path / "run", changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "teacher", "message"),
    [
        (VAESource("a"), VAESource("a", "symmetric"), "--pixels symmetric"),
        (VAESource("a", digest="1"), VAESource("b", digest="2"), "--vae b"),
        (VAESource("a", digest="1"), VAESource("b", digest="1"), None),
        (VAESource("a", digest="1"), VAESource("b"), None),
    ],
)
def test_a_teacher_of_another_autoencoder(tmp_path: Path, data: VAESource, teacher: VAESource, message: str | None) -> None:
    model = trainer(tmp_path / "teacher", {"loop.iterations": 1}, dataset=dataclasses.replace(dataset(), vae=teacher)).run()
    config = dataclasses.replace(tiny_config({"objective.kind": "scd"}), teacher="teacher", network=model.spec)
    latents = dataclasses.replace(dataset(), vae=data)
    if message is None:
        student = Trainer(config, tmp_path / "student", teacher=model, dataset=latents, progress=False)
        assert student.codec == model.codec
        return
    with pytest.raises(UserError, match=message):
        Trainer(config, tmp_path / "student", teacher=model, dataset=latents, progress=False)
    assert not (tmp_path / "student").exists()


def test_a_model_of_images_has_no_latents() -> None:
    from training.tiny import untrained_teacher

    model: Model = untrained_teacher()
    assert torch.equal(model.sample(1, decode=False), model.sample(1))  # bytes are what is stored
    with pytest.raises(UserError, match="expected a model of latents; drop --vae"):
        model.codec.with_autoencoder("some/vae")
