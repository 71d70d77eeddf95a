"""The CUDA kernels over packed base weights, proven on their own PTX. Every launch's scratch is compared with the
library's own weight, bit for bit (quantised_checks.run_layer)."""

import dataclasses
import math

import pytest
import torch

import fastlora
from fastlora import one_launch, routes
from fastlora.backends.cuda import extension, quantised_launch, tiles
from fastlora.backends.cuda import launch as cuda
from fastlora.backends.cuda.quantised_launch import ROWS_IN_LOOP
from fastlora.problem import LaunchSpec, Needs, Packed, Sizes
from tests.emulator import LaunchOptions
from tests.support import cuda_quantised_checks as checks
from tests.support import numerics
from tests.support.cuda_checks import LARGE, MEDIUM, needs_kernels
from tests.support.cuda_emulation import SCHEDULES, emulated
from tests.support.quantised_checks import allocated, draw, draw_integers

pytestmark = [needs_kernels, pytest.mark.usefixtures("own_workspace", "poisoned")]


@pytest.mark.parametrize("sizes, tile", checks.INTEGERS, ids=str)
def test_integers_are_exact_under_every_schedule(sizes, tile):
    checks.check_integers(sizes, tile)


@pytest.mark.parametrize("number", range(len(checks.EVERY_FORMAT)), ids=lambda i: checks.EVERY_FORMAT[i].describe())
def test_formats(number):
    checks.EVERY_FORMAT[number].check(SCHEDULES[number % len(SCHEDULES)])


def test_groups_as_long_as_those_that_are_shipped():
    """A whole group, and a ragged one behind it whose last row block has a tail."""
    checks.check_group()


def test_a_backward_without_dx_decodes_nothing():
    case, packed = draw_integers((264, 136, 264, 16), torch.bfloat16)
    results, (forward, backward) = checks.emulate(case, packed, MEDIUM, needs=Needs(False, True, True, True))
    numerics.assert_exact(results, case)
    assert forward.buffers["codes"].bytes_read > 0 and "codes" not in backward.buffers


def test_the_packed_weight_is_read_once_a_launch_and_scratch_written_once():
    """Whatever the number of row blocks: one for each tile that reads the scratch."""
    m, n, k, r = 264, 136, 264, 16
    case, packed = draw("nf4", (m, n, k, r), torch.bfloat16)
    _, launches = checks.emulate(case, packed, MEDIUM, LaunchOptions(resident=1))  # no wait polls
    for launch in launches:
        codes, scratch = launch.buffers["codes"], launch.buffers["weight"]
        assert codes.bytes_read == codes.first_touch_read == n * k // 2 and codes.bytes_written == 0
        assert scratch.bytes_written == scratch.first_touch_written == n * k * 2
        assert scratch.bytes_read == math.ceil(m / MEDIUM.block_m) * n * k * 2


@pytest.mark.parametrize("sizes, tile", checks.IN_LOOP_INTEGERS, ids=str)
def test_integers_are_exact_in_the_loop_under_every_schedule(sizes, tile):
    checks.check_integers_in_loop(sizes, tile)


@pytest.mark.parametrize("number", range(len(checks.SELECTED)), ids=lambda i: checks.SELECTED[i].describe())
def test_products_see_the_librarys_own_bits(number):
    checks.SELECTED[number].check(SCHEDULES[number % len(SCHEDULES)])


@pytest.mark.sweep
@pytest.mark.parametrize("splits", (1, 4, 8))
@pytest.mark.parametrize("number", range(len(checks.SELECTED)), ids=lambda i: checks.SELECTED[i].describe())
def test_products_see_the_librarys_own_bits_under_every_schedule(number, splits):
    case = checks.SELECTED[number]._replace(k=512, tile=dataclasses.replace(checks.IN_LOOP, splits=splits))
    for options in SCHEDULES:
        case.check(options)


@pytest.mark.parametrize("dtype, r", ((torch.bfloat16, 16), (torch.float16, 64)))
def test_in_the_loop_results_are_as_accurate_as_eager(dtype, r):
    """With the branch; in fp16 its scaling is split."""
    case, packed = draw("nf4 nested", (40, 200, 352, r), dtype)
    results, _ = checks.emulate(case, packed, checks.IN_LOOP, SCHEDULES[2], needs=None, in_loop=True)
    numerics.assert_accurate(results, case)


def test_in_the_loop_the_packed_weight_is_read_once_and_no_scratch_written():
    m, n, k = 64, 200, 352
    case, packed = draw("nf4", (m, n, k, 16), torch.bfloat16)
    tile = dataclasses.replace(checks.IN_LOOP, splits=4)
    _, (launch,) = checks.emulate(case, packed, tile, LaunchOptions(resident=1), needs=None, in_loop=True)
    codes, scales = launch.buffers["codes"], launch.buffers["scales"]
    assert codes.bytes_read == codes.first_touch_read == n * k // 2 and codes.bytes_written == 0
    assert scales.first_touch_read == packed.tensors[1].numel() * 4
    assert scales.bytes_read <= 2 * scales.first_touch_read, "a scale is read once by each half of a step"
    assert "weight" not in launch.buffers


def test_what_a_plan_decodes():
    """Parts of 32 Ki elements, two a cluster's tile: a panel for each column forward, one for all of dX."""
    sizes = {"fp16": False, "dropout": False, "m": 512, "r": 16, "group_m": 8, "splits": 1, "fused": False, "ctas": 132}
    packed = {"code_format": "nf4", "scale_format": "float32", "block": 64}
    n, k = 600, 400

    def decode_tiles(backward: bool, block_n: int, **fields) -> int:
        out, contracted = (k, n) if backward else (n, k)
        tile = {"block_m": 128, "block_n": block_n, "backward": backward, "n": out, "k": contracted}
        return extension.loaded().Plan(**sizes, **tile, **fields).decode_tiles

    assert decode_tiles(False, 128, **packed) == 5 * 2 and decode_tiles(True, 128, **packed) == 8
    assert decode_tiles(False, 256, **packed) == 3 * 2 and decode_tiles(True, 256, **packed) == 4
    assert decode_tiles(False, 256) == 0, "a dense weight"


@pytest.mark.parametrize(
    "fields, reason",
    (
        ({"k": 424}, "elements that are decoded together must have one scale"),
        ({"code_format": "int8", "block": 104}, "elements that are decoded together must have one scale"),
        ({"block_m": 128}, "no compiled kernel serves this"),
        ({"dropout": True}, "no compiled kernel serves this"),
        ({"code_format": "none"}, "no compiled kernel serves this"),
    ),
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_no_product_decodes_is_refused(fields, reason):
    plan = {
        "backward": False, "fp16": False, "dropout": False, "m": 16, "n": 136, "k": 416, "r": 16, "group_m": 8,
        "splits": 1, "fused": False, "ctas": 132, "block_m": 64, "block_n": 128, "code_format": "nf4",
        "scale_format": "float32", "block": 64, "in_loop": True,
    }  # fmt: skip
    assert extension.loaded().Plan(**plan).variant["in_loop"]
    with pytest.raises(ValueError, match=reason):
        extension.loaded().Plan(**{**plan, **fields})


@pytest.mark.parametrize("m", (136, 40), ids=("once", "in the loop"))
def test_a_layer_asks_for_the_launch_that_decodes(monkeypatch, m):
    """From the public function on: one launch each way, counted as the CUDA backend's, and no fallback; few rows have
    scratch in the backward alone."""
    case, packed = draw("nf4 nested", (m, 64, 128, 8), torch.bfloat16)
    given = {name: getattr(case, name).requires_grad_() for name in ("x", "lora_a", "lora_b", "bias")}
    monkeypatch.setattr(one_launch, "may_launch", lambda device, requested: True)
    monkeypatch.setattr(quantised_launch, "why_unsupported", quantised_launch.why_not_compiled)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 4)
    routes.forget_routes()
    fastlora.reset_dispatch_counts()
    with emulated() as launch, allocated(packed.shape, torch.bfloat16) as scratch:
        for _ in range(2):  # the second finds its route by its key
            y = fastlora.lora_linear(given["x"], packed, given["lora_a"], given["lora_b"], case.scaling, given["bias"])
            gradients = torch.autograd.grad(y, list(given.values()), case.dy)
    routes.forget_routes()
    assert len(launch.stats) == 4 and len(scratch) == (4 if m > ROWS_IN_LOOP else 2)
    assert fastlora.dispatch_counts() == {"cuda": 4, "triton": 0, "composed": 0, "reference": 0, "fallbacks": {}}
    results = {"y": y.detach(), **dict(zip(("dx", "da", "db", "dbias"), gradients, strict=True))}
    detached = {name: tensor.detach() for name, tensor in given.items()}
    numerics.assert_accurate(results, dataclasses.replace(case, **detached))


def test_tiles_that_decode():
    """S has tiles of its own, and what is compiled for is chosen from."""
    for m, r in ((8192, 16), (8192, 64), (512, 16)):
        for backward in (False, True):
            tile = tiles.choose_tile(m, 4096, 4096, r, 132, backward=backward, decodes=True)
            assert (tile.block_m, tile.block_n) in ((128, 256), (128, 128)) and not tile.fused
    assert tiles.choose_tile(8192, 4096, 4096, 16, 132, decodes=True).block_n == LARGE.block_n
    assert tiles.choose_tile(512, 4096, 4096, 16, 132, decodes=True).block_n == MEDIUM.block_n
    with pytest.raises(ValueError, match="no CUDA kernel is compiled for rank 72"):
        tiles.choose_tile(8192, 4096, 4096, 72, 132, decodes=True)


def test_in_the_loop_splits_give_every_multiprocessor_work():
    """There is one tile; the narrower the layer, the more splits."""
    for n, k, splits in ((4096, 4096, 4), (1024, 4096, 8), (14336, 4096, 1)):
        tile = tiles.choose_tile(16, n, k, 16, 132, in_loop=True)
        assert (tile.block_m, tile.block_n, tile.splits, tile.fused) == (64, 128, splits, False), (n, k)


def packed_spec(name: str = "nf4", m: int = 128, n: int = 64, k: int = 128, r: int = 16, **changes) -> LaunchSpec:
    """Of a forward in bfloat16 over a packed weight."""
    block = {"nf4": (64, 256), "fp4": (64, 0)}.get(name, (1, k))
    float8 = torch.float8_e4m3fn
    dtypes = {
        "nf4": (torch.uint8, torch.uint8, *(torch.float32,) * 3),
        "fp4": (torch.uint8, torch.float32),
        "int8": (torch.int8, torch.bfloat16),
        "float8": (float8, torch.float32),
    }[name]
    scales = n * k // 64 if name in ("nf4", "fp4") else n
    counts = (n * k, scales, *(1 for _ in dtypes[2:]))
    packed = Packed(block, dtypes, counts, (True,) * len(dtypes), True)._replace(**changes)
    dtype = torch.bfloat16
    device = torch.device("cuda", 0)
    return LaunchSpec("forward", Sizes(m, n, k, r), dtype, (dtype, dtype), device, name, packed=packed)


@pytest.mark.parametrize("name", ("nf4", "fp4", "int8", "float8"))
def test_what_is_compiled_is_not_refused(name):
    assert quantised_launch.why_not_compiled(packed_spec(name)) is None
    assert quantised_launch.why_not_compiled(packed_spec(name)._replace(dtype=torch.float16)) is None


@pytest.mark.parametrize(
    "spec, reason",
    (
        (packed_spec(r=72), "rank 72 is above 64 over nf4 weights"),
        (packed_spec(m=64, k=136, counts=(64 * 136, 136)), "64 rows over nf4 weights, better decoded in the loop"),
        (packed_spec(m=64, k=136, counts=(64 * 136, 136)), "in_features 136 is no multiple of 32"),
        (packed_spec("int8", m=16, block=(1, 16), counts=(8192, 512)), "16 elements with one scale are no multiple"),
        (packed_spec(k=68, n=64), "must be multiples of 8"),
        (packed_spec()._replace(packed=None, base_format="nf4"), "no kernel decodes a nf4 base weight"),
        (packed_spec(starts=(False, True, True, True, True)), "do not start on 16 bytes"),
        (packed_spec(contiguous=False), "one of its tensors is not contiguous"),
        (packed_spec(counts=(1, 1 << 31)), "scales of the nf4 weight, which 32 bits do not count"),
        (packed_spec(dtypes=(torch.uint8, torch.float32)), "scales of the nf4 weight are (torch.float32,)"),
        (packed_spec(block=(96, 256)), "blocks of 96 elements and 256 scales"),
        (packed_spec("int8", dtypes=(torch.int8, torch.float64)), "no kernel decodes int8 weights"),
        (packed_spec("int8", dtypes=(torch.int8, torch.float32, torch.int32)), "no kernel decodes int8 weights"),
        (packed_spec("float8", dtypes=(torch.float8_e4m3fnuz, torch.float32)), "no kernel decodes float8 weights"),
        (packed_spec("int8", block=(32, 64), counts=(8192, 4)), "4 scales of 32 x 64 elements"),
        (packed_spec("int8", block=(1, 4), counts=(8192, 2048)), "4 elements of the int8 weight have one scale"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_served_says_why(spec, reason):
    assert reason in quantised_launch.why_not_compiled(spec)


def test_few_rows_of_a_forward_decode_in_the_loop():
    def decodes(spec) -> bool:
        assert quantised_launch.why_not_compiled(spec) is None
        return quantised_launch.decodes_in_loop(spec)

    assert {m: decodes(packed_spec(m=m)) for m in (1, 128, 129)} == {1: True, 128: True, 129: False}
    assert all(decodes(packed_spec(name, m=16)) for name in ("fp4", "int8", "float8"))


def test_few_rows_with_dropout_or_backward_are_served():
    """Nobody decodes those in the loop of a product."""
    for changed in ({"dropout": True}, {"direction": "backward"}):
        assert not quantised_launch.decodes_in_loop(packed_spec(m=16)._replace(**changed))
    assert quantised_launch.why_not_compiled(packed_spec(m=16)._replace(dropout=True)) is None
    assert quantised_launch.why_not_compiled(packed_spec(m=16)._replace(direction="backward")) is None


def test_tensors_elsewhere_are_refused(monkeypatch):
    monkeypatch.setattr(quantised_launch, "unusable", lambda device=None: None)
    assert quantised_launch.why_unsupported(packed_spec()) is None
    on_cpu = packed_spec()._replace(device=torch.device("cpu"))
    assert quantised_launch.why_unsupported(on_cpu) == "the tensors are on cpu"
