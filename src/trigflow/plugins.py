"""Files of a user's own that add something to the package: an objective, a codec, a network, data, a preset.

Such a file is named by `--plugin my_objective.py`, or by `load_plugin` in Python, and imported because the user named it. It
calls `trigflow.objectives.register`, `trigflow.codecs.register`, `trigflow.networks.register`, `trigflow.data.register` or
`trigflow.lab.recipes.register`. Run folders and models keep its name and digest, so that a later command without it, or with
another version of it, can say so.
"""

import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from trigflow.runtime.errors import UserError


@dataclass(frozen=True)
class Plugin:
    """A file that was imported: its name and the SHA-256 of its content."""

    file: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.file} (sha256 {self.sha256[:12]}...)"


LOADED: dict[str, tuple[Plugin, ModuleType]] = {}
"""What has been imported in this process, by name of the file."""


def load_plugin(path: str | Path) -> ModuleType:
    """Import a file; once, whatever the number of calls.

    Raises:
        UserError: if there is no such file, another version of it was imported before, or it raises an error.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: what can be no path, as with a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"plugin '{path}' cannot be read ({reason}); expected a Python file; correct --plugin") from None
    plugin = Plugin(path.name, hashlib.sha256(content).hexdigest())
    if path.name in LOADED:
        known, module = LOADED[path.name]
        if known != plugin:
            raise UserError(f"plugin {known} is there, and now {plugin}; expected one of that name; start anew")
        return module
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise UserError(f"plugin '{path}' is no Python file; expected one that ends in .py; correct --plugin")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses look their module up
    try:
        code = compile(content, path, "exec", dont_inherit=True)  # what the digest is of, not bytecode that Python kept
        exec(code, vars(module))
        LOADED[path.name] = (plugin, module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"plugin '{path}' cannot be imported ({type(error).__name__}: {' '.join(str(error).split())}); expected one that "
            "runs; correct it"
        ) from error
    finally:
        if before is not None:
            sys.modules[path.stem] = before
        elif path.name not in LOADED:
            sys.modules.pop(path.stem, None)
    return module


def loaded() -> list[dict[str, str]]:
    """Names and digests for a file that is written now."""
    return [{"file": plugin.file, "sha256": plugin.sha256} for plugin, _ in LOADED.values()]


def check_loaded(needed: Iterable[Mapping[str, Any]], what: str) -> None:
    """Raise a UserError for the first of the plugins that a file was written with, as `loaded` gave them, that is missing or
    another version; `what` names the file."""
    for one in needed:
        plugin = Plugin(str(one.get("file")), str(one.get("sha256")))
        if plugin.file not in LOADED:
            raise UserError(
                f"{what} was made with the plugin {plugin}, which is not loaded; expected it; pass --plugin {plugin.file}, or "
                "call trigflow.load_plugin first"
            )
        found = LOADED[plugin.file][0]
        if found != plugin:
            raise UserError(
                f"{what} was made with the plugin {plugin}, and this one is {found}; expected the same content; restore it"
            )
