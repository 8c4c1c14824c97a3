"""Networks of diffusers, as they come: tangents of latents and time together, in every mode of training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tangent.diffusers_cases import CASES, exact
from tangent.helpers import relative_error
from tangent.steps import assert_same_step, central_difference, directions, oracle, set_dropout, step
from trigflow.tangent import coverage, jvp

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
embeddings = pytest.importorskip("diffusers.models.embeddings", reason="diffusers is not installed")

every = pytest.mark.parametrize("name", CASES)


@every
def test_double_precision(name: str) -> None:
    case = CASES[name]
    net = case.build()
    fn, inputs = case.fn(net), case.inputs()
    tangent = assert_same_step(net, fn, inputs)
    assert relative_error(tangent, exact(fn, inputs)) < case.tolerance
    # Latents and time contribute on their own, and add up.
    dx, dt = directions(inputs)
    of_x, of_t = (jvp(fn, inputs, tangents)[1] for tangents in ((dx, None), (None, dt)))
    assert relative_error(of_x + of_t, tangent) < max(case.tolerance, 1e-6)
    for part in (of_x, of_t):
        assert torch.linalg.vector_norm(part) > 1e-3 * torch.linalg.vector_norm(tangent)


@every
def test_single_precision(name: str) -> None:
    case = CASES[name]
    net = case.build(torch.float32)
    tangent = assert_same_step(net, case.fn(net), case.inputs(torch.float32))
    inputs = case.inputs()
    reference = jvp(case.fn(case.build()), inputs, directions(inputs))[1]
    assert relative_error(tangent.double(), reference) < 1e-4


def test_unet_with_attention_by_finite_differences() -> None:
    case = CASES["UNet2DModel"]
    fn, inputs = case.fn(case.build()), case.inputs()
    tangent = jvp(fn, inputs, directions(inputs))[1]
    # The time embedding is single precision, which bounds what differences over time can tell.
    assert relative_error(tangent, central_difference(fn, inputs, directions(inputs), 1e-2)) < 1e-4
    t = inputs[1]
    frozen = jvp(lambda x: fn(x, t), inputs[:1], directions(inputs)[:1])[1]
    moved = central_difference(lambda x: fn(x, t), inputs[:1], directions(inputs)[:1], 1e-3)
    assert relative_error(frozen, moved) < 1e-8


@every
def test_dropout(name: str) -> None:
    case = CASES[name]
    net = set_dropout(case.build(), 0.3)
    fn, inputs = case.fn(net), case.inputs()
    tangent = assert_same_step(net, fn, inputs, seed=3)
    assert not torch.equal(tangent, step(net, fn, inputs, engine=True, seed=4).tangent)
    if name != "UNet2DModel":  # in which contiguous copies before group norm change the order of the draws
        assert relative_error(tangent, oracle(fn, inputs, directions(inputs), seed=3)) < case.tolerance
        return

    def replayed(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return fn(x, t)

    assert relative_error(tangent, central_difference(replayed, inputs, directions(inputs), 1e-2)) < 1e-4


@every
def test_activation_checkpointing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trigflow.tangent import dual

    case = CASES[name]
    net = set_dropout(case.build(), 0.3)
    fn, inputs = case.fn(net), case.inputs()
    free = step(net, fn, inputs, engine=True)
    recomputed: list[nn.Module] = []
    ran: list[Any] = []
    run = dual.run
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, i, o: recomputed.append(m) if torch._C._current_graph_task_id() != -1 else None
            )
    monkeypatch.setattr(dual, "run", lambda *args: ran.append(torch._C._current_graph_task_id()) or run(*args))
    net.enable_gradient_checkpointing()
    tangent = assert_same_step(net, fn, inputs)
    assert torch.equal(tangent, free.tangent)
    assert recomputed
    assert set(ran) == {-1}
    kept = step(net, fn, inputs, engine=True)
    for a, b in zip(kept.gradients, free.gradients, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) < 1e-12


class Float32(nn.Module):
    """A module kept in float32 under autocast, as time embeddings should be."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, sample: Tensor, *args: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.inner(sample.float(), *args)


def keep_time_in_float32(net: nn.Module) -> list[tuple[torch.dtype, torch.dtype]]:
    """Wrap every time embedding; returns a list to which each of its outputs adds its dtype and that of its tangent."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, embeddings.TimestepEmbedding):
                setattr(parent, name, Float32(child))
                child.register_forward_hook(lambda m, i, o: seen.append((o.dtype, getattr(o, "tangent", o).dtype)))
    return seen


@every
def test_autocast(name: str) -> None:
    case = CASES[name]
    net = case.build(torch.float32)
    seen = keep_time_in_float32(net)
    fn, inputs = case.fn(net), case.inputs(torch.float32)
    expected = jvp(fn, inputs, directions(inputs))[1]
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tangent = assert_same_step(net, fn, inputs)
    assert tangent.dtype == torch.bfloat16
    assert set(seen) == {(torch.float32, torch.float32)}
    error = relative_error(tangent.float(), expected)
    assert error < case.rounding
    if name.startswith("UNet"):  # in whose convolutions torch.func.jvp under autocast raises
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = oracle(fn, inputs, directions(inputs))
    assert error < 1.1 * relative_error(rounded.float(), expected) + 0.002


@every
def test_networks_kept_in_bfloat16(name: str) -> None:
    case = CASES[name]
    net, full = case.build(torch.bfloat16), case.build(torch.bfloat16).float()
    inputs = case.inputs(torch.bfloat16)
    tangent = assert_same_step(net, case.fn(net), inputs)
    assert tangent.dtype == torch.bfloat16
    x, t = (v.float() for v in inputs)
    dx, dt = (v.float() for v in directions(inputs))
    assert relative_error(tangent.float(), jvp(case.fn(full), (x, t), (dx, dt))[1]) < case.rounding


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if len(case.latents[1]) == 4])
def test_channels_last(name: str) -> None:
    case = CASES[name]
    net = case.build()
    fn, (x, t) = case.fn(net), case.inputs()
    expected = jvp(fn, (x, t), directions((x, t)))[1]
    net.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    tangent = assert_same_step(net, fn, (x, t))
    assert relative_error(tangent, expected) < case.tolerance
    if name.startswith("UNet"):
        assert tangent.is_contiguous(memory_format=torch.channels_last)


@every
def test_every_function_has_a_rule(name: str) -> None:
    case = CASES[name]
    net = set_dropout(case.build(), 0.3)
    report = coverage(case.fn(net), *case.inputs())
    assert report.complete, str(report)
    assert not report.fallbacks, str(report)
    assert report.rules["torch.nn.functional.scaled_dot_product_attention"] >= 1
    assert report.rules["torch.sin"] >= 1


@every
def test_output_classes(name: str) -> None:
    case = CASES[name]
    net = case.build()
    inputs = case.inputs()
    expected, direction = jvp(case.fn(net), inputs, directions(inputs))
    (out,), (tangent,) = jvp(case.call(net, return_dict=False), inputs, directions(inputs))
    assert torch.equal(out, expected)
    assert torch.equal(tangent, direction)
    named, tangents = jvp(case.call(net), inputs, directions(inputs))
    assert type(named) is type(tangents) is type(case.call(net)(*inputs))
    assert torch.equal(named.sample, expected)
    assert torch.equal(tangents.sample, direction)
    assert torch.equal(tangents[0], direction)
