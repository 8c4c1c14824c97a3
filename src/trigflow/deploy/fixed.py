"""Variants that are recorded once for each of a few batch sizes and then replayed, with buffers that stay in place."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from trigflow.conditions import in_order, null, takes
from trigflow.runtime.errors import UserError

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Batch sizes that are recorded: another is padded to the next of them, or cut into several."""
PADDING = 8
"""Rows that are padded at most where the alternative is another call: beyond its rows, a call of a small network costs about
as much as this many of them."""

Replay = Callable[[Tensor, list[Tensor]], Tensor]
"""`F` from the buffer of x `(size, *shape)`, and the times and conditions in use, in order."""


class Variant(nn.Module):
    """A network `F(x, t, **conditions)` in the place of another, which is in eval mode, with its attributes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.takes, self.null = takes(network), null(network)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        return self.network(x, t, **conditions)


class FixedSizes(Variant):
    """Calls of any batch size, made of calls of a few.

    The batch is cut into parts as `cut` says, and each part copied into a buffer of its size (what lies behind it is computed
    and thrown away; samples of a batch know nothing of each other). Each size is recorded when it is first needed. Calls from
    several threads take turns.
    """

    def __init__(self, network: nn.Module, sizes: Sequence[int] = SIZES) -> None:
        super().__init__(network)
        self.sizes = tuple(sizes)
        self.lock = threading.Lock()
        self.recorded: dict[tuple[object, ...], tuple[Tensor, list[Tensor], Replay]] = {}

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        names = in_order(conditions)
        given = [t, *(conditions[name] for name in names)]
        results, first = [], 0
        for size in cut(len(x), self.sizes):
            rows = slice(first, first + size)
            results.append(self._part(size, x[rows], names, [v[rows] for v in given]))
            first += size
        return results[0] if len(results) == 1 else torch.cat(results)

    def _part(self, size: int, x: Tensor, names: tuple[str, ...], given: Sequence[Tensor]) -> Tensor:
        """A call of at most `size` rows."""
        n = len(x)
        key = (size, x.dtype, x.shape[1:], names)
        with self.lock:
            if key not in self.recorded:
                with torch.inference_mode(False), torch.no_grad():
                    self.recorded[key] = self.start(size, x, names, given)
            buffer, held, replay = self.recorded[key]
            buffer.detach_()  # from the graph of an earlier call with gradients
            buffer[:n].copy_(x)
            for mine, value in zip(held, given, strict=True):
                mine[:n].copy_(value)
                mine[n:].copy_(value[:1])  # a time and conditions that exist
            return replay(buffer, held)[:n].to(x.dtype)

    def start(
        self, size: int, x: Tensor, names: tuple[str, ...], given: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor], Replay]:
        """Buffers for this size, and the call recorded on them."""
        buffer = torch.zeros(size, *x.shape[1:], dtype=x.dtype, device=x.device)
        buffer = buffer.to(memory_format=torch.channels_last) if buffer.ndim == 4 else buffer
        buffer.copy_(x[:1])
        held = [v[:1].expand(size, *v.shape[1:]).clone() for v in given]

        def call(x: Tensor, t: Tensor, *values: Tensor) -> Tensor:
            return self.network(x, t, **dict(zip(names, values, strict=True)))

        replay = self.record(call, buffer, held)
        self.check(call, replay, buffer, dict(zip(("t", *names), held, strict=True)))
        return buffer, held, replay

    def record(self, call: Callable[..., Tensor], buffer: Tensor, held: list[Tensor]) -> Replay:
        """What computes `call(buffer, *held)` from now on."""
        raise NotImplementedError

    def check(self, call: Callable[..., Tensor], replay: Replay, buffer: Tensor, held: dict[str, Tensor]) -> None:
        """Compare with the network at other inputs than the recorded ones. Raises a UserError where they differ: the network
        decides by its inputs what it computes, which a recording cannot."""
        generator = torch.Generator().manual_seed(0)
        buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float32))
        held["t"].mul_(0.5)
        if "label" in held and "label" in self.null:
            held["label"].copy_(torch.arange(len(buffer)).add_(1).remainder_(int(self.null["label"]) + 1))
        values = list(held.values())
        expected = call(buffer, *values)
        difference = float((replay(buffer, values) - expected).abs().max())
        scale = float(expected.abs().max())
        if not difference <= 1e-3 * max(scale, 1e-3):
            raise UserError(
                f"a recording of the network differs from it by {difference:.2g}; expected a network that computes the same "
                "for every input; use the variant plain"
            )


def cut(rows: int, sizes: Sequence[int]) -> list[int]:
    """The sizes of the calls that compute this many rows, the last of them padded where it is larger than what is left.

    What is left is padded to the next size if that takes at most `PADDING` rows, or if no size is smaller; otherwise the next
    smaller one is cut off.
    """
    parts = []
    while rows > 0:
        i = bisect_left(sizes, rows)
        padded = i < len(sizes) and (i == 0 or sizes[i] - rows <= PADDING)
        parts.append(sizes[i] if padded else sizes[i - 1])
        rows -= parts[-1]
    return parts
