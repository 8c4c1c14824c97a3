"""A pipeline of diffusers in a folder or on the hub: what it holds, read without its weights; and its parts, loaded late."""

import contextlib
import functools
import hashlib
import json
import math
import os
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trigflow.models.bridges import Adapter, Bridge, CosineSchedule, DiscreteSchedule, FlowBridge, Schedule, VPBridge
from trigflow.models.foreign.family import Family, family_of
from trigflow.models.foreign.quantized import KINDS, quantize
from trigflow.process import TrigFlow
from trigflow.runtime.errors import MissingExtraError, UserError, on_one_line
from trigflow.runtime.seeds import generators_kept

Predicts = Literal["flow", "epsilon", "v", "x0"]
Dtype = Literal["float32", "bfloat16", "float16", "int8", "fp8", "nf4"]
PREDICTION = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}
"""From the prediction types of diffusers."""
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""What a Transformer2DModel of early pipelines is, by the type of its norm."""
HUB = "hf:"
"""What the id of a pipeline on the hub may begin with."""


@dataclass(frozen=True)
class Base:
    """A pipeline as its configurations describe it.

    Attributes:
        name: path of the folder, or id of the hub.
        folder: where it lies here.
        components: from the name of a component to the library and class of it.
        component: name of the denoiser.
        index: content of `model_index.json`.
    """

    name: str
    folder: Path
    components: Mapping[str, tuple[str, str]]
    component: str
    index: Mapping[str, Any]

    @property
    def title(self) -> str:
        """What is published of the name: the id of the hub, or the folder's own name without where it lies here."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name

    @property
    def denoiser(self) -> str:
        """Name of the denoiser's class in diffusers."""
        name = self.components[self.component][1]
        norm = self.config(self.component).get("norm_type") if name == "Transformer2DModel" else None
        return LEGACY.get(str(norm), name)

    @property
    def family(self) -> Family:
        """Raises a UserError where diffusers has no such denoiser, or no family knows it."""
        return family_of(self.denoiser, class_named(self.denoiser, self))

    def config(self, component: str, file: str = "config.json") -> dict[str, Any]:
        """The configuration of a component. Raises a UserError where there is none."""
        return _read_config(self.folder / component / file, f"the {component} of '{self.name}'")

    def predicts(self) -> Predicts:
        """What the denoiser predicts, as the scheduler says. Raises a UserError for no scheduler, or a prediction type that is
        not known."""
        config = self.config("scheduler", "scheduler_config.json")
        name = str(config.get("_class_name", ""))
        said = config.get("prediction_type", "flow_prediction" if name.startswith("FlowMatch") else "epsilon")
        if config.get("use_flow_sigmas"):
            said = "flow_prediction"
        if not isinstance(said, str) or said not in PREDICTION:
            raise UserError(
                f"the scheduler of '{self.name}' ({name}) says that the model predicts {said!r}; expected one of "
                f"{', '.join(PREDICTION)}; correct its scheduler_config.json"
            )
        found: Predicts = PREDICTION[said]  # type: ignore[assignment]
        return found

    def schedule(self) -> Tensor | Schedule:
        """Of a scheduler that is no flow: `alphas_cumprod`, or the schedule itself where there are no training steps."""
        name = self.config("scheduler", "scheduler_config.json").get("_class_name")
        return CosineSchedule() if name == "CosineDPMSolverMultistepScheduler" else self.alphas_cumprod()

    def alphas_cumprod(self) -> Tensor:
        """`a^2` of each training step of a scheduler that is no flow, as the scheduler's own class computes them."""
        config = self.config("scheduler", "scheduler_config.json")
        scheduler = getattr(_diffusers(), str(config.get("_class_name")), None)
        found = getattr(scheduler.from_config(config), "alphas_cumprod", None) if scheduler else None
        if not isinstance(found, Tensor):
            raise UserError(
                f"the scheduler of '{self.name}' ({config.get('_class_name')}) has no alphas_cumprod; expected one of DDPM's "
                "kind or FlowMatchEulerDiscreteScheduler; correct its scheduler_config.json"
            )
        return found

    def weight(self, component: str, name: str) -> Tensor:
        """One weight of a component, read from its safetensors. Raises a UserError where there is none of this name."""
        for path in sorted((self.folder / component).glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                if name in file.keys():  # noqa: SIM118
                    return file.get_tensor(name)
        raise UserError(f"the {component} of '{self.name}' has no weight {name}; expected it in its safetensors; restore them")

    def digest(self, spots: int = 64) -> str:
        """Tells the denoiser from others, without reading all of its weights."""
        return digest_of_files([self.folder / self.component], spots)


def digest_of_files(folders: Iterable[Path], spots: int = 64) -> str:
    """Of names, sizes and first 64 KiB of the files in those of these folders that are there, and of what is at so many spots
    behind: of weights that is what they are and some of them. (Without spots, as of runs imported before, it is at most what
    they are, as 64 KiB do not hold more of a large model.)"""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            size = path.stat().st_size
            digest.update(f"{path.parent.name}/{path.name} {size} ".encode() + file.read(1 << 16))
            for place in range(1 << 16, size, max(1 << 16, size // spots)) if spots else ():
                file.seek(place)
                digest.update(file.read(1 << 12))
    return digest.hexdigest()


def open_base(name: str) -> Base:
    """The pipeline in a folder, or of an id of the Hugging Face hub (`hf:` before it or not); of a hub's the files are loaded
    into the cache of the hub. No code that comes with it is run.

    Raises:
        UserError: for a folder that is none, or an id that does not lead to one.
        MissingExtraError: without diffusers.
    """
    path = Path(os.path.expanduser(name))
    if path.suffix in (".safetensors", ".ckpt", ".bin") and not path.is_dir():
        raise UserError(
            f"'{name}' is a checkpoint in one file; expected the folder of a pipeline; make one with diffusers: "
            f"StableDiffusionPipeline.from_single_file({name!r}).save_pretrained(FOLDER)"
        )
    if path.is_dir():
        folder, name = path.resolve(), str(path.resolve())
    else:
        name = name.removeprefix(HUB)
        if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(
                f"'{name}' is no folder; expected that of a pipeline, or an id such as hf:owner/name; check the name"
            )
        try:
            folder = Path(_diffusers().DiffusionPipeline.download(name, trust_remote_code=False))
        except MemoryError:
            raise
        except Exception as error:  # the hub raises all kinds
            raise UserError(
                f"'{name}' cannot be had from the hub ({on_one_line(error)}); expected the id of a pipeline, and a connection; "
                "check them, or name a folder"
            ) from None
    index = _read_config(folder / "model_index.json", f"'{name}'")
    components = {key: (value[0], value[1]) for key, value in index.items() if _is_component(value)}
    component = next((key for key in ("transformer", "unet") if key in components), None)
    if component is None:
        raise UserError(f"'{name}' has no denoiser; expected a transformer or unet in model_index.json; name a whole pipeline")
    for key, (library, _) in components.items():
        if (folder / key / f"{library}.py").exists():
            raise UserError(
                f"'{name}' wants its own {key}/{library}.py run; expected classes of diffusers and transformers alone, as code "
                "that comes with a folder is never run; take another pipeline"
            )
    for other in ("vqvae", "movq", "transformer_2"):
        if other in components:
            raise UserError(
                f"'{name}' has a {other} as well; expected one denoiser, and an autoencoder called vae; take another pipeline"
            )
    return Base(name, folder, components, component, index)


def bridge_of(
    model: nn.Module, call: Adapter, process: TrigFlow, predicts: Predicts, schedule: Tensor | Schedule | None,
    time_scale: float, **more: Any,
) -> Bridge:  # fmt: skip
    """The bridge from what a denoiser predicts to TrigFlow. It is called in the precision of its weights, with times as they
    are; of more channels than it is given (epsilon and variance) the first are taken."""

    def adapter(model: Any, x: Tensor, time: Tensor, **conditions: Tensor) -> Tensor:
        weights = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
        # of models of diffusers, some weights are always in float32
        dtype = getattr(model, "dtype", None) or next(weights, x.dtype)
        given = {name: row.to(dtype) if row.is_floating_point() else row for name, row in conditions.items()}
        return call(model, x.to(dtype), time, **given)[:, : x.shape[1]].to(x.dtype)

    shared: dict[str, Any] = {"scale": 1 / process.sigma_data, "adapter": adapter, **more}
    if predicts == "flow":
        return FlowBridge(model, process, time_scale=time_scale, **shared)
    if schedule is None:
        raise UserError(f"a model that predicts {predicts} without a schedule; expected its alphas_cumprod; pass schedule")
    return VPBridge(model, process, schedule, predicts=predicts, **shared)


def process_of(schedule: Tensor | Schedule | None, sigma_data: float) -> TrigFlow:
    """The process of a denoiser of this schedule. One of DDPM ends at its last step, and a denoiser is told no other for
    stronger noise; so drawing and training begin there, unless that is beyond 80, as of a flow (None)."""
    known = DiscreteSchedule(schedule) if isinstance(schedule, Tensor) else schedule
    most = math.inf if known is None else sigma_data * math.tan(known.angle_range[1])
    return TrigFlow(sigma_data=sigma_data, sigma_max=min(80.0, most))


_LOADED: weakref.WeakValueDictionary[tuple[str, str, str], nn.Module] = weakref.WeakValueDictionary()
"""Denoisers in memory, so that teacher and student share the weights of one."""


def denoiser_of(base: Base, digest: str, dtype: Dtype) -> nn.Module:
    """The denoiser, frozen, in eval mode, of weights that others may use as well.

    Args:
        digest: that of `Base.digest` when it was imported.

    Raises:
        UserError: where its weights cannot be read, or are others than those imported.
    """
    key = (base.name, digest, dtype)
    found = _LOADED.get(key)
    if found is None:
        if digest not in (base.digest(), base.digest(0)):
            raise UserError(
                f"the {base.component} of '{base.name}' has changed since it was imported; expected the same files; restore "
                "them, or import it again"
            )
        kind = class_named(base.denoiser, base)
        found = loaded(
            lambda: kind.from_pretrained(base.folder, subfolder=base.component, torch_dtype=plain_dtype(dtype)), base
        )
        in_few_bits(found, dtype)
        _LOADED[key] = found
    return found


def plain_dtype(dtype: Dtype) -> torch.dtype:
    """In which weights are read: before they are quantized, in bfloat16."""
    found: torch.dtype = torch.bfloat16 if dtype in KINDS else getattr(torch, dtype)
    return found


def in_few_bits(model: nn.Module, dtype: Dtype) -> None:
    """Quantize the linear layers of a denoiser, where that is asked for."""
    if dtype in KINDS:
        quantize(model, dtype)  # type: ignore[arg-type]


def empty_denoiser(base: Base, dtype: Dtype) -> nn.Module:
    """The denoiser on the meta device, where weights have no values, frozen: to count what it takes."""
    with torch.device("meta"):
        made: nn.Module = class_named(base.denoiser, base).from_config(base.config(base.component))
    made.to(plain_dtype(dtype)).eval().requires_grad_(False)
    in_few_bits(made, dtype)
    return made


def loaded(load: Any, base: Base) -> Any:
    """What `load()` loads of a pipeline, frozen and in eval mode. Raises a UserError where it cannot be read."""
    try:
        with generators_kept(), quiet():  # fresh weights, about to be replaced, draw from the default generator
            found = load()
    except MemoryError:
        raise
    except Exception as error:  # diffusers raises all kinds
        raise UserError(
            f"'{base.name}' cannot be loaded ({on_one_line(error)}); expected a folder that diffusers wrote; restore it"
        ) from None
    return found.eval().requires_grad_(False) if isinstance(found, nn.Module) else found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars of diffusers and transformers while they load, and what they say of their own arguments."""
    from diffusers.utils import logging as one
    from transformers.utils import logging as other

    shown = [room for room in (one, other) if room.is_progress_bar_enabled()]
    for room in shown:
        room.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for room in shown:
            room.enable_progress_bar()


@functools.lru_cache(maxsize=1)
def reader_of(folder: Path, component: str) -> Any:
    """The pipeline in a folder without denoiser, autoencoder and scheduler, to read texts with, in float32 on the CPU."""
    base = open_base(str(folder))
    parts = (component, "vae", "scheduler", "safety_checker", "feature_extractor")
    without: dict[str, Any] = {name: None for name in parts if name in base.components}
    for name in sorted(base.components.keys() - without.keys()):
        if not (folder / name).is_dir():
            raise UserError(f"'{folder}' has no folder {name}; expected all that its model_index.json names; restore it")
    with torch.device("meta"):
        for name in parts[:2] if base.family.shells else ():
            without[name] = class_named(base.components[name][1], base).from_config(base.config(name))
    kind = class_named(str(base.index.get("_class_name")), base)
    return loaded(lambda: kind.from_pretrained(folder, **without, torch_dtype=torch.float32), base)


def class_named(name: str, base: Base) -> Any:
    """A class of diffusers. Raises a UserError where it has none of this name."""
    kind = getattr(_diffusers(), name, None)
    if not isinstance(kind, type):
        raise UserError(
            f"'{base.name}' is made of a {name}, which diffusers {_diffusers().__version__} has not; expected a class of its "
            "own, as code that comes with a folder is never run; install a later diffusers, or take another pipeline"
        )
    return kind


def _is_component(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)


def _read_config(path: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        fault = "it is no object"
    except (OSError, ValueError) as error:
        fault = getattr(error, "strerror", None) or on_one_line(error)
    raise UserError(
        f"{what} has no {os.path.join(*path.parts[-2:])} that can be read ({fault}); expected the folder of a pipeline as "
        "diffusers writes it; check the path"
    )


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingExtraError("models of diffusers", "diffusers", "diffusers") from error
    return diffusers
