"""Derivative rules, one module a family, each a table from function names to a short derivative.

Importing this package fills the table of handlers.
"""

from trigflow.tangent.rules import (  # noqa: F401
    arithmetic,
    attention,
    distance,
    elementwise,
    linear,
    norm,
    order,
    plain,
    random,
    recurrent,
    reduce,
    sampling,
    shape,
)
