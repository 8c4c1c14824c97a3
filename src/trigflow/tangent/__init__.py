"""Jacobian-vector products of unmodified networks at about the cost of one more forward."""

from trigflow.tangent.api import jvp
from trigflow.tangent.errors import TangentError

__all__ = ["TangentError", "jvp"]
