"""DINOv2 features: what reaches the network, what is taken from it, and weights in folders."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trigflow.evaluation import feature_extractor
from trigflow.evaluation.features.dinov2 import Dinov2, fit_positions
from trigflow.runtime.errors import MissingExtraError, UserError


class Seen(nn.Module):
    """Stands in for the network: keeps what it is given, and answers with numbered tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(patch_size=14)
        self.embeddings = nn.Module()
        self.embeddings.position_embeddings = nn.Parameter(torch.randn(1, 1 + 37**2, 2))
        self.pixels = torch.empty(0)

    def forward(self, pixel_values: Tensor) -> Any:
        self.pixels = pixel_values
        tokens = torch.arange(257.0)[None, :, None].expand(len(pixel_values), -1, 6)
        return SimpleNamespace(last_hidden_state=tokens + 1)


@pytest.fixture
def seen() -> Seen:
    with torch.random.fork_rng(devices=[]):
        return Seen()


def test_images_are_normalized_as_those_of_imagenet(seen: Seen) -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 224, 224)
    features = Dinov2(seen)(images)
    for value, image in zip((0.0, 0.2, 1.0), seen.pixels, strict=True):
        for mean, std, channel in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), image, strict=True):
            torch.testing.assert_close(channel, torch.full((224, 224), (value - mean) / std), rtol=1e-5, atol=1e-5)
    assert torch.equal(features, torch.ones(3, 6))  # the class token


def test_images_are_scaled_smoothly(seen: Seen) -> None:
    """A fine checkerboard, eight times too large, becomes its mean: with antialiasing, and only then."""
    y, x = torch.meshgrid(torch.arange(1792), torch.arange(1792), indexing="ij")
    board = (255 * ((x + y) % 2)).to(torch.uint8)[None, None]
    Dinov2(seen)(board)
    assert seen.pixels.shape == (1, 3, 224, 224)
    middle = seen.pixels[0, 0, 20:-20, 20:-20] * 0.229 + 0.485
    torch.testing.assert_close(middle, torch.full_like(middle, 0.5), rtol=0, atol=1e-3)


def cubic(x: float, a: float = -0.75) -> float:
    """Keys' kernel, as PyTorch's bicubic interpolation has it."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def test_position_embeddings_are_read_at_the_scale_of_dinov2() -> None:
    """Patch i of 16 lies at `(i + 0.5) 37 / 16.1 - 0.5` of 37; values along one axis, constant along the other."""
    line = torch.randn(37, generator=torch.Generator().manual_seed(0))
    table = torch.cat([torch.tensor([7.0]), line[:, None].expand(37, 37).reshape(-1)])[None, :, None]
    found = fit_positions(table, 16)
    assert found.shape == (1, 257, 1)
    assert found[0, 0, 0] == 7
    grid = found[0, 1:, 0].reshape(16, 16)
    for i in range(16):
        place = (i + 0.5) * 37 / 16.1 - 0.5
        near = range(math.floor(place) - 1, math.floor(place) + 3)
        expected = sum(cubic(place - j) * float(line[min(max(j, 0), 36)]) for j in near)
        torch.testing.assert_close(grid[i], torch.full((16,), expected), rtol=1e-4, atol=1e-4)


def test_position_embeddings_that_fit_are_left_alone() -> None:
    table = torch.randn(1, 257, 3, generator=torch.Generator().manual_seed(0))
    assert fit_positions(table, 16) is table


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"needs transformers.*expected the 'features' extra"):
        feature_extractor("dinov2")


# With transformers -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small network of random weights, as transformers writes one."""
    transformers = pytest.importorskip("transformers", reason="DINOv2 is read with transformers")
    path = tmp_path_factory.mktemp("dinov2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Dinov2Config(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14
        )
        network = transformers.Dinov2Model(config)
        with torch.no_grad():
            network.embeddings.position_embeddings.normal_()
        network.save_pretrained(path)
    return path


def test_features_are_the_class_token_of_the_network(folder: Path) -> None:
    from transformers import Dinov2Model

    state = torch.random.get_rng_state()
    extractor = feature_extractor("dinov2", str(folder))
    assert torch.equal(torch.random.get_rng_state(), state)
    images = torch.randint(0, 256, (2, 3, 60, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = extractor(images)
        x = F.interpolate(images.float(), size=(224, 224), mode="bicubic", antialias=True) / 255
        x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        network = Dinov2Model.from_pretrained(folder).eval()
        plain = network(x).pooler_output  # with the position embeddings of transformers
        table = network.embeddings.position_embeddings
        network.embeddings.position_embeddings = nn.Parameter(fit_positions(table, 16))
        fitted = network(x).pooler_output
    assert torch.equal(features, fitted)
    torch.testing.assert_close(features, plain, rtol=0, atol=0.01)
    assert not torch.equal(features, plain)
    assert not extractor.training
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


def test_folders_without_the_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=r"cannot be loaded .*--weights FOLDER") as caught:
        feature_extractor("dinov2", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_weights_that_lack_something(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    del state["layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 'layernorm.weight'"):
        feature_extractor("dinov2", str(tmp_path))
