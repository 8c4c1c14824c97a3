"""The device, and what is asked of it so that equal steps give equal bits."""

from __future__ import annotations

import pytest
import torch

from trigflow.runtime.errors import UserError
from trigflow.runtime.machine import repeatable, resolve_device


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions free to add in any order, as PyTorch starts; and flags that may be set, which its own test library ends."""
    settings = torch.backends.flags_frozen.__globals__  # of the module that stands behind `torch.backends`
    monkeypatch.setitem(settings, "__allow_nonbracketed_mutation_flag", True)
    assert not torch.backends.cudnn.deterministic


@pytest.mark.usefixtures("free")
def test_convolutions_add_in_one_order_for_the_block_alone() -> None:
    with repeatable(torch.device("cuda")):
        assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.deterministic
    with pytest.raises(ZeroDivisionError), repeatable(torch.device("cuda")):
        raise ZeroDivisionError
    assert not torch.backends.cudnn.deterministic


@pytest.mark.usefixtures("free")
def test_nothing_changes_on_a_cpu_or_for_who_asked_for_it_before() -> None:
    with repeatable(torch.device("cpu")):
        assert not torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        with repeatable(torch.device("cuda")):
            assert torch.backends.cudnn.deterministic
        assert torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.deterministic = False


def test_a_device_whose_package_is_missing_is_said_in_one_line() -> None:
    with pytest.raises(UserError, match=r"device 'hpu' cannot be used .*; expected cpu, cuda or auto; change --device"):
        resolve_device("hpu", "--device")


def test_what_is_no_device_is_said_in_one_line() -> None:
    with pytest.raises(
        UserError, match=r"device '3\.5' cannot be used .*; expected cpu, cuda or auto; change device"
    ) as caught:
        resolve_device(3.5)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
