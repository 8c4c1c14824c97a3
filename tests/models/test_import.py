"""`trigflow import`: a snapshot of EDM or EDM2 becomes a run folder whose network is the same function."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from models.snapshots import (
    EDM2_TINY,
    EDM_TINY,
    Persistent,
    ddpmpp_config,
    edm2_config,
    edm2_snapshot,
    edm_snapshot,
    random_tensors,
    tiled_tensors,
    vae_encoder,
    write,
)
from trigflow.codecs import Latents, Pixels
from trigflow.models.model import Model, load
from trigflow.models.pretrained import describe, import_snapshot, open_snapshot
from trigflow.networks import DDPMPPConfig, EDM2Config, build
from trigflow.runtime.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures"
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "import_memory.py"
LATENTS = {**EDM2_TINY, "img_channels": 4, "label_dim": 0}


def half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() for name, tensor in tensors.items()}


def edm2_file(path: Path, kwargs: dict[str, Any] | None = None, *, protocol: int | None = None, **entries: Any) -> Path:
    """A snapshot of EDM2 with random weights in float16."""
    kwargs = kwargs or EDM2_TINY
    return write(path, edm2_snapshot(half(random_tensors(edm2_config(kwargs))), kwargs, **entries), protocol)


def edm_file(path: Path, kwargs: dict[str, Any] | None = None, **entries: Any) -> Path:
    """A snapshot of EDM with random weights in float32."""
    kwargs = kwargs or EDM_TINY
    return write(path, edm_snapshot(random_tensors(ddpmpp_config(kwargs)), kwargs, **entries))


def reference(config: EDM2Config | DDPMPPConfig, tensors: dict[str, Tensor]) -> torch.nn.Module:
    """The published network with these weights, `F_edm`."""
    network = build(config)
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return network.eval()


def inputs(channels: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, channels, 16, 16, generator=generator), torch.tensor([0.01, 0.5, 1.2, 1.56])


# The same function ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5, 0])
@torch.no_grad()
def test_edm2_is_minus_the_published_network(tmp_path: Path, protocol: int) -> None:
    file = edm2_file(tmp_path / "network-snapshot-0123456-0.130.pkl", protocol=protocol)
    found = import_snapshot(file, tmp_path / "run")
    model = load(tmp_path / "run", "cpu")
    tensors = half(random_tensors(edm2_config(EDM2_TINY)))
    (x, t), label = inputs(3), torch.tensor([0, 3, 9, 10])
    expected = reference(edm2_config(EDM2_TINY), tensors)(x, t, label=label)
    assert expected.abs().max() > 0.1
    assert torch.equal(model.network(x, t, label=label), -expected)
    assert model.spec == edm2_config(EDM2_TINY)
    assert (model.kind, model.shape, model.num_classes) == ("diffusion", (3, 16, 16), 10)
    assert model.class_names == tuple("0123456789")
    assert model.codec == Pixels.symmetric((3, 16, 16))
    assert model.origin["ema_sigma_rel"] == 0.13
    assert model.origin["noise_levels"] == [-0.8, 1.6]
    assert not model.sampling.guided
    assert model.origin["data"] == {"source": "img64.zip", "normalize": "symmetric"}
    assert found == {
        "network": "Precond(UNet)",
        "parameters": f"{sum(p.numel() for p in model.network.parameters()) / 1e6:.6f}M",
        "stored as": "float16",
        "resolution": "16x16, 3 channels of pixels",
        "classes": "10",
        "sigma_data": "0.5",
        "noise levels": "P_mean -0.8, P_std 1.6",
        "trained for": "123456 kimg",
        "EMA length": "0.130",
        "data": "img64.zip",
    }


@torch.no_grad()
def test_ddpmpp_is_minus_the_published_network(tmp_path: Path) -> None:
    file = edm_file(tmp_path / "edm-cifar10-32x32-cond-vp.pkl")
    found = import_snapshot(file, tmp_path / "run")
    model = load(tmp_path / "run", "cpu")
    (x, t), label = inputs(3), torch.tensor([0, 3, 9, 10])
    expected = reference(ddpmpp_config(EDM_TINY), random_tensors(ddpmpp_config(EDM_TINY)))(x, t, label=label)
    assert expected.abs().max() > 0.1
    assert torch.allclose(model.network(x, t, label=label), -expected, rtol=0, atol=1e-6)
    assert model.spec == ddpmpp_config(EDM_TINY)
    assert (found["network"], found["stored as"]) == ("EDMPrecond(SongUNet)", "float32")
    assert "EMA length" not in found
    assert "trained for" not in found
    assert model.origin["data"]["source"] == "cifar10-32x32.zip"
    assert model.origin["noise_levels"] == [-1.2, 1.2]


@pytest.mark.parametrize("name", ["edm2_tiny", "edm_ddpmpp_tiny"])
@torch.no_grad()
def test_denoiser_of_the_reference_network(tmp_path: Path, name: str) -> None:
    """Weights and denoised images of NVIDIA's own network, to 1e-5 through the imported run folder."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        kwargs = json.loads(file.metadata()["config"])
        vectors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    state = {key.removeprefix("state."): value for key, value in vectors.items() if key.startswith("state.")}
    make = edm2_snapshot if name == "edm2_tiny" else edm_snapshot
    import_snapshot(write(tmp_path / "x.pkl", make(state, kwargs)), tmp_path / "run")
    model = load(tmp_path / "run", "cpu")
    process, sigma = model.process, vectors["in.sigma"].double()
    t = process.time_from_sigma(sigma)
    x_t = vectors["in.x"].double() * torch.cos(t)[:, None, None, None]
    cases = [(None, "out.denoised" if "in.class_labels" not in vectors else "out.denoised_unconditional")]
    if "in.class_labels" in vectors:
        cases.append((vectors["in.class_labels"].argmax(1), "out.denoised"))
    for label, expected in cases:
        if label is None and model.num_classes:
            label = torch.full((len(t),), model.num_classes)
        told = {} if label is None else {"label": label}
        velocity = process.sigma_data * model.network.double()((x_t / process.sigma_data), t, **told)
        denoised = process.denoise(x_t, velocity, t)
        assert (denoised - vectors[expected]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("shapes", "make", "kwargs", "parameters"),
    [
        ("edm2_img64-s", edm2_snapshot, {"img_resolution": 64, "img_channels": 3, "label_dim": 1000}, "280.209381M"),
        (
            "edm_cifar10_ddpmpp",
            edm_snapshot,
            {
                "img_resolution": 32, "img_channels": 3, "label_dim": 0, "model_type": "SongUNet", "augment_dim": 9,
                "model_channels": 128, "channel_mult": [2, 2, 2], "num_blocks": 4, "attn_resolutions": [16], "dropout": 0.13,
            },
            "55.733891M",
        ),
    ],
)  # fmt: skip
def test_names_and_shapes_of_the_published_networks(
    tmp_path: Path, shapes: str, make: Callable[..., Any], kwargs: dict[str, Any], parameters: str
) -> None:
    """Those of the reference networks, weights all zeros."""
    named = json.loads((FIXTURES / f"{shapes}_state_shapes.json").read_text())
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in named.items()}
    with open_snapshot(write(tmp_path / "x.pkl", make(tensors, kwargs))) as snapshot:
        assert describe(snapshot)["parameters"] == parameters
        assert list(snapshot.tensors) == list(snapshot.network.state_dict())


# Latents ---------------------------------------------------------------------------------------------------------------


def test_latents_of_edm2(tmp_path: Path) -> None:
    file = edm2_file(tmp_path / "edm2-img512-s-2147483-0.025.pkl", LATENTS, encoder=vae_encoder())
    found = import_snapshot(file, tmp_path / "run")
    model = load(tmp_path / "run", "cpu")
    assert found["resolution"] == "16x16, 4 channels of latents"
    assert found["classes"] == "none (unconditional)"
    assert model.codec == Latents.edm2((4, 16, 16))
    assert (model.shape, model.class_names, model.origin["data"]["normalize"]) == ((4, 16, 16), (), "edm2")
    assert model.origin["ema_sigma_rel"] == 0.025


def test_latents_of_other_statistics(tmp_path: Path) -> None:
    scale, bias = np.float32([0.1, 0.2, 0.25, 0.5]), np.float32([1, 0, -1, 2])
    file = edm2_file(tmp_path / "x.pkl", LATENTS, encoder=vae_encoder(scale=scale, bias=bias))
    import_snapshot(file, tmp_path / "run")
    z = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = z * torch.tensor(scale)[:, None, None] + torch.tensor(bias)[:, None, None]
    assert torch.allclose(load(tmp_path / "run", "cpu").codec.encode(z), expected, atol=1e-5)


# Refusals --------------------------------------------------------------------------------------------------------------


def refused(file: Path) -> str:
    """The one line with which this file is refused; nothing is left behind."""
    out = file.parent / "run"
    with pytest.raises(UserError) as caught:
        import_snapshot(file, out)
    assert not out.exists()
    assert [path for path in file.parent.iterdir() if path != file and path.suffix != ".pkl"] == []
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "DhariwalUNet"}, "model_type = DhariwalUNet"),
        ({"embedding_type": "fourier"}, "embedding_type = fourier"),
        ({"encoder_type": "residual"}, "encoder_type = residual"),
        ({"decoder_type": "skip"}, "decoder_type = skip"),
        ({"resample_filter": [1, 3, 3, 1]}, "resample_filter = [1, 3, 3, 1]"),
        ({"channel_mult_noise": 2}, "channel_mult_noise = 2"),
        ({"novelty": 7}, "novelty = 7"),
        ({"model_channels": "many"}, "model_channels = many"),
        ({"num_blocks": 10**9}, "num_blocks = 1000000000"),
        ({"channel_mult": [1] * 40}, "channel_mult"),
        ({"sigma_data": math.inf}, "sigma_data = inf"),
        ({"sigma_data": 10**400}, "sigma_data = 1000"),
        ({"img_resolution": None}, "img_resolution = None"),
    ],
)
def test_variants_of_edm_that_are_not_supported(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    data = edm_snapshot(random_tensors(ddpmpp_config(EDM_TINY)), {**EDM_TINY, **changes})
    assert named in refused(write(tmp_path / "x.pkl", data))


@pytest.mark.parametrize(
    "changes", [{"res_balance": 0.5}, {"clip_act": None}, {"concat_balance": 0.3}, {"channel_mult_emb": 8}]
)
def test_variants_of_edm2_that_are_not_supported(tmp_path: Path, changes: dict[str, Any]) -> None:
    message = refused(write(tmp_path / "x.pkl", edm2_snapshot({"unet.x": torch.zeros(1)}, {**EDM2_TINY, **changes})))
    assert next(f"{name} = {value}" for name, value in changes.items()) in message


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "Generator"])
def test_other_networks_are_refused_by_name(tmp_path: Path, name: str) -> None:
    data = edm_snapshot({}, EDM_TINY)
    data["ema"].class_name = name
    assert f"a network of class {name}, which is not supported" in refused(write(tmp_path / "x.pkl", data))


def test_unknown_inner_network(tmp_path: Path) -> None:
    data = edm_snapshot(random_tensors(ddpmpp_config(EDM_TINY)), EDM_TINY)
    data["ema"]._modules["model"].class_name = "DhariwalUNet"
    assert "a network of class DhariwalUNet" in refused(write(tmp_path / "x.pkl", data))


@pytest.mark.parametrize(
    ("encoder", "named"),
    [
        (Persistent("FluxEncoder"), "encoder FluxEncoder"),
        (vae_encoder(vae_name="someone/else"), "someone/else"),
        (vae_encoder(scale=np.float32([1, 2, 3])), "no scale of 4 numbers"),
        (vae_encoder(bias=np.float32([1, 2, 3, np.nan])), "no bias of 4 numbers"),
        (vae_encoder(bias=[1, 2, 3, 4]), "no bias of 4 numbers"),
        ("StabilityVAEEncoder", "encoder str"),
        (vae_encoder(vae_name=functools.reduce(lambda inner, _: (inner, inner), range(12), ())), "the autoencoder a tuple"),
    ],
)
def test_encoders_that_are_not_supported(tmp_path: Path, encoder: Any, named: str) -> None:
    assert named in refused(edm2_file(tmp_path / "x.pkl", LATENTS, encoder=encoder))


def test_latents_for_a_network_of_images(tmp_path: Path) -> None:
    assert "4 channels for a network of 3" in refused(edm2_file(tmp_path / "x.pkl", encoder=vae_encoder()))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = half(random_tensors(edm2_config(EDM2_TINY)))
    first = next(iter(tensors))
    tensors["unet.extra.weight"] = tensors.pop(first)
    tensors["unet.out_conv.weight"] = torch.zeros(3, 16, 1, 1)
    message = refused(write(tmp_path / "x.pkl", edm2_snapshot(tensors, EDM2_TINY)))
    assert f"1 missing, first '{first}'" in message
    assert "1 unexpected, first 'unet.extra.weight'" in message
    assert "1 misshapen, first 'unet.out_conv.weight' (3, 16, 1, 1) instead of (3, 16, 3, 3)" in message


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    tensors = half(random_tensors(edm2_config(EDM2_TINY)))
    tensors["unet.out_conv.weight"][0, 0, 0, 0] = math.nan
    assert "'unet.out_conv.weight' is not finite" in refused(write(tmp_path / "x.pkl", edm2_snapshot(tensors, EDM2_TINY)))


def test_weights_without_numbers(tmp_path: Path) -> None:
    tensors = half(random_tensors(edm2_config(EDM2_TINY)))
    tensors["unet.extra.weight"] = torch.empty(0).as_strided((0, 1 << 61, 1 << 61), (0, 0, 0))
    assert "1 unexpected" in refused(write(tmp_path / "x.pkl", edm2_snapshot(tensors, EDM2_TINY)))


def test_weights_of_whole_numbers(tmp_path: Path) -> None:
    tensors = half(random_tensors(edm2_config(EDM2_TINY)))
    tensors["unet.out_conv.weight"] = tensors["unet.out_conv.weight"].long()
    assert "'unet.out_conv.weight' is no tensor of floating" in refused(
        write(tmp_path / "x.pkl", edm2_snapshot(tensors, EDM2_TINY))
    )


def test_small_files_do_not_become_large_ones(tmp_path: Path) -> None:
    """Every weight a view of the same numbers, or one number repeated: a few bytes that would fill a disk."""
    tensors = half(random_tensors(edm2_config(EDM2_TINY)))
    numbers = torch.zeros(max(t.numel() for t in tensors.values()), dtype=torch.float16)
    same = {name: numbers[: t.numel()].view(t.shape) for name, t in tensors.items()}
    assert "the same numbers" in refused(write(tmp_path / "x.pkl", edm2_snapshot(same, EDM2_TINY), 0))
    repeated = {name: torch.zeros((), dtype=torch.float16).expand(t.shape) for name, t in tensors.items()}
    assert "is no tensor of floating" in refused(write(tmp_path / "y.pkl", edm2_snapshot(repeated, EDM2_TINY), 0))


def test_modules_without_end(tmp_path: Path) -> None:
    data = edm2_snapshot(half(random_tensors(edm2_config(EDM2_TINY))), EDM2_TINY)
    unet = data["ema"]._modules["unet"]
    unet._modules["again"] = unet
    assert "nests modules without end" in refused(write(tmp_path / "x.pkl", data))
    tower = unet._modules["again"] = Persistent("X", _modules={})
    for _ in range(25):
        below = Persistent("X", _modules={})
        tower.state["_modules"].update(a=below, b=below)
        tower = below
    assert "nests modules without end" in refused(write(tmp_path / "y.pkl", data))


@pytest.mark.parametrize(
    "state",
    [
        {"_modules": [1]}, {"_parameters": 3}, {"_buffers": "x"}, {"_non_persistent_buffers_set": 5},
        {"_parameters": {"a.b": None}}, {"_modules": {"a\n": None}}, {"_modules": {1: None}}, {"_modules": {"a": "b"}},
    ],
)  # fmt: skip
def test_modules_that_make_no_sense(tmp_path: Path, state: dict[str, Any]) -> None:
    data = edm2_snapshot(half(random_tensors(edm2_config(EDM2_TINY))), EDM2_TINY)
    data["ema"]._modules["unet"]._modules["odd"] = Persistent("X", **state)
    assert "damaged" in refused(write(tmp_path / "x.pkl", data))


@pytest.mark.parametrize("data", [{}, {"ema": None}, {"ema": {"state": 1}}, [1], "text", None, {"G_ema": 1}])
def test_pickles_without_a_network(tmp_path: Path, data: Any) -> None:
    assert "holds no network under 'ema'" in refused(write(tmp_path / "x.pkl", data))


@pytest.mark.parametrize("state", [{"_init_kwargs": None}, {"_init_kwargs": {}, "_init_args": (1, 2, 3, 4)}, {"_init_args": 3}])
def test_networks_without_their_arguments(tmp_path: Path, state: dict[str, Any]) -> None:
    data = edm2_snapshot(half(random_tensors(edm2_config(EDM2_TINY))), EDM2_TINY)
    for name, value in state.items():
        setattr(data["ema"], name, value)
    assert "arguments" in refused(write(tmp_path / "x.pkl", data))


def test_arguments_given_by_position(tmp_path: Path) -> None:
    data = edm2_snapshot(half(random_tensors(edm2_config(EDM2_TINY))), EDM2_TINY)
    rest = {name: value for name, value in EDM2_TINY.items() if name not in ("img_resolution", "img_channels", "label_dim")}
    data["ema"]._init_args, data["ema"]._init_kwargs = (16, 3, 10), rest
    with open_snapshot(write(tmp_path / "x.pkl", data)) as snapshot:
        assert snapshot.config == edm2_config(EDM2_TINY)


@pytest.mark.parametrize(
    "entries", [{"loss_fn": None}, {"loss_fn": Persistent("L", P_mean="x")}, {"dataset_kwargs": {"path": "/"}}]
)
def test_what_is_not_recorded_is_not_made_up(tmp_path: Path, entries: dict[str, Any]) -> None:
    found = import_snapshot(edm2_file(tmp_path / "edm2-100.pkl", **entries), tmp_path / "run")
    missing = "data" if "dataset_kwargs" in entries else "noise levels"
    assert not {missing, "trained for", "EMA length"} & set(found)
    assert isinstance(load(tmp_path / "run", "cpu"), Model)


# The command -----------------------------------------------------------------------------------------------------------


def test_command(tmp_path: Path, cli: Callable[..., Any]) -> None:
    file = edm_file(tmp_path / "network-snapshot-200000.pkl")
    result = cli("import", file, "--out", tmp_path / "new" / "run")
    assert result.code == 0, result.err
    assert "EDMPrecond(SongUNet)" in result.out
    assert "200000 kimg" in result.out
    assert sorted(p.name for p in (tmp_path / "new" / "run").iterdir()) == ["model.json", "network.safetensors"]
    drawn = cli(
        "sample", tmp_path / "new" / "run", "--num", 2, "--steps", 1, "--out", tmp_path / "x.png", "--quiet", "--device", "cpu"
    )
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "x.png").is_file()


def test_command_on_bad_files(tmp_path: Path, cli: Callable[..., Any]) -> None:
    whole = edm_file(tmp_path / "whole.pkl").read_bytes()
    (tmp_path / "cut.pkl").write_bytes(whole[:-1000])
    (tmp_path / "page.pkl").write_text("<!DOCTYPE html>")
    (tmp_path / "system.pkl").write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.")
    os.mkfifo(tmp_path / "pipe.pkl")
    for name, said in [
        ("pipe.pkl", "no plain file"),
        ("cut.pkl", "cut short"),
        ("page.pkl", "no pickle"),
        ("system.pkl", "asks for os.system"),
        ("absent.pkl", "cannot be read"),
        (".", "expected the folder of a pipeline"),
    ]:
        result = cli("import", tmp_path / name, "--out", tmp_path / "run")
        assert result.code == 2
        assert said in result.err
        assert result.err.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_existing_target_is_left_alone(tmp_path: Path, cli: Callable[..., Any]) -> None:
    file = edm_file(tmp_path / "x.pkl")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    result = cli("import", file, "--out", tmp_path / "run")
    assert result.code == 2
    assert "expected a new or empty folder" in result.err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert cli("import", file, "--out", tmp_path / "empty").code == 0
    assert cli("import", file, "--out", file / "below").code == 2


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of resident memory are read from /proc")
def test_memory_stays_below_twice_the_weights(tmp_path: Path) -> None:
    kwargs = {**EDM2_TINY, "model_channels": 384, "num_blocks": 2, "attn_resolutions": []}
    file = write(tmp_path / "x.pkl", edm2_snapshot(tiled_tensors(edm2_config(kwargs)), kwargs))
    done = subprocess.run(
        [sys.executable, BENCHMARK, "--measure", file, tmp_path / "run"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, peak = json.loads(done.stdout)
    assert file.stat().st_size > 64 << 20
    assert before < peak < before + 2 * file.stat().st_size
