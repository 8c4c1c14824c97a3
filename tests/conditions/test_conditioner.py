"""What a network is told, and what it is made of; with errors that say what is wrong."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trigflow import conditions as told
from trigflow.conditions import INPUTS, Classes, Conditioner, Numbers
from trigflow.networks import MLP, ConditioningConfig, MLPConfig
from trigflow.process import TrigFlow
from trigflow.runtime.errors import UserError
from trigflow.samplers import guided_velocity, network_velocity

PROCESS = TrigFlow(sigma_data=0.5)
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.2, 0.7, 1.1, 1.5])


class Network(nn.Module):
    """`F = a x + w . size + label`, with whatever it says that it takes."""

    def __init__(self, takes: Any = (), null: Any = None) -> None:
        super().__init__()
        self.takes = frozenset(takes)
        self.null = null or {}
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        assert conditions.keys() <= self.takes
        self.calls.append(conditions)
        size, label = conditions.get("size"), conditions.get("label")
        out = torch.cos(t)[:, None] * x
        if size is not None:
            out = out + (size @ torch.tensor([2.0, -3.0]))[:, None] * torch.sin(x)
        return out if label is None else out + label[:, None]


SIZES = {"size": torch.tensor([-1.0, 0.5])}
"""A row of two numbers that means none."""


# What a network says -------------------------------------------------------------------------------------------------


def test_a_network_says_what_it_takes() -> None:
    assert (told.takes(lambda x, t: x), told.null(lambda x, t: x)) == (frozenset(), {})
    network = Network(("size", "label"), SIZES)
    assert told.takes(network) == {"size", "label"}
    assert told.null(network).keys() == {"size"}
    assert told.null(network) is not network.null
    built = MLP(MLPConfig(3, 8, depth=1, conditioning=ConditioningConfig(width=8, num_classes=5, takes=("guidance", "end"))))
    assert told.takes(built) == {"label", "guidance", "end"}
    assert {name: row.tolist() for name, row in told.null(built).items()} == {"label": 5}


def test_names_have_an_order() -> None:
    assert told.in_order({"size", "end", "angle", "label", "guidance"}) == ("label", "guidance", "end", "angle", "size")
    assert told.in_order(()) == ()


def test_a_network_of_ones_own_may_say_nothing() -> None:
    told.check_declared(nn.Linear(2, 2))
    told.check_declared(Network(("size", "label"), SIZES))


@pytest.mark.parametrize(
    ("name", "value", "now"), [("null_label", 0, '{"label"}'), ("takes_guidance", True, "guidance"), ("takes_end", True, "end")]
)
def test_attributes_of_earlier_versions_are_pointed_out(name: str, value: Any, now: str) -> None:
    network = nn.Linear(2, 2)
    setattr(network, name, value)
    with pytest.raises(
        UserError, match=rf"^the network has {name} = {value} and no takes; expected .*; set takes = "
    ) as caught:
        told.check_declared(network)
    assert now in str(caught.value)
    network.takes = frozenset({"label"})  # type: ignore[assignment]
    told.check_declared(network)


@pytest.mark.parametrize("name", ["null_label", "takes_guidance", "takes_end"])
def test_attributes_of_earlier_versions_that_said_no_are_fine(name: str) -> None:
    network = nn.Linear(2, 2)
    setattr(network, name, None if name == "null_label" else False)
    told.check_declared(network)


def test_null_is_a_tensor_for_what_is_taken() -> None:
    with pytest.raises(UserError, match=r"^the network has null for size and takes label; expected a tensor for names"):
        told.check_declared(Network(("label",), SIZES))
    with pytest.raises(UserError, match=r"^the network has null for size and takes none; "):
        told.check_declared(Network((), SIZES))
    with pytest.raises(UserError, match=r"^the network has null for conditions that are no tensors and takes label; "):
        told.check_declared(Network(("label",), {"label": 3}))


def test_too_many_and_too_few_are_named() -> None:
    network = Network(("label", "size", "end"), SIZES)
    told.check_told(network, {"label", "size", "end"})
    told.check_told(network, {"label", "end"})
    told.check_told(network, {"label"}, later=("end",))
    with pytest.raises(
        UserError, match=r"^guidance for a network that takes label, end, size; expected no other; drop guidance$"
    ):
        told.check_told(network, {"label", "end", "guidance", "weight"})
    with pytest.raises(UserError, match=r"^label for a network that takes no conditions; expected no other; drop label$"):
        told.check_told(Network(), {"label"})
    with pytest.raises(
        UserError, match=r"^no label for a network that takes it; expected a tensor of shape \(b, ...\); pass label$"
    ):
        told.check_told(network, {"size"})
    with pytest.raises(UserError, match=r"^no end for a network that takes it; "):
        told.check_told(network, {"label"})


# Rows ----------------------------------------------------------------------------------------------------------------


def test_rows_are_one_a_sample() -> None:
    given = {
        "label": 2,
        "guidance": 2,
        "end": torch.tensor(0.5, dtype=torch.float64),
        "size": torch.tensor([[1.0, 2.0]]),
        "each": torch.arange(8).reshape(4, 2),
    }
    rows = told.rows_of(given, X.double())
    assert {name: tuple(value.shape) for name, value in rows.items()} == {
        "label": (4,), "guidance": (4,), "end": (4,), "size": (4, 2), "each": (4, 2),
    }  # fmt: skip
    assert {name: value.dtype for name, value in rows.items()} == {
        "label": torch.int64, "guidance": torch.float64, "end": torch.float64, "size": torch.float64, "each": torch.int64,
    }  # fmt: skip
    assert rows["label"].tolist() == [2] * 4
    assert rows["size"].tolist() == [[1.0, 2.0]] * 4
    assert torch.equal(rows["each"], given["each"])


@pytest.mark.parametrize("shape", [(3,), (3, 2), (0,), (5, 1, 1)])
def test_other_numbers_of_rows_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"^size of shape \(.*\) for a batch of 4; expected one row, or one a sample; "):
        told.rows_of({"size": torch.zeros(shape)}, X)


@pytest.mark.parametrize("name", ["label", "guidance", "end"])
def test_conditions_of_one_number_have_no_more_axes(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name} of shape \(4, 1\) for a batch of 4; expected one number, or one a sample; "):
        told.rows_of({name: torch.zeros(4, 1)}, X)


def test_what_means_none() -> None:
    rows = told.null_rows(Network(("label", "size"), {**SIZES, "label": torch.tensor(7)}), X)
    assert rows["size"].tolist() == [[-1.0, 0.5]] * 4
    assert rows["label"].tolist() == [7] * 4
    assert told.null_rows(Network(("label",)), X) == {}


def test_picking_and_joining() -> None:
    conditions = {"label": torch.arange(4), "size": torch.arange(8.0).reshape(4, 2)}
    chosen = told.pick(conditions, torch.tensor([3, 1]))
    assert chosen["label"].tolist() == [3, 1]
    assert chosen["size"].tolist() == [[6.0, 7.0], [2.0, 3.0]]
    both = told.joined(chosen, conditions)
    assert both["label"].tolist() == [3, 1, 0, 1, 2, 3]
    assert both["size"].shape == (6, 2)
    mixed = told.joined({"size": torch.zeros(1, 2)}, {"size": torch.ones(1, 2, dtype=torch.float64), "other": torch.ones(1)})
    assert mixed.keys() == {"size"}
    assert mixed["size"].dtype == torch.float32


def test_dropping_all_that_can_be_dropped_at_once() -> None:
    network = Network(("label", "size", "angle"), {**SIZES, "label": torch.tensor(9)})
    conditions = {"label": torch.arange(4), "size": torch.zeros(4, 2), "angle": torch.arange(4.0)}
    before = {name: value.clone() for name, value in conditions.items()}
    found = told.dropped(conditions, network, torch.tensor([True, False, False, True]))
    assert found["label"].tolist() == [9, 1, 2, 9]
    assert found["label"].dtype == torch.int64
    assert found["size"].tolist() == [[-1.0, 0.5], [0.0, 0.0], [0.0, 0.0], [-1.0, 0.5]]
    assert torch.equal(found["angle"], conditions["angle"])  # without a null it stays
    assert all(torch.equal(conditions[name], before[name]) for name in before)
    assert told.dropped({"angle": torch.ones(2)}, network, torch.ones(2, dtype=torch.bool))["angle"].tolist() == [1, 1]


# Guidance with a condition of two numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [None, (0.3, 1.2)])
def test_guidance_leads_away_from_a_condition_of_ones_own(interval: tuple[float, float] | None) -> None:
    """`v = sd (F(none) + s (F(size) - F(none)))`, inside the interval; by hand."""
    network, scale = Network(("size",), SIZES), torch.tensor([1.0, 2.0, 3.0, 0.5])
    size = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))

    def by_hand(size: Tensor) -> Tensor:
        x = X / 0.5
        return 0.5 * (torch.cos(T)[:, None] * x + (2 * size[:, :1] - 3 * size[:, 1:]) * torch.sin(x))

    given, none = by_hand(size), by_hand(torch.tensor([[-1.0, 0.5]]).expand(4, 2))
    guided = none + scale[:, None] * (given - none)
    sigma = 0.5 * torch.tan(T)
    inside = (sigma >= 0.3) & (sigma <= 1.2) if interval else torch.ones(4, dtype=torch.bool)
    assert inside.any()
    v = guided_velocity(network, PROCESS, {"size": size}, scale, interval=interval)(X, T)
    torch.testing.assert_close(v, torch.where(inside[:, None], guided, given))
    (call,) = network.calls
    assert call["size"].shape == (4 + int(inside.sum()), 2)
    torch.testing.assert_close(network_velocity(network, PROCESS, {"size": size})(X, T), given)


def test_guidance_leaves_in_place_what_cannot_be_dropped() -> None:
    network, size = Network(("size", "label"), SIZES), torch.ones(4, 2)
    guided_velocity(network, PROCESS, {"size": size, "label": torch.arange(4)}, 2.0)(X, T)
    (call,) = network.calls
    assert call["label"].tolist() == [0, 1, 2, 3] * 2
    assert call["size"].tolist() == [[-1.0, 0.5]] * 4 + [[1.0, 1.0]] * 4


def test_guidance_away_from_a_condition_that_is_not_there() -> None:
    network = Network(("size", "label"), SIZES)
    with pytest.raises(UserError, match=r"away from nothing: of the conditions label .* leave out size; expected one that"):
        guided_velocity(network, PROCESS, {"label": torch.arange(4)}, 2.0)


# Classes -------------------------------------------------------------------------------------------------------------

PETS = Classes(3, ("cat", "dog", "bird"))


def test_classes_come_in_turn() -> None:
    assert PETS.rows(None, 5, 0)["label"].tolist() == [0, 1, 2, 0, 1]
    assert PETS.rows(None, 3, 4)["label"].tolist() == [1, 2, 0]
    assert PETS.rows("dog", 3, 7)["label"].tolist() == [1, 1, 1]
    assert PETS.rows(["bird", 0], 3, 1)["label"].tolist() == [0, 2, 0]
    assert PETS.rows(2, 1, 0)["label"].dtype == torch.int64


@pytest.mark.parametrize(
    ("said", "numbers"),
    [
        (2, [2]),
        ("cat", [0]),
        ("1", [1]),
        (["dog", 2, "0"], [1, 2, 0]),
        ((0, 1), [0, 1]),
        (np.int32(1), [1]),
        (np.array([2, 0], dtype=np.uint8), [2, 0]),
        (torch.tensor(1), [1]),
        (torch.tensor([2, 1], dtype=torch.int32), [2, 1]),
        ([torch.tensor(1), np.int64(2)], [1, 2]),
        (torch.eye(3)[[2, 0]], [2, 0]),
        (np.eye(3, dtype=np.int64)[[1]], [1]),
        (np.eye(3, dtype=np.uint64)[[1, 2]], [1, 2]),
        (np.array(["bird", "cat"]), [2, 0]),
        (np.array(["dog", 2], dtype=object), [1, 2]),
        (np.str_("dog"), [1]),
        (np.array([1, 2], dtype=np.uint64), [1, 2]),
        (torch.tensor([1, 2], dtype=torch.uint16), [1, 2]),
    ],
)
def test_ways_to_say_a_class(said: Any, numbers: list[int]) -> None:
    found = PETS.numbers(said)
    assert found.tolist() == numbers
    assert (found.dtype, found.device.type) == (torch.int64, "cpu")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("horse", r"^labels: there is no class 'horse'; expected one of cat, dog, bird; correct labels$"),
        (["cat", "horse"], r"^labels: there is no class 'horse'; "),
        ("-1", r"^labels: there is no class '-1'; "),
        ("", r"^labels: there is no class ''; "),
        (3, r"^label 3 is out of range; expected 0 to 2 "),
        ("3", r"^label 3 is out of range; expected 0 to 2 "),
        (-1, r"^label -1 is out of range; expected 0 to 2 "),
        ([0, 7], r"^label 7 is out of range; "),
        (2**80, rf"^label {2**80} is out of range; expected 0 to 2; "),
        (1.0, r"^labels: 1\.0 is no class; expected a whole number or a name; "),
        (True, r"^labels: True is no class; "),
        ([None], r"^labels: None is no class; "),
        ({"a": 1}, r"^labels: \{'a': 1\} is no class; "),
        (b"cat", r"^labels: b'cat' is no class; "),
        ("a\nb", r"^labels: there is no class 'a\\nb'; "),
        ("x" * 10_000, r"^labels: there is no class 'x{1,80}\.\.\.x{1,80}'; "),
        (np.array(["cat", "horse"]), r"^labels: there is no class 'horse'; "),
        (np.array([b"cat"]), r"^labels: b'cat' is no class; "),
        (np.datetime64("2020"), r"^labels: datetime\.date\(2020, 1, 1\) is no class; "),
        (torch.tensor([70_000], dtype=torch.uint32), r"^label 70000 is out of range; "),
        (torch.tensor([1j]), r"^labels of type torch\.complex64; expected integers; "),
        (torch.tensor([1.0]), r"^labels of type torch\.float32; expected integers; "),
        (torch.tensor([True]), r"^labels of type torch\.bool; expected integers; "),
        (np.array([0.5]), r"^labels of type torch\.float64; expected integers; "),
        ([torch.tensor(1.0)], r"^labels: tensor\(1\.\) is no class; expected a whole number or a name; "),
        ([torch.tensor(True)], r"^labels: tensor\(True\) is no class; "),
        ([np.bool_(True)], r"^labels: .*True.* is no class; "),
        ([np.float64(1.0)], r"^labels: .*1\.0.* is no class; "),
        ([], r"^an empty list of labels; expected at least one class; "),
        (torch.zeros(0, dtype=torch.int64), r"^an empty list of labels; "),
        (torch.zeros(2, 2, 2).long(), r"^labels of shape \(2, 2, 2\); expected one class, \(n,\), or one-hot \(n, 3\)"),
        (torch.zeros(2, 2), r"^labels of shape \(2, 2\) that are not one-hot; expected rows of 3 numbers"),
        (torch.zeros(2, 3), r"^labels of shape \(2, 3\) that are not one-hot; "),
        (torch.tensor([[1.0, 1.0, 0.0]]), r"^labels of shape \(1, 3\) that are not one-hot; "),
        (torch.tensor([[0.5, 0.5, 0.0]]), r"^labels of shape \(1, 3\) that are not one-hot; "),
    ],
)  # fmt: skip
def test_what_is_no_class(said: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        PETS.numbers(said)
    assert "\n" not in str(caught.value)


def test_the_name_it_was_said_under_is_in_the_message() -> None:
    with pytest.raises(UserError, match=r"^style: there is no class 'horse'; expected .*; correct style$"):
        PETS.numbers("horse", "style")


def test_names_that_are_numbers_are_names() -> None:
    digits = Classes(3, ("7", "1", "0"))
    assert digits.numbers(["7", "0", 0, "1"]).tolist() == [0, 2, 0, 1]
    with pytest.raises(UserError, match=r"there is no class '2'; expected one of 7, 1, 0"):
        digits.numbers("2")


def test_classes_without_names() -> None:
    plain = Classes(1000)
    assert plain.numbers(["999", 0]).tolist() == [999, 0]
    with pytest.raises(UserError, match=r"there is no class 'cat'; expected one of numbers from 0 to 999"):
        plain.numbers("cat")
    with pytest.raises(UserError, match=r"no class 'x'; expected one of 0n, 1n, 2n, 3n, 4n, 5n, 6n, 7n, \.\.\.; "):
        Classes(9, tuple(f"{i}n" for i in range(9))).numbers("x")


@pytest.mark.parametrize(("num", "names"), [(0, ()), (-1, ()), (2, ("a",)), (1, ("a", "b"))])
def test_as_many_names_as_classes(num: int, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=rf"^{num} classes with {len(names)} names; expected at least one class"):
        Classes(num, names)


def test_labels_are_checked() -> None:
    told.check_labels(torch.tensor([[0, 2], [1, 1]]), 3)
    told.check_labels(torch.zeros(0, dtype=torch.int64), 0)
    for labels, message in (
        (torch.tensor([0, 3, 5]), r"^label 3 is out of range; expected 0 to 2 for 3 classes; "),
        (torch.tensor([-1]), r"^label -1 is out of range; "),
        (torch.tensor([0.0]), r"^labels of type torch\.float32; expected integers; "),
        (torch.tensor([True]), r"^labels of type torch\.bool; "),
        (torch.tensor([1j]), r"^labels of type torch\.complex64; "),
    ):
        with pytest.raises(UserError, match=message):
            told.check_labels(labels, 3)
    with pytest.raises(UserError, match=r"^label 0 where there are no classes; expected no labels; "):
        told.check_labels(torch.tensor([0]), 0)


# Numbers -------------------------------------------------------------------------------------------------------------


def test_numbers_are_rows() -> None:
    size = Numbers("size", (2,), (3.0, 4.0))
    assert size.rows(None, 2, 5)["size"].tolist() == [[3.0, 4.0]] * 2
    assert size.rows([1, 2.5], 2, 0)["size"].tolist() == [[1.0, 2.5]] * 2
    assert size.rows(np.array([[1, 2], [3, 4]]), 3, 1)["size"].tolist() == [[3, 4], [1, 2], [3, 4]]
    assert size.rows(torch.tensor([1, 2]), 1, 0)["size"].dtype == torch.float32
    assert Numbers("size", (2, 1)).rows(None, 3, 0)["size"].tolist() == [[[0.0], [0.0]]] * 3
    one = Numbers("age", ())
    assert one.rows(30, 2, 0)["age"].tolist() == [30.0, 30.0]
    assert one.rows([30, 40], 3, 0)["age"].tolist() == [30.0, 40.0, 30.0]


@pytest.mark.parametrize(
    "said", [[1, 2, 3], 1.0, [[1.0], [2.0]], [], [1.0, float("nan")], [[1.0, 2.0], [float("inf"), 0.0]], torch.zeros(0, 2)]
)
def test_numbers_of_another_shape(said: Any) -> None:
    with pytest.raises(UserError, match=r"^size of shape \(.*\); expected finite numbers of shape \(2,\), or several"):
        Numbers("size", (2,)).rows(said, 1, 0)


@pytest.mark.parametrize("said", ["large", ["a", "b"], {"w": 1}, [[1, 2], [3]], [None, 1], [10**400, 1]])
def test_what_are_no_numbers(said: Any) -> None:
    with pytest.raises(UserError, match=r"^crop: .* are no numbers; expected rows of shape \(2,\); correct it$"):
        Numbers("size", (2,)).rows(said, 1, 0, "crop")


def test_words_are_the_texts_that_mean_a_class() -> None:
    for classes in (PETS, Classes(3), Classes(3, ("1", "2", "10")), Classes(2, ("cat", "0"))):
        assert len(set(classes.words)) == len(classes.words)
        assert {classes.numbers(word).item() for word in classes.words} == set(range(classes.num))
    assert PETS.words == ("cat", "dog", "bird", "0", "1", "2")
    assert Classes(3, ("1", "2", "10")).words == ("1", "2", "10")


# Everything together -------------------------------------------------------------------------------------------------

BOTH = Conditioner({"label": PETS, "size": Numbers("size", (2,), (3.0, 4.0))})


def test_a_conditioner_makes_all_conditions() -> None:
    found = BOTH.conditions({"size": [1, 2]}, num=2, first=1)
    assert found["label"].tolist() == [1, 2]
    assert found["size"].tolist() == [[1.0, 2.0]] * 2
    found = BOTH.conditions({"label": "cat", "size": None}, num=2)
    assert found["label"].tolist() == [0, 0]
    assert found["size"].tolist() == [[3.0, 4.0]] * 2
    assert BOTH.conditions().keys() == {"label", "size"}
    assert (BOTH.classes, Conditioner().classes) == (PETS, None)
    assert Conditioner({"size": Numbers("size", ())}).classes is None


def test_a_conditioner_of_classes() -> None:
    assert Conditioner.of_classes(3, ["cat", "dog", "bird"]) == Conditioner({"label": PETS})
    assert Conditioner.of_classes(2).classes == Classes(2)
    empty = Conditioner.of_classes(0)
    assert (empty, empty.conditions(num=3), empty.conditions({"label": None})) == (Conditioner(), {}, {})


def test_names_that_nobody_knows() -> None:
    with pytest.raises(UserError, match=r"^labels for an unconditional model; expected none; leave labels out$"):
        Conditioner().conditions({"label": 1})
    with pytest.raises(
        UserError, match=r"^angle for a model that takes no such condition; expected labels, size; leave angle out$"
    ):
        BOTH.conditions({"angle": 1})
    with pytest.raises(UserError, match=r"^labels: there is no class 'horse'; "):
        BOTH.conditions({"label": "horse"})
    with pytest.raises(UserError, match=r"^size: 'big' are no numbers; "):
        BOTH.conditions({"size": "big"})


@pytest.mark.parametrize("conditioner", [Conditioner(), Conditioner.of_classes(5), Conditioner.of_classes(1, ["ü"]), BOTH])
def test_state_and_back(conditioner: Conditioner) -> None:
    state = json.loads(json.dumps(conditioner.state()))
    again = Conditioner.from_state(state)
    assert again == conditioner
    assert again.state() == state
    for name, value in conditioner.conditions(num=3).items():
        assert torch.equal(again.conditions(num=3)[name], value)


def test_an_input_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        """The number of letters."""

        kind = "words"

        def rows(self, said: Any, num: int, first: int, what: str) -> dict[str, Tensor]:
            return {"letters": torch.full((num,), float(len(said or "")))}

        def state(self) -> dict[str, Any]:
            return {}

    state = Conditioner({"text": Words()}).state()
    assert state == {"text": {"kind": "words"}}
    with pytest.raises(UserError, match=r"^the model is told text by a 'words'; expected one of classes, text, .*--plugin$"):
        Conditioner.from_state(state)
    monkeypatch.setitem(INPUTS, "words", Words)
    found = Conditioner.from_state(state).conditions({"text": "four"}, num=2)
    assert found["letters"].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("state", [{"label": {}}, {"label": {"kind": "classes", "number": 3}}, {"label": 3}])
def test_states_that_are_none(state: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Conditioner.from_state(state)


def test_rows_that_were_said_are_counted() -> None:
    said = {"label": ["cat", 1, "bird"], "size": [[1, 2], [3, 4]]}
    assert BOTH.counts(said) == {"label": 3, "size": 2}
    assert BOTH.counts({"size": [1, 2], "colour": 3}) == {"size": 1}
    with pytest.raises(UserError, match=r"^size of shape \(3,\); "):
        BOTH.counts({"size": [1, 2, 3]})


def test_everything_that_is_said_is_said_once() -> None:
    assert told.said_of(None, None) == {}
    assert told.said_of("cat", {"size": [1, 2], "colour": None}) == {"label": "cat", "size": [1, 2]}
    assert told.said_of(None, {"label": 2}) == told.said_of(2, {"label": None}) == {"label": 2}
    with pytest.raises(UserError, match=r"^labels, and a label among the conditions; expected one of them; "):
        told.said_of(0, {"label": 0})
    for bad in ([1, 2], "size=1", 3):
        with pytest.raises(UserError, match=r"^conditions .*; expected values by name; "):
            told.said_of(None, bad)  # type: ignore[arg-type]


# Names of classes ----------------------------------------------------------------------------------------------------


def test_names_in_files_of_earlier_versions_become_printable() -> None:
    """A name that was no UTF-8 stood as half a pair of surrogates in `model.json`, which other readers refuse."""
    classes = Classes(3, ("caf\udce9", "cafe\u0301", "tea"))
    assert classes.names == ("caf\\udce9", "caf\u00e9", "tea")
    json.dumps(classes.state(), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("names", "others"),
    [(("a", "b"), ("a", "b")), (("a", "b"), ()), (("0", "1"), ("a", "b")), ((), ()), (("1", "2"), ("0", "1"))],
)
def test_classes_that_may_be_the_same(names: tuple[str, ...], others: tuple[str, ...]) -> None:
    told.check_same_classes(names, others, "one", "other")
    told.check_same_classes(others, names, "other", "one")


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (("b", "a"), "class 0 is 'a' in one and 'b' in other"),
        (("a", "c"), "class 1 is 'b' in one and 'c' in other"),
        (("a",), "class 1 is 'b' in one and None in other"),
        (("a", "b", "c"), "class 2 is None in one and 'c' in other"),
    ],
)
def test_the_first_class_that_differs_is_named(others: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}; expected the same classes in the same order"):
        told.check_same_classes(("a", "b"), others, "one", "other")


def test_a_name_is_found_however_its_accents_are_written() -> None:
    classes = Classes(2, ("tea", "caf\u00e9"))
    assert classes.numbers(["caf\u00e9", "cafe\u0301"]).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("shape", "default"), [((3,), (1.0, 2.0)), ((-3,), ()), ((0,), ()), ((1,), (float("nan"),)), ((), (1.0, 2.0))]
)
def test_numbers_whose_default_does_not_fit(shape: tuple[int, ...], default: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"numbers size of shape .*; expected a shape above 0 .*; correct them"):
        Numbers("size", shape, default)


def test_what_is_not_known_is_named_in_order() -> None:
    with pytest.raises(UserError, match=r"^crop for a model"):
        BOTH.conditions({"zoom": 1, "crop": 2})
