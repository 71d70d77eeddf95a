"""Times the two ways to decode a packed base weight, on every backend whose launches do it, on the machine at hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastlora import quantised_operands, selection
from fastlora.backends.configs import TileConfig
from fastlora.backends.tuning import DECODING
from fastlora.bench.cases import PackedCase
from fastlora.bench.contest import faster, time_candidates
from fastlora.bench.packed import sets_of
from fastlora.bench.peers import SCALING, LayerTensors
from fastlora.bench.timing import EventClock
from fastlora.problem import BackwardOperands, ForwardOperands, LaunchSpec, Needs


class Way(NamedTuple):
    """A backend, and whether its products decode the weight in their loop, instead of tiles ahead of them."""

    backend: str
    in_loop: bool

    def describe(self) -> str:
        return f"{self.backend} {'in the loop' if self.in_loop else 'once'}"


@dataclass(frozen=True)
class Outcome:
    """For one case and direction.

    default: what serves such calls untuned; winner: the same, unless another is faster by MIN_GAIN.
    in_loop: the faster way of each backend that was timed, likewise.
    untuned: the default way of each.
    median_us: of every way; None where it did not run, or not rightly: ``errors`` says why.
    """

    default: Way
    winner: Way
    in_loop: dict[str, bool]
    untuned: dict[str, bool]
    median_us: dict[Way, float | None]
    errors: dict[str, str]


def describe_packed(case: PackedCase, direction: str, tensors: LayerTensors, device: torch.device) -> LaunchSpec:
    """The call of a case as ``dispatch`` sees it, on ``device``: aligned rows, no bias; backward the gradients of x, A
    and B."""
    t, rest = tensors, (SCALING, case.dropout, torch.tensor(1) if case.dropout else None)
    if direction == "forward":
        forward = ForwardOperands(t.x, t.weight, t.lora_a, t.lora_b, None, *rest)
        return quantised_operands.describe_forward(forward)[1]._replace(device=device)
    s = t.x.new_empty(case.m, case.r)
    backward = BackwardOperands(t.dy, t.x, t.weight, t.lora_a, t.lora_b, s, *rest)
    return quantised_operands.describe_backward(backward, Needs(True, True, True, False))[1]._replace(device=device)


def possible_ways(spec: LaunchSpec, modules: Mapping[str, Any] | None = None) -> tuple[dict[Way, Any], dict[str, str]]:
    """The ways of each backend that serves such a call, with their modules; and why another does not."""
    found, errors = {}, {}
    for name in DECODING:
        reason = selection.why_unsupported(name, spec)
        if reason is not None:
            errors[name] = reason
            continue
        module = modules[name] if modules else selection.serving_module(name, spec)
        found[Way(name, False)] = module
        if module.why_not_in_loop(spec) is None:
            found[Way(name, True)] = module
    return found, errors


def compare_ways(
    case: PackedCase,
    direction: str,
    device: torch.device,
    configs: Mapping[bool, TileConfig] | None = None,
    modules: Mapping[str, Any] | None = None,
    clock: Any = None,
) -> Outcome:
    """Every way that is possible, in turn on rotating inputs; each must have the reference's results first.

    Args:
        case: the layer, with aligned rows; direction: "forward" or "backward".
        device: of the calls.
        configs: what Triton's kernels were tuned to, by ``in_loop``; their own choice where it has none.
        modules: by name, what stands for the backends; their own modules by default.
        clock: EventClock by default.

    Raises:
        RuntimeError: no backend has such a launch.
    """
    clock, configs = clock or EventClock(), configs or {}
    sets = sets_of(case, "cuda" if isinstance(clock, EventClock) else "cpu")
    spec = describe_packed(case, direction, sets[0], device)
    ways, errors = possible_ways(spec, modules)
    candidates = {way: (module, {"in_loop": way.in_loop, **_config(configs, way)}) for way, module in ways.items()}
    times, failed = time_candidates(candidates, case, direction, sets, clock)
    errors |= {way.describe(): error for way, error in failed.items()}
    if not times:
        raise RuntimeError(f"no launch decodes the weight of {case.label} {direction}: {'; '.join(errors.values())}")
    untuned = {way.backend: module.decodes_in_loop(spec, tuned=False) for way, module in ways.items()}
    default = Way(*next(iter(untuned.items())))
    in_loop = {
        name: faster(own, Way(name, untuned[name])).in_loop
        for name in untuned
        if (own := {way: time for way, time in times.items() if way.backend == name})
    }
    return Outcome(default, faster(times, default), in_loop, untuned, {way: times.get(way) for way in ways}, errors)


def _config(configs: Mapping[bool, TileConfig], way: Way) -> dict[str, TileConfig]:
    has_own = way.backend == "triton" and way.in_loop in configs
    return {"config": configs[way.in_loop]} if has_own else {}
