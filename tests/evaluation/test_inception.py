"""The Inception network: TensorFlow's resize by its own figures, the blocks, and weights in files."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trigflow.evaluation import feature_extractor
from trigflow.evaluation.features.inception import URL, Inception, Mixed, resize_like_tensorflow
from trigflow.runtime.errors import UserError

# Input and output of TestBilinear2x2To1x1, 2x2To3x3, 3x3To2x2, 3x3To4x4, 4x4To3x3 and 2x2To4x4 in TensorFlow's
# resize_bilinear_op_test.cc; the inputs count from 1.
TENSORFLOW = {
    (2, 1): [1.0],
    (2, 3): [1, 5 / 3, 2, 7 / 3, 3, 10 / 3, 3, 11 / 3, 4],
    (3, 2): [1, 2.5, 5.5, 7],
    (3, 4): [1, 1.75, 2.5, 3, 3.25, 4, 4.75, 5.25, 5.5, 6.25, 7, 7.5, 7, 7.75, 8.5, 9],
    (4, 3): [1, 7 / 3, 11 / 3, 19 / 3, 23 / 3, 27 / 3, 35 / 3, 39 / 3, 43 / 3],
    (2, 4): [1, 1.5, 2, 2, 2, 2.5, 3, 3, 3, 3.5, 4, 4, 3, 3.5, 4, 4],
}


@pytest.mark.parametrize(("sides", "expected"), TENSORFLOW.items())
def test_resize_gives_the_figures_of_tensorflow(sides: tuple[int, int], expected: list[float]) -> None:
    side, size = sides
    image = torch.arange(1.0, side**2 + 1).reshape(1, 1, side, side)
    found = resize_like_tensorflow(image, size, size)
    torch.testing.assert_close(found, torch.tensor(expected).reshape(1, 1, size, size), rtol=1e-6, atol=1e-6)


def test_resize_reads_between_neighbours_at_i_in_over_out() -> None:
    image = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    found = resize_like_tensorflow(image, 11, 4)
    for i, j in ((0, 0), (3, 1), (10, 3), (7, 2)):
        y, x = i * 7 / 11, j * 5 / 4
        top, left = int(y), int(x)
        bottom, right = min(top + 1, 6), min(left + 1, 4)
        wy, wx = y - top, x - left
        expected = (1 - wy) * ((1 - wx) * image[..., top, left] + wx * image[..., top, right]) + wy * (
            (1 - wx) * image[..., bottom, left] + wx * image[..., bottom, right]
        )
        torch.testing.assert_close(found[..., i, j], expected, rtol=1e-5, atol=1e-5)


def test_resize_leaves_the_size_of_the_network_as_it_is() -> None:
    image = torch.randn(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize_like_tensorflow(image, 299, 299), image)


def test_pooling_of_the_blocks() -> None:
    ones, branches = torch.ones(1, 1, 6, 6), {"branch": [(2, 3)]}
    average, maximum, halve = (Mixed(1, branches, pool).eval() for pool in ("average", "max", "halve"))
    assert torch.equal(average(ones)[:, 2:], ones)  # the border is left out of the mean
    assert torch.equal(maximum(-ones)[:, 2:], -ones)
    assert halve(ones).shape == (1, 3, 2, 2)
    ramp = torch.arange(36.0).reshape(1, 1, 6, 6)
    assert average(ramp)[0, 2, 0, 0] == ramp[0, 0, :2, :2].mean()
    assert maximum(ramp)[0, 2, 1, 1] == ramp[0, 0, 2, 2]


GAIN = 0.5
MEANS = [0.10905458, 0.11870622]
EVERY_256TH = [
    [0.34997115, 0.30590174, 0.26582855, 0.07576072, 0.0, 0.16624483, 0.0, 0.09417371],
    [0.33621424, 0.30914304, 0.27379406, 0.08087114, 0.00055282, 0.15685548, 0.0, 0.10321195],
]


def waves(network: Inception) -> dict[str, Tensor]:
    """Weights that depend on nothing but their names and shapes."""
    state = {}
    for number, (name, tensor) in enumerate(sorted(network.state_dict().items())):
        angles = torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + number
        wave = torch.sin(angles).reshape(tensor.shape).float()
        if name.endswith("conv.weight"):
            state[name] = GAIN * (2 / tensor[0].numel()) ** 0.5 * wave
        elif name.endswith("running_var"):
            state[name] = 0.5 + 0.3 * wave
        elif name.endswith("bn.weight"):
            state[name] = 1 + 0.3 * wave
        elif not name.endswith("num_batches_tracked"):
            state[name] = 0.1 * wave
    return state


def picture() -> Tensor:
    """Two RGB images of 48x40, of waves."""
    y, x = torch.meshgrid(torch.arange(40.0), torch.arange(48.0), indexing="ij")
    pixels = [127.5 + 127.5 * torch.sin(0.3 * x + 0.2 * c * y + n) for n in range(2) for c in range(3)]
    return torch.stack(pixels).reshape(2, 3, 40, 48).round().to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity's, with its classifier."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with torch.random.fork_rng(devices=[]):
        state = waves(Inception())
    torch.save({**state, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


def test_the_network_computes_what_that_of_torch_fidelity_does(weights: Path) -> None:
    """Figures from torch-fidelity 0.4.0, `FeatureExtractorInceptionV3`, with these weights and images."""
    network = feature_extractor("inception", str(weights))
    with torch.no_grad():
        features = network(picture())
    assert features.shape == (2, 2048)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.mean(1), torch.tensor(MEANS), rtol=1e-4, atol=0)
    torch.testing.assert_close(features[:, ::256], torch.tensor(EVERY_256TH), rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        gray = network(picture()[:1, :1])
        assert torch.equal(gray, network(picture()[:1, :1].expand(-1, 3, -1, -1)))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_safetensors_will_do(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    save_file({name: tensor.half() for name, tensor in state.items()}, tmp_path / "inception.safetensors")
    network = feature_extractor("inception", str(tmp_path / "inception.safetensors"))
    name = "Mixed_7c.branch3x3dbl_3b.conv.weight"
    assert torch.equal(network.state_dict()[name], state[name].half().float())


def test_weights_of_another_network(tmp_path: Path) -> None:
    for content in ({"fc.weight": torch.zeros(3)}, [torch.zeros(3)], {"Conv2d_1a_3x3.conv.weight": 3}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="not of the Inception network of the FID") as caught:
            feature_extractor("inception", str(tmp_path / "other.pth"))
        assert "\n" not in str(caught.value)


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    for name, content in (("a.pth", b"nothing of the kind"), ("b.pth", b""), ("c.safetensors", b"x" * 100)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot be read") as caught:
            feature_extractor("inception", str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"'.*absent.pth' do not exist; expected a file of tensors"):
        feature_extractor("inception", str(tmp_path / "absent.pth"))


def test_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(url: str, **settings: Any) -> None:
        assert url == URL
        assert settings["check_hash"] is True
        assert settings["weights_only"] is True
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"cannot be downloaded \(no route to host\).*--weights FILE") as caught:
        feature_extractor("inception")
    assert "\n" not in str(caught.value)


def test_images_that_are_neither_gray_nor_rgb() -> None:
    with torch.random.fork_rng(devices=[]), pytest.raises(UserError, match="images of 4 channels; expected gray or RGB"):
        Inception()(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["digits", "pixels"])
def test_weights_for_features_that_bring_their_own(name: str) -> None:
    with pytest.raises(UserError, match=f"weights for the features '{name}'; expected none"):
        feature_extractor(name, "weights.pth")
