"""Tangents of softmax attention: one function, three implementations, one a file.

| file | memory | serves |
| --- | --- | --- |
| `plain.py` | the matrix of weights | everything; the fastest for short sequences |
| `chunked.py` | linear in the sequence length | everything but dropout, on any device |
| `triton.py` | the result | a kernel for CUDA devices; `triton_backward.py` has kernels for gradients |
"""

from trigflow.tangent.attention.select import attention, attention_implementation, attention_with_tangent

__all__ = ["attention", "attention_implementation", "attention_with_tangent"]
