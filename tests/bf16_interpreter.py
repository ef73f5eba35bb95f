"""A true bfloat16 for Triton's interpreter, which as it comes computes with the bits as whole numbers of 16 bits.

Values are arrays of `ml_dtypes.bfloat16`: NumPy converts them with rounding to nearest, ties to even, and rounds the
result of every operation, as a GPU does. Matrix products sum in the dtype of their accumulator. Only reading and
writing memory goes through 16-bit integers. For Triton 3.6 and later.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def install() -> None:
    """Patch the interpreter, for all kernels of this process. What holds no bfloat16 runs as before."""
    builder, numpy_dtype = InterpreterBuilder, interpreter._get_np_dtype
    load, store, cast = builder.create_masked_load, builder.create_masked_store, builder.cast_impl
    fp_to_fp, dot = builder.create_fp_to_fp, builder.create_dot

    def numpy_dtype_of(dtype: tl.dtype) -> np.dtype:
        return BFLOAT16 if dtype.scalar == tl.bfloat16 else numpy_dtype(dtype)

    def masked_load(self, ptrs, mask, other, *hints) -> TensorHandle:
        if ptrs.get_element_ty() != tl.bfloat16:
            return load(self, ptrs, mask, other, *hints)
        other = np.zeros(ptrs.data.shape, np.uint16) if other is None else _bits(other.data)
        loaded = interpreter._interpreter.load(ptrs.data, mask.data, other, np.dtype(np.uint16))
        return TensorHandle(loaded.view(BFLOAT16), tl.bfloat16)

    def masked_store(self, ptrs, value, mask, *hints) -> None:
        if value.data.dtype == BFLOAT16:
            value = TensorHandle(_bits(value.data), tl.uint16)
        store(self, ptrs, value, mask, *hints)

    def any_cast(self, src, dtype) -> TensorHandle:
        if tl.bfloat16 not in (src.dtype.scalar, dtype.scalar):
            return cast(self, src, dtype)
        return TensorHandle(src.data.astype(numpy_dtype_of(dtype)), dtype.scalar)

    def float_cast(self, src, dtype, rounding_mode) -> TensorHandle:
        kinds = (src.dtype.scalar, dtype.scalar)
        if tl.bfloat16 not in kinds or any(kind.is_fp8() for kind in kinds):
            return fp_to_fp(self, src, dtype, rounding_mode)
        if rounding_mode not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError(f"bfloat16 rounds to nearest even in this interpreter, not {rounding_mode}")
        return any_cast(self, src, dtype)

    def any_dot(self, a, b, d, *settings) -> TensorHandle:
        made = dot(self, *(_widened(x) for x in (a, b, d)), *settings)
        return any_cast(self, made, d.dtype)

    def constant(self, value) -> TensorHandle:
        return TensorHandle(np.array([value], BFLOAT16), tl.bfloat16)

    interpreter._get_np_dtype = numpy_dtype_of
    builder.create_masked_load, builder.create_masked_store = masked_load, masked_store
    builder.cast_impl, builder.create_fp_to_fp = any_cast, float_cast
    builder.create_dot = any_dot
    builder.get_bf16 = constant


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.astype(BFLOAT16, copy=False)).view(np.uint16)


def _widened(x: TensorHandle) -> TensorHandle:
    return TensorHandle(x.data.astype(np.float32), tl.float32) if x.data.dtype == BFLOAT16 else x
