"""What is fixed when a kernel is compiled."""

import dataclasses

import triton

from fastlora.backends.configs import TileConfig
from fastlora.backends.triton.packed_format import PackedFormat


@dataclasses.dataclass(frozen=True)
class Variant:
    """The compile-time parameters of a kernel. Kernels take them ``as_plain``, since Triton's hooks and ``preload``
    keep a kernel's constants as JSON. (No texts: Triton would take them for attributes of arguments.)

    tile: how the product is cut.
    block_r: the rank as tiles hold it.
    forward: the operands lie in memory as the forward has them; else as dX does (see structs.Product).
    fused: the tiles of column 0 make S with their product (fused shrink); else S has tiles of its own (separate).
    dropout: the branch drops elements of x.
    tma: act and weight are TMA descriptors, not pointers; tma_down: so is down.
    even_k: the contracted dimension is a multiple of block_k.
    tf32: float32 products are products of TF32.
    wgmma: compiled for Hopper, whose products read registers while the program runs on.
    packed: how the base weight is packed; None: it is dense.
    segments: a tile's rows are a segment's, which may have no adapter: a rank of 0 (segments.py).
    block_g: how many of them are looked at together.
    transposed: the base weight lies in memory as [K, N] by the forward's names.
    scaled: dY's columns are scaled by other tiles of the launch, into scratch (structs.ScaledRows).
    projections: of one x, that the launch computes, any of which may have no adapter (projections.py); 0: it is a
        layer's.
    """

    tile: TileConfig
    block_r: int
    forward: bool
    fused: bool
    dropout: bool
    tma: bool
    tma_down: bool
    even_k: bool
    tf32: bool
    wgmma: bool
    packed: PackedFormat | None = None
    segments: bool = False
    block_g: int = 0
    transposed: bool = False
    scaled: bool = False
    projections: int = 0

    @property
    def shrink_columns(self) -> int:
        """Columns of the queue that hold no tile of the product."""
        return 0 if self.fused else 1

    @property
    def may_lack_adapter(self) -> bool:
        """Whether a tile may have no low-rank branch: a rank of 0."""
        return self.segments or self.projections > 0

    @property
    def decoded(self) -> bool:
        """Whether the weight is scratch that tiles of the same launch decode (structs.DecodedWeight)."""
        return self.packed is not None and not self.packed.in_loop

    @property
    def in_loop(self) -> bool:
        """Whether products decode the blocks of a packed weight (packed_weight.PackedWeight)."""
        return self.packed is not None and self.packed.in_loop

    @property
    def contracts_weight_rows(self) -> bool:
        """Whether the base weight lies in memory as [K, N] by the product's names."""
        return self.forward == self.transposed

    @property
    def precision(self) -> str:
        """tl.dot's name for it."""
        return "tf32" if self.tf32 else "ieee"

    def as_plain(self) -> tuple:
        """The fields in their order, the tile's and the packed format's as tuples within."""
        return dataclasses.astuple(self)


_FIELDS = tuple(field.name for field in dataclasses.fields(Variant))


@triton.constexpr_function
def variant_of(plain):
    """The Variant that was made plain."""
    fields = dict(zip(_FIELDS, plain, strict=True))
    if fields["packed"] is not None:
        fields["packed"] = PackedFormat(*fields["packed"])
    return Variant(**(fields | {"tile": TileConfig(*fields["tile"])}))
