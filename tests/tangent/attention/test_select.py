"""Which implementation computes the tangent of attention: chosen by itself, by name, and refused."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangent.helpers import draw, relative_error
from trigflow.tangent import TangentError, attention_implementation, jvp
from trigflow.tangent.attention import attention, attention_with_tangent, chunked, operators, plain, select

Q, K, V = draw(1, 2, 4, 5, 3), draw(2, 2, 4, 7, 3), draw(3, 2, 4, 7, 6)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the implementations that were called."""
    names: list[str] = []
    for module in (plain, chunked):
        name = module.__name__.rsplit(".", 1)[1]

        def watched(*args: Any, function: Any = module.attention, name: str = name, **kwargs: Any) -> Tensor:
            names.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, "attention", watched)
    return names


def run(length: int = 5, **settings: Any) -> Tensor:
    q = draw(1, 1, 1, length, 3)
    return jvp(lambda q: F.scaled_dot_product_attention(q, q, q, **settings), (q,), (q,))[1]


def test_by_itself_few_scores_are_plain_and_many_chunked(used: list[str]) -> None:
    run(64)
    run(1100)
    assert used == ["plain", "chunked"]


@pytest.mark.parametrize("name", ["plain", "chunked"])
def test_by_name(used: list[str], name: str) -> None:
    with attention_implementation(name):
        run(64)
        run(1024)
        with attention_implementation("auto"):
            run(64)
    assert used == [name, name, "plain"]
    run(64)
    assert used[3:] == ["plain"]


def test_the_name_holds_in_its_thread_only(used: list[str]) -> None:
    with attention_implementation("chunked"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert used == ["plain"]


def test_the_keyword_comes_before_the_context(used: list[str]) -> None:
    with attention_implementation("chunked"):
        attention(Q, K, V, Q, K, V, implementation="plain")
    assert used == ["plain"]


def test_dropout_is_plain_whatever_the_size(used: list[str]) -> None:
    run(1024, dropout_p=0.1)
    assert used == ["plain"]


def test_on_cuda_the_kernel_where_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(length: int, width: int, dtype: torch.dtype, **more: Any) -> str:
        x: Any = SimpleNamespace(
            is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=torch.Size((1, 2, length, width))
        )
        return select._choose(x, x, x, None, None, more.get("dropped"))

    monkeypatch.setattr(select, "_triton_lacks", lambda *case: None)
    assert choice(16, 64, torch.bfloat16) == choice(1 << 14, 256, torch.bfloat16) == "triton"
    assert choice(1 << 14, 128, torch.float32) == "triton"
    assert choice(1 << 14, 256, torch.float32) == "chunked"
    assert choice(1 << 14, 64, torch.bfloat16, dropped=Q) == "plain"
    monkeypatch.setattr(select, "_triton_lacks", lambda *case: ("this mask", "another"))
    assert choice(16, 64, torch.bfloat16) == "plain"
    assert choice(1 << 14, 64, torch.bfloat16) == "chunked"


def test_on_cuda_the_output_too_where_pytorch_would_hold_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.backends.cuda
    able = {"flash": False, "efficient": False, "cudnn": False}
    on = {"flash": True, "mem_efficient": True, "cudnn": True}
    for kind in able:
        monkeypatch.setattr(cuda, f"can_use_{kind}_attention", lambda case, kind=kind: able[kind])
    for kind in on:
        monkeypatch.setattr(cuda, f"{kind}_sdp_enabled", lambda kind=kind: on[kind])
    monkeypatch.setattr(cuda, "SDPAParams", lambda *case: case)
    monkeypatch.setattr(select, "_fused_lacks", lambda *case: None)
    monkeypatch.setattr(select, "_triton_lacks", lambda *case: None)

    def choice(length: int, cuda: bool = True) -> bool:
        shape = torch.Size((1, 2, length, 64))
        x: Any = SimpleNamespace(is_cuda=cuda, device=torch.device("cuda"), dtype=torch.bfloat16, shape=shape)
        return select.fused(x, x, x, None, None, False, True)

    assert choice(1 << 14)
    assert not choice(1 << 11)
    assert not choice(1 << 14, cuda=False)
    with attention_implementation("triton"):
        assert not choice(1 << 14)
    able["efficient"] = True
    assert not choice(1 << 14)
    able["efficient"] = False
    on.update(dict.fromkeys(on, False))
    assert not choice(1 << 14)  # torch.nn.attention.sdpa_kernel(SDPBackend.MATH)


def test_fused_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = single(Q, K, K)

    def refused(part: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
        with pytest.raises(TangentError) as caught:
            attention_with_tangent(q, k, v, None, None, None, mask=mask)
        one_line(caught, "fused", part)

    refused("such shapes", q[0], k[0], v[0])
    refused("such shapes", q, k[:1], v[:1])
    refused("4, 4 and 2 heads", q, k, v[:, :2])
    refused("4, 3 and 3 heads", q, k[:, :3], v[:, :3])
    refused("gradient of a mask", q, k, v, torch.zeros(5, 7, requires_grad=True))
    refused("on cpu", q, k, v)
    with pytest.raises(TangentError) as caught, attention_implementation("fused"):
        run()
    one_line(caught, "fused", "float64")


def one_line(caught: Any, *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("; ") == 2
    for part in parts:
        assert part in message


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(TangentError) as caught, attention_implementation("flash"):
        pass
    one_line(caught, "'flash'", "auto, plain, chunked, triton, fused")
    with pytest.raises(TangentError) as caught:
        attention(Q, K, V, Q, K, V, implementation="flash")
    one_line(caught, "'flash'")


def test_chunked_refuses_dropout_and_names_the_module() -> None:
    class Net(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, K, V, dropout_p=0.2)

    net = nn.Sequential(nn.Identity(), Net())
    with pytest.raises(TangentError) as caught, attention_implementation("chunked"):
        jvp(net, (Q,), (Q,))
    one_line(caught, "chunked", "dropout", "1 (Net)", "attention_implementation")


def single(*values: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.float() for x in values)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, "cpu"),
        ({"dropped": torch.ones(2, 4, 5, 7)}, "dropout"),
        ({"mask": torch.zeros(2, 1, 1, 7), "dmask": torch.ones(2, 1, 1, 7)}, "a mask with a tangent"),
    ],
)
def test_triton_refuses_what_it_cannot_do(change: dict[str, Any], part: str) -> None:
    with pytest.raises(TangentError) as caught:
        attention(*single(Q, K, V, Q, K, V), implementation="triton", **change)
    one_line(caught, "triton", part)


def test_triton_refuses_double_precision_and_wide_heads() -> None:
    with pytest.raises(TangentError) as caught:
        attention(Q, K, V, Q, K, V, implementation="triton")
    one_line(caught, "float64")
    wide = torch.zeros(1, 1, 5, 257)
    with pytest.raises(TangentError) as caught:
        attention(*[wide] * 6, implementation="triton")
    one_line(caught, "257 features", "256")


def test_triton_refuses_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that tensors on the CPU are no obstacle
    monkeypatch.setattr(operators.importlib, "import_module", missing)
    monkeypatch.setattr(operators, "kernels", operators.kernels.__wrapped__)
    with pytest.raises(TangentError) as caught:
        attention(*single(Q, K, V, Q, K, V), implementation="triton")
    one_line(caught, "cannot be imported")


def test_key_mask_is_a_short_form() -> None:
    keys = draw(4, 2, 7) > -0.5
    expected = attention(Q, K, V, Q, K, V, mask=keys[:, None, None])
    for name in ("plain", "chunked"):
        value = attention(Q, K, V, Q, K, V, key_mask=keys, implementation=name)
        assert relative_error(value, expected) < 1e-13
    with pytest.raises(TangentError) as caught:
        attention(Q, K, V, Q, K, V, key_mask=keys, mask=keys[:, None, None])
    one_line(caught, "key_mask")


def test_numbers_of_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TangentError) as caught:
        attention(Q, K[:, :2], V[:, :2], Q, None, None, implementation="chunked")
    one_line(caught, "(2, 4, 5, 3)", "grouped=True")
