"""Images to latents, a run on them, and pictures out of it again, through the command line."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import programs
from tiny_vae import reference_vae, write_images, write_vae
from trigflow.codecs.vae import VAE, VAESource
from trigflow.data import LatentDataset, open_dataset
from trigflow.data.encode import encode_images, renew_captions
from trigflow.models.model import load
from trigflow.runtime.errors import UserError

Cli = Callable[..., Any]

NAMES = [f"{name}/{i}.png" for name in ("cats", "dogs") for i in range(5)]
TINY = ["--loop.iterations", "4", "--loop.batch-size", "4", "--loop.sample-every", "4", "--network.width", "8"]
TINY += ["--network.mult", "1", "2", "--network.blocks", "1", "--network.attention", "1", "--network.conditioning.width", "8"]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "images", NAMES)


@pytest.fixture(scope="module")
def latents(vae: Path, images: Path) -> Path:
    """The images as latents, three at a time; not to be changed."""
    out = vae.parent / "latents.zip"
    assert encode_images(images, out, vae=str(vae), batch_size=3) == len(NAMES)
    return out


@pytest.fixture(scope="module")
def run(latents: Path) -> Path:
    """A finished run on the latents; not to be changed."""
    from trigflow.cli import main

    main(["train", "--data", str(latents), "--out", str(latents.parent / "run"), "--quiet", *TINY])
    return latents.parent / "run"


def pixels(folder: Path) -> Tensor:
    """The images in the order of their names, uint8 `(n, 3, h, w)`."""
    return torch.stack([torch.from_numpy(np.array(Image.open(folder / name))).permute(2, 0, 1) for name in NAMES])


# The autoencoder -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("range_", ["unit", "symmetric"])
def test_moments_are_those_of_diffusers(vae: Path, images: Path, range_: Any) -> None:
    bytes_ = pixels(images)
    given = bytes_.float() / 255 if range_ == "unit" else bytes_.float() / 127.5 - 1
    network = reference_vae(vae)
    with torch.no_grad():
        posterior = network.encode(given).latent_dist
        decoded = network.decode(posterior.mean).sample
    ours = VAE(VAESource(str(vae), range_), batch_size=4)
    torch.testing.assert_close(ours.encode(bytes_), torch.cat([posterior.mean, posterior.std], dim=1), rtol=0, atol=1e-6)
    back = (decoded * 255 if range_ == "unit" else (decoded + 1) * 127.5).clamp(0, 255)
    again = ours.decode(posterior.mean)
    assert again.dtype == torch.uint8
    assert again.shape == bytes_.shape
    torch.testing.assert_close(again.float(), back, rtol=0, atol=0.501)


def test_the_weights_have_a_fingerprint(vae: Path, tmp_path: Path) -> None:
    digest = VAE(VAESource(str(vae))).digest()
    assert VAE(VAESource(str(write_vae(tmp_path / "same")))).digest() == digest
    other = write_vae(tmp_path / "other", seed=1)
    assert VAE(VAESource(str(other))).digest() != digest
    state = torch.random.get_rng_state()
    VAE(VAESource(str(vae), digest=digest)).load()
    assert torch.random.get_rng_state().equal(state)
    with pytest.raises(UserError, match="is not the one that these latents were made with"):
        VAE(VAESource(str(other), digest=digest)).load()


def test_older_files_name_their_attention_otherwise(vae: Path, tmp_path: Path) -> None:
    weights = write_vae(tmp_path / "older") / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(weights).items():
        now = next((now for now in older if f".{now}." in name), None)
        renamed[name if now is None else name.replace(now, older[now])] = value
    assert sum("query" in name for name in renamed) == 4
    save_file(renamed, weights, {"format": "pt"})
    assert VAE(VAESource(str(tmp_path / "older"))).digest() == VAE(VAESource(str(vae))).digest()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_channels": 16}, "latents of 16 and back into 3; expected 3, 4 and 3"),
        ({"in_channels": 1, "out_channels": 1}, "turns 1 channels"),
    ],
)
def test_an_autoencoder_of_other_channels(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VAE(VAESource(str(write_vae(tmp_path / "vae", **changes)))).load()


def test_a_folder_that_is_no_autoencoder(tmp_path: Path, vae: Path) -> None:
    folder = write_vae(tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be loaded"):
        VAE(VAESource(str(folder))).load()
    weights.unlink()
    torch.save(reference_vae(vae).state_dict(), folder / "diffusion_pytorch_model.bin")  # pickles are not read
    with pytest.raises(UserError, match="cannot be loaded"):
        VAE(VAESource(str(folder))).load()
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(UserError, match="has not the weights of an AutoencoderKL"):
        VAE(VAESource(str(folder))).load()


def test_shapes_that_it_does_not_take(vae: Path) -> None:
    ours = VAE(VAESource(str(vae)))
    for wrong in (torch.zeros(1, 3, 15, 16), torch.zeros(1, 1, 16, 16), torch.zeros(3, 16, 16)):
        with pytest.raises(UserError, match="height and width multiples of 2"):
            ours.encode(wrong.to(torch.uint8))
    with pytest.raises(UserError, match="give latents, not images"):
        ours.decode(torch.zeros(1, 3, 8, 8))


# The zip -------------------------------------------------------------------------------------------------------------


def test_the_layout_of_the_zip(latents: Path, images: Path, vae: Path) -> None:
    with zipfile.ZipFile(latents) as archive:
        assert archive.testzip() is None
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
        stored = [name.replace(".png", ".npy") for name in NAMES]
        assert archive.namelist() == ["dataset.json", *stored]
        arrays = [np.load(io.BytesIO(archive.read(name)), allow_pickle=False) for name in stored]
        content = json.loads(archive.read("dataset.json"))
    assert content["labels"] == [[name, int(name.startswith("dogs"))] for name in stored]
    assert content["latents"]["class_names"] == ["cats", "dogs"]
    assert {(array.shape, array.dtype.str) for array in arrays} == {((8, 8, 8), "<f4")}
    expected = VAE(VAESource(str(vae))).encode(pixels(images))
    torch.testing.assert_close(torch.from_numpy(np.stack(arrays)), expected, rtol=0, atol=1e-6)
    data = open_dataset(latents)
    assert isinstance(data, LatentDataset)
    assert data.vae == VAESource(str(vae), "unit", VAE(VAESource(str(vae))).digest())
    assert data.class_names == ("cats", "dogs")


def test_a_zip_of_images_without_labels(tmp_path: Path, vae: Path, cli: Cli) -> None:
    folder = write_images(tmp_path / "flat", ["b.png", "a.png"], side=20)
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    out = tmp_path / "new" / "latents.zip"
    result = cli("encode", tmp_path / "flat.zip", "--out", out, "--vae", vae, "--resize", 8, "--quiet")
    assert (result.code, result.err) == (0, "")
    assert "2 latents in" in result.out
    data = open_dataset(out)
    assert (len(data), data.shape, data.labels) == (2, (4, 4, 4), None)
    resized = open_dataset(folder, resize=8)
    torch.testing.assert_close(data.values, VAE(VAESource(str(vae))).encode(resized.values), rtol=0, atol=1e-6)


def test_gray_images_are_made_rgb(tmp_path: Path, vae: Path) -> None:
    (tmp_path / "gray").mkdir()
    Image.new("L", (8, 8), 77).save(tmp_path / "gray" / "0.png")
    encode_images(tmp_path / "gray", tmp_path / "latents.zip", vae=str(vae))
    expected = VAE(VAESource(str(vae))).encode(torch.full((1, 3, 8, 8), 77, dtype=torch.uint8))
    torch.testing.assert_close(open_dataset(tmp_path / "latents.zip").values, expected, rtol=0, atol=1e-6)


# Interrupted ---------------------------------------------------------------------------------------------------------


def test_cut_anywhere_it_goes_on_to_the_same_file(latents: Path, images: Path, vae: Path, tmp_path: Path) -> None:
    whole = latents.read_bytes()
    out = tmp_path / "latents.zip"
    partial = tmp_path / "latents.zip.partial"
    cuts = np.random.default_rng(0).integers(0, len(whole), 12).tolist()
    for cut in [0, 2, 40, *cuts, len(whole) - 1, len(whole)]:
        partial.write_bytes(whole[:cut])
        encode_images(images, out, vae=str(vae), batch_size=3)
        assert out.read_bytes() == whole, cut
        assert not partial.exists()
        out.unlink()


def test_garbage_behind_the_last_batch_is_done_again(latents: Path, images: Path, vae: Path, tmp_path: Path) -> None:
    whole = bytearray(latents.read_bytes())
    whole[len(whole) // 2] ^= 1
    out = tmp_path / "latents.zip"
    (tmp_path / "latents.zip.partial").write_bytes(whole)
    encode_images(images, out, vae=str(vae), batch_size=3)
    assert out.read_bytes() == latents.read_bytes()


def test_finished_batches_are_not_encoded_again(
    latents: Path, images: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    encode = VAE.encode

    def counting(self: VAE, batch: Tensor) -> Tensor:
        if sum(counts) >= 6:
            raise KeyboardInterrupt
        counts.append(len(batch))
        return encode(self, batch)

    monkeypatch.setattr(VAE, "encode", counting)
    out = tmp_path / "latents.zip"
    with pytest.raises(KeyboardInterrupt):
        encode_images(images, out, vae=str(vae), batch_size=3)
    assert counts == [3, 3]
    assert not out.exists()
    counts.clear()
    encode_images(images, out, vae=str(vae), batch_size=3)
    assert counts == [3, 1]
    assert out.read_bytes() == latents.read_bytes()


def test_killed_and_run_again(vae: Path, tmp_path: Path, cli: Cli) -> None:
    folder = write_images(tmp_path / "images", [f"{i:04d}.png" for i in range(80)], side=32)
    out, partial = tmp_path / "latents.zip", tmp_path / "latents.zip.partial"
    command = ["-m", "trigflow", "encode", folder, "--vae", vae, "--out", out, "--batch-size", "1"]
    process = programs.start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size > 8_000):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert partial.exists()
    assert not out.exists()
    assert cli(*command[2:], "--quiet").code == 0
    assert not partial.exists()
    again = tmp_path / "again.zip"
    encode_images(folder, again, vae=str(vae), batch_size=1)
    assert out.read_bytes() == again.read_bytes()


def test_other_settings_or_images_are_noticed(latents: Path, vae: Path, tmp_path: Path, cli: Cli) -> None:
    folder, out = write_images(tmp_path / "images", NAMES), tmp_path / "latents.zip"
    partial = tmp_path / "latents.zip.partial"
    half = latents.read_bytes()[: latents.stat().st_size // 2]
    other = write_vae(tmp_path / "other", seed=1)

    def refused(message: str, *options: object) -> None:
        partial.write_bytes(half)
        result = cli("encode", folder, "--out", out, "--vae", vae, "--batch-size", 3, "--quiet", *options)
        assert result.code == 2
        assert result.err.count("\n") == 1
        assert message in result.err
        assert partial.read_bytes() == half
        assert not out.exists()

    refused("vae name", "--vae", other)
    refused("vae pixels unit, now it is symmetric", "--pixels", "symmetric")
    refused("batch_size 3, now it is 2", "--batch-size", 2)
    refused("size [16, 16], now it is [8, 8]", "--resize", 8)
    saved = (folder / "cats" / "1.png").read_bytes()
    write_images(folder, ["cats/1.png"], seed=9)
    refused("holds the latent of another image 'cats/1.png'")
    (folder / "cats" / "1.png").write_bytes(saved)
    write_images(folder, ["dogs/9.png"])
    refused("begun with other images or labels")
    half = b"my precious notes"
    refused("is no unfinished zip of latents")


def test_the_same_name_with_other_weights_is_noticed(latents: Path, images: Path, tmp_path: Path) -> None:
    folder, out = write_vae(tmp_path / "vae"), tmp_path / "latents.zip"
    encode_images(images, out, vae=str(folder))
    half = out.read_bytes()[:12_000]
    out.unlink()
    (tmp_path / "latents.zip.partial").write_bytes(half)
    write_vae(folder, seed=1)
    with pytest.raises(UserError, match="was begun with vae digest"):
        encode_images(images, out, vae=str(folder))


def test_a_disk_that_is_full_while_captions_are_renewed(latents: Path, images: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "latents.zip"
    shutil.copytree(images, folder)
    shutil.copy(latents, out)
    (folder / "cats" / "0.txt").write_text("a cat")
    full = mock.patch("zipfile.ZipFile.writestr", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    with full, pytest.raises(UserError, match=r"cannot write .*latents.zip.partial' \(No space left on device\); expected"):
        renew_captions(out, str(folder), True)
    with mock.patch("trigflow.codecs.vae.VAE.encode", side_effect=AssertionError):  # it goes on from what is there
        assert encode_images(folder, out, vae=str(latents.parent / "vae"), batch_size=3) == len(NAMES)
    assert open_dataset(out).captions is not None


def test_a_source_that_was_damaged_meanwhile(vae: Path, images: Path, tmp_path: Path) -> None:
    packed, out = tmp_path / "images.zip", tmp_path / "latents.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for name in NAMES:
            archive.write(images / name, name)
    encode_images(packed, out, vae=str(vae), batch_size=3)
    out.rename(tmp_path / "latents.zip.partial")
    content = packed.read_bytes()
    packed.write_bytes(content.replace((images / NAMES[1]).read_bytes(), b"".ljust((images / NAMES[1]).stat().st_size)))
    with pytest.raises(UserError, match=rf"latents.zip.partial' holds the latent of another image '{NAMES[1]}'; expected"):
        encode_images(packed, out, vae=str(vae), batch_size=3)
    with pytest.raises(UserError, match=rf"'{NAMES[1]}' in .*images.zip' is corrupt or truncated; expected a whole PNG"):
        encode_images(packed, tmp_path / "others.zip", vae=str(vae), batch_size=3)


@pytest.mark.parametrize("batch", [1, 3])
def test_two_encodings_at_once(latents: Path, vae: Path, images: Path, tmp_path: Path, batch: int) -> None:
    out, encode, batches = tmp_path / "latents.zip", VAE.encode, []

    def and_begin_another(self: VAE, stored: Tensor) -> Tensor:
        batches.append(stored)
        if len(batches) == batch:
            with pytest.raises(UserError, match=r"another process writes .*latents.zip.partial'; expected one at a time"):
                encode_images(images, out, vae=str(vae), batch_size=3)
        return encode(self, stored)

    with mock.patch.object(VAE, "encode", and_begin_another):
        encode_images(images, out, vae=str(vae), batch_size=3)
    assert out.read_bytes() == latents.read_bytes()


def test_a_folder_where_the_unfinished_zip_goes(vae: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "latents.zip.partial").mkdir()
    with pytest.raises(UserError, match=r"latents.zip.partial'.*there is a folder of that name"):
        encode_images(images, tmp_path / "latents.zip", vae=str(vae))


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["empty"], "no images found"),
        (["nothing"], "no data named 'nothing' and nothing at that path"),
        (["odd"], "height and width multiples of 2"),
        (["mixed"], "images differ in size: '0.png' is 16x16 and '1.png' is 8x8"),
        (["twins"], "would give one latent of the same name"),
        (["broken"], "'0.png' in 'broken' is corrupt or truncated"),
        (["good", "--out", "latents.npz"], "expected the name of a .zip"),
        (["good", "--out", "good.zip"], "already exists"),
        (["good", "--batch-size", "0"], "batch size 0"),
        (["good", "--resize", "0"], "resize 0"),
        (["good", "--vae", "empty"], "empty' cannot be loaded"),
        (["good", "--vae", "no/such/vae"], "the VAE 'no/such/vae' cannot be loaded"),
        (["good", "--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["good", "--pixels", "dim"], "invalid choice"),
    ],
)
def test_mistakes_write_nothing(
    options: list[str], message: str, tmp_path: Path, vae: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "good.zip").write_bytes(b"mine")
    for name, side in (("good", 16), ("odd", 15), ("broken", 16), ("mixed", 16)):
        write_images(tmp_path / name, ["0.png"], side=side)
    write_images(tmp_path / "mixed", ["1.png"], side=8)
    write_images(tmp_path / "twins", ["a.png", "a.webp"])
    (tmp_path / "broken" / "0.png").write_bytes((tmp_path / "good" / "0.png").read_bytes()[:-40])
    before = sorted(tmp_path.rglob("*"))
    given = [] if "--out" in options else ["--out", "latents.zip"]
    given += [] if "--vae" in options else ["--vae", str(vae)]
    result = cli("encode", *options, *given, "--quiet")
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "good.zip").read_bytes() == b"mine"


def test_without_diffusers(cli: Cli, images: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert load(run, "cpu").sample(2, steps=1, decode=False).shape == (2, 4, 8, 8)
    for command in (["encode", images, "--out", tmp_path / "x.zip"], ["sample", run, "--out", tmp_path / "x.png"]):
        result = cli(*command, "--quiet")
        assert result.code == 2
        assert 'pip install "trigflow[latents]"' in result.err
        assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# A run ---------------------------------------------------------------------------------------------------------------


def test_from_images_to_pictures(run: Path, vae: Path, tmp_path: Path, cli: Cli) -> None:
    grid = Image.open(run / "samples" / "00000004.png")
    assert grid.size == ((10 * 17 + 1) * 2, (4 * 17 + 1) * 2)
    result = cli("sample", run, "--num", 6, "--steps", 2, "--labels", 1, "--out", tmp_path / "pictures", "--quiet")
    assert result.code == 0, result.err
    pictures = sorted((tmp_path / "pictures").iterdir())
    assert len(pictures) == 6
    model = load(run, "cpu")
    latents = model.sample(6, steps=2, labels=1, decode=False)
    expected = VAE(VAESource(str(vae))).decode(latents)
    for picture, image in zip(pictures, expected, strict=True):
        assert np.array(Image.open(picture)).tolist() == image.permute(1, 2, 0).tolist()
    assert model.sample(6, steps=2, labels=1, batch_size=4).equal(expected)


def test_the_autoencoder_may_have_moved(run: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load(run, "cpu")
    moved = dataclasses.replace(model.codec.vae, name=str(tmp_path / "gone"))  # type: ignore[union-attr]
    model.codec = dataclasses.replace(model.codec, vae=moved)
    model.save(tmp_path / "run")
    sample = ["sample", tmp_path / "run", "--num", 2, "--steps", 1, "--quiet", "--out", tmp_path / "x.png"]
    result = cli(*sample)
    assert result.code == 2
    assert "cannot be loaded" in result.err
    assert cli(*sample, "--vae", write_vae(tmp_path / "here")).code == 0
    assert (tmp_path / "x.png").is_file()
    result = cli(*sample, "--vae", write_vae(tmp_path / "other", seed=1))
    assert result.code == 2
    assert "is not the one that these latents were made with" in result.err


def test_info_names_the_autoencoder(run: Path, vae: Path, cli: Cli) -> None:
    facts = json.loads(cli("info", run, "--json").out)
    assert facts["autoencoder"] == str(vae)
    assert facts["latent shape (c, h, w)"] == [4, 8, 8]


def test_measuring_latents_needs_images(run: Path, cli: Cli) -> None:
    result = cli("evaluate", run, "--num", 100, "--quiet")
    assert result.code == 2
    assert "a model of latents, whose data are no images to compare with" in result.err
    assert result.err.count("\n") == 1
