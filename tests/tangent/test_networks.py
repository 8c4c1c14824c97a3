"""Whole networks: tangent against torch.func.jvp, outputs and gradients bit-equal, one run, modes and formats."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tangent.helpers import check, draw, floats, reference, relative_error, same
from trigflow.tangent import coverage, jvp


class Attend(nn.Module):
    """Self-attention over the positions of an image."""

    def __init__(self, channels: int, heads: int, math: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.heads, self.math = heads, math

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w).mT.unbind(1)
        if self.math:
            y = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.mT.reshape(b, c, h, w))


class Block(nn.Module):
    def __init__(self, channels: int, width: int, p: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, channels), nn.GroupNorm(2, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shift = nn.Linear(width, 2 * channels)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.shift(e)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), scale + 1)
        return (x + self.conv2(self.dropout(F.silu(h)))) / 2**0.5


class Net(nn.Module):
    """A small U-Net with everything a diffusion network has: time and class embeddings, skips, resampling, attention."""

    def __init__(self, p: float = 0.0, math: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.arange(1, 5, dtype=torch.float32))
        self.time = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 12))
        self.classes = nn.Embedding(5, 12)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(Block(8, 12, p) for _ in range(3))
        self.attend = Attend(8, 2, math)
        self.join = nn.Conv2d(16, 8, 1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        self.checkpointed = checkpointed

    def block(self, i: int, *args: Any) -> Any:
        if self.checkpointed:
            return checkpoint(self.blocks[i], *args, use_reentrant=False)
        return self.blocks[i](*args)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            angles = t.to(torch.promote_types(t.dtype, torch.float32))[:, None] * self.frequencies
            e = torch.cat([angles.cos(), angles.sin()], dim=-1)
            e = self.time(e)
            if label is not None:
                e = e + self.classes(label)
        skip = self.block(0, self.first(x), e)
        h = self.block(1, F.avg_pool2d(skip, 2), e)
        h = F.interpolate(self.attend(h), scale_factor=2, mode="nearest")
        h = self.block(2, self.join(torch.cat([h, skip], dim=1)), e)
        return self.last(F.silu(h))


def network(dtype: torch.dtype = torch.float64, **settings: Any) -> Net:
    net = Net(**settings).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(draw(100 + i, *p.shape) * (0.5 if p.ndim == 1 else p[0].numel() ** -0.5))
    return net


X, DX, T, DT = draw(1, 4, 3, 8, 8), draw(2, 4, 3, 8, 8), draw(3, 4), draw(4, 4)
LABELS = torch.tensor([0, 3, 1, 1])


def step(net: nn.Module, *inputs: Any, engine: bool, seed: int = 0) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """Output, tangent and parameter gradients of a training step."""
    net.zero_grad()
    torch.manual_seed(seed)
    tangent = None
    if engine:
        tangents = tuple(
            draw(50 + i, *v.shape).to(v) if isinstance(v, Tensor) and v.is_floating_point() else None
            for i, v in enumerate(inputs)
        )
        out, tangent = jvp(net, inputs, tangents)
    else:
        out = net(*inputs)
    (out.float() * draw(9, *out.shape)).sum().backward()
    return out, tangent, [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def assert_same_step(net: nn.Module, *inputs: Any) -> Tensor:
    plain, _, expected = step(net, *inputs, engine=False)
    state = torch.get_rng_state()
    out, tangent, gradients = step(net, *inputs, engine=True)
    assert torch.equal(plain, out)
    assert torch.equal(state, torch.get_rng_state())
    assert all(same(a, b) for a, b in zip(gradients, expected, strict=True))
    assert any(g is not None and g.any() for g in gradients)
    assert tangent is not None
    assert tangent.dtype == out.dtype
    assert not tangent.requires_grad
    assert tangent.grad_fn is None
    return tangent


@pytest.mark.parametrize("carry", [(True, True, False), (True, False, False), (False, True, False)])
def test_unet_in_double_precision(carry: tuple[bool, bool, bool]) -> None:
    net, oracle = network(), network(math=True)
    tangents = tuple(draw(31 + i, *v.shape) if c else None for i, (v, c) in enumerate(zip((X, T, LABELS), carry, strict=True)))
    check(net, (X, T, LABELS), carry, expected=reference(oracle, (X, T, LABELS), tangents))
    check(oracle, (X, T, LABELS), carry)


def test_every_function_of_the_unet_has_a_rule() -> None:
    report = coverage(network(p=0.2), X, T, LABELS)
    assert report.complete
    assert not report.fallbacks
    assert report.rules["torch.nn.functional.conv2d"] == 11
    assert report.rules["torch.nn.functional.group_norm"] == 7


def test_parameter_gradients_are_those_of_a_plain_step() -> None:
    assert_same_step(network(torch.float32), X.float(), T.float(), LABELS)


def test_dropout_draws_one_mask() -> None:
    net = network(p=0.5).train()
    tangent = assert_same_step(net, X, T, LABELS)
    moved = []
    for h in (1e-6, -1e-6):
        torch.manual_seed(0)
        moved.append(net(X + h * draw(50, *X.shape), T + h * draw(51, *T.shape), LABELS).detach())
    assert relative_error(tangent, (moved[0] - moved[1]) / 2e-6) < 1e-7


@pytest.mark.parametrize(
    "kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout]
)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_modules(kind: type[nn.Module], p: float) -> None:
    shape = (3, 4, 5) if kind is nn.Dropout1d else (3, 4, 5, 2, 2) if kind is nn.Dropout3d else (3, 4, 5, 2)
    net, x, dx = kind(p), draw(1, *shape), draw(2, *shape)
    x[0, 0] = 0.0
    for mode in (True, False):
        net.train(mode)
        for layout in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            direction = torch.empty_like(layout).copy_(dx)
            torch.manual_seed(5)
            plain = net(layout)
            state = torch.get_rng_state()
            torch.manual_seed(5)
            moved = net(layout + direction)
            torch.manual_seed(5)
            out, tangent = jvp(net, (layout,), (dx,))
            assert torch.equal(plain, out)
            assert torch.equal(state, torch.get_rng_state())
            # Each of them is affine in x once its mask is drawn (alpha dropout of everything divides by zero).
            if moved.isfinite().all():
                torch.testing.assert_close(tangent, moved - plain, rtol=1e-9, atol=1e-12)


def test_function_and_hooks_run_once() -> None:
    net, calls = network(), []
    for module in net.modules():
        module.register_forward_hook(lambda m, i, o: calls.append(m))
        module.register_forward_pre_hook(lambda m, i: calls.append(m))
    net(X, T)
    plain = len(calls)
    jvp(net, (X, T), (DX, DT))
    assert len(calls) == 2 * plain


def test_without_gradients() -> None:
    net = network()
    expected = jvp(net, (X, T), (DX, DT))
    with torch.no_grad():
        out, tangent = jvp(net, (X, T), (DX, DT))
    assert not out.requires_grad
    assert torch.equal(out, expected[0])
    assert torch.equal(tangent, expected[1])


def test_a_region_without_gradients_keeps_its_tangent() -> None:
    def fn(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * x
        return y * x

    x = X.clone().requires_grad_()
    out, tangent = jvp(fn, (x,), (DX,))
    assert relative_error(tangent, 3 * X * X * DX) < 1e-14
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], X * X)


def test_gradients_reach_the_inputs() -> None:
    net = network()
    grads = []
    for engine in (False, True):
        x, t = X.clone().requires_grad_(), T.clone().requires_grad_()
        out = jvp(net, (x, t), (DX, DT))[0] if engine else net(x, t)
        grads.append(torch.autograd.grad(out.square().sum(), (x, t)))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_channels_last_is_kept() -> None:
    net = network().to(memory_format=torch.channels_last)
    x = X.contiguous(memory_format=torch.channels_last)
    out, tangent = jvp(net, (x, T), (DX, DT))
    assert torch.equal(out, net(x, T))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert tangent.stride() == out.stride()
    assert relative_error(tangent, jvp(network(), (X, T), (DX, DT))[1]) < 1e-12


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast(p: float) -> None:
    net = network(torch.float32, p=p)
    seen: dict[str, torch.dtype] = {}
    net.time.register_forward_hook(lambda m, i, o: seen.update(time=o.dtype))
    net.blocks[0].register_forward_hook(lambda m, i, o: seen.update(block=o.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tangent = assert_same_step(net, X.float(), T.float(), LABELS)
    assert tangent.dtype == torch.bfloat16
    assert seen["time"] == torch.float32
    torch.manual_seed(0)
    exact = jvp(net, (X.float(), T.float(), LABELS), (draw(50, *X.shape).float(), draw(51, 4).float(), None))[1]
    assert relative_error(tangent.float(), exact) < 0.05


def test_half_precision_network() -> None:
    def build(dtype: torch.dtype) -> nn.Module:
        net = network().to(dtype)
        return nn.Sequential(net.first, net.attend, nn.GELU(), nn.Flatten(2), nn.LayerNorm(64, dtype=dtype), nn.Softmax(-1))

    net = build(torch.bfloat16)
    tangent = assert_same_step(net, X.bfloat16())
    exact = jvp(build(torch.float64), (X,), (draw(50, *X.shape),))[1]
    assert relative_error(tangent.double(), exact) < 0.05


def test_activation_checkpointing_computes_no_tangent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from trigflow.tangent import dual

    net, free = network(p=0.3, checkpointed=True), network(p=0.3)
    plain, _, expected = step(free, X, T, LABELS, engine=True)
    ran: list[Any] = []
    original = dual.run
    monkeypatch.setattr(dual, "run", lambda *args: ran.append(1) or original(*args))
    out, _, gradients = step(net, X, T, LABELS, engine=True)
    assert torch.equal(out, plain)
    assert all(same(a, b) for a, b in zip(gradients, expected, strict=True))
    count = len(ran)
    ran.clear()
    jvp(free, (X, T, LABELS), (DX, DT, None))
    assert count == len(ran)


def test_outputs_of_any_nesting() -> None:
    class Out(dict):  # type: ignore[type-arg]
        pass

    def fn(x: Tensor, t: Tensor) -> Any:
        return {"a": (x * 2, [t.sum()]), "b": torch.ones(3), "c": x.argmax()}, x.max(dim=1)

    (first, second), (d_first, d_second) = jvp(fn, (X, T), (DX, DT))
    assert torch.equal(d_first["a"][0], 2 * DX)
    assert torch.equal(d_first["a"][1][0], DT.sum())
    assert not d_first["b"].any()
    assert int(first["c"]) == int(X.argmax())
    assert torch.equal(d_second.values, DX.gather(1, second.indices.unsqueeze(1)).squeeze(1))
    assert isinstance(jvp(lambda x: Out(y=x), (X,), (DX,))[1], Out)


def test_an_output_that_depends_on_no_tangent_has_tangent_zero() -> None:
    net = nn.Linear(2, 2)
    out, tangent = jvp(lambda x: net(torch.ones(2)), (X,), (DX,))
    assert out.requires_grad
    assert not tangent.any()
    assert not tangent.requires_grad
    assert len(floats(tangent)) == 1


def test_detach_means_tangent_zero() -> None:
    out, tangent = jvp(lambda x: x * x.detach(), (X,), (DX,))
    assert relative_error(tangent, X * DX) < 1e-15
    assert torch.equal(out, X * X)


def test_recurrent_network() -> None:
    net = nn.GRU(3, 4, batch_first=True).double()
    check(lambda x: net(x)[0], (draw(1, 2, 5, 3),))


def test_weight_norm_and_forced_weights() -> None:
    net = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)).double()
    check(net, (draw(1, 2, 3),))
