"""Bugs planted in the PTX of the compiled CUDA kernels, each of which the emulator or a comparison finds."""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastlora.backends.cuda.tiles import CudaTile
from tests.emulator import LaunchOptions
from tests.support import deletions, numerics
from tests.support.cuda_checks import FUSED, LARGE, MEDIUM, ONE_GROUP, SMALL, check_masks, is_clean, lying_transposed
from tests.support.cuda_emulation import emulated, ptx_of, run_layer, variants_for
from tests.support.cuda_quantised_checks import IN_LOOP, FormatCase, SelectedCase


def replace(pattern: str, replacement: str | Callable[[re.Match], str], count: int = 0):
    """An edit that must change something."""

    def edit(text: str) -> str:
        edited, n = re.subn(pattern, replacement, text, count=count)
        if n == 0:
            raise ValueError(f"nothing matches {pattern!r}: the seeded bug is not in the kernel")
        return edited

    return edit


def delete(what: str, asked_by: str):
    """Takes out every instruction of this kind (deletions.find) that a line of the sources with this text leads to."""

    def edit(text: str) -> str:
        found = [
            each
            for each in deletions.find(text)
            if each.what == what and any(asked_by in deletions.source_line(place) for place in each.source.split(" < "))
        ]
        if not found:
            raise ValueError(f"no {what} comes from {asked_by!r}: the seeded bug is not in the kernel")
        return deletions.without(text, found)

    return edit


def remove(pattern: str):
    return replace(rf"(?m)^\s*{pattern}[^;\n]*;", "")


RELAXED_ACQUIRE = replace(r"ld\.acquire\.gpu", "ld.relaxed.gpu")
RELAXED_RELEASE = replace(r"red\.release\.gpu", "red.relaxed.gpu")


class Broken(NamedTuple):
    """A layer's kernels of one tile, and which of the two an edit breaks. ``masks``: what shows the mask's single bits
    is run in the layer's place. ``packed``: the format of its base weight, if it is packed; ``in_loop``: its products
    decode it."""

    tile: CudaTile
    direction: str
    dropout_p: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    rank: int = 16
    masks: bool = False
    transposed: bool = False
    packed: str = ""
    in_loop: bool = False

    @property
    def kernel(self) -> str:
        """Its name."""
        drops = self.dropout_p > 0.0 or self.masks
        weight = {"decodes": bool(self.packed) and not self.in_loop, "in_loop": self.in_loop}
        kernels = variants_for(self.tile, drops, self.rank, self.dtype, transposed=self.transposed, **weight)
        return kernels[self.direction == "backward"]["name"]


FORWARD, BACKWARD, DROPOUT = Broken(LARGE, "forward"), Broken(LARGE, "backward"), Broken(LARGE, "forward", 0.5)
DX_DROPOUT, SPLIT, SMALL_BACKWARD = Broken(LARGE, "backward", 0.5), Broken(SMALL, "forward"), Broken(SMALL, "backward")
FEW, FP16 = Broken(ONE_GROUP, "backward"), Broken(LARGE, "forward", dtype=torch.float16)
FUSED_DROPOUT = Broken(FUSED, "forward", 0.5, rank=64)
FORWARD_OVER_TRANSPOSED, DX_OVER_TRANSPOSED = (
    Broken(LARGE, direction, transposed=True) for direction in ("forward", "backward")
)
PACKED, PACKED_BACKWARD = Broken(LARGE, "forward", packed="nf4"), Broken(MEDIUM, "backward", packed="nf4")
NESTED = Broken(MEDIUM, "forward", packed="nf4 nested")
LOOP, NESTED_LOOP = (Broken(IN_LOOP, "forward", packed=name, in_loop=True) for name in ("nf4", "nf4 nested"))
BYTE_LOOP = LOOP._replace(packed="int8")
FORWARD_MASK, BACKWARD_MASK = Broken(SMALL, "forward", masks=True), Broken(SMALL, "backward", masks=True)

# A tile is stored into the other CTA's memory: its bytes are announced, and the addresses there are derived from those
# of the own barrier and of the own slot.
_ANNOUNCED = r"(mbarrier\.arrive)\.expect_tx(\.shared::cluster\.b64 _, \[%r\d+\]), %r\d+;"
_DERIVED = r"mapa\.shared::cluster\.u32 (%r\d+), (%r\d+), %r\d+;"
_OWN_SLOT = replace(rf"({_DERIVED}[^;]*st\.async\S*) \[\2\]", r"\1 [\3]")
_OWN_BARRIER = replace(rf"({_DERIVED}(?:(?!mapa)[\s\S])*mapa[^;]*;[^;]*st\.async[^}}]*\}}), \[\2\]", r"\1, [\3]")
_OTHER_BARRIER = replace(
    r"(st\.async[^}]*\}), \[(%r\d+)\];", r"{ .reg .u32 other; xor.b32 other, \2, 8; \1, [other]; }"
)
# A CTA's first column and byte of the weight, of the two halves; and the second and third slice's first columns.
_HALF = r"and\.b32 (%r\d+), %r\d+, (?:128|16384);"
_SLICE = r"or\.b32 (%r\d+), (%r\d+), (64|128);(?=[^{}]*\{\1,)"
# An element's bits against the last of the dropped ones; the compiler writes it either way round.
_KEEPS = r"setp\.(gt|lt)\.u32 (%p\d+), (%r\d+), (%r\d+);"


def keep_what_equals(text: str) -> str:
    """Compares with or equal: a word of random bits that equals the threshold's is kept."""
    return replace(_KEEPS, lambda found: found.group().replace(".gt.", ".ge.").replace(".lt.", ".le."))(text)


def compare_with(difference: int):
    """Compares with a threshold that is so much higher."""

    def moved(found: re.Match) -> str:
        which, kept, left, right = found.groups()
        last, word = (right, left) if which == "gt" else (left, right)
        moved_last = f".reg .u32 last; add.u32 last, {last}, {difference << 16};"
        return f"{{ {moved_last} setp.gt.u32 {kept}, {word}, last; }}"

    return replace(_KEEPS, moved)


def overwrite_fragments(text: str, waits: bool = False) -> str:
    """The second half of a step's fragments takes the registers of the first, as in the machine code, but does not
    wait for the products that read them. With ``waits`` the kernel is still right."""
    until_wait = r"((?:(?!wgmma\.wait_group)[\s\S])*)wgmma\.wait_group\S*"
    halves = re.search(rf"wgmma\.wait_group\S* 1;{until_wait} 0;{until_wait} 0;", text)
    first, second = (
        re.findall(r"%r\d+", "".join(re.findall(r"\}, (\{[^}]*\}), %rd", half))) for half in halves.groups()
    )
    assert len(first) == len(second) > 0
    register = dict(zip(second, first, strict=True))
    wait = halves.end(1)
    if not waits:
        text = text[:wait] + re.sub(r"[^;]*;", "", text[wait:], count=1)
    return re.sub(r"%r\d+", lambda found: register.get(found.group(), found.group()), text)


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
    "too few bytes of a tile are announced to the other CTA": (FORWARD, replace(_ANNOUNCED, r"\1.expect_tx\2, 8;")),
    "too many bytes of a tile are announced to the other CTA": (FORWARD, replace(_ANNOUNCED, r"\1.expect_tx\2, 32;")),
    "no bytes of a tile are announced to the other CTA": (FORWARD, replace(_ANNOUNCED, r"\1\2;")),
    "a tile for the other CTA is stored to the own one": (FORWARD, _OWN_SLOT),
    "a tile for the other CTA signals the own one's barrier": (FORWARD, _OWN_BARRIER),
    "a tile for the other CTA signals the other slot's barrier": (FORWARD, _OTHER_BARRIER),
    "both CTAs copy the same half of the weight": (FORWARD, replace(_HALF, r"mov.b32 \1, 0;")),
    "both CTAs copy the same half of the weight, each to its own half's place": (
        FORWARD,
        replace(_HALF.replace("(?:128|16384)", "128"), r"mov.b32 \1, 0;"),
    ),
    "two slices of a finished tile are stored to each other's columns": (
        FORWARD,
        replace(_SLICE, lambda found: f"or.b32 {found[1]}, {found[2]}, {192 - int(found[3])};"),
    ),
    "a slice of a finished tile is stored to another's columns": (FORWARD, replace(_SLICE, r"or.b32 \1, \2, 128;")),
    "the second half of X's fragments overwrites the first while products read it": (
        FUSED_DROPOUT,
        overwrite_fragments,
    ),
    "a word of bits that equals the threshold's is kept in a forward": (FORWARD_MASK, keep_what_equals),
    "a word of bits that equals the threshold's is kept in a backward": (BACKWARD_MASK, keep_what_equals),
    "a forward's threshold is one too high": (FORWARD_MASK, compare_with(1)),
    "a forward's threshold is one too low": (FORWARD_MASK, compare_with(-1)),
    "a backward's threshold is one too high": (BACKWARD_MASK, compare_with(1)),
    "a backward's threshold is one too low": (BACKWARD_MASK, compare_with(-1)),
    "a forward's transposed weight is multiplied as if it were not": (
        FORWARD_OVER_TRANSPOSED,
        replace(r"(m64n256k16[^;]*), 0, 1;", r"\1, 0, 0;"),
    ),
    "a backward's transposed weight is multiplied as if it were not": (
        DX_OVER_TRANSPOSED,
        replace(r"(m64n256k16[^;]*), 0, 0;", r"\1, 0, 1;"),
    ),
    "both CTAs copy the same boxes of a transposed weight": (
        FORWARD_OVER_TRANSPOSED,
        replace(_HALF.replace("128|16384", "64|8192"), r"mov.b32 \1, 0;"),
    ),
    "a split's partial sum is added before it is written": (SPLIT, RELAXED_ACQUIRE),
    "a split's partial sum is not released": (SPLIT, RELAXED_RELEASE),
    "a tile does not wait for its panel of the weight": (PACKED, delete("wait for a flag", "wait_for(panel_flag(")),
    "dX does not wait for the weight": (PACKED_BACKWARD, delete("wait for a flag", "wait_for(panel_flag(")),
    "a panel is read without acquiring its flag": (PACKED, delete("acquire of ld", "wait_for(panel_flag(")),
    "a panel is not released": (PACKED_BACKWARD, delete("release of a flag", "release_flag(panel_flag(")),
    "one thread releases a panel before the others have decoded": (PACKED, delete("bar.sync", "release_flag(panel_")),
    "no proxy fence between a decoded part and its flag": (PACKED, delete("fence.proxy.async.global", "decode_tile(")),
    "no proxy fence between a panel's flag and the copies that read it": (
        PACKED,
        delete("fence.proxy.async.global", "wait_panel("),
    ),
    "a code is read before the table of numbers is written": (PACKED, delete("bar.sync", "decode_tile(")),
    "both codes of a byte are its lower half": (
        PACKED,
        replace(r"shr\.u32 (\s*%r\d+, %r\d+, 2;(?:\s*\.loc[^\n]*)*\s*and\.b32[^;]*, 60;)", r"shl.b32 \1"),
    ),
    "elements take the scale of the next block": (
        PACKED,
        replace(
            r"ld\.global\.nc\.f32 (%f\d+), \[(%rd\d+)\];",
            r"{ .reg .b64 next; xor.b64 next, \2, 4; ld.global.nc.f32 \1, [next]; }",
        ),
    ),
    "a nested scale's offset is left out": (NESTED, replace(r"add\.rn\.f32 (\s*%f\d+, %f\d+), %f\d+;", r"mov.f32 \1;")),
    "a nested scale is rounded once": (
        NESTED,
        replace(
            r"mul\.rn\.f32 \s*(%f\d+), (%f\d+, %f\d+);((?:(?!mul\.rn)[\s\S])*?)add\.rn\.f32 \s*(%f\d+), \1, (%f\d+);",
            r"\3fma.rn.f32 \4, \2, \5;",
        ),
    ),
    "in the loop, a stage's codes are read before they have arrived": (
        LOOP,
        delete("wait for an mbarrier", "c.wait_stage();"),
    ),
    "no proxy fence between decoded elements and their product": (
        LOOP,
        delete("fence.proxy.async.shared::cta", "conversion.convert("),
    ),
    "a product reads elements that others have not decoded": (LOOP, delete("bar.sync", "conversion.convert(")),
    "in the loop, the two codes of a byte are swapped": (LOOP, replace(r"(mov\.u32 %r\d+), 16465;", r"\1, 20800;")),
    "in the loop, both codes of a byte are its lower half": (
        LOOP,
        replace(r"(mov\.u32 %r\d+), 16465;", r"\1, 16448;"),
    ),
    "in the loop, codes from 8 on are taken for those below": (
        LOOP,
        replace(r"(and\.b32 [^;]*), 1145324612;", r"\1, 0;"),
    ),
    "in the loop, elements take the scale of the next block": (
        LOOP,
        replace(
            r"ld\.global\.nc\.u32 (%r\d+), \[(%rd\d+)\];",
            r"{ .reg .b64 next; xor.b64 next, \2, 4; ld.global.nc.u32 \1, [next]; }",
        ),
    ),
    "in the loop, elements take the nested scale of the next block": (
        NESTED_LOOP,
        replace(
            r"ld\.global\.nc\.u8 (%r\d+), \[(%rd\d+)\];",
            r"{ .reg .b64 next; xor.b64 next, \2, 1; ld.global.nc.u8 \1, [next]; }",
        ),
    ),
    "in the loop, a nested scale's offset is left out": (
        NESTED_LOOP,
        replace(r"add\.rn\.f32 (\s*%f\d+, %f\d+), %f\d+;", r"mov.f32 \1;"),
    ),
    "in the loop, rows of bytes are read as if they were not swizzled": (
        BYTE_LOOP,
        replace(r"(shr\.u32 %r\d+, %r\d+, 1;\s*)and\.b32 (%r\d+), %r\d+, 3;(\s*xor)", r"\1mov.b32 \2, 0;\3"),
    ),
}


def check_seeded(name: str):
    broken, edit = SEEDED_BUGS[name]
    tile, _, dropout_p, dtype, rank, masks, transposed, packed, in_loop = broken
    case = numerics.draw_case(520 if tile.block_m == 128 else 136, 328, 264, rank, dtype, dropout_p=dropout_p)
    case = lying_transposed(case) if transposed else case

    def ptx(kernel: str) -> str:
        return edit(ptx_of(kernel)) if kernel == broken.kernel else ptx_of(kernel)

    if masks:
        check_masks(tile, rank, ptx)
        return
    if packed:
        options = LaunchOptions(timeout_s=60, proxy_fence="both")  # each of the two is proven
        if in_loop:
            SelectedCase(packed, 136, 160, tile, dtype).check(options, ptx)
            return
        FormatCase(packed, (136, 272, 264, rank), tile, dtype).check(options, ptx)
        return
    with emulated(LaunchOptions(timeout_s=60), ptx):
        results, _ = run_layer(case, tile, ctas=4)
    numerics.assert_accurate(results, case)
    assert is_clean(), "the workspace was left dirty"
