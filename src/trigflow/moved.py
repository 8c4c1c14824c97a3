"""Modules that have moved: the old name still imports the module, and says in one line how it is spelled now."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "trigflow.bridge": "trigflow.models.bridges",
    "trigflow.demo": "trigflow.lab.demo",
    "trigflow.distributed": "trigflow.runtime.distributed",
    "trigflow.doctor": "trigflow.lab.doctor",
    "trigflow.errors": "trigflow.runtime.errors",
    "trigflow.files": "trigflow.runtime.files",
    "trigflow.heap": "trigflow.runtime.heap",
    "trigflow.hub": "trigflow.models.pretrained",
    "trigflow.hub.card": "trigflow.deploy.card",
    "trigflow.hub.export": "trigflow.deploy.export",
    "trigflow.hub.network": "trigflow.deploy.pipeline_network",
    "trigflow.hub.pipeline": "trigflow.deploy.pipeline",
    "trigflow.images": "trigflow.codecs.pictures",
    "trigflow.inference": "trigflow.deploy",
    "trigflow.metrics": "trigflow.evaluation",
    "trigflow.metrics.features": "trigflow.evaluation.features.extractors",
    "trigflow.model": "trigflow.models.model",
    "trigflow.outside": "trigflow.models.outside",
    "trigflow.plan": "trigflow.lab.plan",
    "trigflow.recipes": "trigflow.lab.recipes",
}
"""Public modules of 0.1.0 before it was ordered by rooms, and their names now. Also in files that an export wrote then."""


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED` under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is now {new}; import it by that name", FutureWarning, stacklevel=2)
        alias = ModuleType(spec.name)
        alias.__dict__.update({k: v for k, v in vars(importlib.import_module(new)).items() if not k.startswith("__")})
        return alias

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: the module is the new one's content."""


def install() -> None:
    """Make the old names importable, once."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())
