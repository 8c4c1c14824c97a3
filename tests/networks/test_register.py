"""Networks by name: which names are free, and what is said of a configuration that has none."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from torch import nn

from trigflow import networks
from trigflow.networks import ConditioningConfig, MLPConfig, NetworkConfig, build, name_of, network_state, register
from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class OwnConfig(NetworkConfig):
    dropout: float = 0.0
    conditioning: ConditioningConfig = field(default_factory=ConditioningConfig)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "NETWORKS", dict(networks.NETWORKS))


def named(name: str, module: str) -> type[OwnConfig]:
    return dataclass(frozen=True)(type(name, (OwnConfig,), {"__module__": module}))


def test_a_class_of_the_same_name_from_elsewhere_does_not_take_the_place_of_a_network() -> None:
    with pytest.raises(UserError, match="the name 'mlp' is taken by MLP; expected a new one; choose another"):
        register("mlp", named("MLPConfig", "elsewhere"), nn.Identity)
    assert networks.NETWORKS["mlp"][0] is MLPConfig


def test_a_file_that_is_imported_again_registers_again() -> None:
    for _ in range(2):
        config = named("FileConfig", "own_file")
        register("own", config, nn.Identity)
        assert networks.NETWORKS["own"][0] is config


def test_a_configuration_in_place_of_its_class_is_refused() -> None:
    with pytest.raises(
        UserError, match="a MLPConfig for a network; expected a class derived from NetworkConfig; pass the class"
    ):
        register("own", MLPConfig(), nn.Identity)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [build, name_of, network_state])
def test_a_configuration_of_no_known_network_is_refused(function: object) -> None:
    with pytest.raises(UserError, match=r"no network for a OwnConfig; expected one of unet, .*; pass a network configuration"):
        function(OwnConfig())  # type: ignore[operator]
