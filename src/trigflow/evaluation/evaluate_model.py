"""Measuring a model against its data."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from trigflow.conditions import null
from trigflow.data import Dataset
from trigflow.data.config import data_of, load_data
from trigflow.evaluation import (
    Processes,
    Reference,
    ReferenceStatistics,
    default_features,
    extract,
    feature_extractor,
    frechet_distance,
    gather,
    neighbour_radii,
    overlap,
    read_reference,
    stream_features,
)
from trigflow.evaluation.clip_score import ClipScore
from trigflow.evaluation.manifold import NEIGHBOURS
from trigflow.evaluation.scores import half_distance
from trigflow.evaluation.streaming import Images
from trigflow.models.model import Model
from trigflow.runtime.errors import UserError
from trigflow.runtime.values import whole
from trigflow.samplers import get_solver, nfe, search_times, sigma_grid
from trigflow.samplers.guidance import inside_interval, time_interval


def evaluations(
    model: Model,
    steps: int | None,
    solver: str = "heun",
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
) -> int:
    """Network evaluations per sample (NFE). On a diffusion model those with guidance count twice: all, or the ones inside
    the interval of noise levels; a negative model counts like the model itself."""
    steps = model.default_steps() if steps is None else steps
    if model.kind == "consistency":
        return steps
    if guidance == 1 or guidance_interval is None:
        return nfe(solver, steps) * (1 if guidance == 1 else 2)
    process, times = model.process, []

    def record(x_t: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return x_t

    get_solver(solver)(record, torch.zeros(1, dtype=torch.float32), sigma_grid(process, steps))
    inside = inside_interval(torch.cat(times), time_interval(process, guidance_interval))
    return len(times) + int(inside.sum())


def score(model: Model, reference: Reference, *, num: int, **sampling: Any) -> dict[str, Any]:
    """Draw `num` samples and score them: fd, fd_real, precision, recall, nfe, num, samples_per_second.

    Args:
        model: what to draw from.
        reference: real data in feature space.
        num: number of samples.
        sampling: arguments of `Model.sample`.
    """
    began = time.perf_counter()
    images = model.codec.pictures(model.sample(num, **sampling))
    seconds = time.perf_counter() - began
    scores = reference.score(images)
    counted = {name: sampling[name] for name in ("steps", "solver", "guidance", "guidance_interval") if name in sampling}
    if sampling.get("times") is not None:
        counted["steps"] = len(sampling["times"])
    return {
        **{name: getattr(scores, name) for name in ("fd", "fd_real", "precision", "recall")},
        "nfe": evaluations(model, **{"steps": None, **counted}),
        "num": num,
        "samples_per_second": num / seconds,
    }


def make_reference(dataset: Dataset, features: str = "auto", seed: int = 0) -> Reference:
    """The data in the feature space named `features`; `auto` takes the network shipped for the data set, else pixels."""
    name = default_features(dataset.name) if features == "auto" else features
    images = dataset.values if dataset.rows is None else torch.cat(list(dataset.chunks()))
    return Reference(images, feature_extractor(name), seed=seed)


def evaluate_model(
    model: Model,
    *,
    num: int = 2000,
    steps: int | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    negative: Model | None = None,
    solver: str = "heun",
    seed: int = 0,
    features: str = "auto",
    data: str | None = None,
    progress: bool = False,
    reference: str | Path | None = None,
    weights: str | None = None,
    first: int = 0,
    repeat: int = 1,
    batch_size: int = 256,
    clip: str | None = None,
    known: list[Any] | None = None,
) -> dict[str, Any]:
    """Frechet distance, precision, recall, density and coverage of `num` samples against the model's data set.

    Classes are drawn in turn, and captions and other conditions are those of the data in turn. Samples are numbered, and the
    noise of sample i is decided by `seed` and i alone. They are drawn, looked at and let go a batch at a time. Where
    `torch.distributed` is initialized all its processes share the work, each has to call this, and each gets the same
    result, equal bit for bit to that of one process with the same `batch_size`.

    Args:
        model: what to draw from; latents are decoded by its autoencoder.
        num: how many samples.
        steps, guidance, guidance_interval, negative, solver, seed: see `Model.sample`.
        features: see `feature_extractor`; `auto` takes those of the reference file, or the network shipped for
            the data set, else pixels.
        data: other data than the model was trained on: a name or a path.
        progress: show bars.
        reference: a file of statistics to compare with, instead of data; see `trigflow.evaluation.read_reference`.
        weights: a local copy of the weights of the features `inception` or `dinov2`.
        first: number of the first sample.
        repeat: measure so many sets of `num` samples, one after another in the numbering, and take the one of lowest distance.
        batch_size: samples drawn together.
        clip: folder or id of a CLIP model, for the score of pictures and their captions; see `ClipScore`.
        known: empty at first; keeps what a call found out about the data, for further calls that compare with the same.

    Returns:
        fd, fd_real (real against real, the floor of fd), precision, recall, density, coverage, nfe, num, samples_per_second,
        data, features, seeds (numbers of the samples), with `repeat` fd_of_each, and with `clip` clip_score. A reference file
        without features gives no precision to coverage, one that does not say it no fd_real.

    Raises:
        UserError: for data of another shape than the model draws, a reference file of other features, a model of latents
            without images to compare with, or arguments out of range.
        MissingExtraError: for features, data or an autoencoder whose package is not installed.
    """
    whole(num=num, repeat=repeat, batch_size=batch_size, first=first, seed=seed)
    if num <= NEIGHBOURS:
        raise UserError(f"{num} samples to measure; expected at least {NEIGHBOURS + 1}; raise --num")
    if repeat < 1 or batch_size < 1:
        raise UserError(f"repeat {repeat}, batches of {batch_size}; expected at least 1 of each; correct the numbers")
    if data is not None and reference is not None:
        raise UserError("both data and a reference file; expected one to compare with; drop --data or --reference")
    if data is None and reference is None and not model.codec.pictured:
        raise UserError(
            f"a model of {model.codec.kind}, whose data are no images to compare with; expected images or their statistics; "
            "pass --data IMAGES or --reference FILE"
        )
    processes = Processes.present()
    show = progress and processes.rank == 0
    sampling: dict[str, Any] = {
        "steps": steps, "guidance": guidance, "guidance_interval": guidance_interval, "negative": negative, "solver": solver,
    }  # fmt: skip
    drawn = processes.agree(lambda: model.sample(1, first=first, seed=seed, **sampling))  # what is wrong is said at once
    one = model.codec.pictures(drawn)
    known = [] if known is None else known

    def extractor_of(name: str) -> nn.Module:
        return processes.one_first(lambda: feature_extractor(name, weights, show).to(model.device))

    def stream(images: Images, count: int, extractor: nn.Module, bar: str) -> Iterator[Tensor]:
        shown = bar if progress else None
        return stream_features(images, count, extractor, batch_size=batch_size, processes=processes, progress=shown)

    def known_data() -> tuple[ReferenceStatistics, nn.Module, dict[str, Any], list[str]]:
        dataset = processes.agree(lambda: _real_images(model, one, data, show))
        source = data_of(model.origin).source if data is None else data  # a folder may be called as data that come along
        name = default_features(source) if features == "auto" else features
        extractor, everything = extractor_of(name), torch.arange(len(dataset))

        def pictures(start: int, stop: int) -> Tensor:
            return _pictures(model, dataset.batch(everything[start:stop])[0])

        statistics, kept = gather(stream(pictures, len(dataset), extractor, "features of the data"), keep=True)
        real = ReferenceStatistics(statistics, kept, None if kept is None else half_distance(kept), name, dataset.name)
        said = dataset.read_as(model.conditioner).read_by(null(model.network)).said(everything, model.conditioner.inputs)
        texts = [] if dataset.captions is None else dataset.captions.of_samples(everything)
        return real, extractor, {"conditions": said}, texts

    def known_statistics(reference: str | Path) -> tuple[ReferenceStatistics, nn.Module, dict[str, Any], list[str]]:
        real = processes.agree(lambda: read_reference(reference, None if features == "auto" else features))
        extractor, expected = extractor_of(real.extractor), len(real.statistics.mean)
        if (found := extract(extractor, one).shape[1]) != expected:
            raise UserError(
                f"reference '{reference}' of {expected} features for '{real.extractor}' of {found}; expected the same; "
                "choose --features, or another file"
            )
        return real, extractor, {}, []

    if not known:
        found = known_data() if reference is None else known_statistics(reference)
        known += [*found, _comparison(model, found[0], processes)]
    real, extractor, told, captions, compare = known
    sampling |= told
    if clip is not None and not captions:
        raise UserError("a CLIP score without captions; expected data with captions; drop --clip, or pass --data")
    judge = None if clip is None else processes.one_first(lambda: ClipScore(clip).to(model.device))
    seconds, fits = 0.0, list[float]()

    def draw(begin: int, start: int, stop: int) -> Tensor:
        nonlocal seconds
        began = time.perf_counter()
        count = stop - start
        images = model.codec.pictures(model.sample(count, first=begin + start, batch_size=count, seed=seed, **sampling))
        seconds += time.perf_counter() - began
        if judge is not None:
            texts = [captions[i % len(captions)] for i in range(begin + start, begin + stop)]
            fits.extend(judge(images.to(model.device), texts).tolist())
        return images

    results = []
    for begin in range(first, first + repeat * num, num):
        fits.clear()
        measured = compare(stream(functools.partial(draw, begin), num, extractor, "sampling"))
        fit = {} if judge is None else {"clip_score": fmean(chain(*processes.together(lambda: fits)))}
        results.append((measured, begin, fit))
    best, begin, fit = min(results, key=lambda result: float(result[0]["fd"]))
    counted = {key: sampling[key] for key in ("steps", "solver", "guidance", "guidance_interval")}
    return {
        **best,
        "nfe": evaluations(model, **counted),
        "num": num,
        "samples_per_second": repeat * num / max(processes.together(lambda: seconds)),
        "data": real.data,
        "features": real.extractor,
        "seeds": f"{begin}-{begin + num - 1}",
        **({"fd_of_each": [measured["fd"] for measured, _, _ in results]} if repeat > 1 else {}),
        **fit,
    }


def find_times(model: Model, *, steps: int | None = None, num: int = 2000, first: int = 0, **how: Any) -> tuple[float, ...]:
    """Sampling times of a student of smallest Frechet distance, by `search_times`; they become `model.times[steps]`.

    Args:
        model: a student of one jump from any time; two steps draw it 16 times, more 32 times for each time that is searched.
        steps: how many evaluations a sample takes.
        num, first: measured on the `num` samples from number `first` on; those that are judged afterwards should be others.
        how: see `evaluate_model`.

    Raises:
        UserError: for a diffusion model or a multistep student, whose times are given, and where `evaluate_model` does.
    """
    steps = model.default_steps() if steps is None else steps
    if model.kind == "diffusion" or model.sampling.jumps == "segments":
        raise UserError(
            "a search for times of a model whose times are given; expected a student without segments; drop --find-times"
        )
    before, known = dict(model.times), list[Any]()

    def distance(times: tuple[float, ...]) -> float:
        model.times[steps] = times
        return float(evaluate_model(model, steps=steps, num=num, first=first, known=known, **how)["fd"])

    try:
        upper = min(1.5, model.process.t_max - 0.05)  # of a schedule of DDPM, t_max may be less
        before[steps] = search_times(distance, model.process, steps, upper=upper).times
    finally:
        model.times.clear()
        model.times.update(before)
    return model.times[steps]


def _comparison(model: Model, real: ReferenceStatistics, processes: Processes) -> Callable[[Iterable[Tensor]], dict[str, Any]]:
    """A function from batches of features to their distance from the real ones, and, where it has those, the overlap."""
    device = model.device if model.device.type == "cuda" else torch.device("cpu")  # float64 is slow or absent elsewhere
    features = None if real.features is None else real.features.to(device)
    radii = None if features is None else neighbour_radii(features, NEIGHBOURS, processes=processes)
    floor = {} if real.fd_real is None else {"fd_real": real.fd_real}

    def compare(batches: Iterable[Tensor]) -> dict[str, Any]:
        statistics, drawn = gather(batches, keep=features is not None)
        result = {"fd": frechet_distance(statistics, real.statistics), **floor}
        if features is not None and drawn is not None:
            found = overlap(features, drawn.to(device), NEIGHBOURS, real_radii=radii, processes=processes)
            result |= dataclasses.asdict(found)
        return result

    return compare


def _pictures(model: Model, stored: Tensor) -> Tensor:
    """Stored data as images to compare drawn ones with; of a codec that draws what is stored, as it shows them."""
    return stored if stored.dtype == torch.uint8 or not model.codec.pictured else model.codec.pictures(stored)


def _real_images(model: Model, one: Tensor, data: str | None, progress: bool) -> Dataset:
    """Images to compare with, of the shape of the one that was drawn."""
    config = dataclasses.replace(data_of(model.origin), buckets=False)  # what is drawn are squares
    config = config if data is None else dataclasses.replace(config, source=data)
    shape = tuple(one.shape[1:])
    if not model.codec.pictured:
        config = dataclasses.replace(config, resize=shape[1] if shape[1] == shape[2] else None, channels=shape[0])
    dataset = load_data(config, progress)
    found = tuple(_pictures(model, dataset.batch(torch.arange(1))[0]).shape[1:])
    if found != shape:
        raise UserError(
            f"data of shape {found} for a model that draws {shape}; expected the same; use the data the model was trained on"
        )
    return dataset
