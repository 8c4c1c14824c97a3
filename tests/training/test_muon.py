"""Muon against the singular value decomposition, its formula, and torch's Adam."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from trigflow.networks import MLP, ConditioningConfig, MLPConfig, UNet, UNetConfig
from trigflow.training.config import OptimizerConfig
from trigflow.training.muon import NEWTON_SCHULZ, Muon, hidden_matrices, orthogonalize
from trigflow.training.optimizer import build_optimizer


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_decomposition(matrix: Tensor, steps: int) -> Tensor:
    """The polynomial applied to the singular values themselves."""
    a, b, c = NEWTON_SCHULZ
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = s / (s**4).sum().pow(0.25)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6), (1, 7)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_orthogonalize_is_a_polynomial_of_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    batch = random(3, *shape)
    expected = torch.stack([by_decomposition(matrix, steps) for matrix in batch])
    torch.testing.assert_close(orthogonalize(batch, steps), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_singular_values_come_close_to_one_in_single_precision(scale: float) -> None:
    u, _ = torch.linalg.qr(random(40, 32))
    v, _ = torch.linalg.qr(random(100, 32, seed=1))
    spectrum = torch.logspace(0, -2, 32, dtype=torch.float64)
    matrix = (scale * (u * spectrum) @ v.T).float()
    values = torch.linalg.svdvals(orthogonalize(matrix[None])[0])[:32]
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_zero_gradient_moves_nothing() -> None:
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 5)), torch.zeros(2, 4, 5))


def test_hidden_matrices_of_the_unet() -> None:
    network = UNet(UNetConfig(width=32, mult=(1, 2), blocks=1, attention=(1,), conditioning=ConditioningConfig()))
    chosen = {id(p) for p in hidden_matrices(network)}
    names = {name for name, p in network.named_parameters() if id(p) in chosen}
    assert {"encoder.0.conv0.weight", "middle.0.attention.qkv.weight", "decoder.0.0.skip.weight"} <= names
    assert "inp.weight" not in names  # 9 inputs
    assert "out.weight" not in names  # 1 output
    assert not any("conditioning" in name or "affine" in name or "norm" in name or "bias" in name for name in names)


def test_hidden_matrices_of_the_mlp() -> None:
    network = MLP(MLPConfig(width=32, depth=2))
    chosen = {id(p) for p in hidden_matrices(network)}
    names = {name for name, p in network.named_parameters() if id(p) in chosen}
    assert names == {f"blocks.{i}.linear{j}.weight" for i in range(2) for j in (1, 2)}


def test_matrices_follow_the_formula_and_the_rest_is_adam() -> None:
    lr, decay, momentum = 0.01, 0.1, 0.8
    module = nn.Sequential(nn.Conv2d(32, 40, 3), nn.Linear(40, 2)).double()
    conv, rest = module[0], [module[0].bias, *module[1].parameters()]
    config = OptimizerConfig(name="muon", lr=lr, betas=(0.8, 0.95), weight_decay=decay, momentum=momentum)
    optimizer = build_optimizer(config, [module])
    assert type(optimizer) is Muon
    weight, average = conv.weight.detach().clone(), torch.zeros_like(conv.weight)
    copies = [nn.Parameter(p.detach().clone()) for p in rest]
    adam = torch.optim.AdamW(copies, lr=lr, betas=(0.8, 0.95), weight_decay=decay)
    for step in range(3):
        for i, p in enumerate(module.parameters()):
            p.grad = random(*p.shape, seed=10 * step + i)
        for copy, p in zip(copies, rest, strict=True):
            copy.grad = p.grad
        optimizer.step()
        adam.step()
        average = momentum * average + (1 - momentum) * conv.weight.grad
        direction = (1 - momentum) * conv.weight.grad + momentum * average
        update = by_decomposition(direction.reshape(40, 288), 5).reshape(weight.shape)
        weight = (1 - lr * decay) * weight - lr * 0.2 * math.sqrt(288) * update
        torch.testing.assert_close(conv.weight.detach(), weight, rtol=1e-8, atol=1e-10)
        for copy, p in zip(copies, rest, strict=True):
            torch.testing.assert_close(p, copy, rtol=1e-10, atol=1e-12)


def test_updates_are_of_adams_size() -> None:
    module = nn.Linear(64, 256, bias=False)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(OptimizerConfig(name="muon", lr=0.5), [nn.Sequential(module)])
    module.weight.grad = random(256, 64, dtype=torch.float32)
    optimizer.step()
    assert (module.weight - before).square().mean().sqrt().item() / 0.5 == pytest.approx(0.2, rel=0.15)


def test_memory_format_makes_no_difference() -> None:
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(random(32, 48, 3, 3).to(memory_format=memory_format))
        optimizer = Muon([weight], [weight], lr=0.1)
        for step in range(2):
            weight.grad = random(32, 48, 3, 3, seed=step + 1).to(memory_format=memory_format)
            optimizer.step()
        results.append(weight.detach().contiguous())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_parameters_without_gradient_stay() -> None:
    module = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 3))
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = build_optimizer(OptimizerConfig(name="muon"), [module])
    assert optimizer.step(lambda: 2.5) == 2.5
    assert all(torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
