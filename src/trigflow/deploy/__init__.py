"""A trained model in use: variants of its network that draw faster, exports, and a pipeline of diffusers.

A variant is a network in the place of another: same inputs, same outputs up to rounding, so that everything that draws from
a `Model` (`sample`, `velocity`, `sampler`) draws from `fast(model).model` as well. `pipeline`, its model `card` and `export`
are imported by their own names, because they need more than the core of trigflow.
"""

from trigflow.deploy.engine import Engine, fast
from trigflow.deploy.measure import Measurement, Report, measure
from trigflow.deploy.variants import VARIANTS, build_variant

__all__ = ["VARIANTS", "Engine", "Measurement", "Report", "build_variant", "fast", "measure"]
