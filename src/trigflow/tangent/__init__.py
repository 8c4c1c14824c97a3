"""Jacobian-vector products of unmodified networks at about the cost of one more forward.

    out, tangent = jvp(net, (x, t), (dx, dt))

`out` is on the autograd graph as `net(x, t)` would be; `tangent` is detached. The package knows nothing of diffusion.
"""

from trigflow.tangent.api import jvp
from trigflow.tangent.attention import attention_implementation
from trigflow.tangent.compiled import Compiled, compile
from trigflow.tangent.coverage import Coverage, coverage
from trigflow.tangent.dispatch import is_traced
from trigflow.tangent.dual import Dual
from trigflow.tangent.errors import TangentError

__all__ = [
    "Compiled",
    "Coverage",
    "Dual",
    "TangentError",
    "attention_implementation",
    "compile",
    "coverage",
    "is_traced",
    "jvp",
]
