"""The host's side of a launch on rows in segments: the grid, the tile, what a description says, the bytes that move."""

import dataclasses
import random
from collections import defaultdict
from unittest import mock

import pytest
import torch

from fastlora import dispatch
from fastlora.backends.configs import FEW_ROWS, choose_config
from fastlora.backends.target import Target
from fastlora.backends.triton import segment_kernels, segment_launch
from fastlora.problem import Needs
from fastlora.segments import GroupedBackward, GroupedForward, Segments, describe_segments
from tests.emulator import LaunchOptions
from tests.support import segment_checks, segments, specialisations
from tests.support.triton_checks import SMALL, needs_compiler


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
    monkeypatch.setattr(dispatch, "triton_unusable", lambda device=None: None)
    monkeypatch.setattr(dispatch, "target_of", lambda device: Target(90, 132))
    name, passed_over = dispatch.select_backend(spec_of(dtype)._replace(device=torch.device("cuda", 0)), None)
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
    where = operands.segments
    yield operands._replace(segments=where._replace(ends=specialisations.off_by_one(where.ends)))
    if where.experts is not None:
        yield operands._replace(segments=where._replace(experts=specialisations.off_by_one(where.experts)))


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
