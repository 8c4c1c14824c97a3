"""Tangents of softmax attention, one implementation a file behind one signature."""

from trigflow.tangent.attention.plain import attention

__all__ = ["attention"]
