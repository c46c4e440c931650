"""Triton's kernels without a GPU, by its interpreter; to be imported before anything that has kernels.

Two things that a GPU's compiler does the interpreter of Triton 3.7 does not: numbers that are not whole become numbers
of the kernel's language, and there is libdevice's `rsqrt`. Its bfloat16 is not to be trusted.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_own_conversion = interpreter._implicit_cvt


def _converted(argument: Any) -> Any:
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)
    return _own_conversion(argument)


def _rsqrt(x: Any) -> Any:
    return tl.tensor(interpreter.TensorHandle(1 / np.sqrt(x.handle.data), x.dtype), x.type)


def interpret() -> None:
    """Let Liger's kernels run on CPU tensors in this process."""
    from liger_kernel.ops import rms_norm

    interpreter._implicit_cvt = _converted
    rms_norm.rsqrt = _rsqrt
