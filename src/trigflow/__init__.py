"""trigflow: continuous-time consistency models that draw in one or two steps."""

from trigflow.version import __version__

__all__ = ["__version__"]
