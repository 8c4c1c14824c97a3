"""Learning rates against their formulas; optimizers by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from trigflow.runtime.errors import UserError
from trigflow.training.config import OptimizerConfig
from trigflow.training.optimizer import build_optimizer, learning_rate


@pytest.mark.parametrize("iteration", [0, 1, 99, 100_000])
def test_constant(iteration: int) -> None:
    assert learning_rate(OptimizerConfig(lr=3e-4), iteration, 1000) == 3e-4


def test_inverse_square_root() -> None:
    config = OptimizerConfig(lr=1e-2, schedule="inverse_sqrt", t_ref=100)
    assert learning_rate(config, 0, 1) == 1e-2
    assert learning_rate(config, 100, 1) == 1e-2
    assert learning_rate(config, 400, 1) == pytest.approx(1e-2 / 2)
    assert learning_rate(config, 250, 1) == pytest.approx(1e-2 / math.sqrt(2.5))


def test_cosine_from_the_full_rate_to_zero() -> None:
    config = OptimizerConfig(lr=2.0, schedule="cosine")
    rates = [learning_rate(config, i, 8) for i in range(9)]
    assert rates == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(9)])
    assert learning_rate(config, 20, 8) == pytest.approx(0.0, abs=1e-12)  # and stays there


@pytest.mark.parametrize("schedule", ["constant", "inverse_sqrt", "cosine"])
def test_warmup_multiplies_every_schedule(schedule: Any) -> None:
    plain = OptimizerConfig(lr=1.0, schedule=schedule, t_ref=2)
    warm = OptimizerConfig(lr=1.0, schedule=schedule, t_ref=2, warmup=4)
    for i in range(10):
        assert learning_rate(warm, i, 10) == pytest.approx(learning_rate(plain, i, 10) * min(1, (i + 1) / 4))


@pytest.mark.parametrize(
    ("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("radam", torch.optim.RAdam)]
)
def test_optimizers_by_name(name: Any, kind: type[torch.optim.Optimizer]) -> None:
    config = OptimizerConfig(name=name, lr=0.1, betas=(0.8, 0.95), eps=1e-11, weight_decay=0.3)
    optimizer = build_optimizer(config, [nn.Linear(2, 2)])
    assert type(optimizer) is kind
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.1, (0.8, 0.95), 1e-11, 0.3)


def test_the_first_step_of_adam_is_the_learning_rate() -> None:
    module = nn.ParameterList([torch.tensor([1.0, -2.0])])
    parameter = module[0]
    optimizer = build_optimizer(OptimizerConfig(name="adam", lr=0.125), [module])
    (parameter * torch.tensor([3.0, -5.0])).sum().backward()
    optimizer.step()
    assert parameter.tolist() == pytest.approx([1.0 - 0.125, -2.0 + 0.125])


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"unknown optimizer 'sgd'; expected one of adam, adamw, radam, muon"):
        build_optimizer(OptimizerConfig(name="sgd"), [])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="unknown schedule 'linear'; expected constant, inverse_sqrt or cosine"):
        learning_rate(OptimizerConfig(schedule="linear"), 0, 1)  # type: ignore[arg-type]
