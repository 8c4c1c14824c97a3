"""Parts of PyTorch that look at tensors past every torch function, and what stands in for them while `jvp` runs.

Those of guard.py, activation checkpointing, the wrappers of data-parallel training, the fused path of transformer encoders,
and the compiler. Each replacement does what the original does for everything but duals, and is taken away with the last `jvp`.
"""

import copy
import dataclasses
import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from trigflow.tangent import guard
from trigflow.tangent.dual import RUN, Dual, Run, check_version, strip
from trigflow.tangent.written import end, lifted


@dataclasses.dataclass
class PlainDual:
    """A `Dual` as two tensors in the open, for code that searches arguments and outputs for tensors by itself.

    The hooks of FSDP2 and DDP find the primal in it, and put their nodes on its graph, as they would in a tuple.
    """

    primal: Tensor
    tangent: Tensor


pytree.register_pytree_node(PlainDual, lambda pair: ([pair.primal, pair.tangent], None), lambda tensors, _: PlainDual(*tensors))


def opened(value: Any) -> Any:
    """`value` with every `Dual` in it as a `PlainDual`."""

    def change(x: Dual) -> PlainDual:
        check_version(x)
        return PlainDual(x.primal, x.tangent)

    return _mapped(lifted(value), Dual, change)


def closed(value: Any) -> Any:
    """`value` with every `PlainDual` in it as a `Dual`."""
    return _mapped(value, PlainDual, lambda x: Dual(x.primal, x.tangent))


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with `change` done to everything of type `kind` in nested containers and dataclasses."""

    def visit(leaf: Any) -> Any:
        if type(leaf) is kind:
            return change(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, (type, PlainDual)):
            changed = {f.name: _mapped(getattr(leaf, f.name), kind, change) for f in dataclasses.fields(leaf)}
            if any(changed[name] is not getattr(leaf, name) for name in changed):
                leaf = copy.copy(leaf)
                for name in changed:
                    object.__setattr__(leaf, name, changed[name])
        return leaf

    return pytree.tree_map(visit, value, is_leaf=lambda leaf: type(leaf) is kind)


def _outside(original: Callable[..., Any]) -> Callable[..., Any]:
    """A method that meets duals in the open form and hands back closed ones."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return closed(original(self, *opened(args), **opened(kwargs)))

    return method


def _inside(original: Callable[..., Any]) -> Callable[..., Any]:
    """The reverse: a method that is called with the open form and meets closed duals."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return opened(original(self, *closed(args), **closed(kwargs)))

    return method


def _inherited(owner: type, name: str) -> Callable[..., Any]:
    """The method that an object finds beyond the class `owner`, which is mixed in and does not define it."""
    return lambda self, *args, **kwargs: getattr(super(owner, self), name)(*args, **kwargs)


def _on_primals(original: Callable[..., Any]) -> Callable[..., Any]:
    """Activation checkpointing keeps the arguments of a region for its second run, in backward: primals suffice."""
    return lambda *args, **kwargs: original(*strip(args), **strip(kwargs))


def _uncompiled(callback: Any) -> Any:
    """Dynamo's callback of a compiled function: none, which runs the function as it was written."""
    if callback not in (None, False):
        warnings.warn(
            "torch.compile has no effect inside trigflow.tangent.jvp: Dynamo cannot trace values that carry tangents; "
            "the uncompiled code runs, with the same results",
            stacklevel=2,
        )
    return None


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` where Dynamo neither traces it nor what it calls; as it is where Dynamo was never loaded."""
    if "torch._dynamo" not in sys.modules:
        return function

    def run(*args: Any) -> Any:
        with torch.compiler.set_stance("force_eager"):
            return function(*args)

    return torch.compiler.disable(run)


def _standing_back(original: Callable[..., Any]) -> Callable[..., Any]:
    """A `torch.compile` that may be the first of the process: what it loads Dynamo for runs uncompiled until `jvp` ends."""

    def compile(*args: Any, **kwargs: Any) -> Any:
        run, result = RUN.get(), original(*args, **kwargs)
        if run is not None and run.stance is None:
            run.stance = torch.compiler.set_stance("force_eager")
        return result

    return compile


def _unpacked(original: Callable[..., Any]) -> Callable[..., Any]:
    """`TransformerEncoder.forward`, which in evaluation packs padded batches: what it gives for the padding is constant."""

    def forward(self: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: Any = None) -> Any:
        out = original(self, src, mask, src_key_padding_mask, is_causal)
        if type(src) is not Dual or not _packs(self, src.primal, src_key_padding_mask, mask):
            return out
        constant = torch.zeros_like(out.primal)
        constant = constant if self.norm is None else self.norm(constant)
        return torch.where(src_key_padding_mask.bool()[..., None], constant, out)

    return forward


def _packs(encoder: Any, src: Tensor, padding: Tensor | None, mask: Tensor | None) -> bool:
    """Whether the encoder would pack plain tensors: the conditions of `TransformerEncoder.forward`."""
    first = encoder.layers[0]
    return (
        padding is not None
        and mask is None
        and src.dim() == 3
        and getattr(encoder, "use_nested_tensor", False)
        and torch.backends.mha.get_fastpath_enabled()
        and not first.training
        and not torch.is_autocast_enabled()
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in (src, *first.parameters())))
        and (not getattr(encoder, "mask_check", True) or torch._nested_tensor_from_mask_left_aligned(src, ~padding.bool()))
    )


_DOORS = (
    # Where transforms of PyTorch take the tensors of the function that they run; see errors.py for their names.
    ("torch._functorch.vmap", "_add_batch_dim", guard.without_duals),
    ("torch._functorch.eager_transforms", "_wrap_for_grad", guard.without_duals),
    ("torch.autograd.functional", "_as_tuple", guard.without_duals),
    ("torch.jit._trace", "_trace_impl", guard.without_duals),
    ("torch.utils.checkpoint", "_checkpoint_without_reentrant_generator", _on_primals),
    ("torch.distributed._composable.checkpoint_activation", "_checkpoint_without_reentrant_generator", _on_primals),
)


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Owner, name and replacement, for those modules that have been imported."""
    yield guard.BASE, "apply", classmethod(guard.checked_apply)
    yield torch._C.ScriptFunction, "__call__", guard.scripted(torch._C.ScriptFunction.__call__)
    yield torch._C.ScriptMethod, "__call__", guard.lifting(torch._C.ScriptMethod.__call__)
    yield nn.TransformerEncoder, "forward", _unpacked(nn.TransformerEncoder.forward)
    for name, door, replacement in _DOORS:
        module = sys.modules.get(name)
        if hasattr(module, door):
            yield module, door, replacement(getattr(module, door))
    parallel: Any = getattr(sys.modules.get("torch.nn.parallel.distributed"), "DistributedDataParallel", None)
    if hasattr(parallel, "_run_ddp_forward"):
        yield parallel, "forward", _outside(parallel.forward)
        yield parallel, "_run_ddp_forward", _inside(parallel._run_ddp_forward)
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if sharded is not None:
        yield sharded, "__call__", _outside(_inherited(sharded, "__call__"))
        yield sharded, "forward", _inside(_inherited(sharded, "forward"))
    if "torch._dynamo" not in sys.modules:
        yield torch, "compile", _standing_back(torch.compile)
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if hasattr(frames, "_callback_from_stance"):
        yield frames, "_callback_from_stance", _uncompiled


_lock = threading.Lock()
_depth = 0
_collects = False
_before: list[tuple[Any, str, Any]] = []
_ABSENT = object()


@contextmanager
def prepared() -> Iterator[None]:
    """While open, duals of one run may be made, and no part of PyTorch named above drops a tangent."""
    global _collects, _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _collects = gc.isenabled()
            gc.disable()  # see written.py
            for owner, name, replacement in list(_replacements()):
                _before.append((owner, name, vars(owner).get(name, _ABSENT)))
                setattr(owner, name, replacement)
    run = Run()
    token = RUN.set(run)
    try:
        yield
    finally:
        RUN.reset(token)
        end(run)
        if run.stance is not None:
            run.stance.__exit__(None, None, None)
        with _lock:
            _depth -= 1
            if _depth == 0 and _collects:
                gc.enable()
            while _depth == 0 and _before:
                owner, name, original = _before.pop()
                if original is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)
