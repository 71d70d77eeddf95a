"""What one call of a LoRA layer is made of: operands, sizes, what it computes and returns, and the LaunchSpec that
describes it to a backend.

The ground floor: every other module may import this one, and it imports none of them.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "composed", "reference")  # in order of preference on a GPU


class Sizes(NamedTuple):
    """M tokens (all leading dimensions of x), N out_features, K in_features, R rank."""

    m: int
    n: int
    k: int
    r: int


class PassingReason(str):
    """Why a backend cannot serve a call now, of which the next call may be free: the state of the device, say."""


class Needs(NamedTuple):
    """Which gradients to compute."""

    dx: bool
    da: bool
    db: bool
    dbias: bool


class Gradients(NamedTuple):
    """What a backward returns; None where it was not asked for."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None


class Scales(NamedTuple):
    """The two factors whose product is a layer's scaling: ``in_s`` goes into S before it is rounded, ``on_branch`` (a
    power of two) multiplies S·Bᵀ and dYᵀ·S."""

    in_s: float
    on_branch: float


def split_scaling(scaling: float, dtype: torch.dtype) -> Scales:
    """How a scaling is shared out between S and the branch.

    In float16 a scaling above 1 would make S overflow where x·Aᵀ itself does not. There S takes scaling / 2^e, of
    magnitude 1/2 to 1, and 2^e, which is exact, is left to the branch. Every other dtype has the range for all of it.

    Args:
        scaling: the layer's factor of the low-rank branch.
        dtype: x's dtype, which S is stored in.
    """
    if not scales_branch(scaling, dtype):
        return Scales(scaling, 1.0)
    mantissa, exponent = math.frexp(scaling)
    if abs(mantissa) == 0.5:  # a power of two: S takes exactly 1
        mantissa, exponent = 2 * mantissa, exponent - 1
    return Scales(mantissa, math.ldexp(1.0, exponent))


def scales_branch(scaling: float, dtype: torch.dtype) -> bool:
    """Whether ``split_scaling`` leaves a factor other than 1 to the branch."""
    return dtype == torch.float16 and 1.0 < abs(scaling) < math.inf


class ForwardOperands(NamedTuple):
    """What a forward reads. Y = x·weightᵀ + scaling·(drop(x)·lora_aᵀ)·lora_bᵀ + bias."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    bias: Tensor | None  # [N]
    scaling: float
    dropout_p: float
    seed: Tensor | None


class BackwardOperands(NamedTuple):
    """What a backward reads; x for dA alone, s for dB alone."""

    dy: Tensor  # [M, N]
    x: Tensor | None  # [M, K]
    weight: Tensor  # [N, K]
    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]
    s: Tensor | None  # [M, R], what the forward returned
    scaling: float
    dropout_p: float
    seed: Tensor | None


class ScaledForward(NamedTuple):
    """What a DoRA layer's forward reads. Y = magnitude/norm∘Z + bias of
    Z = x·weightᵀ + scaling·(x·lora_aᵀ)·lora_bᵀ."""

    layer: ForwardOperands  # whose dropout_p is 0: no kernel drops here
    magnitude: Tensor  # [N]
    norm: Tensor  # [N], float32
    keeps_unscaled: bool  # whether Z is returned, for the magnitude's gradient


class ScaledBackward(NamedTuple):
    """What its backward reads; the norm is a constant."""

    layer: BackwardOperands  # whose dropout_p is 0
    magnitude: Tensor  # [N]
    norm: Tensor  # [N], float32
    unscaled: Tensor | None  # [M, N], Z; None: the magnitude gets no gradient


class Aligned(NamedTuple):
    """Of which matrices something starts on 16 bytes."""

    act: bool  # x forward, dY backward
    weight: bool
    lora_a: bool
    lora_b: bool
    saved_x: bool  # the backward's x


class Strides(NamedTuple):
    """Elements from one row of a matrix to the next; 0 where there is no such matrix."""

    act: int  # x forward, dY backward
    weight: int
    lora_a: int
    lora_b: int
    saved_x: int  # the backward's x


class Packed(NamedTuple):
    """How a quantised base weight is packed; its format, tensors and blocks are those of QuantisedWeight.

    block: its two sizes.
    dtypes, counts: of its tensors: what an element is, and how many there are.
    starts: which of them start on 16 bytes.
    contiguous: whether all are.
    """

    block: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    counts: tuple[int, ...]
    starts: tuple[bool, ...]
    contiguous: bool


class ColumnScale(NamedTuple):
    """A factor for each column of Y: a magnitude over a norm.

    magnitude, norm: their dtypes.
    trains: whether it gets a gradient: a forward keeps Y as it is before the scale, a backward reads that.
    """

    magnitude: torch.dtype
    norm: torch.dtype
    trains: bool


_ALL_ALIGNED = Aligned(True, True, True, True, True)


class Stacks(NamedTuple):
    """What a call on rows in segments has besides the sizes of one matrix; a dtype that is None: there is none."""

    n_segments: int
    n_weights: int
    n_adapters: int
    n_biases: int  # rows of the bias: 1 for one of all segments, 0 for none
    experts: torch.dtype | None  # of the weight of each segment
    adapters: torch.dtype | None  # of the adapter of each segment
    scalings: torch.dtype | None  # of the scaling of each adapter
    weight: torch.dtype  # of the weights, which under autocast are not of x's dtype
    weight_stride: int  # elements from one weight to the next


Direction = Literal["forward", "backward"]


class LaunchSpec(NamedTuple):
    """One call, described once: all that the choice of a backend and of a kernel depends on, and nothing else.

    A prepared launch serves every call of its description, and takes from the operands only their addresses and a few
    numbers. So whatever else a compiled kernel was made for, or is passed, is in here.

    direction: which of the two launches.
    sizes: M, N, K, R.
    dtype: of x, weight, bias and dY.
    adapter_dtypes: of lora_a and lora_b: ``dtype``, or float32 over a 16-bit one.
    device: where all operands are.
    base_format: how the base weight lies in memory; "dense" is [N, K] in ``dtype``, "transposed" [K, N]; else the name
        of a quantised format, and ``packed`` says more.
    branch: which adapters a row sees; "single" is one for all rows, "none" has none. "shared_input" is several
        projections of one x, which ``members`` describe one by one.
    dropout: whether the branch drops elements of x.
    bias: whether there is a bias to add (forward).
    needs: the gradients to compute (backward).
    aligned: which matrices start on 16 bytes, and so does each of their rows: what TMA and wide loads need.
    tf32: whether torch allows TF32 in float32 products.
    starts: which matrices start on 16 bytes, whatever their rows do: what compiled code may take for granted.
    strides: see Strides; None where each matrix is contiguous.
    scales_branch: whether a factor of the scaling is left to the branch (see split_scaling).
    packed: of a quantised base weight, whose alignment and stride are then those of its dense form.
    stacks: of rows in segments ("segments"); None where there are none, or nobody knows yet.
    column_scale: of a DoRA layer; None: 1.
    members: of "shared_input", each projection as a call of its own, in order; ``sizes`` has their sums of N and of R.
    """

    direction: Direction
    sizes: Sizes
    dtype: torch.dtype
    adapter_dtypes: tuple[torch.dtype, torch.dtype]
    device: torch.device
    base_format: str = "dense"
    branch: str = "single"
    dropout: bool = False
    bias: bool = False
    needs: Needs = Needs(False, False, False, False)
    aligned: Aligned = _ALL_ALIGNED
    tf32: bool = False
    starts: Aligned = _ALL_ALIGNED
    strides: Strides | None = None
    scales_branch: bool = False
    packed: Packed | None = None
    stacks: Stacks | None = None
    column_scale: ColumnScale | None = None
    members: tuple["LaunchSpec", ...] = ()

    @property
    def is_empty(self) -> bool:
        """Nothing to multiply, or nothing asked for: no launch would have work."""
        asked_for = any(self.needs) or (self.column_scale is not None and self.column_scale.trains)
        return 0 in self.sizes[:3] or (self.direction == "backward" and not asked_for)

    @property
    def row_strides(self) -> Strides:
        """The strides, also where all matrices are contiguous."""
        _, n, k, r = self.sizes
        forward = self.direction == "forward"
        return self.strides or Strides(k if forward else n, k, k, r, k if self.needs.da else 0)


# A call of a prepared kernel. Forward: operands -> (Y [M, N], S [M, R]); backward: operands -> Gradients. That of a
# backend which adds dX in place takes the dX to add to besides.
Launcher = Callable[..., Any]
