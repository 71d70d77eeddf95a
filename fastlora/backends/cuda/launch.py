"""The CUDA backend for Hopper: a whole LoRA layer in one launch forward and one launch backward.

The only importer of the compiled extension."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor

from fastlora import philox
from fastlora.backends.configs import fuses_shrink
from fastlora.backends.workspace import borrow_workspace
from fastlora.problem import BackwardOperands, ForwardOperands, Gradients, Launcher, LaunchSpec, split_scaling

MAX_RANK = 256
SMALL_TILE_RANK = 64  # tiles smaller than 128 x 256 are compiled up to this rank
STEP = 64  # contracted elements a step


@dataclass(frozen=True)
class CudaTile:
    """How one launch is cut into tiles.

    block_m, block_n: the tile of Y or dX.
    group_m: row blocks that share a stretch of the queue, so that their rows stay in L2.
    splits: parts that the contraction of each tile is cut into.
    fused: whether S is made beside the first column's tiles, from what they read anyway, or by short tiles of its own
        (which ranks above 64 always take); see fastlora.backends.configs.fuses_shrink, which choose_tile asks.
    """

    block_m: int
    block_n: int
    group_m: int
    splits: int = 1
    fused: bool = False


# A wave of 132 tiles reads the fewest rows of both operands when it is about as high as wide. Few rows make two groups
# all the same: the gradient tiles of the first run beside products of the second (benchmarks/results/schedule.md).
WIDE_TILE = CudaTile(128, 256, group_m=16)
SHORT_WIDE_TILE = replace(WIDE_TILE, group_m=8)
SHORT_ROWS = 16 * 128
SMALL_TILES = (CudaTile(128, 128, group_m=8), CudaTile(64, 128, group_m=8))
SPLITS = (1, 2, 4, 8)

# What choose_tile reckons with, in clocks of one multiprocessor: figures of the H200's data sheet, not measurements.
_FMA_PER_CLOCK = 2048
_SM_BYTES_PER_CLOCK = 40
_DRAM_BYTES_PER_CLOCK = 2800  # of the whole chip
_TILE_CLOCKS = 3000  # filling the ring, storing the last tile
_COMBINE_BYTES_PER_CLOCK = 40


@lru_cache(maxsize=4096)
def choose_tile(m: int, n: int, k: int, r: int, n_sms: int) -> CudaTile:
    """The tile for C [m, n] contracted over k with rank r that a rough model of waves and memory finds fastest, and who
    makes S, as fuses_shrink says."""
    wide = SHORT_WIDE_TILE if m <= SHORT_ROWS else WIDE_TILE
    if r > SMALL_TILE_RANK:
        return wide
    candidates = [wide]
    for tile in SMALL_TILES:
        candidates += [CudaTile(tile.block_m, tile.block_n, tile.group_m, s) for s in SPLITS if s * STEP <= k]
    # Of equals (memory decides), the smallest: its rows past the end cost least.
    tile = min(candidates, key=lambda tile: (_estimated_clocks(tile, m, n, k, n_sms), tile.block_m * tile.block_n))
    n_tiles = -(-m // tile.block_m) * -(-n // tile.block_n) * tile.splits
    return replace(tile, fused=fuses_shrink(r, tile.block_n, n_tiles, n_sms))


def _estimated_clocks(tile: CudaTile, m: int, n: int, k: int, n_sms: int) -> float:
    rows, columns = -(-m // tile.block_m), -(-n // tile.block_n)
    if tile.block_n == WIDE_TILE.block_n:
        rows += rows % 2  # two row blocks go to a cluster, whether there are two or not
    waves = -(-rows * columns * tile.splits // n_sms)
    steps = -(-k // (STEP * tile.splits))
    # Rows past the end are multiplied but not read.
    step_bytes = (min(m, tile.block_m) + tile.block_n) * STEP * 2
    step = max(tile.block_m * tile.block_n * STEP / _FMA_PER_CLOCK, step_bytes / _SM_BYTES_PER_CLOCK)
    combine = (tile.splits - 1) * min(m, tile.block_m) * tile.block_n * 4 / _COMBINE_BYTES_PER_CLOCK
    traffic = 2 * (m * k + k * n + m * n) / _DRAM_BYTES_PER_CLOCK
    return max(waves * steps * step, traffic) + _TILE_CLOCKS + combine


@lru_cache(maxsize=1)
def _extension() -> tuple[ModuleType | None, str | None]:
    try:
        from fastlora import _C
    except ImportError as error:
        return None, f"the extension fastlora._C is not built ({error}); install fastlora where nvcc is found"
    return _C, None


@lru_cache(maxsize=64)
def unusable(device: torch.device | None = None) -> str | None:
    """Why these kernels cannot run on a device (None: the current one), or None."""
    module, reason = _extension()
    if module is None:
        return reason
    if not torch.cuda.is_available():
        return "no CUDA device"
    if module.device_count() == 0:
        return "the driver is older than the CUDA runtime that the extension was built with"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"compiled for compute capability 9.0 (Hopper), this device has {capability[0]}.{capability[1]}"
    return None


def why_not_compiled(spec: LaunchSpec) -> str | None:
    """Why these kernels do not compute such a call on any device, or None."""
    m, n, k, r = spec.sizes
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {spec.dtype} is not float16 or bfloat16"
    if r > MAX_RANK:
        return f"rank {r} is above {MAX_RANK}"
    if n % 8 or k % 8 or r % 8:
        return f"out_features {n}, in_features {k} and rank {r} must be multiples of 8"
    # Factors of another dtype are cast, and the cast is aligned.
    if not all(spec.aligned._replace(**{name: True for name in _cast_factors(spec)})):
        return "an operand does not start on 16 bytes, or its rows do not"
    if max(m, n, k) >= 2**31 - 1024:
        return f"a dimension of {max(m, n, k)} does not fit 32 bits"
    if spec.base_format != "dense" or spec.branch != "single":
        return f"no kernel for a {spec.base_format} base weight with a {spec.branch} branch"
    return None


def _cast_factors(spec: LaunchSpec) -> tuple[str, ...]:
    factors = zip(("lora_a", "lora_b"), spec.adapter_dtypes, strict=True)
    return tuple(name for name, dtype in factors if dtype != spec.dtype)


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why these kernels cannot serve a call here, or None."""
    if spec.device.type != "cuda":
        return f"the tensors are on {spec.device}"
    return unusable(spec.device) or why_not_compiled(spec)


@lru_cache(maxsize=4096)
def _plan(
    tile: CudaTile, ctas: int, sizes: tuple[int, int, int, int], backward: bool, half: bool, dropout: bool, **wanted
):
    module, reason = _extension()
    if module is None:
        raise RuntimeError(f"the CUDA backend cannot run: {reason}")
    m, n, k, r = sizes
    return module.Plan(
        backward=backward, half=half, dropout=dropout, block_m=tile.block_m, block_n=tile.block_n, m=m, n=n, k=k, r=r,
        group_m=tile.group_m, splits=tile.splits, fused=tile.fused, ctas=ctas, **wanted,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _address(operand):
    """A matrix as its address and row stride, a vector as its address; numbers are what they are.

    Raises:
        ValueError: the elements of a vector, or of a matrix's rows, do not lie one behind the other.
    """
    if not isinstance(operand, Tensor):
        return operand
    if operand.stride(-1) != 1 and operand.shape[-1] > 1:
        raise ValueError(f"an operand of shape {tuple(operand.shape)} has strides {operand.stride()}, the last not 1")
    if operand.dim() < 2:
        return operand.data_ptr()
    return operand.data_ptr(), operand.stride(0) if operand.shape[0] > 1 else operand.shape[1]


def _launch(plan, device: torch.device, operands: Mapping[str, Tensor | float]) -> None:
    stream = torch.cuda.current_stream(device)
    addresses = {name: _address(operand) for name, operand in operands.items()}
    plan.launch(device=stream.device_index, stream=stream.cuda_stream, **addresses)


def _run(plan, like: Tensor, operands: Mapping[str, Tensor | float | None]) -> None:
    """Launches with the scratch memory that the plan asks for."""
    scratch = {"workspace": borrow_workspace(plan.words, like.device)}
    for name, size in (("gradient_sums", plan.gradient_floats), ("tile_parts", plan.part_floats)):
        if size:
            scratch[name] = like.new_empty(size, dtype=torch.float32)
    _launch(plan, like.device, {n: t for n, t in {**operands, **scratch}.items() if t is not None})


def _dropout_operands(dropout_p: float, seed: Tensor | None) -> dict[str, Tensor | float]:
    if seed is None:
        return {}
    operands = {"drop_threshold": philox.threshold(dropout_p), "inverse_keep": philox.inverse_keep(dropout_p)}
    return operands | ({"seed": int(seed)} if seed.device.type == "cpu" else {"seed_address": seed.view(-1)})


def prepare(spec: LaunchSpec, tile: CudaTile | None = None, ctas: int | None = None) -> Launcher:
    """What serves every call of this description. ``tile`` overrides choose_tile, ``ctas`` the number of CTAs: one for
    each multiprocessor."""
    ctas = ctas or _multiprocessors(spec.device)
    m, n, k, r = spec.sizes
    columns, contracted = (n, k) if spec.direction == "forward" else (k, n)
    tile = tile or choose_tile(m, columns, contracted, r, ctas)
    needs = spec.needs
    wanted = {"makes_c": needs.dx, "grad_a": needs.da, "grad_b": needs.db, "grad_bias": needs.dbias}
    plan = _plan(
        tile, ctas, (m, columns, contracted, r), spec.direction == "backward", spec.dtype == torch.float16,
        spec.dropout, **(wanted if spec.direction == "backward" else {}),
    )  # fmt: skip
    return partial(_forward if spec.direction == "forward" else _backward, spec, plan)


def _forward(spec: LaunchSpec, plan, operands: ForwardOperands) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, R] in one launch; see backends.reference."""
    x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed = operands
    m, n, _, r = spec.sizes
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    scales = split_scaling(scaling, x.dtype)
    _run(
        plan,
        x,
        {
            "u": x, "v": weight, "a": lora_a.to(x.dtype), "b": lora_b.to(x.dtype), "bias": bias, "c": y,
            "s": s.view(-1), "scale_s": scales.in_s, "branch_scale": scales.on_branch,
            **_dropout_operands(dropout_p, seed),
        },
    )  # fmt: skip
    return y, s


def _backward(spec: LaunchSpec, plan, operands: BackwardOperands) -> Gradients:
    """The gradients that the description needs in one launch; see backends.reference."""
    dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed = operands
    m, n, k, r = spec.sizes
    needs = spec.needs

    def output(needed: bool, *shape: int, dtype: torch.dtype = dy.dtype) -> Tensor | None:
        return dy.new_empty(shape, dtype=dtype) if needed else None

    # Gradients leave in one type; a layer whose adapters differ in theirs has one of them cast.
    grad_dtype = dy.dtype if lora_a.dtype == lora_b.dtype == dy.dtype else torch.float32
    dx, ds = output(needs.dx, m, k), output(needs.dx or needs.da, m * r)
    da, db = output(needs.da, r, k, dtype=grad_dtype), output(needs.db, n, r, dtype=grad_dtype)
    dbias = output(needs.dbias, n)
    _run(
        plan,
        dy,
        {
            "u": dy, "v": weight, "a": lora_a.to(dy.dtype), "b": lora_b.to(dy.dtype), "c": dx, "s": ds, "x": x,
            "saved": s, "grad_a": None if da is None else da.view(-1), "grad_b": None if db is None else db.view(-1),
            "grad_bias": dbias, "scale_s": scaling, "branch_scale": split_scaling(scaling, dy.dtype).on_branch,
            "fp32_grads": grad_dtype == torch.float32,
            **_dropout_operands(dropout_p, seed),
        },
    )  # fmt: skip
    return Gradients(
        dx, None if da is None else da.to(lora_a.dtype), None if db is None else db.to(lora_b.dtype), dbias
    )
