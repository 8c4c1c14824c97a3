"""What there is to know of a family of denoisers: how one is called, and how its pipeline reads a text.

A family is one small file in `trigflow.models.foreign.families`, or in a file of yours named with `--plugin`::

    @family
    class Sana(Family):
        name = "sana"
        classes = ("SanaTransformer2DModel",)
        conditions = ("text", "text_mask")

        def call(self, model, x, time, text, text_mask):
            return model(x, encoder_hidden_states=text, encoder_attention_mask=text_mask, timestep=time, return_dict=False)[0]

        def read(self, pipeline, texts):
            text, mask, *_ = encoded(pipeline, texts)
            return {"text": text, "text_mask": mask.bool()}
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trigflow.runtime.errors import UserError


class Family:
    """How denoisers of a family are called; see the module.

    Attributes:
        name: of the family, as it is written into `model.json`.
        classes: names of its denoisers in diffusers.
        conditions: names of what a denoiser is told beside sample and time. `text` and `text_mask` are states of a text encoder
            and which of them count, `pooled` one state for the whole text, `label` a class, `guidance` an embedded scale,
            `sizes` whatever is always told in the same way.
        component: of the pipeline that is the denoiser.
        time_scale: a flow model is told this many times sigma, the share of noise.
        whole_times: whether its pipeline in diffusers tells it whole numbers.
        scale: of guidance, where it is an input and nothing is said.
        targets: modules that get adapters by default; the ends of their dotted names.
        size: pixels of the side of a picture, where the configuration does not say.
        frames: of the latents of a video; 0 for pictures.
        patch: latents that are taken together in each direction; 0 for what the configuration says as `patch_size`.
        null_label: whether one number more than there are classes means "none".
        assumed: what nobody said, where the family is a guess (`plain`).
        shells: whether `read` wants a denoiser and an autoencoder to look at; both are without weights.
    """

    name: ClassVar[str] = ""
    classes: ClassVar[tuple[str, ...]] = ()
    conditions: ClassVar[tuple[str, ...]] = ("text",)
    component: ClassVar[str] = "transformer"
    time_scale: ClassVar[float] = 1000.0
    whole_times: ClassVar[bool] = False
    scale: ClassVar[float] = 3.5
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    size: ClassVar[int] = 1024
    frames: ClassVar[int] = 0
    patch: ClassVar[int] = 0
    null_label: ClassVar[bool] = True
    assumed: ClassVar[str] = ""
    shells: ClassVar[bool] = False

    def call(self, model: Any, x: Tensor, time: Tensor, **told: Tensor) -> Tensor:
        """The prediction, `(b, *shape)`: noise, velocity or x0, as the scheduler says; of a flow model noise - data.

        Args:
            model: the denoiser.
            x: noisy latents `(b, *shape)` as the pipeline has them before it packs them.
            time: `(b,)`, in the units of the pipeline's timesteps; of a flow model `time_scale` times sigma. Never rounded.
            told: the conditions, each `(b, ...)`.
        """
        raise NotImplementedError

    def read(self, pipeline: Any, texts: list[str]) -> dict[str, Tensor]:
        """The conditions of these texts, each `(n, ...)` with shapes that do not depend on the texts, by the pipeline's own
        encoders; the pipeline has no denoiser, no autoencoder and no scheduler. By default what `encoded` gives: `text`, and
        `text_mask` where it is among the conditions."""
        text, *rest = encoded(pipeline, texts)
        return {"text": text, "text_mask": rest[0].bool()} if "text_mask" in self.conditions else {"text": text}

    def none(self, pipeline: Any, size: tuple[int, ...]) -> dict[str, Tensor]:
        """What means "none", each `(1, ...)`, of texts and of whatever else is told always in the same way: by default the
        empty text. `size` is height and width of the picture in pixels."""
        return self.read(pipeline, [""])

    def takes(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the conditions of a denoiser with this configuration."""
        return (*self.conditions, "guidance") if config.get("guidance_embeds") else self.conditions

    def shape(self, config: Mapping[str, Any], factor: int, size: int | None) -> tuple[int, ...]:
        """Shape of one sample of a denoiser: by default `(c, h, w)` of a square picture, `(c, frames, h, w)` of a video.

        Args:
            config: of the denoiser.
            factor: pixels that a latent is wide and high.
            size: pixels of the side that is asked for; None for what the configuration says, or `size`.
        """
        known = None if size else config.get("sample_size")
        sides = known if isinstance(known, list | tuple) else [known or (size or self.size) // factor] * 2
        return config["in_channels"], *[self.frames] * bool(self.frames), *sides

    def scaling(
        self, vae: Mapping[str, Any], weight: Callable[[str], Tensor]
    ) -> tuple[Iterable[float], Iterable[float]] | None:
        """Mean and deviation of each channel of the autoencoder's latents; None for what its configuration says. `weight` reads
        one of its weights."""
        return None

    def classes_of(self, config: Mapping[str, Any]) -> int:
        """Classes of a denoiser that takes labels."""
        return int(config["num_embeds_ada_norm"])


FAMILIES: dict[str, Family] = {}
"""From the name to the family. Those that come along are entered by `known`."""

Made = TypeVar("Made", bound=type[Family])


def family(cls: Made) -> Made:
    """Enter a family; to be used as a decorator. One of the same name takes the place of that before."""
    FAMILIES[cls.name] = cls()
    return cls


def known() -> dict[str, Family]:
    """All families, those that come along among them."""
    from trigflow.models.foreign import families

    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")
    return FAMILIES


def family_named(name: str) -> Family:
    """The family of this name. Raises a UserError for an unknown one."""
    from trigflow.models.foreign.plain import of_names

    found = of_names(name[6:-1].split(",")) if name.startswith("plain(") else known().get(name)
    if found is None:
        raise UserError(f"the family '{name}'; expected one of {', '.join(FAMILIES)}; pass the file that adds it as --plugin")
    return found


def family_of(denoiser: str, kind: type | None = None) -> Family:
    """The family of a denoiser, by the name of its class in diffusers; where none knows it, one guessed from the class itself.
    Raises a UserError for one that no family knows and that wants more than a sample, a time and a text, with the file to
    write."""
    from trigflow.models.foreign.plain import guess

    found = next((found for found in known().values() if denoiser in found.classes), None) or (guess(kind) if kind else None)
    if found:
        return found
    example = inspect.cleandoc(inspect.cleandoc(__doc__ or "").partition("::\n\n")[2])
    raise UserError(
        f"no family knows {denoiser}; expected one of {', '.join(sorted(c for f in FAMILIES.values() for c in f.classes))}; "
        "write a file that says how it is called, and pass it as --plugin FILE, such as:\n\n"
        f"from trigflow.models.foreign import Family, family\n\n{example}"
    )


def encoded(pipeline: Any, texts: list[str], **more: Any) -> Any:
    """What a pipeline's own `encode_prompt` makes of texts: without guidance, on the CPU, and in all else as the pipeline has
    it by default when it is called. `more` are settings that come first."""
    taken, called = (inspect.signature(method).parameters for method in (pipeline.encode_prompt, pipeline.__call__))
    given = {name: called[name].default for name in taken if name in called and name != "prompt"}
    given |= {"do_classifier_free_guidance": False, "device": torch.device("cpu"), "num_images_per_prompt": 1, **more}
    return pipeline.encode_prompt([*texts], **{name: value for name, value in given.items() if name in taken})


def packed(x: Tensor, patch: int = 2) -> Tensor:
    """Latents `(b, c, h, w)` as rows of patches `(b, h w / p^2, c p^2)`, channels first within a patch (Flux and its kin)."""
    b, c, h, w = x.shape
    rows = x.view(b, c, h // patch, patch, w // patch, patch).permute(0, 2, 4, 1, 3, 5)
    return rows.reshape(b, (h // patch) * (w // patch), c * patch**2)


def unpacked(rows: Tensor, like: Tensor, patch: int = 2) -> Tensor:
    """The inverse of `packed`, for latents of the shape of `like`."""
    b, c, h, w = like.shape
    x = rows.view(b, h // patch, w // patch, c, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c, h, w)


def rows_of(x: Tensor) -> Tensor:
    """Latents `(b, c, ...)` as rows `(b, places, c)`; `x.mT.reshape(like.shape)` is the inverse."""
    return x.flatten(2).mT


def padded(texts: Sequence[Tensor], length: int) -> dict[str, Tensor]:
    """States of texts, each `(tokens, width)`, as `text` `(n, length, width)`, with the mask of what is theirs."""
    text = torch.stack([F.pad(states, (0, 0, 0, length - len(states))) for states in texts])
    return {"text": text, "text_mask": torch.stack([torch.arange(length) < len(states) for states in texts])}


def by_length(call: Callable[..., Tensor], x: Tensor, mask: Tensor, *told: Tensor) -> Tensor:
    """`call(length, x, *told)` of all samples whose text has the same length, in turn: for denoisers that take no mask."""
    lengths = mask.sum(1)
    groups = [(int(n), (lengths == n).nonzero()[:, 0]) for n in lengths.unique()]
    order = torch.cat([rows for _, rows in groups]).argsort()
    return torch.cat([call(n, *(row[rows] for row in (x, *told))) for n, rows in groups])[order]
