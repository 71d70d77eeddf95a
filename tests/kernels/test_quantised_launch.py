"""The launcher over packed weights: which it serves and why not others, what it is compiled for, what is a fallback."""

import dataclasses
import itertools

import pytest
import torch
import triton

import fastlora
from fastlora import one_launch, quantised_layer, quantised_operands, routes, selection
from fastlora.backends import workspace
from fastlora.backends.configs import FUSED_RANK, TILE_TABLES, table_for
from fastlora.backends.target import Target
from fastlora.backends.triton import quantised_launch
from fastlora.problem import Needs
from fastlora.quantised_module import QuantisedLoRALinear
from fastlora.quantised_weight import QuantisedWeight
from tests.support.compile_gate import MORE_ARCHITECTURES, assert_fits, expected_instruction
from tests.support.compile_target import compile_for
from tests.support.quantised_models import bitsandbytes
from tests.support.triton_checks import ALL, SMALL, needs_compiler


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def packed_weight(name: str, n: int, k: int, dtype=torch.bfloat16) -> QuantisedWeight:
    """On "meta"."""
    if name == "int8":
        tensors = (meta(n, k, dtype=torch.int8), meta(n, 1, dtype=dtype), meta(n, 1, dtype=torch.int8))
        return QuantisedWeight(name, tensors, (n, k), dtype, (1, k))
    if name == "float8":
        tensors = (meta(n, k, dtype=torch.float8_e4m3fn), meta(n, 1, dtype=torch.float32))
        return QuantisedWeight(name, tensors, (n, k), dtype, (1, k))
    blocks = -(-n * k // 64)
    inner = (-(-blocks // 256),), (256,), ()
    tensors = (meta(-(-n * k // 2), 1, dtype=torch.uint8), meta(blocks, dtype=torch.uint8))
    nested = tuple(meta(*shape, dtype=torch.float32) for shape in inner)
    return QuantisedWeight(name, (*tensors, *nested), (n, k), dtype, (64, 256))


def described(weight: QuantisedWeight, m: int = 256, r: int = 16, dropout_p: float = 0.0, needs: Needs | None = None):
    """Operands of a call on "meta", and their description."""
    (n, k), dtype = weight.shape, weight.dtype
    a, b, seed = meta(r, k, dtype=dtype), meta(n, r, dtype=dtype), torch.tensor(1) if dropout_p else None
    x, dy, s, bias = (meta(*shape, dtype=dtype) for shape in ((m, k), (m, n), (m, r), (n,)))
    if needs is None:
        return quantised_operands.describe_forward((x, weight, a, b, bias, 2.0, dropout_p, seed))
    return quantised_operands.describe_backward((dy, x, weight, a, b, s, 2.0, dropout_p, seed), needs)


def changed(weight: QuantisedWeight, place: int, tensor: torch.Tensor, **fields) -> QuantisedWeight:
    tensors = list(weight.tensors)
    tensors[place : place + 1] = [tensor]
    return weight._replace(tensors=tuple(tensors), **fields)


@needs_compiler
def test_calls_that_differ_in_more_than_m_have_kernels_of_their_own(monkeypatch):
    """A warm-up compiles one for each key."""
    monkeypatch.setattr(quantised_launch, "target_of", lambda device: Target(80, n_sms=132))

    def key(m: int = 256, dtype: torch.dtype = torch.bfloat16, config=SMALL[80], **part):
        spec = described(packed_weight("nf4", 64, 128, dtype), m)[1]
        return quantised_launch.prepare(spec, config, **part).kernel_key

    assert key() == key(512)
    others = key(dtype=torch.float16), key(config=dataclasses.replace(SMALL[80], block_n=64)), key(part=512)
    assert len({key(), *others}) == 4


@needs_compiler
def test_what_is_not_served_says_why():
    int8, float8 = packed_weight("int8", 64, 128), packed_weight("float8", 64, 128)
    assert quantised_launch.why_unsupported(described(packed_weight("nf4", 33, 47))[1]) is None
    assert quantised_launch.why_unsupported(described(int8)[1]) is None
    refused = {
        "2 scales of 32 x 64 elements": changed(int8, 1, meta(2, 1), block=(32, 64)),
        "128 scales of 64 x 1 elements": changed(int8, 1, meta(1, 128), block=(64, 1)),
        "64 scales of 2 x 128 elements": int8._replace(block=(2, 128)),
        "scales of the int8 weight are torch.float64": changed(int8, 1, meta(64, 1, dtype=torch.float64)),
        "scales of the nf4 weight are (torch.float16": changed(
            packed_weight("nf4", 64, 128), 1, meta(128, dtype=torch.float16)
        ),
        "zero points of the int8 weight are torch.float32": changed(int8, 2, meta(64, 1, dtype=torch.float32)),
        "a tensor of the int8 weight is not contiguous": changed(int8, 0, meta(128, 64, dtype=torch.int8).t()),
        "no kernel decodes torch.float8_e4m3fnuz": changed(float8, 0, meta(64, 128, dtype=torch.float8_e4m3fnuz)),
        "elements of the float8 weight have one scale": QuantisedWeight(
            "float8", (meta(1 << 16, 1 << 15, dtype=torch.float8_e4m3fn), meta()), (1 << 16, 1 << 15), torch.bfloat16,
            (1 << 16, 1 << 15),
        ),
    }  # fmt: skip
    for reason, weight in refused.items():
        assert reason in quantised_launch.why_unsupported(described(weight)[1]), reason
    assert "rank 300 is above" in quantised_launch.why_unsupported(described(int8, r=300)[1])
    for name in ("composed", "reference"):
        assert "int8" in selection.why_unsupported(name, described(int8)[1])


@needs_compiler
def test_few_rows_of_a_forward_decode_in_the_loop():
    weight = packed_weight("nf4", 64, 128)
    specs = {m: described(weight, m)[1] for m in (1, 64, 65)}
    assert {m: quantised_launch.decodes_in_loop(spec) for m, spec in specs.items()} == {1: True, 64: True, 65: False}
    assert not quantised_launch.decodes_in_loop(described(weight, 16, dropout_p=0.1)[1])
    assert not quantised_launch.decodes_in_loop(described(weight, 16, needs=ALL)[1])
    assert not quantised_launch.decodes_in_loop(described(packed_weight("nf4", 64, 130), 16)[1])
    assert not quantised_launch.decodes_in_loop(described(packed_weight("int8", 64, 12), 16)[1]), "two scales in a word"
    unaligned = [
        t if i else torch.empty(64 * 128 // 2 + 1, dtype=torch.uint8)[1:] for i, t in enumerate(weight.tensors)
    ]
    assert not quantised_launch.decodes_in_loop(described(weight._replace(tensors=tuple(unaligned)), 16)[1])


def test_what_no_launch_decodes_is_a_fallback_with_its_reason(monkeypatch):
    """On a GPU: the weight is decoded in front of a dense launch, and both are counted."""
    codes, scales = torch.randint(-9, 9, (32, 16), dtype=torch.int8), torch.ones(2, 2)
    packed = QuantisedWeight("int8", (codes, scales), (32, 16), torch.float32, (16, 8))
    monkeypatch.setattr(one_launch, "may_launch", lambda device, requested: True)
    monkeypatch.setattr(selection, "triton_unusable", lambda device: None)
    x, a, b = torch.randn(70, 16, requires_grad=True), torch.randn(2, 16), torch.randn(32, 2)
    fastlora.reset_dispatch_counts()
    y = fastlora.lora_linear(x, packed, a, b, 0.5)
    y.sum().backward()
    assert torch.equal(y, fastlora.lora_linear(x, codes.float(), a, b, 0.5))
    reason = "triton: 4 scales of 16 x 8 elements of the int8 weight [32, 16]"
    # The library's decoding is counted on a GPU alone.
    assert fastlora.dispatch_counts()["fallbacks"] == {"cuda: the tensors are on cpu": 2, reason: 2}


@needs_compiler
def test_warm_up_compiles_what_decodes(monkeypatch):
    """Both forwards, and the backward, whose tile is one for both; the layer's calls then compile nothing."""
    bnb = bitsandbytes()
    linear = bnb.nn.Linear4bit(64, 80, bias=False, compute_dtype=torch.float16, quant_type="nf4").to("cpu")
    layer = QuantisedLoRALinear.from_linear(linear, r=8)
    hooked = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **found: hooked.append(found["repr"]) and False)
    for kernel in (quantised_launch.quantised_forward_kernel, quantised_launch.quantised_backward_kernel):
        monkeypatch.delitem(kernel.device_caches, -80, raising=False)
    monkeypatch.setattr(selection, "triton_unusable", lambda device: None)
    monkeypatch.setattr(quantised_launch, "target_of", lambda device: Target(80, n_sms=3))
    monkeypatch.setattr(quantised_layer, "_skips_op", lambda tensor: False)
    monkeypatch.setattr(workspace, "_by_stream", {})
    monkeypatch.setenv("FASTLORA_BACKEND", "triton")
    routes.forget_routes()
    with compile_for(80, assembles=False) as driver:
        warmed = fastlora.warmup(layer, (16, 100), workers=1)
        assert warmed.kernels == len(hooked) == 3 and not driver.launched
        assert all("quantised" in name for name in hooked)
        for rows in (16, 100):
            layer(torch.ones(rows, 64, dtype=torch.float16, requires_grad=True)).sum().backward()
        assert len(driver.launched) == 4 and len(hooked) == 3
    routes.forget_routes()


@needs_compiler
@pytest.mark.parametrize("name, n, k, needs", [("nf4", 1, 64, ALL), ("int8", 64, 1, None), ("int8", 1, 1, ALL)])
def test_one_row_and_one_column(monkeypatch, name, n, k, needs):
    """Sizes of 1 are constants of a kernel."""
    monkeypatch.setattr(quantised_launch, "target_of", lambda device: Target(80, n_sms=132))
    operands, spec = described(packed_weight(name, n, k), needs=needs)
    with compile_for(80, assembles=False) as driver:
        quantised_launch.prepare(spec, SMALL[80])(operands)
    assert len(driver.launched) == 1


def shipped():
    """Tiles of the tables as calls get them. Outside the sweep: those with the most registers or shared memory."""
    for arch, (table, tiles) in itertools.product((80, 90, 100, *MORE_ARCHITECTURES), TILE_TABLES.items()):
        rank = 256 if table.endswith(" large-rank") else FUSED_RANK
        dtype = torch.float32 if table.startswith("float32") else torch.bfloat16
        aligned, few_rows = not table.startswith("unaligned"), table.endswith(" few rows")
        if table_for(arch, rank, dtype.itemsize, aligned, few_rows) != table:
            continue
        fused = dtype == torch.float32 and rank <= FUSED_RANK
        directions = (None,) if few_rows else (None, ALL)
        for config, needs, name in itertools.product(tiles, directions, ("nf4", "int8")):
            config = dataclasses.replace(config, fused=fused)
            size = f"{config.block_m}x{config.block_n}x{config.block_k}"
            label = f"sm_{arch}-{table}-{size}-{'forward' if needs is None else 'backward'}-{name}"
            marks = [] if label in DEMANDING else [pytest.mark.sweep]
            yield pytest.param(arch, config, rank, dtype, aligned, few_rows, needs, name, id=label, marks=marks)


DEMANDING = (
    "sm_90-hopper large-rank-128x256x64-backward-nf4",
    "sm_90-hopper few rows-16x64x128-forward-nf4",
    "sm_80-unaligned large-rank-64x64x32-forward-nf4",
)


@needs_compiler
@pytest.mark.parametrize("arch, config, rank, dtype, aligned, few_rows, needs, name", list(shipped()))
def test_shipped_configurations(monkeypatch, arch, config, rank, dtype, aligned, few_rows, needs, name):
    """No spill, the tile's matrix instruction; asynchronous copies out of scratch where rows are aligned."""
    monkeypatch.setattr(quantised_launch, "target_of", lambda device: Target(arch, n_sms=132))
    n, k = (4096, 4096) if aligned else (4003, 4005)
    m = config.block_m if few_rows else 4096 if aligned else 4001
    operands, spec = described(packed_weight(name, n, k, dtype), m, rank, 0.0 if few_rows else 0.1, needs)
    assert quantised_launch.why_unsupported(spec) is None and quantised_launch.decodes_in_loop(spec) == few_rows
    with compile_for(arch) as driver:
        quantised_launch.prepare(spec, config)(operands)
    (launch,) = driver.launched
    assert_fits(launch.kernel, arch, expected_instruction(arch, config, dtype))
    if aligned:
        assert "cp.async.c" in launch.kernel.asm["ptx"]
