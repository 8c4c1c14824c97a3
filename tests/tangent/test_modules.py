"""Modules as others write them: type tests, hooks, parametrizations, decorators, checkpointing in all its forms."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from tangent.helpers import check, draw, gradients, reference, relative_error, same
from trigflow.tangent import Dual, jvp

X, DX = draw(1, 3, 5, 8), draw(2, 3, 5, 8)


def filled(module: nn.Module) -> nn.Module:
    """The module in double precision with fixed weights."""
    module = module.double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(draw(100 + i, *p.shape) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    return module


# Type tests ----------------------------------------------------------------------------------------------------------


class Picky(nn.Module):
    """Takes tensors only, also in keywords, tuples and dicts."""

    def forward(self, x: Any, *, pair: Any, named: Any) -> Any:
        if not isinstance(x, Tensor) or not torch.is_tensor(pair[0]) or not torch.overrides.is_tensor_like(x):
            raise TypeError("not a tensor")
        found = [leaf for leaf in pytree.tree_leaves((pair, named)) if isinstance(leaf, torch.Tensor)]
        match x:
            case torch.Tensor():
                return x * sum(found)
        return x * 0


def test_tests_for_tensors_hold() -> None:
    net = Picky()
    check(lambda x, y: net(x, pair=(y, 2), named={"a": y * 2}), (X, draw(3, 5, 8)))


def test_a_tensor_subclass_beside_a_dual() -> None:
    class Marked(Tensor):
        pass

    w = draw(3, 8).as_subclass(Marked)
    for fn in (lambda x: x * w, lambda x: w * x, lambda x: torch.mul(w, x)):
        out, tangent = jvp(fn, (X,), (DX,))
        assert torch.equal(torch.Tensor(out), X * draw(3, 8))
        assert relative_error(tangent.as_subclass(Tensor), DX * draw(3, 8)) < 1e-15


def test_attributes_of_a_tensor() -> None:
    def fn(x: Any) -> Any:
        assert x.grad is None
        assert x.grad_fn is None
        assert not x.requires_grad
        assert x.is_leaf
        assert x.device == torch.device("cpu")
        assert x.stride() == X.stride()
        assert x.nbytes == X.nbytes
        assert hash(x) == hash(x)
        assert x in [x]
        x.tag = "kept"
        return x.mT.mT if x.tag == "kept" else x

    out, tangent = jvp(fn, (X,), (DX,))
    assert torch.equal(out, X)
    assert torch.equal(tangent, DX)


# Stock modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Unflatten(1, (5, 1)), nn.Conv2d(5, 4, (1, 3)), nn.PReLU(4), nn.Flatten(1)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).eval(),
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)),
        lambda: nn.Sequential(nn.Linear(8, 6), nn.GLU(), nn.Softmax(-1)),
        lambda: nn.Sequential(nn.LazyLinear(6), nn.Mish()),
    ],
)
def test_other_modules(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    net = build().double()
    net(X)
    check(net, (X,))


# Hooks and decorators ------------------------------------------------------------------------------------------------


def test_hooks_that_change_inputs_and_outputs() -> None:
    net = filled(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    net[0].register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    net[1].register_forward_hook(lambda m, args, out: out + args[0])
    net.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs), with_kwargs=True)
    check(net, (X,))


def test_decorated_forwards() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        @torch.autocast("cpu", enabled=False)
        def embed(self, x: Tensor) -> Tensor:
            return x.float().sin()

        @torch.no_grad()
        def scale(self, x: Tensor) -> Tensor:
            return x.abs().amax(-1, keepdim=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.embed(x) / self.scale(x))

    net, x, dx = Careful(), X.float(), DX.float()
    out, tangent = jvp(net, (x,), (dx,))
    assert torch.equal(out, net(x))
    assert relative_error(tangent, reference(net, (x,), (dx,))) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half, half_tangent = jvp(net, (x,), (dx,))
        assert torch.equal(half, net(x))
    assert half_tangent.dtype == torch.bfloat16
    assert relative_error(half_tangent.float(), tangent) < 0.03


def test_data_parallel_without_devices() -> None:
    net = filled(nn.Linear(8, 8))
    check(nn.DataParallel(net), (X,), expected=reference(net, (X,), (draw(31, *X.shape),)))


# Activation checkpointing --------------------------------------------------------------------------------------------


def layers(p: float = 0.3) -> nn.Sequential:
    net = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.LayerNorm(8), nn.SiLU()) for _ in range(3)])
    return filled(net)  # type: ignore[return-value]


def selective(net: nn.Sequential, x: Any) -> Any:
    """Products are kept, all else is computed again."""

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.silu.default)
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(net, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))


def early_stop_off(net: nn.Sequential, x: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return checkpoint(net, x, use_reentrant=False)


FORMS: dict[str, Callable[[nn.Sequential, Any], Any]] = {
    "plain": lambda net, x: checkpoint(net, x, use_reentrant=False),
    "by keyword": lambda net, x: checkpoint(lambda *, h: net(h), h=x, use_reentrant=False),
    "captured": lambda net, x: checkpoint(lambda: net(x), use_reentrant=False),
    "nested arguments": lambda net, x: checkpoint(lambda d: net(d["x"][0]), {"x": (x, None)}, use_reentrant=False),
    "without determinism check": lambda net, x: checkpoint(net, x, use_reentrant=False, determinism_check="none"),
    "debug": lambda net, x: checkpoint(net, x, use_reentrant=False, debug=True),
    "without early stop": early_stop_off,
    "selective": selective,
    "nested": lambda net, x: checkpoint(
        lambda h: net[2](checkpoint(net[1], net[0](h), use_reentrant=False)), x, use_reentrant=False
    ),
    "sequential": lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_checkpoints_with_dropout(form: str) -> None:
    net, runs = layers(), []
    for fn in (net, lambda x: FORMS[form](net, x)):
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        out, tangent = jvp(lambda x, f=fn: f(x * 1.5), (x,), (DX,))
        torch.manual_seed(99)  # what is drawn between forward and backward must not matter
        runs.append([out, tangent, *gradients(out, [x, *net.parameters()])])
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    assert runs[1][1].any()


def test_a_checkpoint_that_does_not_keep_the_random_state() -> None:
    net = layers(p=0.0)
    runs = []
    for keep in (True, False):
        x = X.clone().requires_grad_()
        out, tangent = jvp(lambda x, k=keep: checkpoint(net, x, use_reentrant=False, preserve_rng_state=k), (x,), (DX,))
        runs.append([out, tangent, *gradients(out, [x, *net.parameters()])])
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_wrapped_modules_of_torch_distributed() -> None:
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    runs = []
    for wrap in (False, True):
        net = layers()
        if wrap:
            for i in range(3):
                net[i] = wrapper.checkpoint_wrapper(net[i], wrapper.CheckpointImpl.NO_REENTRANT)
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        out, tangent = jvp(net, (x,), (DX,))
        runs.append([out, tangent, *gradients(out, [x, *net.parameters()])])
    assert all(same(a, b) for a, b in zip(*runs, strict=True))


def test_a_checkpoint_keeps_no_tangent_until_backward() -> None:
    net, seen = layers(), []

    def fn(x: Any) -> Any:
        h = x * 2
        assert type(h) is Dual
        seen.append(weakref.ref(h.tangent))
        return checkpoint(net, h, use_reentrant=False)

    out, _ = jvp(fn, (X.clone().requires_grad_(),), (DX,))
    gc.collect()
    assert seen[0]() is None
    out.sum().backward()


def test_a_network_under_saved_tensor_hooks() -> None:
    net, packed = layers(p=0.0), []

    def pack(t: Tensor) -> Tensor:
        assert type(t) is not Dual
        packed.append(t)
        return t

    expected = jvp(net, (X,), (DX,))[1]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out, tangent = jvp(lambda x: F.silu(net(x)), (X,), (DX,))
        plain = len(packed)
        F.silu(net(X))
    assert len(packed) == 2 * plain
    assert tangent.shape == expected.shape
    out.sum().backward()
