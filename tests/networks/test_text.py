"""Networks that read a text: what it does, that padding does nothing, and that tangents go through exactly."""

import dataclasses

import pytest
import torch

import trigflow.tangent as tangent
from trigflow.conditions import Text, dropped
from trigflow.networks import ConditioningConfig, DDPMPPConfig, DiTConfig, EDM2Config, MLPConfig, TextConfig, UNetConfig, build
from trigflow.networks.text import TextEncoder
from trigflow.runtime.errors import UserError

WORDS = TextConfig(length=12, width=16, depth=1, heads=2)


def conditioning(text=WORDS):
    return ConditioningConfig(width=8, takes=("guidance",), text=text)


CONFIGS = {
    "unet": UNetConfig(channels=2, width=8, mult=(1, 2), blocks=1, attention=(1,), conditioning=conditioning()),
    "dit-cross": DiTConfig(channels=2, patch=2, width=16, depth=2, heads=2, conditioning=conditioning()),
    "dit-joint": DiTConfig(channels=2, patch=2, width=16, depth=2, heads=2, words="joint", conditioning=conditioning()),
    "dit-sine": DiTConfig(
        channels=2, patch=2, width=16, depth=1, heads=2, words="joint", positions="sine", conditioning=conditioning()
    ),
    "edm2": EDM2Config(
        channels=2, resolution=8, width=16, mult=(1, 2), blocks=1, attention=(4,), head_width=8, conditioning=conditioning()
    ),
}


def made(name, **changes):
    """The network with weights that are zero at the start drawn anew, in float64."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    network = build(config.changed(conditioning=dataclasses.replace(config.conditioning, **changes)))
    for weight in network.parameters():
        if weight.ndim == 0 or weight.abs().max() < 1e-3:
            torch.nn.init.normal_(weight, std=0.3)
    return network.double().eval()


def batch(texts, length=WORDS.length):
    torch.manual_seed(1)
    n = len(texts)
    x, t = torch.randn(n, 2, 8, 8, dtype=torch.float64), torch.linspace(0.3, 1.4, n, dtype=torch.float64)
    return x, t, {"guidance": torch.full((n,), 1.5, dtype=torch.float64), **Text(length).rows(list(texts), n, 0)}


@pytest.mark.parametrize("name", CONFIGS)
def test_says_what_it_takes(name):
    network = made(name)
    assert network.takes == {"text", "text_mask", "guidance"}
    assert set(network.null) == {"text", "text_mask"}
    assert network.null["text"].shape == (12,)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_matters(name):
    network = made(name)
    x, t, told = batch(["cat", "cat"])
    x, t = x[:1].repeat(2, 1, 1, 1), t[:1].repeat(2)
    same = network(x, t, **told)
    torch.testing.assert_close(same[0], same[1])
    _, _, other = batch(["cat", "tac"])
    differ = network(x, t, **other)
    assert (differ[0] - differ[1]).abs().max() > 1e-3 * differ.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_not_read(name):
    """A text gives the same in rows of 12 and of 8 tokens, but for rounding."""
    network = made(name)
    x, t, long = batch(["cat", "dog"])
    _, _, short = batch(["cat", "dog"], length=8)
    torch.testing.assert_close(network(x, t, **long), network(x, t, **short), rtol=1e-10, atol=1e-12)
    odd = {**long, "text": torch.where(long["text_mask"], long["text"], 77)}
    torch.testing.assert_close(network(x, t, **odd), network(x, t, **long), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_text_is_the_empty_one(name):
    network = made(name)
    x, t, told = batch(["", ""])
    without = {"guidance": told["guidance"]}
    torch.testing.assert_close(network(x, t, **told), network(x, t, **without))
    _, _, words = batch(["cat", "dog"])
    none = dropped(words, network, torch.tensor([True, False]))
    torch.testing.assert_close(network(x, t, **none)[0], network(x, t, **without)[0])
    assert torch.equal(none["text"][1], words["text"][1])


@pytest.mark.parametrize("name", CONFIGS)
def test_tangent_equals_a_finite_difference(name):
    network = made(name)
    x, t, told = batch(["a cat", "Ω 🍎"])
    dx, dt = torch.randn_like(x), torch.tensor([1.0, -0.7], dtype=torch.float64)
    output, derivative = tangent.jvp(lambda x, t: network(x, t, **told), (x, t), (dx, dt))
    torch.testing.assert_close(output, network(x, t, **told))
    h = 1e-5
    difference = (network(x + h * dx, t + h * dt, **told) - network(x - h * dx, t - h * dt, **told)) / (2 * h)
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["unet", "dit-joint", "edm2"])
def test_features_of_another_encoder(name):
    network = made(name, text=dataclasses.replace(WORDS, features=5))
    x, t, told = batch(["a", "b"])
    states, mask = torch.randn(2, 12, 5, dtype=torch.float64), told["text_mask"]
    out = network(x, t, guidance=told["guidance"], text=states, text_mask=mask)
    more = states.masked_fill(~mask[:, :, None], 9.0)
    torch.testing.assert_close(network(x, t, guidance=told["guidance"], text=more, text_mask=mask), out)
    none = {name: row[None].expand(2, *row.shape) for name, row in network.null.items()}
    torch.testing.assert_close(network(x, t, guidance=told["guidance"], **none), network(x, t, guidance=told["guidance"]))


@pytest.mark.parametrize("config", [MLPConfig, DDPMPPConfig])
def test_networks_without_words_say_so(config):
    with pytest.raises(UserError, match=r"conditioning\.text.*unet, edm2 or dit"):
        build(config(conditioning=ConditioningConfig(text=WORDS)))


@pytest.mark.parametrize("changes", [{"length": 1}, {"width": 6}, {"depth": -1}, {"heads": 3}, {"grams": -1}, {"features": -1}])
def test_settings_that_make_no_sense(changes):
    (name,) = changes
    config = CONFIGS["unet"]
    text = dataclasses.replace(WORDS, **changes)
    with pytest.raises(UserError, match=f"conditioning.text.{name}"):
        build(config.changed(conditioning=dataclasses.replace(config.conditioning, text=text)))


def test_a_byte_sees_the_runs_that_end_at_it():
    torch.manual_seed(0)
    encoder = TextEncoder(TextConfig(length=12, width=8, depth=0, grams=10_007)).double()
    text = Text(12).rows("abcdefghij", 1, 0)
    states = encoder(text["text"], text["text_mask"]).states[0]
    for place in range(1, 11):
        other = text["text"].clone()
        other[0, place] = 2 + ord("z")
        moved = (encoder(other, text["text_mask"]).states[0] - states).abs().amax(1) > 1e-6
        assert moved.nonzero().flatten().tolist() == list(range(place, min(place + 5, 12)))
    run = sum(int(text["text"][0, 5 - k]) * 257**k for k in range(3)) % 10_007
    with torch.no_grad():
        encoder.grams[0].weight[run].neg_()
    moved = (encoder(text["text"], text["text_mask"]).states[0] - states).abs().amax(1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("left_out", ["text", "text_mask"])
def test_a_text_without_its_mask_or_a_mask_alone_is_refused(name, left_out):
    told = {"guidance": torch.ones(2), **Text(length=12).rows(["a", "b"], 2, 0)}
    alone = ({"text", "text_mask"} - {left_out}).pop()
    del told[left_out]
    with pytest.raises(UserError, match=f"{alone} alone; expected text and text_mask, or neither"):
        build(CONFIGS[name])(torch.zeros(2, 2, 8, 8), torch.full((2,), 0.5), **told)
