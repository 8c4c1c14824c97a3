"""How samples of a model are drawn: the part of `model.json` that a sampler needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from trigflow.runtime.errors import UserError

SamplingKind = Literal["ode", "flow_map"]
Jumps = Literal["zero", "segments", "any"]


@dataclass(frozen=True)
class Sampling:
    """How samples of a model are drawn.

    Raises:
        UserError: for values out of range.
    """

    kind: SamplingKind = "ode"
    """ode: a diffusion model, by solving its probability-flow ODE. flow_map: a student, in one or a few jumps."""
    jumps: Jumps = "zero"
    """flow_map: where jumps end. zero: at time 0, and fresh noise leads back up. segments: at the ends of equal segments. any:
    where the next one begins."""
    segments: int = 1
    """Segments that the student was trained for; its number of steps."""
    guidance_max: float = 1.0
    """Largest guidance scale of a student that takes it as an input; 1 for one that takes none."""
    gamma: float = 0.0
    """flow_map, jumps to any: share of fresh noise between the steps, in [0, 1]; see `flow_map_sample`."""
    guided: bool = False
    """ode: whether the branch without conditions was trained, so that classifier-free guidance has something to lead away
    from."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(SamplingKind) or self.jumps not in get_args(Jumps):
            raise UserError(
                f"sampling of the kind {self.kind!r} with jumps to {self.jumps!r}; expected one of "
                f"{', '.join(get_args(SamplingKind))} and one of {', '.join(get_args(Jumps))}; "
                "take the file from a finished run"
            )
        if self.segments < 1 or not self.guidance_max >= 1 or not 0 <= self.gamma <= 1:
            raise UserError(
                f"sampling with {self.segments} segments, guidance up to {self.guidance_max} and gamma {self.gamma}; expected "
                "the first two at least 1, and gamma in [0, 1]; take the file from a finished run"
            )

    @property
    def noise(self) -> float:
        """The gamma of `flow_map_sample`: 1 where jumps end at time 0, 0 where they end at the ends of segments."""
        return {"zero": 1.0, "segments": 0.0, "any": self.gamma}[self.jumps]

    @property
    def fresh(self) -> bool:
        """Whether fresh noise is added between the steps."""
        return self.kind == "flow_map" and self.noise > 0

    def state(self) -> dict[str, Any]:
        """A plain dict for JSON; `from_state` gives back an equal object."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Sampling:
        """The inverse of `state`; KeyError, TypeError or ValueError for what is none."""
        numbers = int(state["segments"]), float(state["guidance_max"]), float(state["gamma"]), bool(state["guided"])
        return cls(state["kind"], state["jumps"], *numbers)
