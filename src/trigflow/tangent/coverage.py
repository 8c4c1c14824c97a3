"""A report on what the engine would do to a network, function by function."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from trigflow.tangent import api, dispatch, dual
from trigflow.tangent.errors import TangentError, function_name
from trigflow.tangent.finite import rms
from trigflow.tangent.rules.plain import plain
from trigflow.tangent.surroundings import prepared, uncompiled


@dataclass
class Coverage:
    """How each torch function that met a tangent was treated, with the number of calls.

    Attributes:
        rules: functions with a derivative rule.
        fallbacks: functions differentiated one by one with `torch.func.jvp`; right, but each costs one more forward.
        constants: functions of zero derivative (comparisons, shapes, detach): their result is a constant.
        unsupported: functions through which no tangent can go; `jvp` raises at the first of them.
        messages: the error of each unsupported function.
        moves: how far the output moves when the time moves by 0.2, relative to its size; None if no time was named.
        follows: how far it moves then by its derivative along the time, 0.2 |df/dt| / |f|. Zero for a network that rounds its
            time or looks it up in a table: its tangent misses the time without any error.
    """

    rules: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    constants: Counter[str] = field(default_factory=Counter)
    unsupported: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    moves: float | None = None
    follows: float | None = None

    @property
    def complete(self) -> bool:
        """Whether `jvp` would run through."""
        return not self.unsupported

    def __str__(self) -> str:
        lines = []
        for kind in ("rules", "fallbacks", "constants", "unsupported"):
            calls: Counter[str] = getattr(self, kind)
            lines.append(f"{kind}: {len(calls)} functions, {sum(calls.values())} calls")
            for name, count in sorted(calls.items(), key=lambda item: (-item[1], item[0])):
                lines.append(f"  {count:5d}  {name}")
        if self.moves is not None:
            lines.append(
                f"time: a step of 0.2 moves the output by {self.moves:.1e} of its size, {self.follows:.1e} by the tangent"
            )
        if self.follows == 0:
            lines.append("the tangent misses the time: it is rounded, looked up in a table, an integer or not used at all")
        return "\n".join(lines + list(self.messages.values()))


def coverage(fn: Callable[..., Any], *inputs: Any, time: int | None = None) -> Coverage:
    """Run `fn(*inputs)` once, each floating-point input carrying a tangent of ones, and report every function it calls.

    Where `jvp` would raise, the report goes on with a zero tangent. Nothing is differentiated backwards, but buffers and
    random generators move as in any run of `fn`.

    Args:
        fn: function or module, as for `jvp`.
        inputs: its arguments; integer tensors and other values count as constants.
        time: which of them is the time, counted from 0. If given, and if the report is complete, three more runs tell
            whether the output moves with the time and whether the tangent knows it.

    Raises:
        TangentError: inside a backward, a jvp or a transform of `torch.func`, or if no input has the number `time`.
    """
    api.check_surroundings("coverage")
    if time is not None and time not in range(len(inputs)):
        raise TangentError(f"time {time} of {len(inputs)} inputs; expected a number from 0; give that of the time among them")
    report = Coverage()
    tangents = tuple(
        torch.ones_like(x) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) else None for x in inputs
    )

    def observe(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
        name = function_name(func)
        try:
            result = dual.run(func, args, kwargs)
        except TangentError as reason:
            report.unsupported[name] += 1
            report.messages.setdefault(name, str(reason))
            return func(*dual.strip(args), **dual.strip(kwargs or {}))
        handler = dual.HANDLERS[func]
        if handler in (dispatch.fallback, dispatch.scripted):
            report.fallbacks[name] += 1
        elif handler is plain:
            report.constants[name] += 1
        elif not isinstance(handler, dispatch.Decomposed):
            report.rules[name] += 1
        return result

    token = dual.OBSERVER.set(observe)
    try:
        with torch.no_grad(), prepared():
            api.split(uncompiled(fn)(*api.inputs(inputs, tangents)))
    except TangentError as reason:
        report.unsupported["(outside torch functions)"] += 1
        report.messages["(outside torch functions)"] = str(reason)
    finally:
        dual.OBSERVER.reset(token)
    if time is not None and report.complete:
        with torch.no_grad():
            report.moves, report.follows = _motion(fn, inputs, time)
    return report


def _motion(fn: Callable[..., Any], inputs: tuple[Any, ...], time: int) -> tuple[float, float]:
    """How far the output moves with a step of 0.2 in time about where it is, and by its derivative."""
    t = inputs[time]
    if not isinstance(t, Tensor) or not t.is_floating_point():
        return 0.0, 0.0
    along = tuple(torch.ones_like(t) if i == time else None for i in range(len(inputs)))
    step = 0.1 / max(1.0, rms(t))
    return (
        _relative(*api.jvp(fn, inputs, along, method="finite-difference", step=step)),
        _relative(*api.jvp(fn, inputs, along)),
    )


def _relative(out: Any, tangent: Any) -> float:
    size, speed = (sum(float(x.abs().square().sum()) for x in pytree.tree_leaves(v)) ** 0.5 for v in (out, tangent))
    return 0.2 * speed / max(size, 1e-300)
