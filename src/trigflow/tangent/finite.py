"""Central differences: an approximate tangent, for functions through which no exact one can go.

Df(x) dx = (f(x + h dx) - f(x - h dx)) / (2 h) + O(h^2)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from trigflow.tangent.dual import dict_like, like
from trigflow.tangent.errors import TangentError


def central_difference(
    fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...], step: float | None
) -> tuple[Any, Any]:
    """Output of `fn` from a plain run, and its central difference along the tangents from two more without a graph.

    The three runs see the same random draws. Buffers of modules keep what the first run left in them.

    Args:
        fn: as for `jvp`.
        primals: as for `jvp`, already checked.
        tangents: as for `jvp`, already checked.
        step: size of the difference relative to the inputs: `h = step min_i max(1, rms(x_i)) / rms(dx_i)`. None for
            `eps^(1/3)` with the largest machine epsilon among inputs and outputs, which balances rounding (`eps / h`)
            against curvature (`h^2`): 6e-6 in float64, 5e-3 in float32, 0.1 in float16, 0.2 in bfloat16.

    Returns:
        `(out, tangent)` as from `jvp`.

    Raises:
        TangentError: if the step is not positive, or fn writes into its inputs.
    """
    if step is not None and not 0 < step < float("inf"):
        raise TangentError(f"step {step}; expected a positive number; leave it away for the default")
    moving = [i for i, t in enumerate(tangents) if t is not None]
    kept = [p for p in primals if isinstance(p, Tensor) and not p.is_inference()]
    versions = [p._version for p in kept]
    record = Record(fn)
    with record:
        out = fn(*primals)
    if versions != [p._version for p in kept]:
        raise TangentError(
            "fn wrote into its inputs in place; expected inputs that are the same in every run; copy them with .clone()"
        )
    if step is None:
        values = (*_leaves(out), *(primals[i] for i in moving))
        step = max((torch.finfo(v.dtype).eps for v in values if _continuous(v)), default=1.0) ** (1 / 3)
    h = step * _scale([primals[i] for i in moving], [tangents[i] for i in moving])

    def at(h: float) -> Any:
        inputs = list(primals)
        for i in moving:
            inputs[i] = torch.add(primals[i].detach(), tangents[i], alpha=h)
        with record.replayed():
            return fn(*inputs)

    with torch.no_grad():
        return out, _difference(at(h), at(-h), h)


def _leaves(value: Any) -> list[Any]:
    """What is in nested tuples, lists and dicts, of any class."""
    if isinstance(value, dict):
        value = tuple(value.values())
    return [leaf for v in value for leaf in _leaves(v)] if isinstance(value, (tuple, list)) else [value]


def _continuous(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _scale(xs: list[Tensor], dxs: list[Tensor]) -> float:
    """The h at which no input moves further than its own size, or than one where it is smaller; 1 if none moves."""
    sizes = [(max(1.0, rms(x)), rms(dx)) for x, dx in zip(xs, dxs, strict=True)]
    return min((size / speed for size, speed in sizes if speed > 0), default=1.0)


def rms(x: Tensor) -> float:
    work = torch.promote_types(x.dtype, torch.float32)
    return float(torch.linalg.vector_norm(x.detach().to(work))) / max(x.numel(), 1) ** 0.5


def _difference(plus: Any, minus: Any, h: float) -> Any:
    """`(plus - minus) / 2h` in at least float32, in the dtype of the output; zero for integers. Nested like the output."""
    if isinstance(plus, dict):
        return dict_like(plus, {k: _difference(plus[k], minus[k], h) for k in plus})
    if isinstance(plus, (tuple, list)):
        return like(plus, [_difference(p, m, h) for p, m in zip(plus, minus, strict=True)])
    if not _continuous(plus):
        return torch.zeros_like(plus) if isinstance(plus, Tensor) else plus
    work = torch.promote_types(plus.dtype, torch.float32)
    return ((plus.to(work) - minus.to(work)) / (2 * h)).to(plus.dtype)


Buffers = dict[str, Tensor | None]


class Record(TorchFunctionMode):
    """What a run of `fn` drew from and left behind, so that it can be run again from the same state.

    Kept are the states of the default generators and of those passed to torch functions by name, and what was in the buffers
    of the modules in `fn`, if it is a module, and of those that run.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        owner = fn if isinstance(fn, nn.Module) else getattr(fn, "__self__", None)
        self.buffers: dict[int, tuple[Buffers, Buffers]] = {}
        for module in owner.modules() if isinstance(owner, nn.Module) else ():
            self._keep(module)
        self.before = {g: g.get_state() for g in _default_generators()}
        self.after: dict[torch.Generator, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        generator = (kwargs or {}).get("generator")
        if generator is not None and generator not in self.before:
            self.before[generator] = generator.get_state()
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self.hook = register_module_forward_pre_hook(self._keep)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def _keep(self, module: nn.Module, inputs: Any = None) -> None:
        # By their dict, not by the module: Dynamo, which traces this too, cannot keep what is being called.
        if id(module._buffers) not in self.buffers:
            self.buffers[id(module._buffers)] = module._buffers, _copied(module._buffers)

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)  # type: ignore[no-untyped-call]
        self.hook.remove()
        self.after = {g: g.get_state() for g in self.before}

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Run again from the state before the first run; afterwards everything is as that run left it."""
        left = [(buffers, dict(buffers)) for buffers, _ in self.buffers.values()]
        for generator, state in self.before.items():
            generator.set_state(state)
        for buffers, before in self.buffers.values():
            buffers.update(_copied(before))
        try:
            yield
        finally:
            for buffers, own in left:
                buffers.clear()
                buffers.update(own)
            for generator, state in self.after.items():
                generator.set_state(state)


def _copied(buffers: Buffers) -> Buffers:
    return {name: b if b is None else b.detach().clone() for name, b in buffers.items()}


def _default_generators() -> list[torch.Generator]:
    cuda = list(torch.cuda.default_generators) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return [torch.default_generator, *cuda]
