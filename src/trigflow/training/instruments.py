"""Stability instruments: what decides whether a training holds, measured beside it at every line of the log.

Switched on by `loop.instruments`. The weights, the random numbers and so the outcome of a run are the same with and without
them, bit for bit. Most figures come from a *probe*: up to 64 samples of the last batch, noised at the centres of the eight
time bins, so that every line says something of every time, also of those that training seldom draws.

One of them is the arithmetic in which a network computes its time embedding. The consistency tangent contains the time
derivative of everything between t and the scales, shifts and gates that it becomes. That path has to be computed in float32 or
higher, also where the rest of the network runs in half precision (Lu and Song 2025, section 4.1): with 8 bits a time of 1.5 is
known to 0.004 only, and the derivative is that of the rounding. A network of one's own under autocast computes it in bfloat16
unless it is told otherwise.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trigflow import tangent as tangent_engine
from trigflow.conditions import Conditions, takes
from trigflow.networks import DDPMPP, EDM2
from trigflow.networks.embeddings import Conditioning, c_noise
from trigflow.networks.layers import full_precision
from trigflow.objectives import eulerian_tangent
from trigflow.objectives.objective import per_sample_mean_square
from trigflow.process import HALF_PI, trig
from trigflow.segments import segment_bounds
from trigflow.training.batch import Batch, conditions_of
from trigflow.training.config import EMAConfig
from trigflow.training.ema import EMA
from trigflow.training.log import TIME_BINS, FigureWindow
from trigflow.training.losses import Losses

PROBE = 64
"""Samples of the probe, at most."""
LONGER = 0.1
"""Relative width of the power-function average of the weights that the run's own is compared with."""
AT_LEAST = 8
"""Weights that the longer average must have taken in before it is compared."""


class Instruments:
    """Takes measurements of a training run. The `average` is the averaged network that it keeps.

    Source of what is measured: Lu and Song 2025, section 4, which takes the tangent apart to find what makes it unstable.
    """

    def __init__(self, losses: Losses, average: nn.Module) -> None:
        self.losses = losses
        self.average = average
        self.network = losses.student.network
        self.longer = EMA(EMAConfig(kind="power", sigma_rel=LONGER), self.network)
        self.taken = 0
        self.start: float | None = None
        self.batch: Batch = {}
        self.grad_norms: list[Tensor] = []
        self.arithmetic: dict[str, Any] | None = None

    def watch(self, iteration: int, batch: Batch, grad_norm: Tensor) -> None:
        """Take in the batch of a step, or a part of it, and the norm of its gradient before clipping; ahead of its update."""
        self.batch = batch
        self.grad_norms.append(grad_norm)
        if iteration == 0:
            self.start = self._probe().get("probe_error")
            self.taken = 0

    def read(self) -> dict[str, Any]:
        """The figures of a line of the log, after a step whose gradients are still there::

            grad_norm_max, grad_norm_median     of the norm of the gradient, over the steps since the last line
            grad_norm/PART                      of the last step, before clipping, by part of the network
            embedding_derivative_by_time        ||de/dt|| / ||e|| of the conditioning vector e at the centres of the bins
            embedding_derivative_end            the same at t_max
            time_operations, time_half          operations of the time embedding, and how many of them in half precision
            time_dtype                          their coarsest dtype
            weight_by_time                      w(t) at the centres of the bins
            data_mean, data_std                 of the elements of x0
            ema_lag                             ||averaged weights - weights|| / ||weights||
            probe_error[_by_time]               of a student ||g|| at r = 1, of a teacher the mean squared error
            probe_error_ema, probe_error_longer the same of the averaged weights, and of a longer average
            probe_start                         probe_error of the weights that the run started from
            probe_velocity[_by_time]            ||cos^2(t) (sd F - dx_t/dt)||
            probe_state[_by_time]               ||cos(t) sin(t) x_t||
            probe_derivative[_by_time]          ||cos(t) sin(t) sd dF/dt||, and its two summands:
            probe_space[_by_time]               through x_t, ||cos(t) sin(t) sd (dF/dx) (dx_t/dt / sd)||
            probe_clock[_by_time]               through t,   ||cos(t) sin(t) sd (partial F / partial t)||

        Norms of the probe are root mean squares over the elements of a sample, means over the samples. What cannot be
        measured in a run is left out.
        """
        result: dict[str, Any] = {**self._gradients(), **self._embedding(), **self._weights(), **self._probe()}
        x0 = self.batch["x0"].float()
        if self.start is not None:
            result["probe_start"] = self.start
        return {**result, "data_mean": x0.mean().item(), "data_std": x0.std(correction=0).item()}

    # Gradient and weights --------------------------------------------------------------------------------------------

    def _gradients(self) -> dict[str, Any]:
        if not self.grad_norms:
            return {}
        norms, self.grad_norms = torch.stack(self.grad_norms).tolist(), []
        after = _norm([p.grad for p in self.losses.student.parameters if p.grad is not None])
        unclipped = norms[-1] / after if after else 1.0
        parts = {
            f"grad_norm/{name}": unclipped * _norm([p.grad for p in part.parameters() if p.grad is not None])
            for name, part in parts_of(self.network).items()
        }
        return {"grad_norm_max": max(norms), "grad_norm_median": statistics.median(norms), **parts}

    def _weights(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        weight = self.losses.student.weights.get("weight")
        if weight is not None and not getattr(self.losses.config.objective, "alone", False):
            with torch.no_grad():
                result["weight_by_time"] = weight(bin_centres(self._device)).tolist()
        raw = [p.detach() for p in self.network.parameters()]
        differences = torch._foreach_sub([p.detach() for p in self.average.parameters()], raw)
        return {**result, "ema_lag": _norm(list(differences)) / max(_norm(raw), 1e-30)}

    # Time embedding --------------------------------------------------------------------------------------------------

    def _embedding(self) -> dict[str, Any]:
        embed = embedding_of(self.network)
        if embed is None:
            return {}
        centres = bin_centres(self._device)
        t = torch.cat([centres, centres.new_tensor([self.losses.config.process.t_max])])
        with torch.no_grad():
            *derivatives, end = relative_derivative(embed, t).tolist()
        return {"embedding_derivative_by_time": derivatives, "embedding_derivative_end": end}

    # Probe -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _probe(self) -> dict[str, Any]:
        """Tangent and its parts, or the error of a teacher, by time; the same of two averages of the weights."""
        objective, process = self.losses.config.objective, self.losses.config.process
        batch = {name: value[:PROBE] for name, value in self.batch.items()}
        n = len(batch["x0"])
        t = bin_centres(self._device)[(torch.arange(n) + self.taken) % TIME_BINS]
        x_t = process.interpolate(batch["x0"], batch["noise"], t)
        conditions, end = conditions_of(batch), segment_bounds(t, getattr(objective, "segments", 1))[0]
        if "end" in takes(self.network):
            conditions["end"] = end
        self.taken += 1
        self.longer.update(self.network, self.taken, 1)
        result: dict[str, Any] = {}
        networks = {"": self.network.eval(), "_ema": self.average}
        if self.taken >= AT_LEAST:
            networks["_longer"] = self.longer.network
        with self.losses.precision():
            if self.arithmetic is None:  # it does not change
                two = {name: c[:2] for name, c in conditions.items()}
                found = time_arithmetic(self.network, x_t[:2] / process.sigma_data, t[:2], two)
                self.arithmetic = {} if found is None else {f"time_{name}": value for name, value in vars(found).items()}
            result |= self.arithmetic
            if objective.probe == "error":
                v = process.velocity(batch["x0"], batch["noise"], t)
                figures = {
                    f"probe_error{name}": per_sample_mean_square(
                        process.sigma_data * network(x_t / process.sigma_data, t, **conditions) - v
                    )
                    for name, network in networks.items()
                }
            elif objective.probe == "tangent":
                v = process.velocity(batch["x0"], batch["noise"], t)
                if objective.distills:
                    v = self.losses.teacher_velocity(batch)(x_t, t).to(x_t.dtype)
                figures = self._tangents(networks, x_t, v, t, end, conditions)
            else:
                figures = {}
        self.network.train()
        if figures:
            window = FigureWindow()
            window.add({"t": t, **{name: value.float() for name, value in figures.items()}})
            result |= window.flush()
        return result

    def _tangents(
        self, networks: dict[str, nn.Module], x_t: Tensor, dxdt: Tensor, t: Tensor, end: Tensor, conditions: Conditions
    ) -> dict[str, Tensor]:
        """Norms of the tangent for each of the networks, and of its parts for the first."""
        process = self.losses.config.process
        sd, told = process.sigma_data, {name: value for name, value in conditions.items() if name != "end"}
        cos, sin = trig(t - end, x_t)
        x = x_t / sd

        def along(dx: Tensor | None, dt: Tensor | None) -> tuple[Tensor, Tensor]:
            """F, and `cos sin sd` times its derivative along x or t."""
            forward = lambda *inputs: self.network(*inputs, **conditions)  # noqa: E731
            prediction, derivative = tangent_engine.jvp(forward, (x, t), (dx, dt))
            return prediction.to(x.dtype), sd * derivative.to(x.dtype)

        prediction, space = along((cos * sin * dxdt / sd).to(x.dtype), None)
        _, clock = along(None, (cos * sin).reshape(t.shape).to(t.dtype))
        parts = {
            "velocity": cos**2 * (sd * prediction - dxdt),
            "state": cos * sin * x_t,
            "derivative": space + clock,
            "space": space,
            "clock": clock,
        }
        figures = {f"probe_{name}": _rms(value) for name, value in parts.items()}
        for name, network in networks.items():
            g = -(parts["velocity"] + parts["state"] + parts["derivative"])
            if network is not self.network:
                g = eulerian_tangent(network, process, x_t, dxdt, t, end, told)[1]
            figures[f"probe_error{name}"] = _rms(g)
        return figures

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device


def bin_centres(device: torch.device | None = None) -> Tensor:
    """Centres of the time bins, `(TIME_BINS,)`."""
    return (torch.arange(TIME_BINS, device=device) + 0.5) * (HALF_PI / TIME_BINS)


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network by name: its children, or those of its only child."""
    while True:
        parts = {name: part for name, part in network.named_children() if any(True for _ in part.parameters())}
        if len(parts) != 1 or not any(True for _ in next(iter(parts.values())).children()):
            return parts
        network = next(iter(parts.values()))


def embedding_of(network: nn.Module) -> Callable[..., Tensor] | None:
    """The function from times `(b,)`, and labels where it is to know them, to the conditioning vector `(b, e)`, at guidance 1;
    None for a network that has none by a name known here."""
    known: Any = network

    def embed(t: Tensor, label: Tensor | None = None) -> Tensor:
        values = {"guidance": torch.ones_like(t), "end": torch.zeros_like(t)}
        told = {name: value for name, value in values.items() if name in takes(network)}
        told |= {} if label is None else {"label": label}
        with full_precision(t):
            if isinstance(network, DDPMPP):
                noise = c_noise(t, network.config.conditioning.time_map, network.sigma_data)
                return network.model.embed(noise, label, None, None)
            return known.unet.embed(t, None, **told) if isinstance(network, EDM2) else known.conditioning(t, **told)

    has = isinstance(network, DDPMPP | EDM2) or isinstance(getattr(network, "conditioning", None), Conditioning)
    return embed if has else None


def relative_derivative(embed: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """`||de/dt|| / ||e||` at each of these times, exactly: by how much of itself the embedding changes in a unit of time.

    Shapes: `(n,)` to `(n,)`. Independent of the scale of e, which the layers that follow it make up for.
    """
    e, derivative = tangent_engine.jvp(embed, (t,), (torch.ones_like(t),))
    return _rms(derivative) / _rms(e).clamp_min(1e-30)


def _rms(x: Tensor) -> Tensor:
    return per_sample_mean_square(x).sqrt()


def _norm(tensors: list[Any]) -> float:
    """`||.||` over all elements."""
    if not tensors:
        return 0.0
    return math.sqrt(math.fsum(norm.item() ** 2 for norm in torch._foreach_norm(tensors)))


HALF = (torch.bfloat16, torch.float16)
MOVES = frozenset({"_to_copy", "copy_", "clone", "cat", "stack", "split", "detach", "_unsafe_view"})
"""Operations that compute nothing: where data goes, or its dtype. Views are recognized by their memory."""


@dataclass(frozen=True)
class Arithmetic:
    """The operations that depend on the time and not yet on the image."""

    operations: int
    """How many."""
    half: int
    """How many of them in bfloat16 or float16."""
    dtype: str
    """The coarsest dtype among them: float64, float32, float16 or bfloat16."""


def time_arithmetic(network: Callable[..., Any], x: Tensor, t: Tensor, conditions: Conditions) -> Arithmetic | None:
    """Watch one evaluation `network(x, t, **conditions)` and tell the arithmetic of its time embedding; None where nothing can
    be seen: a network without a time, or of operations that PyTorch does not show. A sample or two of x suffice.

    Whatever is computed from t and not from x is followed by its memory, so the network may be any. A last conversion to
    half precision, for use beside the image, is no computation and does not count.
    """
    watch = _Watch(x, t)
    with torch.no_grad(), watch:
        network(x, t, **conditions)
    if not watch.dtypes:
        return None
    coarsest = max(watch.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    half = sum(dtype in HALF for dtype in watch.dtypes)
    return Arithmetic(len(watch.dtypes), half, str(coarsest).removeprefix("torch."))


class _Watch(TorchDispatchMode):
    """Follows which memory depends on t and which on x, and keeps the dtype of every operation on t alone."""

    def __init__(self, x: Tensor, t: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: list[Tensor] = []  # so that no memory is used twice
        self.from_t: set[int] = set()
        self.from_x: set[int] = set()
        self.dtypes: list[torch.dtype] = []
        self._note([t], from_t=True, from_x=False)
        self._note([x], from_t=False, from_x=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = _tensors((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        memory = {_memory(x) for x in inputs}
        from_t, from_x = bool(memory & self.from_t), bool(memory & self.from_x)
        outputs = _tensors(result)
        self._note(outputs, from_t, from_x)
        if from_t and not from_x and not self._moves(func, outputs, memory):
            dtypes = [x.dtype for x in [*inputs, *outputs] if x.is_floating_point()]
            if dtypes:
                self.dtypes.append(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps))
        return result

    def _note(self, tensors: list[Tensor], from_t: bool, from_x: bool) -> None:
        self.kept += tensors
        memory = {_memory(x) for x in tensors}
        if from_t:
            self.from_t |= memory
        if from_x:
            self.from_x |= memory

    def _moves(self, func: Any, outputs: list[Tensor], memory: set[int]) -> bool:
        view = not func._schema.is_mutable and all(_memory(x) in memory for x in outputs)
        return view or func._schema.name.split("::")[1] in MOVES


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()
