"""From orders to pixels: what a picture depends on, and who draws it.

A picture depends on its seed and number, its place on the walk, its label mix or prompt, guidance and steps, and on nothing
else: all noise is drawn for it alone. What it is drawn together with changes the order in which the arithmetic of the network
rounds (last bits of float32), and so at times a pixel by one of 255 levels.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from trigflow.conditions import pick
from trigflow.models.model import Model
from trigflow.samplers import Edit, VelocityFunction
from trigflow.samplers.editing import weighed
from trigflow.serve.noise import NoiseSource, Walk

Mix = tuple[tuple[int, float], ...]
"""Classes with their weights, which add up to 1."""


@dataclass(frozen=True)
class Order:
    """Pictures start ... stop - 1 of a seed.

    Attributes:
        seed: of all noise.
        start, stop: numbers of the pictures.
        mixes: one for each picture; None for a model without classes.
        guidance: guidance scale, 1 for none.
        steps: as in `Model.sample`.
        walk: two angles; (0, 0) is the picture that `Model.sample` draws. See `trigflow.serve.noise`.
        conditions: all others that the network takes, by name, a row for each picture; of a mix of texts, `(n, m, ...)`.
        weights: of the m texts of a mix.
        edit: a picture to begin at.
    """

    seed: int
    start: int
    stop: int
    mixes: tuple[Mix, ...] | None
    guidance: float
    steps: int
    walk: Walk = (0.0, 0.0)
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    weights: tuple[float, ...] = (1.0,)
    edit: Edit | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> Hashable:
        """Orders with the same key can be drawn together; unguided ones are not made to pay for guided ones."""
        return self.steps, self.guidance == 1, self.weights, self.edit


class Drawer(Protocol):
    """Draws batches, one after the other, in the thread that owns it."""

    def draw(
        self,
        noise: Callable[[int], Tensor],
        mixes: Sequence[Mix] | None,
        guidance: Tensor,
        steps: int,
        conditions: Mapping[str, Tensor] | None = None,
        *,
        weights: Sequence[float] = (1.0,),
        edit: Edit | None = None,
    ) -> Tensor:
        """Pictures of one batch.

        Args:
            noise: `noise(k)` is noise `(b, c, h, w)` of standard deviation sd: k = 0 where sampling starts, k > 0 the fresh
                noise of later steps.
            mixes: b label mixes; None without classes.
            guidance: scales, float32 `(b,)`.
            steps: as in `Model.sample`.
            conditions: of everything but the class, `(b, ...)`.
            weights, edit: see `Order`; passed where there are any.

        Returns:
            uint8 `(b, c, h, w)`, on the CPU.
        """
        ...


class ModelDrawer:
    """Draws with `Model`, step by step as `Model.sample` does."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @torch.inference_mode()
    def draw(
        self,
        noise: Callable[[int], Tensor],
        mixes: Sequence[Mix] | None,
        guidance: Tensor,
        steps: int,
        conditions: Mapping[str, Tensor] | None = None,
        *,
        weights: Sequence[float] = (1.0,),
        edit: Edit | None = None,
    ) -> Tensor:
        model, guidance = self.model, guidance.to(self.model.device)
        told = {name: value.to(model.device) for name, value in (conditions or {}).items()}
        texts = [told] if len(weights) == 1 else [{k: v[:, i] for k, v in told.items()} for i in range(len(weights))]
        velocity = weighed([(w, mixed_velocity(model, mixes, guidance, one)) for w, one in zip(weights, texts, strict=True)])
        return model.codec.pictures(model.draw(noise, velocity, model.sampler(steps, edit=edit))).cpu()


def mixed_velocity(
    model: Model, mixes: Sequence[Mix] | None, guidance: Tensor, conditions: Mapping[str, Tensor] | None = None
) -> VelocityFunction:
    """`v = sum_c w_c v_c`: the velocities of the classes in a mix, weighed, at every evaluation.

    A velocity is linear in the expected data, so a mix of velocities leads to data between the classes at every step; for a
    diffusion model it is the velocity of a mixture that forgets which class is likelier at x_t. All classes of all mixes go
    through the network in one batch. A mix of one class is that class, bit for bit.
    """
    told = conditions or {}
    if mixes is None:
        return model.velocity(told, guidance)
    rows = [(i, label, weight) for i, mix in enumerate(mixes) for label, weight in mix]
    owner, label = (torch.tensor([row[k] for row in rows], device=guidance.device) for k in (0, 1))
    velocity = model.velocity({"label": label, **pick(told, owner)}, guidance[owner])
    if len(rows) == len(mixes):
        return velocity
    weight = torch.tensor([row[2] for row in rows], dtype=torch.float32, device=guidance.device)

    def mixed(x: Tensor, t: Tensor, *end: Tensor) -> Tensor:
        v = velocity(x[owner], t[owner], *(e[owner] for e in end))
        weighed = weight.to(v.dtype).reshape(-1, *[1] * (v.ndim - 1)) * v
        return torch.zeros_like(x).index_add_(0, owner, weighed)

    return mixed


def draw_together(drawer: Drawer, source: NoiseSource, orders: Sequence[Order]) -> list[Tensor]:
    """The pictures of several orders of one key, drawn as one batch; uint8 `(len(order), c, h, w)` for each."""

    def noise(k: int) -> Tensor:
        if k == 0:
            return torch.cat([source.start(order.seed, order.walk, order.start, order.stop) for order in orders])
        return torch.cat([source.fresh(order.seed, k, order.start, order.stop) for order in orders])

    mixes = None if orders[0].mixes is None else [mix for order in orders for mix in order.mixes or ()]
    guidance = torch.tensor([order.guidance for order in orders for _ in range(len(order))], dtype=torch.float32)
    conditions = {name: torch.cat([order.conditions[name] for order in orders]) for name in orders[0].conditions}
    more: dict[str, Any] = {} if orders[0].edit is None else {"edit": orders[0].edit}
    more |= {} if len(orders[0].weights) == 1 else {"weights": orders[0].weights}
    images = drawer.draw(noise, mixes, guidance, orders[0].steps, conditions, **more)
    return list(images.split([len(order) for order in orders]))
