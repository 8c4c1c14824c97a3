"""Files of tensors in the format of safetensors.

A file is the length of its header (8 bytes, little-endian), the header (JSON: number format, shape and place of each tensor),
padded to a multiple of 8, and the numbers. Source: https://huggingface.co/docs/safetensors. They are written here and not by
that package, whose writer needs all tensors at once, and leaves a file behind where it is killed.
"""

import json
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from trigflow.runtime.errors import UserError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
"""Number formats by their names in a header."""


def layout(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> tuple[bytes, list[str]]:
    """The beginning of a file of these tensors, and the order in which their numbers follow: every one is aligned.

    Args:
        tensors: by name; only formats and shapes matter here.
        metadata: text that goes into the header.

    Raises:
        UserError: for a number format that such files do not have.
    """
    unknown = [name for name, tensor in tensors.items() if tensor.dtype not in DTYPES]
    if unknown:
        raise UserError(
            f"'{unknown[0]}' is of {tensors[unknown[0]].dtype}, which files of tensors do not have; expected one of "
            f"{', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}; convert it"
        )
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, names


def content(tensor: Tensor) -> memoryview:
    """The numbers of a tensor from any device, as they are in a file; little-endian machines only, as PyTorch's are."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
