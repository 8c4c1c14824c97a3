"""Values from Python: what is of another kind is said in one line, wherever it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch

from trigflow.runtime.errors import UserError
from trigflow.runtime.values import check_types, kind_of, number, whole


@pytest.mark.parametrize("value", [0, -3, 2**70, np.int64(5), torch.tensor(4)])
def test_whole_numbers(value: Any) -> None:
    whole(num=value)


@pytest.mark.parametrize("value", ["3", 2.0, True, None, torch.tensor(2.0), np.float64(1), [1], float("nan")])
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises(UserError, match=r"^num is .*; expected a whole number; correct the argument$"):
        whole(first=1, num=value)


@pytest.mark.parametrize("value", [1, 2.5, np.float32(1), torch.tensor(2.0), float("nan")])
def test_numbers(value: Any) -> None:
    number(guidance=value)


@pytest.mark.parametrize("value", ["2", None, True, torch.ones(3), 10**400])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(UserError, match=r"^guidance is .*; expected a number; correct the argument$"):
        number(guidance=value)


def test_objects_of_a_class() -> None:
    kind_of(dict, one={}, other=None)
    with pytest.raises(UserError, match=r"^other is \[\]; expected a dict; correct the argument$"):
        kind_of(dict, one={}, other=[])


@dataclass(frozen=True)
class Inner:
    rate: float = 1.0
    kind: Literal["a", "b"] = "a"
    sides: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] | None = None
    anything: Any = None


@dataclass(frozen=True)
class Outer:
    name: str = "x"
    on: bool = False
    count: int | None = None
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    "settings",
    [
        Outer(),
        Outer(count=3, inner=Inner(rate=2, kind="b", sides=(), pair=(0.9, 1))),
        Outer(inner=Inner(sides=[4], anything=object())),  # type: ignore[arg-type]
    ],
)
def test_settings_of_the_types_they_declare(settings: Outer) -> None:
    check_types(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (Outer(name=5), "name is 5; expected text"),  # type: ignore[arg-type]
        (Outer(on=1), "on is 1; expected True or False"),  # type: ignore[arg-type]
        (Outer(count=True), "count is True; expected a whole number or None"),
        (Outer(count=2.0), "count is 2.0; expected a whole number or None"),  # type: ignore[arg-type]
        (Outer(inner=5), "inner is 5; expected Inner"),  # type: ignore[arg-type]
        (Outer(inner=Inner(rate="2")), "inner.rate is '2'; expected a number"),  # type: ignore[arg-type]
        (Outer(inner=Inner(kind="c")), "inner.kind is 'c'; expected one of a, b"),  # type: ignore[arg-type]
        (Outer(inner=Inner(sides=(1, 2.5))), "expected a row of a whole number"),  # type: ignore[arg-type]
        (Outer(inner=Inner(sides="12")), "expected a row of a whole number"),  # type: ignore[arg-type]
        (Outer(inner=Inner(pair=(1.0,))), "expected a row of a number or None"),  # type: ignore[arg-type]
        (Outer(inner=Inner(rate=torch.ones(50))), "inner.rate is a Tensor; expected a number"),  # type: ignore[arg-type]
    ],
)
def test_the_first_setting_of_another_type_is_named(settings: Outer, said: str) -> None:
    with pytest.raises(UserError) as error:
        check_types(settings)
    assert said in str(error.value)
    assert str(error.value).endswith("; correct the setting")
