"""Flow maps of every residual against diffusion, the jumps that they draw, and the choices that contradict each other."""

from typing import Any

import pytest
import torch
from torch import Tensor

from objectives.helpers import GAUSSIAN, PROCESS, batch, draws, student
from trigflow.networks import MLP
from trigflow.objectives import FlowMap, TangentConfig, diffusion_loss, flow_map_loss
from trigflow.runtime.errors import UserError
from trigflow.segments import segment_bounds

SD = PROCESS.sigma_data
RAW = TangentConfig(mode="raw", warmup=0)


def close(a: Tensor, b: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def jumping() -> MLP:
    return student(takes=("end",))


def gradients(net: MLP, loss: Tensor) -> list[Tensor]:
    return [g for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True) if g is not None]


@pytest.mark.parametrize("residual", ["eulerian", "lagrangian", "semigroup"])
def test_all_reduce_to_diffusion_at_no_length(residual: str) -> None:
    net, (x0, noise, t) = jumping(), batch(16)
    config = FlowMap(residual=residual, velocity="self", anchor=1.0, tangent=RAW)  # type: ignore[arg-type]
    told = lambda x, time: net(x, time, end=time)  # noqa: E731
    found = flow_map_loss(net, PROCESS, x0, noise, t, t, config=config).value
    expected = diffusion_loss(told, PROCESS, x0, noise, t).value
    mine, theirs = gradients(net, found), gradients(net, expected)
    close(found, expected)
    ratio = SD  # F is moved here, sd F there
    for one, other in zip(mine, theirs, strict=True):
        close(one, other / ratio)


def test_ends_of_jumps() -> None:
    zero = FlowMap(jumps="segments").draw(draws(4000))
    assert zero.keys() == {"t"}
    jumps = FlowMap(jumps="segments", segments=4).draw(draws(4000))
    assert torch.equal(jumps["t"], zero["t"])
    assert torch.equal(jumps["end"], segment_bounds(jumps["t"], 4)[0])
    even = FlowMap().draw(draws(4000))
    assert torch.equal(even["t"], zero["t"])
    share = even["end"] / even["t"]
    assert bool(((share >= 0) & (share <= 1)).all())
    assert abs(share.double().mean().item() - 0.5) < 0.03
    assert abs(share.double().var().item() - 1 / 12) < 0.01


@pytest.mark.parametrize("jumps", ["any", "segments"])
def test_a_share_of_the_jumps_has_no_length(jumps: str) -> None:
    plain, found = (FlowMap(jumps=jumps, anchor=anchor).draw(draws(4000)) for anchor in (0.0, 0.25))  # type: ignore[arg-type]
    assert torch.equal(plain["t"], found["t"])
    none = found["end"] == found["t"]
    assert abs(none.double().mean().item() - 0.25) < 0.03
    assert torch.equal(found["end"][~none], plain.get("end", torch.zeros(4000))[~none])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"velocity": "self"}, ["anchor"]),
        ({"residual": "semigroup"}, ["anchor"]),
        ({"residual": "lagrangian", "velocity": "data"}, ["velocity"]),
        ({"residual": "lagrangian", "jumps": "segments"}, ["jumps"]),
        ({"anchor": 1.5}, ["anchor"]),
        ({"segments": 0, "jumps": "segments"}, ["segments"]),
        ({"segments": 2}, ["segments"]),
        ({"semi_step": 1.0}, ["semi_step"]),
        ({"c": 0.0}, ["c"]),
        ({"power": -1.0}, ["power"]),
        ({}, []),
        ({"residual": "semigroup", "velocity": "self", "anchor": 0.25}, []),
    ],
)
def test_choices_that_contradict_each_other(settings: dict[str, Any], names: list[str]) -> None:
    assert [name for fine, name, *_ in FlowMap(**settings).checks(PROCESS) if not fine] == names


def test_a_network_has_to_be_told_the_end() -> None:
    x0, noise, t = batch(4)
    with pytest.raises(UserError, match="not told the end of its jumps; expected one that takes end; "):
        flow_map_loss(student(), PROCESS, x0, noise, t, t / 2, teacher=GAUSSIAN.velocity)
    with pytest.raises(UserError, match=r"velocity is teacher without a teacher; expected .*; pass teacher"):
        flow_map_loss(jumping(), PROCESS, x0, noise, t, t / 2)
