"""Pickles read as data.

A pickle is a program for a small stack machine, and the usual machine imports and calls whatever the program names. This one
has the same instructions for numbers, text and containers, and nothing to call: a name in the stream is looked up in a table of
known names, calls of which a function of ours turns into records, and any other name is refused. Instructions
that only a hand-written pickle has (EXT, INST, OBJ, text of protocol 0) are refused too.

Nothing in the stream decides how much memory is taken: lengths are checked against the file before anything is read, the number
of instructions and the amount of text are bounded, and bytes are never read at all but kept as a place in the file.

Source: the instructions as documented in Python's `pickletools`.
"""

import pickle
import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from trigflow.runtime.errors import UserError

MAX_INSTRUCTIONS = 2_000_000
"""Upper bound on the instructions in one file; the snapshot of a 1.5B network has about 43 thousand."""
MAX_TEXT = 64 << 20
"""Upper bound on the bytes of text in one file; a snapshot carries the source code of its classes, about 100 KB."""
MAX_NAME = 500
"""Upper bound on the length of a module or class name."""

NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
TEXT = {pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE: "<I", pickle.BINUNICODE8: "<Q"}
BYTES = {pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES: "<I", pickle.BINBYTES8: "<Q", pickle.BYTEARRAY8: "<Q"}
CONSTANTS = {pickle.NONE: None, pickle.NEWTRUE: True, pickle.NEWFALSE: False}
EMPTY = {pickle.EMPTY_TUPLE: tuple, pickle.EMPTY_LIST: list, pickle.EMPTY_DICT: dict, pickle.EMPTY_SET: set}
TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
PUT = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}
GET = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


@dataclass(frozen=True)
class Span:
    """Bytes that stay in the file: where they begin and how many there are."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length


class Source:
    """An open file with the bounds that every reader of it shares. Messages say that `expected` was meant."""

    def __init__(self, path: Path, file: BinaryIO, expected: str = "a network snapshot of EDM or EDM2 (.pkl)") -> None:
        self.path = path
        self.file = file
        self.expected = expected
        self.size = file.seek(0, 2)
        self.instructions = 0
        self.text = 0

    def refuse(self, fault: str, advice: str = "download it again from its source") -> NoReturn:
        """One line for a file that is damaged, or not what it should be."""
        raise UserError(f"'{self.path}' {fault}; expected {self.expected}; {advice}")

    def distrust(self, fault: str) -> NoReturn:
        """One line for a file that asks for what no snapshot needs; it may be an attack."""
        self.refuse(fault, "do not open this file with other programs unless you trust where it comes from")

    def read(self, span: Span, limit: int = MAX_TEXT) -> bytes:
        """The bytes of a span of at most `limit` bytes."""
        if span.length > limit:
            self.distrust(f"holds {span.length} bytes where at most {limit} can be meant")
        self.file.seek(span.start)
        data = self.file.read(span.length)
        if len(data) < span.length:
            self.refuse(f"is cut short after {self.size} bytes")
        return data


@dataclass(frozen=True, eq=False)
class Known:
    """A name that a pickle may use, module and name joined by a dot; `value` is what one stands for that is never called."""

    name: str
    value: Any = None


@dataclass(eq=False)
class Record:
    """An object of a class we know by name only: its attributes, and no behaviour.

    Attributes:
        class_name: as written in the file.
        state: attributes; filled when the pickle restores them.
    """

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)


class Unpickler:
    """Reads pickles of protocol 2 to 5 one after another.

    Args:
        source: the file.
        span: the part of it that holds the pickles.
        known: names the pickles may use.
        build: `build(source, name, arguments)`, what a call of one stands for; `NotImplemented` where it makes no sense.
        persistent: turns a persistent id (a reference to data kept outside the pickle) into a record; None to refuse them.

    Attributes:
        position: of the next byte to read.
    """

    def __init__(
        self,
        source: Source,
        span: Span,
        known: Mapping[str, Known],
        build: Callable[[Source, str, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        self.source = source
        self.known = known
        self.build = build
        self.persistent = persistent
        self.position = span.start
        self.stop = span.stop

    def load(self) -> Any:
        """The object of the next pickle: numbers, text, `Span`s for bytes, containers, and what `known` builds. Raises a
        UserError for a name or an instruction that has no place in a snapshot (named), for a pickle that is cut short or makes
        no sense, and for one beyond the bounds."""
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.source.file.seek(self.position)
        code = pickle.STOP
        try:
            while (code := self._take(1)) != pickle.STOP:
                self.source.instructions += 1
                if self.source.instructions > MAX_INSTRUCTIONS:
                    self.source.distrust(f"has more than {MAX_INSTRUCTIONS} instructions")
                self._step(code)
            return self.stack.pop()
        except (IndexError, KeyError, UnicodeDecodeError):  # an empty stack, no such memo entry, no UTF-8
            self._malformed("the instruction", NAMES.get(code[0], "?"))

    # Reading -------------------------------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.stop - self.position:
            self.source.refuse(f"is cut short or damaged: {count} bytes at byte {self.position} of {self.stop} announced")
        data = self.source.file.read(count)
        if len(data) < count:
            self.source.refuse(f"is cut short at byte {self.position}")
        self.position += count
        return data

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _text(self, length: int) -> str:
        self.source.text += length
        if self.source.text > MAX_TEXT:
            self.source.distrust(f"holds more than {MAX_TEXT} bytes of text")
        return self._take(length).decode("utf-8")

    def _line(self) -> str:
        """Text up to the end of the line."""
        line = self.source.file.readline(min(MAX_NAME, self.stop - self.position))
        self.position += len(line)
        if not line.endswith(b"\n"):
            self.source.refuse(f"has a damaged name at byte {self.position}")
        return line[:-1].decode("utf-8")

    def _span(self, length: int) -> Span:
        """The next `length` bytes, left where they are."""
        if length > self.stop - self.position:
            self.source.refuse(f"is cut short or damaged: {length} bytes at byte {self.position} of {self.stop} announced")
        span = Span(self.position, length)
        self.position = span.stop
        self.source.file.seek(self.position)
        return span

    # The instructions ----------------------------------------------------------------------------------------------

    def _step(self, code: bytes) -> None:
        stack = self.stack
        if code in NUMBERS:
            stack.append(self._number(NUMBERS[code]))
        elif code in TEXT:
            stack.append(self._text(self._number(TEXT[code])))
        elif code in BYTES:
            stack.append(self._span(self._number(BYTES[code])))
        elif code in CONSTANTS:
            stack.append(CONSTANTS[code])
        elif code in EMPTY:
            stack.append(EMPTY[code]())
        elif code in TUPLES:
            items = [stack.pop() for _ in range(TUPLES[code])]
            stack.append(tuple(reversed(items)))
        elif code in PUT:
            self.memo[self._number(PUT[code])] = stack[-1]
        elif code in GET:
            stack.append(self.memo[self._number(GET[code])])
        elif code == pickle.MEMOIZE:
            self.memo[len(self.memo)] = stack[-1]
        elif code == pickle.MARK:
            self.marks.append(len(stack))
        elif code == pickle.LONG1:
            stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))
        elif code in (pickle.PROTO, pickle.FRAME):
            self._take(1 if code == pickle.PROTO else 8)
        elif code in (pickle.POP, pickle.POP_MARK):
            stack.pop() if code == pickle.POP else self._since_mark()
        else:
            self._step_further(code)

    def _step_further(self, code: bytes) -> None:
        stack = self.stack
        if code == pickle.TUPLE:
            stack.append(tuple(self._since_mark()))
        elif code == pickle.APPEND:
            item = stack.pop()
            self._target(list).append(item)
        elif code == pickle.APPENDS:
            items = self._since_mark()
            self._target(list).extend(items)
        elif code == pickle.SETITEM:
            value, key = stack.pop(), stack.pop()
            self._set_items([key, value])
        elif code == pickle.SETITEMS:
            self._set_items(self._since_mark())
        elif code == pickle.ADDITEMS:
            items = self._since_mark()
            self._target(set).update(map(self._hashable, items))
        elif code == pickle.FROZENSET:
            stack.append(frozenset(map(self._hashable, self._since_mark())))
        elif code == pickle.GLOBAL:
            module, name = self._line(), self._line()
            stack.append(self._find(module, name))
        elif code == pickle.STACK_GLOBAL:
            name, module = stack.pop(), stack.pop()
            stack.append(self._find(module, name))
        elif code in (pickle.REDUCE, pickle.NEWOBJ):
            arguments, called = stack.pop(), stack.pop()
            stack.append(self._call(called, arguments))
            self.source.file.seek(self.position)  # what was built may have read elsewhere
        elif code == pickle.BUILD:
            state = stack.pop()
            self._restore(stack[-1], state)
        elif code == pickle.BINPERSID and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        else:
            name = NAMES.get(code[0], f"0x{code[0]:02x}")
            self.source.distrust(f"has the instruction {name} at byte {self.position - 1}, which no snapshot has")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    # Containers ----------------------------------------------------------------------------------------------------

    def _target(self, kind: type[Any]) -> Any:
        """What is filled, on the top of the stack."""
        if type(self.stack[-1]) is not kind:
            self._malformed("items for", type(self.stack[-1]).__name__)
        return self.stack[-1]

    def _set_items(self, items: list[Any]) -> None:
        target = self._target(dict)
        if len(items) % 2:
            self._malformed("a key without a value for", "dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._hashable(key)] = value

    def _hashable(self, key: Any) -> Any:
        """A key that is a single value: the hash of tuples within tuples can be made to take forever."""
        if not (key is None or isinstance(key, str | int | float)):
            self._malformed("a key of type", type(key).__name__)
        return key

    # Names, calls and state ----------------------------------------------------------------------------------------

    def _find(self, module: Any, name: Any) -> Known:
        if not isinstance(module, str) or not isinstance(name, str):
            self._malformed("a name of type", type(name).__name__)
        wanted = f"{module}.{name}"
        if wanted not in self.known:
            self.source.distrust(f"asks for {shown(wanted)}, which no snapshot needs (nothing in it was run)")
        return self.known[wanted]

    def _call(self, called: Any, arguments: Any) -> Any:
        if not isinstance(called, Known):
            self._malformed("a call of", f"a {type(called).__name__}")
        made = self.build(self.source, called.name, arguments) if isinstance(arguments, tuple) else NotImplemented
        if made is NotImplemented:
            self._malformed("arguments for", called.name)
        return made

    def _restore(self, target: Any, state: Any) -> None:
        if not isinstance(target, Record):
            self._malformed("state for", type(target).__name__)
        target.state = state if isinstance(state, dict) else {"": state}

    def _malformed(self, what: str, where: str) -> NoReturn:
        self.source.refuse(f"is damaged: {what} {shown(where)} makes no sense before byte {self.position}")


def shown(value: object) -> str:
    """What a file holds, fit for one line of a terminal; of a container the type alone, as its text may have no end."""
    single = value is None or isinstance(value, str | int | float | Exception)
    return ascii(str(value)[:MAX_NAME])[1:-1] if single else f"a {type(value).__name__}"
