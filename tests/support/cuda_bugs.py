"""Bugs planted in the PTX of the compiled CUDA kernels, each of which the emulator or a comparison finds."""

import re
from typing import NamedTuple

import torch

from fastlora.backends.cuda.tiles import CudaTile
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.cuda_checks import LARGE, ONE_GROUP, SMALL, is_clean
from tests.support.cuda_emulation import emulated, ptx_of, run_layer


def replace(pattern: str, replacement: str, count: int = 0):
    """An edit that must change something."""

    def edit(text: str) -> str:
        edited, n = re.subn(pattern, replacement, text, count=count)
        if n == 0:
            raise ValueError(f"nothing matches {pattern!r}: the seeded bug is not in the kernel")
        return edited

    return edit


def remove(pattern: str):
    return replace(rf"(?m)^\s*{pattern}[^;\n]*;", "")


RELAXED_ACQUIRE = replace(r"ld\.acquire\.gpu", "ld.relaxed.gpu")
RELAXED_RELEASE = replace(r"red\.release\.gpu", "red.relaxed.gpu")


class Broken(NamedTuple):
    """A layer's kernels of one tile, and which of the two an edit breaks."""

    tile: CudaTile
    direction: str
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.bfloat16


FORWARD, BACKWARD, DROPOUT = Broken(LARGE, "forward"), Broken(LARGE, "backward"), Broken(LARGE, "forward", 0.5)
DX_DROPOUT, SPLIT, SMALL_BACKWARD = Broken(LARGE, "backward", 0.5), Broken(SMALL, "forward"), Broken(SMALL, "backward")
FEW, FP16 = Broken(ONE_GROUP, "backward"), Broken(LARGE, "forward", dtype=torch.float16)
SEEDED_BUGS = {
    "S is read without acquiring its flag": (FORWARD, RELAXED_ACQUIRE),
    "S is not released": (FORWARD, RELAXED_RELEASE),
    "no proxy fence between S and the copies that read it": (FORWARD, remove(r"fence\.proxy\.async\.global")),
    "no proxy fence between a finished tile and its copy": (FORWARD, remove(r"fence\.proxy\.async\.shared::cta")),
    "one thread releases a flag before the others have written": (FORWARD, remove(r"bar\.sync")),
    "too few bytes expected": (
        FORWARD,
        replace(
            r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[(%r\d+)\], (%r\d+);",
            r"{ .reg .u32 less; sub.u32 less, \2, 128; mbarrier.arrive.expect_tx.shared::cta.b64 _, [\1], less; }",
        ),
    ),
    "a lane releases a tile that others still read": (FEW, remove(r"bar\.warp\.sync")),
    "a lane releases a stage that others still read": (DROPOUT, remove(r"bar\.warp\.sync")),
    "a stage is released while products read it": (FORWARD, replace(r"(wgmma\.wait_group\S*) 1", r"\1 2")),
    "sums are used before the products are done": (FORWARD, replace(r"(wgmma\.wait_group\S*) 0", r"\1 1")),
    "sums are scaled before the products are done": (FP16, replace(r"(wgmma\.wait_group\S*) 0", r"\1 1")),
    "sums are scaled but not divided by the branch's scale before": (
        FP16,
        replace(r"setp\.(eq|neu)\.f32 (%p\d+), (%f\d+), 0f3F800000;", r"setp.\1.f32 \2, \3, \3;"),
    ),
    "no fence before products": (FORWARD, remove(r"wgmma\.fence")),
    "a staging buffer is overwritten while it is copied out": (FORWARD, remove(r"cp\.async\.bulk\.wait_group\.read")),
    "a CTA exits before its copies have landed": (FORWARD, remove(r"cp\.async\.bulk\.wait_group 0")),
    "half of the weight goes to one CTA only": (FORWARD, replace(r"(multicast::cluster \[[^;]*), %rs\d+;", r"\1, 1;")),
    "a stage is released to the own CTA only": (
        FORWARD,
        replace(r"(mapa\.shared::cluster\.u32 [^;]*), %r\d+;", r"\1, 0;"),
    ),
    "CTAs do not wait for their cluster": (FORWARD, remove(r"barrier\.cluster\.\w+")),
    "tiles are skipped": (FORWARD, replace(r"(atom\.relaxed\.gpu\.global\.add\.s32 [^;]*), %?\w+;", r"\1, 2;")),
    "the last CTA to exit does not see what others did": (BACKWARD, replace(r"atom\.acq_rel", "atom.relaxed")),
    "dA waits for no rows of dS": (BACKWARD, RELAXED_ACQUIRE),
    "a gradient's partial sum is added before it is written": (SMALL_BACKWARD, RELAXED_ACQUIRE),
    "a gradient's partial sum is not released": (SMALL_BACKWARD, RELAXED_RELEASE),
    "gradients change sign": (BACKWARD, replace(r"p, 1, 1, 1, 1;", "p, -1, 1, 1, 1;")),
    "two elements of a pair are swapped": (
        FORWARD,
        replace(r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%f\d+), (%f\d+)", r"cvt.rn.bf16x2.f32 \1, \3, \2"),
    ),
    "another generator in the forward": (DROPOUT, replace(r"-845247145|3449720151", "845247147")),
    "another generator in the backward": (DX_DROPOUT, replace(r"-845247145|3449720151", "845247147")),
    "a split's partial sum is added before it is written": (SPLIT, RELAXED_ACQUIRE),
    "a split's partial sum is not released": (SPLIT, RELAXED_RELEASE),
}


def check_seeded(name: str):
    (tile, direction, dropout_p, dtype), edit = SEEDED_BUGS[name]
    case = numerics.draw_case(520 if tile is LARGE else 136, 328, 264, 16, dtype, dropout_p=dropout_p)

    def ptx(kernel: str) -> str:
        return edit(ptx_of(kernel)) if direction in kernel else ptx_of(kernel)

    with emulated(LaunchOptions(timeout_s=60), ptx):
        results, _ = run_layer(case, tile, ctas=4)
    numerics.assert_accurate(results, case)
    assert is_clean(), "the workspace was left dirty"
