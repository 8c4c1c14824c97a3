"""What a run folder holds, in words."""

import json
from pathlib import Path
from typing import Any

from trigflow.conditions import null
from trigflow.models.model import load
from trigflow.training.checkpoint import list_checkpoints
from trigflow.training.config import flattened, to_dict
from trigflow.training.log import read_metrics
from trigflow.training.setup import config_of


def describe_run(folder: str | Path, *, as_json: bool = False) -> str:
    """What a run folder holds, as text or JSON. Raises a UserError when it is no run folder."""
    folder = Path(folder)
    finished = (folder / "model.json").is_file()
    model = load(folder, "cpu") if finished else None
    config = to_dict(config_of(folder, model))
    objective, iterations = config["objective"]["kind"], config["loop"]["iterations"]
    if model is not None and not (folder / "config.json").is_file():  # a model without its run: the rest are mere defaults
        objective, iterations = model.origin.get("objective", model.kind), None
        config = {
            name: config[name] for name in ("format", "data", "process", "network") if name != "data" or model.origin.get(name)
        }
    metrics, checkpoints = read_metrics(folder), list_checkpoints(folder)
    facts: dict[str, Any] = {
        "folder": str(folder),
        "objective": objective,
        "data": config.get("data", {}).get("source"),
        "network": config["network"]["kind"],
        "finished": finished,
        "iterations": iterations,
        "newest checkpoint": int(checkpoints[-1].name) if checkpoints else None,
    }
    if model is not None:
        facts["kind"] = model.kind
        facts["parameters"] = sum(p.numel() for p in model.network.parameters())
        facts |= model.codec.describe()
        facts["classes"] = model.num_classes
        if names := model.class_names:
            shown = [f"{number} {name}" for number, name in enumerate(names[:20])]
            more = [f"... {len(names) - 20} more"] * (len(names) > 20)
            facts["class names"] = dict(enumerate(names)) if as_json else ", ".join(shown + more)
        if told := [name for name in model.conditioner.inputs if name != "label"]:
            facts["conditions"] = told
        guided = "classifier-free" if null(model.network) and model.sampling.guided else "none"
        facts["guidance"] = f"1 to {model.sampling.guidance_max}" if "guidance" in model.takes else guided
        facts["searched times"] = {steps: list(times) for steps, times in model.times.items()}
    if metrics:
        last = metrics[-1]
        facts |= {name: last.get(name) for name in ("iteration", "loss", "grad_norm", "skipped")}
    if as_json:
        origin = {} if model is None else {"origin": model.origin}
        return json.dumps({**facts, **origin, "config": config}, indent=2)
    lines = [f"{name:24} {value}" for name, value in facts.items()]
    lines += ["", "settings"] + [f"  {name:36} {value}" for name, value in flattened(config).items()]
    return "\n".join(lines)
