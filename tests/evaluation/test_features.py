"""Shipped classifiers keep what their metadata says, and extractors take what users pass."""

from __future__ import annotations

from importlib.resources import files

import pytest
import torch
from torch import Tensor, nn

from trigflow.data import open_dataset
from trigflow.evaluation import FeatureNet, PixelFeatures, default_features, extract, feature_extractor
from trigflow.evaluation.features.extractors import shipped_weights
from trigflow.runtime.errors import UserError

Labelled = tuple[Tensor, Tensor]


def random_images(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "least"), [("digits", 0.98), ("mnist", 0.97)])
def test_shipped_classifiers_reach_their_stated_accuracy(name: str, least: float, request: pytest.FixtureRequest) -> None:
    images, labels = request.getfixturevalue(name)
    tensors, metadata = shipped_weights(name)
    held_out = tensors["test_indices"].long()
    assert len(held_out) == len(held_out.unique()) == int(metadata["test_images"])
    assert len(held_out) + int(metadata["train_images"]) == len(images)

    network = feature_extractor(name)
    assert isinstance(network, FeatureNet)
    right = network.logits(images[held_out]).argmax(1) == labels[held_out]
    stated = float(metadata["test_accuracy"])
    assert stated >= least
    assert right.double().mean().item() == pytest.approx(stated, abs=1.5 / len(held_out))


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_shipped_weights_are_small_and_say_where_they_come_from(name: str) -> None:
    assert len(files("trigflow.evaluation.features").joinpath("weights", f"{name}.safetensors").read_bytes()) < 300_000
    _, metadata = shipped_weights(name)
    assert {"dataset", "seed", "torch", "epochs", "test_accuracy"} <= metadata.keys()


@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_features_have_unit_scale_and_none_is_dead(name: str, request: pytest.FixtureRequest) -> None:
    images, _ = request.getfixturevalue(name)
    features = extract(feature_extractor(name), images[::3])
    assert features.shape == (len(images[::3]), 64)
    assert features.dtype == torch.float32
    assert features.mean(0).abs().max() < 0.2
    assert (features.std(0) - 1).abs().max() < 0.15
    assert features.abs().max() < 6
    spectrum = torch.linalg.eigvalsh(features.double().T.cov())
    assert spectrum.sum() ** 2 / spectrum.square().sum() > 9  # more than the nine directions that ten classes need


def test_shipped_networks_are_fixed() -> None:
    network = feature_extractor("digits")
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_pixel_features_average_areas() -> None:
    images = random_images(3, 2, 32, 16)
    features = feature_extractor("pixels")(images)
    assert features.shape == (3, 2 * 8 * 8)
    block = images[1, 1, 4:8, 2:4].float().mean() / 127.5 - 1  # row 1, column 1 of the 8x8 grid
    assert features[1].reshape(2, 8, 8)[1, 1, 1] == pytest.approx(block.item(), abs=1e-5)


def test_pixel_features_keep_small_images_and_span_minus_one_to_one() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(4, 1, 5, 2)
    features = PixelFeatures()(images)
    assert features.shape == (4, 10)
    assert torch.equal(features[0], torch.tensor([-1.0, 1.0]).repeat(5))


def test_default_features() -> None:
    assert [default_features(name) for name in ("digits", "mnist", "photos")] == ["digits", "mnist", "pixels"]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_extract_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    images = random_images(10, 1, 8, 8)
    network = feature_extractor("digits")
    torch.testing.assert_close(extract(network, images, batch_size), network(images), rtol=1e-5, atol=1e-5)


def test_extract_runs_in_eval_mode_and_restores_every_mode() -> None:
    network = nn.Sequential(PixelFeatures(), nn.Dropout(0.9), nn.BatchNorm1d(64), nn.Linear(64, 5))
    network.train()
    network[3].eval()
    images = random_images(20, 1, 8, 8)
    first, second = extract(network, images), extract(network, images, batch_size=7)
    torch.testing.assert_close(first, second)
    assert not first.requires_grad
    assert [module.training for module in network] == [True, True, True, False]
    assert network[2].num_batches_tracked == 0


def test_extract_restores_the_mode_after_an_error() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 1))
    network.train()
    with pytest.raises(RuntimeError):
        extract(network, random_images(4, 1, 8, 8))  # a convolution does not take bytes
    assert network.training


def test_extract_takes_any_callable() -> None:
    images = random_images(6, 3, 4, 4)
    features = extract(lambda x: x.double().mean((2, 3)), images, batch_size=4)
    assert torch.equal(features, images.double().mean((2, 3)))
    assert extract(lambda x: x.half().mean((2, 3)), images).dtype == torch.float32


@pytest.mark.parametrize(
    ("extractor", "seen"),
    [
        (lambda x: x.float(), r"shape \(6, 1, 4, 4\)"),
        (lambda x: x.float().mean((1, 2, 3)), r"shape \(6,\)"),
        (lambda x: x.float().flatten(1)[:3], r"shape \(3, 16\)"),
        (lambda x: x.flatten(1), r"torch\.uint8"),
        (lambda x: {"features": x}, "returned dict"),
    ],
)
def test_extract_refuses_outputs_that_are_not_features(extractor: object, seen: str) -> None:
    with pytest.raises(UserError, match=rf"{seen}.*expected a floating tensor of shape \(6, d\)"):
        extract(extractor, random_images(6, 1, 4, 4))  # type: ignore[arg-type]


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UserError, match=r"images of shape \(2, 1, 28, 28\).*expects \(b, 1, 8, 8\)"):
        extract(feature_extractor("digits"), random_images(2, 1, 28, 28))
    with pytest.raises(UserError, match=r"images of shape \(2, 3, 28, 28\).*expects \(b, 1, 28, 28\)"):
        extract(feature_extractor("mnist"), random_images(2, 3, 28, 28))


def test_images_that_are_not_bytes_are_refused() -> None:
    for images in (torch.zeros(2, 1, 8, 8), random_images(1, 8, 8)):
        with pytest.raises(UserError, match=r"expected uint8 of shape \(b, c, h, w\)"):
            extract(feature_extractor("pixels"), images)
    with pytest.raises(UserError, match="images of type ndarray"):
        extract(feature_extractor("pixels"), random_images(2, 1, 8, 8).numpy())
    with pytest.raises(UserError, match="0 images"):
        extract(feature_extractor("pixels"), random_images(0, 1, 8, 8))


def test_unknown_names_and_impossible_networks_are_refused() -> None:
    with pytest.raises(UserError, match="unknown features 'clip'; expected one of digits, mnist, emoji, pixels, inception"):
        feature_extractor("clip")
    with pytest.raises(UserError, match="cannot be halved 4 times"):
        FeatureNet(size=8, stages=4)


def test_the_classifier_of_emoji_knows_each_of_them() -> None:
    try:
        parts = [open_dataset(name) for name in ("emoji", "emoji-held-out")]
    except UserError as error:
        pytest.skip(str(error))
    network, images = feature_extractor("emoji"), torch.cat([part.values for part in parts])
    _, metadata = shipped_weights("emoji")
    assert isinstance(network, FeatureNet)
    assert len(images) == int(metadata["classes"])
    varied = parts[0].batch(torch.arange(len(parts[0])), generator=torch.Generator().manual_seed(1))[0]
    varied = torch.cat([varied, parts[1].values])
    guessed = torch.cat([network.logits(part).argmax(1) for part in varied.split(512)])
    assert float((guessed == torch.arange(len(images))).double().mean()) > 0.9 < float(metadata["test_accuracy"])
    features = extract(network, images)
    assert (features.std(0) - 1).abs().max() < 0.5
    assert default_features("emoji") == default_features("emoji-held-out") == "emoji"
