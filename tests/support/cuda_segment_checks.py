"""Layers on rows in segments run by the compiled CUDA kernels' own PTX in the emulator, and checked: the layouts of the
Triton kernels' checks (segment_checks.py), in tiles and groups of these."""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import torch

from fastlora.backends.cuda import segment_launch
from fastlora.backends.cuda.tiles import CudaTile, kernels
from fastlora.problem import Needs
from tests.emulator import LaunchOptions
from tests.support import segment_checks, segments
from tests.support.cuda_checks import is_clean
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of
from tests.support.segment_checks import LAYOUTS, draw

SHORT, TALL = CudaTile(64, 128, 1), CudaTile(128, 128, 2)
SIZES = (136, 200, 16)  # N, K, R: of several columns and steps, with tails
TESTED_TALL = ("ragged", "of one row", "few")  # layouts; the others by tall tiles are the sweep's
NEEDS = Needs(True, True, True, False)
SUBSETS = (Needs(False, True, False, False), Needs(True, False, False, False), Needs(False, False, True, False))
# By name: layout, tile, sizes, dtype, and options of draw_case that the layout's give way to.
WAYS: dict[str, tuple[str, CudaTile, tuple[int, int, int], torch.dtype, dict[str, Any]]] = {
    "rank below the kernel's": ("ragged", TALL, (136, 200, 8), torch.bfloat16, {"bias": "one", "scaling": "number"}),
    "rank 40": ("ragged", SHORT, (136, 200, 40), torch.bfloat16, {"bias": None}),
    "rank 64": ("few", TALL, (264, 72, 64), torch.bfloat16, {}),
    "transposed": ("ragged", SHORT, (136, 200, 24), torch.bfloat16, {"transposed": True}),
    "transposed, tall": ("experts", TALL, (200, 136, 64), torch.bfloat16, {"transposed": True}),
    "float16": ("ragged", SHORT, SIZES, torch.float16, {"scaling": "number"}),
    "float16, rank 64": ("ragged", TALL, (136, 200, 64), torch.float16, {"scaling": "number", "transposed": True}),
    "of one weight": (
        "ragged", SHORT, SIZES, torch.bfloat16,
        {"bias": "one", "n_weights": 1, "experts": None, "n_adapters": 9, "adapters": None},
    ),
    # Groups as long as those that are shipped, several in a segment, behind and in front of others.
    "groups of eight, short": ("long", dataclasses.replace(SHORT, group_m=8), (72, 136, 16), torch.bfloat16, {}),
    "groups of eight, tall": ("longer", dataclasses.replace(TALL, group_m=8), (136, 72, 40), torch.bfloat16, {}),
    "as many segments as there may be": ("most", SHORT, (136, 72, 16), torch.bfloat16, {"bias": "one"}),
}  # fmt: skip
_LONG = {"n_weights": 2, "experts": [0, 1, 1], "n_adapters": 2, "adapters": [0, 1, 0]}
_MOST = {"n_weights": 1, "experts": [0] * 1023, "n_adapters": 2, "adapters": [0, 1, -1] * 341, "rows_after": 5}
MORE_LAYOUTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "long": ([70, 64 * 9 + 5, 64], _LONG),
    "longer": ([130, 128 * 9 + 5, 1], _LONG),
    "most": ([0] * 511 + [3] + [0] * 509 + [70, 1], _MOST),
}


def kernels_of(tile: CudaTile, rank: int, dtype=torch.bfloat16, transposed: bool = False) -> set[str]:
    """Names of the forward and the backward kernel."""
    wanted = {"dropout": False, "segments": True, "transposed": transposed}
    found = {
        each["name"]
        for backward in (False, True)
        for each in kernels(rank, backward=backward, dtype=str(dtype).removeprefix("torch."), **wanted)
        if (each["block_m"], each["block_n"]) == (tile.block_m, tile.block_n)
    }
    assert len(found) == 2
    return found


def run(
    case: segments.Case,
    tile: CudaTile,
    options: LaunchOptions | None = None,
    ptx=ptx_of,
    needs: Needs | None = NEEDS,
    ctas: int = 4,
) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """Y and the gradients that ``needs`` names, and the counters of the launches."""
    launcher = SimpleNamespace(prepare=functools.partial(segment_launch.prepare, ctas=ctas))
    with emulated(options, ptx) as launched:
        results = segment_checks.launch(case, tile, needs, launcher)
    assert len(launched.stats) == (1 if needs is None else 2), "one launch each way"
    assert is_clean(), "the workspace was left dirty"
    return results, launched.stats


def check_layout(layout: str, tile: CudaTile, options: LaunchOptions | None = None, ptx=ptx_of):
    """Integers, whose results have one bit pattern, with everything that a segment may have of its own."""
    case = draw(layout, *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    segments.assert_exact(run(case, tile, options, ptx)[0], case)


def draw_way(way: str) -> segments.Case:
    layout, _, sizes, dtype, given = WAYS[way]
    lengths, of_layout = {**LAYOUTS, **MORE_LAYOUTS}[layout]
    shared = {"integers": True, "bias": "each", "scaling": "each"}
    return segments.draw_case(lengths, *sizes, dtype, **{**shared, **of_layout, **given})


def kernels_of_way(way: str) -> set[str]:
    _, tile, (_, _, rank), dtype, given = WAYS[way]
    return kernels_of(tile, rank, dtype, given.get("transposed", False))


def check_way(way: str, options: LaunchOptions | None = None, ptx=ptx_of):
    case = draw_way(way)
    segments.assert_exact(run(case, WAYS[way][1], options, ptx)[0], case)


def check_schedules(tile: CudaTile, schedules=SCHEDULES, ptx=ptx_of):
    """The same bits under all of them, as accurate as the composed layer's."""
    case = draw("ragged", *SIZES, torch.bfloat16, bias="each", scaling="each")
    first, _ = run(case, tile, ptx=ptx)
    segments.assert_accurate(first, case)
    for options in schedules:
        results, _ = run(case, tile, options, ptx, ctas=6)
        assert all(torch.equal(results[name], first[name]) for name in first), "other bits"


def check_needs(needs: Needs, options: LaunchOptions | None = None, ptx=ptx_of):
    case = draw("ragged", *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    results, _ = run(case, SHORT, options, ptx, needs)
    assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
    segments.assert_exact(results, case)


def check_missing(tile: CudaTile, options: LaunchOptions | None = None, ptx=ptx_of):
    """Rows whose weight or adapter does not exist are NaN, all others right."""
    case = draw("ragged", *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    experts, adapters = torch.tensor([0, 3, 2, 0, 1, 2, -1, 1, 2]), case.adapters.clone()
    experts[3], adapters[4], adapters[7] = 2**32, 5, -2
    right = segments.by_loop(case.to(torch.float64))
    missing = torch.zeros(len(case.x), dtype=torch.bool)
    for g in (1, 3, 4, 6, 7):
        missing[case.ends[g - 1] : case.ends[g]] = True
    results, _ = run(segments.changed(case, experts=experts, adapters=adapters), tile, options, ptx)
    for name in ("y", "dx"):
        assert results[name][missing].isnan().all(), f"{name} is a number"
        assert torch.equal(results[name][~missing].double(), right[name][~missing]), name


def check_bad_ends(tile: CudaTile, options: LaunchOptions | None = None, ptx=ptx_of):
    """Ends that decrease, lie below 0 or past M: nothing outside is touched, rows of segments in front are right."""
    case = draw("ragged", *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    ends = torch.tensor([5, -3, 10**9, 7, 0, 2**31 - 1, -(2**31), 6, 400], dtype=torch.int32)
    results, _ = run(segments.changed(case, ends=ends), tile, options, ptx)
    right = segments.by_loop(case.to(torch.float64))
    assert all(torch.equal(results[name][:5].double(), right[name][:5]) for name in ("y", "dx"))
    assert all(not value.isnan().any() for value in results.values())


def rank_of_neighbours(transposed: bool) -> int:
    """Below the kernel's."""
    return 24 if transposed else 8


def check_neighbours(tile: CudaTile, transposed: bool, options: LaunchOptions | None = None, ptx=ptx_of):
    """NaN in rows, weight and adapter of some segments stays in what these have a part in, though tiles read past a
    segment's last row and a matrix's last row or column."""
    rank = rank_of_neighbours(transposed)
    case = draw("experts", 136, 200, rank, torch.bfloat16, integers=True, bias="each", transposed=transposed)
    right = segments.by_loop(case.to(torch.float64))
    rows = [slice(*case.ends[[g - 1, g]].tolist()) for g in (2, 5)]
    broken = dataclasses.replace(
        case, **{name: getattr(case, name).clone() for name in ("x", "weight", "lora_a", "lora_b", "dy")}
    )
    for tensor in (broken.weight, broken.lora_a, broken.lora_b):
        tensor[[0, 2, 5, 6]] = torch.nan  # segments 0 and 6 have no rows
    for tensor in (broken.x, broken.dy):
        for each in rows:
            tensor[each] = torch.nan
    results, _ = run(broken, tile, options, ptx)
    own = torch.ones(len(case.x), dtype=torch.bool)
    for each in rows:
        own[each] = False
    for name in ("y", "dx"):
        assert torch.equal(results[name][own].double(), right[name][own]), name
    for name in ("da", "db"):
        for t in (0, 1, 3, 4, 6):
            assert torch.equal(results[name][t].double(), right[name][t]), (name, t)
