"""trigflow: continuous-time consistency models that draw in one or two steps.

    import trigflow

    model = trigflow.load("runs/demo")
    images = model.sample(num=100, steps=2, seed=0)
    trigflow.save_grid(images, "digits.png")

The names below are imported when they are first used, so `from trigflow.tangent import jvp` stays light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from trigflow import moved
from trigflow.process import Proposal, TrigFlow
from trigflow.runtime.errors import MissingExtraError, UserError
from trigflow.version import __version__

if TYPE_CHECKING:
    from trigflow.codecs.pictures import save_grid as save_grid
    from trigflow.codecs.pictures import save_images as save_images
    from trigflow.data import open_dataset as open_dataset
    from trigflow.evaluation.evaluate_model import evaluate_model as evaluate_model
    from trigflow.lab.recipes import get_recipe as get_recipe
    from trigflow.models.model import Model as Model
    from trigflow.models.model import load as load
    from trigflow.models.outside import model_of as model_of
    from trigflow.plugins import load_plugin as load_plugin
    from trigflow.training.config import RunConfig as RunConfig
    from trigflow.training.runs import distill as distill
    from trigflow.training.runs import train as train

_HOME = {
    "Model": "trigflow.models.model",
    "RunConfig": "trigflow.training.config",
    "distill": "trigflow.training.runs",
    "evaluate_model": "trigflow.evaluation.evaluate_model",
    "get_recipe": "trigflow.lab.recipes",
    "load": "trigflow.models.model",
    "load_plugin": "trigflow.plugins",
    "model_of": "trigflow.models.outside",
    "open_dataset": "trigflow.data",
    "save_grid": "trigflow.codecs.pictures",
    "save_images": "trigflow.codecs.pictures",
    "train": "trigflow.training.runs",
}

__all__ = ["MissingExtraError", "Proposal", "TrigFlow", "UserError", "__version__", *_HOME]


moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trigflow' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
