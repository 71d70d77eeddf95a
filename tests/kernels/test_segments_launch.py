"""The host's side of a launch on rows in segments: the grid, the tile, what a description says, the bytes that move."""

import dataclasses
import itertools
import random
from collections import defaultdict
from unittest import mock

import pytest
import torch

from fastlora import selection
from fastlora.backends.configs import FEW_ROWS, TileConfig, choose_config, gradients_last
from fastlora.backends.target import Target
from fastlora.backends.triton import segment_kernels, segment_launch
from fastlora.problem import Needs
from fastlora.segments import GroupedBackward, GroupedForward, Segments, describe_segments
from tests.emulator import LaunchOptions
from tests.support import segment_checks, segments, specialisations
from tests.support.triton_checks import SMALL, needs_compiler

ALL = Needs(True, True, True, True)


def test_no_segments_have_more_row_blocks_than_the_grid():
    draw = random.Random(0)
    for _ in range(2000):
        block_m, lengths = draw.choice((1, 16, 64)), [draw.randrange(0, 70) for _ in range(draw.randrange(1, 9))]
        blocks = sum(-(-length // block_m) for length in lengths)
        assert blocks <= segment_launch.most_blocks(sum(lengths), len(lengths), block_m)
    assert segment_launch.most_blocks(3 + 2 * 64, 3, 64) == 5 == sum(-(-length // 64) for length in (1, 1, 129))
    assert segment_launch.most_blocks(3, 100, 64) == 3 and segment_launch.most_blocks(128, 1, 64) == 2


def test_a_tile_is_as_tall_as_segments_are_long():
    def height(m, n_segments, direction="backward"):
        return choose_config(
            direction, m, 4096, 4096, 16, arch=90, n_sms=132, element_size=2, aligned=True, n_segments=n_segments
        ).block_m

    assert height(8192, 1) == height(8192 * 16, 16) == 128 and height(8192, 128) == 64
    assert height(FEW_ROWS * 128, 128, "forward") == 64 and height(128, 128, "forward") == 16


def spec_of(dtype=torch.bfloat16, r=16, **options):
    case = segments.draw_case([4, 4], 32, 48, r, torch.float32, **options).to(dtype)
    where = Segments(case.ends, case.experts, case.adapters)
    given = (case.x, case.weight, case.lora_a, case.lora_b, case.bias, 1.0, None, where, case.transposed, 0.0, None)
    return describe_segments(GroupedForward(*given))[1]


def test_what_is_not_served_is_refused_with_its_reason():
    assert segment_launch.why_unsupported(spec_of(transposed=True)) is None
    assert "float64" in segment_launch.why_unsupported(spec_of(torch.float64))
    assert "rank 257 is above 256" in segment_launch.why_unsupported(spec_of(r=257))
    packed = spec_of()._replace(base_format="nf4")
    assert "no kernel for a nf4 base weight" in segment_launch.why_unsupported(packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_triton_is_asked_before_torchs_grouped_products(monkeypatch, dtype):
    """A GPU that is not there is none that anything is known of; the CUDA kernels' reason is counted."""
    monkeypatch.setattr(selection, "triton_unusable", lambda device=None: None)
    monkeypatch.setattr(selection, "target_of", lambda device: Target(90, 132))
    name, passed_over = selection.select_backend(spec_of(dtype)._replace(device=torch.device("cuda", 0)), None)
    assert name == "triton" and [reason.split(":")[0] for reason in passed_over] == ["cuda"]


def called(draw: random.Random) -> tuple:
    """Operands of a small call that "meta" tensors do for, and a backward's needs."""
    dtype = draw.choice((torch.float16, torch.bfloat16, torch.float32))
    m, n, k, r, g = draw.choice((8, 40)), draw.choice((16, 40)), draw.choice((1, 32, 40)), draw.choice((1, 16)), 3
    e, t = draw.choice((1, 3)), 3
    index = draw.choice((torch.int32, torch.int64))
    experts, adapters = (draw.choice((None, torch.zeros(g, dtype=index))) for _ in range(2))
    where = Segments(torch.zeros(g, dtype=torch.int32), experts, adapters)
    weight = torch.zeros(e, n, k, dtype=draw.choice((dtype, torch.float32)))
    a, b = (torch.zeros(t, *shape, dtype=draw.choice((dtype, torch.float32))) for shape in ((r, k), (n, r)))
    scaling, scalings = draw.choice(((2.0, None), (0.5, None), (1.0, torch.zeros(t)), (1.0, torch.zeros(t).half())))
    drop = draw.choice(((0.0, None), (0.1, torch.tensor(2**40))))
    if draw.random() < 0.5:
        bias = draw.choice((None, torch.zeros(n, dtype=dtype), torch.zeros(e, n, dtype=dtype)))
        x = torch.zeros(m, k, dtype=dtype)
        return (GroupedForward(x, weight, a, b, bias, scaling, scalings, where, False, *drop),)
    dy, x, s = (torch.zeros(m, width, dtype=dtype) for width in (n, k, r))
    needs = Needs(draw.random() < 0.5, True, draw.random() < 0.7, draw.random() < 0.5)
    return GroupedBackward(dy, x, weight, a, b, s, 2, scaling, scalings, where, False, *drop), needs


def altered(operands):
    """The same call with one thing changed: how an operand lies in memory, or where segments come from."""
    yield operands
    for name, value in operands._asdict().items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 0:
            for lie in (torch.clone, specialisations.off_by_one, lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]]):
                yield operands._replace(**{name: lie(value)})
    if operands.scalings is None:
        yield from (operands._replace(scaling=scaling) for scaling in (1.0, 1.5, 64.0))
    if operands.seed is not None:
        yield operands._replace(dropout_p=0.25)
        yield from (operands._replace(seed=seed) for seed in (torch.tensor(5), operands.seed.to("meta")))
    where = operands.segments
    yield operands._replace(segments=where._replace(ends=specialisations.off_by_one(where.ends)))
    if where.experts is not None:
        yield operands._replace(segments=where._replace(experts=specialisations.off_by_one(where.experts)))


TILE = TileConfig(32, 64, 16, 2, 4, 3, gradient_m=64, gradient_n=32)  # of numbers that are all unlike


def prepared(needs: Needs | None = None, config: TileConfig = TILE, m: int = 100, g: int = 3, r: int = 16, **options):
    """A launch on an sm_90: of a forward, or of a backward with these needs. N is 96, K 160; E is 18, T 17."""
    shape = {"n_weights": 18, "n_adapters": 17, "experts": [0] * g, "adapters": [0] * g, "bias": "each"}
    case = segments.draw_case([m] + [0] * (g - 1), 96, 160, r, torch.bfloat16, **shape | options)
    where = Segments(case.ends, case.experts, case.adapters)
    factors = case.weight, case.lora_a, case.lora_b
    if needs is None:
        _, spec = describe_segments(GroupedForward(case.x, *factors, case.bias, 2.0, None, where, False, 0.0, None))
    else:
        s = case.x.new_empty(m, r)
        given = GroupedBackward(case.dy, case.x, *factors, s, case.bias.dim(), 2.0, None, where, False, 0.0, None)
        _, spec = describe_segments(given, needs)
    with mock.patch.object(segment_launch, "target_of", lambda device: Target(90, 132)):
        return segment_launch.prepare(spec, config)


def test_a_forward_has_a_program_for_every_tile_that_there_may_be():
    """100 rows in four segments, those past the last end included, have at most 7 blocks of 32."""
    fused, separate = prepared(), prepared(config=dataclasses.replace(TILE, fused=False))
    assert fused.n_rows == separate.n_rows == 7 and fused.launch.grid == 7 * 2 and separate.launch.grid == 7 * 3
    assert fused.n_words == separate.n_words == 2 + 7
    assert fused.y_shape == (100, 96) and fused.s_shape == (100, 16)
    assert fused.numbers == (160, 160, 96 * 160)
    assert not fused.variant.tma and not fused.variant.tma_down and fused.variant.segments


@pytest.mark.parametrize(
    "r, fuses, fused, block_r", ((16, False, False, 16), (64, True, True, 64), (72, True, False, 128))
)
def test_s_is_made_by_column_0_up_to_a_rank(r, fuses, fused, block_r):
    config = dataclasses.replace(TILE, fused=fuses)
    for launch in (prepared(config=config, r=r), prepared(ALL, config, r=r)):
        assert (launch.variant.fused, launch.variant.block_r) == (fused, block_r)
    assert not prepared(ALL._replace(dx=False), config, r=r).variant.fused, "nothing but dS is made then"


@pytest.mark.parametrize("direction", ("forward", "backward"))
@pytest.mark.parametrize("k", (160, 152))
def test_the_tables_are_asked_for_the_sizes_of_a_segment(direction, k):
    """Triton knows wide loads of rows that are multiples of 16 elements."""
    asked = mock.patch.object(segment_launch, "choose_config", mock.Mock(return_value=TILE))
    spec = described(300, 96, k, 3)[1]._replace(direction=direction)
    with asked as found:
        assert segment_launch._choose(spec, Target(80, 132)) == TILE
    assert found.call_args.args == (direction, 300, 96, k, 16)
    assert found.call_args.kwargs == {
        "arch": 80, "n_sms": 132, "element_size": 2, "aligned": k == 160, "dropout": False, "n_segments": 3,
    }  # fmt: skip
    for operand in ("act", "weight"):
        unaligned = spec._replace(aligned=spec.aligned._replace(**{operand: False}))
        with asked as found:
            segment_launch._choose(unaligned, Target(80, 132))
        assert not found.call_args.kwargs["aligned"]


@pytest.mark.parametrize("g, block_g", ((1, 32), (31, 32), (32, 256), (300, 256)))
def test_segments_are_looked_at_a_few_or_many_together(g, block_g):
    """32 segments are more than a warp's worth, with the rows past the last end."""
    assert prepared(g=g).variant.block_g == block_g


@pytest.mark.parametrize(
    "needs", [Needs(*wanted) for wanted in itertools.product((False, True), repeat=4)][1:], ids=str
)
def test_a_backward_has_tiles_of_what_is_wanted(needs):
    """3 columns of dX; 5, 3 and 3 of dA, dB and dbias in each of 4 groups of row blocks, and for every 16 adapters or
    biases once more, where no row adds anything to them; a counter for each."""
    launch = prepared(needs)
    of_adapters, of_biases = 5 * needs.da + 3 * needs.db, 3 * needs.dbias
    columns = 3 if needs.dx else int(needs.da)
    assert launch.launch.grid == 7 * columns + 4 * (of_adapters + of_biases) + 2 * (of_adapters + of_biases)
    assert launch.n_words == 2 + 7 + 17 * of_adapters + 18 * of_biases
    assert launch.numbers == (columns, needs.dx, 7, 96, 160 * needs.da, 160, 96 * 160)
    dx, ds, da, db, dbias, of_a, of_b, of_bias = launch.outputs
    half, single = torch.bfloat16, torch.float32
    assert dx == (((100, 160), half) if needs.dx else None)
    assert ds == (((100, 16), half) if needs.dx or needs.da else None)
    assert da == (((17, 16, 160), half) if needs.da else None) and (da is None) == (of_a is None)
    assert db == (((17, 96, 16), half) if needs.db else None) and (db is None) == (of_b is None)
    assert dbias == (((18, 96), half) if needs.dbias else None) and (dbias is None) == (of_bias is None)
    assert of_a in (None, ((17, 160, 16), single)) and of_b in (None, ((17, 96, 16), single))
    assert of_bias in (None, ((18, 96), single))


@pytest.mark.parametrize("given", ({}, {"adapters": None, "n_adapters": 3}, {"experts": None, "n_weights": 3}), ids=str)
@pytest.mark.parametrize("m", (8, 300))
def test_sums_are_kept_between_steps_where_there_may_be_several(given, m):
    """One group of row blocks or several; segments that may share what they use, or have their own."""
    *_, of_a, of_b, of_bias = prepared(ALL, dataclasses.replace(TILE, group_m=8), m, **given).outputs
    assert (of_a is not None) == (of_b is not None) == (m > 8 or "adapters" not in given)
    assert (of_bias is not None) == (m > 8 or "experts" not in given)


@pytest.mark.parametrize("m, n, k", ((8192, 256, 4096), (256, 4096, 256), (512, 16384, 128)))
def test_gradient_tiles_are_queued_where_the_rule_says(m, n, k):
    _, spec = described(m, n, k)
    with mock.patch.object(segment_launch, "target_of", lambda device: Target(90, 132)):
        numbers = segment_launch.prepare(spec, TILE).numbers
    assert numbers[1] == gradients_last(m, k, n, TILE.block_m, TILE.block_n)


def described(m: int, n: int, k: int, g: int = 2):
    """Of a backward with all gradients, on "meta"."""

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    where = Segments(meta(g, dtype=torch.int32), None, None)
    given = (meta(m, n), meta(m, k), meta(g, n, k), meta(g, 16, k), meta(g, n, 16), meta(m, 16))
    return describe_segments(GroupedBackward(*given, 0, 2.0, None, where, False, 0.0, None), ALL._replace(dbias=False))


@pytest.mark.parametrize("aligned", (True, False))
@pytest.mark.parametrize("rank", (64, 65))
def test_tiles_are_narrower_where_they_would_spill(rank, aligned):
    wide, tall = TileConfig(32, 256, 128, 8, 8, 3, slice_n=64, gradient_n=32), TileConfig(16, 64, 128, 8, 8, 3)
    of_wide, of_tall = (segment_launch.without_spill(config, rank, aligned) for config in (wide, tall))
    if rank == 64:
        assert of_wide == dataclasses.replace(wide, block_k=64) and of_tall == tall
    else:
        assert of_wide == dataclasses.replace(wide, block_k=64, block_n=128, slice_n=32)
        assert of_tall == dataclasses.replace(tall, slice_n=32, gradient_n=64 if aligned else 16)


@needs_compiler
def test_calls_of_one_description_have_one_kernel():
    """By Triton's own keys, as test_triton_launch.py has it for one adapter."""
    draw, kernels, calls = random.Random(0), defaultdict(set), 0
    for call in (called(draw) for _ in range(12)):
        for operands in altered(call[0]):
            taken, spec = describe_segments(operands, *call[1:])
            device = mock.patch.object(segment_launch, "target_of", lambda device: Target(90, 132))
            with device, specialisations.asked_for(90) as found:
                segment_launch.prepare(spec).compile(taken)
            kernels[spec] |= found
            calls += 1
    assert calls > 1.5 * len(kernels), "too few calls have anything in common"
    assert max(map(len, kernels.values())) == 1


@needs_compiler
def test_no_number_of_segments_is_compiled_for():
    for kernel in (segment_kernels.segments_forward_kernel, segment_kernels.segments_backward_kernel):
        by_name = {param.name: param for param in kernel.params}
        names = ("M", "n_segments", "n_weights", "n_adapters", "n_biases", "n_words", "wave", "ends_ptr", "experts_ptr")
        assert all(by_name[name].do_not_specialize for name in names)


@needs_compiler
def test_what_a_launch_reads_and_writes(own_workspace, poisoned):
    """Each row block reads its own segment's weight, once; X is read once for a column of tiles; S is written once."""
    n, k, r = segment_checks.SIZES
    config = dataclasses.replace(SMALL[80], fused=True)
    case = segment_checks.draw("ragged", n, k, r, torch.bfloat16)
    lengths, given = segment_checks.LAYOUTS["ragged"]
    _, (forward, backward) = segment_checks.run(case, config, 80, LaunchOptions(resident=1))
    blocks = sum(-(-length // config.block_m) for length in lengths)
    m = sum(lengths)
    branched = sum(length for length, adapter in zip(lengths, given["adapters"], strict=True) if adapter >= 0)
    columns, columns_dx = -(-n // config.block_n), -(-k // config.block_n)

    def read(stats, name):
        return stats.buffers[name].bytes_read

    def written(stats, name):
        return stats.buffers[name].bytes_written

    assert read(forward, "weight_ptr") == blocks * n * k * 2
    assert read(backward, "weight_ptr") == blocks * n * k * 2
    assert read(forward, "x_ptr") == columns * clamped(lengths, config.block_m) * k * 2
    assert written(forward, "s_ptr") == branched * r * 2 == written(backward, "ds_ptr")
    assert written(forward, "y_ptr") == len(case.x) * n * 2 and written(backward, "dx_ptr") == len(case.x) * k * 2
    # Sums read their rows once.
    assert read(backward, "x_ptr") == branched * k * 2
    assert read(backward, "dy_ptr") == (columns_dx * clamped(lengths, config.block_m) + branched) * n * 2
    for stats in (forward, backward):
        assert all(
            b.bytes_written == b.first_touch_written
            for name, b in stats.buffers.items()
            if "partial" not in name and "workspace" not in name
        )
    assert m == int(case.ends[-1])


def clamped(lengths: list[int], block_m: int) -> int:
    """Rows that row blocks load: past a segment's end its last one is repeated."""
    return sum(-(-length // block_m) * block_m for length in lengths)
