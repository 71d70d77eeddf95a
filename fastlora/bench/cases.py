"""Which layers are measured: one case is one layer at one number of tokens. Presets are lists of cases, as data."""

from dataclasses import dataclass

import torch

from fastlora.bench.names import PRESETS

TOKENS = (1, 16, 128, 512, 2048, 8192, 16384)
RANKS = (1, 4, 8, 16, 32, 64, 128, 256)
DROPOUTS = (0.0, 0.1)

# (out_features N, in_features K) of the seven projections; q and o, k and v, gate and up share a shape.
SMOLLM2_135M = ((576, 576), (192, 576), (1536, 576), (576, 1536))
LLAMA_8B = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
LLAMA_70B = ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672))
SQUARES = ((1024, 1024), (5120, 5120))

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class LayerCase:
    """One layer: m tokens, n out_features, k in_features, rank r, dropout in front of the branch, dtype by name."""

    m: int
    n: int
    k: int
    r: int
    dropout: float = 0.0
    dtype: str = "bfloat16"

    def __post_init__(self):
        if min(self.m, self.n, self.k, self.r) < 1:
            raise ValueError(f"sizes must be at least 1, got M {self.m}, N {self.n}, K {self.k}, R {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout:g}")
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; choose one of {', '.join(DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        dropout = f" p={self.dropout:g}" if self.dropout else ""
        return f"M={self.m} N={self.n} K={self.k} R={self.r}{dropout} {self.dtype}"


@dataclass(frozen=True)
class PackedCase(LayerCase):
    """A layer over a base weight that is packed in the format ``base``, one of finetune.settings.BASE_QUANTS."""

    base: str = "nf4"

    @property
    def label(self) -> str:
        return f"{super().label} over {self.base}"


def _grid(tokens, layers, ranks, dropouts, dtypes) -> list[LayerCase]:
    return [
        LayerCase(m, n, k, r, p, dtype)
        for dtype in dtypes
        for (n, k) in layers
        for m in tokens
        for p in dropouts
        for r in ranks
    ]


# The reference backend's own targets are set at the first of these (fp32, CPU); the rest is the demo model's.
CPU_HEADLINE = (LayerCase(2048, 1024, 1024, 16, 0.0, "float32"),)
GPU_HEADLINE = tuple(LayerCase(8192, 4096, 4096, r) for r in (16, 64))


def preset_cases(preset: str, device: str) -> list[LayerCase]:
    """The cases of a preset. ``quick`` and ``qlora`` depend on the device: minutes on a GPU and on two CPU cores alike.

    Raises:
        ValueError: no such preset.
    """
    if preset == "quick":
        if device == "cpu":
            return [*CPU_HEADLINE, *_grid((512,), SMOLLM2_135M, (8,), (0.0,), ("float32",))]
        small = _grid((16, 512, 2048), ((4096, 4096),), (16,), (0.0,), ("bfloat16",))
        return [*GPU_HEADLINE, LayerCase(8192, 4096, 4096, 16, 0.1), *small]
    if preset == "qlora":
        if device == "cpu":
            return [LayerCase(m, 1024, 1024, 16, p, "float32") for m in (16, 256, 2048) for p in DROPOUTS]
        return _grid((16, 128, 512, 2048, 8192), LLAMA_8B, (16, 64), DROPOUTS, ("bfloat16",))
    if preset == "lorafusion":  # their kernel grid: R 16, dropout 0.1, M = 256 × {8 … 32}, square layers
        squares = tuple((size, size) for size in (4096, 5120, 8192))
        return _grid(tuple(256 * i for i in range(8, 33)), squares, (16,), (0.1,), ("bfloat16",))
    if preset == "llama8b":
        return _grid(TOKENS, LLAMA_8B, RANKS, DROPOUTS, ("bfloat16",))
    if preset == "llama70b":
        return _grid(TOKENS, LLAMA_70B, RANKS, DROPOUTS, ("bfloat16",))
    if preset == "full":
        layers = LLAMA_8B + LLAMA_70B + SQUARES
        return _grid(TOKENS, layers, RANKS, DROPOUTS, ("bfloat16", "float16"))
    raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
