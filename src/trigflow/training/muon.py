"""Muon: steps of equal size in every direction of a weight matrix."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from trigflow.networks.embeddings import Conditioning
from trigflow.networks.layers import AdaptiveNorm, ConditioningLinear
from trigflow.runtime.distributed.shards import cut_like, from_piece, is_sharded, piece, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients (a, b, c) of the odd polynomial `a s + b s^3 + c s^5`, which moves singular values in (0, 1] towards 1 fast."""
THIN = 32
"""Weights with a side shorter than this are no matrices to Muon."""


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """About `U V^T` for each `G = U S V^T`: every singular value is brought into about [0.7, 1.2].

    The Newton-Schulz iteration `X <- P X`, `P = a I + b A + c A^2`, `A = X X^T`, from `X = G / sqrt(||G G^T||_F)`. As all
    factors commute, A follows by `A <- P A P` and the products of P are applied once, at the end: only square matrices of
    the shorter side are multiplied on the way. Singular values below about 1e-3 of the largest stay smaller than that.

    Shapes: `(n, r, c)` to the same. Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers".
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)  # so that squares neither vanish nor overflow
    gram = x @ x.mT
    size = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(tiny)
    gram = gram / size
    identity = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
    product = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor = product
    for _ in range(steps - 1):
        gram = factor @ gram @ factor
        factor = a * identity + torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        product = factor @ product
    x = product @ (x / size.sqrt())
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


def hidden_matrices(module: nn.Module) -> list[Tensor]:
    """The weights that Muon is for: of linear layers and convolutions with both sides at least `THIN`, in order.

    Layers of the conditioning path and of modulations are left to Adam: few inputs, or outputs that are scales and shifts. An
    encoder of text in that path is not: Adam at Muon's learning rates makes it say the same of every text.
    """
    found: list[Tensor] = []
    for child in module.children():
        if isinstance(child, Conditioning | AdaptiveNorm | ConditioningLinear):
            found += hidden_matrices(child.text) if isinstance(child, Conditioning) and child.text is not None else []
            continue
        if isinstance(child, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if child.weight.requires_grad and min(matrix_shape(child.weight)) >= THIN:
                found.append(child.weight)
        else:
            found += hidden_matrices(child)
    return found


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """`(r, c)` of a weight seen as a matrix."""
    return weight.shape[0], math.prod(weight.shape[1:])


class Muon(torch.optim.Optimizer):
    """Muon for matrices, Adam for every other parameter, in one optimizer::

        m <- momentum m + (1 - momentum) grad
        W <- (1 - lr weight_decay) W - lr 0.2 sqrt(max(r, c)) orthogonalize((1 - momentum) grad + momentum m)

    for a weight seen as a matrix `(r, c)`, r the output features or channels. The factor makes the root mean square of an
    update 0.2 lr, about what Adam's is, so one learning rate serves both.

    A sharded matrix is gathered for the orthogonalization, which every process computes for itself; its momentum stays
    sharded, and each process applies its rows of the result.

    Args:
        params: all parameters, or groups of them.
        matrices: those of them that Muon updates; see `hidden_matrices`.
        lr, betas, eps: as in Adam; betas and eps are used for the other parameters alone.
        weight_decay: decoupled, for all.
        momentum: decay of the momentum of the matrices, in [0, 1).
        turn: `orthogonalize`, or the same compiled.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers"; Liu et al. 2025, "Muon is scalable for LLM training"
    (the factor).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | list[dict[str, Any]],
        matrices: Iterable[Tensor],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        turn: Callable[[Tensor], Tensor] = orthogonalize,
    ) -> None:
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        settings["fused"] = True  # of the Adam part; also makes load_state_dict put the step counts beside the weights
        super().__init__(params, settings)
        self.matrices = {id(p) for p in matrices}
        self.turn = turn

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; none where the attribute `found_inf`, a number on the device, is
        1, as in fused optimizers of PyTorch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = getattr(self, "found_inf", None)
        bad = None if found is None else found > 0
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            self._step_matrices([p for p in given if id(p) in self.matrices], group, bad)
            self._step_others([p for p in given if id(p) not in self.matrices], group, found)
        return loss

    def _step_matrices(self, params: list[nn.Parameter], group: dict[str, Any], bad: Tensor | None) -> None:
        lr, momentum = group["lr"], group["momentum"]
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
        for p in params:
            by_shape.setdefault(matrix_shape(p), []).append(p)
        for shape, alike in by_shape.items():  # one batch of equal matrices at a time
            for p in alike:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            gradients = [piece(p.grad) for p in alike if p.grad is not None]
            averages = [piece(self.state[p]["momentum"]) for p in alike]
            if bad is None:
                torch._foreach_lerp_(averages, gradients, 1 - momentum)
            else:
                for mine, gradient in zip(averages, gradients, strict=True):
                    torch.where(bad, mine, mine.lerp(gradient, 1 - momentum), out=mine)
            mixed = torch._foreach_lerp(gradients, averages, momentum)
            directions = [whole(from_piece(x, p) if is_sharded(p) else x).flatten(1) for x, p in zip(mixed, alike, strict=True)]
            updates, kept = self.turn(torch.stack(directions)), 1 - lr * group["weight_decay"]
            if bad is not None:
                updates, kept = torch.where(bad, 0.0, updates), torch.where(bad, 1.0, kept)
            rows = [piece(cut_like(update.reshape(p.shape), p)) for p, update in zip(alike, updates, strict=True)]
            weights = [piece(p) for p in alike]
            if group["weight_decay"]:
                torch._foreach_mul_(weights, kept)
            torch._foreach_add_(weights, rows, alpha=-0.2 * lr * math.sqrt(max(shape)))

    def _step_others(self, params: list[nn.Parameter], group: dict[str, Any], found: Tensor | None) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), device=p.device, dtype=torch.float32),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in params]
        adam(
            [piece(p) for p in params], [piece(p.grad) for p in params if p.grad is not None],
            [piece(s["exp_avg"]) for s in states], [piece(s["exp_avg_sq"]) for s in states], [], [s["step"] for s in states],
            fused=True, found_inf=found, decoupled_weight_decay=True, amsgrad=False, maximize=False,
            beta1=group["betas"][0], beta2=group["betas"][1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
