"""A teacher with log time or Fourier features made into one with identity time and positional features.

The weights are kept, the time path is exchanged and fitted (`trigflow.training.timepath`), and the whole network is trained
a little further with the diffusion loss. How far its velocity moved is measured on images held back from that training::

    change(t) = || F_new - F_old || / || F_old ||      over held images, with the same noise at every time
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn

from trigflow.conditions import pick, takes
from trigflow.data import Dataset
from trigflow.data.config import load_data
from trigflow.migrations import stamped
from trigflow.models.model import Model, load, source_of
from trigflow.networks import NetworkConfig, build
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import ensure_folder, write_json
from trigflow.runtime.places import check_outside, check_place
from trigflow.runtime.seeds import derive_seed, generators_kept
from trigflow.runtime.values import check_types, kind_of
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.config import EMAConfig, RunConfig
from trigflow.training.saving import Resume
from trigflow.training.setup import check_free, config_of, is_begun
from trigflow.training.timepath import ModulationChoice, TimeFit, fit_time_path, stable_config, transplant
from trigflow.training.trainer import Trainer

SIGMAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 40.0)
"""Noise levels of the table."""
HELD = 256
"""Most images held back; never more than a tenth of the data."""


@dataclass(frozen=True)
class ConvertSettings:
    """How a teacher is converted."""

    iterations: int = 2000
    """Optimizer steps of the fine-tuning; 0 for none."""
    lr: float = 1e-4
    """Learning rate of the fine-tuning: after a short warmup a cosine to zero."""
    batch_size: int = 128
    """Samples per optimizer step of the fine-tuning."""
    fit_iterations: int = 1000
    """Steps of the fit of the time embedding, which needs no data; 0 for its closed form alone."""
    modulation: ModulationChoice = "keep"
    """keep: as the teacher has it. double: adaptive double normalization in place of EDM2's gain or DDPM++'s addition."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the fine-tuning."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class Measurement:
    """A network beside the old one on held images, one number for each of `SIGMAS`."""

    change: tuple[float, ...]
    """Root mean square difference of the velocities, relative to the old one."""
    loss: tuple[float, ...]
    """Mean squared error of `sd F`, in units of sd^2."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    model: Model
    fit: TimeFit
    fresh: tuple[str, ...]
    """Weights that nothing of the old network fits."""
    held: int
    """Images held back."""
    old_loss: tuple[float, ...]
    """Diffusion loss of the old network by noise level."""
    stages: dict[str, Measurement]
    """Swapped (before any fit), fitted, and fine-tuned."""

    def table(self) -> str:
        """Change of the velocity by time, as text."""
        changes = zip(*(stage.change for stage in self.stages.values()), strict=True)
        lines = [
            "change of the velocity, relative to the teacher's",
            "  sigma       t" + "".join(f"{name:>12}" for name in self.stages),
            *(
                f"{sigma:>7g} {t:>7.4f}" + "".join(f"{change:>12.4f}" for change in row)
                for sigma, t, row in zip(SIGMAS, self._times(), changes, strict=True)
            ),
        ]
        means = "".join(f"{fmean(stage.loss):>12.4f}" for stage in self.stages.values())
        return "\n".join([*lines, f"mean loss       {means}   (the teacher's: {fmean(self.old_loss):.4f})"])

    def report(self) -> dict[str, object]:
        """The same for JSON."""
        return {
            "sigma": list(SIGMAS),
            "t": self._times(),
            "held_images": self.held,
            "fresh_weights": list(self.fresh),
            "time_path": dataclasses.asdict(self.fit),
            "old_loss": list(self.old_loss),
            "stages": {name: dataclasses.asdict(stage) for name, stage in self.stages.items()},
        }

    def _times(self) -> list[float]:
        return self.model.process.time_from_sigma(torch.tensor(SIGMAS, dtype=torch.float32)).tolist()  # type: ignore[no-any-return]


def convert(
    run: str | Path,
    out: str | Path,
    settings: ConvertSettings | None = None,
    *,
    data: str | None = None,
    dataset: Dataset | None = None,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> Conversion:
    """Convert the teacher in the folder `run` and write the run folder `out`, with `convert.json` beside the model.

    Args:
        run: folder of a diffusion model whose network has log time or Fourier features.
        out: folder to create.
        settings: see `ConvertSettings`.
        data: other data than the run's own: digits, mnist, a folder or a zip.
        dataset: the data, when already open.
        device: cpu, cuda, or auto.
        resume: go on with the fine-tuning from the newest checkpoint in `out`, if there is one; what comes before it is done
            again.
        progress: draw a progress bar on stderr.

    Raises:
        UserError: if the run is a student or has the stable form already, its data are missing or of another shape or other
            classes, a setting makes no sense, or `out` holds a run or cannot be written.
    """
    kind_of(ConvertSettings, settings=settings)
    settings = settings or ConvertSettings()
    check_types(settings)
    for name, least in (("iterations", 0), ("fit_iterations", 0), ("batch_size", 1)):
        if (value := getattr(settings, name)) < least:
            raise UserError(f"{name} is {value}; expected {least} or more; correct the setting")
    if not 0 < settings.lr < float("inf"):
        raise UserError(f"lr is {settings.lr}; expected a positive number; correct the setting")
    out = check_place(out, "folder")
    check_outside(out, source_of(run) if data is None else data)
    if resume and not is_begun(out):
        raise UserError(f"nothing to resume in '{out}'; expected a conversion that was interrupted; drop --resume to start")
    old = load(run, device)
    if old.kind != "diffusion":
        raise UserError(f"'{run}' holds a student; expected a diffusion model; convert its teacher and distill that")
    network_config = stable_config(old.spec, settings.modulation)
    if not resume:
        check_free(out)
    config = config_of(Path(run), old)
    if data is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, source=data))
    dataset = _open(config, old, dataset, progress)
    ensure_folder(out)
    fraction = min(HELD, max(1, len(dataset) // 10)) / len(dataset)
    held, rest = dataset.split(fraction, settings.seed)

    with generators_kept():
        torch.manual_seed(derive_seed(settings.seed, "weights"))
        network = build(network_config, config.process.sigma_data)
    fresh = transplant(network, old.network)
    network.to(old.device).eval().requires_grad_(False)
    probe = Probe(old, held, settings.seed)
    stages = {"swapped": probe.measure(network)}
    process, proposal = config.process, config.objective.proposal
    fit = fit_time_path(
        network, old.network, process, proposal, iterations=settings.fit_iterations,
        seed=derive_seed(settings.seed, "time path"),
    )  # fmt: skip
    stages["fitted"] = probe.measure(network)

    converted = _tuned_config(config, network_config, settings, str(run), device)
    origin = {**old.origin, "teacher": str(run)}
    start = dataclasses.replace(old, network=network, spec=network_config, origin=origin)
    if settings.iterations:
        goes_on: Resume = "auto" if resume and not list_checkpoints(out) else resume
        model = Trainer(converted, out, teacher=start, dataset=rest, resume=goes_on, progress=progress).run()
        model = dataclasses.replace(model, conditioner=old.conditioner)
        stages["tuned"] = probe.measure(model.network)
    else:
        model = start
    model.save(out)
    result = Conversion(model, fit, tuple(fresh), len(held), probe.old_loss, stages)
    facts = {"from": str(run), **dataclasses.asdict(settings), **result.report()}
    write_json(out / "convert.json", stamped("report", facts))
    return result


class Probe:
    """Held images with fixed noise, on which networks are compared with the old one."""

    def __init__(self, old: Model, held: Dataset, seed: int, batch_size: int = 64) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "held"))
        indices, told = torch.arange(len(held)), takes(old.network)
        images, _ = held.batch(indices, generator=generator)
        self.old, self.batch_size = old, batch_size
        self.x0 = old.codec.encode(images.to(old.device))
        self.noise = old.process.sample_noise(self.x0, generator)
        self.told = {name: value.to(old.device) for name, value in held.told(indices).items() if name in told}
        self.old_outputs, self.old_loss = self._run(old.network)

    def measure(self, network: nn.Module) -> Measurement:
        """Change and loss of a network by noise level."""
        outputs, loss = self._run(network)
        change = [
            float((new - old).square().mean().sqrt() / old.square().mean().sqrt().clamp_min(1e-12))
            for new, old in zip(outputs, self.old_outputs, strict=True)
        ]
        return Measurement(tuple(change), loss)

    @torch.no_grad()
    def _run(self, network: nn.Module) -> tuple[list[Tensor], tuple[float, ...]]:
        process = self.old.process
        sd = process.sigma_data
        outputs, losses = [], []
        for sigma in SIGMAS:
            time = process.time_from_sigma(torch.tensor(sigma, dtype=torch.float32, device=self.x0.device))
            parts = []
            for part in torch.arange(len(self.x0), device=self.x0.device).split(self.batch_size):
                x_t = process.interpolate(self.x0[part], self.noise[part], time)
                parts.append(network(x_t / sd, time.expand(len(part)), **pick(self.told, part)).float())
            outputs.append(torch.cat(parts))
            target = process.velocity(self.x0, self.noise, time) / sd
            losses.append(float((outputs[-1] - target).square().mean()))
        return outputs, tuple(losses)


def _open(config: RunConfig, old: Model, dataset: Dataset | None, progress: bool) -> Dataset:
    """The data of the fine-tuning: images and classes like those of the model."""
    if dataset is None:
        try:
            dataset = load_data(dataclasses.replace(config.data, buckets=False), progress)
        except UserError as error:
            problem = str(error).split(";")[0]
            raise UserError(
                f"the data for the fine-tuning cannot be read ({problem}); expected images like the teacher's; pass --data"
            ) from None
    if old.num_classes == 0 and dataset.labels is not None:
        dataset = dataclasses.replace(dataset, labels=None, class_names=())
    dataset = dataset.numbered_as(old.class_names, "the teacher")
    for what, mine, theirs in (
        ("images of shape", dataset.shape, old.shape),
        ("classes", dataset.num_classes, old.num_classes),
    ):
        if mine != theirs:
            raise UserError(
                f"the data '{dataset.name}' have {what} {mine} and the teacher {theirs}; expected the teacher's kind of data; "
                "pass --data"
            )
    if len(dataset) < 2:
        raise UserError(f"{len(dataset)} images in '{dataset.name}'; expected two or more, one to hold back; pass --data")
    return dataset


def _tuned_config(config: RunConfig, network: NetworkConfig, settings: ConvertSettings, run: str, device: str) -> RunConfig:
    """The configuration of the fine-tuning."""
    iterations = max(1, settings.iterations)
    return dataclasses.replace(
        config,
        network=network,
        teacher=run,
        start=None,
        negative=None,
        optimizer=dataclasses.replace(
            config.optimizer, lr=settings.lr, schedule="cosine", warmup=min(100, iterations // 10)
        ),
        ema=EMAConfig(kind="power", sigma_rel=0.1),
        loop=dataclasses.replace(
            config.loop, iterations=iterations, batch_size=settings.batch_size, precision=settings.precision,
            device=device, seed=settings.seed, sample_every=0, log_every=min(50, iterations),
        ),
    )  # fmt: skip
