"""Presets: found by name and by data, and what they promise."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.tiny import all_digits, change
from trigflow.errors import UserError
from trigflow.model import fit_network
from trigflow.recipes import RECIPES, Recipe, get_recipe, recipe_for


@pytest.mark.parametrize("name", ["digits", "mnist", "images"])
def test_by_name(name: str) -> None:
    assert get_recipe(name) is RECIPES[name]
    assert isinstance(get_recipe(name), Recipe)


@pytest.mark.parametrize("name", ["", "Digits", "cifar"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(UserError) as caught:
        get_recipe(name)
    assert str(caught.value) == (f"unknown preset '{name}'; expected one of {', '.join(RECIPES)}; correct --preset")


def test_by_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert recipe_for("digits") == "digits"
    assert recipe_for("mnist") == "mnist"
    assert recipe_for("photos/") == "images"
    assert recipe_for(str(tmp_path)) == "images"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert recipe_for("./digits") == "images"


@pytest.mark.parametrize("name", RECIPES)
def test_roles(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.teacher.objective.kind == "diffusion"
    assert recipe.student.objective.kind == "scd"
    assert recipe.teacher.data.source == recipe.student.data.source == name
    # A student takes the network of its teacher, and a lower learning rate.
    assert recipe.student.network == recipe.teacher.network
    assert recipe.student.optimizer.lr < recipe.teacher.optimizer.lr
    # The second term of the tangent is in well before the end.
    assert 0 < recipe.student.objective.tangent.warmup <= recipe.student.loop.iterations / 2


@pytest.mark.parametrize("name", RECIPES)
def test_times_and_noise_levels_are_the_papers(name: str) -> None:
    recipe = get_recipe(name)
    for config in (recipe.teacher, recipe.student):
        process = config.process
        assert (process.sigma_data, process.sigma_min, process.sigma_max) == (0.5, 0.002, 80.0)
        assert config.network.conditioning.time_map == "identity"
        assert config.network.conditioning.time_embedding == "positional"


def test_the_network_fits_any_data() -> None:
    config = fit_network(get_recipe("images").teacher, all_digits())
    assert (config.network.channels, config.network.conditioning.num_classes) == (1, 10)
    assert change(config, {"network": get_recipe("images").teacher.network}) == get_recipe("images").teacher
