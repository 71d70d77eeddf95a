"""Plans of CUDA launches over rows in segments: what is refused, and what a kernel is given."""

import random
import struct

import pytest

from tests.support import cuda_runtime
from tests.support.cuda_plans import BACKWARD_ONLY, IN, MATRICES, OUT, SIZES, TILE, VECTORS, M, R, arguments, make_plan

pytestmark = pytest.mark.skipif(cuda_runtime.unavailable() is not None, reason=f"{cuda_runtime.unavailable()}")


OF_SEGMENTS = {"n_segments": 5, "n_weights": 3, "n_adapters": 40, "n_biases": 3}


@pytest.mark.parametrize(
    "changes, reason",
    (
        ({"n_segments": 1024}, "a kernel takes 1 to 1023 segments"),
        ({"n_segments": 0}, "there are no stacks without segments"),
        ({"n_segments": -1}, "a kernel takes 1 to 1023 segments"),
        ({"n_weights": 0}, "one weight and adapter at least"),
        ({"n_adapters": 0}, "one weight and adapter at least"),
        ({"n_biases": 2}, "there is one bias, or one for each weight"),
        ({"backward": True, "grad_bias": True}, "no kernel for rows in segments makes the bias's gradient"),
        ({"k": 128, "splits": 2}, "bad group_m, ctas or splits"),
        ({"fused": True}, "S cannot be fused"),
        ({"dropout": True}, "no compiled kernel serves this: forward, 5 segments"),
    ),
    ids=str,
)
def test_segments_that_no_kernel_takes_are_refused(changes, reason):
    make_plan(**{**SIZES, **TILE, **OF_SEGMENTS})
    with pytest.raises(ValueError, match=reason):
        make_plan(**{**SIZES, **TILE, **OF_SEGMENTS, **changes})


def test_no_segments_have_more_row_blocks_than_a_plan():
    draw = random.Random(0)
    for _ in range(500):
        tile, lengths = draw.choice((64, 128)), [draw.randrange(0, 300) for _ in range(draw.randrange(1, 9))]
        rows_after = draw.choice((0, 0, 200))
        stacks = {**OF_SEGMENTS, "n_segments": len(lengths)}
        plan = make_plan(**{**SIZES, **stacks, "m": sum(lengths) + rows_after + 1}, block_m=tile, block_n=128)
        blocks = sum(-(-length // tile) for length in (*lengths, rows_after + 1))
        assert plan.s_rows >= blocks * tile
    assert make_plan(**{**SIZES, **TILE, **OF_SEGMENTS, "m": 3}).s_rows == 3 * 64, "a row block has a row at least"
    assert make_plan(**{**SIZES, **TILE, **OF_SEGMENTS, "m": 640}).s_rows == (640 + 6 * 63) // 64 * 64
    assert make_plan(**{**SIZES, **TILE, "m": 640}).s_rows == 640


def test_what_a_backward_of_segments_takes_of_memory():
    """15 row blocks at most, 2 columns of dX and 1 of S, 2 tiles of dA and 3 of dB of each adapter."""
    sizes = {"m": 640, "n": 256, "k": 384, "backward": True, "grad_a": True, "grad_b": True}
    plan = make_plan(**{**SIZES, **TILE, **sizes, **OF_SEGMENTS})
    assert plan.workspace_words == 2 + 15 + 2 * 40 * 5
    assert plan.gradient_partial_floats == 40 * 5 * plan.variant["gradient_partial_floats"]
    assert plan.variant["segments"] and plan.variant["name"].endswith("_segments")


def described_segments(backward: bool, transposed: bool, **changes) -> tuple[bytes, dict[int, list[tuple]]]:
    """As ``described``; sizes are (matrices, rows, columns), and the stride goes from matrix to matrix."""
    columns = {"act": OUT if backward else IN, "weight": OUT if transposed else IN, "lora_a": IN, "lora_b": R}
    columns |= {"saved_s": R, "out": IN if backward else OUT, "layer_input": IN}
    gradients = dict.fromkeys(("grad_a", "grad_b"), backward)
    problem = {**SIZES, "m": M, "k": columns["act"], "n": columns["out"], "r": R, **gradients, **OF_SEGMENTS}
    problem |= {"backward": backward, "transposed": transposed, "n_biases": 0 if backward else 3}
    plan = make_plan(**problem, block_m=128, block_n=128)
    given: dict = {name: (number << 20, columns[name]) for name, number in MATRICES.items()}
    given |= {name: number << 20 for name, number in VECTORS.items() if name != "grad_bias"} | {"scale_in_s": 1.5}
    of_segments = ("ends", "experts", "adapters", "scalings", "kept_s")
    given |= {name: number << 20 for number, name in enumerate(of_segments, 20)} | {"weight_stride": 10**6}
    unused = ("bias", "kept_s") if backward else (*BACKWARD_ONLY, "gradient_partials")
    kept = {name: value for name, value in {**given, **changes}.items() if name not in unused and value is not None}
    packed, maps = plan.parameters(**kept)
    found: dict[int, list[tuple]] = {}
    for each in maps:
        sizes = (
            (each["matrices"], each["rows"], each["columns"]) if each["matrices"] else (each["rows"], each["columns"])
        )
        found.setdefault(each["address"] >> 20, []).append((sizes, each["matrix_stride_bytes"] // 2, each["box"]))
    return packed, found


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("backward", (False, True))
def test_the_maps_of_segments(backward, transposed):
    """Of stacks: a box lies in one matrix of them, and what it has beyond that is zero."""
    weight = (3, IN, OUT) if transposed else (3, OUT, IN)
    box = (128, 64) if backward == transposed else (64, 64)
    blocks = (M + 6 * 127) // 128
    found = described_segments(backward, transposed)[1]
    assert found[2] == [(weight, 10**6, box)]
    assert found[3] == [((40, R, IN), R * IN, (64, 64))] and found[4] == [((40, OUT, R), OUT * R, (64, 64))]
    assert found[8] == [((blocks * 128, R), 0, (64, 64))]
    if backward:
        assert found[7] == [((M, R), 0, (64, 64))]
    else:
        assert found[9] == [((3, OUT), 0, (1, 128))]


@pytest.mark.parametrize("backward", (False, True))
def test_what_a_kernel_reads_of_segments_is_passed_in_its_place(backward):
    packed, _ = described_segments(backward, False)
    words = struct.unpack_from(f"<{len(packed) // 8}Q", packed)
    at = words.index(20 << 20)
    kept = 0 if backward else 24 << 20
    assert words[at : at + 7] == (20 << 20, 21 << 20, 22 << 20, 23 << 20, 5 << 20, kept, IN if backward else OUT)
    wide, _ = described_segments(backward, False, wide_experts=True)
    numbers = struct.unpack_from("<6i", wide, 8 * (at + 7))
    assert numbers == (1, 0, 5, 3, 40, 0 if backward else 3)


@pytest.mark.parametrize(
    "changes, error, reason",
    (
        ({"ends": None}, TypeError, "ends is missing"),
        ({"kept_s": None}, TypeError, "kept_s is missing"),
        ({"bias": None}, TypeError, "bias is missing"),
        ({"ends": 1 << 20 | 2}, ValueError, "ends does not start on 4 bytes"),
        ({"experts": 1 << 20 | 4, "wide_experts": True}, ValueError, "experts does not start on 8 bytes"),
        ({"weight_stride": IN * OUT - 8}, ValueError, "they must not overlap"),
        ({"weight_stride": 10**6 + 4}, ValueError, "they must not overlap"),
        ({"lora_a": (3 << 20, IN + 8)}, ValueError, "rows with gaps between them"),
        ({"lora_b": (4 << 20, R + 8)}, ValueError, "rows with gaps between them"),
    ),
    ids=str,
)
def test_operands_of_segments_that_no_kernel_can_read_are_refused(changes, error, reason):
    with pytest.raises(error, match=reason):
        described_segments(False, False, **changes)


def test_what_segments_have_is_refused_where_there_are_none():
    plan = make_plan(**SIZES, **TILE)
    for name in ("ends", "experts", "adapters", "scalings", "kept_s"):
        with pytest.raises(TypeError, match=f"operand {name} is given to a launch that does not use it"):
            plan.parameters(**arguments(plan, **{name: 1 << 20}))
