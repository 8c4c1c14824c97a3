"""Network snapshots in the form that NVIDIA's code pickles them, made without that code.

Every object of a persistent class pickles as a call of `torch_utils.persistence._reconstruct_persistent_obj` with one dict:
type, version, module_src, class_name and state, the attributes of the object. Containers of PyTorch pickle as themselves, and
dicts are often `dnnlib.EasyDict`. The two modules exist only while a snapshot is written.
"""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trigflow.networks import DDPMPPConfig, EDM2Config, build
from trigflow.networks.embeddings import ConditioningConfig

SOURCE = "raise RuntimeError('the code of a snapshot was run')\n"
BUFFERS = ("freqs", "phases", "resample_filter")


def _reconstruct_persistent_obj(meta: Any) -> Any:
    raise RuntimeError("a persistent object was reconstructed")


class EasyDict(dict[str, Any]):
    """Pickles as `dnnlib.util.EasyDict`."""


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"


@contextmanager
def nvidia_modules() -> Iterator[None]:
    """`torch_utils.persistence` and `dnnlib.util` as far as pickling needs them."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    modules = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Persistent:
    """An object of a persistent class that is no module: a loss, an encoder, an augmentation."""

    def __init__(self, class_name: str, **state: Any) -> None:
        self.class_name = class_name
        self.state = {**state, "_init_args": (), "_init_kwargs": {}}

    def __reduce__(self) -> tuple[Any, ...]:
        return _persistent(self.class_name, self.state)


class PersistentModule(nn.Module):
    """A module of a persistent class; its attributes are those PyTorch gives it and those set on it."""

    def __init__(self, class_name: str, init_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.class_name = class_name
        self._init_args, self._init_kwargs = (), init_kwargs or {}

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        return _persistent(state.pop("class_name"), state)


def _persistent(class_name: str, state: dict[str, Any]) -> tuple[Any, ...]:
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}
    return _reconstruct_persistent_obj, (meta,), None


def module_tree(tensors: dict[str, Tensor], root: nn.Module, inner: str, inner_class: str) -> nn.Module:
    """`root` with modules below it for every dotted name; `<inner>.enc` and `<inner>.dec` are dicts of PyTorch."""
    for name, tensor in tensors.items():
        module = root
        *path, last = name.split(".")
        for depth, part in enumerate(path):
            if part not in module._modules:
                if path[: depth + 1] in ([inner, "enc"], [inner, "dec"]):
                    child: nn.Module = nn.ModuleDict()
                else:
                    child = PersistentModule(inner_class if path[: depth + 1] == [inner] else "Block")
                    child.skip_scale, child.absent = np.sqrt(0.5), None  # type: ignore[assignment]
                    child.register_parameter("unused", None)
                module.add_module(part, child)
            module = module._modules[part]  # type: ignore[assignment]
        if last in BUFFERS:
            module.register_buffer(last, tensor)
        else:
            module.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root


def random_tensors(config: EDM2Config | DDPMPPConfig, seed: int = 0) -> dict[str, Tensor]:
    """Weights of this network, all of them random, the output layer included; in float32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = build(config).state_dict()
    filters = ("resample_filter",)
    return {
        name: t if name.endswith(filters) else t + 0.3 * torch.randn(t.shape, generator=generator) for name, t in state.items()
    }


def tiled_tensors(config: EDM2Config | DDPMPPConfig) -> dict[str, Tensor]:
    """Weights of this network in float16, the same few random numbers over and over: made in a moment, whatever the size."""
    row = torch.randn(1 << 18, generator=torch.Generator().manual_seed(0)).half()
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build(config).state_dict().items()}
    return {name: row.repeat(s.numel() // len(row) + 1)[: s.numel()].clone().view(s) for name, s in shapes.items()}


EDM2_TINY = {
    "img_resolution": 16, "img_channels": 3, "label_dim": 10, "model_channels": 16, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [8], "channels_per_head": 16, "logvar_channels": 32, "dropout": 0.1,
}  # fmt: skip
"""Arguments of a small EDM2."""

EDM_TINY = {
    "img_resolution": 16, "img_channels": 3, "label_dim": 10, "model_type": "SongUNet", "augment_dim": 9,
    "model_channels": 16, "channel_mult": [1, 2], "channel_mult_emb": 4, "num_blocks": 1, "attn_resolutions": [8],
    "dropout": 0.13, "embedding_type": "positional", "encoder_type": "standard", "decoder_type": "standard",
    "channel_mult_noise": 1, "resample_filter": [1, 1],
}  # fmt: skip
"""Arguments of a small DDPM++."""


def edm2_config(kwargs: dict[str, Any]) -> EDM2Config:
    """The configuration that these arguments of EDM2 call for."""
    return EDM2Config(
        channels=kwargs["img_channels"], resolution=kwargs["img_resolution"], width=kwargs["model_channels"],
        mult=tuple(kwargs["channel_mult"]), blocks=kwargs["num_blocks"], attention=tuple(kwargs["attn_resolutions"]),
        head_width=kwargs["channels_per_head"], modulation="gain", dropout=kwargs["dropout"],
        log_variance_width=kwargs["logvar_channels"],
        conditioning=ConditioningConfig(
            "log", "fourier", fourier_scale=1.0, width=kwargs["model_channels"], num_classes=kwargs["label_dim"]
        ),
    )  # fmt: skip


def ddpmpp_config(kwargs: dict[str, Any]) -> DDPMPPConfig:
    """The configuration that these arguments of DDPM++ call for."""
    return DDPMPPConfig(
        channels=kwargs["img_channels"], resolution=kwargs["img_resolution"], width=kwargs["model_channels"],
        mult=tuple(kwargs["channel_mult"]), blocks=kwargs["num_blocks"], attention=tuple(kwargs["attn_resolutions"]),
        norm="add", augment=kwargs["augment_dim"], dropout=kwargs["dropout"],
        conditioning=ConditioningConfig("log", width=kwargs["model_channels"], num_classes=kwargs["label_dim"]),
    )  # fmt: skip


def vae_encoder(**changes: Any) -> Persistent:
    """EDM2's encoder of latents, without the autoencoder, as its snapshots carry it."""
    raw_mean, raw_std = np.float32([5.81, 3.25, 0.12, -2.15]), np.float32([4.17, 4.62, 3.71, 3.28])
    scale = np.float32(0.5) / raw_std
    state = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "bias": -raw_mean * scale, "batch_size": 8}
    return Persistent("StabilityVAEEncoder", **{**state, "_vae": None, **changes})


def edm2_snapshot(tensors: dict[str, Tensor], kwargs: dict[str, Any], **entries: Any) -> EasyDict:
    """What EDM2's training loop pickles."""
    root = PersistentModule("Precond", kwargs)
    root.img_resolution, root.sigma_data = kwargs["img_resolution"], 0.5  # type: ignore[assignment]
    data = EasyDict(
        encoder=Persistent("StandardRGBEncoder"),
        dataset_kwargs=EasyDict(class_name="training.dataset.ImageFolderDataset", path="datasets/img64.zip"),
        loss_fn=Persistent("EDM2Loss", P_mean=-0.8, P_std=1.6, sigma_data=0.5),
        ema=module_tree(tensors, root, "unet", "UNet"),
    )
    data.update(entries)
    return data


def edm_snapshot(tensors: dict[str, Tensor], kwargs: dict[str, Any], **entries: Any) -> dict[str, Any]:
    """What EDM's training loop pickles."""
    root = PersistentModule("EDMPrecond", kwargs)
    return {
        "ema": module_tree(tensors, root, "model", "SongUNet"),
        "loss_fn": Persistent("EDMLoss", P_mean=-1.2, P_std=1.2, sigma_data=0.5),
        "augment_pipe": Persistent("AugmentPipe", p=np.float64(0.12), xflip=1e8),
        "dataset_kwargs": {"path": "/data/cifar10-32x32.zip", "use_labels": True},
        **entries,
    }


def write(path: Path, data: Any, protocol: int | None = None) -> Path:
    """Pickle as NVIDIA's code does; with `protocol=0` as an archive of `torch.save`."""
    with nvidia_modules(), path.open("wb") as file:
        if protocol == 0:
            torch.save(data, file)
        else:
            pickle.dump(data, file, protocol or pickle.DEFAULT_PROTOCOL)
    return path
