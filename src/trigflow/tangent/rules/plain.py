"""Functions whose derivative is zero or that have none: they see the primal and return plain tensors.

A plain tensor is a constant for everything that follows, which is what a zero tangent means.
"""

from __future__ import annotations

from typing import Any

from trigflow.tangent.dispatch import fallback
from trigflow.tangent.dual import has_dual, strip
from trigflow.tangent.table import register


def plain(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run on the primals."""
    return func(*strip(args), **strip(kwargs))


def filled(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """`full_like(x, value)`, `x.new_full(size, value)`: constants unless the value carries a tangent."""
    if has_dual(args) or has_dual(kwargs):
        return fallback(func, strip(input), *args, **kwargs)
    return func(strip(input), *args, **kwargs)


register(
    plain,
    # comparisons and tests
    *"eq ne lt le gt ge equal isclose allclose isfinite isinf isnan isneginf isposinf isreal signbit isin".split(),
    *"greater greater_equal less less_equal not_equal all any is_nonzero logical_and logical_or logical_not".split(),
    *"logical_xor is_same_size bucketize searchsorted histc bincount count_nonzero nonzero argwhere".split(),
    *[f"Tensor.__{name}__" for name in "eq ne lt le gt ge and or xor invert bool int contains len".split()],
    # piecewise constant
    *"floor ceil round trunc fix sign sgn heaviside floor_divide argmax argmin argsort".split(),
    *"Tensor.__floordiv__ Tensor.__rfloordiv__".split(),
    # facts about the tensor
    *"is_floating_point is_complex is_signed is_contiguous is_conj is_neg is_inference is_pinned is_shared size".split(),
    *"dim ndimension nelement numel stride storage_offset element_size get_device result_type can_cast".split(),
    *"dim_order is_tensor is_storage is_distributed is_set_to has_names type_name sym_size".split(),
    # fresh tensors
    *"zeros_like ones_like empty_like rand_like randn_like randint_like new_zeros new_ones".split(),
    *"new_empty new_tensor new_empty_strided bernoulli multinomial poisson empty_strided".split(),
    # a zero tangent on purpose
    "detach",
    # hooks on the primal's graph
    *"register_hook register_post_accumulate_grad_hook retain_grad".split(),
)
register(plain, *"int long short char byte bool".split())
register(filled, "full_like", "new_full")
