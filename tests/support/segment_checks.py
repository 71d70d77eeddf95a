"""Layers on rows in segments run by the Triton kernels, in the interpreter or by their own PTX in the emulator, and
checked."""

import dataclasses
import importlib
import itertools
from typing import Any

import torch
from torch import Tensor

from fastlora.backends import workspace
from fastlora.backends.configs import TileConfig
from fastlora.backends.triton import segment_launch
from fastlora.problem import Needs
from fastlora.segments import GroupedBackward, GroupedForward, Segments, describe_segments
from tests.emulator import LaunchOptions
from tests.support import float16_range, segments
from tests.support.triton_checks import ARCHITECTURES, DROPPED_SCHEDULES, SCHEDULES, SMALL
from tests.support.triton_emulation import emulated_launches

ALL = Needs(True, True, True, True)
BAD_ENDS_SCHEDULES = SCHEDULES[3:]
# Lengths of the segments, and what else draw_case takes. All say which weight and adapter each segment has: one
# kernel serves them. Blocks of 16, 32 and 64 rows come out even and ragged; groups begin and end within segments and
# with them.
_RAGGED = {"n_weights": 3, "experts": [0, 1, 2, 0, 1, 2, 0, 1, 2], "n_adapters": 5}
LAYOUTS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "ragged": (
        [5, 64, 0, 1, 31, 33, 130, 2, 0],
        {**_RAGGED, "adapters": [0, 1, 2, -1, 1, 0, 1, 3, 2], "rows_after": 40},
    ),
    "experts": ([0, 40, 1, 0, 97, 33, 0], {"experts": [*range(7)], "adapters": [*range(7)]}),
    "all rows in one": (
        [0] * 5 + [130] + [0] * 4,
        {"n_weights": 1, "experts": [0] * 10, "n_adapters": 2, "adapters": [1] * 10},
    ),
    "of one row": (
        [1] * 11,
        {"n_weights": 2, "experts": [1, 0] * 5 + [1], "n_adapters": 2, "adapters": [0, 1, -1] * 3 + [1, 0]},
    ),
    "one segment": ([77], {"experts": [0], "adapters": [0]}),
    "no branch at all": ([40, 50], {"experts": [1, 0], "n_adapters": 1, "adapters": [-1, -1]}),
    "only rows past the last end": ([0, 0], {"experts": [0, 1], "adapters": [0, -1], "rows_after": 70}),
    # More than are looked at together, and more adapters and biases than one tile zeroes.
    "hundreds": (
        [0] * 100 + [3, 0, 17] + [0] * 150 + [2, 1, 0, 40] + [0] * 13,
        {
            "experts": [g % 40 for g in range(270)],
            "n_weights": 40,
            "n_adapters": 40,
            "adapters": [g * 7 % 40 for g in range(270)],
            "rows_after": 2,
        },
    ),
    "few": (
        [5, 0, 40, 3],
        {"experts": [1, 2, 0, 1], "n_weights": 3, "n_adapters": 3, "adapters": [0, 1, 0, -1], "rows_after": 3},
    ),
}


SUBSETS = (Needs(False, True, False, False), Needs(True, False, True, False), Needs(False, False, False, True))
FLOAT16_SCALINGS = (3000.3, 1.5, -0.3)
SIZES = (64, 112, 16)  # N, K, R: multiples of 16, whose loads are asynchronous; several columns, of unlike numbers
# By name: N, K, R; dtype; options of draw_case, which the layout's give way to; changes of the tile.
WAYS: dict[str, tuple[tuple[int, int, int], torch.dtype, dict[str, Any], dict[str, Any]]] = {
    "uneven": ((40, 72, 5), torch.bfloat16, {"integers": True, "bias": "one"}, {}),
    "separate": (
        SIZES,
        torch.bfloat16,
        {"integers": True},
        {"fused": False, "block_k": 64, "gradient_m": 64, "gradient_n": 16},
    ),
    "of one weight": (
        (40, 72, 1),
        torch.bfloat16,
        {"integers": True, "bias": "one", "n_weights": 1, "experts": None, "n_adapters": 9, "adapters": None},
        {},
    ),
    "dropout": (SIZES, torch.float16, {"dropout_p": 0.3, "transposed": True, "scaling": "each"}, {"group_m": 1}),
}


# What `make test` launches: ways, subsets and scalings on which architecture. What sm_90 has of its own is in the
# products of the fused shrink and under dropout.
TESTED_WAYS = [(way, arch) for way in WAYS for arch in ARCHITECTURES if arch == 80 or way == "dropout"]
TESTED_SUBSETS = list(zip(SUBSETS, itertools.cycle(ARCHITECTURES)))
TESTED_SCALINGS = [(scaling, 80) for scaling in FLOAT16_SCALINGS]


def schedules_of(layout: str) -> tuple[LaunchOptions, ...]:
    """Those under which `make test` runs a layout."""
    return {"ragged": SCHEDULES, "hundreds": SCHEDULES[3:4]}.get(layout, SCHEDULES[1::2])


def draw(layout: str, n: int, k: int, r: int, dtype: torch.dtype, **options: Any) -> segments.Case:
    """A case of one of the layouts; ``options`` of draw_case."""
    lengths, given = LAYOUTS[layout]
    return segments.draw_case(lengths, n, k, r, dtype, **given | options)


def launch(
    case: segments.Case, config: TileConfig | None, needs: Needs | None = ALL, kernels: Any = segment_launch
) -> dict[str, Tensor]:
    """Y and the gradients that ``needs`` names; None: there is no backward."""
    c, seed = case, None
    if case.dropout_p:
        torch.manual_seed(case.seed)
        seed = torch.randint(0, 2**63 - 1, ())
    number, scalings = (1.0, c.scaling) if isinstance(c.scaling, Tensor) else (c.scaling, None)
    where, drop = Segments(c.ends, c.experts, c.adapters), (c.transposed, c.dropout_p, seed)
    forward = GroupedForward(c.x, c.weight, c.lora_a, c.lora_b, c.bias, number, scalings, where, *drop)
    operands, spec = describe_segments(forward)
    y, s = kernels.prepare(spec, config)(operands)
    if needs is None:
        return {"y": y}
    needs = needs._replace(dbias=needs.dbias and c.bias is not None)
    bias_dims = 0 if c.bias is None else c.bias.dim()
    given = (c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, bias_dims, number, scalings, where, *drop)
    operands, spec = describe_segments(GroupedBackward(*given), needs)
    gradients = kernels.prepare(spec, config)(operands)
    assert {name for name, need in needs._asdict().items() if need} == {
        name for name, gradient in gradients._asdict().items() if gradient is not None
    }
    return {"y": y, **{name: g for name, g in gradients._asdict().items() if g is not None}}


def run(
    case: segments.Case,
    config: TileConfig,
    arch: int,
    options: LaunchOptions,
    needs: Needs | None = ALL,
    kernels: Any = segment_launch,
    edit_ptx=None,
    on_kernel=None,
) -> tuple[dict[str, Tensor], list]:
    """The same in the emulator, on a device with few multiprocessors; and the counters of the launches."""
    if kernels is not segment_launch:  # a mutant's package
        kernels = importlib.import_module(f"{kernels.__package__}.segment_launch")
    with emulated_launches(kernels, arch, options, edit_ptx, on_kernel) as stats:
        results = launch(case, config, needs, kernels)
    assert len(stats) == (1 if needs is None else 2), "one launch each way"
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return results, stats


def check_layout(layout: str, arch: int, schedules=SCHEDULES, **altered):
    """Integers, whose results have one bit pattern, with everything that a segment may have of its own."""
    case = draw(layout, *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    for options in schedules:
        segments.assert_exact(run(case, SMALL[arch], arch, options, **altered)[0], case)


def check_way(way: str, arch: int, schedules=DROPPED_SCHEDULES, **altered):
    """Other kernels than check_layout's, on ragged segments."""
    (n, k, r), dtype, options, changes = WAYS[way]
    case = draw("ragged", n, k, r, dtype, **options)
    config = dataclasses.replace(SMALL[arch], **changes)
    for schedule in schedules:
        results, _ = run(case, config, arch, schedule, **altered)
        (segments.assert_exact if options.get("integers") else segments.assert_accurate)(results, case)


def check_needs(needs: Needs, arch: int, **altered):
    """Each subset of the gradients is a kernel of its own."""
    case = draw("ragged", *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    results, _ = run(case, SMALL[arch], arch, SCHEDULES[3], needs, **altered)
    assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
    segments.assert_exact(results, case)


def check_float16_range(scaling: float, arch: int, **altered):
    """Overflow of a scaling on the device where the composed layer of one adapter overflows, and nowhere else."""
    for regime in float16_range.REGIMES:
        alone = float16_range.draw(regime, scaling, 130, 48, 96, 5)
        case = segments.Case(
            alone.x, alone.weight[None], alone.lora_a[None], alone.lora_b[None], alone.bias, alone.dy,
            torch.tensor([scaling]), torch.tensor([40, 130], dtype=torch.int32), *torch.zeros(2, 2, dtype=torch.int32),
        )  # fmt: skip
        results, _ = run(case, SMALL[arch], arch, SCHEDULES[2], **altered)
        results |= {name: results[name][0] for name in ("da", "db")}
        float16_range.check(results, alone)


def check_missing(arch: int, schedules=DROPPED_SCHEDULES, **altered):
    """Rows whose weight or adapter does not exist are NaN, all others right."""
    case = draw("ragged", *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    experts, adapters = torch.tensor([0, 3, 2, 0, 1, 2, -1, 1, 2]), case.adapters.clone()
    adapters[4] = 5
    right = segments.by_loop(case.to(torch.float64))
    missing = torch.zeros(len(case.x), dtype=torch.bool)
    for g in (1, 4, 6):
        missing[case.ends[g - 1] : case.ends[g]] = True
    for options in schedules:
        broken = segments.changed(case, experts=experts, adapters=adapters)
        results, _ = run(broken, SMALL[arch], arch, options, **altered)
        for name in ("y", "dx"):
            assert results[name][missing].isnan().all(), f"{name} is a number"
            assert torch.equal(results[name][~missing].double(), right[name][~missing]), name


def check_bad_ends(arch: int, schedules=BAD_ENDS_SCHEDULES, **altered):
    """Ends that decrease, lie below 0 or past M, which nobody may know of a GPU's: nothing outside is touched,
    everything ends, and rows of segments in front are right."""
    case = draw("ragged", *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    ends = torch.tensor([5, -3, 10**9, 7, 0, 2**31 - 1, -(2**31), 6, 400], dtype=torch.int32)
    for options in schedules:
        results, _ = run(segments.changed(case, ends=ends), SMALL[arch], arch, options, **altered)
        right = segments.by_loop(case.to(torch.float64))
        assert all(torch.equal(results[name][:5].double(), right[name][:5]) for name in ("y", "dx"))
        assert all(not value.isnan().any() for value in results.values())
