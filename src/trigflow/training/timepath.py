"""The time path of a network (time in, modulations out) exchanged for the stable one, and fitted to the one it replaces.

`c_noise = log(sd tan t) / 4` and Fourier features make the consistency tangent unstable; identity time with positional
features does not (Lu and Song 2025, section 4.1). All other weights stay. The new path is fitted in two steps, neither of
which needs data:

1. closed form: the layer on the raw features reproduces what it made of the old ones, as far as a linear map of the new ones
   can (`absorb_features`, or `fit_unit_rows` where the rows of the layer have unit length);
2. regression: all layers from the time to the scales and shifts of the blocks, by Adam, on times of the proposal and on all
   classes.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trigflow.conditions import null
from trigflow.networks import DDPMPP, EDM2, DDPMPPConfig, EDM2Config, NetworkConfig
from trigflow.networks.edm2 import EDM2Block
from trigflow.networks.embeddings import c_noise
from trigflow.networks.magnitude import MPConv
from trigflow.process import Proposal, TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.training.instruments import embedding_of

ModulationChoice = Literal["keep", "double"]

TIMES = 4096
"""Times of the closed-form fit, at equal steps of probability under the proposal."""
RIDGE = 1e-4
"""Share of the features' power added to their covariance: keeps the slope of the fitted path in time bounded."""
STEP = 3e-3
"""Largest step of the regression, relative to the size of a weight."""


def stable_config(config: NetworkConfig, modulation: ModulationChoice = "keep") -> NetworkConfig:
    """The configuration with identity time and positional features, and double normalization where that is asked for. Raises a
    UserError if that is what the network has already, or `double` is asked of a network that is not EDM2 or DDPM++."""
    published = isinstance(config, EDM2Config | DDPMPPConfig)
    if modulation == "double" and not published:
        raise UserError(
            "double normalization for another network than edm2 or ddpmpp; expected the modulation as it is; use keep"
        )
    stable = dataclasses.replace(config.conditioning, time_map="identity", time_embedding="positional")
    changes: dict[str, Any] = {"conditioning": stable}
    if modulation == "double":
        changes["modulation" if isinstance(config, EDM2Config) else "norm"] = "double"
    changed = config.changed(**changes)
    if changed == config:
        raise UserError(
            "the network has identity time and positional features already; expected one with log time or Fourier features, "
            "such as an imported teacher; distill this run as it is"
        )
    return changed


def transplant(new: nn.Module, old: nn.Module) -> list[str]:
    """Copy every weight of the old network that fits the new one; returns the names of those that stay fresh.

    Where a DDPM++ block gets double normalization, its scale starts from AdaGN's, `1 + s`, or from 1 in place of an added
    embedding, which becomes the shift.
    """
    mine, theirs = new.state_dict(), old.state_dict()
    had, has = _norm(old), _norm(new)
    fresh = []
    with torch.no_grad():
        for name, value in mine.items():
            given = theirs.get(name)
            affine = ".affine." in name and given is not None and had != has
            if affine and had == "add":
                scale, shift = value.chunk(2)
                scale.fill_(1.0 if name.endswith("bias") else 0.0)
                shift.copy_(given)
            elif given is None or given.shape != value.shape:
                fresh.append(name)
            else:
                value.copy_(given)
                if affine and name.endswith("bias"):
                    value.chunk(2)[0].add_(1.0)
    return fresh


@dataclass
class TimePath:
    """What lies between the time and the modulations of one network."""

    features: Callable[[Tensor], Tensor]
    """Raw features of times `(n,)`, `(n, width)`."""
    first: nn.Module
    """The layer on them."""
    added: list[Tensor]
    """Weights whose results are added to the features before `first`, one column (or row of an embedding) a class."""
    modulations: Callable[[Tensor, Tensor | None], list[Tensor]]
    """What every block is told at these times and labels, as its own layer gives it."""
    parameters: list[nn.Parameter]
    """The weights on the way."""


def time_path(network: nn.Module, to_blocks: bool = True) -> TimePath:
    """The time path of a network of this library; not `to_blocks`, it ends at the embedding. Raises a UserError for a network
    that has none."""
    embed = embedding_of(network)
    if embed is None:
        raise UserError(
            f"a {type(network).__name__} has no time path that is known; expected edm2, ddpmpp, unet, dit or mlp; convert one"
        )
    part: Any = network  # that has the settings of the path
    if isinstance(network, EDM2):
        part = network.unet
        settings, added, layers = part.config, [], [part.emb_noise]
        clock = part.emb_fourier if settings.time_embedding == "fourier" else part.emb_positional
    elif isinstance(network, DDPMPP):
        settings, body = part.config.conditioning, part.model
        layers, half = [body.map_layer0, body.map_layer1], body.map_layer0.in_features // 2
        clock = lambda noise: body.map_noise(noise).roll(half, 1)  # noqa: E731 - sines before cosines
        outside = [layer for layer in (body.map_label, body.map_augment) if layer is not None]
        added = [w for layer in outside for w in (layer.weight, *([] if layer.bias is None else [layer.bias[:, None]]))]
    else:
        part = part.conditioning
        settings, clock, layers = part.config, part.time, [part.linear1, part.linear2]
        added = [] if part.label is None else [part.label.weight.T]
    heads: list[tuple[Any, list[Any]]] = [
        (m.emb_linear, [m.emb_gain]) if isinstance(m, EDM2Block) else (m.affine, [])
        for m in network.modules()
        if to_blocks and (isinstance(m, EDM2Block) or isinstance(getattr(m, "affine", None), nn.Linear))
    ]

    def features(t: Tensor) -> Tensor:
        return clock(c_noise(t, settings.time_map, part.sigma_data))

    def modulations(t: Tensor, label: Tensor | None) -> list[Tensor]:
        emb = embed(t, label)
        return [math.prod([*gain], start=layer(emb)) for layer, gain in heads] if to_blocks else [emb]

    parameters = [p for layer, gain in [*((layer, []) for layer in layers), *heads] for p in (*layer.parameters(), *gain)]
    return TimePath(features, layers[0], added, modulations, parameters)


# Closed form ---------------------------------------------------------------------------------------------------------


def proposal_times(process: TrigFlow, proposal: Proposal, n: int = TIMES) -> Tensor:
    """`n` times at equal steps of probability under the proposal, float64."""
    middle = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return process.time_from_sigma(torch.exp(proposal.mean + proposal.std * torch.special.ndtri(middle)))


def feature_map(new: Tensor, old: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """A, a of least `E|| A new + a - old ||^2 + rho || A - I ||^2`, for features `(n, w)` of the same width::

        A = (E[old' new'^T] + rho I) (E[new' new'^T] + rho I)^-1,    a = E[old] - A E[new]      (primes: mean removed)

    with `rho = ridge E[|new|^2] / w`. Where the new features do not vary, A is the identity.
    """
    new_mean, old_mean = new.mean(0), old.mean(0)
    centred = new - new_mean
    rho = ridge * new.square().mean() * torch.eye(new.shape[1], dtype=new.dtype, device=new.device)
    covariance = centred.T @ centred / len(new) + rho
    cross = (old - old_mean).T @ centred / len(new) + rho
    linear = torch.linalg.solve(covariance, cross, left=False)
    return linear, old_mean - linear @ new_mean


@torch.no_grad()
def absorb_features(first: nn.Linear, added: list[Tensor], linear: Tensor, offset: Tensor) -> None:
    """Give `first` the weights with which it takes the new features for `linear @ new + offset`; labels keep their effect.

    `W <- W A`, `b <- b + W a`, and what is added to the features `m <- A^-1 m`, in place.
    """
    weight = first.weight.to(linear)
    first.bias.add_((weight @ offset).to(first.bias))
    first.weight.copy_(weight @ linear)
    for columns in added:
        columns.copy_(torch.linalg.solve(linear, columns.to(linear)))


@torch.no_grad()
def fit_unit_rows(new: Tensor, target: Tensor) -> Tensor:
    """Rows w of unit length with least `E (w . new - y)^2`, one for each column y of the target; `(columns, width)`.

    `(G + mu I) w = E[y new]` with `G = E[new new^T]` and mu above minus the least eigenvalue of G such that `|w| = 1`: the
    exact minimum. It exists because the length can be made up where G is close to zero.

    Args:
        new: features, `(n, width)`, float64.
        target: what the rows are to give, `(n, columns)`, float64.
    """
    values, vectors = torch.linalg.eigh(new.T @ new / len(new))
    right = vectors.T @ (new.T @ target) / len(new)  # (width, columns)
    low = torch.full_like(right[0], -float(values[0])) + 1e-12
    high = low + 1 + right.norm(dim=0)  # |w| <= |right| / (mu + least eigenvalue) < 1 there
    for _ in range(100):
        middle = (low + high) / 2
        long = (right / (values[:, None] + middle)).norm(dim=0) > 1
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    rows = right / (values[:, None] + high)
    rows[0] += (1 - rows.square().sum(0)).clamp_min(0).sqrt()  # what bisection cannot reach, where G is zero
    return (vectors @ rows / rows.norm(dim=0)).T


@torch.no_grad()
def fit_first_layer(new: TimePath, old: TimePath, times: Tensor) -> None:
    """Step 1 of the module docstring, in place."""
    mine, theirs = new.features(times), old.features(times)
    if isinstance(new.first, MPConv) and isinstance(old.first, MPConv):
        weight = old.first.weight.to(theirs)
        target = theirs @ (weight / weight.norm(dim=1, keepdim=True)).T
        new.first.weight.copy_(math.sqrt(mine.shape[1]) * fit_unit_rows(mine, target))
    elif isinstance(new.first, nn.Linear):
        absorb_features(new.first, new.added, *feature_map(mine, theirs))


# Regression ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimeFit:
    """Root mean square error of the modulations over times and classes, relative to how much they vary there."""

    swapped: float
    """With the weights as they were."""
    closed_form: float
    """After the closed form."""
    fitted: float
    """After the regression."""


def fit_time_path(
    network: nn.Module,
    old: nn.Module,
    process: TrigFlow,
    proposal: Proposal,
    *,
    iterations: int = 1000,
    batch_size: int = 256,
    seed: int = 0,
) -> TimeFit:
    """Fit the time path of `network`, which has the weights of `old` otherwise, in place; see the module docstring.

    The regression is kept only where it is better than what it started from.
    """
    alike = _norm(network) == _norm(old)  # where modulations are others, the embedding is all they share
    new_path, old_path = time_path(network, alike), time_path(old, alike)
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    none = null(network).get("label")
    classes = None if none is None else int(none)

    def labels(n: int) -> Tensor | None:
        return None if classes is None else torch.randint(classes + 1, (n,), generator=generator).to(device)

    times = proposal_times(process, proposal)
    grid = times[torch.randperm(len(times), generator=generator)[:1024]].float().to(device)
    fixed = labels(len(grid))

    def error(t: Tensor, label: Tensor | None) -> Tensor:
        """Share of the variation of the old modulations that is missed."""
        with torch.no_grad():
            wanted = old_path.modulations(t, label)
            scale = sum((w - w.mean(0)).square().sum() for w in wanted)
        missed = sum((m - w).square().sum() for m, w in zip(new_path.modulations(t, label), wanted, strict=True))
        return missed / torch.as_tensor(scale).clamp_min(1e-12)

    def measured() -> float:
        with torch.no_grad():
            return math.sqrt(float(error(grid, fixed)))

    swapped = measured()
    fit_first_layer(new_path, old_path, times.to(device))
    closed_form = measured()
    before = copy.deepcopy(network.state_dict())

    def loss() -> Tensor:
        return error(proposal.sample(process, batch_size, generator).to(device), labels(batch_size))

    regress(new_path.parameters, loss, iterations)
    fitted = measured()
    if not fitted < closed_form:
        network.load_state_dict(before)
        fitted = closed_form
    return TimeFit(swapped, closed_form, fitted)


def regress(parameters: list[nn.Parameter], loss: Callable[[], Tensor], iterations: int) -> None:
    """Minimize `loss()` by Adam, each step at most about `STEP` of a parameter's own size, on a cosine to zero."""
    sizes = [max(1e-2, float(p.detach().square().mean().sqrt())) for p in parameters]
    optimizer = torch.optim.Adam([{"params": [p]} for p in parameters], betas=(0.9, 0.99))
    trainable = [p.requires_grad for p in parameters]
    for p in parameters:
        p.requires_grad_(True)
    for i in range(iterations):
        for group, size in zip(optimizer.param_groups, sizes, strict=True):
            group["lr"] = STEP * size * 0.5 * (1 + math.cos(math.pi * i / iterations))
        optimizer.zero_grad()
        with torch.enable_grad():
            loss().backward()
        optimizer.step()
    for p, flag in zip(parameters, trainable, strict=True):
        p.requires_grad_(flag)
        p.grad = None


def _norm(network: nn.Module) -> str | None:
    """The kind of modulation, where kinds have different layers (EDM2's have the same)."""
    return getattr(network.config, "norm", None)
