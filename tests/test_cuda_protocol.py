"""The one-launch protocol of the CUDA kernels: the same bits under every schedule, a workspace that cleans itself, and
seeded bugs, each of which the emulator or a comparison finds."""

import re

import numerics
import pytest
import torch
from cuda_emulation import emulated, ptx_of, run_layer, unavailable
from emulator import EmulatorError, LaunchOptions

from fastlora.kernels import cuda, workspace

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"CUDA kernels: {unavailable()}")

WIDE, MEDIUM, SMALL = cuda.CudaTile(128, 256, 2), cuda.CudaTile(128, 128, 1, 2), cuda.CudaTile(64, 128, 1, 3)
SCHEDULES = (
    LaunchOptions(seed=1, resident=1, async_policy="early"),
    LaunchOptions(seed=2, resident=2, async_policy="random"),
    LaunchOptions(seed=3, async_policy="random", shuffle_ctas=True),
    LaunchOptions(seed=4, async_policy="late", shuffle_ctas=True, proxy_fence="writer"),
)


def is_clean() -> bool:
    return not any(buffer.any() for buffer in workspace._by_stream.values())


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("tile, sizes", ((WIDE, (520, 328, 264, 16)), (WIDE, (392, 328, 264, 72)), (MEDIUM, (264, 136, 264, 64)), (SMALL, (136, 136, 264, 16))))  # fmt: skip
def test_every_schedule_gives_the_same_bits(poisoned, tile, sizes, dropout_p):
    """Twice over one workspace each; with one CTA or cluster at a time, a tile that waited for a later one would deadlock."""
    case = numerics.draw_case(*sizes, torch.bfloat16, dropout_p=dropout_p)
    with emulated():
        first, _ = run_layer(case, tile, ctas=2)
    numerics.assert_accurate(first, case)
    for options in SCHEDULES:
        with emulated(options):
            for _ in range(2):
                results, _ = run_layer(case, tile, ctas=6)
                assert is_clean()
                for name, result in results.items():
                    assert torch.equal(result.view(torch.int16), first[name].view(torch.int16)), name


def replace(pattern: str, replacement: str, count: int = 0):
    """An edit that must change something."""

    def edit(text: str) -> str:
        edited, n = re.subn(pattern, replacement, text, count=count)
        assert n > 0, f"nothing matches {pattern!r}: the seeded bug is not in the kernel"
        return edited

    return edit


def remove(pattern: str):
    return replace(rf"(?m)^\s*{pattern}[^;\n]*;", "")


# What each edit of the PTX breaks. "forward" or "backward", 128 x 256 in clusters; "split" is the 64 x 128 forward.
SEEDED_BUGS = {
    "S is read without acquiring its flag": ("forward", replace(r"ld\.acquire\.gpu", "ld.relaxed.gpu")),
    "S is not released": ("forward", replace(r"red\.release\.gpu", "red.relaxed.gpu")),
    "no proxy fence between S and the copies that read it": ("forward", remove(r"fence\.proxy\.async\.global")),
    "no proxy fence between a finished tile and its copy": ("forward", remove(r"fence\.proxy\.async\.shared::cta")),
    "one thread publishes before the others have written": ("forward", remove(r"bar\.sync")),
    "too few bytes expected": (
        "forward",
        replace(r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[(%r\d+)\], (%r\d+);",
                r"{ .reg .u32 less; sub.u32 less, \2, 128; mbarrier.arrive.expect_tx.shared::cta.b64 _, [\1], less; }"),
    ),
    "a lane gives a slot back for others that still read it": ("backward", remove(r"bar\.warp\.sync")),
    "a stage is given back while products read it": ("forward", replace(r"wgmma\.wait_group\.sync\.aligned 1", "wgmma.wait_group.sync.aligned 2")),
    "sums are used before the products are done": ("forward", replace(r"wgmma\.wait_group\.sync\.aligned 0", "wgmma.wait_group.sync.aligned 1")),
    "no fence before products": ("forward", remove(r"wgmma\.fence")),
    "a slab is overwritten while it is copied out": ("forward", remove(r"cp\.async\.bulk\.wait_group\.read")),
    "a CTA leaves before its copies have landed": ("forward", remove(r"cp\.async\.bulk\.wait_group 0")),
    "half of V goes to one CTA only": ("forward", replace(r"(multicast::cluster \[[^;]*), %rs\d+;", r"\1, 1;")),
    "a stage is given back to the own CTA only": ("forward", remove(r"mapa\.shared::cluster")),
    "CTAs do not wait for their cluster": ("forward", remove(r"barrier\.cluster\.\w+")),
    "tiles are skipped": ("forward", replace(r"(atom\.relaxed\.gpu\.global\.add\.s32 %r\d+, \[%rd\d+\], )%?\w+;", r"\g<1>2;")),
    "the last to leave does not see what others did": ("backward", replace(r"atom\.acq_rel", "atom.relaxed")),
    "gradients change sign": ("backward", replace(r"p, 1, 1, 1, 1;", "p, -1, 1, 1, 1;")),
    "two elements of a pair are swapped": ("forward", replace(r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%f\d+), (%f\d+)", r"cvt.rn.bf16x2.f32 \1, \3, \2")),
    "another generator": ("dropout", replace("-845247145|3449720151", "845247147")),
    "a part of a split tile is added before it is written": ("split", replace(r"ld\.acquire\.gpu", "ld.relaxed.gpu")),
    "a part of a split tile is not released": ("split", replace(r"red\.release\.gpu", "red.relaxed.gpu")),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEDED_BUGS)
def test_seeded_bugs_are_found(poisoned, monkeypatch, name):
    where, edit = SEEDED_BUGS[name]
    tile = SMALL if where == "split" else WIDE
    case = numerics.draw_case(520 if tile is WIDE else 40, 328, 264, 16, torch.bfloat16,
                              dropout_p=0.5 if where == "dropout" else 0.0)  # fmt: skip
    edited = "backward" if where == "backward" else "forward"

    def ptx(kernel: str) -> str:
        return edit(ptx_of(kernel)) if edited in kernel else ptx_of(kernel)

    monkeypatch.setattr(workspace, "_by_stream", {})  # a workspace that the bug leaves dirty is no one else's
    with pytest.raises((EmulatorError, AssertionError)) as found, emulated(LaunchOptions(timeout_s=60), ptx):  # noqa: PT012
        results, _ = run_layer(case, tile, ctas=4)
        numerics.assert_accurate(results, case)
        assert is_clean(), "the workspace was left dirty"
    assert "nothing matches" not in str(found.value)
