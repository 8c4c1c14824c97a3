"""EDM and EDM2 network snapshots, as NVIDIA publishes them, into run folders.

A snapshot is a pickled dict. Its entry `ema` is the network: objects of `torch_utils.persistence`, each with its class name,
constructor arguments, parameters, buffers and children. Nothing of the code they carry is run; the network is rebuilt here from
the arguments, and names and shapes must match it exactly.

    EDM2   Precond around UNet                            `EDM2Config`, modulation gain, log time, Fourier features
    EDM    EDMPrecond around SongUNet in its DDPM++ form  `DDPMPPConfig`, embedding added, log time, positional features

EDM's network predicts `F_edm` with the denoiser `D = c_skip y + c_out F_edm`; in TrigFlow's terms `F = -F_edm` exactly, so the
weights are written with the sign of the output layer flipped, and what is imported is a TrigFlow network as it stands.

Sources: Karras et al. 2022 (EDM, arXiv 2206.00364); Karras et al. 2024 (EDM2, arXiv 2312.02696); Lu and Song 2025, appendix B.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from trigflow.codecs import Codec, Latents, Pixels
from trigflow.codecs.vae import CHANNELS, DEFAULT_VAE
from trigflow.models.pretrained.records import ArrayShell, StoredArray, StoredTensor, read_pickle
from trigflow.models.pretrained.unpickle import Record, Source, shown
from trigflow.models.weights import check_fits
from trigflow.networks import ConditioningConfig, DDPMPPConfig, EDM2Config, build
from trigflow.runtime.errors import UserError

MAX_LEVELS = 16


class Arguments:
    """Keyword arguments of a class in a snapshot. What is taken is checked; what is not is refused by `finish`. The `owner` is
    the class, for the messages."""

    def __init__(self, source: Source, owner: str, values: dict[str, Any]) -> None:
        self.source = source
        self.owner = owner
        self.values = dict(values)

    def whole(self, name: str, default: int | None, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self.values.pop(name, default)
        if type(value) is not int or not low <= value <= high:
            self._refuse(name, value, f"a whole number from {low} to {high}")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.values.pop(name, default)
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            self._refuse(name, value, "a number")
        return float(value)

    def wholes(self, name: str, default: tuple[int, ...], high: int) -> tuple[int, ...]:
        """A few whole numbers from 1 to high."""
        value = self.values.pop(name, default)
        good = isinstance(value, list | tuple) and len(value) <= MAX_LEVELS
        if not good or not all(type(n) is int and 1 <= n <= high for n in value):
            self._refuse(name, value, f"at most {MAX_LEVELS} whole numbers from 1 to {high}")
        return tuple(value)

    def fixed(self, **only: Any) -> None:
        """Arguments of which one value is supported, the one given here."""
        for name, expected in only.items():
            value = self.values.pop(name, expected)
            if (list(value) if isinstance(value, tuple) else value) != expected:
                self._refuse(name, value, repr(expected))

    def ignore(self, *names: str) -> None:
        """Arguments that make no difference to what the network computes."""
        for name in names:
            self.values.pop(name, None)

    def finish(self) -> None:
        """Refuse what was not taken."""
        for name in self.values:
            self._refuse(str(name), self.values[name], "no such argument")

    def _refuse(self, name: str, value: Any, expected: str) -> NoReturn:
        given = shown(value)
        if isinstance(value, list | tuple) and all(type(n) is int for n in value[: MAX_LEVELS + 1]):
            given = str(list(value[: MAX_LEVELS + 1]))
        self.source.refuse(
            f"holds {self.owner} with {shown(name)} = {given}, where {expected} is supported", "use another snapshot"
        )


MAX_DEPTH = 32
"""Modules within modules."""
MAX_ENTRIES = 100_000
"""Modules, parameters and buffers of a network; the largest published one has about 3000."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Snapshot:
    """What was found in a file.

    Attributes:
        source: the open file.
        network_class: NVIDIA's classes, outer and inner.
        config: of the network that computes the same.
        sigma_data: standard deviation of the data it was trained on.
        network: without numbers, on the meta device.
        tensors: parameters and buffers by name, where they lie in the file.
        flipped: names of the output layer, to be written with the other sign.
        codec: pixels in [-1, 1] for a network on images, otherwise that of the latents.
        dataset: name of the file it was trained on, where recorded.
        noise_levels: P_mean and P_std of the training noise, where recorded.
        kimg: thousands of images seen in training, where the name of the file says it.
        ema: relative length of the weight average, where the name of the file says it.
    """

    source: Source
    network_class: str
    config: EDM2Config | DDPMPPConfig
    sigma_data: float
    network: nn.Module
    tensors: dict[str, StoredTensor]
    flipped: frozenset[str]
    codec: Codec
    dataset: str | None
    noise_levels: tuple[float, float] | None
    kimg: int | None
    ema: float | None

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def dtype(self) -> str:
        """Types of the stored weights."""
        return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in self.tensors.values()}))


@contextmanager
def open_snapshot(path: str | Path) -> Iterator[Snapshot]:
    """Read what a snapshot holds; the weights stay in the file until they are read one by one. Raises a UserError when the file
    is missing, no pickle, cut short or damaged; when it asks for anything that a snapshot does not need (named); when it holds
    a network that is not supported, or other weights than its arguments call for."""
    path = Path(path)
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(0, "no plain file")  # opening a pipe would wait for its writer
        file = path.open("rb")
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be read ({error.strerror}); expected a network snapshot of EDM or EDM2 (.pkl); check the path"
        ) from None
    with file:
        yield _read(Source(path, file))


def _read(source: Source) -> Snapshot:
    data = read_pickle(source)
    ema = data.get("ema") if isinstance(data, dict) else None
    if not isinstance(ema, Record):
        source.refuse("holds no network under 'ema'")
    if ema.class_name not in NETWORKS:
        _unsupported(source, ema, NETWORKS)
    inner_name, inner_class, read_config = NETWORKS[ema.class_name]
    config, sigma_data = read_config(source, ema)
    children = ema.state.get("_modules")
    inner = children.get(inner_name) if isinstance(children, dict) else None
    if not isinstance(inner, Record):
        source.refuse(f"is damaged: its {shown(ema.class_name)} has no module '{inner_name}'")
    if inner.class_name != inner_class:
        _unsupported(source, inner, [inner_class])
    with torch.device("meta"):
        network = build(config, sigma_data)
    tensors = _tensors(source, ema)
    check_fits(network.state_dict(), {name: t.shape for name, t in tensors.items()}, f"the network in '{source.path}'")
    if sum(t.numel * t.dtype.itemsize for t in tensors.values()) > source.size:
        source.distrust("uses the same numbers for several weights")
    name = re.search(r"-(\d{6,})(?:-(\d\.\d+))?$", source.path.stem)
    return Snapshot(
        source=source,
        network_class=f"{ema.class_name}({inner.class_name})",
        config=config,
        sigma_data=sigma_data,
        network=network,
        tensors={name: tensors[name] for name in network.state_dict()},
        flipped=_last_layer(config),
        codec=_codec(source, data.get("encoder"), config, sigma_data),
        dataset=_dataset(data.get("dataset_kwargs")),
        noise_levels=_noise_levels(data.get("loss_fn")),
        kimg=int(name[1]) if name else None,
        ema=float(name[2]) if name and name[2] else None,
    )


# The two networks ---------------------------------------------------------------------------------------------------


def _edm2(source: Source, precond: Record) -> tuple[EDM2Config, float]:
    """From the arguments of EDM2's Precond, and the defaults of the published code."""
    given = _arguments(source, precond)
    sigma_data = given.number("sigma_data", 0.5)
    width = given.whole("model_channels", 192, 1, 1 << 14)
    mult = given.wholes("channel_mult", (1, 2, 3, 4), 64)
    given.ignore("use_fp16")
    if given.values.get("channel_mult_emb") is not None:
        given.fixed(channel_mult_emb=max(mult, default=0))
    noise = mult[0] if mult else 1
    if given.values.get("channel_mult_noise") is not None:
        noise = given.whole("channel_mult_noise", None, 1, 64)
    given.ignore("channel_mult_emb", "channel_mult_noise")
    given.fixed(label_balance=0.5, concat_balance=0.5, res_balance=0.3, attn_balance=0.3, resample_filter=[1, 1])
    config = EDM2Config(
        channels=given.whole("img_channels", None, 1, 64),
        resolution=given.whole("img_resolution", None, 1, 1 << 14),
        width=width,
        mult=mult,
        blocks=given.whole("num_blocks", 3, 1, 64),
        attention=given.wholes("attn_resolutions", (16, 8), 1 << 14),
        head_width=given.whole("channels_per_head", 64, 1, 1 << 14),
        modulation="gain",
        dropout=given.number("dropout", 0.0),
        clip=given.number("clip_act", 256.0),
        log_variance_width=given.whole("logvar_channels", 128, 1, 1 << 14),
        conditioning=ConditioningConfig(
            time_map="log",
            time_embedding="fourier",
            fourier_scale=1.0,
            width=width * noise,
            num_classes=given.whole("label_dim", None, 0, 100_000),
        ),
    )
    given.finish()
    return config, sigma_data


def _ddpmpp(source: Source, precond: Record) -> tuple[DDPMPPConfig, float]:
    """From the arguments of EDMPrecond and SongUNet, and the defaults of the published code."""
    given = _arguments(source, precond)
    given.fixed(model_type="SongUNet")
    given.fixed(embedding_type="positional", encoder_type="standard", decoder_type="standard", resample_filter=[1, 1])
    given.fixed(channel_mult_emb=4, channel_mult_noise=1)
    given.ignore("use_fp16", "sigma_min", "sigma_max", "label_dropout")
    sigma_data = given.number("sigma_data", 0.5)
    width = given.whole("model_channels", 128, 1, 1 << 14)
    config = DDPMPPConfig(
        channels=given.whole("img_channels", None, 1, 64),
        resolution=given.whole("img_resolution", None, 1, 1 << 14),
        width=width,
        mult=given.wholes("channel_mult", (1, 2, 2, 2), 64),
        blocks=given.whole("num_blocks", 4, 1, 64),
        attention=given.wholes("attn_resolutions", (16,), 1 << 14),
        norm="add",
        augment=given.whole("augment_dim", 0, 0, 1 << 14),
        dropout=given.number("dropout", 0.1),
        conditioning=ConditioningConfig(
            time_map="log", time_embedding="positional", width=width, num_classes=given.whole("label_dim", 0, 0, 100_000)
        ),
    )
    given.finish()
    return config, sigma_data


NETWORKS: dict[str, tuple[str, str, Callable[[Source, Record], tuple[EDM2Config | DDPMPPConfig, float]]]] = {
    "Precond": ("unet", "UNet", _edm2),
    "EDMPrecond": ("model", "SongUNet", _ddpmpp),
}
"""For each outer class: where the network inside is found, its class, and how to read the configuration."""


def _last_layer(config: EDM2Config | DDPMPPConfig) -> frozenset[str]:
    """Names of the weights that the output is linear in."""
    if isinstance(config, EDM2Config):
        return frozenset({"unet.out_gain"})
    last = f"model.dec.{config.resolution}x{config.resolution}_aux_conv"
    return frozenset({f"{last}.weight", f"{last}.bias"})


def _unsupported(source: Source, network: Record, supported: Iterable[str]) -> NoReturn:
    source.refuse(
        f"holds a network of class {shown(network.class_name)}, which is not supported ({', '.join(supported)} is)",
        "use another snapshot",
    )


POSITIONAL = ("img_resolution", "img_channels", "label_dim")
"""What the outer classes take first."""


def _arguments(source: Source, record: Record) -> Arguments:
    """The recorded constructor arguments of an outer class."""
    keywords, positional = record.state.get("_init_kwargs"), record.state.get("_init_args")
    if not isinstance(keywords, dict) or not isinstance(positional, tuple | list | None):
        source.refuse(f"holds a {shown(record.class_name)} without the arguments it was made with", "use another snapshot")
    named = dict(zip(POSITIONAL, positional or (), strict=False))
    if len(positional or ()) > len(POSITIONAL):
        source.refuse(f"holds a {shown(record.class_name)} made with unnamed arguments", "use another snapshot")
    return Arguments(source, shown(record.class_name), {**named, **keywords})


# Parts of a snapshot ------------------------------------------------------------------------------------------------


def _tensors(source: Source, network: Record) -> dict[str, StoredTensor]:
    """Parameters and persistent buffers below a module, by dotted name."""
    found: dict[str, StoredTensor] = {}
    pending, visited = [("", network, 0)], 0
    while pending:
        prefix, module, depth = pending.pop()
        groups = [module.state.get(group) or {} for group in ("_parameters", "_buffers", "_modules")]
        hidden = module.state.get("_non_persistent_buffers_set") or set()
        if not all(isinstance(group, dict) for group in groups) or not isinstance(hidden, set | list):
            source.refuse(f"is damaged: the module {shown(prefix)} makes no sense")
        visited += 1 + sum(map(len, (*groups, hidden)))
        if visited > MAX_ENTRIES or depth > MAX_DEPTH:
            source.distrust("nests modules without end")
        parameters, buffers, children = groups
        hidden = {name for name in hidden if isinstance(name, str)}
        for name, value in {**parameters, **{n: v for n, v in buffers.items() if n not in hidden}, **children}.items():
            path = f"{prefix}{name}"
            if not isinstance(name, str) or not re.fullmatch(r"\w{1,100}", name, re.ASCII):
                source.refuse(f"is damaged: the name {shown(path)} makes no sense")
            if isinstance(value, Record) and name in children:
                pending.append((f"{path}.", value, depth + 1))
            elif isinstance(value, StoredTensor) and value.dtype in FLOATS and value.numel <= value.extent:
                found[path] = value
            elif value is not None:
                source.refuse(f"is damaged: '{path}' is no tensor of floating-point numbers")
    return found


def _codec(source: Source, encoder: Any, config: EDM2Config | DDPMPPConfig, sigma_data: float) -> Codec:
    """From the encoder of an EDM2 snapshot, which maps latents z to `x0 = scale_c z + bias_c`; EDM's snapshots have none."""
    shape = (config.channels, config.resolution, config.resolution)
    if encoder is None or (isinstance(encoder, Record) and encoder.class_name == "StandardRGBEncoder"):
        return Pixels.symmetric(shape, sigma_data)
    if not isinstance(encoder, Record) or encoder.class_name != "StabilityVAEEncoder":
        name = shown(encoder.class_name) if isinstance(encoder, Record) else type(encoder).__name__
        source.refuse(f"uses the encoder {name}, which is not supported", "use another snapshot")
    vae = encoder.state.get("vae_name", DEFAULT_VAE)
    if vae != DEFAULT_VAE:
        source.refuse(f"uses the autoencoder {shown(vae)}, where {DEFAULT_VAE} is supported", "use another snapshot")
    scale, bias = (_four_numbers(source, encoder, name) for name in ("scale", "bias"))
    if config.channels != CHANNELS or not all(value > 0 for value in scale):
        source.refuse(f"is damaged: latents of {CHANNELS} channels for a network of {config.channels}")
    published = Latents.edm2(shape, sigma_data=sigma_data)
    found = Latents(
        shape,
        raw_mean=tuple(-b / s for b, s in zip(bias, scale, strict=True)),
        raw_std=tuple(sigma_data / s for s in scale),
        sigma_data=sigma_data,
    )
    same = np.allclose([*found.raw_mean, *found.raw_std], [*published.raw_mean, *published.raw_std], rtol=1e-5)
    return published if same else found


def _four_numbers(source: Source, encoder: Record, name: str) -> list[float]:
    """One number a latent channel, from an array of numpy."""
    value = encoder.state.get(name)
    array = value.array if isinstance(value, ArrayShell) else value
    numbers = array.read(source) if isinstance(array, StoredArray) else np.empty(0)
    if numbers.shape != (CHANNELS,) or not np.isfinite(numbers.astype(float)).all():
        source.refuse(f"is damaged: its encoder has no {name} of {CHANNELS} numbers")
    return [float(number) for number in numbers]


def _dataset(arguments: Any) -> str | None:
    """The last part of the path of the training data, where it is a plain name."""
    path = arguments.get("path") if isinstance(arguments, dict) else None
    name = re.split(r"[/\\]", path)[-1] if isinstance(path, str) else ""
    return name if re.fullmatch(r"\w[\w.-]{0,100}", name, re.ASCII) else None


def _noise_levels(loss: Any) -> tuple[float, float] | None:
    """P_mean and P_std of the loss."""
    state = loss.state if isinstance(loss, Record) else {}
    match state.get("P_mean"), state.get("P_std"):
        case (float() | int() as mean, float() | int() as std) if abs(mean) < 100 and 0 < std < 100:
            return float(mean), float(std)
    return None
