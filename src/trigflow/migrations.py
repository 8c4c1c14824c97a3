"""Files that users keep carry a format number; older ones become what the code of today reads, newer ones are refused.

A file says `"format": n` and, beside it, which version of trigflow wrote it. Where there is no number it is 1. One function a
step, from a plain dict to a plain dict, so that each can be read and tested by itself:

=========  =========================================================  ======
kind       file                                                       format
=========  =========================================================  ======
`config`   `config.json` of a run: every setting of its training        3
`model`    `model.json`: all that drawing needs                         2
`report`   `report.json`, `convert.json`, figures of an evaluation      1
`latents`  the entry `latents` in the `dataset.json` of an archive      1
`cache`    `cache.json`, what latents and text features were made with  1
=========  =========================================================  ======

Checkpoints have a number of their own in `state.json`, and the `model` in it has that of `model.json`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from trigflow.plugins import check_loaded, loaded
from trigflow.runtime.errors import UserError
from trigflow.version import __version__

FORMATS = {"config": 3, "model": 2, "report": 1, "latents": 1, "cache": 1}
"""What this version writes, and the newest that it reads."""


def stamped(kind: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file of this kind with its format, the version that writes it, and the plugins it depends on."""
    plugins = loaded() if kind in ("config", "model") else []
    return {"format": FORMATS[kind], "trigflow": __version__, **({"plugins": plugins} if plugins else {}), **raw}


def migrated(kind: str, raw: Any, what: str, **beside: Any) -> dict[str, Any]:
    """The content of a file of this kind as this version writes it, without format and version.

    Args:
        kind: one of `FORMATS`.
        raw: the content as it was read.
        what: names the file in messages.
        beside: what older formats kept in other files: for `model`, the `config` beside it.

    Raises:
        UserError: for content that is no such file, a format that only a newer version reads, or a plugin that is missing.
    """
    if not isinstance(raw, Mapping):
        raise UserError(
            f"{what} cannot be used (it holds no table); expected a file written by trigflow; restore it from the run"
        )
    found = raw.get("format", 1)
    if type(found) is not int or found < 1:
        raise UserError(f"{what} has format {found!r}; expected a whole number; restore the file as trigflow wrote it")
    if found > FORMATS[kind]:
        version = raw.get("trigflow", "a newer version")
        raise UserError(
            f"{what} has format {found}, written by trigflow {version}; expected at most {FORMATS[kind]}, all that trigflow "
            f"{__version__} reads; update trigflow to {version}"
        )
    plugins = raw.get("plugins", [])
    if not isinstance(plugins, list) or not all(isinstance(one, Mapping) for one in plugins):
        raise UserError(f"{what} has plugins {plugins!r}; expected a list of tables; restore the file as trigflow wrote it")
    check_loaded(plugins, what)
    content = dict(raw)
    for step in range(found, FORMATS[kind]):
        content = STEPS[kind, step](content, **beside)
    return {name: value for name, value in content.items() if name not in ("format", "trigflow", "plugins")}


def config_1_to_2(raw: dict[str, Any], **_: Any) -> dict[str, Any]:
    """Each objective has its own settings alone, and conditions of the network have names."""
    sd = raw.get("process", {}).get("sigma_data", 0.5)
    return {**raw, "objective": _objective(raw.get("objective", {}), sd), "network": _network(raw["network"])}


def config_2_to_3(raw: dict[str, Any], **_: Any) -> dict[str, Any]:
    """`parallel.compile`, true or false, became `loop.compile`, of whole losses: true is on, and false was not asked for."""
    parallel = dict(raw.get("parallel", {}))
    asked = "on" if parallel.pop("compile", False) else "auto"
    return {**raw, "parallel": parallel, "loop": {**raw.get("loop", {}), "compile": asked}}


def _network(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`takes_guidance` and `takes_end` of the conditioning as names in `takes`."""
    conditioning = dict(raw.get("conditioning", {}))
    told = [name for name in ("guidance", "end") if conditioning.pop(f"takes_{name}", False)]
    return {**raw, "conditioning": {**conditioning, "takes": told}}


def _objective(raw: Mapping[str, Any], sd: float) -> dict[str, Any]:
    """The settings of an objective of format 1, which had those of all of them, as its class has them."""

    def only(*names: str) -> dict[str, Any]:
        return {name: raw[name] for name in names if name in raw}

    kind = raw.get("kind", "diffusion")
    new = {"kind": kind, **only("proposal", "adaptive_weight")}
    if kind == "diffusion":
        return {**new, **only("label_dropout")}
    velocity = "data" if kind in ("sct", "ct", "meanflow") else "teacher"
    new |= {"velocity": velocity, **only("guidance_max", "guidance_interval", "tangent")}
    if kind in ("ct", "cd"):
        return {**new, **only("discrete")}
    if kind in ("vsd", "scd-vsd"):
        new |= {"alone": kind == "vsd", **only("lambda_vsd", "vsd_proposal", "fake_lr", "fake_updates")}
    if kind in ("meanflow", "meanflow-distill"):
        old: dict[str, Any] = {"mean": -0.4, "std": 1.0, "equal": 0.75, "weighting": "error", "power": 1.0, "c": 1e-3}
        old |= raw.get("meanflow", {})
        shape = {**raw.get("tangent", {}), "warmup": 0, "prior": 0.0, "derivative": "exact"}
        return {
            **new,
            "proposal": {"mean": old["mean"] + math.log(sd), "std": old["std"]},  # of log tan t, now of log sigma
            "jumps": "any",
            "ends": "pair",
            "anchor": old["equal"],
            "weighting": "average" if old["weighting"] == "learned" else old["weighting"],
            "power": old["power"],
            "c": old["c"],
            "tangent": shape,
        }
    return {**new, "jumps": "segments", **only("segments")}


def model_1_to_2(raw: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What drawing needs moved from `config.json` to `model.json`, and the normalization became a codec."""
    objective, shape = config["objective"], list(raw["shape"])
    normalization = dict(raw["normalization"])
    latents = normalization.get("kind") == "latent"
    codec = {**normalization, "kind": "latents" if latents else "pixels", "shape": shape}
    consistency = raw["kind"] == "consistency"
    averages = objective["kind"] in ("meanflow", "meanflow-distill")
    segments = objective.get("segments", 1)
    jumps = "any" if averages else "segments" if segments > 1 else "zero"
    classes = config["network"].get("conditioning", {}).get("num_classes", 0)
    names = raw["class_names"] if len(raw["class_names"]) == classes else []
    return {
        "process": config["process"],
        "network": _network(config["network"]),
        "codec": codec,
        "conditioner": {"label": {"kind": "classes", "num": classes, "names": names}} if classes else {},
        "sampling": {
            "kind": "flow_map" if consistency else "ode",
            "jumps": jumps if consistency else "zero",
            "segments": segments if consistency else 1,
            "guidance_max": objective.get("guidance_max", 1.0),
            "gamma": 0.0,
            "guided": not consistency and objective.get("label_dropout", 0.1) > 0,
        },
        "times": raw["times"],
        "channels_last": config.get("loop", {}).get("channels_last", False),
        "origin": {
            "objective": objective["kind"],
            "data": config.get("data", {}),
            "teacher": config.get("teacher"),
            "seed": config.get("loop", {}).get("seed", 0),
        },
    }


STEPS: dict[tuple[str, int], Callable[..., dict[str, Any]]] = {
    ("config", 1): config_1_to_2,
    ("config", 2): config_2_to_3,
    ("model", 1): model_1_to_2,
}
"""From the kind and the format to the function that leads to the next."""
