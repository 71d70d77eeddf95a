"""Bugs planted in what the CUDA kernels have of their own for projections that share an input, each of which a check
finds: whose matrices, numbers and flags a tile takes, in the sources; waits and fences, in the compiled PTX."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from tests.support.cuda_bugs import RELAXED_ACQUIRE, RELAXED_RELEASE, remove
from tests.support.cuda_emulation import SCHEDULES, ptx_of
from tests.support.cuda_projection_checks import GROUPS, check_integers, kernels_of

FORWARD, BACKWARD = "forward", "backward"
_SMALLEST = 280  # rows: two groups of row blocks


@dataclass(frozen=True)
class Planted:
    """A change of a source file, and the group that shows it; a stand-in for generated.Generated."""

    path: str
    old: str
    new: str
    group: str = "q, k, v"
    times: int = 1

    def apply(self, text: str) -> str:
        if text.count(self.old) != self.times:
            raise ValueError(f"{self.old!r} is {text.count(self.old)} times in {self.path}")
        return text.replace(self.old, self.new)


def _in(name: str) -> Callable[..., Planted]:
    return functools.partial(Planted, f"csrc/sm90/{name}.cuh")


_LAYERS, _PRODUCER, _CONSUMER, _PRODUCT, _EPILOGUE = map(_in, ("layers", "producer", "consumer", "product", "epilogue"))
_TRAITS, _BRANCH, _WEIGHT, _GRADIENT = map(_in, ("traits", "branch", "base_weight", "gradient"))
_FIRST = "Traits::Layers::of(c.params, 0)"
DROPPED, FUSED, DROPPED_FUSED, FOUR, FOUR_FUSED = (
    "q, k, v, dropped", "q, k, v, fused", "q, k, v, dropped, fused", "four", "four, dropped, fused"
)  # fmt: skip

PLANTED = {
    "a projection's first column is of the one in front": _LAYERS("first[layer] > place", "first[layer] >= place"),
    "the column that made S is made again": _LAYERS(" + first_is_made, layer}", ", layer}", FUSED),
    "dX without the last projection": _LAYERS(
        "params.last_shrunk : params.count - 1;", "params.last_shrunk : params.count - 2;"
    ),
    "S of the last projection is not made": _LAYERS(
        "shrinks ? params.last_shrunk :", "shrinks ? params.last_shrunk - 1 :"
    ),
    "a gradient tile is of the first projection": _LAYERS("found.split = layer;", ""),
    "a gradient tile starts at the first projection's columns": _LAYERS(
        "tile.gradient - params.first_gradient[layer]", "tile.gradient"
    ),
    "one flag for the S of all projections": _TRAITS(
        "row_block * Traits::Layers::count(params) + layer;", "row_block * Traits::Layers::count(params);", FOUR
    ),
    "partial sums of gradients in the place of the first projection's": _GRADIENT(
        "Traits::Layers::first_gradient(c.params, c.layer) * Traits::kCluster", "0"
    ),
    "the weight of the first projection": _WEIGHT(
        "&producer.own().weight", "&producer.params.layers[0].weight", times=2
    ),
    "A of the first projection": _BRANCH("&producer.own().lora_a", "&producer.params.layers[0].lora_a", times=2),
    "B of the first projection": _BRANCH("&producer.own().lora_b", "&producer.params.layers[0].lora_b", times=2),
    "S of the first projection": _PRODUCER("&own().s, r,", "&params.layers[0].s, r,"),
    "the bias of the first projection": _PRODUCER("&own().bias, n,", "&params.layers[0].bias, n,"),
    "a bias that another tile has left": _EPILOGUE("Traits::kShared && !c.own().has_bias", "false"),
    "the scaling of the first projection": _PRODUCT(
        "Branch::scale_in_s(c.own(), tile)", f"Branch::scale_in_s({_FIRST}, tile)"
    ),
    "the mask of the first projection": _CONSUMER(
        "own().seed_address ? *own().seed_address : own().seed", "Traits::Layers::of(params, 0).seed", DROPPED
    ),
    "the probability of the first projection": _CONSUMER(
        "own().last_dropped", "Traits::Layers::of(params, 0).last_dropped", DROPPED
    ),
    "what the first projection's mask keeps, for all": _EPILOGUE("(c.layer * kWords + word)", "word", DROPPED),
    "kept elements are scaled as the first projection's": _EPILOGUE(
        "c.own().inverse_keep, sums[i]", f"{_FIRST}.inverse_keep, sums[i]", DROPPED_FUSED
    ),
    "sums start anew at every projection": _PRODUCT("continues || step > steps.first", "step > steps.first"),
    "the next tile is claimed at every projection": _PRODUCER(
        "if (is_last) claim_at(step, steps);", "claim_at(step, steps);"
    ),
    "a branch is added where there is no adapter": _CONSUMER("own().r > 0 :", "true :", FOUR),
    "a tile that makes dS does not load it": _PRODUCER(
        "tile.kind == kBaseTile || (Traits::kShared && Traits::kBackward)", "tile.kind == kBaseTile", FUSED
    ),
    "the output of the first projection": _EPILOGUE("&c.own().out", f"&{_FIRST}.out"),
}  # fmt: skip

# In the PTX of the kernel of a direction, which a group shows.
COMPILED = {
    "S of a projection is read without acquiring its flag": (FORWARD, FOUR, RELAXED_ACQUIRE),
    "S of a projection is not released": (FORWARD, FOUR, RELAXED_RELEASE),
    "dS is read without acquiring its flag": (BACKWARD, FOUR, RELAXED_ACQUIRE),
    "dS is not released": (BACKWARD, FOUR_FUSED, RELAXED_RELEASE),
    "no proxy fence between dS and the copies that read it": (
        BACKWARD,
        FOUR_FUSED,
        remove(r"fence\.proxy\.async\.global"),
    ),
    "one thread releases dS before the others have written": (BACKWARD, FOUR_FUSED, remove(r"bar\.sync")),
}


def check_compiled(name: str) -> None:
    direction, group, edit = COMPILED[name]

    def ptx(kernel: str) -> str:
        return edit(ptx_of(kernel)) if f"_{direction}_" in kernel else ptx_of(kernel)

    check_integers(group, ptx=ptx)


def check_changed(planted: Planted) -> None:
    """By kernels that are compiled of the changed sources."""
    from tests.support.generated_cuda import Compiled

    # CTAs in another order: under the first schedules no flag is waited for.
    check = functools.partial(check_integers, planted.group, SCHEDULES[2], m=_SMALLEST)
    Compiled(planted).run(check, kernels_of(*GROUPS[planted.group]))  # type: ignore[arg-type]
