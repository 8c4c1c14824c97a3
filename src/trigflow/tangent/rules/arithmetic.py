"""Functions of two or three tensors, element by element: sums, products, quotients, powers, choices."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trigflow.tangent.dispatch import fallback
from trigflow.tangent.dual import Dual, Handler, has_dual, no_grad, pair, strip
from trigflow.tangent.table import register


def binary(derivative: Callable[..., Tensor | None]) -> Handler:
    """Handler of `y = f(a, b)` from `derivative(y, a, da, b, db, settings) -> dy`.

    `da` or `db` is None where that argument carries no tangent; an argument may also be a number. A derivative that
    returns None is zero everywhere.
    """

    def handler(func: Any, input: Any = None, other: Any = None, *args: Any, **kwargs: Any) -> Any:
        if (args and has_dual(args)) or (kwargs and (other is None or has_dual(kwargs))):  # pow(x, exponent=y)
            return fallback(func, *[x for x in (input, other) if x is not None], *args, **kwargs)
        if type(input) is Dual:
            a, da = input.primal, input.tangent
        else:
            a, da = input, None
        if type(other) is Dual:
            b, db = other.primal, other.tangent
        else:
            b, db = other, None
        y = func(a, b, *args, **kwargs)
        if y is NotImplemented:
            return y
        with no_grad():
            return pair(y, derivative(y, a, da, b, db, *args, **kwargs))

    return handler


def swapped(derivative: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The derivative of a reflected operator: `f(b, a)`."""
    return lambda y, a, da, b, db, *args, **kwargs: derivative(y, b, db, a, da, *args, **kwargs)


def _add(y: Tensor, a: Any, da: Any, b: Any, db: Any, alpha: Any = 1) -> Tensor:
    if db is None:
        return da
    if da is None:
        return db if alpha == 1 else db * alpha
    return torch.add(da, db, alpha=alpha)


def _sub(y: Tensor, a: Any, da: Any, b: Any, db: Any, alpha: Any = 1) -> Tensor:
    return _add(y, a, da, b, db, -alpha)


def _mul(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor:
    if db is None:
        return da * b
    if da is None:
        return db * a
    t: Tensor = da * b
    return t.addcmul_(a, db) if t.shape == y.shape and t.dtype == y.dtype else torch.addcmul(t, a, db)


def _div(y: Tensor, a: Any, da: Any, b: Any, db: Any, rounding_mode: str | None = None) -> Tensor | None:
    if rounding_mode is not None:
        return None
    if db is None:
        return da / b
    t = (y * db).neg_() if da is None else torch.addcmul(da, y, db, value=-1)
    return t.div_(b) if t.dtype == y.dtype else t / b


def _pow(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor | None:
    t: Tensor | None = None
    if da is not None:
        da = da.to(y.dtype)
        if isinstance(b, Tensor):
            slope = torch.where(b == 0, 0.0, b * torch.pow(a, b - 1))
            t = slope * da
        elif b == 0:
            t = None
        elif b == 1:
            t = da
        elif b == 2:
            t = (da * a).mul_(2)
        else:
            t = torch.pow(a, b - 1).mul_(b).mul_(da)
    if db is not None:
        base = torch.as_tensor(a, dtype=y.dtype, device=y.device)
        power = torch.as_tensor(b).real
        slope = torch.where((base == 0) & (power >= 0), 0.0, y * torch.log(base))
        t = slope * db if t is None else torch.addcmul(t, slope, db)
    return t


def _modulo(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor:
    """`y = a - q b`, with an integer q that stays as it is."""
    if db is None:
        return da
    turned = torch.round((a - y) / b) * db
    return -turned if da is None else da - turned


def _atan2(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor:
    t: Any = 0.0 if da is None else b * da
    return (t if db is None else t - a * db) / (a * a + b * b)


def _hypot(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor:
    t: Any = 0.0 if da is None else a * da
    return (t if db is None else t + b * db) / y


def _logaddexp(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor:
    t: Any = 0.0 if da is None else torch.exp(a - y) * da
    return t if db is None else t + torch.exp(b - y) * db


def _extreme(sign: float) -> Callable[..., Tensor]:
    """Maximum (sign 1) or minimum (-1); equal elements share the derivative, as in PyTorch."""

    def derivative(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor:
        da = 0.0 if da is None else da
        db = 0.0 if db is None else db
        chosen = torch.where((a > b) if sign > 0 else (a < b), da, db)
        return torch.where(a == b, (da + db) / 2, chosen)

    return derivative


def _complex(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor:
    da = torch.zeros_like(a) if da is None else da
    return torch.complex(da, torch.zeros_like(b) if db is None else db)


def _heaviside(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor | None:
    return None if db is None else torch.where(a == 0, db, 0.0)


def _polar(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor:
    t = None if da is None else torch.polar(torch.ones_like(a), b) * da
    turned = None if db is None else y * torch.complex(torch.zeros_like(db), db)
    return turned if t is None else t if turned is None else t + turned  # type: ignore[return-value]


def _copysign(y: Tensor, a: Any, da: Any, b: Any, db: Any) -> Tensor | None:
    return None if da is None else torch.where(y == a, da, -da).masked_fill_(a == 0, 0.0)


register(binary(_add), "add", "Tensor.__add__", "Tensor.__radd__")
register(binary(_sub), "sub", "subtract", "Tensor.__sub__")
register(binary(swapped(_sub)), "rsub", "Tensor.__rsub__")
register(binary(_mul), "mul", "multiply", "Tensor.__mul__", "Tensor.__rmul__")
register(binary(_div), "div", "divide", "true_divide", "Tensor.__div__", "Tensor.__truediv__")
register(binary(swapped(_div)), "Tensor.__rdiv__", "Tensor.__rtruediv__")
register(binary(_pow), "pow", "Tensor.__pow__")
register(binary(swapped(_pow)), "Tensor.__rpow__")
register(binary(_modulo), "remainder", "fmod", "Tensor.__mod__")
register(binary(swapped(_modulo)), "Tensor.__rmod__")
register(binary(_atan2), "atan2", "arctan2")
register(binary(_hypot), "hypot")
register(binary(_logaddexp), "logaddexp")
register(binary(_extreme(1)), "maximum")
register(binary(_extreme(-1)), "minimum")
register(binary(_complex), "complex")
register(binary(_polar), "polar")
register(binary(_heaviside), "heaviside")
register(binary(_copysign), "copysign")


def _split(values: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Primals, and tangents with None for those that have none."""
    return list(strip(values)), [v.tangent if type(v) is Dual else None for v in values]


def addcmul(func: Any, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """`input + value a b`."""
    (x, a, b), (dx, da, db) = _split((input, tensor1, tensor2))
    primal = func(x, a, b, value=value)
    with no_grad():
        t = torch.zeros((), dtype=primal.dtype, device=primal.device) if dx is None else dx
        if da is not None:
            t = torch.addcmul(t, da, b, value=value)
        if db is not None:
            fresh = da is not None and t.shape == primal.shape and t.dtype == primal.dtype
            t = t.addcmul_(a, db, value=value) if fresh else torch.addcmul(t, a, db, value=value)
        return pair(primal, t)


def addcdiv(func: Any, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Any:
    """`input + value a / b`."""
    (x, a, b), (dx, da, db) = _split((input, tensor1, tensor2))
    primal = func(x, a, b, value=value)
    with no_grad():
        t = torch.zeros((), dtype=primal.dtype, device=primal.device) if dx is None else dx
        if da is not None:
            t = torch.addcdiv(t, da, b, value=value)
        if db is not None:
            t = torch.addcdiv(t, a * db, b * b, value=-value)
        return pair(primal, t)


def lerp(func: Any, input: Any, end: Any, weight: Any) -> Any:
    """`x + w (end - x)`."""
    (x, e, w), (dx, de, dw) = _split((input, end, weight))
    primal = func(x, e, w)
    with no_grad():
        t = None
        if dx is not None or de is not None:
            t = torch.lerp(torch.zeros_like(x) if dx is None else dx, torch.zeros_like(e) if de is None else de, w)
        if dw is not None:
            t = (e - x) * dw if t is None else torch.addcmul(t, e - x, dw)
        return pair(primal, t)


def prelu(func: Any, input: Any, weight: Any) -> Any:
    """`x` or `w x` where x is negative, with one slope w for all or one for each channel, on axis 1."""
    (x, w), (dx, dw) = _split((input, weight))
    primal = func(x, w)
    shape = (-1, *[1] * (x.ndim - 2)) if x.ndim > 1 else (-1,) if x.ndim else ()
    with no_grad():
        t = 0.0 if dx is None else torch.where(x > 0, dx, w.reshape(shape) * dx)
        return pair(primal, t if dw is None else t + torch.where(x > 0, 0.0, x * dw.reshape(shape)))


def where(func: Any, condition: Any, input: Any = None, other: Any = None, **kwargs: Any) -> Any:
    """`a` where the condition holds, else `b`; with a condition alone, its places."""
    input = kwargs.get("self", input)
    if input is None:
        return func(strip(condition))
    (a, b), (da, db) = _split((input, other))
    primal = func(strip(condition), a, b)
    with no_grad():
        return pair(primal, torch.where(strip(condition), 0.0 if da is None else da, 0.0 if db is None else db))


def masked_fill(func: Any, input: Any, mask: Any, value: Any) -> Any:
    """`x` with `value` under the mask."""
    (x, v), (dx, dv) = _split((input, value))
    primal = func(x, mask, v)
    with no_grad():
        if dv is None:
            return pair(primal, dx.masked_fill(mask, 0.0))
        return pair(primal, (torch.zeros_like(x) if dx is None else dx).masked_fill(mask, dv))


def clamp(func: Any, input: Any, min: Any = None, max: Any = None) -> Any:
    """Clamping passes the tangent on where the value is kept, its bounds included."""
    (x, low, high), (dx, dlow, dhigh) = _split((input, min, max))
    primal = func(x, low, high)
    with no_grad():
        if not isinstance(low, Tensor) and not isinstance(high, Tensor):
            return pair(primal, torch.where(primal == x, dx, 0.0))
        t = 0.0 if dx is None else dx
        if low is not None:
            t = torch.where(x < low, 0.0 if dlow is None else dlow, t)
        if high is not None:
            above = x > high if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype)) > high
            t = torch.where(above, 0.0 if dhigh is None else dhigh, t)
        return pair(primal, t)


def clamp_min(func: Any, input: Any, min: Any) -> Any:
    """`clamp(x, min=min)`."""
    return clamp(lambda x, low, high: func(x, low), input, min, None)


def clamp_max(func: Any, input: Any, max: Any) -> Any:
    """`clamp(x, max=max)`."""
    return clamp(lambda x, low, high: func(x, high), input, None, max)


register(addcmul, "addcmul")
register(addcdiv, "addcdiv")
register(lerp, "lerp")
register(prelu, "prelu")
register(where, "where")
register(lambda func, input, condition, other: where(torch.where, condition, input, other), "Tensor.where")
register(masked_fill, "masked_fill")
register(clamp, "clamp", "clip")
register(clamp_min, "clamp_min")
register(clamp_max, "clamp_max")
