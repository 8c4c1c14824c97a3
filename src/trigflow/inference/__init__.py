"""Drawing as fast as the machine can: variants of a network that compute the same function, and an engine around them.

A variant is a network in the place of another: same inputs, same outputs up to rounding, so that everything that draws from
a `Model` (`sample`, `velocity`, `sampler`) draws from `fast(model).model` as well.
"""

from trigflow.inference.engine import Engine, fast
from trigflow.inference.measure import Measurement, Report, measure
from trigflow.inference.variants import VARIANTS, build_variant

__all__ = ["VARIANTS", "Engine", "Measurement", "Report", "build_variant", "fast", "measure"]
