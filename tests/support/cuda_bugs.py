"""Bugs planted in the PTX of the compiled CUDA kernels, each of which the emulator or a comparison finds."""

import re

import torch

from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.cuda_checks import ONE_GROUP, SMALL, WIDE, is_clean
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
# A layer's kernels of one tile, and which of the two an edit breaks.
FORWARD, BACKWARD, DROPOUT = (WIDE, "forward", 0.0), (WIDE, "backward", 0.0), (WIDE, "forward", 0.5)
DX_DROPOUT, SPLIT, SMALL_BACKWARD = (WIDE, "backward", 0.5), (SMALL, "forward", 0.0), (SMALL, "backward", 0.0)
FEW = (ONE_GROUP, "backward", 0.0)
SEEDED_BUGS = {
    "S is read without acquiring its flag": (FORWARD, RELAXED_ACQUIRE),
    "S is not released": (FORWARD, RELAXED_RELEASE),
    "no proxy fence between S and the copies that read it": (FORWARD, remove(r"fence\.proxy\.async\.global")),
    "no proxy fence between a finished tile and its copy": (FORWARD, remove(r"fence\.proxy\.async\.shared::cta")),
    "one thread publishes before the others have written": (FORWARD, remove(r"bar\.sync")),
    "too few bytes expected": (
        FORWARD,
        replace(
            r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[(%r\d+)\], (%r\d+);",
            r"{ .reg .u32 less; sub.u32 less, \2, 128; mbarrier.arrive.expect_tx.shared::cta.b64 _, [\1], less; }",
        ),
    ),
    "a lane gives a tile back for others that still read it": (FEW, remove(r"bar\.warp\.sync")),
    "a lane gives a stage back for others that still read it": (DROPOUT, remove(r"bar\.warp\.sync")),
    "a stage is given back while products read it": (FORWARD, replace(r"(wgmma\.wait_group\S*) 1", r"\1 2")),
    "sums are used before the products are done": (FORWARD, replace(r"(wgmma\.wait_group\S*) 0", r"\1 1")),
    "no fence before products": (FORWARD, remove(r"wgmma\.fence")),
    "a slab is overwritten while it is copied out": (FORWARD, remove(r"cp\.async\.bulk\.wait_group\.read")),
    "a CTA leaves before its copies have landed": (FORWARD, remove(r"cp\.async\.bulk\.wait_group 0")),
    "half of V goes to one CTA only": (FORWARD, replace(r"(multicast::cluster \[[^;]*), %rs\d+;", r"\1, 1;")),
    "a stage is given back to the own CTA only": (
        FORWARD,
        replace(r"(mapa\.shared::cluster\.u32 [^;]*), %r\d+;", r"\1, 0;"),
    ),
    "CTAs do not wait for their cluster": (FORWARD, remove(r"barrier\.cluster\.\w+")),
    "tiles are skipped": (FORWARD, replace(r"(atom\.relaxed\.gpu\.global\.add\.s32 [^;]*), %?\w+;", r"\1, 2;")),
    "the last to leave does not see what others did": (BACKWARD, replace(r"atom\.acq_rel", "atom.relaxed")),
    "dA waits for no rows of dS": (BACKWARD, RELAXED_ACQUIRE),
    "a gradient's part is added before it is written": (SMALL_BACKWARD, RELAXED_ACQUIRE),
    "a gradient's part is not released": (SMALL_BACKWARD, RELAXED_RELEASE),
    "gradients change sign": (BACKWARD, replace(r"p, 1, 1, 1, 1;", "p, -1, 1, 1, 1;")),
    "two elements of a pair are swapped": (
        FORWARD,
        replace(r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%f\d+), (%f\d+)", r"cvt.rn.bf16x2.f32 \1, \3, \2"),
    ),
    "another generator in the forward": (DROPOUT, replace(r"-845247145|3449720151", "845247147")),
    "another generator in the backward": (DX_DROPOUT, replace(r"-845247145|3449720151", "845247147")),
    "a part of a split tile is added before it is written": (SPLIT, RELAXED_ACQUIRE),
    "a part of a split tile is not released": (SPLIT, RELAXED_RELEASE),
}


def check_seeded(name: str):
    (tile, direction, dropout_p), edit = SEEDED_BUGS[name]
    case = numerics.draw_case(520 if tile is WIDE else 136, 328, 264, 16, torch.bfloat16, dropout_p=dropout_p)

    def ptx(kernel: str) -> str:
        return edit(ptx_of(kernel)) if direction in kernel else ptx_of(kernel)

    with emulated(LaunchOptions(timeout_s=60), ptx):
        results, _ = run_layer(case, tile, ctas=4)
    numerics.assert_accurate(results, case)
    assert is_clean(), "the workspace was left dirty"
