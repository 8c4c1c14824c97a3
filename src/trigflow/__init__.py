"""trigflow: continuous-time consistency models that draw in one or two steps.

    import trigflow

    model = trigflow.load("runs/demo")
    images = model.sample(num=100, steps=2, seed=0)
    trigflow.save_grid(images, "digits.png")

The names below are imported when they are first used, so `from trigflow.tangent import jvp` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trigflow.errors import MissingExtraError, UserError
from trigflow.process import Proposal, TrigFlow
from trigflow.version import __version__

if TYPE_CHECKING:
    from trigflow.data import open_dataset as open_dataset
    from trigflow.evaluation import evaluate_model as evaluate_model
    from trigflow.images import save_grid as save_grid
    from trigflow.images import save_images as save_images
    from trigflow.model import Model as Model
    from trigflow.model import load as load
    from trigflow.outside import model_of as model_of
    from trigflow.recipes import get_recipe as get_recipe
    from trigflow.training.config import RunConfig as RunConfig
    from trigflow.training.runs import distill as distill
    from trigflow.training.runs import train as train

_HOME = {
    "Model": "trigflow.model",
    "RunConfig": "trigflow.training.config",
    "distill": "trigflow.training.runs",
    "evaluate_model": "trigflow.evaluation",
    "get_recipe": "trigflow.recipes",
    "load": "trigflow.model",
    "model_of": "trigflow.outside",
    "open_dataset": "trigflow.data",
    "save_grid": "trigflow.images",
    "save_images": "trigflow.images",
    "train": "trigflow.training.runs",
}

__all__ = ["MissingExtraError", "Proposal", "TrigFlow", "UserError", "__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trigflow' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
