"""Recurrent layers and cells: RNN, LSTM, GRU.

The primal is PyTorch's own kernel, with its backward. These kernels have no forward derivative and keep their inner states
to themselves, so the tangent comes from the equations of the cell, run step by step on duals without a graph. It costs about
two more forwards of the layer.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trigflow.tangent.dispatch import replayed_draws, unsupported
from trigflow.tangent.dual import Dual, Handler, no_grad, pair, strip
from trigflow.tangent.rules.shape import linear
from trigflow.tangent.table import register

State = tuple[Any, ...]
Weights = tuple[Any, ...]
"""Input weight, state weight, their two biases or None, and the projection of an LSTM or None."""


def _gates(x: Any, h: Any, w: Weights) -> tuple[Any, Any]:
    return F.linear(x, w[0], w[2]), F.linear(h, w[1], w[3])


def _rnn(activation: Any) -> Any:
    """`h' = act(W x + U h + b)`."""

    def cell(x: Any, state: State, w: Weights) -> State:
        a, b = _gates(x, state[0], w)
        return (activation(a + b),)

    return cell


def _lstm(x: Any, state: State, w: Weights) -> State:
    """`c' = f c + i g`, `h' = o tanh(c')`, projected where the layer has a projection."""
    a, b = _gates(x, state[0], w)
    i, f, g, o = (a + b).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w[4] is None else F.linear(h, w[4]), c)


def _gru(x: Any, state: State, w: Weights) -> State:
    """`n = tanh(W x + r (U h))`, `h' = n + z (h - n)`."""
    a, b = _gates(x, state[0], w)
    (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
    n = torch.tanh(an + torch.sigmoid(ar + br) * bn)
    return (n + torch.sigmoid(az + bz) * (state[0] - n),)


CELLS: dict[str, Any] = {"rnn_tanh": _rnn(torch.tanh), "rnn_relu": _rnn(torch.relu), "lstm": _lstm, "gru": _gru}


def _direction(cell: Any, steps: list[Any], state: State, w: Weights, reverse: bool) -> tuple[list[Any], State]:
    """One layer in one direction. Packed sequences are sorted by length, so those that take part in a step come first."""
    outputs = []
    for x in reversed(steps) if reverse else steps:
        n, rows = x.shape[0], state[0].shape[0]
        new = cell(x, tuple(s[:n] for s in state) if n < rows else state, w)
        outputs.append(new[0])
        state = tuple(torch.cat([a, s[n:]]) for a, s in zip(new, state, strict=True)) if n < rows else new
    return (outputs[::-1] if reverse else outputs), state


def _layers(
    cell: Any, steps: list[Any], initial: State, groups: list[Weights], directions: int, dropout: float
) -> tuple[list[Any], State]:
    """The whole stack: outputs of each step, and the last states, each `(layers * directions, batch, features)`."""
    last = []
    for layer in range(0, len(groups), directions):
        found = []
        for i in range(layer, layer + directions):
            outputs, state = _direction(cell, steps, tuple(s[i] for s in initial), groups[i], reverse=i > layer)
            found.append(outputs)
            last.append(state)
        steps = found[0] if directions == 1 else [torch.cat(both, -1) for both in zip(*found, strict=True)]
        if dropout and layer + directions < len(groups):
            values = torch.cat(strip(steps))
            masks = F.dropout(torch.ones_like(values), dropout).split([x.shape[0] for x in steps])
            steps = [x * mask for x, mask in zip(steps, masks, strict=True)]
    return steps, tuple(torch.stack(list(s)) for s in zip(*last, strict=True))


def _groups(params: Any, biases: bool, count: int) -> list[Weights]:
    """The flat list of parameters, by layer and direction."""
    size = len(params) // count
    groups = []
    for i in range(0, len(params), size):
        one = list(params[i : i + size])
        middle = one[2:4] if biases else [None, None]
        projected = one[-1] if size > 2 + 2 * biases else None
        groups.append((one[0], one[1], *middle, projected))
    return groups


def recurrent(cell: Any) -> Handler:
    """Handler of `torch.lstm`, `torch.gru`, ... in both forms: `(x, state, params, ...)`, and packed, with batch sizes."""

    def handler(func: Any, *args: Any) -> Any:
        packed = isinstance(args[3], (tuple, list))
        x, sizes, initial, params, biases, count, dropout, train, both = args[:9] if packed else (args[0], None, *args[1:8])
        directions = 2 if both else 1
        dropout = dropout if train and count > 1 else 0.0
        with replayed_draws(strip(x).device, []) as draws:
            primal = func(*strip(args))
            draws.rewind()
            with no_grad(), torch.autocast(strip(x).device.type, enabled=False):
                x, initial, params = _to(primal[0].dtype, (x, initial, params))
                time = 1 if not packed and args[8] else 0
                steps = list(x.split(sizes.tolist()) if packed else x.unbind(time))
                states = tuple(initial) if isinstance(initial, (tuple, list)) else (initial,)
                groups = _groups(params, biases, count * directions)
                outputs, last = _layers(cell, steps, states, groups, directions, dropout)
                out = torch.cat(outputs) if packed else torch.stack(outputs, time)
                if dropout and not torch.allclose(strip(out).to(primal[0].dtype), primal[0], rtol=1e-2, atol=1e-3):
                    raise unsupported(func, "the dropout mask of this kernel cannot be drawn again")
        return _with_tangents(primal, (out, *last))

    return handler


def recurrent_cell(cell: Any) -> Handler:
    """Handler of `torch.lstm_cell` and its like: one step, with parameters as arguments."""

    def handler(func: Any, x: Any, hx: Any, w: Any, u: Any, b: Any = None, c: Any = None) -> Any:
        primal = func(*strip((x, hx, w, u, b, c)))
        with no_grad(), torch.autocast(strip(x).device.type, enabled=False):
            dtype = (primal[0] if isinstance(primal, tuple) else primal).dtype
            x, hx, weights = _to(dtype, (x, hx, (w, u, b, c, None)))
            new = cell(x, hx if isinstance(hx, tuple) else (hx,), weights)
        return _with_tangents(primal, new if isinstance(primal, tuple) else new[0])

    return handler


def _to(dtype: torch.dtype, value: Any) -> Any:
    """Everything in the precision in which the kernel ran, whatever autocast is in force."""
    if isinstance(value, (tuple, list)):
        return tuple(_to(dtype, v) for v in value)
    return value if value is None else value.to(dtype)


def _with_tangents(primal: Any, computed: Any) -> Any:
    """The kernel's outputs with the tangents of the step-by-step run."""
    if isinstance(primal, tuple):
        return tuple(_with_tangents(p, c) for p, c in zip(primal, computed, strict=True))
    return pair(primal, computed.tangent) if type(computed) is Dual else primal


def padded(func: Any, data: Any, sizes: Tensor, first: bool, value: float, length: int) -> Any:
    """Unpacking sequences, with `value` past their ends and nothing there in the tangent."""
    primal = func(data.primal, sizes, first, value, length)
    with no_grad():
        return pair(primal, func(data.tangent, sizes, first, 0.0, length))


register(linear, "_pack_padded_sequence")
register(padded, "_pad_packed_sequence")
for _name, _cell in CELLS.items():
    register(recurrent(_cell), _name)
    register(recurrent_cell(_cell), f"{_name}_cell")
