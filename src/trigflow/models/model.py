"""A trained model: a network with everything needed to draw from it, saved as one folder.

    model.json             process, network, codec, classes, and how samples are drawn
    network.safetensors    averaged weights

The folder of a run (of `train`, `distill` or `demo`) also holds `config.json`, the settings of its training, which drawing
never reads. Any of these folders can be loaded, sampled and evaluated.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from dacite import DaciteError
from torch import Tensor, nn
from tqdm import tqdm

from trigflow import samplers
from trigflow.codecs import Codec, codec_from_state
from trigflow.conditions import Conditioner, null, said_of, takes
from trigflow.conditions.conditioner import parts_of
from trigflow.migrations import migrated, stamped
from trigflow.models.editing import edit_of
from trigflow.models.negative import check_guidance
from trigflow.models.weights import load_weights
from trigflow.networks import NetworkConfig, build, network_from_state, network_state
from trigflow.process import TrigFlow
from trigflow.runtime.distributed import is_first
from trigflow.runtime.distributed.shards import collect
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, read_json, read_tensors, write_json, write_tensors
from trigflow.runtime.machine import check_default_device, resolve_device
from trigflow.runtime.places import check_place
from trigflow.runtime.seeds import derive_seed, generators_kept
from trigflow.runtime.values import kind_of, number, row, whole
from trigflow.runtime.wrappers import entries, unwrapped
from trigflow.samplers import Sampling
from trigflow.samplers.editing import Edit, Noise, Sampler, spherical, weighed

Kind = Literal["diffusion", "consistency"]

NOISE_BLOCK = 64
"""Samples that share one noise generator; makes the noise of sample i independent of batch and total size."""


@dataclass
class Model:
    """A network and what belongs to it.

    Attributes:
        network: `F(x_t / sd, t, **conditions)`, in eval mode.
        spec: configuration that the network is built from.
        process: the TrigFlow process that it belongs to.
        codec: stored data to x0, and x0 to what a person gets.
        sampling: how samples are drawn.
        conditioner: makes conditions of what people say: classes by number or name, and whatever else it was made for.
        times: sampling times of a consistency model by number of steps, where a search has found better than the default.
        channels_last: whether the network computes images channels-last.
        origin: facts about where it is from, for people and for comparisons: `objective`, `data` (settings of the data it was
            trained on), `teacher`, `seed`, whatever else is known.
    """

    network: nn.Module
    spec: NetworkConfig
    process: TrigFlow
    codec: Codec
    sampling: Sampling = field(default_factory=Sampling)
    conditioner: Conditioner = field(default_factory=Conditioner)
    times: dict[int, tuple[float, ...]] = field(default_factory=dict)
    channels_last: bool = False
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """`diffusion` (drawn by solving the PF-ODE) or `consistency` (drawn in one or a few evaluations)."""
        return "diffusion" if self.sampling.kind == "ode" else "consistency"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one x0."""
        return self.codec.shape

    @property
    def num_classes(self) -> int:
        """Classes of a class-conditional network, 0 for another."""
        classes = self.conditioner.classes
        return 0 if classes is None else classes.num

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, empty where they have none."""
        classes = self.conditioner.classes
        return () if classes is None else classes.names

    @property
    def takes(self) -> frozenset[str]:
        """Names of the conditions that the network takes; `guidance`, where the scale is an input, is passed by its name."""
        return takes(self.network)

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a network without any."""
        weights = itertools.chain(self.network.parameters(), self.network.buffers())
        return next((weight.device for weight in weights), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """In which samples are drawn: float64 where all weights are of it, float32 otherwise. Raises a UserError for one of the
        package's networks in half precision."""
        weights = (weight.dtype for weight in self.network.parameters() if weight.is_floating_point())
        first = next(weights, torch.float32)
        if first == torch.float32:  # in no time, as for most
            return first
        found = {first, *weights}
        if found <= {torch.float16, torch.bfloat16} and not self.spec.own_precision:
            raise UserError(
                f"a network of {found.pop()}; expected float32, because time is embedded in it; draw under torch.autocast "
                "instead"
            )
        return torch.float64 if found == {torch.float64} else torch.float32

    def velocity(
        self,
        conditions: Mapping[str, Any] | None = None,
        guidance: float | Tensor = 1.0,
        *,
        interval: tuple[float, float] | None = None,
        negative: Model | None = None,
    ) -> samplers.VelocityFunction:
        """The velocity function `v(x_t, t)` for these conditions, `(b, ...)` by name, and this guidance scale, one or `(b,)`.

        A consistency model that was distilled with guidance takes the scale as an input. A diffusion model is guided by a
        second evaluation, away from itself without the class or away from `negative`, unless the scale is 1; with an
        `interval`, only at noise levels sigma inside it. See `trigflow.samplers.guided_velocity`. Raises a UserError for
        guidance on a model that has none, or a negative that does not fit.
        """
        process, scales = self.process, torch.as_tensor(guidance, dtype=torch.float32)
        shown = f"{scales.item():g}" if scales.numel() == 1 else f"from {scales.min():g} to {scales.max():g}"
        if not bool(scales.isfinite().all()):
            raise UserError(f"guidance {shown}; expected a finite scale, 1 for none; change --guidance")
        if "guidance" in self.takes:
            highest = self.sampling.guidance_max
            if not bool((scales >= 1).all() and (scales <= highest).all()):
                raise UserError(
                    f"guidance {shown}; expected a scale in [1, {highest}], the range this model was distilled for; "
                    "change --guidance"
                )
            if interval is not None or negative is not None:
                raise UserError(
                    "a guidance interval or negative for a student that takes the scale as an input; expected the scale "
                    "alone, the rest was settled when it was distilled; drop --guidance-interval and --negative"
                )
            return samplers.network_velocity(self.network, process, {**(conditions or {}), "guidance": guidance})
        if bool((scales == 1).all()):
            return samplers.network_velocity(self.network, process, conditions)
        droppable = null(self.network).keys() & (conditions or {}).keys()
        if self.kind == "consistency" or (not droppable and negative is None):
            raise UserError(
                f"guidance {shown} for a model without guidance; expected 1, or a class-conditional diffusion model, or a "
                "student distilled with objective.guidance_max above 1; drop --guidance"
            )
        check_guidance(self, negative)
        away_from = None if negative is None else negative.network
        return samplers.guided_velocity(self.network, process, conditions, guidance, negative=away_from, interval=interval)

    def default_steps(self) -> int:
        """2 for a consistency model, or the number of its segments where it has several; 18 for a diffusion model (35
        evaluations of Heun)."""
        if self.kind == "diffusion":
            return 18
        return self.sampling.segments if self.sampling.jumps == "segments" else 2

    @torch.no_grad()
    def sample(
        self,
        num: int = 16,
        *,
        steps: int | None = None,
        labels: Any = None,
        prompt: Any = None,
        conditions: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        negative: Model | None = None,
        seed: int = 0,
        solver: str = "heun",
        times: Sequence[float] | None = None,
        gamma: float | None = None,
        batch_size: int = 256,
        first: int = 0,
        progress: bool = False,
        decode: bool = True,
        toward: tuple[int, float] | None = None,
        edit: Edit | None = None,
    ) -> Tensor:
        """Draw samples.

        The same seed gives the same noise for sample i, whatever `num`, `first`, `batch_size` and the model, so teacher and
        student can be compared image by image.

        Args:
            num: how many.
            steps: evaluations of a consistency model, for a multistep one the number of its segments and no other; or solver
                steps of a diffusion model; see `default_steps`.
            labels: a class by number or name, or several, repeated as needed; by default the classes in turn. None for an
                unconditional model. A dict of classes and their weights mixes their velocities at every evaluation.
            prompt: a text or several, repeated as needed, for a model that reads words; by default the empty one. A dict of
                texts and their weights mixes them like classes.
            conditions: what else is said, by name, as the model's `conditioner` understands it.
            guidance: guidance scale; 1 for none.
            guidance_interval: noise levels sigma, low and high, between which a diffusion model is guided; None for all.
            negative: diffusion model to guide away from (autoguidance); None for classifier-free guidance.
            seed: of all noise.
            solver: for a diffusion model: heun, dpm2s, dpm++2m or ddim.
            times: sampling times of a consistency model, instead of `steps`.
            gamma: of a student of any jump, how much fresh noise comes between steps, in [0, 1]; by default what its
                `sampling` says.
            batch_size: samples per call of the network.
            first: which sample to begin with; samples first ... first + num - 1 are drawn.
            progress: draw a progress bar on stderr.
            decode: False gives data as they are stored, such as latents before the autoencoder.
            toward: another seed, and how far from 0 to 1 the noise lies on the way to the noise of that one.
            edit: a picture to begin at, and what to keep of it; see `edit`.

        Returns:
            What the codec makes of x0, on the CPU: images uint8 `(num, c, h, w)`; of a model of latents, what the autoencoder
            makes of them, or with `decode=False` the latents, float32 `(num, 4, h, w)`, in the autoencoder's own scale.

        Raises:
            MissingExtraError: for a model of latents, to decode them without diffusers.
            UserError: for numbers out of range, labels the model does not know, guidance it does not have.
        """
        check_default_device()
        given = {} if steps is None else {"steps": steps}
        toward = None if toward is None else row("toward", toward, 2)
        whole(
            num=num, batch_size=batch_size, first=first, seed=seed, **given, **({} if toward is None else {"toward": toward[0]})
        )
        number(guidance=guidance, **({} if gamma is None else {"gamma": gamma}))
        kind_of(Model, negative=negative)
        kind_of(Edit, edit=edit)
        if num < 1 or batch_size < 1:
            raise UserError(f"{num} samples in batches of {batch_size}; expected at least 1; raise --num")
        if first < 0:
            raise UserError(f"first sample {first}; expected 0 or more; correct the argument")
        sampler = self.sampler(steps, solver, times, gamma, edit)
        parts = parts_of(said_of(labels, conditions, prompt), self.conditioner.inputs)
        told = [(share, self.conditioner.conditions(said, num, first)) for share, said in parts]
        if guidance == 1 and (guidance_interval is not None or negative is not None):
            raise UserError(
                "a guidance interval or negative with guidance 1, which is none; expected another scale; pass --guidance"
            )
        guided = functools.partial(self.velocity, guidance=guidance, interval=guidance_interval, negative=negative)
        guided(told[0][1])  # what is wrong with the guidance is said before a bar is drawn
        if decode:
            self.codec.prepare(self.device)  # what is wrong with it is said now, too
        finish = self.codec.decode if decode else self.codec.stored
        drawn = []
        with tqdm(total=num, desc="sampling", unit="img", disable=not progress) as bar:
            for start in range(0, num, batch_size):
                stop = min(start + batch_size, num)
                noise = functools.partial(self._noise, seed, toward, first + start, first + stop)
                rows = [(share, {k: row[start:stop].to(self.device) for k, row in part.items()}) for share, part in told]
                velocity = weighed([(share, guided(part)) for share, part in rows])
                drawn.append(self.draw(noise, velocity, sampler, finish=finish).cpu())
                bar.update(stop - start)
        return torch.cat(drawn)

    def edit(
        self,
        picture: Tensor,
        num: int = 1,
        *,
        strength: float | None = None,
        mask: Tensor | None = None,
        keep: str | int | None = None,
        **how: Any,
    ) -> Tensor:
        """Draw from a picture: others like it, what is under a mask, its colours, or its details. Returns what `sample` does.

        Args:
            picture: uint8 `(c, h, w)`, of the size that is drawn; also gray or small where that is kept.
            num: how many.
            strength: in (0, 1]: sampling starts at this share of its first time, at the picture with noise; 1 at noise alone.
                By default 1 where something is kept, otherwise 0.5.
            mask: `(h, w)`, bool, or uint8 from 128 on: where to draw. The rest stays, byte for byte; of a model of latents the
                latents that lie outside as a whole.
            keep: "gray" keeps the luminance, N the means of N x N pixels, up to half a level of rounding; what is made here of
                a picture in colours, or of the full size, is rounded to levels first.
            how: as in `sample`; with more steps, what is drawn fits what is kept better.

        Raises:
            UserError: as `sample`, for a model without pictures, and for a picture, mask, strength or keep that does not fit.
        """
        return self.sample(num, edit=edit_of(self, picture, strength, mask, keep), **how)

    def draw(
        self,
        noise: Noise | torch.Generator,
        told: Mapping[str, Any] | samplers.VelocityFunction | None = None,
        sampler: Sampler | None = None,
        *,
        num: int = 1,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One batch: conditions in, what the codec makes of x0 out. Everything that draws goes through here.

        Args:
            noise: `noise(k)`, noise `(b, *shape)` of standard deviation sd: k = 0 where sampling starts, k > 0 the fresh noise
                of later steps; or a generator on the CPU, from which noise of `num` samples is drawn.
            told: conditions `(b, ...)` by name, or what `velocity` made of them, guidance included.
            sampler: see `sampler`; by default the model's own, with `default_steps`.
            num: samples, where the noise comes from a generator.
            finish: what is made of x0; `codec.decode` by default.

        Returns:
            `(b, ...)`, on the model's device.

        Raises:
            UserError: as `velocity` and `dtype`.
        """
        if isinstance(noise, torch.Generator):
            generator = noise

            def noise(k: int) -> Tensor:
                return self.process.sigma_data * torch.randn(num, *self.shape, generator=generator, dtype=torch.float32).to(
                    self.device
                )

        velocity, dtype = told if callable(told) else self.velocity(told), self.dtype
        return (finish or self.codec.decode)((sampler or self.sampler())(velocity, lambda k: noise(k).to(dtype)))

    def noise(self, seed: int, k: int, start: int, stop: int) -> Tensor:
        """Noise `N(0, sd^2 I)` of samples start ... stop - 1, drawn on the CPU; k = 0 is the start, later k fresh noise."""
        blocks = []
        for block in range(start // NOISE_BLOCK, (stop - 1) // NOISE_BLOCK + 1):
            generator = torch.Generator().manual_seed(derive_seed(seed, "noise", k, block))
            blocks.append(torch.randn(NOISE_BLOCK, *self.shape, generator=generator, dtype=torch.float32))
        offset = start % NOISE_BLOCK
        noise = torch.cat(blocks)[offset : offset + stop - start]
        return self.process.sigma_data * noise.to(self.device)

    def _noise(self, seed: int, toward: tuple[int, float] | None, start: int, stop: int, k: int) -> Tensor:
        noise = self.noise(seed, k, start, stop)
        if toward is None:
            return noise
        between = spherical(noise, self.noise(toward[0], k, start, stop), toward[1])
        return noise if toward[0] == seed else between  # a noise is not independent of itself

    def sampler(
        self,
        steps: int | None = None,
        solver: str = "heun",
        times: Sequence[float] | None = None,
        gamma: float | None = None,
        edit: Edit | None = None,
    ) -> Sampler:
        """A function `draw(velocity, noise) -> x0` that draws one batch; arguments as in `sample`.

        `noise(k)` is the noise of the batch, `(b, *shape)` of standard deviation sd: k = 0 where sampling starts, k > 0 the
        fresh noise of later steps. Raises a UserError for numbers out of range.
        """
        process, sampling = self.process, self.sampling
        steps = self.default_steps() if steps is None else steps
        solve = samplers.get_solver(solver)
        if gamma is not None and self.kind == "diffusion":
            raise UserError(f"gamma {gamma:g} for a diffusion model; expected a student of any jump; drop --gamma")
        if gamma is not None and not (0 <= gamma <= 1 and (sampling.jumps == "any" or gamma == sampling.noise)):
            expected = "a number in [0, 1]" if sampling.jumps == "any" else f"{sampling.noise:g}, all that it was trained for"
            raise UserError(f"gamma {gamma:g} for this model; expected {expected}; drop --gamma")
        if self.kind == "diffusion" and times is not None:
            raise UserError("sampling times for a diffusion model; expected a consistency model; use steps instead")
        if sampling.jumps == "segments" and (steps != sampling.segments or times is not None):
            given = f"{steps} steps" if times is None else "sampling times"
            raise UserError(
                f"{given} for a multistep model of {sampling.segments} segments; expected {sampling.segments} steps, one "
                f"for each; drop {'--steps' if times is None else 'times'}"
            )
        schedule = self.schedule(steps) if times is None else row("times", times)
        schedule = edit.times(schedule) if edit and schedule else schedule
        share = sampling.noise if gamma is None else gamma

        def draw(velocity: samplers.VelocityFunction, noise: Noise) -> Tensor:
            start = noise(0)  # first, also where it comes from a generator
            if self.kind == "diffusion":
                return solve(velocity, start, schedule)
            fresh = [noise(k) for k in range(1, len(schedule))] if share > 0 else None
            return samplers.flow_map_sample(velocity, process, start, schedule, gamma=share, fresh=fresh)

        return edit.around(draw, process, schedule[0]) if edit and schedule else draw

    def schedule(self, steps: int) -> tuple[float, ...]:
        """Sampling times for so many steps: of a diffusion model the grid of its solver, down to 0; of a student those of its
        segments, or what a search found, or the default. Raises a UserError for fewer than 1."""
        whole(steps=steps)
        steps = int(steps)  # a tensor is found in no table
        if self.kind == "diffusion":
            return tuple(samplers.sigma_grid(self.process, steps).tolist())
        if self.sampling.jumps == "segments":
            return samplers.segment_times(self.process, self.sampling.segments)
        default = samplers.meanflow_times if self.sampling.jumps == "any" else samplers.consistency_times
        return self.times.get(steps) or default(self.process, steps)

    # Files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the two files of a model folder; each appears whole or not at all, the weights first.

        Where there are several processes, all of them call this and the first one writes.
        """
        folder = check_place(folder, "folder", "folder")
        tensors = collect(entries(self.network))
        if not is_first():
            return folder
        ensure_folder(folder)
        write_tensors(folder / "network.safetensors", tensors)
        write_json(folder / "model.json", self.description())
        return folder

    def description(self) -> dict[str, Any]:
        """The content of `model.json`."""
        return stamped(
            "model",
            {
                "process": asdict(self.process),
                "network": network_state(self.spec),
                "codec": self.codec.state(),
                "conditioner": self.conditioner.state(),
                "sampling": self.sampling.state(),
                "times": {str(steps): list(times) for steps, times in self.times.items()},
                "channels_last": self.channels_last,
                "origin": self.origin,
            },
        )


def load(folder: str | Path, device: str | torch.device | None = None, *, network: nn.Module | None = None) -> Model:
    """The model of a run folder, with its averaged weights.

    Args:
        folder: a folder written by `trigflow train`, `distill`, `demo`, or `Model.save`.
        device: where to put it; CUDA where there is one, otherwise the CPU.
        network: the module that the run trained, where it was one of your own; the weights are read into it.

    Raises:
        UserError: when the folder or a file is missing, damaged, or the weights belong to another network.
    """
    folder, place = check_run(folder), resolve_device(device)
    model = unloaded(folder / "model.json", network)
    load_weights(model.network, read_tensors(folder / "network.safetensors", "weights"), f"'{folder}'")
    model.network.to(place)
    return model


def check_run(folder: str | Path) -> Path:
    """Require a folder that holds a model. Raises a UserError when it is no folder, or holds none."""
    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"folder is {folder!r}; expected the path of a run folder; correct the argument")
    folder = Path(folder)
    if folder.is_file():
        raise UserError(f"'{folder}' is a file; expected a folder written by trigflow; name the folder that it is in")
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"run folder '{folder}' {reason}; expected a folder written by trigflow; check the path")
    if not (folder / "model.json").is_file():
        raise UserError(
            f"'{folder}' holds no model.json; expected a folder written by trigflow train, distill or demo; "
            "check the path, or let the run finish"
        )
    return folder


def unloaded(path: Path, network: nn.Module | None = None) -> Model:
    """The model of this `model.json`, on the CPU, with fresh weights (or around `network`) in place of trained ones. Raises a
    UserError when the file is missing or damaged."""
    return described(read_description(path), f"'{path}'", network)


def unloaded_parts(run: str | Path) -> tuple[Codec, Conditioner]:
    """Codec and conditioner of the model in a run folder, whose network is not looked at; errors as `load`."""
    path = check_run(run) / "model.json"
    raw = read_description(path)
    with_foreign(raw)
    with _usable(f"'{path}'"):
        return codec_from_state(raw["codec"]), Conditioner.from_state(raw["conditioner"])


def based_on(run: str | Path) -> str:
    """The pipeline of diffusers that the model in a run folder refers to; empty where it does not; errors as `load`."""
    return str(read_description(check_run(run) / "model.json")["network"].get("base", ""))


def source_of(run: str | Path) -> str:
    """Name or path of the data that the model in a run folder was trained on; empty where the folder does not say."""
    try:
        return str(read_json(Path(run) / "model.json", "model")["origin"]["data"]["source"])
    except (UserError, TypeError, KeyError):
        return ""


def read_description(path: Path) -> dict[str, Any]:
    """The content of a `model.json` as this version writes it. Of format 1, a part stands in the `config.json` of the run.
    Raises a UserError when a file is missing or damaged, or only a newer version reads it."""
    raw = read_json(path, "model description")
    beside = {}
    if isinstance(raw, dict) and raw.get("format", 1) == 1:
        folder = path.parent.parent if path.parent.name == "ema" else path.parent
        beside = read_json(folder / "config.json", "configuration")
    return current_description(raw, f"'{path}'", beside)


def current_description(raw: Any, what: str, config: Any = None) -> dict[str, Any]:
    """A description as this version writes it; of format 1, with the configuration beside it. Raises a UserError as `migrated`,
    and for a description or configuration without what is needed; `what` names it."""
    with _usable(what):
        content = migrated("model", raw, what, config=config)
        for part in ("process", "network", "codec", "conditioner", "sampling", "times", "origin"):
            if not isinstance(content[part], Mapping) and part != "codec":  # which says itself what is wrong with it
                raise TypeError(f"{part} is no table")
        return content


def described(raw: Mapping[str, Any], what: str, network: nn.Module | None = None) -> Model:
    """The model of a description as `Model.description` gives it; else as `unloaded`. Raises a UserError when the description
    is no such; `what` names it in the message."""
    with_foreign(raw)
    with _usable(what):
        process = TrigFlow(**raw["process"])
        spec = network_from_state(raw["network"])
        codec = codec_from_state(raw["codec"])
        conditioner = Conditioner.from_state(raw["conditioner"])
        sampling, times, origin = Sampling.from_state(raw["sampling"]), times_of(raw), dict(raw["origin"])
        channels_last = bool(raw["channels_last"])
    with generators_kept():  # fresh weights, about to be replaced, draw from the default generator
        network = build(spec, process.sigma_data) if network is None else unwrapped(network)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    network.eval().requires_grad_(False).to(memory_format=memory_format)  # type: ignore[call-overload]
    return Model(network, spec, process, codec, sampling, conditioner, times, channels_last, origin)


def with_foreign(raw: Mapping[str, Any]) -> None:
    """Enter what a model of diffusers is made of into the tables of networks and conditions."""
    if isinstance(raw.get("network"), Mapping) and raw["network"].get("kind") == "diffusers":
        import trigflow.models.foreign  # noqa: F401


def times_of(description: Mapping[str, Any]) -> dict[int, tuple[float, ...]]:
    """`Model.times` as the content of `model.json` has it."""
    return {int(steps): tuple(float(t) for t in times) for steps, times in description["times"].items()}


@contextlib.contextmanager
def _usable(what: str) -> Iterator[None]:
    """Raises a UserError for whatever is wrong with a description that is read in the block; `what` names it."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, DaciteError) as error:
        raise UserError(
            f"{what} cannot be used ({type(error).__name__}: {error}); expected a file written by trigflow; "
            "restore it from the run"
        ) from None
