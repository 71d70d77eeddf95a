"""Every compiled kernel, by the launchers' own parameters and the library's own PTX, in the emulator: values, tails,
strides, types and gradients not asked for. Each run is also one for races, fences, bounds and uninitialised reads.
"""

import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from fastlora.backends.cuda import launch as cuda
from fastlora.problem import Needs
from tests.support import launches, numerics
from tests.support.cuda_checks import (
    ALL,
    EVERY_KERNEL,
    GROUPED,
    LARGE,
    MEDIUM,
    SMALL,
    SUBSETS,
    TRANSPOSED,
    check_group,
    check_integers,
    check_needs,
    check_transposed,
    describe,
    needs_kernels,
    schedule_of,
    schedule_of_group,
    variants,
)
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of, run_layer

pytestmark = [needs_kernels, pytest.mark.usefixtures("own_workspace")]


def name_of(variant: dict) -> str:
    return variant["name"].removeprefix("lora_sm90_")


@pytest.mark.parametrize("tile, dropout, rank", EVERY_KERNEL, ids=describe)
def test_integers_are_exact(poisoned, tile, dropout, rank):
    check_integers(tile, dropout, rank, schedule_of(tile, dropout, rank))


@pytest.mark.parametrize(
    "tile, dropout, rank", [each for each in EVERY_KERNEL if each[2] != 24 and not each[0].fused], ids=describe
)
def test_fp16_integers_are_exact(poisoned, tile, dropout, rank):
    check_integers(tile, dropout, rank, SCHEDULES[2], dtype=torch.float16)


@pytest.mark.parametrize("tile, dropout, rank", TRANSPOSED, ids=describe)
def test_a_base_weight_that_lies_transposed(poisoned, tile, dropout, rank):
    check_transposed(tile, dropout, rank, schedule_of(tile, dropout, rank, layers=TRANSPOSED))


@pytest.mark.parametrize("number, layer", [*enumerate(GROUPED)], ids=("128x256-16", "128x256-8", "128x128", "64x128"))
def test_groups_as_long_as_shipped(poisoned, number, layer):
    check_group(*layer, schedule_of_group(number))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize(
    "tile, r, dropout_p", ((LARGE, 16, 0.1), (LARGE, 64, 0.0), (LARGE, 256, 0.1), (MEDIUM, 64, 0.1), (SMALL, 16, 0.0))
)
def test_results_are_as_accurate_as_eager(poisoned, dtype, tile, r, dropout_p):
    case = numerics.draw_case(200, 264, 328, r, dtype, dropout_p=dropout_p)
    with emulated():
        results, _ = run_layer(case, tile, ctas=2)
    numerics.assert_accurate(results, case)


def test_fp32_adapters_get_fp32_gradients(poisoned):
    case = numerics.draw_case(200, 136, 72, 16, torch.bfloat16, adapter_dtype=torch.float32)
    with emulated():
        results, _ = run_layer(case, LARGE, ctas=2)
    assert results["da"].dtype == results["db"].dtype == torch.float32
    numerics.assert_accurate(results, case)


@pytest.mark.parametrize(
    "needs", SUBSETS, ids=lambda needs: "+".join(n for n, wanted in needs._asdict().items() if wanted)
)
def test_gradients_not_asked_for_are_not_computed(poisoned, needs):
    check_needs(needs)


def test_saved_tensors_that_no_gradient_reads_may_be_missing(poisoned):
    case = numerics.draw_integer_case(72, 136, 264, 16, torch.bfloat16)
    c = case
    with emulated():
        gradients = launches.backward(
            cuda, c.dy, None, c.weight, c.lora_a, c.lora_b, None, c.scaling, 0.0, None, Needs(True, False, False, True),
            tile=SMALL, ctas=2,
        )  # fmt: skip
    numerics.assert_exact({"dx": gradients.dx, "dbias": gradients.dbias}, case)


@pytest.mark.parametrize("transposed", (False, True), ids=("dense", "transposed"))
def test_rows_may_lie_apart_and_overlap(poisoned, transposed):
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
    if transposed:
        case = replace(case, weight=apart(case.weight.t()).t())
    with emulated():
        results, _ = run_layer(case, LARGE, ctas=2)
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
        y, _ = launches.forward(cuda, case.x, case.weight[:0], case.lora_a, case.lora_b[:0], None, 1.0, 0.0, None)
        assert y.shape == (1, 0)
        y, s = launches.forward(cuda, case.x[:0], case.weight, case.lora_a, case.lora_b, None, 1.0, 0.0, None)
        gradients = launches.backward(
            cuda, case.dy[:0], case.x[:0], case.weight, case.lora_a, case.lora_b, s, 1.0, 0.0, None, ALL
        )
    assert y.shape == (0, 16) and s.shape == (0, 8) and gradients.dx.shape == (0, 24)
    assert not any(g.any() for g in gradients) and not launch.stats


@pytest.mark.parametrize("dropout_p", (0.25, 1.0))
def test_a_seed_on_the_device_gives_the_same_mask(poisoned, monkeypatch, dropout_p):
    case = numerics.draw_case(136, 136, 72, 16, torch.bfloat16, dropout_p=dropout_p)
    with emulated() as launch:
        results, _ = run_layer(case, MEDIUM, ctas=2)
        monkeypatch.setattr(cuda, "by_address_or_value", lambda seed: (seed, 0))
        on_device, _ = run_layer(case, MEDIUM, ctas=2)
    assert launch.stats[-1].buffers["seed_address"].bytes_read > 0
    assert all(torch.equal(results[name], on_device[name]) for name in results)


@pytest.mark.parametrize("tile", (LARGE, SMALL), ids=("128x256", "64x128"))
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
def test_elements_that_lie_apart_are_copied(poisoned, name):
    """A kernel takes the elements of a vector, or of a row, for neighbours; what are not are copied before."""
    case = numerics.draw_integer_case(72, 136, 200, 16, torch.bfloat16)
    apart = torch.stack((getattr(case, name),) * 2, dim=-1)[..., 0]
    with emulated():
        results, _ = run_layer(replace(case, **{name: apart}), SMALL, ctas=2)
    numerics.assert_exact(results, case)


# And by what type a number that is known when it is compiled is stored.
_TYPES = (
    (r"\.f16\b", ".bf16"),
    (r"\bcvt\.rn\.f16x2\.f32", "cvt.rn.bf16x2.f32"),
    (r"\bst\.global\.[fu]32", "st.global.b32"),
    ("fp16", "bf16"),
)


# What the protocol consists of: products, copies, barriers, fences, flags, memory.
_PROTOCOL = re.compile(
    r"(?:@\S+ )?(?:wgmma|cp\.|mbarrier|barrier|bar\.|fence|ld\.|st\.|red|atom|ldm|stm|setmaxnreg|mapa)"
)


@pytest.mark.parametrize("variant", [v for v in variants() if v["dtype"] == "float16"], ids=name_of)
def test_fp16_kernels_follow_the_protocol_of_the_bf16_kernels(variant):
    """But for the element type of products and conversions: so what is proven of one holds for the other.

    Two things are fp16's alone. Its arithmetic with the branch's scale is not compared here; and the forward of a tile
    whose contraction cannot be split waits for its products and releases their stage before that arithmetic, not
    behind the expand product."""

    def protocol(name: str) -> list[str]:
        text = ptx_of(name)
        for pattern, replacement in _TYPES:
            text = re.sub(pattern, replacement, text)
        text = re.sub(r"%\w+", "%", text)  # register numbers
        lines = (line.strip() for line in text.splitlines())
        return [line for line in lines if _PROTOCOL.match(line) and not line.startswith("ld.param")]

    fp16, bf16 = protocol(variant["name"]), protocol(variant["name"].replace("fp16", "bf16"))
    assert len(bf16) > 100
    if variant["backward"] or variant["splits"]:
        assert fp16 == bf16
    else:
        changed = (Counter(fp16) - Counter(bf16)) + (Counter(bf16) - Counter(fp16))
        assert all(re.match(r"wgmma\.wait_group|mapa|mbarrier\.arrive", line) for line in changed), changed
