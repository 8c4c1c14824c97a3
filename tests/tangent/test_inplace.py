"""Functions that write in place: right where they are allowed, refused where a tangent would be lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tangent.helpers import check, draw, gradients, relative_error, same
from trigflow.tangent import Dual, TangentError, jvp

X, Y = draw(1, 4, 6), draw(2, 4, 6)
DX, DY = draw(3, 4, 6), draw(4, 4, 6)
MASK = torch.arange(24).reshape(4, 6) % 3 == 0
ROWS = torch.tensor([2, 0])


def written(write: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`write(h, y)` on a fresh tensor that nothing in the graph needs the old values of."""

    def fn(x: Any, y: Any) -> Any:
        h = x * 1.5
        out = write(h, y)
        return h * y + (0 if out is None else out.sum())

    return fn


def assign(index: Any, value: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    def write(h: Any, y: Any) -> None:
        h[index] = value(y)

    return write


def operator(name: str) -> Callable[[Any, Any], Any]:
    return lambda h, y: getattr(h, f"__i{name}__")(y)


WRITES: dict[str, Callable[[Any, Any], Any]] = {
    "+=": operator("add"),
    "-=": operator("sub"),
    "*=": operator("mul"),
    "/=": operator("truediv"),
    "%=": operator("mod"),
    "**=": lambda h, y: h.__ipow__(2),
    "add_": lambda h, y: h.add_(y, alpha=0.5),
    "add_ number": lambda h, y: h.add_(1.0),
    "add_ itself": lambda h, y: h.add_(h),
    "mul_ broadcast": lambda h, y: h.mul_(y[:, :1]),
    "sub_ by keyword": lambda h, y: h.sub_(other=y),
    "addcmul_": lambda h, y: h.addcmul_(y, y, value=0.3),
    "lerp_": lambda h, y: h.lerp_(y, 0.3),
    "addmm_": lambda h, y: h.addmm_(y[:, :4], y, alpha=0.5),
    "clamp_": lambda h, y: h.clamp_(-0.5, 0.5),
    "clamp_min_": lambda h, y: h.clamp_min_(0.0),
    "masked_fill_": lambda h, y: h.masked_fill_(MASK, 0.5),
    "masked_fill_ dual": lambda h, y: h.masked_fill_(MASK, y.sum()),
    "index_add_": lambda h, y: h.index_add_(0, ROWS, y[:2]),
    "index_copy_": lambda h, y: h.index_copy_(0, ROWS, y[:2]),
    "scatter_add_": lambda h, y: h.scatter_add_(1, torch.zeros(4, 6, dtype=torch.long), y),
    "copy_": lambda h, y: h.copy_(y[:1]),
    "copy_ of a constant": lambda h, y: h.copy_(X),
    "zero_": lambda h, y: h.zero_(),
    "fill_": lambda h, y: h.fill_(2.0),
    "fill_ dual": lambda h, y: h.fill_(y[0, 0]),
    "sin_": lambda h, y: torch.sin_(h),
    "exp_": lambda h, y: h.exp_(),
    "sigmoid_": lambda h, y: h.sigmoid_(),
    "relu_": lambda h, y: F.relu_(h),
    "elu_": lambda h, y: F.elu_(h, 0.5),
    "cumsum_": lambda h, y: h.cumsum_(0),
    "cumprod_, by fallback": lambda h, y: h.cumprod_(0),
    "relu": lambda h, y: F.relu(h, inplace=True),
    "leaky_relu": lambda h, y: F.leaky_relu(h, 0.2, True),
    "silu module": lambda h, y: nn.SiLU(inplace=True)(h),
    "hardtanh module": lambda h, y: nn.Hardtanh(inplace=True)(h),
    "dropout of nothing": lambda h, y: F.dropout(h, 0.5, False, True),
    "row": assign(1, lambda y: y[0]),
    "row of a constant": assign(1, lambda y: X[0]),
    "row of a number": assign(1, lambda y: 0.0),
    "slice": assign((slice(None), slice(0, 6, 2)), lambda y: y[:, 3:]),
    "mask": assign(MASK, lambda y: y[MASK]),
    "rows by index": assign(ROWS, lambda y: y[:2]),
    "everything": assign(Ellipsis, lambda y: y),
    "aten": lambda h, y: torch.ops.aten.silu_(h),
    "aten overload": lambda h, y: torch.ops.aten.mul_.Tensor(h, y),
    "view": lambda h, y: h[1].mul_(2),
    "view by operator": lambda h, y: h[:, :3].__iadd__(y[:, 3:]),
    "view of a view": lambda h, y: h.view(2, 12)[1].view(3, 4)[:, 1].exp_(),
    "transposed view": lambda h, y: h.T.mul_(y.T),
    "overlapping views": lambda h, y: (h[:3].mul_(y[:3]), h[1:].add_(y[1:]), h[:, 2].sin_())[0].sum(),
    "disjoint views": lambda h, y: (h[0].mul_(2), h[1] * 3)[1].sum(),
    "diagonal": lambda h, y: h.diagonal().copy_(y[:, 0]),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("carry", [(True, True), (True, False)])
def test_writes(name: str, carry: tuple[bool, bool]) -> None:
    if name.startswith("masked_fill_ dual") and not carry[1]:
        carry = (True, True)
    check(written(WRITES[name]), (X, Y), carry)


def test_augmented_assignment_of_a_part() -> None:
    def fn(x: Any, y: Any) -> Any:
        h = x * 1.0
        h[1] += y[1]
        h[:, :2] *= y[:, :2]
        h[MASK] = h[MASK] * 2
        a, b = h[:2], h[2:]
        b -= a
        return h.sin() + a.repeat(2, 1) + b.repeat(2, 1)

    check(fn, (X, Y))


def test_a_write_of_a_value_into_itself() -> None:
    def fn(x: Any) -> Any:
        y = x * 1
        y.mul_(y)
        y[1:] += y[:1]
        return y

    out, tangent = jvp(fn, (X,), (DX,))
    square, moved = X * X, 2 * X * DX
    assert torch.equal(out, torch.cat([square[:1], square[1:] + square[:1]]))
    assert relative_error(tangent, torch.cat([moved[:1], moved[1:] + moved[:1]])) < 1e-15


def test_the_object_written_is_the_object_returned() -> None:
    def fn(x: Any) -> Any:
        h = x * 2
        assert h.add_(1) is h
        same_object = h
        h += 1
        assert h is same_object
        assert F.relu(h, inplace=True) is h
        return h

    check(fn, (X,))


def test_the_input_itself_is_written_as_in_a_plain_run() -> None:
    x = X.clone()
    out, tangent = jvp(lambda x: x.mul_(3), (x,), (DX,))
    assert out is x
    assert torch.equal(x, 3 * X)
    assert torch.equal(tangent, 3 * DX)
    leaf = X.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        jvp(lambda x: x.mul_(3), (leaf,), (DX,))


def test_a_tangent_that_is_its_primal() -> None:
    x = X.clone()
    out, tangent = jvp(lambda x: x.add_(1), (x,), (x,))
    assert torch.equal(out, X + 1)
    assert torch.equal(tangent, X)


def test_dropout_in_place_draws_the_mask_of_a_plain_run() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4, inplace=True), nn.ReLU(inplace=True)).double()
    torch.manual_seed(3)
    plain = net(X)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    out, tangent = jvp(net, (X,), (DX,))
    assert torch.equal(out, plain)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    moved = net(X + 1e-7 * DX)
    assert relative_error(tangent, (moved - plain) / 1e-7) < 1e-5


def test_noise_written_in_place_is_a_constant() -> None:
    out, tangent = jvp(lambda x: (x * 1).normal_() + x, (X,), (DX,))
    assert torch.equal(tangent, DX)
    assert not torch.equal(out, X)


def test_under_autocast() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.SiLU(inplace=True))
    for engine in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, tangent = jvp(net, (X.float(),), (DX.float(),)) if engine else (net(X.float()), None)
        out.float().sum().backward()
        if not engine:
            expected = [p.grad.clone() for p in net.parameters()]
    assert all(torch.equal(p.grad, e) for p, e in zip(net.parameters(), expected, strict=True))
    exact = jvp(net, (X.float(),), (DX.float(),))[1]
    assert tangent.dtype == torch.bfloat16
    assert relative_error(tangent.float(), exact) < 0.03


def test_inside_a_checkpointed_region() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2, inplace=True), nn.ReLU(inplace=True), nn.Linear(6, 6)).double()
    grads = []
    for region in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        out, tangent = jvp(lambda x, r=region: r(x).sin_(), (x,), (DX,))
        grads.append([out, tangent, *gradients(out, [x, *net.parameters()])])
    assert all(same(a, b) for a, b in zip(*grads, strict=True))


def through_plain(x: Any) -> Any:
    y = x * 1
    y.detach().add_(1)
    return y * 2


def through_base(x: Any) -> Any:
    y = x * 1
    part = y[0]
    y.mul_(2)
    return part * 2


def through_same(x: Any) -> Any:
    y = x * 1
    z = y.contiguous()
    z.mul_(2)
    return y


def through_numpy(x: Any) -> Any:
    y = x * 1
    y.detach().numpy()[:] = 0
    y.detach().zero_()
    return torch.cat([y, y])


def through_list(x: Any) -> Any:
    y, z = x * 1, x * 2
    y.detach().zero_()
    return torch.stack([z, y])


def through_keyword(x: Any) -> Any:
    y = x * 1
    y.detach().zero_()
    return torch.add(input=x, other=y)


def through_copy(x: Any) -> Any:
    import copy

    y = x * 1
    y.detach().zero_()
    return copy.copy(y)


def output_itself(x: Any) -> Any:
    y = x * 1
    y.detach().zero_()
    return {"y": [y]}


def expanded(x: Any) -> Any:
    y = x[:1] * 1
    wide = y.expand(4, 6)
    y[:, 0].zero_()
    return wide


STALE = [
    through_plain,
    through_base,
    through_same,
    through_numpy,
    through_list,
    through_keyword,
    through_copy,
    output_itself,
    expanded,
]


@pytest.mark.parametrize("fn", STALE)
def test_a_write_behind_the_back_of_a_tangent_raises(fn: Callable[[Any], Any]) -> None:
    with pytest.raises(TangentError, match=r"written in place through another tensor .*; expected .*; copy one"):
        jvp(fn, (X,), (DX,))


@pytest.mark.parametrize(
    "view",
    [lambda y: y[:1].expand(4, 6), lambda y: y.view(-1).unfold(0, 6, 2), lambda y: y.view(-1).as_strided((4, 6), (3, 1))],
)
def test_a_write_into_elements_that_share_memory_is_refused(view: Callable[[Any], Any]) -> None:
    def fn(x: Any) -> Any:
        y = view(x * 1)
        y[0] = 2.0
        return y

    with pytest.raises(TangentError, match="elements share memory"):
        jvp(fn, (X,), (DX,))


@pytest.mark.parametrize(
    "write",
    [
        lambda y: y[1:3].mul_(y[1:2].expand(2, 6)),
        lambda y: y[1:].add_(y[:3]),
        lambda y: y.view(-1)[1:].copy_(y.detach().view(-1)[:-1]),
        lambda y: y.__setitem__(slice(1, 4), y[:3]),
        lambda y: y[:, :4].addmm_(y[:, :4], y[:, :4]),
    ],
)
def test_a_write_that_reads_what_it_writes_is_refused(write: Callable[[Any], Any]) -> None:
    def fn(x: Any) -> Any:
        y = x * 1
        write(y)
        return y

    with pytest.raises(TangentError, match="reads a part of the memory"):
        jvp(fn, (X,), (DX,))


def test_a_write_to_what_is_not_used_again_is_no_matter() -> None:
    def fn(x: Any) -> Any:
        y = x * 1
        z = y * y
        y.detach().zero_()
        return z

    assert relative_error(jvp(fn, (X,), (DX,))[1], 2 * X * DX) < 1e-15


def test_two_arguments_that_share_memory() -> None:
    both = draw(5, 2, 3)
    fn = lambda a, b: (a.mul_(2), b * 1)[1]  # noqa: E731
    with pytest.raises(TangentError, match="written in place"):
        jvp(fn, (both, both), (DX[:2, :3], DX[2:, 3:]))
    shared = draw(5, 4, 3)
    out, tangent = jvp(fn, (shared[:2], shared[2:]), (DX[:2, :3], DX[2:, 3:]))
    assert torch.equal(out, draw(5, 4, 3)[2:])
    assert torch.equal(tangent, DX[2:, 3:])


def test_nothing_of_a_write_outlives_the_jvp() -> None:
    import gc
    import weakref

    seen: list[Any] = []

    def fn(x: Any) -> Any:
        y = x * 1
        y[0].mul_(2)
        seen.append(weakref.ref(y.tangent))
        return y * 1

    jvp(fn, (X,), (DX,))
    gc.collect()
    assert seen[0]() is None


def test_duals_know_the_version_of_their_primal() -> None:
    def fn(x: Any) -> Any:
        assert isinstance(x, Dual)
        y = x * 1
        before = y.version
        y.add_(1)
        assert y.version == y.primal._version > before
        return y

    assert torch.equal(jvp(fn, (X,), (DX,))[1], DX)


class Both(NamedTuple):
    first: Any
    second: Any


@pytest.mark.parametrize("wrap", [list, tuple, lambda pair: Both(*pair)])
@pytest.mark.parametrize("by_name", [False, True])
def test_tensors_in_lists_are_looked_at(wrap: Callable[..., Any], by_name: bool) -> None:
    def stack(x: Any, y: Any) -> Any:
        return torch.stack(tensors=wrap([x, y])) if by_name else torch.stack(wrap([x, y]))

    def stale(x: Any, y: Any) -> Any:
        h = x * y
        h.detach().mul_(3)
        return stack(x, h)

    check(stack, (X, Y))
    with pytest.raises(TangentError, match="written in place through another tensor"):
        jvp(stale, (X, Y), (DX, DY))


def test_results_of_torch_in_place_of_a_tuple() -> None:
    check(lambda x: torch.stack(torch.aminmax(x, dim=0)), (X,))
