"""Every compiled kernel, by the launchers' own parameters and the library's own PTX, in the emulator: values, tails,
strides, types and gradients not asked for. Each run is also one for races, fences, bounds and uninitialised reads.
"""

import difflib
import re
from dataclasses import replace

import pytest
import torch

from fastlora.backends import workspace
from fastlora.backends.cuda import launch as cuda
from fastlora.philox import keep_mask
from fastlora.problem import Needs, split_scaling
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of, run_layer, unavailable

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"CUDA kernels: {unavailable()}")

ALL = Needs(True, True, True, True)
WIDE, MEDIUM, SMALL = cuda.CudaTile(128, 256, 2), cuda.CudaTile(128, 128, 1, 2), cuda.CudaTile(64, 128, 1, 3)


@pytest.fixture(autouse=True)
def own_workspace(monkeypatch):
    """What one test leaves dirty is no one else's."""
    monkeypatch.setattr(workspace, "_by_stream", {})


def variants() -> list[dict]:
    return [] if unavailable() else cuda._extension()[0].variants()


def name_of(variant: dict) -> str:
    return variant["name"].removeprefix("lora_")


def draw_dropped_integers(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> numerics.Case:
    """Integers that stay exact under dropout of one half, which doubles what it keeps."""
    case = numerics.draw_integer_case(m, n, k, r, dtype)
    # A density that survives the doubling: S is rounded to 8 bits.
    thin = torch.rand(case.lora_b.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    case = replace(
        case, lora_b=case.lora_b * thin, dropout_p=0.5, seed=torch.tensor(0x0123_4567_89AB_CDEF), scaling=1.0
    )
    for name, value in numerics.compose(case.to(torch.float64)).items():
        assert torch.equal(value, value.to(dtype).double()), f"{name} is not exact: draw sparser numbers"
    return case


# Every compiled kernel: each tile, with dropout and without, at a rank of each class. Beyond rank 64 S is always made
# alone, and only wide tiles are compiled.
EVERY_KERNEL = tuple(
    (replace(tile, fused=fused), dropout, rank)
    for tile in (WIDE, MEDIUM, SMALL)
    for fused in (False, True)
    for dropout in (False, True)
    for rank in (8, 24, 40, 104, 232)
    if rank <= 64 or (tile == WIDE and not fused)
)


def describe(value) -> str:
    if isinstance(value, cuda.CudaTile):
        return f"{value.block_m}x{value.block_n}-{'fused' if value.fused else 'alone'}"
    return {True: "dropout", False: "plain"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def check_integers(
    tile, dropout: bool, rank: int, options: LaunchOptions | None = None, ptx=ptx_of, dtype=torch.bfloat16
):
    """Row blocks, columns, steps and ranks all end in tails; several row groups make chains of the gradients' parts."""
    m = {256: 600, 128: 280}[tile.block_n] if tile.block_m == 128 else 136
    draw = draw_dropped_integers if dropout else numerics.draw_integer_case
    case = draw(m, 328, 392, rank, dtype)
    with emulated(options, ptx) as launch:
        results, s = run_layer(case, tile, ctas=4)
    numerics.assert_exact(results, case)
    dropped = case.x.double()
    if dropout:
        dropped = dropped * keep_mask(case.seed, case.dropout_p, *case.x.shape) * 2
    assert torch.equal(s.double(), split_scaling(case.scaling, dtype).in_s * dropped @ case.lora_a.double().t())
    assert len(launch.stats) == 2, "one launch each way"


def schedule_of(*layer) -> LaunchOptions:
    """One or another; test_cuda_protocol.py runs a layer of each tile under all of them."""
    return (LaunchOptions(), *SCHEDULES)[EVERY_KERNEL.index(layer) % (1 + len(SCHEDULES))]


@pytest.mark.parametrize("tile, dropout, rank", EVERY_KERNEL, ids=describe)
def test_integers_are_exact(poisoned, tile, dropout, rank):
    check_integers(tile, dropout, rank, schedule_of(tile, dropout, rank))


@pytest.mark.parametrize(
    "tile, dropout, rank", [each for each in EVERY_KERNEL if each[2] != 24 and not each[0].fused], ids=describe
)
def test_fp16_integers_are_exact(poisoned, tile, dropout, rank):
    check_integers(tile, dropout, rank, SCHEDULES[2], dtype=torch.float16)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize(
    "tile, r, dropout_p", ((WIDE, 16, 0.1), (WIDE, 64, 0.0), (WIDE, 256, 0.1), (MEDIUM, 64, 0.1), (SMALL, 16, 0.0))
)
def test_results_are_as_accurate_as_eager(poisoned, dtype, tile, r, dropout_p):
    case = numerics.draw_case(200, 264, 328, r, dtype, dropout_p=dropout_p)
    with emulated():
        results, _ = run_layer(case, tile, ctas=2)
    numerics.assert_accurate(results, case)


def test_fp32_adapters_get_fp32_gradients(poisoned):
    case = numerics.draw_case(200, 136, 72, 16, torch.bfloat16, adapter_dtype=torch.float32)
    with emulated():
        results, _ = run_layer(case, WIDE, ctas=2)
    assert results["da"].dtype == results["db"].dtype == torch.float32
    numerics.assert_accurate(results, case)


# All gradients but one, and one alone.
SUBSETS = tuple(
    Needs(*((field == name) != others for field in ALL._fields)) for others in (True, False) for name in ALL._fields
)


def check_needs(needs: Needs, ptx=ptx_of):
    case = numerics.draw_integer_case(280, 136, 264, 16, torch.bfloat16)
    with emulated(ptx=ptx) as launch:
        results, _ = run_layer(case, WIDE, ctas=2, needs=needs)
    assert set(results) == {"y", *(n for n, wanted in needs._asdict().items() if wanted)}
    numerics.assert_exact(results, case)
    if not needs.dx:
        whole = 280 * 136 * 264
        assert launch.stats[1].macs < whole, "dX's products were computed all the same"


@pytest.mark.parametrize(
    "needs", SUBSETS, ids=lambda needs: "+".join(n for n, wanted in needs._asdict().items() if wanted)
)
def test_gradients_not_asked_for_are_not_computed(poisoned, needs):
    check_needs(needs)


def test_saved_tensors_that_no_gradient_reads_may_be_missing(poisoned):
    case = numerics.draw_integer_case(72, 136, 264, 16, torch.bfloat16)
    c = case
    with emulated():
        gradients = cuda.lora_backward(
            c.dy, None, c.weight, c.lora_a, c.lora_b, None, c.scaling, 0.0, None, Needs(True, False, False, True),
            tile=SMALL, ctas=2,
        )  # fmt: skip
    numerics.assert_exact({"dx": gradients.dx, "dbias": gradients.dbias}, case)


def test_rows_may_lie_apart_and_overlap(poisoned):
    """Operands cut from wider matrices, and a gradient that is one row expanded."""
    case = numerics.draw_integer_case(200, 136, 72, 16, torch.bfloat16)

    def apart(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 24), float("nan"), dtype=tensor.dtype)
        wide[:, 8:-16] = tensor
        return wide[:, 8:-16]

    case = replace(
        case, **{name: apart(getattr(case, name)) for name in ("x", "weight", "lora_a", "lora_b")},
        dy=case.dy[:1].expand(200, 136),
    )  # fmt: skip
    with emulated():
        results, _ = run_layer(case, WIDE, ctas=2)
    numerics.assert_exact(results, case)


@pytest.mark.parametrize("m", (1, 64, 65))
def test_few_rows(poisoned, m):
    case = numerics.draw_integer_case(m, 264, 520, 16, torch.bfloat16)
    with emulated():
        results, _ = run_layer(case, SMALL, ctas=16)
    numerics.assert_exact(results, case)


def test_no_rows_or_columns():
    case = numerics.draw_integer_case(1, 16, 24, 8, torch.bfloat16)
    with emulated() as launch:
        y, _ = cuda.lora_forward(case.x, case.weight[:0], case.lora_a, case.lora_b[:0], None, 1.0, 0.0, None)
        assert y.shape == (1, 0)
        y, s = cuda.lora_forward(case.x[:0], case.weight, case.lora_a, case.lora_b, None, 1.0, 0.0, None)
        gradients = cuda.lora_backward(
            case.dy[:0], case.x[:0], case.weight, case.lora_a, case.lora_b, s, 1.0, 0.0, None, ALL
        )
    assert y.shape == (0, 16) and s.shape == (0, 8) and gradients.dx.shape == (0, 24)
    assert not any(g.any() for g in gradients) and not launch.stats


@pytest.mark.parametrize("dropout_p", (0.25, 1.0))
def test_a_seed_on_the_device_gives_the_same_mask(poisoned, monkeypatch, dropout_p):
    case = numerics.draw_case(136, 136, 72, 16, torch.bfloat16, dropout_p=dropout_p)
    with emulated() as launch:
        results, _ = run_layer(case, MEDIUM, ctas=2)
        by_value = cuda._dropout_operands

        def by_address(p, seed):
            operands = by_value(p, seed)
            del operands["seed"]
            return operands | {"seed_address": case.seed.view(-1)}

        monkeypatch.setattr(cuda, "_dropout_operands", by_address)
        on_device, _ = run_layer(case, MEDIUM, ctas=2)
    assert launch.stats[-1].buffers["seed_address"].bytes_read > 0
    assert all(torch.equal(results[name], on_device[name]) for name in results)


@pytest.mark.parametrize("tile", (WIDE, SMALL), ids=("128x256", "64x128"))
def test_a_layer_may_have_no_bias(poisoned, tile):
    case = replace(numerics.draw_integer_case(136, 136, 200, 16, torch.bfloat16), bias=None)
    with emulated():
        results, _ = run_layer(case, tile, ctas=2)
    assert set(results) == {"y", "dx", "da", "db"}
    numerics.assert_exact(results, case)


def test_misaligned_bias_is_copied(poisoned):
    case = numerics.draw_integer_case(72, 136, 200, 16, torch.bfloat16)
    bias = torch.cat((case.bias[:1], case.bias))[1:]
    assert bias.data_ptr() % 16
    with emulated():
        results, _ = run_layer(replace(case, bias=bias), SMALL, ctas=2)
    numerics.assert_exact(results, case)


@pytest.mark.parametrize("name", ("bias", "x"))
def test_elements_that_lie_apart_are_refused(name):
    """A kernel takes the elements of a vector, or of a row, for neighbours; dispatch copies what are not."""
    case = numerics.draw_integer_case(72, 136, 200, 16, torch.bfloat16)
    apart = torch.stack((getattr(case, name),) * 2, dim=-1)[..., 0]
    with emulated(), pytest.raises(ValueError, match="the last not 1"):
        run_layer(replace(case, **{name: apart}), SMALL, ctas=2)


_TYPES = ((r"\.f16\b", ".bf16"), (r"\bcvt\.rn\.f16x2\.f32", "cvt.rn.bf16x2.f32"), ("fp16", "bf16"))


# What the protocol consists of: products, copies, barriers, fences, flags, memory.
_PROTOCOL = re.compile(
    r"(?:@\S+ )?(?:wgmma|cp\.|mbarrier|barrier|bar\.|fence|ld\.|st\.|red|atom|ldm|stm|setmaxnreg|mapa)"
)


@pytest.mark.parametrize("variant", [v for v in variants() if v["half"]], ids=name_of)
def test_fp16_kernels_follow_the_protocol_of_the_bf16_kernels(variant):
    """But for the element type of products and conversions: so what is proven of one holds for the other.

    Two things are fp16's alone. Its arithmetic with the branch's scale is not compared here; and the forward of a tile
    whose contraction is not split has one more wait in front of it, which also frees a stage."""

    def protocol(name: str) -> list[str]:
        text = ptx_of(name)
        for pattern, replacement in _TYPES:
            text = re.sub(pattern, replacement, text)
        text = re.sub(r"%\w+", "%", text)  # register numbers
        lines = (line.strip() for line in text.splitlines())
        return [line for line in lines if _PROTOCOL.match(line) and not line.startswith("ld.param")]

    fp16, bf16 = protocol(variant["name"]), protocol(variant["name"].replace("fp16", "bf16"))
    assert len(bf16) > 100
    changes = [c for c in difflib.SequenceMatcher(None, bf16, fp16, autojunk=False).get_opcodes() if c[0] != "equal"]
    added = [line for what, _, _, start, end in changes for line in fp16[start:end] if what == "insert"]
    assert all(what == "insert" for what, *_ in changes), changes
    if variant["backward"] or variant["split"]:
        assert not added
    else:
        assert all(re.match(r"wgmma\.wait_group|mapa|mbarrier\.arrive", line) for line in added), added
