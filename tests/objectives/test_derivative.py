"""The tangent by finite differences, which is there to be compared with the exact one."""

from __future__ import annotations

import pytest
import torch

from objectives.helpers import GAUSSIAN, PROCESS, ExactStudent, batch, consistency_loss, student, tangent_of
from trigflow.objectives import TangentConfig
from trigflow.tangent import TangentError


def test_finite_differences_come_close_to_the_exact_tangent_and_leave_the_prediction_alone() -> None:
    x0, noise, t = batch(64)
    x, v, net = PROCESS.interpolate(x0, noise, t), PROCESS.velocity(x0, noise, t), student()
    exact_prediction, exact = tangent_of(net, x, v, t)
    prediction, near = tangent_of(net, x, v, t, derivative="finite-difference")
    assert torch.equal(prediction, exact_prediction)
    error = (near - exact).norm() / exact.norm()
    assert 0 < error < 1e-7


def test_finite_differences_are_coarser_in_float32() -> None:
    x0, noise, t = batch(64)
    x = PROCESS.interpolate(x0, noise, t)
    _, exact = tangent_of(ExactStudent(), x.float(), GAUSSIAN.velocity(x, t).float(), t.float())
    _, near = tangent_of(ExactStudent(), x.float(), GAUSSIAN.velocity(x, t).float(), t.float(), derivative="finite-difference")
    assert near.abs().max() > 10 * exact.abs().max()  # both should be zero


def test_the_configuration_chooses_the_derivative_of_the_loss() -> None:
    data, net = batch(32), student()
    by_default = consistency_loss(net, *data, tangent=TangentConfig(mode="raw")).value
    exact = consistency_loss(net, *data, tangent=TangentConfig(mode="raw", derivative="exact")).value
    near = consistency_loss(net, *data, tangent=TangentConfig(mode="raw", derivative="finite-difference")).value
    assert torch.equal(exact, by_default)
    assert near != exact
    assert near.item() == pytest.approx(exact.item(), rel=1e-6)


def test_an_unknown_derivative_names_the_known_ones() -> None:
    x0, noise, t = batch(4)
    with pytest.raises(TangentError, match="'exact', 'finite-difference'"):
        tangent_of(student(), x0, noise, t, derivative="forward")
