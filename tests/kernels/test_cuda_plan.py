"""A plan of a CUDA launch refuses, by name, what no kernel can do or read. Of csrc's host code as it is now, over the
emulated runtime."""

import struct

import pytest

from tests.support import cuda_runtime
from tests.support.cuda_plans import (
    BACKWARD_ONLY,
    IN,
    LARGE_TILE,
    MATRICES,
    MOST,
    OUT,
    SIZES,
    TILE,
    VECTORS,
    M,
    R,
    arguments,
    make_plan,
)

pytestmark = pytest.mark.skipif(cuda_runtime.unavailable() is not None, reason=f"{cuda_runtime.unavailable()}")


@pytest.mark.parametrize(
    "changes, reason",
    (
        *(({name: 0}, "sizes must be positive") for name in "mnkr"),
        *(({name: 12}, "multiples of 8") for name in "nkr"),
        *(({name: MOST + 8}, "below 2") for name in "mnk"),
        *(({name: 0}, "bad group_m, ctas or splits") for name in ("group_m", "ctas", "splits")),
        ({"splits": 2}, "bad group_m, ctas or splits"),  # of one step
        ({"k": 128, "splits": 3}, "bad group_m, ctas or splits"),
        ({"grad_b": True}, "a forward makes no gradients"),
        ({"grad_bias": True}, "a forward makes no gradients"),
        ({"m": MOST, "n": 64 * 128}, "more tiles than a 32-bit ticket counts"),
        # Rows of 64, 31 columns of Y and one of S, twice: as many tiles as may be, and some more flags.
        ({"m": MOST, "n": 31 * 128, "k": 128, "splits": 2}, "more flags than a 32-bit index counts"),
        ({"m": MOST, "n": 32 * 128, "k": 128, "splits": 2}, "more tiles than a 32-bit ticket counts"),
    ),
    ids=str,
)
def test_a_problem_that_no_launch_can_count_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        make_plan(**{**SIZES, **TILE, **changes})


@pytest.mark.parametrize(
    "changes",
    (
        *({name: 1 if name == "m" else 8} for name in "mnkr"),
        *({name: MOST} for name in "mnk"),
        {"group_m": 1, "ctas": 1},
        {"k": 128, "splits": 2},
        {"k": 72, "splits": 2},
        {"fused": True},
    ),
    ids=str,
)
def test_the_smallest_and_the_largest_problems_are_planned(changes):
    make_plan(**{**SIZES, **TILE, **changes})


# A packed base weight of 64 x 64: scales of 64 elements each.
DECODED_TILE = {"block_m": 128, "block_n": 128}
NF4 = {"code_format": "nf4", "scale_format": "float32", "block": 64}
NESTED, INT8 = {**NF4, "scale_format": "nested", "nested_block": 256}, {**NF4, "code_format": "int8"}


@pytest.mark.parametrize(
    "packed, reason",
    (
        ({**NF4, "block": 0}, "elements that are decoded together must have one scale"),
        ({**INT8, "block": 12}, "elements that are decoded together must have one scale"),
        ({**INT8, "block": (1 << 30) + 8}, "elements that are decoded together must have one scale"),
        ({**NF4, "block": 96}, "no kernel decodes blocks or scales of this kind"),
        ({**INT8, "scale_format": "nested", "nested_block": 256}, "no kernel decodes blocks or scales of this kind"),
        ({**NESTED, "nested_block": 0}, "in blocks of a power of two"),
        ({**NESTED, "nested_block": 96}, "in blocks of a power of two"),
        ({**NF4, "nested_block": 256}, "in blocks of a power of two"),
        ({**NF4, "makes_out": False, "backward": True, "grad_a": True}, "nothing reads the packed weight"),
    ),
    ids=str,
)
def test_a_packed_weight_that_no_kernel_decodes_is_refused(packed, reason):
    with pytest.raises(ValueError, match=reason):
        make_plan(**{**SIZES, **DECODED_TILE, **packed})


def test_formats_have_names():
    with pytest.raises(TypeError, match=r"Plan\(\) cannot take 'nf5' as the argument 'code_format'"):
        make_plan(**{**SIZES, **DECODED_TILE, **NF4, "code_format": "nf5"})
    with pytest.raises(TypeError, match=r"Plan\(\) cannot take 3 as the argument 'scale_format'"):
        make_plan(**{**SIZES, **DECODED_TILE, **NF4, "scale_format": 3})


@pytest.mark.parametrize("what, size", (("scales", MOST), ("parts", 1 << 22)))
def test_more_scales_or_parts_than_32_bits_count_are_refused(what, size):
    wide = {"n": size, "k": size, "block": 1 << 30}
    with pytest.raises(ValueError, match=f"more {what} of the packed weight than 32 bits count"):
        make_plan(**{**SIZES, **DECODED_TILE, **INT8, **wide, "backward": True})


@pytest.mark.parametrize("backward", (False, True))
def test_what_a_launch_over_a_packed_weight_takes_of_memory(backward):
    """Forward, three panels of 128 rows, each in three parts of 32 Ki elements; in dX one panel, in five."""
    rows, columns = 304, 520
    sizes = {"m": 257, "backward": backward, "n": columns if backward else rows, "k": rows if backward else columns}
    plans = [make_plan(**{**SIZES, **DECODED_TILE, **sizes, **packed}) for packed in ({}, NF4)]
    panels, parts = (1, 5) if backward else (3, 3)
    assert plans[1].workspace_words == plans[0].workspace_words + panels
    assert [plan.decode_tiles for plan in plans] == [0, panels * parts]
    assert plans[1].queue() == plans[0].queue() and not plans[0].variant["decodes"] and plans[1].variant["decodes"]


def test_the_tensors_of_a_packed_weight_are_given_where_it_is_decoded():
    plans = {name: make_plan(**{**SIZES, **DECODED_TILE, **packed}) for name, packed in PACKED.items()}
    tensors = {"dense": (), "nf4": ("codes", "scales"), "int8": ("codes", "scales"), "nested": NESTED_TENSORS}
    for name, plan in plans.items():
        given = arguments(plan, **dict.fromkeys(tensors[name], 1 << 20))
        plan.parameters(**given)
        for tensor in tensors[name]:
            with pytest.raises(TypeError, match=f"operand {tensor} is missing"):
                plan.parameters(**{**given, tensor: 0})
        for tensor in {*NESTED_TENSORS} - {*tensors[name]}:
            with pytest.raises(TypeError, match=f"operand {tensor} is given to a launch that does not use it"):
                plan.parameters(**given, **{tensor: 1 << 20})
    plans["int8"].parameters(**arguments(plans["int8"], codes=1 << 20, scales=1 << 20, zeros=1))
    for name in ("nf4", "dense"):
        with pytest.raises(TypeError, match="operand zeros is given"):
            plans[name].parameters(**arguments(plans[name], **dict.fromkeys(tensors[name], 1 << 20), zeros=1))
    for changes, reason in (
        ({"codes": 8}, "codes does not start on 16 bytes"),
        ({"scales": 2}, "scales does not start on 4 bytes"),
        ({"weight": (1 << 20, 72)}, "a packed weight is decoded into rows without gaps of 64 elements, not 72 apart"),
    ):
        with pytest.raises(ValueError, match=reason):
            plans["nf4"].parameters(**arguments(plans["nf4"], **{"codes": 1 << 20, "scales": 1 << 20, **changes}))


NESTED_TENSORS = ("codes", "scales", "absmax2", "code2", "offset")
PACKED: dict[str, dict] = {"dense": {}, "nf4": NF4, "int8": INT8, "nested": NESTED}


@pytest.mark.parametrize("splits", (1, 2))
@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("wanted", ((), ("grad_b",), ("grad_bias",), ("grad_a", "grad_b")), ids=str)
def test_what_a_backward_takes_of_memory(wanted, fused, splits):
    """5 row blocks in 2 groups, 2 columns of dX and 1 of S, 2 tiles of dA and 3 of dB."""
    sizes = {"m": 257, "n": 256, "k": 384, "group_m": 4, "fused": fused, "splits": splits, "backward": True}
    plan = make_plan(**{**SIZES, **TILE, **sizes}, **dict.fromkeys(wanted, True))
    variant = plan.variant
    column_tiles = 5 * (2 + (not fused))
    gradient_tiles = 3 * bool({"grad_b", "grad_bias"} & {*wanted}) + 2 * ("grad_a" in wanted)
    reductions = gradient_tiles + (column_tiles if splits > 1 else 0)
    assert plan.workspace_words == 2 + 5 + 2 * reductions
    assert plan.gradient_partial_floats == gradient_tiles * variant["gradient_partial_floats"]
    assert plan.split_partial_floats == column_tiles * (splits - 1) * variant["split_partial_floats"]


def test_a_grid_is_no_larger_than_its_tiles():
    assert make_plan(**{**SIZES, **TILE, "ctas": 132}).ctas == 2, "a tile of S and one of Y"
    assert make_plan(**{**SIZES, **TILE, "ctas": 132, "m": 64 * 200}).ctas == 132
    of_clusters = {**SIZES, **LARGE_TILE, "m": 128 * 200}
    assert make_plan(**{**of_clusters, "ctas": 131}).ctas == 130 and make_plan(**{**of_clusters, "ctas": 1}).ctas == 2


def test_plans_that_cannot_be_launched_say_why():
    with pytest.raises(ValueError, match=r"no compiled kernel serves this: forward, tile 96x128, M=64 N=64 K=64 R=8"):
        make_plan(**SIZES, block_m=96, block_n=128)
    with pytest.raises(ValueError, match="no compiled kernel"):
        make_plan(**{**SIZES, "r": 128}, block_m=64, block_n=128)
    with pytest.raises(ValueError, match="no compiled kernel serves this: forward, transposed weight, tile 128x256"):
        make_plan(**{**SIZES, "r": 72, "transposed": True}, block_m=128, block_n=256)
    with pytest.raises(ValueError, match="multiples of 8"):
        make_plan(**{**SIZES, "k": 60}, block_m=64, block_n=128)
    with pytest.raises(ValueError, match="splits"):
        make_plan(**{**SIZES, "splits": 2}, block_m=128, block_n=256)


@pytest.mark.parametrize("backward", (False, True))
def test_operands_that_no_kernel_can_read_are_refused(backward):
    gradients = dict.fromkeys(("grad_a", "grad_b", "grad_bias"), backward)
    plan = make_plan(**{**SIZES, "backward": backward, **gradients}, block_m=64, block_n=128)
    plan.parameters(**arguments(plan))
    for name in arguments(plan):
        with pytest.raises(TypeError, match=f"{name} is missing|misses the argument '{name}'"):
            plan.parameters(**arguments(plan, **{name: None}))
    unwanted = ["gradient_partials", "split_partials", "seed_address", "bias" if backward else "grad_a"]
    for name in unwanted:
        with pytest.raises(TypeError, match=f"operand {name} is given to a launch that does not use it"):
            plan.parameters(**arguments(plan, **{name: 1 << 20}))
    for changes, reason in (
        ({"act": (1 << 20 | 8, 64)}, "act does not start on 16 bytes"),
        ({"weight": (1 << 20, 68)}, "weight has rows of 64 elements 68 apart"),
        ({"act": (1 << 20, 0)}, "they must not overlap"),
        ({"act": (1 << 20, 56)}, "they must not overlap"),
        ({"s": 1 << 20 | 4}, "s does not start on 16 bytes"),
        ({"drop_threshold": 1}, "dropout is given to a kernel without it"),
        ({"scale_on_branch": 2.0}, "only fp16 kernels scale the branch"),
        ({"bias": 1 << 20 | 2} if not backward else {"grad_a": 1 << 20 | 1}, "does not start on"),
    ):
        with pytest.raises(ValueError, match=reason):
            plan.parameters(**arguments(plan, **changes))


@pytest.mark.parametrize("threshold, fits", ((0, False), (1, True), (65536, True), (65537, False)))
def test_a_threshold_of_dropout_has_sixteen_bits(threshold, fits):
    plan = make_plan(**{**SIZES, "dropout": True}, block_m=64, block_n=128)
    given = arguments(plan, drop_threshold=threshold, seed=5)
    if fits:
        plan.parameters(**given)
    else:
        with pytest.raises(ValueError, match=f"a threshold of 1 to 65536, got {threshold}"):
            plan.parameters(**given)


def described(backward: bool, transposed: bool = False) -> tuple[bytes, dict[int, list[tuple]]]:
    """What a launch is given: its parameters as bytes, and of each address (a number of MATRICES or VECTORS) the
    columns, rows, stride in elements, box and swizzle of its maps."""
    columns = {
        "act": OUT if backward else IN,
        "weight": OUT if transposed else IN,
        "lora_a": IN,
        "lora_b": R,
        "saved_s": R,
    }
    columns |= {"out": IN if backward else OUT, "layer_input": IN}
    gradients = dict.fromkeys(("grad_a", "grad_b", "grad_bias"), backward)
    problem = {**SIZES, "m": M, "k": columns["act"], "n": columns["out"], "r": R, "ctas": 4, "group_m": 2, **gradients}
    plan = make_plan(**{**problem, "backward": backward, "transposed": transposed}, block_m=128, block_n=128)
    given: dict = {name: (number << 20, columns[name] + 8 * number) for name, number in MATRICES.items()}
    given |= {name: number << 20 for name, number in VECTORS.items()} | {"scale_in_s": 1.5}
    unused = ("bias",) if backward else (*BACKWARD_ONLY, "gradient_partials")
    packed, maps = plan.parameters(**{name: value for name, value in given.items() if name not in unused})
    assert len({each["offset"] for each in maps}) == len(maps)
    found: dict[int, list[tuple]] = {}
    for each in maps:
        sizes = each["columns"], each["rows"], each["stride_bytes"] // 2, each["box"], each["swizzle"]
        found.setdefault(each["address"] >> 20, []).append(sizes)
    return packed, found


def test_the_maps_of_a_forward():
    """Boxes are (rows, columns): 64 columns of a row are 128 bytes."""
    assert described(False)[1] == {
        1: [(IN, M, IN + 8, (128, 64), 128)],
        2: [(IN, OUT, IN + 16, (128, 64), 128)],
        3: [(IN, R, IN + 24, (64, 64), 128)],
        4: [(R, OUT, R + 32, (64, 64), 128)],
        5: [(OUT, M, OUT + 40, (64, 64), 128)],
        8: [(R, M, R, (64, 64), 128)],
        9: [(OUT, 1, OUT, (1, 128), 0)],
    }


def test_the_maps_of_a_backward():
    """dY has two: rows of a tile of dX, and of a step of dB."""
    assert described(True)[1] == {
        1: [(OUT, M, OUT + 8, (128, 64), 128), (OUT, M, OUT + 8, (64, 64), 128)],
        2: [(IN, OUT, IN + 16, (64, 64), 128)],
        3: [(IN, R, IN + 24, (64, 64), 128)],
        4: [(R, OUT, R + 32, (64, 64), 128)],
        5: [(IN, M, IN + 40, (64, 64), 128)],
        6: [(IN, M, IN + 48, (64, 64), 128)],
        7: [(R, M, R + 56, (64, 64), 128)],
        8: [(R, M, R, (64, 64), 128)],
    }


@pytest.mark.parametrize("backward", (False, True))
def test_the_maps_over_a_transposed_weight(backward):
    """The weight's alone is another: its boxes are tall where its rows are what the launch contracts."""
    dense, transposed = described(backward)[1], described(backward, transposed=True)[1]
    box = (128, 64) if backward else (64, 64)
    assert transposed == {**dense, 2: [(OUT, IN, OUT + 16, box, 128)]}


@pytest.mark.parametrize("backward", (False, True))
def test_every_vector_is_passed_in_its_place(backward):
    """params.h has them in this order."""
    words = struct.unpack_from(f"<{len(described(backward)[0]) // 8}Q", described(backward)[0])
    order = ("s", "grad_a", "grad_b", "grad_bias", "gradient_partials", "workspace") if backward else ("s", "workspace")
    addresses = {number << 20 for number in VECTORS.values()}
    assert [word >> 20 for word in words if word in addresses] == [VECTORS[name] for name in order]


@pytest.mark.parametrize("gradients", ((), ("grad_a",), ("grad_b", "grad_bias")), ids=str)
@pytest.mark.parametrize("splits", (1, 2))
def test_a_queue_has_every_tile_once(gradients, splits):
    """5 row blocks in 2 groups, a column of S and 2 of dX; 2 tiles of dA, 3 of dB with dbias."""
    sizes = {"m": 257, "n": 256, "k": 384, "splits": splits, "backward": True}
    queue = make_plan(**{**SIZES, **TILE, **sizes}, **dict.fromkeys(gradients, True)).queue()
    n_gradients = 2 * ("grad_a" in gradients) + 3 * ("grad_b" in gradients)
    products = {(row, column, split, -1) for row in range(5) for column in range(3) for split in range(splits)}
    assert {tile for tile in queue if tile[3] < 0} == products
    assert sorted((tile[0], tile[3]) for tile in queue if tile[3] >= 0) == [
        (group, gradient) for group in range(2) for gradient in range(n_gradients)
    ]
    assert len(queue) == len(products) + 2 * n_gradients and queue[0] == (0, 0, 0, -1)


def test_a_gradient_that_is_not_made_has_no_place_to_go():
    plan = make_plan(**{**SIZES, "backward": True}, block_m=64, block_n=128)
    with pytest.raises(TypeError, match="operand layer_input is given"):
        plan.parameters(**arguments(plan, grad_a=None, grad_b=None, grad_bias=None))
    with pytest.raises(ValueError, match="a forward makes no gradients"):
        make_plan(**SIZES, block_m=64, block_n=128, grad_a=True)


def test_a_fused_s_that_no_kernel_can_make_is_refused():
    tile = {"block_m": 128, "block_n": 256, "fused": True}
    with pytest.raises(ValueError, match="S cannot be fused"):
        make_plan(**{**SIZES, "r": 72, "dropout": True, **tile})
    with pytest.raises(ValueError, match="S cannot be fused"):
        make_plan(**{**SIZES, "backward": True, **tile}, makes_out=False, grad_a=True)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_names_of_a_problem_are_checked(name):
    tile = {"block_m": 64, "block_n": 128}
    with pytest.raises(TypeError, match=f"Plan.. misses the argument '{name}'"):
        make_plan(**{key: value for key, value in SIZES.items() if key != name}, **tile)
    with pytest.raises(TypeError, match="Plan.. has no argument 'nonsense'"):
        make_plan(**SIZES, **tile, nonsense=7)
    with pytest.raises(TypeError, match=f"Plan.. cannot take 'many' as the argument '{name}'"):
        make_plan(**{**SIZES, name: "many"}, **tile)


def test_names_of_operands_are_checked():
    plan = make_plan(**SIZES, block_m=64, block_n=128)
    given = arguments(plan)
    with pytest.raises(TypeError, match="parameters.. has no argument 'nonsense'"):
        plan.parameters(**given, nonsense=7)
    with pytest.raises(TypeError, match="parameters.. has no argument 'weigth'"):
        plan.parameters(**{**given, "weigth": given.pop("weight")})
    with pytest.raises(TypeError, match="cannot take 7 as the argument 'weight'"):
        plan.parameters(**{**given, "weight": 7})


def test_a_launcher_is_given_what_it_was_bound_for():
    plan = make_plan(**SIZES, block_m=64, block_n=128)
    strides = {"act": (0, 64), "weight": (0, 64)}
    bound = plan.bind(("act", "weight", "scale_in_s"), **strides)
    with pytest.raises(TypeError, match="a launch takes 5 arguments, got 4"):
        bound(0, 0, 1 << 20, 1 << 20)
    with pytest.raises(TypeError, match=r"cannot take \(1, 64\) as the argument 'act'"):
        bound(0, 0, (1, 64), 1 << 20, 1.5)
    with pytest.raises(TypeError, match="cannot take 'much' as the argument 'scale_in_s'"):
        bound(0, 0, 1 << 20, 1 << 20, "much")
    with pytest.raises(TypeError, match="bind.. has no argument 'nonsense'"):
        plan.bind(("act", "nonsense", "scale_in_s"))
    with pytest.raises(TypeError, match="bind.. has no argument 'nonsense'"):
        plan.bind((), nonsense=1, scale_in_s=1.0)
    with pytest.raises(TypeError, match="bind.. misses the argument 'scale_in_s'"):
        plan.bind(("act",), weight=(0, 64))
    with pytest.raises(TypeError, match="cannot create"):
        type(bound)()
