"""LTX-Video."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from trigflow.models.foreign.family import Family, family, rows_of


@family
class LTX(Family):
    name = "ltx"
    classes = ("LTXVideoTransformer3DModel",)
    conditions = ("text", "text_mask")
    size = 512
    frames = 21
    """Of latents: 161 frames of a video, eight at a time after the first."""
    steps = (8 / 25, 32, 32)
    """Seconds, in 25 frames a second, and pixels of a latent."""

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        sides = dict(zip(("num_frames", "height", "width"), x.shape[2:], strict=True))
        rows = model(
            hidden_states=rows_of(x), encoder_hidden_states=told["text"], encoder_attention_mask=told["text_mask"],
            timestep=time, rope_interpolation_scale=self.steps, **sides, return_dict=False,
        )[0]  # fmt: skip
        return rows.mT.reshape(x.shape)

    def scaling(self, vae: Mapping[str, Any], weight: Callable[[str], Tensor]) -> tuple[Iterable[float], Iterable[float]]:
        return weight("latents_mean").tolist(), (weight("latents_std") / vae["scaling_factor"]).tolist()
