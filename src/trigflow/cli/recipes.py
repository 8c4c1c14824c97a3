"""`trigflow recipes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Recipes:
    """List the presets for train and distill, or show all settings of one.

    Example: trigflow recipes img512-xl-scd
    """

    name: Annotated[Positional[str | None], arg(metavar="NAME")] = None
    """Recipe to show in full; all of them are listed without it."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        import json

        from trigflow.lab.recipes.listing import as_lines, as_table, list_recipes, show

        if self.name is not None:
            recipe = show(self.name)
            print(json.dumps(recipe, indent=2) if self.json else "\n".join(as_lines(recipe)))
        else:
            recipes = list_recipes()
            print(json.dumps(recipes, indent=2) if self.json else as_table(recipes))
