"""Commands that draw from a model or give it another form: `sample`, `serve`, `bench`, `export` and `import`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from trigflow.runtime.errors import UserError
from trigflow.runtime.files import write_json
from trigflow.runtime.places import check_outside, check_place
from trigflow.serve.limits import Limits

if TYPE_CHECKING:
    from trigflow.models.model import Model
    from trigflow.samplers import Edit


@dataclass(frozen=True)
class Drawing:
    """What a command that draws from a run folder is told about how."""

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a teacher or a student."""
    steps: int | None = None
    """Evaluations of a student (default 2; of one with segments their number, and no other), or solver steps of a teacher
    (default 18, that is 35 evaluations)."""
    guidance: float = 1.0
    """Guidance scale; 1 for none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide a teacher only at noise levels sigma between these two."""
    negative: Annotated[Path | None, arg(metavar="RUN")] = None
    """Run folder of a worse teacher (smaller, or trained for less time) to guide away from; by default the model without
    the class."""
    seed: int = 0
    """Seed; the same seed starts every model from the same noise, which each sample has by its number."""
    solver: str = "heun"
    """Solver of a teacher: heun, dpm2s, dpm++2m or ddim."""
    vae: str | None = None
    """Autoencoder of a model of latents, where it is not to be found under the name it had: a folder, or an id of the hub."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    quiet: bool = False
    """No progress bar."""

    def model(self) -> tuple[Model, dict[str, Any]]:
        """The model, and the arguments of `Model.sample` that say how to draw from it."""
        from trigflow.models.model import load

        negative = None if self.negative is None else load(self.negative, self.device)
        model = load(self.run_folder, self.device)
        if self.vae is not None:
            model.codec = model.codec.with_autoencoder(self.vae)
        names = ("steps", "guidance", "guidance_interval", "seed", "solver")
        return model, {"negative": negative, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Sample(Drawing):
    """Draw images from a run folder: a grid, or single files.

    Example: trigflow sample runs/demo --steps 2 --labels 3 7 --num 64 --out grid.png
    """

    out: Annotated[str, arg(metavar="PATH")] = "samples.png"
    """A file (.png, .webp, .jpg) for a grid; anything else, or with / at its end, is a folder that gets one PNG per image."""
    labels: tuple[str, ...] = ()
    """Classes to draw, by number or name, in turn; all of them by default."""
    prompt: tuple[str, ...] = ()
    """Texts to draw, in turn, for a model that reads words."""
    conditions: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE")] = ()
    """What else is said to the model, such as wind=0.5,-1; numbers are parted by commas."""
    gamma: float | None = None
    """Of a student of any jump: how much fresh noise comes between steps, from 0 to 1."""
    num: int = 64
    """Number of images."""
    columns: int | None = None
    """Images per row of a grid."""
    weights: tuple[float, ...] = ()
    """Mix the prompts, or else the classes, with these weights, one for each, instead of drawing them in turn."""
    toward: Annotated[tuple[int, float] | None, arg(metavar="SEED SHARE")] = None
    """Go from the noise of the seed to that of another, so far: 0 is here, 1 is there."""
    photo: Annotated[Path | None, arg(name="from", metavar="PICTURE")] = None
    """Begin at a PNG, JPEG or WebP, cut to a square and scaled to the model's size. What is transparent is drawn anew."""
    strength: float | None = None
    """With --from: how much noise the picture gets, above 0 and up to 1, where nothing is left of it but what is kept; by
    default 0.5, and 1 where something is kept."""
    mask: Annotated[Path | None, arg(metavar="PICTURE")] = None
    """With --from: a picture of the same size, white where to draw anew. The rest is kept."""
    keep: Annotated[str | None, arg(metavar="gray|N")] = None
    """With --from: gray keeps the luminance and draws colours; N keeps the means of N x N pixels and draws details."""

    def run(self) -> None:
        from trigflow.codecs import codec_from_state
        from trigflow.models.model import check_run, read_description, source_of
        from trigflow.runtime.distributed import gather_rows, is_first, share_of, world_size

        codec_from_state(read_description(check_run(self.run_folder) / "model.json")["codec"]).check_save(self.out, self.num)
        check_outside(self.out, source_of(self.run_folder))
        model, how = self.model()
        first, num = 0, self.num
        if world_size() > 1:
            share = share_of(self.num)
            if self.num < world_size():
                raise UserError(
                    f"{self.num} images on {world_size()} processes; expected at least one each; raise --num or start fewer"
                )
            first, num = share.start, len(share)
        drawn = model.sample(
            num,
            first=first,
            labels=self._mixed(self.labels, mix=not self.prompt),
            prompt=self._mixed(self.prompt, mix=bool(self.prompt)),
            conditions=_said(self.conditions),
            gamma=self.gamma,
            toward=self.toward,
            edit=self.edit(model),
            progress=not self.quiet and is_first(),
            **how,
        )
        images = gather_rows(drawn)
        if images is None:
            return
        print(model.codec.save(images, self.out, self.columns))

    def edit(self, model: Model) -> Edit | None:
        """What the options from `--from` on ask for."""
        from trigflow.data.photo import read_photo
        from trigflow.models.editing import edit_of

        if self.photo is None:
            if (self.strength, self.mask, self.keep) != (None, None, None):
                raise UserError("--strength, --mask or --keep without a picture; expected one to begin at; pass --from")
            return None
        keep = int(self.keep) if self.keep is not None and self.keep.isdecimal() and len(self.keep) < 6 else self.keep
        try:
            photo, mask = self.photo.read_bytes(), None if self.mask is None else self.mask.read_bytes()
        except OSError as error:
            raise UserError(f"'{error.filename}': {error.strerror}; expected a picture; check the path") from None
        picture, anew = read_photo(photo, model.codec.drawn_shape, mask=mask, keep=keep)
        return edit_of(model, picture, self.strength, anew, keep)

    def _mixed(self, said: Sequence[str], mix: bool) -> Any:
        n, m = len(said), len(self.weights)
        if mix and m not in (0, n):
            raise UserError(f"{m} weights for {n} prompts or labels; expected one for each; correct --weights")
        if not (mix and m):
            return list(said) or None
        given = list(zip(said, self.weights, strict=True))
        return {one: sum(weight for other, weight in given if other == one) for one in said}


def _said(given: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` as a value by name: a list of numbers where it is one, otherwise the text."""
    said: dict[str, Any] = {}
    for one in given:
        name, sign, value = one.partition("=")
        if not (name and sign) or name in said:
            raise UserError(f"--conditions {one}; expected NAME=VALUE, such as wind=0.5,-1, each name once; correct it")
        try:
            numbers = [float(number) for number in value.split(",")]
            said[name] = numbers if len(numbers) > 1 else numbers[0]
        except ValueError:
            said[name] = value
    return said


@dataclass(frozen=True)
class Serve:
    """Draw images for clients: HTTP, a WebSocket of frames, OpenAPI documentation at /docs.

    A run folder of a student that still has its teacher serves both.

    Example: trigflow serve runs/demo --port 8000
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a teacher or a student."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every one of this machine, best with a token."""
    port: int = 8000
    """Port to listen at; 0 for any that is free."""
    token_file: Path | None = None
    """File whose only line is a token that clients must show; by default the variable TRIGFLOW_TOKEN, or no token."""
    origins: tuple[str, ...] = ()
    """Pages from elsewhere that may open streams, such as https://example.org."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    variant: str = "auto"
    """How the network is computed; the variants of `trigflow bench`."""
    workers: int | None = None
    """Batches of a model drawn at a time; by default two on a CPU with several cores, otherwise one."""
    threads: int | None = None
    """Cores for each worker; by default its share of all, or of OMP_NUM_THREADS."""
    verbose: bool = False
    """Log every request."""
    open: bool = False
    """Open the page in the browser of this machine."""
    limits: Limits = field(default_factory=Limits)

    def run(self) -> None:
        from trigflow.serve.listen import listen, read_token

        options = {**vars(self), "token": read_token(self.token_file)}
        del options["token_file"]
        listen(options.pop("run_folder"), **options)


@dataclass(frozen=True)
class Bench:
    """Measure how fast a run's model draws in each variant of its network, and pick one.

    Example: trigflow bench runs/demo --batches 1 16 256
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a student or a teacher."""
    steps: int | None = None
    """Evaluations of a student (default 2; of one with segments their number, and no other), or solver steps of a teacher."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Batch sizes."""
    seconds: float = 1.0
    """Seconds of drawing for each variant and batch size; at least 5 draws are made."""
    variants: tuple[str, ...] = ()
    """plain, traced, graph, graph-bf16, compiled, onnx, bf16, fp16, int8, fp8; all by default but compiled, which takes minutes
    to build."""
    tolerance: int = 2
    """Levels of 255 by which a pixel may differ from plain float32 in the variant that is picked."""
    threads: int | None = None
    """Threads on the CPU; PyTorch's choice by default."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    json: Path | None = None
    """Also write the numbers to this file."""

    def run(self) -> None:
        import torch

        from trigflow.deploy.measure import describe, measure
        from trigflow.models.model import load

        if self.threads is not None:
            if self.threads < 1:
                raise UserError(f"{self.threads} threads; expected at least 1; correct --threads")
            torch.set_num_threads(self.threads)
        if self.json is not None:
            check_place(self.json, "file", "--json")
        report = measure(
            load(self.run_folder, self.device), steps=self.steps, batches=self.batches, seconds=self.seconds,
            variants=self.variants, tolerance=self.tolerance,
        )  # fmt: skip
        print(describe(report))
        if self.json is not None:
            write_json(self.json, report.as_dict())


@dataclass(frozen=True)
class Export:
    """Write the model of a run folder in the form of another tool.

    diffusers: a TrigFlowPipeline with model card, of a consistency student without segments. torchscript, onnx: the velocity of
    any teacher or student for any batch size, as network.pt or network.onnx with model.json, compared with PyTorch. Of a
    student of a teacher from diffusers: diffusers is an adapter for load_lora_weights, comfyui that with nodes, space with a
    demo.

    Example: trigflow export runs/demo digits --to onnx
    """

    run_folder: Annotated[Positional[Path], arg(metavar="RUN")]
    """Run folder of a teacher or a student."""
    out: Annotated[Positional[Path], arg(metavar="DIR")]
    """Folder to create."""
    to: Literal["diffusers", "torchscript", "onnx", "comfyui", "space"]
    """Form of the result."""
    whole: bool = False
    """With --to diffusers, of adapters: the whole pipeline with the adapters added to its weights."""

    def run(self) -> None:
        from trigflow.deploy.export import export_run

        print(export_run(self.run_folder, self.out, self.to, self.whole))


@dataclass(frozen=True)
class Import:
    """Turn a teacher from elsewhere into a run folder, and say what it is. No code that comes with it is run.

    A pipeline of diffusers, in a folder or on the hub, stays where it is: the run folder refers to it. A network snapshot of
    EDM or EDM2 (.pkl) is written anew.

    Example: trigflow import hf:stabilityai/stable-diffusion-3-medium-diffusers --out runs/sd3
    """

    file: Annotated[Positional[str], arg(metavar="SOURCE")]
    """Folder of a pipeline, its id on the hub after hf:, or a snapshot as NVIDIA publishes it or post-hoc EMA writes it."""
    out: Path
    """Run folder to create."""
    size: int | None = None
    """Of a pipeline: pixels of the side of a picture; by default what it was made for."""
    frames: int | None = None
    """Of a pipeline of videos: frames of its latents, 1 for pictures; by default what it was made for."""
    dtype: Literal["float32", "bfloat16", "float16", "int8", "fp8", "nf4"] = "float32"
    """Of a pipeline: in which weights are kept that are not trained. The last three are of linear layers, with a scale each row
    or, for nf4 (4 bits), each 64 weights."""

    def run(self) -> None:
        if self.file.endswith(".pkl"):
            if (self.size, self.frames, self.dtype) != (None, None, "float32"):
                raise UserError("--size, --frames or --dtype for a snapshot; expected them of a pipeline; leave them out")
            from trigflow.models.pretrained import import_snapshot

            facts = import_snapshot(Path(self.file), self.out)
            more = f"distill with: trigflow distill {self.out} --out RUN"
        else:
            from trigflow.models.foreign import import_pipeline

            facts = import_pipeline(self.file, self.out, size=self.size, frames=self.frames, dtype=self.dtype)
            more = (
                f"distill with: trigflow distill {self.out} --data CACHE --lora 64 --out RUN, once its latents are made: "
                f"trigflow encode IMAGES --with {self.out} --out CACHE"
            )
        for name, value in facts.items():
            print(f"{name:14} {value}")
        print(f"Imported. Draw with: trigflow sample {self.out}; {more}")
