"""Every shipped Triton configuration compiles for every architecture, without a GPU and without a spill.

Those of sm_80 and sm_90 meet the same gate where they run as well, in test_triton_ptx.py. sm_86, sm_89 and sm_120 take
the tables of sm_80: the configurations that need the most, here; all others in the sweep.
"""

import dataclasses
import itertools
import json
import re

import pytest
import torch
import triton

from fastlora.backends.configs import FUSED_RANK, TILE_TABLES, TileConfig, table_for
from fastlora.backends.target import Target, resident_programs
from fastlora.backends.triton import launch as triton_lora
from fastlora.operands import describe_backward, describe_forward
from fastlora.problem import BackwardOperands, ForwardOperands, Needs
from tests.support import launches
from tests.support.compile_gate import MORE_ARCHITECTURES, assert_fits, expected_instruction
from tests.support.compile_target import compile_for

pytestmark = pytest.mark.skipif(
    triton_lora.triton.knobs.runtime.interpret, reason="the interpreter compiles nothing; the gate has its own process"
)

ARCHITECTURES = (80, 90, 100)
# Of those, outside the sweep: what needs the most shared memory, and the tiles that have spilled.
DEMANDING = {
    *((arch, "ampere", 128, 128, "forward", True) for arch in MORE_ARCHITECTURES),
    (120, "ampere large-rank", 64, 128, "backward", False),
}
ALL = Needs(True, True, True, True)
DIRECTIONS = ("forward", "backward")


def compile_layer(monkeypatch, arch, direction, config, *, rank, dtype, dropout, aligned=True, bias=True, needs=ALL):
    """Compiles what one call would launch; returns the kernel and the number of launches."""
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(arch, n_sms=132))
    m, n, k = (4096, 4096, 4096) if aligned else (4001, 4003, 4005)

    def meta(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, a, b, dy, s = meta(m, k), meta(n, k), meta(rank, k), meta(n, rank), meta(m, n), meta(m, rank)
    dropout_p, seed = (0.1, torch.tensor(2**40)) if dropout else (0.0, None)
    with compile_for(arch) as driver:
        if direction == "forward":
            launches.forward(
                triton_lora, x, weight, a, b, meta(n) if bias else None, 2.0, dropout_p, seed, config=config
            )
        else:
            launches.backward(triton_lora, dy, x, weight, a, b, s, 2.0, dropout_p, seed, needs, config=config)
    return driver.launched[-1].kernel, len(driver.launched)  # perhaps compiled by an earlier test


def shipped():
    for arch, (name, table) in itertools.product((100, *MORE_ARCHITECTURES), TILE_TABLES.items()):
        large_rank, few_rows = name.endswith(" large-rank"), name.endswith(" few rows")
        dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
        aligned = not name.startswith("unaligned")
        rank = 256 if large_rank else FUSED_RANK
        if table_for(arch, rank, dtype.itemsize, aligned, few_rows) != name:
            continue
        makes_s = (False,) if large_rank else (True,) if dtype == torch.float32 else (True, False)  # what may be chosen
        directions = ("forward",) if few_rows else DIRECTIONS
        for config, direction, fused in itertools.product(table, directions, makes_s):
            tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
            label = f"sm_{arch}-{name}-{tile}-{direction}" + "-separate" * (not fused)
            in_sweep = arch in MORE_ARCHITECTURES and (
                (arch, name, config.block_m, config.block_n, direction, fused) not in DEMANDING
            )
            yield pytest.param(
                arch, direction, dataclasses.replace(config, fused=fused), rank, dtype, aligned, not few_rows, id=label,
                marks=[pytest.mark.sweep] if in_sweep else [],
            )  # fmt: skip


@pytest.mark.parametrize("arch, direction, config, rank, dtype, aligned, drops", list(shipped()))
def test_shipped_configurations(monkeypatch, arch, direction, config, rank, dtype, aligned, drops):
    """With everything that takes registers: dropout, unless the tile is for few rows, bias, all gradients, the largest
    rank."""
    kernel, launches = compile_layer(
        monkeypatch, arch, direction, config, rank=rank, dtype=dtype, dropout=drops, aligned=aligned
    )
    assert launches == 1
    assert_fits(kernel, arch, expected_instruction(arch, config, dtype))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rank", [16, 5])
def test_the_common_case(monkeypatch, arch, direction, rank):
    """No dropout, no bias; a rank whose rows TMA cannot address as well."""
    config = TILE_TABLES[table_for(arch, rank, 2, True)][0]
    kernel, launches = compile_layer(
        monkeypatch, arch, direction, config, rank=rank, dtype=torch.float16, dropout=False, bias=False
    )
    assert launches == 1
    assert_fits(kernel, arch, expected_instruction(arch, config, torch.float16))
    loads = kernel.asm["ptx"].count("cp.async.bulk.tensor")
    assert (loads > 0) == (arch >= 90)


@pytest.fixture
def allow_tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda allowed: setattr(torch.backends.cuda.matmul, "allow_tf32", allowed)
    torch.backends.cuda.matmul.allow_tf32 = before


def test_hooks_are_given_what_can_be_stored(monkeypatch):
    """Triton hands a hook each kernel's constants as JSON, from which ``preload`` compiles it elsewhere."""
    hooked = []
    for name in ("jit_cache_hook", "jit_post_compile_hook"):
        monkeypatch.setattr(triton.knobs.runtime, name, lambda **found: hooked.append(found["compile"]))
    config = TileConfig(16, 32, 64, 8, 4, 2)
    names = {"forward": "lora_forward_kernel", "backward": "lora_backward_kernel"}
    for direction, name in names.items():
        kernel = getattr(triton_lora, name)
        hooked.clear()
        compile_layer(monkeypatch, 80, direction, config, rank=8, dtype=torch.float16, dropout=True)
        before, after = hooked
        assert before["key"] == after["key"] and json.loads(before["specialization_data"])
        kernel.device_caches.pop(80)
        with compile_for(80):
            kernel.preload(before["specialization_data"])
        hooked.clear()
        compile_layer(monkeypatch, 80, direction, config, rank=8, dtype=torch.float16, dropout=True)
        assert not hooked, "what was preloaded is compiled again"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tf32_only_where_torch_allows_it(monkeypatch, allow_tf32, direction):
    config = TILE_TABLES["float32"][0]
    for allowed in (False, True):
        allow_tf32(allowed)
        kernel, _ = compile_layer(monkeypatch, 80, direction, config, rank=16, dtype=torch.float32, dropout=False)
        products = re.findall(r"mma\.sync\S*", kernel.asm["ptx"])
        assert bool(products) == allowed and all("tf32" in name for name in products)


def test_the_gate_sees_a_spill(monkeypatch):
    """A tile whose accumulator alone is larger than the registers of its threads."""
    config = TileConfig(128, 256, 32, 8, 4, 2)
    kernel, _ = compile_layer(monkeypatch, 80, "forward", config, rank=64, dtype=torch.bfloat16, dropout=True)
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(kernel, 80, "mma.sync")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_wave_is_that_of_the_compiled_kernel(monkeypatch, direction):
    """From the second launch on: as many programs a multiprocessor as its shared memory has room for."""
    config = TILE_TABLES["ampere"][-1]
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(80, n_sms=132))

    def meta(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta")

    x, weight, a, b, dy, s = meta(64, 96), meta(80, 96), meta(16, 96), meta(80, 16), meta(64, 80), meta(64, 16)
    forward = ForwardOperands(x, weight, a, b, None, 2.0, 0.0, None)
    backward = BackwardOperands(dy, x, weight, a, b, s, 2.0, 0.0, None)
    operands, spec = describe_forward(forward) if direction == "forward" else describe_backward(backward, ALL)
    with compile_for(80) as driver:
        launcher = triton_lora.prepare(spec, config)
        launcher(operands)
        launcher(operands)
    first, second = driver.launched
    used = second.kernel.metadata
    room = (164 << 10) // (used.shared + 1024)
    assert 1 < room < 16, "a kernel that shared memory bounds"
    assert first.args["wave"] == 132 and second.args["wave"] == 132 * room


@pytest.mark.parametrize(
    "arch, registers, shared, threads, programs",
    [
        (90, 168, 230000, 384, 1),  # shared memory
        (90, 255, 1000, 256, 1),  # registers: 8 warps of 8192
        (90, 64, 1000, 128, 8),  # 4 warps of 2048
        (80, 32, 0, 1024, 2),  # threads
        (86, 32, 0, 1024, 1),
        (89, 16, 0, 32, 24),  # programs
        (120, 40, 50 << 10, 128, 1),  # two would fill it without what the system takes
        (120, 40, 49 << 10, 128, 2),
        (90, -1, 56 << 10, 128, 4),  # registers unknown
        (110, 255, 1000, 256, 1),  # no figures of its own
    ],
)
def test_programs_that_run_at_once(arch, registers, shared, threads, programs):
    assert resident_programs(arch, registers, shared, threads) == programs


@pytest.mark.parametrize(
    "arch, block_m, padded", [(90, 64, 64), (100, 128, 64), (90, 16, 16), (100, 32, 16), (120, 64, 16), (80, 64, 16)]
)
def test_the_rank_is_padded_where_a_product_of_64_rows_is_the_least(monkeypatch, arch, block_m, padded):
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(arch, n_sms=132))
    x, a = torch.empty(256, 96, dtype=torch.bfloat16), torch.empty(5, 96, dtype=torch.bfloat16)
    weight, b = torch.empty(80, 96, dtype=torch.bfloat16), torch.empty(80, 5, dtype=torch.bfloat16)
    _, spec = describe_forward(ForwardOperands(x, weight, a, b, None, 2.0, 0.1, torch.tensor(1)))
    launcher = triton_lora.prepare(spec, TileConfig(block_m, 64, 64, 8, 4, 2))
    assert launcher.variant.block_r == padded
    _, spec = describe_forward(ForwardOperands(x, weight, a, b, None, 2.0, 0.0, None))
    assert triton_lora.prepare(spec, TileConfig(block_m, 64, 64, 8, 4, 2)).variant.block_r == 16, "without dropout"
