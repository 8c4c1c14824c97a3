"""Derivative rules, one module a family, each a table from function names to a short derivative.

Importing this package fills the table of handlers.
"""

from trigflow.tangent.rules import arithmetic, attention, elementwise, linear, norm, plain, random, reduce, shape

__all__ = ["arithmetic", "attention", "elementwise", "linear", "norm", "plain", "random", "reduce", "shape"]
