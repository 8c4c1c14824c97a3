"""Functions whose derivative is zero or that have none: they see the primal and return plain tensors.

A plain tensor is a constant for everything that follows, which is what a zero tangent means.
"""

from typing import Any

from trigflow.tangent.dispatch import fallback, unsupported
from trigflow.tangent.dual import Dual, has_dual, no_grad, pair, strip, value_read
from trigflow.tangent.table import register


def plain(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run on the primals."""
    return func(*strip(args), **strip(kwargs))


def filled(func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """`full_like(x, value)`, `x.new_full(size, value)`: constants unless the value carries a tangent."""
    if has_dual(args) or has_dual(kwargs):
        return fallback(func, strip(input), *args, **kwargs)
    return func(strip(input), *args, **kwargs)


def fresh(func: Any, input: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
    """`x.new_tensor(data)` reads the values of `data`, past every rule."""
    if has_dual(data):
        raise value_read(".new_tensor()")
    return func(strip(input), data, *args, **kwargs)


def signed(func: Any, input: Any) -> Any:
    """`sgn`: constant for real numbers, a direction that turns for complex ones."""
    return fallback(func, input) if input.primal.is_complex() else func(input.primal)


def counted(func: Any, input: Any, weights: Any = None, minlength: int = 0) -> Any:
    """`torch.bincount`: a sum of weights, if there are any."""
    primal = func(strip(input), strip(weights), minlength)
    if type(weights) is not Dual:
        return primal
    with no_grad():
        return pair(primal, func(strip(input), weights.tangent, minlength))


def drawn(func: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.normal` of a moving mean or deviation, of which PyTorch takes the derivative to be zero."""
    raise unsupported(func, "PyTorch gives its draws no derivative; mean + std * torch.randn_like(std) has one")


register(
    plain,
    # comparisons and tests
    *"eq ne lt le gt ge equal isclose allclose isfinite isinf isnan isneginf isposinf isreal signbit isin".split(),
    *"greater greater_equal less less_equal not_equal all any is_nonzero logical_and logical_or logical_not".split(),
    *"logical_xor is_same_size bucketize searchsorted histc count_nonzero nonzero argwhere".split(),
    *[f"Tensor.__{name}__" for name in "eq ne lt le gt ge and or xor invert bool int contains len".split()],
    # piecewise constant
    *"floor ceil round trunc fix sign floor_divide argmax argmin argsort special.round".split(),
    *"Tensor.__floordiv__ Tensor.__rfloordiv__".split(),
    # facts about the tensor
    *"is_floating_point is_complex is_signed is_contiguous is_conj is_neg is_inference is_pinned is_shared size".split(),
    *"dim ndimension nelement numel stride storage_offset element_size get_device result_type can_cast".split(),
    *"dim_order is_tensor is_storage is_distributed is_set_to has_names type_name sym_size".split(),
    # fresh tensors
    *"empty_like zeros_like new_empty new_zeros new_empty_strided ones_like rand_like randn_like randint_like".split(),
    *"new_ones bernoulli multinomial poisson empty_strided".split(),
    # a zero tangent on purpose
    "detach",
    # hooks on the primal's graph
    *"register_hook register_post_accumulate_grad_hook retain_grad".split(),
)
register(plain, *"int long short char byte bool".split())
register(filled, "full_like", "new_full")
register(fresh, "new_tensor")
register(signed, "sgn")
register(counted, "bincount")
register(drawn, "normal")
