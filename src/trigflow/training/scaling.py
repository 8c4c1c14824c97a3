"""Loss scaling: gradients in float16 without underflow.

The smallest numbers of float16 are 6e-8, and gradients of a mean over a batch are often smaller. So the loss is multiplied by a
large power of two before it is differentiated, and the gradients of the weights, which are float32, are divided by it again
before anything else is done with them. Where the scaled gradients overflow, the scale was too large: the step is left out and
the scale halved. After a while without that it is doubled.

Source: Micikevicius et al. 2018, "Mixed precision training", section 3.2. `torch.amp.GradScaler` is the same rule, kept on the
device for each optimizer. Here the norm of the gradient has been read in every step anyway and the processes have agreed on it,
so that two numbers are all there is to keep.
"""

from dataclasses import dataclass
from typing import Any

START = 2.0**16
MOST = 2.0**32
LEAST = 1.0
INTERVAL = 2000
"""Steps without overflow after which the scale is doubled."""


@dataclass
class LossScale:
    """The factor of the loss, a power of two in [1, 2^32].

    Attributes:
        value: the factor.
        fine: steps without overflow since it last changed.
    """

    value: float = START
    fine: int = 0

    def lower(self) -> bool:
        """Halve it after an overflow. False where it was 1: then it is not the scale that makes gradients infinite."""
        self.fine = 0
        if self.value <= LEAST:
            return False
        self.value /= 2
        return True

    def succeeded(self) -> None:
        """Take note of a step whose gradients were finite."""
        self.fine += 1
        if self.fine >= INTERVAL:
            self.value, self.fine = min(2 * self.value, MOST), 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"value": self.value, "fine": self.fine}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        self.value, self.fine = float(state["value"]), int(state["fine"])
