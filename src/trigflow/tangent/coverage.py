"""A report on what the engine would do to a network, function by function."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent import api, dispatch, dual
from trigflow.tangent.errors import TangentError, function_name
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
    """

    rules: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    constants: Counter[str] = field(default_factory=Counter)
    unsupported: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)

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
        return "\n".join(lines + list(self.messages.values()))


def coverage(fn: Callable[..., Any], *inputs: Any) -> Coverage:
    """Run `fn(*inputs)` once, each floating-point input carrying a tangent of ones, and report every function it calls.

    Where `jvp` would raise, the report goes on with a zero tangent. Nothing is differentiated backwards, but buffers and
    random generators move as in any run of `fn`.

    Args:
        fn: function or module, as for `jvp`.
        inputs: its arguments; integer tensors and other values count as constants.
    """
    api.check_surroundings("coverage")
    report = Coverage()
    tangents = tuple(
        torch.ones_like(x) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) else None
        for x in inputs
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
    return report
