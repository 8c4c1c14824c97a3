"""Pickles are data: what a snapshot has no need of is refused by name, and nothing ever runs."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from models.snapshots import EasyDict, Persistent, PersistentModule, write
from trigflow.models.pretrained.records import NAMES, ArrayShell, StoredArray, StoredTensor, read_pickle
from trigflow.models.pretrained.unpickle import MAX_INSTRUCTIONS, Record, Source
from trigflow.runtime.errors import UserError

START = b"\x80\x04"


def parse(data: bytes | Path) -> Any:
    """The content of a pickle, read as data."""
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as file:
        return read_pickle(Source(Path("x.pkl"), file))  # type: ignore[arg-type]


def fault(data: bytes) -> str:
    """The one line with which this pickle is refused."""
    with pytest.raises(UserError) as caught:
        parse(data)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isascii()
    assert message.startswith("'x.pkl' ")
    return message


def read_or_refused(data: bytes) -> None:
    """Read it, or refuse it in one line; nothing else may happen."""
    message = ""
    try:
        parse(data)
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def name(module: str, attribute: str) -> bytes:
    """STACK_GLOBAL of a name."""
    return text(module) + text(attribute) + b"\x93"


# What is understood --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_plain_values(protocol: int) -> None:
    value = {
        "text": "naïve ☃", "whole": [0, 255, 65535, -1, 2**31 - 1, -(2**31), 2**70, -(2**70)], "real": -0.5,
        "none": None, "yes": True, "no": False, "nested": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[]], {}],
        "long": list(range(2500)), 3: {"x": {}}, "same": "same",
    }  # fmt: skip
    assert parse(pickle.dumps(value, protocol)) == value


def test_shared_and_recursive_objects_stay_so() -> None:
    shared: list[Any] = [1]
    shared.append(shared)
    found = parse(pickle.dumps({"a": shared, "b": shared}, 4))
    assert found["a"] is found["b"]
    assert found["a"][1] is found["a"]


def test_dicts_of_a_class_of_their_own(tmp_path: Path) -> None:
    made = name("dnnlib.util", "EasyDict") + b")\x81"
    assert parse(START + made + text("a") + b"K\x01s.") == {"a": 1}
    assert parse(write(tmp_path / "x.pkl", EasyDict(a=1))) == {"a": 1}
    assert "state for dict" in fault(START + made + b"}K\x01K\x02sb.")


def test_sets() -> None:
    value = {"a": {"x", "y"}, "b": frozenset({1, 2}), "c": set()}
    assert parse(pickle.dumps(value, 4)) == value
    assert sorted(parse(pickle.dumps({"a": {"x", "y"}}, 3))["a"]) == ["x", "y"]


@pytest.mark.parametrize("protocol", [3, 4, 5, 0])
def test_parts_of_a_snapshot(tmp_path: Path, protocol: int) -> None:
    base = torch.arange(24.0, dtype=torch.float16).reshape(4, 6)
    module = PersistentModule("Block", {"in_channels": 3})
    module.weight = nn.Parameter(base[1:, ::2], requires_grad=False)
    module.register_buffer("freqs", torch.tensor(3.5, dtype=torch.float64))
    module.register_buffer("scratch", torch.zeros(2), persistent=False)
    module.children_by_name = nn.ModuleDict({"a": nn.ModuleList([PersistentModule("Leaf")])})
    array, number = np.arange(6, dtype=np.float32).reshape(2, 3), np.float64(0.25)
    data = EasyDict(ema=module, array=array, number=number, loss=Persistent("EDMLoss", P_mean=-1.2))
    path = write(tmp_path / "x.pkl", data, protocol)
    before = set(sys.modules)
    with path.open("rb") as file:
        source = Source(path, file)
        found = read_pickle(source)
        block = found["ema"]
        assert isinstance(block, Record)
        assert (block.class_name, block.state["_init_kwargs"]) == ("Block", {"in_channels": 3})
        weight, freqs = block.state["_parameters"]["weight"], block.state["_buffers"]["freqs"]
        assert isinstance(weight, StoredTensor)
        assert torch.equal(weight.read(source), base[1:, ::2])
        assert torch.equal(freqs.read(source), torch.tensor(3.5, dtype=torch.float64))
        assert list(block.state["_non_persistent_buffers_set"]) == ["scratch"]
        names = block.state["_modules"]["children_by_name"]
        assert names.class_name == "torch.nn.modules.container.ModuleDict"
        assert names.state["_modules"]["a"].state["_modules"]["0"].class_name == "Leaf"
        stored = found["array"].array if isinstance(found["array"], ArrayShell) else found["array"]
        assert np.array_equal(stored.read(source), array)
        assert isinstance(found["number"], StoredArray)
        assert found["number"].read(source) == number
        assert found["loss"].state["P_mean"] == -1.2
    assert not {"torch_utils", "dnnlib"} & (set(sys.modules) - before)


def test_every_type_of_numbers(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    tensors = {str(kind): torch.tensor([[0, 1], [1, 1]]).to(kind) for kind in kinds}
    path = write(tmp_path / "x.pkl", tensors)
    with path.open("rb") as file:
        source = Source(path, file)
        for label, found in read_pickle(source).items():
            assert torch.equal(found.read(source), tensors[label])


def test_views_of_one_storage_are_read_apart(tmp_path: Path) -> None:
    whole = torch.arange(1000.0)
    path = write(tmp_path / "x.pkl", {"a": whole[10:20], "b": whole.view(10, 100)[:, 5], "c": whole[:0], "d": whole[7]})
    with path.open("rb") as file:
        source = Source(path, file)
        found = read_pickle(source)
        assert found["a"].extent == 10
        assert torch.equal(found["a"].read(source), whole[10:20])
        assert torch.equal(found["b"].read(source), whole.view(10, 100)[:, 5])
        assert found["c"].read(source).shape == (0,)
        assert found["d"].read(source) == 7


# Attacks -------------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as the call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    ("attack", "named"),
    [
        (Call(os.system, "touch {marker}"), f"{os.system.__module__}.system"),
        (Call(eval, "open({marker!r}, 'w')"), "builtins.eval"),
        (Call(exec, "open({marker!r}, 'w')"), "builtins.exec"),
        (Call(getattr, "x", "format"), "builtins.getattr"),
        (Call(__import__, "os"), "builtins.__import__"),
        (Call(open, "{marker}", "w"), f"{open.__module__}.open"),
        (Call(bytearray, 1 << 60), "builtins.bytearray"),
        (Call(torch.load, "x.pt"), "torch.serialization.load"),
        (Call(pickle.loads, b"x"), "_pickle.loads"),
        (Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
        (Call(np.load, "x.npy"), f"{np.load.__module__}.load"),
        (nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (torch.float16, "torch.float16"),
    ],
)
def test_calls_are_refused_by_name(tmp_path: Path, attack: Any, named: str, protocol: int) -> None:
    marker = tmp_path / "marker"
    if isinstance(attack, Call):
        attack = Call(attack.function, *(a.format(marker=marker) if isinstance(a, str) else a for a in attack.arguments))
    for data in (attack, {"ema": attack}, {"ema": [1, (attack,)]}):
        assert f"asks for {named}, " in fault(pickle.dumps(data, protocol))
        assert not marker.exists()


def test_nested_calls_are_refused(tmp_path: Path) -> None:
    """A call within the arguments of an allowed one, within the state of a module, within the bytes of a storage."""
    attack = Call(os.system, "true")
    wanted = f"asks for {os.system.__module__}.system"
    module = PersistentModule("Precond", {"x": attack})
    assert wanted in fault(write(tmp_path / "a.pkl", {"ema": module}).read_bytes())
    assert wanted in fault(
        write(tmp_path / "b.pkl", {"ema": Persistent("X", y=Call(torch._utils._rebuild_parameter, attack))}).read_bytes()
    )
    inner = pickle.dumps(attack, 2)
    call = name("torch.storage", "_load_from_bytes") + b"C" + bytes([len(inner)]) + inner + b"\x85R."
    assert wanted in fault(START + call)


def test_bytes_of_a_storage_hold_only_a_storage(tmp_path: Path) -> None:
    """What is allowed outside is not allowed in there, itself included."""
    inner = b"\x80\x02ctorch.storage\n_load_from_bytes\n."
    call = name("torch.storage", "_load_from_bytes") + b"C" + bytes([len(inner)]) + inner + b"\x85R."
    assert "asks for torch.storage._load_from_bytes" in fault(START + call)
    buffer = io.BytesIO()
    torch.save({"x": 1}, buffer, _use_new_zipfile_serialization=False)
    inner = buffer.getvalue()
    call = name("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(inner)) + inner + b"\x85R."
    assert "arguments for torch.storage._load_from_bytes" in fault(START + call)


@pytest.mark.parametrize(
    "data",
    [
        name("torch.storage", "os.system"),
        name("collections", "OrderedDict.__init__.__globals__"),
        name("torch._utils", "torch.os.system"),
        b"ccollections\nOrderedDict.fromkeys\n",
    ],
)
def test_dotted_names_reach_nothing(data: bytes) -> None:
    assert "asks for " in fault(START + data + b".")


@pytest.mark.parametrize(
    ("data", "instruction"),
    [
        (b"\x82\x01.", "EXT1"),
        (b"\x83\x01\x00.", "EXT2"),
        (b"\x84\x01\x00\x00\x00.", "EXT4"),
        (b"(ios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'true'\no.", "os.system"),
        (b"(]o.", "OBJ"),
        (b"S'x'\n.", "STRING"),
        (b"I1\n.", "INT"),
        (b"Pid\n.", "PERSID"),
        (b"]Q.", "BINPERSID"),
        (b"]2.", "DUP"),
        (b"\x8b\xff\xff\xff\x7f.", "LONG4"),
        (b"\x97.", "NEXT_BUFFER"),
        (b"\xff.", "0xff"),
    ],
)
def test_instructions_that_no_snapshot_has(data: bytes, instruction: str) -> None:
    assert instruction in fault(START + data)


@pytest.mark.parametrize(
    "data",
    [
        b"\x8e" + struct.pack("<Q", 1 << 60),  # BINBYTES8
        b"\x96" + struct.pack("<Q", 1 << 60),  # BYTEARRAY8
        b"\x8d" + struct.pack("<Q", 1 << 60),  # BINUNICODE8
        b"B" + struct.pack("<I", (1 << 32) - 1),
        b"X" + struct.pack("<I", (1 << 32) - 1),
        b"\x8e" + struct.pack("<Q", (1 << 64) - 1),
    ],
)
def test_lengths_beyond_the_file_are_refused_before_reading(data: bytes) -> None:
    assert "cut short" in fault(START + data + b"abc.") or "text" in fault(START + data + b"abc.")


def test_text_without_end_is_refused(tmp_path: Path) -> None:
    """A sparse file of 65 MiB that claims to be one text."""
    path = tmp_path / "x.pkl"
    with path.open("wb") as file:
        file.write(START + b"X" + struct.pack("<I", 65 << 20))
        file.truncate(66 << 20)
    with pytest.raises(UserError, match="bytes of text"):
        parse(path)


def test_storage_larger_than_the_file_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.pkl", {"x": torch.zeros(4)}).read_bytes()
    elements = b"K\x04N"  # 4 and None end the storage's persistent id
    assert whole.count(elements) == 1
    assert "announces 255 numbers" in fault(whole.replace(elements, b"K\xffN"))
    assert "damaged: 4 elements at byte" in fault(whole.replace(elements, b"K\x05N"))


def test_tensor_beyond_its_storage_is_refused(tmp_path: Path) -> None:
    for shape, stride, offset in [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2, 2), (3, 1), 0),
        ((1 << 61,), (1,), 0),
        ((-1,), (1,), 0),
    ]:
        view = Call(torch._utils._rebuild_tensor_v2, torch.zeros(4)._typed_storage(), offset, shape, stride, False, {})
        assert "arguments for torch._utils._rebuild_tensor_v2" in fault(pickle.dumps(view, 4))


def test_memo_of_any_number_takes_no_room() -> None:
    """`LONG_BINPUT 2^32 - 1` makes the usual unpickler reserve a table of 64 GiB."""
    assert parse(START + b"]r\xff\xff\xff\xff0j\xff\xff\xff\xff.") == []


def test_doubling_through_the_memo_is_not_followed() -> None:
    """Tuples of the one before, twice, 60 times over: as a key of a dict their hash would take years."""
    tower = START + b")\x94" + b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86\x94" for i in range(60))
    assert isinstance(parse(tower + b"."), tuple)
    assert "a key of type tuple" in fault(tower + b"}h\x3cK\x01s.")


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    depth = 100_000
    assert parse(START + b"]" * (depth + 1) + b"a" * depth + b".") is not None
    assert parse(START + b"(" * depth + b"t" * depth + b".") is not None


def test_too_many_instructions() -> None:
    assert f"more than {MAX_INSTRUCTIONS} instructions" in fault(START + b"N0" * (MAX_INSTRUCTIONS // 2 + 1) + b".")


@pytest.mark.parametrize(
    "data",
    [
        b".", b"0.", b"h\x00.", b"u.", b"e.", b"(e.", b"s.", b"K\x01K\x02K\x03s.", b"](K\x01u.", b"}(K\x01u.", b"NR.",
        b"K\x01)R.", b"]Nb.", b"\x93.", b"K\x01K\x01\x93.", b"N\x94h\x05.", b"\x8c\x02\xff\xfe.", b"](]\x90.", b"\x81.",
        name("numpy", "ndarray") + b")R.", name("collections", "OrderedDict") + b"NR.", b"cnoname",
    ],
)  # fmt: skip
def test_nonsense_is_one_line(data: bytes) -> None:
    assert fault(START + data)


@pytest.mark.parametrize("known", sorted(NAMES))
def test_known_names_make_only_records(known: str) -> None:
    """Whatever the arguments, a known name gives a record, a container or a refusal."""
    module, _, attribute = known.rpartition(".")
    for arguments in (b")", b"K\x01\x85", b"]\x85", b"}\x85", text("x") + text("latin1") + b"\x86", b"C\x01x\x85"):
        try:
            made = parse(START + name(module, attribute) + arguments + b"R.")
        except UserError:
            continue
        assert isinstance(made, dict | list | Record) or type(made).__module__ == "trigflow.models.pretrained.records"


def test_names_cannot_forge_the_message() -> None:
    attack = "evil\n\x1b[2Jtrigflow: done \u202e"
    message = fault(START + b"X" + struct.pack("<I", len(attack.encode())) + attack.encode() + text("x") + b"\x93.")
    assert r"evil\n\x1b[2Jtrigflow" in message
    assert len(fault(START + text("m" * 255) + b"X" + struct.pack("<I", 10_000) + b"n" * 10_000 + b"\x93.")) < 1_000


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", b"PK\x03\x04abc", b"\x80\x02]."],
)
def test_files_that_are_no_pickle(content: bytes) -> None:
    assert "expected a network snapshot" in fault(content)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from([bytes([c]) for c in b"]})(NuestbRaK\x01\x94\x85\x86\x87\x8fh\x00\x90\x91\x930\x81"]), max_size=60)
)
def test_any_stream_is_read_or_refused(codes: list[bytes]) -> None:
    stream = START + name("collections", "OrderedDict") + b"".join(codes) + b"."
    read_or_refused(stream)


@pytest.mark.parametrize("protocol", [4, 0])
def test_damaged_files_are_read_or_refused(tmp_path: Path, protocol: int) -> None:
    """Every ending, and 400 random changes, of a small snapshot."""
    module = PersistentModule("Block")
    module.weight = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    data = {"ema": module, "array": np.float32([1, 2]), "loss": Persistent("EDMLoss", P_mean=-1.2)}
    whole = write(tmp_path / "x.pkl", data, protocol).read_bytes()
    for end in range(0, len(whole), 7):
        fault(whole[:end])
    choose = random.Random(0)
    for _ in range(400):
        changed = bytearray(whole)
        for _ in range(choose.choice([1, 1, 2, 8])):
            changed[choose.randrange(len(changed))] = choose.randrange(256)
        read_or_refused(bytes(changed))
