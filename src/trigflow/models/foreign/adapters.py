"""Low-rank adapters of peft in a denoiser."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trigflow.runtime.errors import MissingExtraError, UserError, on_one_line
from trigflow.runtime.files import read_tensors


@dataclass(frozen=True)
class AdapterConfig:
    """What of a denoiser from elsewhere is trained: adapters, or everything."""

    rank: int = 0
    """Rank of the adapters; 0 for none."""
    alpha: float | None = None
    """They act with the factor alpha / rank; by default 1."""
    targets: tuple[str, ...] = ()
    """Modules that get one, by the ends of their dotted names, or one regular expression; by default those of the family."""
    dora: bool = False
    """Adapters of direction and magnitude (DoRA)."""
    dropout: float = 0.0
    """In front of the adapters, in [0, 1)."""
    full: bool = False
    """Train every weight, without adapters."""

    def check(self) -> None:
        """Raise a UserError for settings that make no sense."""
        if self.rank < 0 or not 0 <= self.dropout < 1 or (self.full and self.rank):
            raise UserError(
                f"adapters of rank {self.rank} with dropout {self.dropout:g}{' and full training' * self.full}; expected a "
                "rank of at least 1, a dropout in [0, 1), and either adapters or full training; correct them"
            )


def add_adapters(model: nn.Module, config: AdapterConfig, targets: tuple[str, ...]) -> None:
    """Put adapters into a denoiser, in float32. They start without effect and alone are trained.

    Args:
        targets: of the family, where the configuration names none.

    Raises:
        UserError: for settings that make no sense, or where no module is called so.
        MissingExtraError: without peft.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("adapters", "peft", "lora") from error
    config.check()
    chosen = config.targets or targets
    settings: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.rank if config.alpha is None else config.alpha,
        "target_modules": chosen[0] if len(chosen) == 1 and not chosen[0].isidentifier() else list(chosen),
        "use_dora": config.dora,
        "lora_dropout": config.dropout,
        "init_lora_weights": True,
    }
    model.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise UserError(
            f"no adapters at {', '.join(chosen)} ({on_one_line(error)[:120]}); expected ends of names of linear layers, like "
            f"{', '.join(names[:8])}; correct the targets"
        ) from None
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.requires_grad:
                part._parameters[name] = nn.Parameter(parameter.detach().to(torch.float32))


def read_adapters(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of adapters that somebody else has trained, by the names of a network that is to start from them, and whose own
    adapters act with the factor 1.

    Args:
        path: a file of safetensors as `save_lora_weights` of diffusers or peft writes it, or a folder with one.
        own: entries of the network.

    Raises:
        UserError: for a file that is none, or adapters of other modules or ranks: of another family, or of another rank.
    """
    file = path / "pytorch_lora_weights.safetensors" if path.is_dir() else path
    given, factor = read_tensors(file, "adapters"), factor_of(file)
    wanted = {
        name.partition(".model.")[2].replace(".default", "").removesuffix(".weight"): name for name in own if is_adapter(name)
    }
    found = {}
    for name, value in given.items():
        plain = name.removesuffix(".weight")
        known = next((wanted[key] for key in (plain, plain.partition(".")[2]) if key in wanted), None)
        if known is None or own[known].shape != value.shape:
            raise UserError(
                f"'{file}' has adapters at '{name}' of shape {tuple(value.shape)}, which the student has not; expected "
                "adapters of the same denoiser, modules and rank; correct --from, --lora or --lora-targets"
            )
        found[known] = value.float() * (factor if ".lora_B." in known else 1.0)
    missing = wanted.keys() - {plain for plain, known in wanted.items() if known in found}
    if missing:
        raise UserError(
            f"'{file}' has no adapters at '{min(missing)}' and {len(missing) - 1} others; expected those of the student; "
            "correct --from or --lora-targets"
        )
    return found


def factor_of(file: Path) -> float:
    """The factor alpha / rank of adapters in a file, as diffusers notes it in the header; 1 where nothing is noted. Raises a
    UserError for a note that makes no sense."""
    with safe_open(file, "pt") as opened:
        note = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    try:
        told = {name.rpartition(".")[2]: value for name, value in json.loads(note).items()}
        rank = told.get("r", 1)
        return float(told.get("lora_alpha", rank) / (math.sqrt(rank) if told.get("use_rslora") else rank))
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(
            f"'{file}' has a note on its adapters that makes no sense ({on_one_line(error)}); expected alpha and rank as "
            "diffusers writes them; restore it"
        ) from None


def is_adapter(name: str) -> bool:
    """Whether an entry of a state dict is of an adapter."""
    return "lora_" in name
