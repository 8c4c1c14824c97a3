"""Networks `F(x_t / sd, t, **conditions)`, built from plain configurations.

Every network takes x of unit variance, times `(b,)` and conditions `(b, ...)` by name, returns a tensor like x, and has two
attributes: `takes`, the names of its conditions, and `null`, the rows that mean "none"; see `trigflow.conditions`.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import dacite
from torch import nn

from trigflow.networks.custom import Custom, CustomConfig
from trigflow.networks.ddpmpp import DDPMPP, DDPMPPConfig
from trigflow.networks.dit import DiT, DiTConfig, dit_config
from trigflow.networks.edm2 import EDM2, EDM2Config
from trigflow.networks.embeddings import Conditioning, ConditioningConfig, FourierEmbedding, NetworkConfig, PositionalEmbedding
from trigflow.networks.mlp import MLP, MLPConfig
from trigflow.networks.text import TextConfig
from trigflow.networks.unet import UNet, UNetConfig
from trigflow.runtime.errors import UserError
from trigflow.runtime.machine import in_float32
from trigflow.runtime.values import same_class

NETWORKS: dict[str, tuple[type[Any], type[nn.Module]]] = {
    "unet": (UNetConfig, UNet),
    "mlp": (MLPConfig, MLP),
    "ddpmpp": (DDPMPPConfig, DDPMPP),
    "edm2": (EDM2Config, EDM2),
    "dit": (DiTConfig, DiT),
    "custom": (CustomConfig, Custom),
}
"""From the name in a run's configuration to the configuration class and the module class."""


def register(name: str, config: type[Any], module: type[nn.Module]) -> None:
    """Add a network from outside the package under a name of its own.

    Args:
        name: not yet taken by another class.
        config: a frozen dataclass, a `NetworkConfig`, with at least `dropout` and `conditioning`.
        module: made as `module(config, sigma_data)`; has `takes` and `null`.

    Raises:
        UserError: for a name that is taken, or a configuration that is none.
    """
    if not isinstance(config, type):
        raise UserError(f"a {type(config).__name__} for a network; expected a class derived from NetworkConfig; pass the class")
    if name in NETWORKS and not same_class(NETWORKS[name][0], config):
        raise UserError(f"the name '{name}' is taken by {NETWORKS[name][1].__name__}; expected a new one; choose another")
    if not (issubclass(config, NetworkConfig) and dataclasses.is_dataclass(config)):
        raise UserError(
            f"{config.__name__} for a network; expected a dataclass that is a NetworkConfig; derive it from NetworkConfig"
        )
    NETWORKS[name] = (config, module)


def build(config: NetworkConfig, sigma_data: float = 0.5) -> nn.Module:
    """The network of a configuration, with fresh float32 weights from torch's default generator.

    Raises:
        UserError: for a configuration of no known network.
    """
    name = name_of(config)
    if config.conditioning.text and not config.reads:
        raise UserError(f"conditioning.text for a {name}, which reads none; expected a unet, edm2 or dit; change the network")
    with in_float32():
        return NETWORKS[name][1](config, sigma_data)


def name_of(config: NetworkConfig) -> str:
    """The name under which `build` knows this configuration; errors as there."""
    for name, (config_type, _) in NETWORKS.items():
        if type(config) is config_type:
            return name
    raise UserError(
        f"no network for a {type(config).__name__}; expected one of {', '.join(NETWORKS)}; pass a network configuration"
    )


def network_state(config: NetworkConfig) -> dict[str, Any]:
    """Plain JSON types; the network carries its name under `kind`."""
    state = json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload]
    if not config.conditioning.text:
        state["conditioning"].pop("text", None)  # which earlier versions do not know
    return {"kind": name_of(config), **state}


def network_from_state(state: Mapping[str, Any]) -> NetworkConfig:
    """The inverse of `network_state`; KeyError, TypeError, ValueError or DaciteError for what is none."""
    rest = dict(state)
    kind = rest.pop("kind")
    if kind not in NETWORKS:
        raise UserError(
            f"a network of the kind '{kind}'; expected one of {', '.join(NETWORKS)}; pass the file that adds it as --plugin"
        )
    found: NetworkConfig = dacite.from_dict(NETWORKS[kind][0], rest, dacite.Config(cast=[tuple], strict=True))
    return found


__all__ = [
    "DDPMPP",
    "EDM2",
    "MLP",
    "NETWORKS",
    "Conditioning",
    "ConditioningConfig",
    "CustomConfig",
    "DDPMPPConfig",
    "DiT",
    "DiTConfig",
    "EDM2Config",
    "FourierEmbedding",
    "MLPConfig",
    "NetworkConfig",
    "PositionalEmbedding",
    "TextConfig",
    "UNet",
    "UNetConfig",
    "build",
    "dit_config",
    "name_of",
    "network_from_state",
    "network_state",
    "register",
]
