"""Plans of CUDA launches of projections that share an input: what is refused, and what a kernel is given."""

import pytest

from tests.support import cuda_runtime
from tests.support.cuda_plans import LARGE_TILE, SIZES, TILE, arguments, make_plan

pytestmark = pytest.mark.skipif(cuda_runtime.unavailable() is not None, reason=f"{cuda_runtime.unavailable()}")


# N, rank, and which gradients; the last one has no adapter.
PROJECTIONS = [(264, 16, True, True, False), (72, 8, True, True, False), (136, 0, False, False, False)]
SHARED = {"m": 300, "n": 0, "k": 128, "r": 0, "projections": PROJECTIONS, "block_m": 128, "block_n": 256}
SHARED_BACKWARD = {**SHARED, "backward": True, "n": 520, "k": 0}


def without_gradients(projections):
    return [(n, r, False, False, False) for n, r, *_ in projections]


@pytest.mark.parametrize(
    "changes, reason",
    (
        ({"projections": [(8, 8, False, False, False)] * 5}, "a launch takes 4 projections at most"),
        ({"projections": [(8, 0, False, False, False)] * 2}, "sizes must be positive"),
        ({"projections": [(8, 0, False, False, False), (8, 8, False, False, False)]}, "without an adapter come last"),
        ({"projections": [(8, 8, False, False, False), (12, 8, False, False, False)]}, "multiples of 8"),
        ({"projections": [(12, 8, False, False, False), (12, 8, False, False, False)]}, "projection 0: sizes must be"),
        ({"projections": [(8, 8, False, False, False), (8, -8, False, False, False)]}, "projection 1: sizes must be"),
        ({"projections": PROJECTIONS}, "a forward makes no gradients"),
        (
            {**SHARED_BACKWARD, "projections": [(8, 8, True, True, False), (8, 0, False, False, True)]},
            "no kernel makes",
        ),
        ({"projections": [(8, 72, False, False, False)]}, "no compiled kernel serves this: forward, 1 projections"),
        ({"transposed": True}, "no compiled kernel serves this: forward, transposed weight, 3 projections"),
        ({"block_m": 64, "block_n": 128}, "no compiled kernel serves this: forward, 3 projections, tile 64x128"),
        ({"splits": 2}, "bad group_m, ctas or splits"),
    ),
    ids=str,
)
def test_projections_that_no_kernel_takes_are_refused(changes, reason):
    given = {**SIZES, **SHARED, "projections": without_gradients(PROJECTIONS)}
    make_plan(**given)
    with pytest.raises(ValueError, match=reason):
        make_plan(**{**given, **changes})


def test_projections_are_given_as_a_list_of_numbers():
    for wrong in ((1, 2), [(8, 8)], [(8, 8, 1, 1, 1)], ["abcde"]):
        with pytest.raises(TypeError, match="as the argument 'projections'"):
            make_plan(**{**SIZES, **SHARED, "projections": wrong})


@pytest.mark.parametrize("fused", (False, True))
def test_what_projections_take_of_memory(fused):
    """Two row blocks of a cluster's two. Forward, a flag for each CTA's, and projection; backward, also two reductions'
    flags for each of the tiles of two warpgroups: of 512 columns, 2 dA of each projection and 1 dB."""
    forward = make_plan(**{**SIZES, **SHARED, "projections": without_gradients(PROJECTIONS), "fused": fused})
    assert forward.workspace_words == 2 + 2 * 2 * 3 and forward.gradient_partial_floats == 0
    assert len(forward.queue()) == 2 * (2 + 1 + 1 + 2 * (not fused))
    plan = make_plan(**{**SIZES, **SHARED_BACKWARD, "fused": fused, "group_m": 2})
    tiles = 2 * (2 + 1)  # of 512 columns of a cluster: 520 of dX's, 264 and 72 of dY's
    assert plan.workspace_words == 2 + 2 * 2 * 3 + 2 * tiles * 2
    assert plan.gradient_partial_floats == tiles * 2 * plan.variant["gradient_partial_floats"]
    assert len(plan.queue()) == 2 * (3 + (not fused) + tiles)
    assert plan.variant["shared"] and plan.variant["rank"] == 16


def shared_arguments(backward: bool, **changes):
    """Operands of the plans above; None takes one out."""
    given: dict = {"workspace": 1 << 20}
    given |= {"out": (2 << 20, 520), "layer_input": (3 << 20, 520)} if backward else {"act": (2 << 20, 128)}
    if backward:
        given["gradient_partials"] = 4 << 20
    for i, (n, r, *_) in enumerate(PROJECTIONS):
        k, at = 520 if backward else 128, (16 * (i + 1)) << 20
        own: dict = {"weight": (at + (1 << 20), k), "act" if backward else "out": (at + (2 << 20), n)}
        if r:
            own |= {"lora_a": (at + (3 << 20), k), "lora_b": (at + (4 << 20), r), "s": at + (5 << 20)}
            own["scale_in_s"] = 1.5 + i
            if backward:
                own |= {"saved_s": (at + (6 << 20), r), "grad_a": at + (7 << 20), "grad_b": at + (8 << 20)}
        given |= {f"projections[{i}].{name}": value for name, value in own.items()}
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


def shared_plan(backward: bool):
    if backward:
        return make_plan(**{**SIZES, **SHARED_BACKWARD, "group_m": 2})
    return make_plan(**{**SIZES, **SHARED, "projections": without_gradients(PROJECTIONS)})


@pytest.mark.parametrize("backward", (False, True))
def test_operands_of_projections_that_no_kernel_can_read_are_refused(backward):
    plan = shared_plan(backward)
    plan.parameters(**shared_arguments(backward))
    for name in shared_arguments(backward):
        if name.endswith("scale_in_s"):
            continue
        projection = f"projection {name[12]}: " if name.startswith("projections") else ""
        with pytest.raises(TypeError, match=f"{projection}.*operand {name.rpartition('.')[2]} is missing"):
            plan.parameters(**shared_arguments(backward, **{name: None}))
    for name in ("lora_a", "lora_b"):
        with pytest.raises(TypeError, match=f"projection 2: operand {name} is given to a launch that does not use it"):
            plan.parameters(**shared_arguments(backward, **{f"projections[2].{name}": (1 << 20, 136)}))
    with pytest.raises(TypeError, match="operand of projection 3 is given to a launch that does not use it"):
        plan.parameters(**shared_arguments(backward, **{"projections[3].weight": (1 << 20, 128)}))
    with pytest.raises(ValueError, match="projection 1: weight does not start on 16 bytes"):
        plan.parameters(**shared_arguments(backward, **{"projections[1].weight": (1 << 20 | 8, 520)}))
    with pytest.raises(TypeError, match="misses the argument 'scale_in_s'"):
        plan.bind((), **{n: v for n, v in shared_arguments(backward).items() if not n.endswith("scale_in_s")})


def test_projections_are_refused_where_there_is_one_layer():
    plan = make_plan(**SIZES, **TILE)
    with pytest.raises(TypeError, match="operand of projection 0 is given to a launch that does not use it"):
        plan.parameters(**arguments(plan), **{"projections[0].weight": (1 << 20, 64)})


@pytest.mark.parametrize("backward", (False, True))
def test_the_maps_and_numbers_of_projections(backward):
    """Each has the maps of the layer that it would be alone, at its own place in the parameters."""
    packed, maps = shared_plan(backward).parameters(**shared_arguments(backward))
    alone, first = [], []
    for i, (n, r, *_) in enumerate(PROJECTIONS[:2]):
        own = {name.rpartition(".")[2]: value for name, value in shared_arguments(backward).items() if f"[{i}]" in name}
        shared = {name: value for name, value in shared_arguments(backward).items() if "[" not in name}
        sizes = {"n": 520, "k": n} if backward else {"n": n, "k": 128}
        given = {**SIZES, **LARGE_TILE, "m": 300, **sizes, "r": r, "backward": backward, "group_m": 2}
        plan = make_plan(**given, **dict.fromkeys(("grad_a", "grad_b"), backward))
        alone.append(plan.parameters(**shared, **own))
        first.append(next(each["offset"] for each in maps if each["address"] == own["weight"][0]))
    place = next(each["offset"] for each in alone[0][1] if each["address"] == (17 << 20))
    size = first[1] - first[0]
    for (bytes_alone, maps_alone), start in zip(alone, first, strict=True):
        start -= place
        found = [{**each, "offset": each["offset"] - start} for each in maps if start <= each["offset"] < start + size]
        assert found == maps_alone
        assert len(bytes_alone) == size
    assert size * 5 < len(packed) <= 32764, "what a launch may pass"
