"""The CUDA backend without a device: what it refuses, which tiles it chooses, how it fails, what its kernels use."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cuda_resources
from benchmarks.schedule import queue_order
from fastlora.backends import workspace
from fastlora.backends.cuda import launch as cuda
from fastlora.problem import Aligned, LaunchSpec, Sizes

SIZES = dict(backward=False, half=False, dropout=False, group_m=4, splits=1, fused=False, ctas=4, m=64, n=64, k=64, r=8)
needs_extension = pytest.mark.skipif(cuda._extension()[0] is None, reason=f"{cuda._extension()[1]}")


def spec(m=128, n=64, k=64, r=8, dtype=torch.bfloat16, direction="forward", **changes) -> LaunchSpec:
    return LaunchSpec(direction, Sizes(m, n, k, r), dtype, (dtype, dtype), torch.device("cuda", 0), **changes)


@pytest.mark.parametrize(
    "changes, reason",
    (
        ({"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
        ({"r": 264}, "rank 264 is above 256"),
        ({"r": 1}, "rank 1 must be multiples of 8"),
        ({"n": 33}, "out_features 33"),
        ({"k": 100}, "in_features 100"),
        ({"aligned": Aligned(True, True, True, False, True)}, "does not start on 16 bytes"),
        ({"m": 2**31}, "does not fit 32 bits"),
    ),
)
def test_refusals_name_their_reason(changes, reason):
    assert reason in cuda.why_not_compiled(spec(**changes))


def test_tensors_elsewhere_are_refused(monkeypatch):
    """Where there is a GPU: a launch would take a CPU tensor's address for one of the GPU's."""
    monkeypatch.setattr(cuda, "unusable", lambda device=None: None)
    assert cuda.why_unsupported(spec()) is None
    on_cpu = spec()._replace(device=torch.device("cpu"))
    assert cuda.why_unsupported(on_cpu) == "the tensors are on cpu"


def test_each_device_is_asked_for_its_own_capability(monkeypatch):
    """Two GPUs of a machine need not be alike."""
    capabilities = {torch.device("cuda", 0): (8, 0), torch.device("cuda", 1): (9, 0)}
    extension = type("Extension", (), {"device_count": staticmethod(lambda: 2)})
    monkeypatch.setattr(cuda, "_extension", lambda: (extension, None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    cuda.unusable.cache_clear()
    try:
        assert "this device has 8.0" in cuda.why_unsupported(spec())
        assert cuda.why_unsupported(spec()._replace(device=torch.device("cuda", 1))) is None
    finally:
        cuda.unusable.cache_clear()


def test_slices_for_captured_launches_are_aligned_and_apart(monkeypatch):
    """Triton would compile anew, during the capture, for a pointer that is less aligned than the one before."""
    pool = torch.zeros(1024, dtype=torch.int32)
    cpu = torch.device("cpu")
    monkeypatch.setattr(workspace, "_pools", {cpu: pool})
    monkeypatch.setattr(workspace, "_held_by_graphs", [])
    slices = [workspace._for_capture(n_words, cpu) for n_words in (5, 33, 64)]
    offsets = [(each.data_ptr() - pool.data_ptr()) // 4 for each in slices]
    assert offsets == [0, 32, 96] and all(len(each) >= n for each, n in zip(slices, (5, 33, 64), strict=True))
    alone = workspace._for_capture(2000, cpu)
    assert len(alone) >= 2000 and not alone.any() and workspace._held_by_graphs == [*slices, alone]


def test_nothing_is_refused_without_a_reason():
    assert cuda.why_not_compiled(spec()) is None
    assert cuda.why_not_compiled(spec(dtype=torch.float16, r=256, m=1)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_the_backend_says_so():
    assert cuda.why_unsupported(spec())


@pytest.mark.parametrize("n_sms", (1, 132))
@pytest.mark.parametrize("m", (1, 16, 64, 128, 512, 2048, 8192, 16384))
@pytest.mark.parametrize("n, k", ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8, 8), (1024, 1024)))
@pytest.mark.parametrize("r", (8, 64, 72, 256))
def test_every_choice_of_tile_can_be_launched(m, n, k, r, n_sms):
    tile = cuda.choose_tile(m, n, k, r, n_sms)
    assert tile.splits <= -(-k // cuda.STEP)
    if r > cuda.SMALL_TILE_RANK:
        assert tile == (cuda.SHORT_WIDE_TILE if m <= 2048 else cuda.WIDE_TILE) and not tile.fused


def test_choices_of_tile():
    """Large problems take the large tile; few rows take a small one, enough of them to busy the chip's memory."""
    for large in ((16384, 4096, 4096, 16), (16384, 14336, 4096, 64)):
        assert cuda.choose_tile(*large, 132) == replace(cuda.WIDE_TILE, fused=True)
    # In few waves a wait for S would be felt.
    assert cuda.choose_tile(8192, 4096, 4096, 16, 132) == cuda.WIDE_TILE
    assert cuda.choose_tile(2048, 4096, 4096, 16, 132) == cuda.SHORT_WIDE_TILE
    few = cuda.choose_tile(16, 4096, 4096, 16, 132)
    assert few.block_m == 64 and (4096 // few.block_n) * few.splits > 100
    assert cuda.choose_tile(128, 4096, 4096, 16, 132).splits > 1


@needs_extension
@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("tile", ((128, 256), (128, 128)))
@pytest.mark.parametrize("m, ctas, group_m", ((128, 2, 2), (1300, 2, 4), (4096, 8, 6), (4100, 64, 16), (9000, 132, 16)))
def test_the_queue_is_the_modelled_one(m, ctas, group_m, tile, fused):
    """Tile by tile what benchmarks/schedule/queue_order.py says, so that the schedule model is one of these kernels."""
    n, k, (block_m, block_n) = 1100, 520, tile
    n, cluster, grad_columns = n - n % 8, 2 if block_n == 256 else 1, 256 if block_n == 256 else 128
    plan = cuda._extension()[0].Plan(
        backward=True, half=False, dropout=False, block_m=block_m, block_n=block_n, m=m, n=n, k=k, r=16,
        group_m=group_m, splits=1, fused=fused, ctas=ctas, makes_c=True, grad_a=True, grad_b=True, grad_bias=True,
    )  # fmt: skip
    rows, columns = -(-m // (block_m * cluster)), -(-n // block_n)
    blocks_b, blocks_a = (-(-size // (grad_columns * cluster)) for size in (k, n))
    schedule = queue_order.Schedule(group_m=-(-group_m // cluster), fused=fused)
    expected = queue_order.build_queue(rows, columns, 1, (blocks_b, blocks_a), schedule, plan.ctas // cluster)

    def as_listed(tile: queue_order.Tile) -> tuple[int, int, int, int]:
        if tile.kind in ("dA", "dB"):
            return tile.block, 0, 0, tile.column + (blocks_b if tile.kind == "dA" else 0)
        return tile.block, 0 if tile.kind == "shrink" else tile.column + (not fused), 0, -1

    assert [tuple(tile) for tile in plan.queue()] == [as_listed(tile) for tile in expected]


@needs_extension
@pytest.mark.parametrize("m, ctas", ((64, 4), (300, 4), (1500, 20)))
def test_each_part_of_a_split_tile_is_claimed_once_and_in_order(m, ctas):
    """The last part waits for the others, and every tile for its row's column 0: both must be claimed before."""
    plan = cuda._extension()[0].Plan(
        **{**SIZES, "m": m, "n": 264, "k": 520, "splits": 3, "group_m": 2, "ctas": ctas}, block_m=128, block_n=128
    )
    place = {tuple(tile): i for i, tile in enumerate(plan.queue())}
    assert len(place) == len(plan.queue()) == -(-m // 128) * (3 + 1) * 3
    for (row, column, part, _), i in place.items():
        assert part == 0 or place[row, column, part - 1, -1] < i
        assert column == 0 or place[row, 0, 2, -1] < i


@needs_extension
def test_plans_that_cannot_be_launched_say_why():
    make = cuda._extension()[0].Plan
    with pytest.raises(ValueError, match=r"no compiled kernel serves forward, tile 96x128, M=64 N=64 K=64 R=8"):
        make(**SIZES, block_m=96, block_n=128)
    with pytest.raises(ValueError, match="no compiled kernel"):
        make(**{**SIZES, "r": 128}, block_m=64, block_n=128)
    with pytest.raises(ValueError, match="multiples of 8"):
        make(**{**SIZES, "k": 60}, block_m=64, block_n=128)
    with pytest.raises(ValueError, match="splits"):
        make(**{**SIZES, "splits": 2}, block_m=128, block_n=256)


def arguments(plan, **changes):
    """Addresses that a plan of SIZES, with all gradients, can be launched with; None takes one out."""
    matrices = {"u": 64, "v": 64, "a": 64, "b": 8, "c": 64, "x": 64, "saved": 8}
    given = {name: (1 << 20, stride) for name, stride in matrices.items()}
    given |= dict.fromkeys(("s", "grad_a", "grad_b", "grad_bias", "workspace"), 1 << 20)
    if not plan.variant["backward"]:
        given = {n: t for n, t in given.items() if n not in ("x", "saved", "grad_a", "grad_b", "grad_bias")}
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


@needs_extension
@pytest.mark.parametrize("backward", (False, True))
def test_operands_that_no_kernel_can_read_are_refused(backward):
    gradients = dict.fromkeys(("grad_a", "grad_b", "grad_bias"), backward)
    plan = cuda._extension()[0].Plan(**{**SIZES, "backward": backward, **gradients}, block_m=64, block_n=128)
    plan.parameters(**arguments(plan))
    for name in arguments(plan):
        with pytest.raises(ValueError, match=f"operand {name} is missing"):
            plan.parameters(**arguments(plan, **{name: None}))
    for changes, reason in (
        ({"u": (1 << 20 | 8, 64)}, "u does not start on 16 bytes"),
        ({"v": (1 << 20, 68)}, "v has rows of 64 elements 68 apart"),
        ({"u": (1 << 20, 0)}, "they must not overlap"),
        ({"u": (1 << 20, 56)}, "they must not overlap"),
        ({"s": 1 << 20 | 4}, "s does not start on 16 bytes"),
        ({"gradient_sums": 1 << 20}, "gradient_sums is given to a launch that has no use for it"),
        ({"tile_parts": 1 << 20}, "tile_parts is given to a launch that has no use for it"),
        ({"seed_address": 1 << 20}, "seed_address is given to a launch that has no use for it"),
        ({"drop_threshold": 1}, "dropout is asked of a kernel without"),
        ({"branch_scale": 2.0}, "only fp16 kernels scale the branch"),
        ({"bias": 1 << 20} if backward else {"x": (1 << 20, 64)}, "is given to a launch that has no use for it"),
        ({"bias": 1 << 20 | 2} if not backward else {"grad_a": 1 << 20 | 1}, "does not start on"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan.parameters(**arguments(plan, **changes))


@needs_extension
def test_a_gradient_that_is_not_made_has_no_place_to_go():
    make = cuda._extension()[0].Plan
    plan = make(**{**SIZES, "backward": True}, block_m=64, block_n=128)
    with pytest.raises(ValueError, match="operand x is given"):
        plan.parameters(**arguments(plan, grad_a=None, grad_b=None, grad_bias=None))
    with pytest.raises(ValueError, match="a forward makes no gradients"):
        make(**SIZES, block_m=64, block_n=128, grad_a=True)


@needs_extension
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_the_extension_loads_without_a_driver_and_a_launch_says_what_is_missing():
    module = cuda._extension()[0]
    assert module.device_count() == 0
    plan = module.Plan(**SIZES, block_m=64, block_n=128)
    with pytest.raises(RuntimeError, match=r"no CUDA device or no driver: .*_bf16_64x128_r16 M=64 N=64 K=64 R=8"):
        plan.launch(device=0, stream=0)


@needs_extension
def test_the_extension_needs_neither_torch_nor_the_driver_library():
    path = cuda._extension()[0].__file__
    code = (
        "import importlib.util as util\n"
        f"spec = util.spec_from_file_location('_C', {path!r})\n"
        "module = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(len(module.variants()))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(cuda._extension()[0].variants())
    needed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "libtorch" not in needed


@needs_extension
def test_kernels_use_what_the_table_says():
    table = json.loads(cuda_resources.TABLE.read_text())
    assert cuda_resources.differences(table) == []
    assert cuda_resources.faults(table) == []
    assert cuda_resources.TABLE.with_suffix(".md").read_text() == cuda_resources.as_markdown(table)


def test_the_gate_sees_faults():
    good = {"registers": 168, "stack": 0, "spilled": 0, "shared": 1}
    good |= dict.fromkeys(cuda_resources.REQUIRED, 1) | dict.fromkeys(cuda_resources.FORBIDDEN, 0)
    table = {"remarks": [], "kernels": {"k": good}}
    assert cuda_resources.faults(table) == []
    for change in ({"stack": 8}, {"spilled": 4}, {"shared": 1 << 20}, {"HGMMA": 0}, {"STL": 1}):
        assert cuda_resources.faults({**table, "kernels": {"k": good | change}}), change
    assert cuda_resources.faults({**table, "remarks": ["(C7510) serialised"]})


# A product loop, a wait that lies behind everything else and returns into it, and what the last lane does after it.
LOOP = """
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR8], R11 ;   /* 0x0 */
        /*0020*/              @!P0 BRA 0x90 ;                                        /* 0x0 */
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;   /* 0x0 */
        /*0040*/              @!P1 {barrier} ;                                       /* 0x0 */
        /*0050*/              @!P0 BRA 0x10 ;                                        /* 0x0 */
        /*0060*/                   MEMBAR.ALL.GPU ;                                  /* 0x0 */
        /*0070*/                   REDG.E.ADD.S32.STRONG.GPU desc[UR4][R2.64], R5 ;  /* 0x0 */
        /*0080*/                   BRA 0x10 ;                                        /* 0x0 */
        /*0090*/                   BRA 0x30 ;                                        /* 0x0 */
"""


@pytest.mark.parametrize("barrier, count", (("MEMBAR.ALL.GPU", 1), ("MEMBAR.SC.GPU", 1), ("MEMBAR.ALL.CTA", 0)))
def test_the_gate_counts_memory_barriers_in_product_loops_alone(barrier, count):
    found = cuda_resources.read_instructions(LOOP.replace("{barrier}", barrier))
    assert found[cuda_resources.BARRIERS] == count and found["HGMMA"] == 1


def test_the_build_needs_no_package_that_torch_or_the_path_can_stand_in_for(monkeypatch, tmp_path):
    setup = cuda_resources.load_setup()
    installed = importlib.util.find_spec
    without = {"pybind11", "ninja"}
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None if name in without else installed(name))
    assert (Path(setup.pybind11_include()) / "pybind11" / "pybind11.h").exists()
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert setup.ninja_command() == ["/usr/bin/ninja"]
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install ninja"):
        setup.ninja_command()
    without.add("torch")
    with pytest.raises(RuntimeError, match="pip install pybind11"):
        setup.pybind11_include()
