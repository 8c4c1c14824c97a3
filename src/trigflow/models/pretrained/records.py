"""What a network snapshot is made of, and the names by which its pickle asks for it.

Tensors and arrays are records of where their numbers lie in the file; they are read one at a time, when they are wanted.

Two containers are understood. A plain pickle, as NVIDIA publishes them, carries each storage as the bytes of a small legacy
`torch.save` file: four pickles (magic number, version, machine, storage), the list of keys, and for each key the number of
elements and the elements. An archive written by `torch.save` carries one pickle and one file for each storage.
"""

import math
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trigflow.models.pretrained.unpickle import Known, Record, Source, Span, Unpickler, shown
from trigflow.runtime.errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
MAX_AXES = 8

STORAGES = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
}  # fmt: skip
"""Storage classes `torch.<name>Storage` and their element types."""

MODULES = (
    "torch.nn.modules.container.ModuleDict",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.container.Sequential",
)
"""Classes of PyTorch that hold the blocks of a network; taken as records."""


@dataclass(eq=False)
class Storage:
    """A run of numbers in the file. `start` is None until the place is known."""

    dtype: torch.dtype
    numel: int
    start: int | None = None


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in the file: a strided view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def extent(self) -> int:
        """Elements of the storage from the first one used to the last."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) if self.numel else 0

    def read(self, source: Source) -> Tensor:
        """The numbers, in the type they are stored in."""
        if self.storage.start is None:
            source.refuse("lacks the numbers of a tensor")
        flat = torch.empty(self.extent, dtype=self.dtype)
        data = flat.view(torch.uint8).numpy()
        source.file.seek(self.storage.start + self.offset * self.dtype.itemsize)
        if source.file.readinto(data) != data.nbytes:  # type: ignore[attr-defined]
            source.refuse(f"is cut short after {source.size} bytes")
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Latin1:
    """Bytes written as text."""

    text: str


@dataclass(frozen=True, eq=False)
class StoredArray:
    """A numpy array, or a single number, in the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: Span | Latin1

    def read(self, source: Source) -> np.ndarray[Any, Any]:
        """The numbers."""
        data = source.read(self.data) if isinstance(self.data, Span) else self.data.text.encode("latin-1", "replace")
        if len(data) != math.prod(self.shape) * self.dtype.itemsize:
            source.refuse(f"is damaged: {len(data)} bytes for an array of shape {self.shape}")
        return np.frombuffer(data, self.dtype).reshape(self.shape)


# Builders: from the arguments of a call to a record, or NotImplemented ----------------------------------------------


def _sizes(numbers: tuple[Any, ...]) -> bool:
    """Whether these are at most `MAX_AXES` whole numbers, from 0 to 2^62."""
    return len(numbers) <= MAX_AXES and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)


def _tensor(arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_):
            if not (_sizes((offset,)) and _sizes(shape) and _sizes(stride) and len(shape) == len(stride)):
                return NotImplemented
            tensor = StoredTensor(storage, offset, shape, stride)
            return tensor if offset + tensor.extent <= storage.numel else NotImplemented
    return NotImplemented


def _parameter(arguments: tuple[Any, ...]) -> Any:
    return arguments[0] if arguments and isinstance(arguments[0], StoredTensor) else NotImplemented


def _empty_dict(arguments: tuple[Any, ...]) -> Any:
    return {} if not arguments else NotImplemented


def _set(arguments: tuple[Any, ...]) -> Any:
    """A set as protocols 2 and 3 write it; its list will do, and takes no copy."""
    match arguments:
        case (list(items),):
            return items
    return NotImplemented


def _latin1(arguments: tuple[Any, ...]) -> Any:
    """Bytes as protocol 2 writes them: text of which each character is a byte. It stays text until it is read."""
    match arguments:
        case (str(text), "latin1"):
            return Latin1(text)
    return NotImplemented


def _dtype(arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (str(code), *_) if code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            return ArrayType(code)
    return NotImplemented


class ArrayType(Record):
    """An element type of numpy, for example `f4`; its state says the byte order."""

    @property
    def dtype(self) -> np.dtype[Any]:
        order = self.state.get("", (3, "<"))
        big = isinstance(order, tuple) and len(order) > 1 and order[1] == ">"
        return np.dtype(f"{'>' if big else '<'}{self.class_name}")


class ArrayShell(Record):
    """An array whose shape, type and numbers the pickle restores later."""

    @property
    def array(self) -> StoredArray | None:
        match self.state.get(""):
            case (int(), tuple(shape), ArrayType() as kind, False, (Span() | Latin1()) as data) if _sizes(shape):
                return StoredArray(kind.dtype, shape, data)
        return None


def _array(arguments: tuple[Any, ...]) -> Any:
    return ArrayShell("numpy.ndarray")


def _array_from_buffer(arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case ((Span() | Latin1()) as data, ArrayType() as kind, tuple(shape), "C") if _sizes(shape):
            return StoredArray(kind.dtype, shape, data)
    return NotImplemented


def _scalar(arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (ArrayType() as kind, (Span() | Latin1()) as data):
            return StoredArray(kind.dtype, (), data)
    return NotImplemented


def _persistent_object(arguments: tuple[Any, ...]) -> Any:
    """NVIDIA's objects: `meta` has type, version, module_src, class_name and state; the source code is dropped unread."""
    match arguments:
        case ({"type": "class", "class_name": str(name), "state": dict(state)},):
            return Record(name, state)
    return NotImplemented


def _module(name: str) -> Callable[[tuple[Any, ...]], Any]:
    return lambda arguments: Record(name) if not arguments else NotImplemented


def _names(**builders: Callable[[tuple[Any, ...]], Any]) -> dict[str, Known]:
    return {name: Known(name, build) for name, build in builders.items()}


STORAGE_NAMES = {f"torch.{name}Storage": Known(f"torch.{name}Storage", value=dtype) for name, dtype in STORAGES.items()}
"""The only names allowed inside the bytes of a storage."""

NAMES = {
    **STORAGE_NAMES,
    **_names(
        **{
            "torch._utils._rebuild_tensor": _tensor,
            "torch._utils._rebuild_tensor_v2": _tensor,
            "torch._utils._rebuild_parameter": _parameter,
            "collections.OrderedDict": _empty_dict,
            "dnnlib.util.EasyDict": _empty_dict,
            "builtins.set": _set,
            "__builtin__.set": _set,
            "_codecs.encode": _latin1,
            "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
            "numpy.dtype": _dtype,
        },
        **{name: _module(name) for name in MODULES},
        **{
            f"numpy.{core}.{function}": build
            for core in ("core", "_core")
            for function, build in (
                ("multiarray._reconstruct", _array),
                ("multiarray.scalar", _scalar),
                ("numeric._frombuffer", _array_from_buffer),
            )
        },
    ),
    "numpy.ndarray": Known("numpy.ndarray"),
}
"""Every name that a snapshot may use, but for `torch.storage._load_from_bytes`, which needs the file."""


# Containers ---------------------------------------------------------------------------------------------------------


def read_pickle(source: Source) -> Any:
    """The object in a plain pickle, or in an archive written by `torch.save`.

    Raises:
        UserError: when the file is neither, is damaged, or asks for anything but the parts of a snapshot.
    """
    whole = Span(0, source.size)
    head = source.read(Span(0, min(source.size, 16)))
    if head.startswith(b"PK\x03\x04"):
        return _read_archive(source)
    if len(head) < 2 or head[0] != 0x80 or not 3 <= head[1] <= 5:
        source.refuse("is no pickle of protocol 3 to 5" if head else "is empty")
    names = {**NAMES, (known := _bytes_of_storage(source)).name: known}
    return Unpickler(source, whole, names).load()


def _bytes_of_storage(source: Source) -> Known:
    """`torch.storage._load_from_bytes(b)`: the storage that was saved as these bytes."""

    def build(arguments: tuple[Any, ...]) -> Any:
        match arguments:
            case (Span() as span,):
                storage = _read_saved_storage(source, span)
                return storage if isinstance(storage, Storage) else NotImplemented
        return NotImplemented

    return Known("torch.storage._load_from_bytes", build)


def _read_saved_storage(source: Source, span: Span) -> Any:
    """The object that `torch.save` wrote in its older format, here within `span`; nothing but storages is allowed."""
    storages: dict[str, Storage] = {}
    unpickler = Unpickler(source, span, STORAGE_NAMES, lambda reference: _storage(source, reference, storages))
    magic, version, machine = (unpickler.load() for _ in range(3))
    if magic != LEGACY_MAGIC or version != LEGACY_VERSION or not isinstance(machine, dict):
        source.refuse(f"is damaged: no saved storage at byte {span.start}")
    if machine.get("little_endian") is not True:
        source.refuse("was written on a big-endian machine", "write it again on a little-endian one")
    content, keys = unpickler.load(), unpickler.load()
    position = unpickler.position
    for key in keys if isinstance(keys, list) else []:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or position + 8 > span.stop:
            source.refuse(f"is damaged: no saved storage at byte {position}")
        (numel,) = struct.unpack("<q", source.read(Span(position, 8)))
        storage.start, position = position + 8, position + 8 + storage.numel * storage.dtype.itemsize
        if numel != storage.numel or position > span.stop:
            source.refuse(f"is cut short or damaged: {numel} elements at byte {storage.start}, {storage.numel} announced")
    return content


def _read_archive(source: Source) -> Any:
    """The object of a zip archive written by `torch.save`."""
    try:
        with zipfile.ZipFile(source.file) as archive:
            places = {info.filename: _place(source, info) for info in archive.infolist()}
    except UserError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        source.refuse(f"is a damaged archive ({shown(error)})")
    pickles = [name for name in places if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        source.refuse("is a zip archive without a pickle")
    folder = pickles[0].removesuffix("data.pkl")
    order = places.get(f"{folder}byteorder")
    if order is not None and source.read(order) != b"little":
        source.refuse("was written on a big-endian machine", "write it again on a little-endian one")
    storages: dict[str, Storage] = {}
    content = Unpickler(source, places[pickles[0]], NAMES, lambda reference: _storage(source, reference, storages)).load()
    for key, storage in storages.items():
        place = places.get(f"{folder}data/{key}")
        if place is None or place.length != storage.numel * storage.dtype.itemsize:
            source.refuse(f"is damaged: the archive has no whole storage '{shown(key)}'")
        storage.start = place.start
    return content


def _place(source: Source, info: zipfile.ZipInfo) -> Span:
    """Where a file of an archive lies; after its local header of 30 bytes, a name and an extra field."""
    header = source.read(Span(info.header_offset, 30))
    name, extra = struct.unpack("<HH", header[26:30])
    span = Span(info.header_offset + 30 + name + extra, info.file_size)
    if header[:4] != b"PK\x03\x04" or info.compress_type != zipfile.ZIP_STORED or span.stop > source.size:
        source.refuse("is a damaged or compressed archive", "unpack it, or save it again with torch.save")
    return span


def _storage(source: Source, reference: Any, storages: dict[str, Storage]) -> Storage:
    """The storage that a persistent id `("storage", class, key, device, elements[, None])` refers to."""
    match reference:
        case ("storage", Known(value=torch.dtype() as dtype), str(key), str(), int(numel), *_) if _sizes((numel,)):
            if numel * dtype.itemsize > source.size:
                source.distrust(f"announces {numel} numbers in {source.size} bytes")
            return storages.setdefault(key, Storage(dtype, numel))
    return source.refuse("is damaged: a reference to a storage makes no sense")
