"""Evaluation in a stream: numbered samples, reference files, several sets, latents."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trigflow.evaluation.evaluate_model as evaluate_module
from tiny_vae import write_images, write_vae
from training.tiny import all_digits, untrained_teacher
from trigflow.codecs import Latents
from trigflow.codecs.vae import VAESource
from trigflow.data.captions import Captions
from trigflow.evaluation import (
    PixelFeatures,
    extract,
    feature_extractor,
    frechet_distance,
    gaussian_statistics,
    overlap,
    read_reference,
    write_reference,
)
from trigflow.evaluation.evaluate_model import evaluate_model, evaluations
from trigflow.evaluation.measure_reference import measure_reference
from trigflow.evaluation.scores import half_distance
from trigflow.models.model import Model, load
from trigflow.runtime.errors import UserError
from trigflow.samplers import Sampling

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def student(student_folder: Path) -> Model:
    return load(student_folder, "cpu")


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the digits, with the features of 300 of them."""
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    write_reference(path, measure_reference("digits", keep=300, batch_size=128))
    return path


# Numbered samples --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2])
def test_samples_are_the_same_wherever_drawing_begins(student: Model, steps: int) -> None:
    together = student.sample(150, steps=steps, batch_size=50)
    parts = [student.sample(50, steps=steps, first=first, batch_size=50) for first in (0, 50, 100)]
    assert torch.equal(torch.cat(parts), together)


def test_labels_go_on_where_drawing_begins(student: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    forward = student.network.forward

    def record(x: Tensor, t: Tensor, label: Tensor, **conditions: Tensor) -> Tensor:
        asked.append(label)
        return forward(x, t, label=label, **conditions)

    monkeypatch.setattr(student.network, "forward", record)
    student.sample(5, steps=1, first=23)
    student.sample(4, steps=1, first=7, labels=[2, 5, 9])
    assert [label.tolist() for label in asked] == [[3, 4, 5, 6, 7], [5, 9, 2, 5]]


def test_no_sample_lies_before_the_first(student: Model) -> None:
    with pytest.raises(UserError, match="first sample -1; expected 0 or more"):
        student.sample(4, first=-1)


# One set, several sets ---------------------------------------------------------------------------------------------------


def test_scores_are_made_of_the_pieces(student: Model) -> None:
    result = evaluate_model(student, num=40, steps=1, first=10, seed=3, batch_size=16)
    images = torch.cat([student.sample(n, first=10 + i, steps=1, seed=3) for i, n in ((0, 16), (16, 16), (32, 8))])
    network = feature_extractor("digits")
    real, fake = extract(network, all_digits().images), extract(network, images)
    expected = frechet_distance(gaussian_statistics(fake), gaussian_statistics(real))
    assert result["fd"] == pytest.approx(expected, rel=1e-6)
    assert result["fd_real"] == pytest.approx(half_distance(real), rel=1e-6)
    found = overlap(real, fake)
    assert {name: result[name] for name in dataclasses.asdict(found)} == dataclasses.asdict(found)
    assert (result["seeds"], result["num"], result["nfe"]) == ("10-49", 40, evaluations(student, 1))


def test_the_batch_size_changes_nothing_but_rounding(student: Model) -> None:
    scores = [evaluate_model(student, num=40, steps=1, batch_size=size, features="pixels") for size in (7, 40)]
    assert scores[0]["fd"] == pytest.approx(scores[1]["fd"], rel=1e-3)


def test_the_best_of_several_sets(student: Model, digits_file: Path) -> None:
    apart = [
        evaluate_model(student, num=30, steps=1, first=first, reference=digits_file, batch_size=30) for first in (0, 30, 60)
    ]
    distances = [result["fd"] for result in apart]
    together = evaluate_model(student, num=30, steps=1, repeat=3, reference=digits_file, batch_size=30)
    assert together["fd_of_each"] == distances
    best = apart[distances.index(min(distances))]
    ignored = ("samples_per_second", "fd_of_each")
    assert {k: v for k, v in together.items() if k not in ignored} == {
        k: v for k, v in best.items() if k != "samples_per_second"
    }


def test_the_clip_score_is_that_of_the_set_that_is_reported(student: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    class Judge(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()

        def forward(self, images: Tensor, texts: list[str]) -> Tensor:
            return images.float().mean((1, 2, 3))

    dataset = dataclasses.replace(all_digits(), captions=Captions([("a digit",)] * len(all_digits())))
    monkeypatch.setattr(evaluate_module, "ClipScore", Judge)
    monkeypatch.setattr(evaluate_module, "_real_images", lambda *_: dataset)
    how = {"num": 30, "steps": 1, "batch_size": 30, "features": "pixels", "clip": "x"}
    together = evaluate_model(student, repeat=3, **how)
    first = int(together["seeds"].split("-")[0])
    assert together["clip_score"] == evaluate_model(student, first=first, **how)["clip_score"]


def test_only_one_batch_of_samples_is_alive(student: Model, digits_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    sample, most = student.sample, 0

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal most
        images = sample(*args, **kwargs)
        alive.add(images)
        most = max(most, sum(len(batch) for batch in alive))
        return images

    monkeypatch.setattr(student, "sample", counted)
    evaluate_model(student, num=100, steps=1, batch_size=10, reference=digits_file)
    assert 10 <= most <= 10 + 1  # a batch, and the sample tried out first


# Reference files ---------------------------------------------------------------------------------------------------------


def test_a_file_of_all_features_stands_for_the_data(student: Model, tmp_path: Path) -> None:
    write_reference(str(tmp_path / "ref.npz"), measure_reference("digits", keep=1797))
    stored = evaluate_model(student, num=40, steps=1, reference=tmp_path / "ref.npz")
    fresh = evaluate_model(student, num=40, steps=1)
    for name in ("fd", "precision", "recall", "density", "coverage"):
        assert stored[name] == pytest.approx(fresh[name], rel=1e-6)
    assert stored["fd_real"] == pytest.approx(fresh["fd_real"], rel=0.2)  # of one halving, not four
    assert (stored["data"], stored["features"]) == ("digits", "digits")


def test_a_file_of_statistics_gives_the_distance_alone(student: Model, tmp_path: Path) -> None:
    statistics = gaussian_statistics(extract(PixelFeatures(), all_digits().images))
    np.savez(tmp_path / "ref.npz", mu=statistics.mean.numpy(), sigma=statistics.covariance.numpy())
    result = evaluate_model(student, num=40, steps=1, reference=tmp_path / "ref.npz", features="pixels")
    assert list(result) == ["fd", "nfe", "num", "samples_per_second", "data", "features", "seeds"]
    assert result["fd"] == pytest.approx(evaluate_model(student, num=40, steps=1, features="pixels")["fd"], rel=1e-6)


def test_kept_features_are_evenly_spaced_and_the_halves_cover_all(digits_file: Path) -> None:
    found = read_reference(digits_file)
    features = extract(feature_extractor("digits"), all_digits().images)
    assert found.features is not None
    torch.testing.assert_close(found.features, features[torch.arange(300) * 1797 // 300], rtol=1e-4, atol=1e-4)
    expected = gaussian_statistics(features)
    torch.testing.assert_close(found.statistics.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.statistics.covariance, expected.covariance, rtol=1e-4, atol=1e-5)
    assert found.statistics.n == 1797
    assert found.fd_real == pytest.approx(half_distance(features), rel=0.2)


@pytest.mark.parametrize("packed", [False, True])
def test_folders_and_zips_are_read_a_batch_at_a_time(tmp_path: Path, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-in features under the name of a network whose weights are downloaded."""
    names = [f"{number:02}.png" for number in range(11)]
    folder = write_images(tmp_path / "images", names)
    source = folder
    if packed:
        import zipfile

        source = tmp_path / "images.zip"
        with zipfile.ZipFile(source, "w") as archive:
            for name in names:
                archive.write(folder / name, name)
    seen: list[Tensor] = []

    class Recording(PixelFeatures):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images)
            return super().forward(images)

    monkeypatch.setattr("trigflow.evaluation.measure_reference.feature_extractor", lambda *_: Recording())
    found = measure_reference(str(source), features="inception", batch_size=4, keep=11)
    from trigflow.data import open_dataset

    expected = open_dataset(folder, channels=3).images
    assert [len(batch) for batch in seen] == [4, 4, 3]
    assert torch.equal(torch.cat(seen), expected)
    assert (found.statistics.n, found.extractor, found.data) == (11, "inception", source.name)
    small = measure_reference(str(source), features="inception", num=5, resize=8)
    assert (small.statistics.n, seen[-1].shape) == (5, (5, 3, 8, 8))


def test_images_that_cannot_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trigflow.evaluation.measure_reference.feature_extractor", lambda *_: PixelFeatures())

    def refused(source: Path, **settings: Any) -> str:
        with pytest.raises(UserError) as caught:
            measure_reference(str(source), features="inception", **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    folder = write_images(tmp_path / "a", ["0.png", "1.png", "2.png", "3.png"])
    assert "'4.png' is 8x8 (width x height)" in refused(write_images(folder, ["4.png"], side=8))
    (folder / "4.png").write_bytes((folder / "3.png").read_bytes()[:60])
    assert "image '4.png'" in refused(folder)
    (folder / "4.png").unlink()
    assert "of 3 images" in refused(folder, num=3)
    (folder / "3.png").unlink()
    assert "3 images" in refused(folder)
    (tmp_path / "none").mkdir()
    assert "no images found" in refused(tmp_path / "none")
    assert "nothing at that path" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference": "nowhere.npz"}, "reference 'nowhere.npz' does not exist"),
        ({"reference": "digits_file", "features": "pixels"}, "is of the features 'digits'; expected 'pixels'"),
        ({"reference": "digits_file", "data": "digits"}, "both data and a reference file"),
        ({"reference": "plain", "features": "mnist"}, r"images of shape \(1, 1, 8, 8\)"),
        ({"reference": "plain", "features": "digits"}, "of 3 features for 'digits' of 64; expected the same"),
        ({"repeat": 0}, "repeat 0"),
        ({"batch_size": 0}, "batches of 0"),
        ({"first": -1}, "first sample -1"),
        ({"weights": "w.pth"}, "weights for the features 'digits'; expected none"),
    ],
)
def test_what_cannot_be_evaluated(
    arguments: dict[str, Any], message: str, student: Model, digits_file: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "plain.npz", mu=np.zeros(3), sigma=np.eye(3))
    places = {"digits_file": digits_file, "plain": tmp_path / "plain.npz"}
    given = arguments.get("reference")
    with pytest.raises(UserError, match=message) as caught:
        evaluate_model(student, num=8, **{**arguments, "reference": places.get(given, given)})
    assert "\n" not in str(caught.value)


# Latents -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Draws latents 4x8x8 that an autoencoder makes images 3x16x16 of."""
    folder = write_vae(tmp_path_factory.mktemp("vae"))
    network = torch.nn.Module()
    network.register_parameter("weight", torch.nn.Parameter(torch.zeros(1)))
    network.forward = lambda x, t: 0.3 * x  # type: ignore[method-assign]
    teacher = untrained_teacher()
    conditioning = dataclasses.replace(teacher.spec.conditioning, num_classes=0)
    spec = dataclasses.replace(teacher.spec, conditioning=conditioning)
    source = VAESource(name=str(folder))
    zeros, ones = (0.0,) * 4, (1.0,) * 4
    codec = Latents((4, 8, 8), zeros, ones, 0.5, source)
    return Model(network, spec, teacher.process, codec, Sampling("flow_map"))


def test_latents_are_measured_as_images(latent_model: Model, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", [f"{number}.png" for number in range(12)], side=20)
    result = evaluate_model(latent_model, num=20, steps=1, data=str(folder), batch_size=8)
    assert (result["data"], result["features"]) == ("images", "pixels")
    real = extract(PixelFeatures(), resized(folder))
    fake = extract(PixelFeatures(), latent_model.sample(20, steps=1, batch_size=8))
    assert fake.shape[1] == 3 * 8 * 8
    expected = frechet_distance(gaussian_statistics(fake), gaussian_statistics(real))
    assert result["fd"] == pytest.approx(expected, rel=1e-6)


def resized(folder: Path) -> Tensor:
    from trigflow.data import open_dataset

    return open_dataset(folder, resize=16, channels=3).images


def test_latents_against_a_reference_file(latent_model: Model, tmp_path: Path) -> None:
    np.savez(tmp_path / "ref.npz", mu=np.zeros(192), sigma=np.eye(192))
    result = evaluate_model(latent_model, num=8, steps=1, reference=tmp_path / "ref.npz", features="pixels")
    assert result["fd"] > 0


def test_latents_need_images_to_be_compared_with(latent_model: Model) -> None:
    with pytest.raises(UserError, match=r"a model of latents, whose data are no images.*--data IMAGES or --reference FILE"):
        evaluate_model(latent_model, num=8)


# The commands ------------------------------------------------------------------------------------------------------------


def test_reference_and_evaluate(cli: Cli, student_folder: Path, tmp_path: Path) -> None:
    made = cli("reference", "digits", "--features", "digits", "--keep", 50, "--out", tmp_path / "ref.npz", "--quiet")
    assert made.code == 0
    assert "Statistics of 1797 images" in made.out
    result = cli(
        "evaluate", student_folder, "--reference", tmp_path / "ref.npz", "--seeds", "20-59", "--steps", 1, "--repeat", 2,
        "--batch-size", 20, "--device", "cpu", "--quiet", "--out", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["num"] == 40
    assert figures["seeds"] in ("20-59", "60-99")
    assert figures["fd"] == min(figures["fd_of_each"])
    assert len(figures["fd_of_each"]) == 2


def test_times_that_were_found_stay_in_the_run(cli: Cli, student_folder: Path, tmp_path: Path) -> None:
    run = shutil.copytree(student_folder, tmp_path / "run")
    before = json.loads((run / "model.json").read_text())
    result = cli(
        "evaluate", run, "--steps", 2, "--find-times", "--num", 20, "--features", "pixels", "--device", "cpu", "--quiet"
    )
    assert result.code == 0
    after = json.loads((run / "model.json").read_text())
    assert {**after, "times": {}} == {**before, "times": {}}
    assert result.out.splitlines()[0].split() == ["times", *(f"{t:.4f}" for t in after["times"]["2"])]
    figures = evaluate_model(load(run, "cpu"), steps=2, num=20, features="pixels")
    assert f"{figures['fd']:.4f}" in result.out


@pytest.mark.parametrize("given", [["--seeds", "5"], ["--seeds", "9-5"], ["--seeds", "0-9", "--num", "10"]])
def test_numbers_that_make_no_sense(cli: Cli, student_folder: Path, given: list[str]) -> None:
    result = cli("evaluate", student_folder, *given)
    assert result.code == 2
    assert "expected FIRST-LAST" in result.err
    assert len(result.err.splitlines()) == 1


def test_a_reference_is_an_npz(cli: Cli, tmp_path: Path) -> None:
    result = cli("reference", "digits", "--out", tmp_path / "ref.pkl")
    assert result.code == 2
    assert "is no .npz" in result.err
    assert list(tmp_path.iterdir()) == []
