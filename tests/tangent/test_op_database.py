"""Every operator that PyTorch lists for its own tests: the engine agrees with the true derivative, or it refuses.

The list is `op_db` of `torch.testing._internal`, with arguments for each operator. Of each, a few samples are taken, in
float64 and in complex128 where there are any; once every floating-point argument carries a tangent, and once each alone.
"""

from __future__ import annotations

import itertools
import sys
import types
import unittest
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tangent.helpers import by_jacobian, floats, reference
from trigflow.tangent import Dual, TangentError, jvp

REFUSED: dict[str, str] = {
    "PyTorch has no forward derivative of them": """
        _chunk_cat _segment_reduce_lengths _segment_reduce_offsets cholesky geqrf ormqr igamma igammac histogram
        histogramdd index_reduce_amax index_reduce_amin index_reduce_mean index_reduce_prod linalg_ldl_factor
        linalg_ldl_factor_ex linalg_ldl_solve linspace_tensor_overload native_dropout_backward special_zeta to_sparse
        scatter unique unique_consecutive nn_functional_ctc_loss nn_functional_multi_margin_loss
        nn_functional_multilabel_margin_loss nn_functional_soft_margin_loss""",
    "PyTorch takes their derivative to be zero": """
        nextafter scatter_reduce_prod special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0
        special_bessel_y1 special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
        special_chebyshev_polynomial_w special_hermite_polynomial_h special_hermite_polynomial_he
        special_laguerre_polynomial_l special_legendre_polynomial_p special_modified_bessel_i0
        special_modified_bessel_i1 special_modified_bessel_k0 special_modified_bessel_k1
        special_scaled_modified_bessel_k0 special_scaled_modified_bessel_k1 special_shifted_chebyshev_polynomial_t
        special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
        special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0""",
    "some of their arguments or outputs have no derivative in PyTorch": """
        linalg_lstsq linalg_lstsq_grad_oriented linalg_lu lu_unpack linalg_norm linalg_pinv triangular_solve quantile
        nanquantile gradient native_layer_norm native_group_norm nn_functional_cosine_embedding_loss
        nn_functional_hinge_embedding_loss nn_functional_nll_loss nn_functional_cross_entropy
        nn_functional_linear_cross_entropy nn_functional_binary_cross_entropy""",
    "custom operators": "nn_functional_linear_cross_entropy_chunked nn_functional_linear_cross_entropy_chunked_none",
    "they write their buffers": """
        _batch_norm_with_update _native_batch_norm_legit native_batch_norm nn_functional_batch_norm
        nn_functional_instance_norm nn_functional_embedding nn_functional_embedding_bag""",
    "they draw or resize in place": """
        cauchy exponential geometric log_normal normal normal_in_place normal_number_mean uniform resize_ resize_as_
        zero_ nn_functional_gaussian_nll_loss""",
}
"""Operators through which some argument carries no tangent, by reason."""

NO_VALUES = "empty empty_like empty_permuted empty_strided new_empty new_empty_strided".split()
KINDS = (torch.float64, torch.complex128)


@pytest.fixture(scope="module")
def operators() -> list[Any]:
    if "expecttest" not in sys.modules:
        # Imported by PyTorch's test utilities for the base class of its test cases only.
        stand_in: Any = types.ModuleType("expecttest")
        stand_in.TestCase, stand_in.ACCEPT = unittest.TestCase, False
        sys.modules["expecttest"] = stand_in
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ModuleNotFoundError as missing:
        if str(missing.name).startswith("torch"):
            pytest.skip(f"this PyTorch does not ship its operator database ({missing.name})")
        raise
    return [op for op in op_db if op.name not in NO_VALUES]


def samples(op: Any, dtype: torch.dtype) -> list[tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """Some of the first samples, as functions of their tensors of numbers, and these."""
    chosen: list[Any] = []
    torch.default_generator.manual_seed(0)
    # The function behind op.sample_inputs, which walks the whole stack at every call.
    for one in itertools.islice(op.sample_inputs_func(op, "cpu", dtype, False), 0, 7, 2):
        leaves, tree = pytree.tree_flatten((one.input, one.args, one.kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dtype in KINDS]
        if not places or any(leaves[i].layout != torch.strided or leaves[i].numel() == 0 for i in places):
            continue
        if chosen and sum(leaves[i].numel() for i in places) > 1000:
            continue

        def fn(*values: Tensor, leaves: Any = leaves, tree: Any = tree, places: Any = places) -> Any:
            leaves = list(leaves)
            for i, value in zip(places, values, strict=True):
                leaves[i] = value
            first, args, kwargs = pytree.tree_unflatten(leaves, tree)
            torch.default_generator.manual_seed(1)
            return pytree.tree_leaves(op.op(first, *args, **kwargs))

        values = tuple(leaves[i].detach().clone() for i in places)
        try:
            usable = floats(fn(*values))
        except Exception:  # an operator of another device
            continue
        if usable:
            chosen.append((fn, values))
    return chosen


def directions(primals: tuple[Tensor, ...]) -> list[tuple[Tensor | None, ...]]:
    """A random tangent for every tensor, and for each of the first few alone."""
    generator = torch.Generator().manual_seed(2)
    together = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in primals)
    alone = [tuple(t if i == j else None for j, t in enumerate(together)) for i in range(min(len(together), 4))]
    return [together, *alone] if len(together) > 1 else [together]


def gap(values: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative distance of corresponding tensors, where the expected one is finite."""
    largest = 0.0
    for a, b in zip(values, expected, strict=True):
        a, b = (x.to_dense() if x.layout != torch.strided else x for x in (a, b))
        known = b.isfinite()
        scale = b[known].abs().max() if known.any() else torch.ones(())
        if known.any():
            largest = max(largest, float((a[known] - b[known]).abs().max() / scale.clamp_min(1e-4)))
    return largest


def differences(fn: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> list[Tensor]:
    """Central differences."""
    ends = []
    for step in (1e-6, -1e-6):
        ends.append(floats(fn(*[x if t is None else x + step * t for x, t in zip(primals, tangents, strict=True)])))
    return [(a - b) / 2e-6 for a, b in zip(*ends, strict=True)]


# The first that works decides, and the next speaks up where that one is not right: PyTorch's own forward mode is not, for
# silu of complex numbers.
ORACLES: list[tuple[Callable[..., Any], float]] = [(reference, 1e-9), (by_jacobian, 1e-9), (differences, 1e-5)]


def strange(x: Tensor) -> Tensor:
    """The same numbers in another order in memory, with gaps."""
    wide = torch.zeros((*reversed(x.shape), 2), dtype=x.dtype)[..., 0]
    return wide.permute(tuple(range(x.ndim - 1, -1, -1))).copy_(x)


def verdict(fn: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...]) -> str | None:
    """What is wrong with the engine's tangent, if anything is. Raises TangentError where it refuses."""
    plain = floats(fn(*primals))
    out, tangent = jvp(fn, primals, tangents)
    if gap(floats(out), plain) > 1e-14:
        return "another output"
    found = floats(tangent)
    shuffled = jvp(
        lambda *xs: fn(*[Dual(x.primal, strange(x.tangent)) if type(x) is Dual else x for x in xs]), primals, tangents
    )[1]
    if gap(floats(shuffled), found) > 1e-9:
        return "another tangent when its strides are others"
    reports = []
    for oracle, tolerance in ORACLES:
        if oracle is by_jacobian and sum(x.numel() for x in found) > 300:
            continue
        try:
            distance = gap(found, floats(oracle(fn, primals, tangents)))
        except Exception as reason:
            reports.append(str(reason).split("\n")[0][:60])
            continue
        if distance < tolerance:
            return None
        reports.append(f"{distance:.1e}")
    return f"another tangent: {', '.join(reports)}"


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_no_tangent_is_lost(operators: list[Any], dtype: torch.dtype) -> None:
    wrong, refused, tried = [], set(), 0
    for op in operators:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            cases = samples(op, dtype) if op.supports_dtype(dtype, "cpu") else []
            for fn, primals, tangents in ((*case, t) for case in cases for t in directions(case[1])):
                tried += 1
                trouble = None
                try:
                    trouble = verdict(fn, primals, tangents)
                except TangentError:
                    refused.add(op.formatted_name)
                except Exception as reason:
                    trouble = f"{type(reason).__name__}: {reason}"[:200]
                if trouble:
                    which = "".join("-" if t is None else "x" for t in tangents)
                    wrong.append(f"{op.formatted_name} ({which}): {trouble}")
    assert not wrong, "\n".join(wrong)
    assert tried > 300
    known = {name for names in REFUSED.values() for name in names.split()}
    assert refused <= known, sorted(refused - known)
