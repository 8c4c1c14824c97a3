"""Compiled functions with tangents: the numbers and gradients of plain runs, weights read anew, and when they run as they are.

Most run the traced graph as it is (backend eager), some its graph of forward and backward (aot_eager), dropout by inductor.
What that makes of whole networks is looked at by `make compile-check`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tangent.helpers import draw, same
from trigflow.networks import ConditioningConfig, DDPMPPConfig, DiTConfig, EDM2Config, MLPConfig, UNetConfig, build
from trigflow.tangent import Compiled, compile, jvp

GIVEN = ConditioningConfig(width=8, num_classes=3, takes=("guidance",))
LEVELS: Any = {"width": 8, "mult": (1, 2), "blocks": 1, "conditioning": GIVEN}
CONFIGS: dict[str, Any] = {
    "unet": UNetConfig(channels=2, attention=(1,), **LEVELS),
    "ddpmpp": DDPMPPConfig(channels=2, resolution=8, attention=(4,), **LEVELS),
    "edm2": EDM2Config(channels=2, resolution=8, attention=(4,), **LEVELS),
    "dit": DiTConfig(channels=2, width=16, depth=1, heads=2, conditioning=GIVEN),
    "mlp": MLPConfig(features=7, width=8, depth=1, conditioning=GIVEN),
}


def quiet(fn: Callable[..., Any], **settings: Any) -> Compiled:
    """Compiled, where a fallback is an error."""

    def tell(text: str) -> None:
        raise AssertionError(text)

    return compile(fn, **{"backend": "eager", "tell": tell, **settings})


class Talk:
    """Keeps what is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> None:
        self.texts.append(text)


def check_same(step: Any, fn: Callable[..., Any], primals: Any, tangents: Any, parameters: list[Tensor], seed: int = 0) -> None:
    """The compiled step against `jvp` of the function: output, tangent, gradients."""

    def run(call: Callable[..., Any]) -> list[Tensor | None]:
        torch.manual_seed(seed)
        out, tangent = call()
        assert not tangent.requires_grad
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        gradients = torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
        return [out.detach(), tangent, *gradients]

    found, expected = run(lambda: step(primals, tangents)), run(lambda: jvp(fn, primals, tangents))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or same(a, b) or (a - b).norm() <= 1e-5 * b.norm() + 1e-6


def moved(net: nn.Module) -> nn.Module:
    """With no weight at zero, where gradients would end."""
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return net


@pytest.mark.parametrize("kind", CONFIGS)
def test_networks_of_the_package(kind: str) -> None:
    torch.manual_seed(0)
    net = moved(build(CONFIGS[kind]))
    shape = (3, 7) if kind == "mlp" else (3, 2, 8, 8)
    x, dx, t, dt = torch.randn(shape), torch.randn(shape), torch.rand(3), torch.randn(3)
    label, guidance = torch.tensor([0, 3, 1]), torch.tensor([1.0, 1.5, 2.0])

    def fn(x: Tensor, t: Tensor) -> Tensor:
        return net(x, t, label=label, guidance=guidance)  # type: ignore[no-any-return]

    step, parameters = quiet(fn), list(net.parameters())
    check_same(step, fn, (x, t), (dx, dt), parameters)
    with torch.no_grad():
        for weight in parameters:
            weight.mul_(1.1)
    check_same(step, fn, (x, t), (dx, dt), parameters)
    assert len(step.kinds) == 1


class Net(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(6, 8), nn.Linear(8, 6), nn.LayerNorm(8)
        self.dropout = nn.Dropout(p)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(F.silu(self.norm(self.first(x))))) * self.scale


X, DX = draw(1, 4, 6).float(), draw(2, 4, 6).float()


def built(p: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(p)


def one_kind(step: Compiled) -> bool:
    return [len(runs) for runs in step.kinds.values()] == [1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_new_weights_are_seen(backend: str) -> None:
    net, other = built(), moved(built())
    step = quiet(net, backend=backend)
    step((X,), (DX,))
    net.load_state_dict(other.state_dict())
    check_same(step, net, (X,), (DX,), list(net.parameters()))
    net.load_state_dict(moved(other).state_dict(), assign=True)  # other tensors under the same names
    check_same(step, net, (X,), (DX,), list(net.parameters()))
    net.first.weight = nn.Parameter(torch.randn(8, 6))
    net.scale = torch.tensor(3.0)
    check_same(step, net, (X,), (DX,), list(net.parameters()))
    optimizer = torch.optim.Adam(net.parameters())
    step((X,), (DX,))[0].sum().backward()
    optimizer.step()
    check_same(step, net, (X,), (DX,), list(net.parameters()))
    assert one_kind(step)


def test_a_tensor_that_the_function_holds_is_read_anew() -> None:
    held = torch.ones(6)
    step = quiet(lambda x: x * held)
    step((X,), (DX,))
    held.fill_(3.0)
    assert torch.equal(step((X,), (DX,))[1], 3 * DX)


def test_modes_and_kinds() -> None:
    net = built(p=0.5)
    step = quiet(net)
    check_same(step, net, (X,), (DX,), list(net.parameters()))
    net.eval()
    check_same(step, net, (X,), (DX,), list(net.parameters()))
    check_same(step, net, (X[:2],), (DX[:2],), list(net.parameters()))
    net.double()
    check_same(step, net, (X.double(),), (DX.double(),), list(net.parameters()))
    with torch.no_grad():
        out, tangent = step((X.double(),), (DX.double(),))
    assert not out.requires_grad
    assert torch.equal(tangent, jvp(net, (X.double(),), (DX.double(),))[1])
    net.first.requires_grad_(False)
    check_same(step, net, (X.double(),), (DX.double(),), list(net.last.parameters()))
    assert sum(map(len, step.kinds.values())) == 6


def test_dropout_draws_one_mask_for_both() -> None:
    net = built(p=0.5)
    step = quiet(lambda x: net.dropout(x))
    x = torch.ones(4, 100)
    out, tangent = step((x,), (2 * x,))
    again, _ = step((x,), (2 * x,))
    assert torch.equal(tangent, 2 * out)
    assert 100 < (out == 0).sum() < 300
    assert not torch.equal(out, again)
    q = torch.ones(1, 1, 3, 8)
    value = torch.eye(8)[None, None, :3]
    attend = quiet(lambda v: F.scaled_dot_product_attention(q, q, v, dropout_p=0.5))
    out, tangent = attend((value,), (2 * value,))
    assert torch.equal(tangent, 2 * out)


def test_dropout_by_inductor_draws_as_the_engine() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 4), nn.Dropout(0.5), nn.SiLU(), nn.Dropout(0.2))
    step, parameters = quiet(net, backend="inductor"), list(net.parameters())
    for seed in (0, 1):
        check_same(step, net, (X,), (DX,), parameters, seed)
    torch.manual_seed(2)
    out, _ = step((X,), (DX,))
    drawn = torch.rand(3)
    torch.manual_seed(2)
    assert torch.allclose(net(X), out, atol=1e-6)
    assert torch.equal(torch.rand(3), drawn)  # as many
    assert one_kind(step)


def test_draws_that_would_be_needed_twice_run_as_they_are() -> None:
    talk = Talk()
    step = compile(nn.Dropout2d(0.5), backend="eager", tell=talk)
    x = torch.ones(2, 50, 2, 2)
    out, tangent = step((x,), (3 * x,))
    assert torch.equal(tangent, 3 * out)
    assert "random draws would be needed twice" in talk.texts[0]
    assert "dropout2d" in talk.texts[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_buffers_that_a_run_changes(backend: str) -> None:
    nets = [nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    step = quiet(nets[0], backend=backend)
    for _ in range(3):
        out, tangent = step((X,), (DX,))
        expected = jvp(nets[1], (X,), (DX,))
        assert torch.allclose(out, expected[0])
        assert torch.allclose(tangent, expected[1], atol=1e-6)
    for name, value in nets[0].state_dict().items():
        assert torch.allclose(value, nets[1].state_dict()[name]), name


def test_no_gradient_flows_where_none_did() -> None:
    net = built()

    def fn(x: Tensor) -> Tensor:
        y = net(x)
        with torch.no_grad():
            z = torch.tanh(net(x) * 2 + y)
            z[:, 0] = 1.0
        return y * z + (y * 3).detach()

    for backend in ("eager", "aot_eager"):
        check_same(quiet(fn, backend=backend), fn, (X,), (DX,), list(net.parameters()))
    frozen = built().requires_grad_(False)

    def other(x: Tensor) -> Tensor:
        _, tangent = jvp(net, (x,), (DX,))
        return frozen(net(x)) + tangent

    step, parameters = quiet_call(other), list(net.parameters())
    for a, b in zip(grads(step(X), parameters), grads(other(X), parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def quiet_call(function: Callable[..., Any]) -> Compiled:
    def tell(text: str) -> None:
        raise AssertionError(text)

    return Compiled(function, backend="eager", tell=tell)


def grads(out: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.square().sum(), parameters)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    net = built()
    step, parameters = quiet(net), list(net.parameters())
    with torch.autocast("cpu", dtype):
        check_same(step, net, (X,), (DX,), parameters)
    check_same(step, net, (X,), (DX,), parameters)
    assert len(step.kinds) == 2


@pytest.mark.parametrize("scale", [2.0, 3.0, 1.5])
def test_enlargement(scale: float) -> None:
    """Inductor has wrong gradients of it in some places, so whole factors are traced as a broadcast."""
    x, dx = draw(1, 2, 3, 4, 4).float(), draw(2, 2, 3, 4, 4).float()
    conv = nn.Conv2d(3, 3, 1)

    def fn(x: Tensor) -> Tensor:
        return F.interpolate(conv(x), scale_factor=scale, mode="nearest").square()

    step = quiet(fn)
    check_same(step, fn, (x,), (dx,), list(conv.parameters()))
    ((traced, _),) = next(iter(step.kinds.values()))  # type: ignore[misc]
    kept = any("upsample" in str(node.target) for node in traced.graph.graph.nodes)
    assert kept == (scale == 1.5)


def test_activation_checkpointing() -> None:
    net = built()

    def fn(x: Tensor) -> Tensor:
        return net.last(checkpoint(lambda x: F.silu(net.norm(net.first(x))), x, use_reentrant=False))  # type: ignore[no-any-return]

    check_same(quiet(fn), fn, (X,), (DX,), list(net.parameters())[:4])


class Halved(torch.autograd.Function):
    """The identity, with half of its gradient, and a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2

    @staticmethod
    def jvp(ctx: Any, dx: Tensor) -> Tensor:
        return dx * 1.0


def test_a_custom_function_keeps_its_backward() -> None:
    net = built()

    def fn(x: Tensor) -> Tensor:
        return Halved.apply(net.first(x)) * 2

    for backend in ("eager", "aot_eager"):
        check_same(quiet(fn, backend=backend), fn, (X,), (DX,), list(net.first.parameters()))
    step, parameters = quiet_call(fn), list(net.first.parameters())
    for a, b in zip(grads(step(X), parameters), grads(fn(X), parameters), strict=True):
        assert torch.allclose(a, b)


def test_what_depends_on_values_runs_as_it_is_and_says_so_once() -> None:
    net, talk = built(), Talk()

    def fn(x: Tensor) -> Tensor:
        y = net(x)
        return y if y.detach().sum().item() > 0 else -y

    step = compile(fn, backend="eager", tell=talk)
    for _ in range(2):
        check_same(step, fn, (X,), (DX,), list(net.parameters()))
    assert len(talk.texts) == 1
    assert "fn runs without compilation" in talk.texts[0]
    assert "the value of a tensor decides what runs" in talk.texts[0]
    assert "test_compiled.py" in talk.texts[0]
    with pytest.warns(UserWarning, match="runs without compilation"):
        compile(fn, backend="eager")((X,), (DX,))


class Masked(nn.Module):
    """Reads a mask, which it holds, in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = built()
        self.register_buffer("mask", torch.tensor([True, False, True, True]))

    def forward(self, x: Tensor) -> Tensor:
        length = int(self.mask.sum())
        lengths = torch.stack([self.mask.sum(), self.mask.long().argmin()])
        kept = torch.zeros(4, dtype=torch.long)
        kept[: lengths.tolist()[0]] = self.mask.nonzero()[:, 0]
        y = self.inner(x)
        z = torch.zeros_like(y)
        z[: lengths.tolist()[1]] = y[: lengths.tolist()[1]]
        z[self.mask] += torch.tanh(y[self.mask])
        if kept[1].item() == 2 and self.mask.numpy().any() and float(self.inner.scale) == 2.0:
            z = z * 2
        return z[:length] if self.mask.any() else y


def test_values_of_masks_have_graphs_of_their_own() -> None:
    net, talk = Masked(), Talk()
    step, parameters = compile(net, backend="aot_eager", limit=3, tell=talk), list(net.parameters())
    masks = [torch.tensor(row) > 0 for row in ([1, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1])]
    for mask in (*masks[:3], *masks[:3]):
        net.mask.copy_(mask)
        check_same(step, net, (X,), (DX,), parameters)
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(0).get_state())
    assert not talk.texts
    assert [run is not None for runs in step.kinds.values() for run in runs] == [True] * 3
    for mask in (masks[3], masks[0]):
        net.mask.copy_(mask)
        check_same(step, net, (X,), (DX,), parameters)
    assert len(talk.texts) == 1
    assert "values that decide what runs" in talk.texts[0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_sizes_that_a_mask_decides(backend: str) -> None:
    """A graph as it was traced serves all; compilers want one for each mask."""
    net, mask = built(), torch.tensor([True, False, True, True])

    def fn(x: Tensor) -> Tensor:
        y = net(x)
        return torch.cat([y[mask], y[mask] * 2, y[torch.tensor([2, 1])], y[order]])

    order = torch.tensor([3, 0])
    step = quiet(fn, backend=backend)
    for row in ([1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]):
        order.add_(1).remainder_(4)
        mask.copy_(torch.tensor(row))
        check_same(step, fn, (X,), (DX,), list(net.parameters()))


def test_a_mask_that_is_held_is_compared() -> None:
    mask = torch.tensor([True, False, True, True])

    def fn(x: Tensor) -> Tensor:
        y = x[mask]
        return y * 2 if len(y) == 3 else y

    step = quiet(fn)
    for row in ([1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]):
        mask.copy_(torch.tensor(row))
        assert torch.equal(step((X,), (DX,))[1], fn(DX))


def test_random_numbers_that_decide_run_as_they_are() -> None:
    talk = Talk()
    step = compile(lambda x: x * int(torch.randint(1, 9, ())), backend="eager", tell=talk)
    for seed in (0, 1):
        torch.manual_seed(seed)
        _, tangent = step((X,), (DX,))
        torch.manual_seed(seed)
        assert torch.equal(tangent, DX * int(torch.randint(1, 9, ())))
    assert "the value of a tensor decides what runs" in talk.texts[0]


def test_gradients_of_what_is_written_into_a_part() -> None:
    net = built()

    def fn(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 1:4] = net(x)[:, 1:4]
        return y

    check_same(quiet(fn), fn, (X,), (DX,), list(net.parameters()))


def test_a_mask_of_flexible_attention_that_the_call_makes() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, dq = draw(1, 1, 2, 128, 16).float(), draw(2, 1, 2, 128, 16).float()

    def fn(q: Tensor, limit: Tensor) -> Tensor:
        places = torch.arange(128) * limit
        mask = create_block_mask(lambda b, h, i, j: places[j] <= places[i], 1, 1, 128, 128, device="cpu")
        return flex_attention(q, q, q, block_mask=mask)  # type: ignore[return-value]

    step = quiet(fn)
    for limit in (torch.tensor(1), torch.tensor(-1)):
        found, expected = step((q, limit), (dq, None)), jvp(fn, (q, limit), (dq, None))
        assert torch.allclose(found[0], expected[0], atol=1e-6)
        assert torch.allclose(found[1], expected[1], atol=1e-5)


def test_hooks_of_gradients_run_as_they_are() -> None:
    net, talk, seen = built(), Talk(), []

    def fn(x: Tensor) -> Tensor:
        y = net.first(x)
        y.register_hook(lambda gradient: seen.append(1))
        return net.last(y)  # type: ignore[no-any-return]

    step = Compiled(fn, backend="eager", tell=talk)
    step(X).sum().backward()
    assert seen == [1]
    assert "acts on the backward pass" in talk.texts[0]


def test_what_a_module_keeps_of_a_trace_is_taken_away() -> None:
    class Caching(nn.Module):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(x.shape[1], dtype=x.dtype)
                self.calls = 1
            return x * self.table

    net = Caching()
    step = quiet(net)
    assert torch.equal(step((X,), (DX,))[1], DX * torch.arange(6.0))
    assert net.table is None
    assert not hasattr(net, "calls")
    assert torch.equal(net(X), X * torch.arange(6.0))


def test_what_a_cache_keeps_of_a_trace_has_values() -> None:
    @functools.lru_cache
    def table(size: int) -> Tensor:
        return torch.arange(size) * 1.0

    def fn(x: Tensor) -> Tensor:
        return x * table(x.shape[1])

    step = quiet(fn)
    for _ in range(2):
        assert torch.equal(step((X,), (DX,))[1], DX * torch.arange(6.0))
        assert torch.equal(fn(X), X * torch.arange(6.0))


def test_a_function_that_writes_into_its_arguments() -> None:
    a, b = torch.zeros(3), torch.ones(3)
    step = Compiled(lambda a, b: a.add_(b) * 1, backend="eager")
    for i in range(3):
        assert torch.equal(step(a, b), a)
        assert torch.equal(a, (i + 1) * b)


def test_an_error_of_the_function_is_its_own() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise KeyError("mine")

    step = compile(wrong, backend="eager", tell=Talk())
    with pytest.raises(KeyError, match="mine"):
        step((X,), (DX,))


def test_too_many_kinds() -> None:
    talk = Talk()
    net = built()
    step = compile(net, backend="eager", tell=talk, limit=2)
    for n in (4, 3, 2, 1):
        check_same(step, net, (X[:n],), (DX[:n],), list(net.parameters()))
    assert sum(run is not None for runs in step.kinds.values() for run in runs) == 2
    assert len(talk.texts) == 1
    assert "shapes" in talk.texts[0]


def test_one_graph_for_all_sizes_of_a_batch() -> None:
    net = built()
    step = quiet(net, dynamic=True)
    for n in (4, 3, 2):
        check_same(step, net, (X[:n],), (DX[:n],), list(net.parameters()))
    assert one_kind(step)


def test_a_part_of_what_jvp_runs() -> None:
    net = built()
    inner = Compiled(net, backend="eager")
    for _ in range(2):
        out, tangent = jvp(lambda x: inner(x * 2), (X,), (DX,))
        expected = jvp(lambda x: net(x * 2), (X,), (DX,))
        assert torch.equal(out, expected[0])
        assert torch.equal(tangent, expected[1])
    for a, b in zip(grads(out, list(net.parameters())), grads(expected[0], list(net.parameters())), strict=True):
        assert torch.allclose(a, b)
    assert not inner.kinds
    assert inner.tangents is not None
    assert one_kind(inner.tangents)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor needs it for every kernel on CUDA."""
    from torch._inductor.exc import TritonMissing

    def missing(*_: Any, **__: Any) -> Any:
        raise TritonMissing(None)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", missing)
    net, talk = built(), Talk()
    step = compile(net, tell=talk)
    for _ in range(2):
        check_same(step, net, (X,), (DX,), list(net.parameters()))
    (text,) = talk.texts
    assert "Net runs without compilation: TritonMissing: " in text
    assert "\n" not in text


def no_compiler(*_: Any) -> str:
    raise RuntimeError("no working C++ compiler")


def test_a_backend_that_fails(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, talk = built(), Talk()
    step = compile(net, backend="no_such_backend", tell=talk)
    check_same(step, net, (X,), (DX,), list(net.parameters()))
    assert "no_such_backend" in talk.texts[0]
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", no_compiler)
    step = compile(lambda x: x.sin(), tell=talk)
    assert torch.equal(step((X,), (DX,))[1], X.cos() * DX)
    assert "no working C++ compiler" in talk.texts.pop()
    locked = tmp_path / "file"
    locked.write_text("")
    step = compile(net, backend="aot_eager", tell=talk, cache=locked)
    check_same(step, net, (X,), (DX,), list(net.parameters()))
    assert str(locked) in talk.texts[1]


def test_equal_constants_of_different_types() -> None:
    step, i = Compiled(lambda x, n: x * n, backend="eager"), torch.arange(3)
    for n in (1, 1.0, True):
        for _ in range(2):
            assert step(i, n).dtype == (i * n).dtype
    assert len(step.kinds) == 3


def test_constants_that_cannot_be_compared() -> None:
    talk = Talk()
    step = Compiled(lambda x, chosen: x * len(chosen), backend="eager", tell=talk, name="mine")
    for _ in range(2):
        assert torch.equal(step(X, {1, 2}), 2 * X)
    assert talk.texts == ["mine runs without compilation: unhashable type: 'set' among its arguments"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_plain_tensors_with_tangents_inside_of_jvp(backend: str) -> None:
    step = Compiled(lambda x: x.sin(), backend=backend)
    step(X)

    def fn(x: Any) -> Any:
        h = torch.zeros(4, 6)
        h[0] = x[0]
        return step(h)

    assert torch.allclose(jvp(fn, (X,), (DX,))[1][0], X[0].cos() * DX[0])
