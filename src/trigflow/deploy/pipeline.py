"""Students in diffusers: a `DiffusionPipeline` and its model, saved as safetensors files with configurations.

    from trigflow.deploy.pipeline import TrigFlowPipeline

    pipe = TrigFlowPipeline.from_run("runs/demo")
    pipe.save_pretrained("digits")
    pipe = TrigFlowPipeline.from_pretrained("digits")
    images = pipe(class_labels=[3, 7], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images

The folder: `model_index.json`, `network/` and `scheduler/` (and `vae/` of a model of latents), a model card `README.md` with
`samples.png`, and two files of one import each, `pipeline.py` and `network/trigflow.deploy.pipeline_network.py`, by which
diffusers itself finds the classes: `DiffusionPipeline.from_pretrained("digits", trust_remote_code=True)`. `TrigFlowPipeline`
runs no file of the folder.
"""

# mypy: disable-error-code="attr-defined, misc, no-untyped-call"
# (a type checker does not see what diffusers puts together when it is imported)
# No `from __future__ import annotations`: diffusers reads the types of the components off the signature.

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trigflow.codecs.pictures import make_grid, save_picture, to_picture
from trigflow.conditions import said_of
from trigflow.deploy.card import description_of, figures_of, model_card, recipe_of
from trigflow.deploy.pipeline_network import (
    TrigFlowModel,
    check_supported,
    local_folder,
    read_component,
    read_scheduler,
    rewrite,
)
from trigflow.models.model import Model, load
from trigflow.runtime.errors import MissingExtraError, UserError
from trigflow.runtime.files import ensure_folder, read_json, write_text
from trigflow.runtime.values import row
from trigflow.training.config import RunConfig
from trigflow.training.setup import config_of

try:
    from diffusers import AutoencoderKL, DiffusionPipeline, SCMScheduler
    from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor
    from huggingface_hub import create_repo
except ImportError as error:
    raise MissingExtraError("a pipeline", "diffusers", "diffusers") from error

Output = Literal["pil", "np", "pt", "latent"]

IMPORT = '''"""Finds {name} for DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."""

from {module} import {name}  # noqa: F401
'''


class TrigFlowPipeline(DiffusionPipeline):
    """Draws from a consistency student in one or a few evaluations, with the stock `SCMScheduler`.

    With times `t_1 > ... > t_n`, from `x = sd z`, n times: `x0 = cos(t) x - sin(t) v(x, t)`, then
    `x = cos(s) x0 + sin(s) sd z'` with fresh noise at the next time s; the same as `flow_map_sample` with gamma 1.

    Args:
        network: a consistency student that jumps to time 0: of sct, scd, vsd, scd-vsd, ct or cd, without segments.
        scheduler: its `sigma_data` is that of the student.
        vae: the autoencoder of a student of latents.

    Raises:
        UserError: for a diffusion teacher, a multistep or a MeanFlow student, or a scheduler that does not fit.
    """

    model_cpu_offload_seq = "network->vae"
    _optional_components = ["vae"]  # noqa: RUF012 - as the base class has it
    _callback_tensor_inputs = ("latents",)

    def __init__(self, network: TrigFlowModel, scheduler: SCMScheduler, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        check_supported(network.model)
        sd = network.model.process.sigma_data
        if scheduler.config.get("prediction_type") != "trigflow" or scheduler.config.sigma_data != sd:
            raise UserError(
                f"a {type(scheduler).__name__} with prediction_type {scheduler.config.get('prediction_type')} and sigma_data "
                f"{scheduler.config.get('sigma_data')}; expected an SCMScheduler with trigflow and {sd}, as the student was "
                "trained; leave the scheduler out or correct it"
            )
        if network.model.channels_last:  # reading weights loses their order in memory
            network.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        network.model.codec = network.model.codec.with_component(vae)
        self.register_modules(network=network, scheduler=scheduler, vae=vae)

    # Making one ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_model(
        cls, model: Model, figures: Sequence[dict[str, Any]] = (), run: RunConfig | None = None
    ) -> "TrigFlowPipeline":
        """A pipeline with a copy of the weights of a `trigflow.Model`, on its device; `figures` and the configuration `run`
        are for the model card.

        Raises:
            MissingExtraError, UserError: as the class, and for an autoencoder that cannot be read.
        """
        check_supported(model)
        network = TrigFlowModel(model=description_of(model), run=None if run is None else recipe_of(run), figures=list(figures))
        network.network.load_state_dict(model.network.state_dict())
        vae = model.codec.component()
        scheduler = SCMScheduler(sigma_data=model.process.sigma_data)
        return cls(network.eval().to(model.device), scheduler, vae)

    @classmethod
    def from_run(cls, folder: str | Path, device: str | torch.device | None = "cpu") -> "TrigFlowPipeline":
        """The pipeline of a run folder, with the figures that were measured of it; see `trigflow.deploy.card.figures_of`.
        Raises a UserError as `trigflow.load` and the class."""
        model = load(folder, device)
        run = config_of(Path(folder), model) if (Path(folder) / "config.json").is_file() else None
        return cls.from_model(model, figures_of(Path(folder)), run)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        network: TrigFlowModel | None = None,
        scheduler: SCMScheduler | None = None,
        variant: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        use_safetensors: bool = True,
        **download: Any,
    ) -> "TrigFlowPipeline":
        """The pipeline of a folder that `save_pretrained` wrote, or of a repository of the Hugging Face hub.

        Only JSON and safetensors files are read, and no code of the folder is run.

        Args:
            pretrained_model_name_or_path: a folder, or an id such as `user/model`.
            network: taken instead of the saved one.
            scheduler: taken instead of the saved one.
            variant: of the weights, as given to `save_pretrained`.
            torch_dtype: of the weights; float32 or float64 to draw, see `Model.dtype`.
            use_safetensors: only True: no pickle is read.
            download: for a repository: `revision`, `cache_dir`, `token`, `local_files_only`, `force_download`.

        Raises:
            UserError: when it cannot be found or read, is damaged, or is another pipeline.
        """
        if not use_safetensors:
            raise UserError("weights as a pickle; expected safetensors; leave out use_safetensors")
        folder = local_folder(pretrained_model_name_or_path, download)
        index = read_json(folder / "model_index.json", "the index")
        if not isinstance(index, dict) or "TrigFlowPipeline" not in str(index.get("_class_name")):
            raise UserError(
                f"'{folder}' holds another pipeline; expected one saved by TrigFlowPipeline; open it with diffusers"
            )
        if network is None:
            network = read_component(TrigFlowModel, folder / "network", variant, torch_dtype).to(torch_dtype)
        if scheduler is None:
            scheduler = read_scheduler(folder / "scheduler")
        vae = read_component(AutoencoderKL, folder / "vae", variant, torch_dtype) if (folder / "vae").is_dir() else None
        return cls(network, scheduler, vae)

    # Saving --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        *,
        samples: int = 64,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **options: Any,
    ) -> None:
        """Write the folder, model card and `samples.png` included.

        Args:
            save_directory: folder, created where it is missing.
            safe_serialization: only True: weights are safetensors files.
            samples: images that are drawn for the card, in two steps from seed 0; 0 for none.
            push_to_hub: also upload it.
            repo_id: repository of the hub; the name of the folder by default.
            options: `variant` and `max_shard_size`; and for the hub `private`, `token`, `commit_message`, `create_pr`.

        Raises:
            UserError: for a folder that cannot be written, or weights in another format.
        """
        if not safe_serialization:
            raise UserError("weights as a pickle; expected safetensors; leave out safe_serialization")
        folder = ensure_folder(Path(save_directory))
        hub = {name: options.pop(name) for name in ("private", "token", "commit_message", "create_pr") if name in options}
        super().save_pretrained(str(folder), **options)
        rewrite(folder / "model_index.json", _class_name=["pipeline", "TrigFlowPipeline"])
        rewrite(folder / "network" / "config.json")
        for name, cls in (("pipeline", TrigFlowPipeline), (f"network/{TrigFlowModel.__module__}", TrigFlowModel)):
            write_text(folder / f"{name}.py", IMPORT.format(module=cls.__module__, name=cls.__name__))
        if samples:
            save_picture(self._draw_samples(samples), folder / "samples.png")
        pictured = (folder / "samples.png").is_file()
        write_text(
            folder / "README.md",
            model_card(self.network.model, self.network.config.figures or [], pictured, self.network.config.run),
        )
        if push_to_hub:
            self._upload(folder, repo_id or folder.resolve().name, **hub)

    def push_to_hub(self, repo_id: str, *, samples: int = 64, **options: Any) -> str:
        """Upload what `save_pretrained` writes to a repository of the Hugging Face hub, created where it is missing.

        Args:
            repo_id: such as `user/model`.
            samples: as in `save_pretrained`.
            options: `private`, `token` (of the command `hf auth login` by default), `commit_message`, `create_pr`.

        Returns:
            The address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, samples=samples)
            return self._upload(Path(folder), repo_id, **options)

    def _upload(
        self,
        folder: Path,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        repo_id = create_repo(repo_id, exist_ok=True, private=private, token=token).repo_id
        return self._upload_folder(folder, repo_id, token=token, commit_message=commit_message, create_pr=create_pr)

    def _draw_samples(self, num: int) -> Image.Image:
        """A sheet of about `num` images for the model card; up to 16 classes get a column each."""
        classes = self.network.model.num_classes
        columns = classes if 1 < classes <= 16 else math.ceil(math.sqrt(num))
        num = columns * math.ceil(num / columns)
        generator = torch.Generator().manual_seed(0)
        (values,) = self(batch_size=num, generator=generator, output_type="pt", return_dict=False)
        return make_grid((values * 255).round().to(torch.uint8).cpu(), columns)

    # Drawing -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        num_inference_steps: int = 2,
        guidance_scale: float = 1.0,
        *,
        prompt: str | Sequence[str] | None = None,
        conditions: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        timesteps: Sequence[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: Output = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: a class by number or name, or one per image, repeated as needed; by default the classes in turn. None
                for an unconditional student.
            num_inference_steps: evaluations of the network.
            guidance_scale: from 1 to what the student was distilled for; 1 is no guidance.
            prompt: a text, or several, for a student that reads words; by default the empty one.
            conditions: what else is said, by name, as the student's `conditioner` understands it.
            batch_size: images to draw; by default as many as there are latents, or else labels or rows of conditions, or
                else 1.
            timesteps: decreasing times in (0, pi/2], one per evaluation, instead of those of the student: what a search
                found for this number of steps, or `consistency_times`.
            generator: of all noise, or one per image. None draws from torch's default generator.
            latents: the noise to start from, `N(0, I)`, `(b, c, h, w)`.
            output_type: `pil`, a list of images; `np`, float32 `(b, h, w, c)` in [0, 1]; `pt`, float32 `(b, c, h, w)` in
                [0, 1]; `latent`, `x0 / sd`, `(b, c, h, w)`, as the network sees it, in no range, float64 of such a network.
            return_dict: False for a tuple `(images,)`.
            callback_on_step_end: called as `callback(pipe, step, t, {"latents": x})` after each step, x of standard deviation
                `sd`; the `latents` in what it returns take the place of x.
            callback_on_step_end_tensor_inputs: names of the tensors it is given; `latents` is the only one.

        Raises:
            UserError: for numbers, labels, shapes or scales out of range, or a network in half precision.
        """
        model: Model = self.network.model
        if output_type not in get_args(Output):
            raise UserError(f"output_type '{output_type}'; expected one of {', '.join(get_args(Output))}; correct it")
        if set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs {tuple(callback_on_step_end_tensor_inputs)}; expected latents, the only "
                "tensor there is; correct it"
            )
        times = self._times(num_inference_steps, timesteps)
        device, sd = self._execution_device, self.scheduler.config.sigma_data
        told, shape = self._batch(class_labels, prompt, conditions, batch_size, latents)
        told = {name: value.to(device) for name, value in told.items()}
        model.velocity(told, guidance_scale)  # errors before work
        label = told.pop("label", None)
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise UserError(f"{len(generator)} generators for {shape[0]} images; expected one per image; pass as many")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        self.scheduler.set_timesteps(
            len(times), timesteps=[*times, 0.0], device=device, max_timesteps=None, intermediate_timesteps=None
        )
        self.scheduler.set_begin_index(0)

        def sampler(velocity: Callable[..., Tensor], noise: Callable[[int], Tensor]) -> Tensor:
            x = noise(0)
            with self.progress_bar(total=len(times)) as bar:
                for step, t in enumerate(self.scheduler.timesteps[:-1]):
                    x = self.scheduler.step(velocity(x, t), t, x, generator=generator, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        given = {"latents": x} if callback_on_step_end_tensor_inputs else {}
                        x = (callback_on_step_end(self, step, t, given) or {}).get("latents", x)
                    bar.update()
            return x

        start = latents.to(device, model.dtype) * sd
        model.codec = model.codec.with_component(self.vae)
        drawn = model.draw(
            lambda k: start, lambda x, t: self.network(x, t, label, guidance_scale, **told), sampler,
            finish=(lambda x0: x0 / sd) if output_type == "latent" else None,
        )  # fmt: skip
        images = drawn if output_type == "latent" else self._as(drawn, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)  # type: ignore[arg-type]

    def _times(self, steps: int, given: Sequence[float] | None) -> tuple[float, ...]:
        if given is None:
            return self.network.model.schedule(steps)
        times = tuple(float(t) for t in row("timesteps", given))
        if not times or times[0] > torch.pi / 2 or not all(s < t for t, s in zip(times, (*times[1:], 0.0), strict=True)):
            raise UserError(
                f"timesteps {times}; expected one or more decreasing times in (0, pi/2], without the 0 at the end; "
                "leave them out"
            )
        return times

    def _batch(
        self, labels: Any, prompt: Any, conditions: Mapping[str, Any] | None, batch_size: int | None, latents: Tensor | None
    ) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """Conditions with one row per image, and the shape of the batch."""
        model = self.network.model
        shape = (-1, *model.shape) if latents is None else tuple(latents.shape)
        wrong = shape[1:] != model.shape or (latents is not None and batch_size not in (None, shape[0]))
        if wrong or 0 in shape or (batch_size is not None and batch_size < 1):
            raise UserError(
                f"batch_size {batch_size} and latents of shape {shape}; expected 1 or more of shape {model.shape}; correct them"
            )
        classes = model.conditioner.classes
        if labels is not None and classes is not None:
            labels = classes.numbers(labels, "class_labels")
        said = said_of(labels, conditions, prompt)
        given = model.conditioner.counts(said)
        b = latents.shape[0] if latents is not None else batch_size or max(given.values(), default=1)
        for name, count in given.items():
            if count > b:
                what = "class_labels" if name == "label" else f"rows of {name}"
                raise UserError(f"{count} {what} for {b} images; expected from 1 to {b}; pass as many")
        return model.conditioner.conditions(said, b), (b, *model.shape)

    def _as(self, decoded: Tensor, output_type: Output) -> Any:
        """What the codec made, as bytes of `Model.sample`, in the form that is asked for."""
        bytes_ = self.network.model.codec.pictures(decoded)
        if output_type == "pil":
            return [to_picture(image) for image in bytes_]
        values = bytes_.float() / 255
        return values if output_type == "pt" else np.ascontiguousarray(values.permute(0, 2, 3, 1).cpu().numpy())
