"""Repairs of Triton's interpreter, which runs kernels on the CPU under TRITON_INTERPRET=1.

Triton 3.6 to 3.9 keep bfloat16 as raw 16-bit integers: dots and arithmetic on them are silently wrong, and rounding
from float32 truncates. Triton 3.6 with NumPy 2.4 or newer fails on ``range`` over a computed bound. ``install`` mends
both. Importing Triton's private interpreter is confined to this file."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Handle = interpreter.TensorHandle
_Builder = interpreter.InterpreterBuilder
_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}


def to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns as the float32 numbers they stand for."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to the nearest bfloat16, ties to even, as bit patterns."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _widened(handle):
    return _Handle(to_float32(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def _narrowed(numbers: np.ndarray):
    return _Handle(to_bfloat16(numbers), tl.bfloat16)


def install() -> None:
    """Mends the interpreter of the running process; a second call changes nothing."""
    if getattr(_Builder, "mended", False):
        return
    _Builder.mended = True
    _mend_bfloat16()
    mend_range()


def _mend_bfloat16() -> None:
    original = {
        name: getattr(_Builder, name)
        for name in ("create_dot", "cast_impl", "binary_op", "unary_op", "ternary_op", "create_fma", "create_fp_to_fp")
    }

    def create_dot(self, a, b, acc, precision, max_imprecise):
        return original["create_dot"](self, _widened(a), _widened(b), acc, precision, max_imprecise)

    def cast_impl(self, source, target):
        before, after = source.dtype.scalar, target.scalar
        if after == tl.bfloat16 and before != tl.bfloat16:
            return _narrowed(source.data.astype(np.float32))
        if before == tl.bfloat16 and after != tl.bfloat16:
            return _Handle(to_float32(source.data).astype(interpreter._get_np_dtype(target)), after)
        return original["cast_impl"](self, source, target)

    def create_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return original["create_fp_to_fp"](self, source, target, rounding)

    def binary_op(self, left, right, op):
        if _is_bfloat16(left) and _is_bfloat16(right) and op not in _BITWISE:
            result = op(to_float32(left.data), to_float32(right.data))
            return _Handle(result, tl.int1) if op in _COMPARISONS else _narrowed(result)
        return original["binary_op"](self, left, right, op)

    def unary_op(self, operand, op):
        if _is_bfloat16(operand):
            return _narrowed(op(to_float32(operand.data)))
        return original["unary_op"](self, operand, op)

    def ternary_op(self, first, second, third, op):
        if _is_bfloat16(first):
            return _narrowed(op(*(to_float32(handle.data) for handle in (first, second, third))))
        return original["ternary_op"](self, first, second, third, op)

    def create_fma(self, x, y, z):
        if _is_bfloat16(x):
            return _narrowed(to_float32(x.data) * to_float32(y.data) + to_float32(z.data))
        return original["create_fma"](self, x, y, z)

    for mended in (create_dot, cast_impl, create_fp_to_fp, binary_op, unary_op, ternary_op, create_fma):
        setattr(_Builder, mended.__name__, mended)


def mend_range() -> None:
    """Loops over computed bounds, for Triton 3.6 with NumPy 2.4 or newer. Twice does no harm."""
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        original(tensor, scope)
        # int() of an array of shape (1,) is an error since NumPy 2.4.
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
