"""Everything through which a tangent would be lost raises, naming the function, the module and the way out."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from tangent.helpers import draw, relative_error
from trigflow.tangent import Dual, TangentError, jvp

X, DX = draw(1, 4), draw(2, 4)
PLAIN = draw(3, 4)
WEIGHT = nn.Parameter(draw(4, 4))


class Doubled(torch.autograd.Function):
    """A custom function whose forward has the wrong derivative for its backward."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "relu of plain into dual": (lambda x: torch.nn.functional.threshold(PLAIN, x[0], 0.0, inplace=True), "plain number"),
    "transpose in place": (lambda x: (x[None] * 1).t_(), "t_"),
    "unsqueeze in place": (lambda x: (x * 1).unsqueeze_(0), "unsqueeze_"),
    "resize in place": (lambda x: (x * 1).resize_(2), "resize_"),
    "python function in place": (lambda x: (x * 1).apply_(lambda v: 2 * v), "apply_"),
    "list in place": (lambda x: torch._foreach_add_([x * 1], 1.0), "_foreach_add_"),
    "two out": (lambda x: torch.sort(x, out=(PLAIN.clone(), torch.arange(4))), "sort"),
    "out of another shape": (lambda x: torch.sin(x, out=torch.zeros(0, dtype=X.dtype)), "sin"),
    "data": (lambda x: x.data, "data"),
    "numpy": (lambda x: torch.from_numpy(x.numpy()), "numpy"),
    "numpy of plain functions": (lambda x: torch.from_numpy(np.sin(x)), "numpy"),
    "tolist": (lambda x: x.tolist(), "tolist"),
    "item": (lambda x: x.sum().item() * PLAIN, "item"),
    "float": (lambda x: math.sin(x[0]) * PLAIN, "float"),
    "torch.tensor": (torch.tensor, "torch.tensor"),
    "torch.as_tensor": (lambda x: torch.as_tensor(x, dtype=torch.float32), "torch.as_tensor"),
    "custom function": (Doubled.apply, "Doubled"),
    "no forward derivative": (lambda x: torch._segment_reduce(x, "max", lengths=torch.tensor([4])), "segment_reduce"),
    "number as alpha": (lambda x: torch.add(PLAIN, PLAIN, alpha=x[0]), "plain number"),
    "number as slope": (lambda x: F.leaky_relu(PLAIN, x[0]), "plain number"),
    "number to fill with": (lambda x: torch.full((2,), x[0]), "plain number"),
    "number to fill like": (lambda x: torch.full_like(PLAIN, x[0]), "plain number"),
    "new_tensor": (lambda x: PLAIN.new_tensor(x), "new_tensor"),
    "legacy constructor": (lambda x: torch.Tensor(x), "kernel"),
    "pickle": (lambda x: pickle.dumps(x), "pickling"),
    "other type of the same memory": (lambda x: x.view(torch.int64), "view"),
    "renormalized embedding": (lambda x: F.embedding(torch.tensor([0]), x[:, None], max_norm=1.0), "embedding"),
    "None": (lambda x: None, "None"),
    "number": (lambda x: (x, 3), "int"),
    "nested jvp": (lambda x: jvp(torch.sin, (x,), (DX,))[0], "inside jvp"),
    "nested jvp of plain tensors": (lambda x: jvp(lambda y: x * y, (PLAIN,), (DX,))[0], "inside jvp"),
    "gradient inside": (lambda x: torch.autograd.grad((x * x).sum(), x)[0], "grad"),
    "backward inside": (lambda x: (x * PLAIN.clone().requires_grad_()).sum().backward(), "backward"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    fn, word = REFUSED[name]
    before = PLAIN.clone()
    with pytest.raises(TangentError) as caught:
        jvp(fn, (X,), (DX,))
    message = str(caught.value)
    assert word in message
    assert "\n" not in message
    assert message.count(";") == 2
    assert isinstance(caught.value, ValueError)
    assert torch.equal(PLAIN, before)


def test_a_custom_operator_has_no_silent_zero_tangent() -> None:
    @library.custom_op("trigflow_tests::cubed", mutates_args=())
    def cubed(x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() ** 3)

    assert not torch.func.jvp(cubed, (X,), (DX,))[1].any(), "PyTorch has learnt to refuse this by itself"
    with pytest.raises(TangentError, match=r"trigflow_tests\.cubed"):
        jvp(cubed, (X,), (DX,))


def test_the_module_is_named() -> None:
    class Inner(nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.sin(x, out=WEIGHT)

    net = nn.Sequential(nn.Identity(), nn.ModuleDict({"bad": Inner()}))
    net[1].forward = lambda x: net[1]["bad"](x)  # type: ignore[index]
    with pytest.raises(TangentError, match=r"in module 1\.bad \(Inner\)"):
        jvp(net, (X,), (DX,))


def test_custom_functions_of_plain_tensors_are_untouched() -> None:
    base = torch.autograd.function._SingleLevelFunction
    w = PLAIN.clone().requires_grad_()
    out, tangent = jvp(lambda x: x * Doubled.apply(w), (X,), (DX,))
    assert torch.equal(torch.autograd.grad(out.sum(), w)[0], 2 * X)
    assert relative_error(tangent, DX * PLAIN) < 1e-15
    assert "apply" not in vars(base)
    with pytest.raises(TangentError):
        jvp(Doubled.apply, (X,), (DX,))
    assert "apply" not in vars(base)


@pytest.mark.parametrize(
    ("primals", "tangents", "word"),
    [
        ((X,), (DX, DX), "1 primals and 2 tangents"),
        (X, DX, "expected two tuples"),
        ((X,), (DX[:2],), "(4,)"),
        ((X,), (DX[None],), "(4,)"),
        ((X,), (DX.float(),), "torch.float64"),
        ((torch.arange(4),), (DX,), "torch.int64"),
        ((X,), (1.0,), "float"),
        ((3.0,), (DX,), "float"),
        ((X,), (torch.empty(4, dtype=X.dtype, device="meta"),), "cpu"),
    ],
)
def test_tangents_must_match_their_primals(primals: Any, tangents: Any, word: str) -> None:
    with pytest.raises(TangentError) as caught:
        jvp(lambda *args: args[0], primals, tangents)
    assert word in str(caught.value)


def test_a_dual_kept_beyond_its_jvp_is_refused() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.mean = 0.9 * self.mean + 0.1 * x
            return x - self.mean

    net = Keeps()
    jvp(net, (X,), (DX,))
    with pytest.raises(TangentError, match="kept and used after it"):
        jvp(net, (X,), (DX,))
    with pytest.raises(TangentError, match="kept and used after it"):
        net(X)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(TangentError, match="inference mode"):
        jvp(torch.sin, (X,), (DX,))
    with torch.inference_mode(), pytest.raises(TangentError, match="tangent given to jvp was made in inference mode"):
        jvp(torch.sin, (X,), (DX.clone(),))


def test_the_tangent_must_stay_as_it_is() -> None:
    dx = DX.clone()
    with pytest.raises(TangentError, match="written in place by fn"):
        jvp(lambda x: x + dx.mul_(2), (X,), (dx,))


def test_inside_a_backward() -> None:
    x = X.clone().requires_grad_()
    y = x * 2
    y.register_hook(lambda g: jvp(torch.sin, (g,), (g,))[1])
    with pytest.raises(TangentError, match="backward"):
        y.sum().backward()


def test_values_that_only_choose_a_branch_may_be_read() -> None:
    def fn(x: Any) -> Any:
        assert x.shape == (4,)
        assert x.ndim == x.dim() == 1
        assert x.dtype == torch.float64
        assert len(x) == x.size(0) == x.numel() == 4
        assert x.is_floating_point()
        assert x.requires_grad is False
        assert not hasattr(x, "no_such_attribute")
        assert f"{x[0]:.3f}" == f"{X[0]:.3f}"
        assert "Dual" in repr(x)
        order = x.argsort()
        y = x * 2 if (x.abs().max() < 1e6) and bool(x.sum() < 1e6) and int(x[0] * 0) == 0 else x
        return y[order] + torch.zeros_like(x)

    out, tangent = jvp(fn, (X,), (DX,))
    assert torch.equal(out, 2 * X.sort().values)
    assert torch.equal(tangent, 2 * DX[X.argsort()])


def test_copies_keep_their_tangent() -> None:
    for fn in (copy.copy, copy.deepcopy):
        assert torch.equal(jvp(fn, (X,), (DX,))[1], DX)


def test_duals_are_instances_of_tensor_without_memory_of_their_own() -> None:
    def fn(x: Any) -> Any:
        assert isinstance(x, Dual)
        assert isinstance(x, Tensor)
        assert torch.is_tensor(x)
        assert not isinstance(x, nn.Parameter)
        assert torch.as_tensor(x) is x
        assert torch.Tensor.numel(x) == 4
        return x

    assert torch.equal(jvp(fn, (X,), (DX,))[1], DX)


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: torch.tensor([x[0], x[1]]),
        lambda x: nn.Parameter(x) * x,
        lambda x: setattr(PLAIN.clone().requires_grad_(), "grad", x),
        lambda x: setattr(x, "data", PLAIN),
        lambda x: setattr(x, "grad", PLAIN),
        lambda x: PLAIN[x],
        lambda x: torch.nested.nested_tensor([x]),
        lambda x: torch.utils.dlpack.to_dlpack(x),
        lambda x: torch.func.vmap(torch.sin)(x),
        lambda x: torch.func.grad(torch.sum)(x),
        lambda x: memoryview(x),
        lambda x: torch.ops.aten.sin.default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), x),
    ],
)
def test_what_looks_past_the_torch_functions_fails_and_does_not_end_the_process(fn: Callable[[Any], Any]) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError, BufferError, IndexError)):
        jvp(fn, (X,), (DX,))
