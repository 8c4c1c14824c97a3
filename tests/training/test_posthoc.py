"""Averages reconstructed from snapshots, against the same averages tracked directly."""

from __future__ import annotations

import math
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from training.tiny import tiny_trainer
from trigflow import load
from trigflow.codecs import Pixels
from trigflow.models.model import Model
from trigflow.networks import ConditioningConfig, MLPConfig, build
from trigflow.runtime.errors import UserError
from trigflow.runtime.files import read_json, read_tensors, write_json, write_tensors
from trigflow.training import posthoc
from trigflow.training.config import EMAConfig, RunConfig, to_dict
from trigflow.training.ema import EMA, power_exponent
from trigflow.training.posthoc import fit_profiles, profile_product, reconstruct
from trigflow.training.snapshots import list_snapshots, write_snapshot

LENGTHS = (0.05, 0.1)
NETWORK = MLPConfig(
    features=8, width=32, depth=2, conditioning=ConditioningConfig(width=8, time_embedding="fourier")
)  # fmt: skip


# Profiles ------------------------------------------------------------------------------------------------------------


def cumulative(sigma_rel: float, n: float, k: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Share of the average after n updates that the first k steps hold."""
    return np.minimum(k / n, 1.0) ** (power_exponent(sigma_rel) + 1)


@given(st.floats(0.02, 0.27), st.floats(0.02, 0.27), st.floats(0.01, 1.0))
@settings(max_examples=50, deadline=None)
def test_products_of_profiles_are_integrals(s1: float, s2: float, ratio: float) -> None:
    n, m = 1000.0 * ratio, 1000.0
    k = (np.arange(200_000) + 0.5) / 200  # midpoints on [0, 1000]
    product = (1 - cumulative(s1, n, k)) * (1 - cumulative(s2, m, k))
    a, b = power_exponent(s1) + 1, power_exponent(s2) + 1
    assert float(profile_product(a, n, b, m)) == pytest.approx(product.sum() / 200, rel=1e-5)
    assert float(profile_product(b, m, a, n)) == pytest.approx(product.sum() / 200, rel=1e-5)


def test_products_of_distant_profiles_stay_finite() -> None:
    a, b = power_exponent(0.004) + 1, power_exponent(0.005) + 1  # exponents above 200
    value = float(profile_product(a, 1.0, b, 1e9))
    assert value == pytest.approx(1 - 1 / (a + 1), rel=1e-12)
    assert value == float(profile_product(b, 1e9, a, 1.0))


def evenly(count: int, end: int, lengths: tuple[float, ...] = LENGTHS) -> tuple[list[int], list[float]]:
    """`count` snapshots of each length, at equal distances up to `end`: updates and lengths."""
    updates = [end * (i + 1) // count for i in range(count)]
    return updates * len(lengths), [length for length in lengths for _ in range(count)]


@pytest.mark.parametrize("sigma_rel", LENGTHS)
def test_a_snapshot_is_its_own_reconstruction(sigma_rel: float) -> None:
    updates, lengths = evenly(12, 12_000)
    fit = fit_profiles(updates, lengths, 12_000, sigma_rel)
    own = [u == 12_000 and length == sigma_rel for u, length in zip(updates, lengths, strict=True)]
    assert fit.coefficients == pytest.approx([float(mine) for mine in own], abs=1e-6)
    assert fit.error < 2e-7


@pytest.mark.parametrize(("count", "low", "high"), [(16, 0.07, 0.13), (32, 0.04, 0.2), (64, 0.025, 0.25), (128, 0.015, 0.25)])
def test_how_many_snapshots_are_needed(count: int, low: float, high: float) -> None:
    """The table at the head of the module; half as many are too few for one of the two lengths."""
    errors = [fit_profiles(*evenly(count, 100_000), 100_000, s).error for s in np.linspace(low, high, 9)]
    assert max(errors) < 1e-4
    assert max(fit_profiles(*evenly(count // 2, 100_000), 100_000, s).error for s in (low, high)) > 1e-4


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.25])
def test_the_error_is_that_of_the_exact_weights_of_every_step(sigma_rel: float) -> None:
    """Step k of n weighs P(k) - P(k - 1): the fit of the continuous profiles is one of these, and sums to 1."""
    end, (updates, lengths) = 4_000, evenly(16, 4_000)
    fit = fit_profiles(updates, lengths, end, sigma_rel, noise=1e-9)
    k = np.arange(end + 1, dtype=np.float64)
    weights = [np.diff(cumulative(length, n, k)) for n, length in zip(updates, lengths, strict=True)]
    made = np.tensordot(fit.coefficients, np.asarray(weights), 1)
    wanted = np.diff(cumulative(sigma_rel, end, k))
    assert made.sum() == pytest.approx(1, abs=1e-9)
    distance = np.sqrt(((made - wanted).cumsum() ** 2).sum() / ((1 - wanted.cumsum()) ** 2).sum())
    assert fit.error == pytest.approx(distance, rel=0.02)


def test_no_other_coefficients_come_closer() -> None:
    updates, lengths = evenly(6, 6_000)
    fit = fit_profiles(updates, lengths, 6_000, 0.03, noise=0.0)
    k = np.arange(0.5, 6_000)
    profiles = np.asarray([cumulative(length, n, k) for n, length in zip(updates, lengths, strict=True)])
    wanted = cumulative(0.03, 6_000, k)

    def distance(c: np.ndarray[Any, Any]) -> float:
        return float(np.square(wanted - c @ profiles).sum())

    best, generator = np.asarray(fit.coefficients), np.random.default_rng(0)
    for _ in range(50):
        step = generator.normal(size=12) * 1e-3
        assert distance(best + step - step.mean()) > distance(best)


def test_coarse_snapshots_are_combined_with_small_coefficients() -> None:
    """Rounding errors add up like `|c|`; where they are large, a worse fit of the profile is the better average."""
    fine = fit_profiles(*evenly(64, 64_000), 64_000, 0.015, noise=1e-7)
    coarse = fit_profiles(*evenly(64, 64_000), 64_000, 0.015, noise=2e-4)
    sizes = [math.hypot(*fit.coefficients) for fit in (fine, coarse)]
    assert sizes[1] < 0.6 * sizes[0]
    assert 2e-4 * sizes[1] < coarse.error < 2e-4 * sizes[0]
    for length, error in ((0.04, 3e-4), (0.13, 1.3e-4)):
        assert fit_profiles(*evenly(64, 64_000), 64_000, length, noise=2e-4).error == pytest.approx(error, rel=0.1)


# Reconstruction ------------------------------------------------------------------------------------------------------


def walk(
    run: Path, steps: int, every: int, tracked: tuple[float, ...] = (), *, skipped: int = 0, dtype: Any = "fp32"
) -> dict[float, nn.Module]:
    """A run folder whose weights did a random walk, with snapshots; returns averages of other lengths tracked directly.

    The iterations are `skipped` ahead of the updates.
    """
    config = RunConfig(network=NETWORK, ema=EMAConfig(snapshot_every=every, sigma_rels=LENGTHS, snapshot_dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    network = build(NETWORK)
    for parameter in network.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    ema = EMA(config.ema, network)
    others = {length: EMA(EMAConfig(sigma_rel=length), network) for length in tracked}
    for i in range(1, steps + 1):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
            for buffer in network.buffers():
                buffer.fill_(i)
        for average in (ema, *others.values()):
            average.update(network, i, 1)
        if i % every == 0:
            for length, average in ema.tracked.items():
                write_snapshot(run, i + skipped, i, length, average, dtype)
    model = Model(ema.network, config.network, config.process, Pixels.symmetric((1, 2, 4)))
    write_json(run / "config.json", to_dict(config))
    write_json(run / "ema" / "model.json", model.description())
    return {length: other.network for length, other in others.items()}


def relative_distance(made: nn.Module, wanted: nn.Module) -> float:
    """`|made - wanted| / |wanted|` over all parameters."""
    a, b = (torch.cat([p.detach().double().flatten() for p in module.parameters()]) for module in (made, wanted))
    return float((a - b).norm() / b.norm())


def test_a_random_walk_is_averaged_as_if_tracked(tmp_path: Path) -> None:
    wanted = walk(tmp_path, 320, 10, (0.04, 0.07, 0.15, 0.2))
    for sigma_rel, network in wanted.items():
        result = reconstruct(tmp_path, sigma_rel)
        assert relative_distance(result.model.network, network) < 1e-4
        assert result.fit.error < 1e-4
        assert (result.iteration, len(result.snapshots)) == (320, 64)


def test_the_expected_error_is_the_one_that_is_found(tmp_path: Path) -> None:
    """Root mean square over coordinates that walk independently, relative to the distance of the average from its start."""
    wanted = walk(tmp_path, 200, 25, (0.03, 0.2))
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(p.shape, generator=generator) for p in build(NETWORK).parameters()]
    for sigma_rel, network in wanted.items():
        result = reconstruct(tmp_path, sigma_rel)
        moved = torch.cat([(p - s).flatten() for p, s in zip(network.parameters(), start, strict=True)]).norm()
        size = torch.cat([p.flatten() for p in network.parameters()]).norm()
        found = relative_distance(result.model.network, network) * float(size / moved)
        assert found == pytest.approx(result.fit.error, rel=0.1)
        assert found > 1e-3


def test_a_real_training_is_averaged_as_if_tracked(tmp_path: Path) -> None:
    """The run's own average has a third length; it is reconstructed from the snapshots of two others, before the end too."""
    changes = {"loop.iterations": 64, "loop.checkpoint_every": 48, "ema.sigma_rel": 0.07, "ema.snapshot_every": 4}
    trainer = tiny_trainer(tmp_path / "run", changes)
    trainer.run()
    assert len(list_snapshots(tmp_path / "run")) == 2 * 16
    result = reconstruct(tmp_path / "run", 0.07)
    assert relative_distance(result.model.network, trainer.ema.network) < min(1e-4, result.fit.error)
    assert result.iteration == 64
    state = read_tensors(tmp_path / "run" / "checkpoints" / "00000048" / "state.safetensors", "checkpoint")
    at_48 = trainer.ema.network
    at_48.load_state_dict({name[4:]: value for name, value in state.items() if name.startswith("ema.")})
    earlier = reconstruct(tmp_path / "run", 0.07, iteration=48).model.network
    assert relative_distance(earlier, at_48) < 1e-4
    assert relative_distance(earlier, result.model.network) > 1e-2


def test_halved_snapshots_keep_three_digits(tmp_path: Path) -> None:
    wanted = walk(tmp_path, 320, 10, (0.07,), dtype="fp16")[0.07]
    result = reconstruct(tmp_path, 0.07)
    assert 1e-5 < relative_distance(result.model.network, wanted) < 5e-4
    assert result.fit.error < 5e-4
    assert {p.dtype for p in result.model.network.parameters()} == {torch.float32}
    stored = read_tensors(result.snapshots[0].path, "snapshot")
    assert stored["inp.weight"].dtype == torch.float16


def test_skipped_steps_are_no_part_of_the_average(tmp_path: Path) -> None:
    wanted = walk(tmp_path, 320, 10, (0.07,), skipped=30)[0.07]
    result = reconstruct(tmp_path, 0.07)
    assert result.iteration == 350
    assert [s.updates for s in result.snapshots] == [s.iteration - 30 for s in result.snapshots]
    assert relative_distance(result.model.network, wanted) < 1e-4


def test_an_end_between_snapshots_is_worse_and_said_to_be(tmp_path: Path) -> None:
    wanted = walk(tmp_path, 305, 10, (0.1,))[0.1]
    walk(tmp_path, 310, 10)
    between = reconstruct(tmp_path, 0.1, iteration=305)
    assert max(s.iteration for s in between.snapshots) == 310
    assert between.fit.error > 10 * reconstruct(tmp_path, 0.1, iteration=310).fit.error
    found = relative_distance(between.model.network, wanted)
    assert 1e-4 < found < between.fit.error
    assert found < relative_distance(reconstruct(tmp_path, 0.1, iteration=300).model.network, wanted) / 3


def test_a_module_of_ones_own(tmp_path: Path) -> None:
    walk(tmp_path, 40, 10)
    network = build(NETWORK)
    result = reconstruct(tmp_path, 0.07, network=network)
    assert result.model.network is network
    assert relative_distance(network, reconstruct(tmp_path, 0.07).model.network) == 0


def test_buffers_are_those_of_the_newest_snapshot(tmp_path: Path) -> None:
    walk(tmp_path, 40, 10)
    for iteration in (30, 40):
        network = reconstruct(tmp_path, 0.07, iteration=iteration).model.network
        assert set(network.get_buffer("conditioning.time.phases").tolist()) == {float(iteration)}


def test_one_snapshot_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk(tmp_path, 50, 10)
    read, seen = posthoc.read_tensors, []

    def watched(path: Path, what: str) -> dict[str, Tensor]:
        assert all(reference() is None for reference in seen)
        tensors = read(path, what)
        seen.extend(weakref.ref(tensor) for tensor in tensors.values())
        return tensors

    monkeypatch.setattr(posthoc, "read_tensors", watched)
    reconstruct(tmp_path, 0.07)
    assert len(seen) == 10 * len(build(NETWORK).state_dict())


def test_the_result_is_a_model_folder(tmp_path: Path) -> None:
    walk(tmp_path / "run", 40, 10)
    result = reconstruct(tmp_path / "run", 0.07)
    folder = result.save(tmp_path / "new" / "model")
    model = load(folder, "cpu")
    assert relative_distance(model.network, result.model.network) == 0
    assert model.origin["ema_sigma_rel"] == 0.07
    facts = read_json(folder / "reconstruction.json", "facts")
    assert facts["expected_error"] == result.fit.error
    assert list(facts["coefficients"]) == [s.path.name for s in result.snapshots]
    assert sum(facts["coefficients"].values()) == pytest.approx(1)
    with pytest.raises(UserError, match=r"exists already and is not empty\); expected a new or empty folder"):
        result.save(folder)
    (tmp_path / "file").write_text("here")
    with pytest.raises(UserError, match="cannot write"):
        result.save(tmp_path / "file" / "model")


# Mistakes ------------------------------------------------------------------------------------------------------------


def test_mistakes_in_reconstruction(tmp_path: Path) -> None:
    run = tmp_path / "run"
    walk(run, 40, 10)
    for sigma_rel in (0.0, 0.28, -1.0, math.nan):
        with pytest.raises(UserError, match=r"relative EMA width .*; expected a number in \(0, 0\.28\)"):
            reconstruct(run, sigma_rel)
    for iteration in (0, 9, 41, -1):
        with pytest.raises(UserError, match=rf"iteration {iteration} has no snapshots around it; expected one from 10 to 40"):
            reconstruct(run, 0.1, iteration=iteration)
    with pytest.raises(UserError, match="sigma_rel is 'long'; expected a number"):
        reconstruct(run, "long")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"iteration is 15\.5; expected a whole number"):
        reconstruct(run, 0.1, iteration=15.5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"holds no config\.json; expected a run folder"):
        reconstruct(tmp_path / "none", 0.1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((run / "config.json").read_text())
    with pytest.raises(UserError, match=r"holds no snapshots .*; train with --ema.snapshot-every N"):
        reconstruct(tmp_path / "empty", 0.1)


def test_damaged_and_foreign_snapshots_are_named(tmp_path: Path) -> None:
    walk(tmp_path, 40, 10)
    path = tmp_path / "ema" / "00000020-0.05.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[: len(whole) // 2], b"", b"no snapshot"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"00000020-0\.05\.safetensors' cannot be read") as caught:
            reconstruct(tmp_path, 0.07)
        assert "\n" not in str(caught.value)
    write_tensors(path, {"weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"cannot be read \(KeyError"):
        reconstruct(tmp_path, 0.07)
    write_snapshot(tmp_path, 20, 20, 0.05, nn.Linear(2, 2), "fp32")
    with pytest.raises(UserError, match=r"00000020-0\.05\.safetensors' belongs to another network"):
        reconstruct(tmp_path, 0.07)


def test_other_files_are_no_snapshots(tmp_path: Path) -> None:
    walk(tmp_path, 40, 10)
    (tmp_path / "ema" / ".00000020-0-x.safetensors").write_bytes(b"half")
    (tmp_path / "ema" / "notes.txt").write_text("mine")
    (tmp_path / "ema" / "00000040-0.07").mkdir()
    found = list_snapshots(tmp_path)
    assert [(s.iteration, s.sigma_rel) for s in found] == [(i, s) for i in (10, 20, 30, 40) for s in LENGTHS]
    assert all(a.iteration <= b.iteration for a, b in pairwise(found))
