"""Times all backends against each other for one class of shapes, on the machine at hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from fastlora import selection
from fastlora.backends import reference
from fastlora.backends.configs import TileConfig
from fastlora.bench.cases import LayerCase
from fastlora.bench.packed import decoded, sets_of
from fastlora.bench.timing import EventClock, time_rounds
from fastlora.bench.tuner import FINAL_ROUNDS, MIN_GAIN, check_results, make_call
from fastlora.operands import uses_tf32
from fastlora.problem import BACKENDS, LaunchSpec, Needs, Sizes


@dataclass(frozen=True)
class Entrant:
    """A backend, its median time in µs, or why it has none: it cannot serve the case, or not rightly."""

    backend: str
    median_us: float | None
    error: str | None = None


@dataclass(frozen=True)
class Contest:
    """The outcome for one case and direction. ``winner`` is ``default``, the backend that serves such calls untuned,
    unless another is faster by MIN_GAIN or it does not run rightly."""

    default: str
    winner: str
    entrants: tuple[Entrant, ...]

    def median_us(self, backend: str) -> float | None:
        return next((each.median_us for each in self.entrants if each.backend == backend), None)


def describe(case: LayerCase, direction: str, device: torch.device) -> LaunchSpec:
    """The call of a case as ``dispatch`` sees it: aligned rows, no bias; backward the gradients of x, A and B."""
    dtype = case.torch_dtype
    return LaunchSpec(
        direction,  # type: ignore[arg-type]  # one of its two words
        Sizes(case.m, case.n, case.k, case.r),
        dtype,
        (dtype, dtype),
        device,
        dropout=case.dropout > 0,
        needs=Needs(*[direction == "backward"] * 3, False),
        tf32=uses_tf32(dtype),
    )


def compare_backends(
    case: LayerCase,
    direction: str,
    device: torch.device,
    config: TileConfig | None = None,
    modules: Mapping[str, Any] | None = None,
    clock: Any = None,
) -> Contest:
    """Every backend that can serve a case, in turn on rotating inputs; each must have the reference's results first.

    Args:
        case: the layer, with aligned rows; direction: "forward" or "backward".
        device: of the calls.
        config: what Triton's kernels were tuned to; None for their own choice.
        modules: by name, what stands for the backends; their own modules by default.
        clock: EventClock by default.

    Raises:
        RuntimeError: no backend serves the case.
    """
    clock = clock or EventClock()
    spec = describe(case, direction, device)
    reasons = {name: selection.why_unsupported(name, spec) for name in BACKENDS}
    default = next(name for name in selection.preference(spec, tuned=False) if reasons[name] is None)
    sets = sets_of(case, "cuda" if isinstance(clock, EventClock) else "cpu")
    candidates = {}
    for name in (name for name, reason in reasons.items() if reason is None):
        module = modules[name] if modules else selection.backend_module(name)
        candidates[name] = module, {"config": config} if name == "triton" and config is not None else {}
    times, errors = time_candidates(candidates, case, direction, sets, clock)
    reasons |= errors
    if not times:
        raise RuntimeError(f"no backend serves {case.label} {direction}: {'; '.join(map(str, reasons.values()))}")
    entrants = tuple(Entrant(name, times.get(name), reasons[name]) for name in BACKENDS)
    return Contest(default, faster(times, default), entrants)


Key = TypeVar("Key")


def time_candidates(
    candidates: Mapping[Key, tuple[Any, dict[str, Any]]], case: LayerCase, direction: str, sets: list, clock: Any
) -> tuple[dict[Key, float], dict[Key, str]]:
    """Median times in µs of those candidates whose results are the reference's, in turn on rotating inputs; and why
    there is none of the others.

    Args:
        candidates: a module with ``prepare``, and what it is to use instead of its own choice.
        sets: of inputs, as sets_of makes them.
    """
    wanted = make_call(reference, direction, decoded(sets[0]), case.dropout)()
    calls: dict[Key, list] = {}
    errors: dict[Key, str] = {}
    for key, (module, choice) in candidates.items():
        try:
            check_results(make_call(module, direction, sets[0], case.dropout, **choice)(), wanted, case.torch_dtype)
            calls[key] = [make_call(module, direction, tensors, case.dropout, **choice) for tensors in sets]
        except Exception as error:  # each backend says it differently
            errors[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    timed = zip(calls, time_rounds(list(calls.values()), clock, FINAL_ROUNDS, warm_up=1), strict=True) if calls else ()
    return {key: timing.median_us for key, timing in timed}, errors


def faster(times: Mapping[Key, float], default: Key) -> Key:
    """The fastest; the default where no other is faster by MIN_GAIN."""
    fastest = min(times, key=lambda key: times[key])
    stays = default in times and times[fastest] > times[default] * (1 - MIN_GAIN)
    return default if stays else fastest
