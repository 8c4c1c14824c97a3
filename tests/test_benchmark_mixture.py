"""The benchmark of the mixture measures what it says, and its committed results are of the choices that there are."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts import load_script

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mixture.py"


@pytest.fixture(scope="module")
def mixture() -> ModuleType:
    return load_script("mixture")


def test_the_distance_is_that_of_many_samples(mixture: ModuleType) -> None:
    """Of wider samples, against both sets drawn; and none of samples of the mixture."""
    random = mixture.seeded(0)
    x, a = (mixture.data(4000, random) for _ in range(2))
    wide = a + 0.2 * torch.randn(a.shape, generator=random)

    def within(points: torch.Tensor) -> float:
        return float(torch.cdist(points, points).sum() / (len(points) * (len(points) - 1)))

    drawn = float(2 * torch.cdist(x, wide).mean()) - within(x) - within(wide)
    assert mixture.energy_distance(wide) == pytest.approx(drawn, abs=2e-3)
    assert mixture.energy_distance(wide) > 3e-3
    assert abs(mixture.energy_distance(a)) < 5e-4


def test_a_choice_is_as_good_within_the_noise(mixture: ModuleType) -> None:
    def seed(scd: tuple[float, float], own: float) -> dict[str, object]:
        runs = {"sCD": scd, "self": (own,)}
        return {
            "students": {
                name: [{"distance": {"1": d, "2": 1.0}, "iterations": 9, "seconds": 1.0} for d in found]
                for name, found in runs.items()
            }
        }

    by_seed = {"0": seed((1.0, 2.0), 2.0), "1": seed((2.0, 2.0), 2.5), "2": seed((2.0, 90.0), 3.0)}
    for noise, as_good in ((0.09, False), (0.11, True)):
        found = mixture.summary(by_seed, noise)["self"]["1"]
        assert (found["distance"], found["ratio"], found["each"]) == (2.5, 1.25, [2.0, 2.5, 3.0])
        assert found["as_good"] == as_good


def test_it_runs_and_adds_seeds(mixture: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "mixture.json"
    brief = ["--choices", "self, semigroup", "rollouts", "--iterations", "3", "--samples", "50", "--json", str(out)]
    assert mixture.main([*brief, "--seeds", "0"]) == 0
    assert mixture.main([*brief, "--seeds", "1", "--add"]) == 0
    result = json.loads(out.read_text())
    assert set(result["by_seed"]) == {"0", "1"}
    assert set(result["summary"]) == {"sCD", "self, semigroup", "rollouts"}
    assert [len(row["1"]["each"]) for row in result["summary"].values()] == [4, 2, 2]
    assert [row["iterations"] for row in result["summary"].values()] == [3, 48, 12]
    assert result["machine"]["threads"] == 1
    kept = result["by_seed"]["0"]["students"]["rollouts"]
    assert mixture.main([*brief, "--seeds", "0", "--add", "--choices", "sCD, c = 0.1"]) == 0
    result = json.loads(out.read_text())
    assert set(result["summary"]) == {"sCD", "self, semigroup", "rollouts", "sCD, c = 0.1"}
    assert result["by_seed"]["0"]["students"]["rollouts"] == kept
    other = tmp_path / "equal.json"
    equal = ["--equal", "--choices", "self", "--seeds", "0", "--iterations", "3", "--samples", "50", "--json", str(other)]
    assert mixture.main(equal) == 0
    assert json.loads(other.read_text())["summary"]["self"]["iterations"] == 3
    with pytest.raises(SystemExit):
        mixture.main([*brief, "--samples", "60", "--add"])


@pytest.mark.parametrize("name", ["mixture", "mixture-equal"])
def test_the_committed_results_are_of_every_choice(mixture: ModuleType, name: str) -> None:
    result = json.loads((SCRIPT.parent / "results" / f"{name}.json").read_text())
    assert set(result["summary"]) == {"sCD", *mixture.CHOICES}
    assert all(len(row["1"]["each"]) >= 3 for row in result["summary"].values())
    longer = {} if result["settings"]["equal"] else mixture.LONGER
    for choice, row in result["summary"].items():
        assert row["iterations"] == longer.get(choice, 1) * result["settings"]["iterations"]
