"""A denoiser of diffusers as a network of ours, with its own weights, or with adapters in them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trigflow.models.foreign.adapters import AdapterConfig, add_adapters, is_adapter
from trigflow.models.foreign.base import Dtype, Predicts, bridge_of, denoiser_of, empty_denoiser, open_base
from trigflow.models.foreign.family import family_named
from trigflow.models.foreign.quantized import KINDS
from trigflow.networks import ConditioningConfig, NetworkConfig, register
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.tangent import jvp


@dataclass(frozen=True)
class ForeignConfig(NetworkConfig):
    """A denoiser of diffusers; its weights stay where they are."""

    base: str = ""
    """Folder of the pipeline, or its id on the hub."""
    digest: str = ""
    """Of the denoiser when it was imported; another is refused."""
    family: str = ""
    """How it is called; see `trigflow.models.foreign.family`."""
    predicts: Predicts = "flow"
    rows: dict[str, list[int]] = field(default_factory=dict)
    """Shape of what means "none", by condition."""
    dtype: Dtype = "float32"
    """Of the weights that are not trained; see `trigflow.models.foreign.quantized` for those of fewer bits."""
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    dropout: float = 0.0
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)
    """`takes` alone; the rest is up to the denoiser."""
    own_precision: ClassVar[bool] = True

    def as_teacher(self) -> ForeignConfig:
        return self.changed(adapter=AdapterConfig())


EMPTY: ContextVar[bool] = ContextVar("empty", default=False)
"""While it is true, denoisers are made with fresh weights instead of read."""


class Foreign(nn.Module):
    """The denoiser behind a bridge: `F(x_t / sd, t, **conditions)`.

    With adapters they alone are trained, averaged, saved and loaded, beside the rows that mean "none"; without, nothing is but
    these rows; with `full` everything is. Copies share what is not.
    """

    at_hand = "bridge.model."
    """Weights with these names are read by the network itself."""

    def __init__(self, config: ForeignConfig, sigma_data: float = 0.5) -> None:
        super().__init__()
        base, family, adapter = open_base(config.base), family_named(config.family), config.adapter
        self.config = config
        adapter.check()
        if adapter.full and config.dtype in KINDS:
            raise UserError(
                f"full training of weights that are kept as {config.dtype}, which cannot be trained; expected adapters, or a "
                "teacher imported as float32, bfloat16 or float16; import it again, or pass --lora RANK"
            )
        self.trained = "all" if adapter.full else "adapters" if adapter.rank else "none"
        pristine = empty_denoiser(base, config.dtype) if EMPTY.get() else denoiser_of(base, config.digest, config.dtype)
        self.pristine = (pristine,)  # in a tuple, out of sight of `modules`; stays in memory as long as somebody shares it
        model = copy.deepcopy(pristine, self._shared(pristine))
        if adapter.full:
            model.requires_grad_(True).float()
        elif adapter.rank:
            add_adapters(model, adapter, family.targets)
        self.names = tuple(config.rows)
        for name, shape in config.rows.items():
            dtype = torch.bool if name.endswith("_mask") else torch.int64 if name == "label" else torch.float32
            self.register_buffer(f"none_{name}", torch.zeros(shape, dtype=dtype))
        told = frozenset({*config.conditioning.takes, *self.names})
        self.takes = told - ({"guidance"} - {*config.conditioning.takes})  # not told, it is always that of the import
        process, schedule = TrigFlow(sigma_data=sigma_data), None if config.predicts == "flow" else base.schedule()
        self.bridge = bridge_of(model, family.call, process, config.predicts, schedule, family.time_scale, takes=told)

    @property
    def model(self) -> Any:
        """The denoiser."""
        return self.bridge.model

    @property
    def null(self) -> dict[str, Tensor]:
        """What means "none"."""
        return {name: getattr(self, f"none_{name}") for name in self.names if name in self.takes}

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        rows = {name: getattr(self, f"none_{name}") for name in self.names if name not in conditions}
        none = {name: row.expand(len(x), *row.shape) for name, row in rows.items()}
        return self.bridge(x, t, **none, **conditions)  # type: ignore[no-any-return]

    def train(self, mode: bool = True) -> Foreign:
        """Of the denoiser adapters alone: in training some denoisers leave labels out at random (DiT)."""
        super().train(mode)
        for name, part in self.model.named_modules():
            part.training = mode and is_adapter(name)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is saved; see the class."""
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if self._is_own(name)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in found.missing_keys if self._is_own(name)]
        if strict and (missing or found.unexpected_keys):
            raise RuntimeError(f"entries that are not in both: {', '.join([*missing, *found.unexpected_keys])}")
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Foreign:
        memo.update(self._shared(self.model))
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy({**self.__dict__, "pristine": ()}, memo), pristine=self.pristine)
        return made

    def _is_own(self, name: str) -> bool:
        return self.trained == "all" or name.startswith("none_") or (self.trained == "adapters" and is_adapter(name))

    def _shared(self, model: nn.Module) -> dict[int, Any]:
        """A memo for `copy.deepcopy` of the denoiser that shares what is not trained."""
        kept = [value for name, value in model.named_parameters() if not self._is_own(name)]
        return {id(value): value for value in (*kept, *([] if self.trained == "all" else model.buffers()))}


register("diffusers", ForeignConfig, Foreign)


def check_moves(network: Foreign, shape: tuple[int, ...]) -> None:
    """Check that what a denoiser predicts follows its time: that it has a derivative by it, which one that rounds its time, or
    looks it up in a table, has not. (Half a precision rounds it as well, but in passing: its derivative is right.)

    Args:
        network: with its weights, on its device.
        shape: of one sample.

    Raises:
        UserError: where it does not.
    """
    bridge: Any = network.bridge
    like = next(network.model.parameters())
    scale = (
        getattr(bridge, "time_scale", 1.0)
        if network.config.predicts == "flow"
        else float(bridge.schedule(torch.ones(1, dtype=torch.float32)))
    )
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like.device)
    told = {name: getattr(network, f"none_{name}")[None] for name in network.names}
    if "label" in network.takes and not told:
        told = {"label": torch.zeros(1, dtype=torch.int64, device=like.device)}
    time = torch.full((1,), 0.5 * scale, dtype=torch.float32, device=like.device)
    with torch.no_grad():
        _, slope = jvp(lambda time: bridge.adapter(bridge.model, x, time, **told), (time,), (torch.ones_like(time),))
    if not bool(slope.any()):
        raise UserError(
            f"a {type(network.model).__name__} that is told its time in whole steps: a fifth of one changes nothing; expected "
            "a prediction that follows the time, as distillation needs its derivative; have `call` of its family hand on the "
            "time as it is, or take another teacher"
        )
