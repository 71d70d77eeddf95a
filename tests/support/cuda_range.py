"""The ends of the range on the emulated CUDA kernels: fp16 overflows where the composed layer does and nowhere else,
whatever the scaling; infinities and NaNs stay in the results that they belong to."""

from dataclasses import replace

import torch
from torch.nn.functional import linear

from fastlora.backends.cuda import launch as cuda
from fastlora.philox import inverse_keep, keep_mask
from fastlora.problem import split_scaling
from tests.support import float16_range, numerics
from tests.support.cuda_emulation import emulated, ptx_of, run_layer

LARGE, FUSED = cuda.CudaTile(128, 256, 2), cuda.CudaTile(128, 256, 2, fused=True)
SPLIT, SPLIT_FUSED = cuda.CudaTile(64, 128, 1, 2), cuda.CudaTile(128, 128, 1, 2, fused=True)
TILES = (LARGE, FUSED, SPLIT, SPLIT_FUSED)
M, N, K = 136, 144, 136
# (tile, rank, scaling, dropout): every tile by a scaling above 1; every kind of scaling by some tile.
OVERFLOWING = (
    *((tile, 8, 32.0, dropout_p) for tile in TILES for dropout_p in (0.0, 0.5)),
    (LARGE, 72, -48.0, 0.0),
    (LARGE, 136, 3.0, 0.5),
    *zip(TILES, (24, 40, 8, 16), (3.0, -48.0, 2.0**12, 2.0**60), (0.0,) * 4, strict=True),
    *zip(TILES, (8, 24, 16, 40), (0.5, -0.75, 0.0, 2.0**-12), (0.5, 0.0, 0.0, 0.0), strict=True),
)
# (tile, rank, dtype, dropout)
INFINITE = (
    (FUSED, 8, torch.bfloat16, 0.0),  # ranks 8 to 15 of the kernel are padding
    (FUSED, 24, torch.float16, 0.5),
    (SPLIT_FUSED, 48, torch.bfloat16, 0.5),
    (LARGE, 8, torch.float16, 0.0),
    (LARGE, 136, torch.bfloat16, 0.5),
    (SPLIT, 8, torch.bfloat16, 0.0),
)


def expected(case: numerics.Case) -> dict[str, torch.Tensor]:
    """S and the results, in fp64 but for what a layer rounds: S, dS and each result. S is infinite where X·Aᵀ itself,
    without the scaling, is infinite in the case's dtype."""
    c, dtype = case.to(torch.float64), case.x.dtype
    in_s, on_branch = split_scaling(c.scaling, dtype)
    keep, scale = torch.ones_like(c.x, dtype=torch.bool), inverse_keep(c.dropout_p)
    if c.dropout_p > 0.0:
        keep = keep_mask(c.seed, c.dropout_p, *c.x.shape)
    x = torch.where(keep, c.x, 0.0)
    s = scale * x @ c.lora_a.T
    s = (torch.where(s.to(dtype).isinf(), s * torch.inf, s) * in_s).to(dtype).double()
    ds = (c.scaling * c.dy @ c.lora_b).to(dtype).double()
    results = {
        "s": s,
        "y": linear(c.x, c.weight, c.bias) + on_branch * (s @ c.lora_b.T),
        "dx": c.dy @ c.weight + torch.where(keep, scale * ds @ c.lora_a, 0.0),
        "da": scale * ds.T @ x,
        "db": on_branch * (c.dy.T @ s),
        "dbias": c.dy.sum(0),
    }
    return {name: value.to(dtype) for name, value in results.items()}


def assert_same(results: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Raises AssertionError unless all numbers agree, the infinite ones too, and NaN stands where NaN is wanted."""
    for name, result in results.items():
        same = (result == wanted[name]) | (result.isnan() & wanted[name].isnan())
        at = None if same.all() else tuple((~same).nonzero()[0].tolist())
        assert at is None, f"{name}: {int((~same).sum())} wrong, at {at} {result[at]} in place of {wanted[name][at]}"


def run(case: numerics.Case, tile: cuda.CudaTile, ptx=ptx_of) -> dict[str, torch.Tensor]:
    with emulated(ptx=ptx):
        results, s = run_layer(case, tile, ctas=2)
    return {"s": s, **results}


def draw_large(rank: int, scaling: float, dropout_p: float, dtype: torch.dtype = torch.float16) -> numerics.Case:
    """X·Aᵀ and dY·B run from small integers to beyond fp16's range, in some of a row's ranks and not in others. S is
    exact but for its one rounding. Even rows of X are large and odd rows of dY, each in one column."""
    generator = torch.Generator().manual_seed(rank)

    def pick(choices: tuple[float, ...], n: int) -> torch.Tensor:
        return torch.tensor(choices, dtype=torch.float64)[torch.randint(len(choices), (n,), generator=generator)]

    case = numerics.draw_integer_case(M, N, K, rank, torch.bfloat16).to(torch.float64)
    case.x[::2, 0] = pick((0, 540, -2160, 16384, 32752, -32760, 48000, 65504), M // 2)
    case.lora_a[:, 0] = pick((1, 0, -2, 0), rank)
    # One sum of S is 65520, which rounds to infinity and nothing below it does.
    case.x[1] = 0
    case.x[1, :2], case.lora_a[0, :2] = torch.tensor((65504, 16)), 1
    case.lora_b.mul_(2.0**-8)[0] = pick((1, 0, -2, 0), rank)
    case.dy[:, 0] = 0
    case.dy[1::2, 0] = pick((0, 1024, -3072, 16384, 31744, -32768, 57344, 64512), M // 2)
    if abs(scaling) > 2**24:  # next to such a branch fp32 holds nothing else, so its terms must not cancel
        for tensor in (case.x, case.lora_a, case.lora_b, case.dy):
            tensor.abs_()
    seed = torch.tensor(0x0123_4567_89AB_CDEF) if dropout_p else None
    return replace(case.to(dtype), scaling=scaling, dropout_p=dropout_p, seed=seed)


def check_overflow(tile, rank: int, scaling: float, dropout_p: float, ptx=ptx_of) -> None:
    """A scaling within S would make it infinite at 65504 / scaling already."""
    case = draw_large(rank, scaling, dropout_p)
    results = run(case, tile, ptx)
    float16_range.check(results, case)
    assert_same({"s": results["s"]}, expected(case))
    s = case.x.double() @ case.lora_a.double().T
    if abs(scaling) > 1 and not dropout_p:
        assert ((s.abs() < float16_range.OVERFLOW) & ((s * scaling).abs() >= float16_range.OVERFLOW)).any()
    if scaling:
        assert results["s"].isinf().any() and results["s"].isfinite().any()


def draw_with_infinities(rank: int, dtype: torch.dtype, dropout_p: float = 0.0) -> numerics.Case:
    """A row of X and one of dY hold an infinity each that reaches all of Y's row and of dX's with one sign, others a
    NaN; no rank and no column is zero there, so that a NaN elsewhere is none of the inputs'."""
    case = numerics.draw_integer_case(M, N, K, rank, dtype)
    case.lora_a.fill_(1)
    case.lora_b.fill_(1)
    case.weight[:, 5] = 1
    case.weight[3] = 1
    case.x[7, 5] = case.dy[9, 3] = torch.inf
    case.x[70, 5] = case.dy[100, 8] = torch.nan
    case.x[130, 5] = case.dy[40, 3] = -torch.inf
    case.dy[41, 6] = case.dy[129, 6] = torch.inf
    seed = torch.tensor(0x0123_4567_89AB_CDEF) if dropout_p else None
    return replace(case, dropout_p=dropout_p, seed=seed)


def check_infinities(tile, rank: int, dtype: torch.dtype, dropout_p: float, ptx=ptx_of) -> None:
    case = draw_with_infinities(rank, dtype, dropout_p)
    results = run(case, tile, ptx)
    assert_same(results, expected(case))
    if not dropout_p:
        assert results["y"][7].isposinf().all() and results["y"][130].isneginf().all()
        assert results["dx"][9].isposinf().all() and results["dx"][40].isneginf().all()
    assert results["dbias"][6].isposinf() and results["dbias"][8].isnan() and results["dbias"][3].isnan()
    assert results["dbias"].isfinite().sum() == N - 3
