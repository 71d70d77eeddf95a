"""The Triton backend over a quantised base weight, host side: which formats the kernels decode, and the two launches.

A launch whose products read the weight decodes it once, into scratch of the dense weight's size in x's dtype, which is
freed when the launch has been made. A forward of few rows decodes it in the loop of its products, a backward without dX
not at all: these have no scratch. Products read scratch by ordinary loads, as they read S: Triton has no proxy fence
between other programs' stores and TMA.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastlora.backends.configs import TileConfig, has_few_rows, over_packed
from fastlora.backends.packed_blocks import elements_of_block, why_bad_blocks
from fastlora.backends.target import Target, target_of
from fastlora.backends.triton.launch import BackwardLaunch, ForwardLaunch, choose_tile, has_wide_loads
from fastlora.backends.triton.launch import why_unsupported as why_dense_unsupported
from fastlora.backends.triton.packed_format import FP4, NF4, PackedFormat
from fastlora.backends.triton.quantised_kernels import quantised_backward_kernel, quantised_forward_kernel
from fastlora.backends.triton.variant import Variant
from fastlora.backends.tuning import tuned_in_loop, tuned_way
from fastlora.problem import Launcher, LaunchSpec
from fastlora.quantised_weight import QuantisedWeight

PART = 1 << 15  # elements that one tile decodes: few enough to spread a panel, and a wait for them stays short
_EXPONENT_BITS = {torch.float8_e4m3fn: 4, torch.float8_e5m2: 5}
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_TABLES = {"nf4": NF4, "fp4": FP4}


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    packed = spec.packed
    if packed is None:
        return f"no kernel decodes a {spec.base_format} base weight"
    reason = why_dense_unsupported(spec._replace(base_format="dense", packed=None))
    if reason is not None:
        return reason
    if not packed.contiguous:
        return f"a tensor of the {spec.base_format} weight is not contiguous"
    if spec.base_format in _TABLES:
        return why_bad_blocks(spec)
    codes, scales, *rest = packed.dtypes
    if scales not in _SCALES:
        return f"scales of the {spec.base_format} weight are {scales}"
    if codes != torch.int8 and codes not in _EXPONENT_BITS:
        return f"no kernel decodes {codes}"
    if any(dtype.is_floating_point for dtype in rest):
        return f"zero points of the {spec.base_format} weight are {rest[0]}, not whole numbers"
    return why_bad_blocks(spec)


def prepare(
    spec: LaunchSpec, config: TileConfig | None = None, part: int = PART, in_loop: bool | None = None
) -> Launcher:
    """What serves every call of this description, with a QuantisedWeight for a weight.

    Args:
        config: overrides the tables and what was tuned.
        part: elements that one tile decodes, a power of two.
        in_loop: whether products decode the weight, instead of tiles ahead of them; see decodes_in_loop.
    """
    target = target_of(spec.device)
    if in_loop is None:
        in_loop = decodes_in_loop(spec)
    if config is None:
        config = (tuned_way(spec, in_loop) if has_wide_loads(spec) else None) or over_packed(
            choose_tile(spec, target, one_row_block=in_loop), spec.dtype.itemsize
        )
    if spec.direction == "backward":
        return _Backward(spec, config, target, part)
    return _Forward(spec, config, target, part, in_loop)


def why_not_in_loop(spec: LaunchSpec) -> str | None:
    """Why the products of such a launch, which is served, cannot decode the weight in their loop, or None. Rows of W0
    must be whole groups of eight elements with one scale."""
    if spec.direction == "backward" or spec.dropout:
        return "only a forward without dropout does that"
    packed = _format(spec, PART, True)
    if spec.sizes.k % 8 or not packed.whole or not packed.grouped:
        return "rows of the weight are not whole groups of eight elements with one scale"
    return None


def decodes_in_loop(spec: LaunchSpec, tuned: bool = True) -> bool:
    """Whether the products of a launch should decode the weight in their loop, in registers, instead of once for all:
    as was found by ``fastlora tune``, unless ``tuned`` is False, else few rows do.

    A forward without dropout of FEW_ROWS rows at most, as of a decode step, has one row block: each block of the weight
    is decoded once in either case, and here it is neither written nor read again. Of more rows, nothing in the loop
    hides what each row block decodes: by a model (python -m benchmarks.schedule --decoding) both ways take as long at
    64 rows, on average over Llama's layers, and the loop takes longer in each from 96 on; nothing is measured.
    """
    if why_not_in_loop(spec):
        return False
    found = tuned_in_loop("triton", spec) if tuned else None
    return has_few_rows(spec.direction, spec.sizes.m, spec.dropout) if found is None else found


def _format(spec: LaunchSpec, part: int, in_loop: bool) -> PackedFormat:
    packed = spec.packed
    assert packed is not None
    _, n, k, _ = spec.sizes
    whole = n * k % 8 == 0 and packed.starts[0]
    if spec.base_format in _TABLES:
        return PackedFormat(_TABLES[spec.base_format], 0, *packed.block, whole, True, part, in_loop)
    grouped = elements_of_block(spec) % 8 == 0
    return PackedFormat((), _EXPONENT_BITS.get(packed.dtypes[0], 0), 0, 0, whole, grouped, part, in_loop)


class _Decoding:
    """What a launch over a packed weight adds to the dense one.

    n_panels: of the weight; each is decoded in so many ``parts`` of one tile.
    """

    launch: Any
    variant: Variant
    kernel_key: tuple[LaunchSpec, Variant]
    n_words: int
    prepare_launch: Callable
    in_loop = False

    def _decode_first(self, kernel: Any, spec: LaunchSpec, n_panels: int, panel_rows: int, part: int) -> None:
        """Puts tiles that decode the weight in front of the dense launch, or, without panels, none."""
        packed = _format(spec, part, self.in_loop)
        self.variant = replace(self.variant, tma=False, tma_down=False, packed=packed)
        self.n_panels, self.parts = n_panels, -(-panel_rows * spec.sizes.k // part)
        self.n_words += n_panels
        self.block = elements_of_block(spec)
        self.kernel_key = (self.kernel_key[0], self.variant)
        self.launch = self.prepare_launch(
            kernel, self.launch.grid + n_panels * self.parts, ([], [], []), self.launch.compiled_as
        )

    def _packed_arguments(self, weight: QuantisedWeight) -> tuple:
        """The kernels' last ones, but the constants."""
        codes, scales, *rest = weight.tensors
        if codes.dtype not in (torch.uint8, torch.int8):  # as FSDP stores them, or float8, which sm_80 has no type for
            codes = codes.view(torch.uint8)
        zeros = (None,) if weight.is_4bit else rest or (None,)
        nested = rest if weight.nested else (None, None, None)
        return codes, scales, *zeros, *nested, self.block, self.n_panels, self.parts


class _Forward(_Decoding, ForwardLaunch):
    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target, part: int, in_loop: bool):
        super().__init__(spec, config, target)
        self.in_loop = in_loop
        n_panels = 0 if in_loop else -(-spec.sizes.n // config.block_n)
        self._decode_first(quantised_forward_kernel, spec, n_panels, config.block_n, part)

    def arguments(self, operands: Any, *made: Tensor) -> tuple:
        """Those of quantised_forward_kernel, but its constants; x stands for scratch that is not read."""
        x, weight, *rest = operands
        scratch = x if self.in_loop else x.new_empty(weight.shape)
        return *super().arguments((x, scratch, *rest), *made), *self._packed_arguments(weight)  # type: ignore[arg-type]


class _Backward(_Decoding, BackwardLaunch):
    def __init__(self, spec: LaunchSpec, config: TileConfig, target: Target, part: int):
        super().__init__(spec, config, target)
        n_panels = int(spec.needs.dx)
        self._decode_first(quantised_backward_kernel, spec, n_panels, spec.sizes.n, part)

    def arguments(self, operands: Any, *made: Any) -> tuple:
        """Those of quantised_backward_kernel, but its constants; scratch is new, and dY stands for one that is not
        read."""
        dy, x, weight, *rest = operands
        scratch = dy.new_empty(weight.shape) if self.n_panels else dy
        return *super().arguments((dy, x, scratch, *rest), *made), *self._packed_arguments(weight)  # type: ignore[arg-type]
