"""The transformers of torch.nn, as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tangent.helpers import draw, relative_error
from tangent.steps import assert_same_step, central_difference, directions, oracle, randomize, step
from trigflow.tangent import coverage, jvp

B, L, E = 2, 6, 16
PADDED = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)


class Denoiser(nn.Module):
    """A transformer encoder over tokens `(b, l, e)` with a time embedding added to each, and a head."""

    def __init__(self, checkpointed: bool = False, **settings: Any) -> None:
        super().__init__()
        nested = settings.get("batch_first", True) and not settings.get("norm_first", False)
        layer = nn.TransformerEncoderLayer(E, 2, 32, **{"batch_first": True, "dropout": 0.0, **settings})
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.time = nn.Sequential(nn.Linear(E, E), nn.SiLU(), nn.Linear(E, E))
        self.head = nn.Linear(E, E)
        self.register_buffer("frequencies", torch.logspace(-1, 1, E // 2))
        self.batch_first = settings.get("batch_first", True)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, t: Tensor, **masks: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            angles = t[:, None] * self.frequencies
            e = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        x = x + e[:, None]
        if not self.batch_first:
            x = x.transpose(0, 1)
        if self.checkpointed:
            for layer in self.encoder.layers:
                x = checkpoint(layer, x, use_reentrant=False)
        else:
            x = self.encoder(x, **masks)
        if not self.batch_first:
            x = x.transpose(0, 1)
        return self.head(x)


def build(dtype: torch.dtype = torch.float64, **settings: Any) -> Denoiser:
    net = randomize(Denoiser(**settings), dtype).eval()
    assert isinstance(net, Denoiser)
    return net


def exact(net: Denoiser, fn: Callable[..., Tensor]) -> Tensor:
    """`torch.func.jvp` in training mode: without gradients, evaluation takes fused kernels that it has no rule for."""
    mode = net.training
    net.train()
    tangent: Tensor = oracle(fn, inputs(), directions(inputs()))
    net.train(mode)
    return tangent


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return draw(1, B, L, E).to(dtype), draw(2, B).to(dtype)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_double_precision(activation: str, norm_first: bool, batch_first: bool) -> None:
    net = build(activation=activation, norm_first=norm_first, batch_first=batch_first)
    tangent = assert_same_step(net, net, inputs())
    assert relative_error(tangent, exact(net, net)) < 1e-10


MASKS: dict[str, dict[str, Any]] = {
    "padding": {"src_key_padding_mask": PADDED},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "added": {"mask": draw(5, L, L)},
    "both": {"mask": CAUSAL.isinf(), "src_key_padding_mask": PADDED},
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("mode", [False, True])
def test_masks(kind: str, mode: bool) -> None:
    net = build().train(mode)

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, **MASKS[kind])

    tangent = assert_same_step(net, fn, inputs())
    assert relative_error(tangent, exact(net, fn)) < 1e-10


def test_single_precision() -> None:
    net = build(torch.float32)
    tangent = assert_same_step(net, net, inputs(torch.float32))
    expected = jvp(build(), inputs(), directions(inputs()))[1]
    assert relative_error(tangent.double(), expected) < 1e-5


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm", [None, nn.LayerNorm(E)])
@pytest.mark.parametrize(
    ("masks", "packed"),
    [
        ({}, False),
        ({"src_key_padding_mask": PADDED}, True),
        ({"src_key_padding_mask": torch.zeros(B, L).masked_fill(PADDED, -torch.inf)}, True),
        ({"src_key_padding_mask": PADDED.flip(1)}, False),
        ({"src_key_padding_mask": PADDED, "mask": CAUSAL.isinf()}, False),
    ],
    ids=["no mask", "padding", "padding in numbers", "padding first", "two masks"],
)
def test_evaluation_without_gradients(masks: dict[str, Any], packed: bool, norm: nn.Module | None) -> None:
    """The layers run as in training, but where PyTorch packs the batch, it gives zeros for the padding, before the norm."""
    net = build()
    net.encoder.norm = norm
    randomize(net)
    real = ~PADDED if packed else torch.ones(B, L, dtype=torch.bool)

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, **masks)

    ordinary, expected = jvp(fn, inputs(), directions(inputs()))
    with torch.no_grad():
        plain = fn(*inputs())
        out, tangent = jvp(fn, inputs(), directions(inputs()))
        approximate = jvp(fn, inputs(), directions(inputs()), method="finite-difference")[1]
    assert relative_error(out, plain) < 1e-12
    assert relative_error(tangent, approximate) < 1e-8
    assert torch.equal(out[real], ordinary[real])
    assert torch.equal(tangent[real], expected[real])
    assert not tangent[~real].any()
    assert not out.requires_grad


@pytest.mark.parametrize("masks", [{}, {"mask": CAUSAL}])
def test_dropout(masks: dict[str, Any]) -> None:
    """Dropout of activations, and of attention weights inside the attention kernel."""
    net = build(dropout=0.3).train()
    assert all(layer.self_attn.dropout == 0.3 for layer in net.encoder.layers)

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, **masks)

    tangent = assert_same_step(net, fn, inputs(), seed=3)
    assert not torch.equal(tangent, step(net, fn, inputs(), engine=True, seed=4).tangent)

    def replayed(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fn(x, t)

    assert relative_error(tangent, central_difference(replayed, inputs(), directions(inputs()), 1e-4)) < 1e-8


def test_activation_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    from trigflow.tangent import dual

    plain, net = (build(checkpointed=c, dropout=0.3).train() for c in (False, True))
    expected = step(plain, plain, inputs(), engine=True)
    ran: list[int] = []
    run = dual.run
    monkeypatch.setattr(dual, "run", lambda *args: ran.append(torch._C._current_graph_task_id()) or run(*args))
    tangent = assert_same_step(net, net, inputs())
    assert expected.tangent is not None
    assert torch.equal(tangent, expected.tangent)
    assert set(ran) == {-1}
    kept = step(net, net, inputs(), engine=True)
    for a, b in zip(kept.gradients, expected.gradients, strict=True):
        assert a is not None
        assert b is not None
        assert relative_error(a, b) < 1e-12


def test_autocast() -> None:
    net = build(torch.float32)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    net.time.register_forward_hook(lambda m, i, o: seen.append((o.dtype, getattr(o, "tangent", o).dtype)))
    expected = jvp(net, inputs(torch.float32), directions(inputs(torch.float32)))[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tangent = assert_same_step(net, net, inputs(torch.float32))
    assert tangent.dtype == torch.bfloat16
    assert set(seen) == {(torch.float32, torch.float32)}
    assert relative_error(tangent.float(), expected) < 0.05


@pytest.mark.parametrize("kind", [None, *MASKS])
def test_every_function_has_a_rule(kind: str | None) -> None:
    net = build(dropout=0.1).train()
    masks = MASKS[kind] if kind else {}
    report = coverage(lambda x, t: net(x, t, **masks), *inputs())
    assert report.complete, str(report)
    assert not report.fallbacks, str(report)
    assert report.rules["torch.nn.functional.scaled_dot_product_attention"] == 2


@pytest.mark.parametrize("masks", [{}, {"memory_key_padding_mask": PADDED}])
def test_decoder_with_a_memory_that_moves(masks: dict[str, Any]) -> None:
    layer = nn.TransformerDecoderLayer(E, 2, 32, dropout=0.0, batch_first=True)
    net = randomize(nn.TransformerDecoder(layer, 2))

    def fn(x: Tensor, memory: Tensor) -> Tensor:
        return net(x, memory, **masks)

    x, memory = draw(1, B, 5, E), draw(2, B, L, E)
    tangent = assert_same_step(net, fn, (x, memory))
    assert relative_error(tangent, oracle(fn, (x, memory), directions((x, memory)))) < 1e-10


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("settings", [{}, {"kdim": 5, "vdim": 7}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_attention_that_returns_its_weights(average: bool, settings: dict[str, Any]) -> None:
    net = randomize(nn.MultiheadAttention(E, 2, batch_first=True, **settings))

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = net(q, k, v, need_weights=True, average_attn_weights=average)
        return torch.cat([out.flatten(), weights.flatten()])

    qkv = draw(1, B, 4, E), draw(2, B, L, net.kdim), draw(3, B, L, net.vdim)
    tangent = assert_same_step(net, fn, qkv)
    assert relative_error(tangent, oracle(fn, qkv, directions(qkv))) < 1e-10
    assert not coverage(fn, *qkv).fallbacks


def test_the_whole_transformer() -> None:
    net = randomize(nn.Transformer(E, 2, 1, 1, 32, dropout=0.0, batch_first=True))
    x, y = draw(1, B, L, E), draw(2, B, 4, E)
    tangent = assert_same_step(net, net, (x, y))
    assert relative_error(tangent, oracle(net, (x, y), directions((x, y)))) < 1e-10


def test_reentrant_checkpointing() -> None:
    net = build()

    def fn(x: Tensor, t: Tensor) -> Any:
        return checkpoint(net, x, t, use_reentrant=True)

    tangent = jvp(fn, inputs(), directions(inputs()))[1]
    assert relative_error(tangent, jvp(net, inputs(), directions(inputs()))[1]) < 1e-14
