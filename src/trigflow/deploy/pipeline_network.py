"""What a pipeline is made of: the network in the form of diffusers, and how its parts are found and read."""

# mypy: disable-error-code="attr-defined, misc, no-untyped-call"
# (a type checker does not see what diffusers puts together when it is imported)
# No `from __future__ import annotations`: diffusers reads the types of components off signatures.

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trigflow.models.model import Model, current_description, described
from trigflow.networks import CustomConfig
from trigflow.runtime.errors import MissingExtraError, UserError, first_line
from trigflow.runtime.files import read_json, write_json
from trigflow.runtime.seeds import generators_kept

try:
    from diffusers import ConfigMixin, ModelMixin, SCMScheduler
    from diffusers.configuration_utils import register_to_config
    from huggingface_hub import snapshot_download
except ImportError as error:
    raise MissingExtraError("a pipeline", "diffusers", "diffusers") from error

DOWNLOAD_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
DOWNLOADED = ["*.json", "*/*.json", "*/*.safetensors"]
"""What of a repository is read: no code."""


class TrigFlowModel(ModelMixin, ConfigMixin):
    """The velocity `v = sd F(x_t / sd, t, **conditions)` of a model, in the form of diffusers.

    This is what `SCMScheduler` takes as its model output: `x0 = cos(t) x_t - sin(t) v`.

    Args:
        model: the `model.json` of its folder.
        run: of a pipeline that was written with format 1, the configuration of the run; else None.
        figures: what was measured, rows of a table for the model card; see `trigflow.deploy.card.figures_of`.

    Attributes:
        model: the `trigflow.Model` around the same weights, with everything a `Model` can do.

    Raises:
        UserError: for a configuration or description that trigflow did not write.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, model: dict[str, Any], run: dict[str, Any] | None = None, figures: list[dict[str, Any]] | None = None
    ) -> None:
        super().__init__()
        what = "the model in config.json"
        self.model = described(current_description(dict(model), what, run), what)
        self.network = self.model.network.to(torch.get_default_dtype())  # which diffusers sets to `torch_dtype`

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        guidance_scale: float | Tensor = 1.0,
        **conditions: Tensor,
    ) -> Tensor:
        """The velocity at `(x_t, t)`.

        Args:
            sample: `x_t`, `(b, *shape)`, whose noise has standard deviation `sd`, not 1.
            timestep: t in (0, pi/2], one number or `(b,)`.
            class_labels: int64 `(b,)`; None for an unconditional model.
            guidance_scale: one number or `(b,)`; other than 1 only for a student distilled with guidance.
            conditions: others that the network takes, by name, `(b, ...)`.

        Returns:
            v, like `sample`.

        Raises:
            UserError: as `Model.velocity`.
        """
        times = torch.as_tensor(timestep, dtype=sample.dtype, device=sample.device).expand(len(sample))
        told = conditions if class_labels is None else {"label": class_labels, **conditions}
        return self.model.velocity(told, guidance_scale)(sample, times)


def check_supported(model: Model) -> None:
    """Raise a UserError unless the model is a consistency student that jumps to time 0, which `SCMScheduler` draws from, and
    its network can be built from a configuration."""
    if isinstance(model.spec, CustomConfig):
        raise UserError(
            "a network of your own for a diffusers pipeline; expected one of trigflow's, which a configuration is enough to "
            "build; export it to onnx or torchscript with trigflow.deploy.export.export_network"
        )
    what = None
    if model.kind == "diffusion":
        what = "a diffusion teacher"
    elif model.sampling.jumps == "segments":
        what = f"a multistep student of {model.sampling.segments} segments"
    elif model.sampling.jumps != "zero":
        what = f"a student of average velocities ({model.origin.get('objective', 'any jump')})"
    if what is not None:
        raise UserError(
            f"{what} for a diffusers pipeline; expected a consistency student that jumps to time 0, which SCMScheduler can "
            "draw from; export it to onnx or torchscript, or draw with trigflow sample"
        )


def rewrite(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file, and drop where the object that it describes was read from."""
    raw = {**read_json(path, "configuration"), **changes}
    raw.pop("_name_or_path", None)
    write_json(path, raw)


def local_folder(source: str | Path, options: dict[str, Any]) -> Path:
    """The folder itself, or what was downloaded of a repository of the hub, with `DOWNLOAD_OPTIONS`."""
    if unknown := set(options) - set(DOWNLOAD_OPTIONS):
        raise UserError(
            f"{', '.join(sorted(unknown))} for TrigFlowPipeline.from_pretrained; expected network, scheduler, variant, "
            f"torch_dtype, use_safetensors, {', '.join(DOWNLOAD_OPTIONS)}; leave it out"
        )
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=DOWNLOADED, **options))
    except Exception as error:  # the hub raises all kinds
        raise UserError(
            f"'{source}' cannot be opened ({first_line(error)}); expected a folder that save_pretrained wrote, or an id of the "
            "Hugging Face hub; check the name"
        ) from None


def read_component(cls: Any, folder: Path, variant: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a folder in this dtype, every weight of it read. Raises a UserError when a file is missing or damaged, or
    weights and configuration do not belong together."""
    weights = "no variant" if variant is None else f"the variant {variant}"
    with (
        _told(folder, f"a config.json and whole safetensors files of {weights}; restore it, or name another variant"),
        generators_kept(),  # fresh weights, about to be replaced, draw from the default generator
    ):
        module, report = cls.from_pretrained(
            os.fspath(folder),
            torch_dtype=dtype,
            variant=variant,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    if report["missing_keys"] or report["unexpected_keys"]:
        raise UserError(
            f"'{folder}' holds other weights than its config.json asks for; expected all of them and no more; restore it"
        )
    return module


def read_scheduler(folder: Path) -> SCMScheduler:
    """The scheduler of a folder. Raises a UserError when it is missing or damaged."""
    with _told(folder, "a scheduler_config.json; restore it"):
        return SCMScheduler.from_pretrained(os.fspath(folder))


@contextlib.contextmanager
def _told(folder: Path, expected: str) -> Iterator[None]:
    """A block that reads a folder, and says in one line why it could not."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # diffusers raises all kinds
        raise UserError(f"'{folder}' cannot be read ({first_line(error)}); expected {expected}") from None
