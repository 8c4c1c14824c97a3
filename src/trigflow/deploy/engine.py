"""An engine: a model that draws with a fast variant of its network, and remembers nothing from one batch to the next."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trigflow.conditions import rows_of, said_of
from trigflow.deploy.fixed import SIZES, FixedSizes
from trigflow.deploy.variants import build_variant, require_float32
from trigflow.models.model import Model
from trigflow.runtime.errors import UserError


class Engine:
    """Draws batches from noise that the caller brings.

    The result is a function of noise, labels, guidance and steps. What a sample is drawn together with, the padding of the
    batch, and the variant (other than bf16, fp16 and int8) change no more than the rounding of sums in float32: a pixel by
    at most one of 255 levels, and most of them by none. `traced` and `graph` pad a batch to the next recorded size.

    An engine may be called from several threads; variants that have buffers take turns. The network of the model that it was
    given is put into eval mode and frozen; see `build_variant`.

    Args:
        model: a student, or a diffusion model (drawn with Heun).
        steps: evaluations of a student, solver steps of a diffusion model; None for `Model.default_steps`.
        variant: one of `trigflow.deploy.VARIANTS`; or auto: graph on CUDA, otherwise traced, and plain for a network
            that cannot be recorded.

    Attributes:
        model: with the network replaced by the variant, to be used like any other.
        variant: name of the variant, as asked for.
        steps: as given, or the default.

    Raises:
        MissingExtraError: for onnx without onnxruntime.
        UserError: for steps that the model cannot take, an unknown variant, or one that does not work here; for weights
            that are not float32.
    """

    def __init__(self, model: Model, *, steps: int | None = None, variant: str = "auto") -> None:
        require_float32(model)
        self.steps = model.default_steps() if steps is None else steps
        model.sampler(self.steps)
        network = build_variant(variant, model.network, model.shape, lambda n: model.conditioner.conditions(None, n))
        self.variant = variant
        self.model = dataclasses.replace(model, network=network)

    def fresh_needed(self, steps: int | None = None) -> int:
        """How many tensors of fresh noise `draw` wants: `steps - 1` of a student with neither segments nor average
        velocities, otherwise none."""
        return (self.steps if steps is None else steps) - 1 if self.model.sampling.fresh else 0

    def draw(
        self,
        noise: Tensor,
        labels: Any = None,
        guidance: float | Tensor = 1.0,
        *,
        conditions: Mapping[str, Any] | None = None,
        fresh: Sequence[Tensor] = (),
        steps: int | None = None,
    ) -> Tensor:
        """Images of this noise.

        Args:
            noise: `N(0, sd^2 I)`, floating `(b, c, h, w)`, b at least 1, on any device; such as `Model.noise(seed, 0, 0, b)`.
            labels: classes by number or name, one for all or one a sample; None for a model without classes, and for no other.
            guidance: scale, one for all or `(b,)`; see `Model.velocity`.
            conditions: what else is said, by name, as the model's `conditioner` understands it; one row, or one a sample.
            fresh: fresh noise like `noise` for the steps after the first, as many as `fresh_needed()` says; such as
                `Model.noise(seed, k, 0, b)` for k = 1, 2, ...
            steps: in place of the engine's.

        Returns:
            uint8 `(b, c, h, w)` on the CPU; of a model of latents, what the autoencoder makes of them.

        Raises:
            UserError: for shapes that do not fit, labels or guidance that the model does not have, or steps it cannot take.
        """
        model, expected = self.model, self.fresh_needed(steps)
        if not noise.ndim or tuple(noise.shape[1:]) != model.shape or not len(noise) or not noise.is_floating_point():
            raise UserError(
                f"noise of shape {tuple(noise.shape)} and type {noise.dtype}; expected floating (b, *shape) with b at least 1 "
                f"and shape {model.shape}; pass Model.noise(seed, 0, 0, b)"
            )
        if [z.shape for z in fresh] != [noise.shape] * expected:
            raise UserError(
                f"fresh noise of shapes {[tuple(z.shape) for z in fresh]}; expected {expected} of shape {tuple(noise.shape)}; "
                "pass Model.noise(seed, k, 0, b) for k = 1, 2, ..."
            )
        sampler = model.sampler(self.steps if steps is None else steps)
        with torch.inference_mode():
            every = [z.to(model.device, torch.float32) for z in (noise, *fresh)]
            told = rows_of(self._told(labels, conditions, len(noise)), every[0])
            drawn = model.draw(every.__getitem__, model.velocity(told, guidance), sampler)
        return drawn.cpu().clone()  # an ordinary tensor, which may be changed, instead of one of inference mode

    def warm(self, *batches: int) -> None:
        """Draw a batch of each size, so that what a variant does once is done before somebody waits for it."""
        model = self.model
        for batch in batches:
            noises = [model.noise(0, k, 0, batch) for k in range(1 + self.fresh_needed())]
            self.draw(noises[0], 0 if model.num_classes else None, fresh=noises[1:])

    def settle(self, most: int, patience: float = 5.0) -> int:
        """Do now what a variant does once for each batch size, and nothing of the kind later.

        Batches of 1, 2, 4, ... rows are drawn. `traced` and `graph` make every batch of calls of these sizes from then on, so
        that they record no more and their memory stays as it is.

        Args:
            most: rows of the largest of these batches, at least 1.
            patience: seconds; when a batch took longer, it was the largest.

        Returns:
            Rows of the largest batch.
        """
        sizes = []
        for size in (size for size in SIZES if size <= most):
            begun = time.monotonic()
            self.warm(size)
            sizes.append(size)
            if time.monotonic() - begun > patience:
                break
        if isinstance(self.model.network, FixedSizes):
            self.model.network.sizes = tuple(sizes)
        return sizes[-1]

    def _told(self, labels: Any, conditions: Mapping[str, Any] | None, batch: int) -> dict[str, Tensor]:
        conditioner, said = self.model.conditioner, said_of(labels, conditions)
        if conditioner.classes is not None and "label" not in said:
            raise UserError(
                f"no labels for a model of {conditioner.classes.num} classes; expected one, or one a sample; pass labels"
            )
        for name, count in conditioner.counts(said).items():
            if count not in (1, batch):
                what = "labels" if name == "label" else f"rows of {name}"
                raise UserError(f"{count} {what} for {batch} samples; expected one, or one per sample; correct {name}")
        return conditioner.conditions(said, batch)


def fast(model: Model, variant: str = "auto") -> Model:
    """The model with a fast variant of its network: `fast(load("runs/demo")).sample(16)`. See `Engine`."""
    return Engine(model, variant=variant).model
