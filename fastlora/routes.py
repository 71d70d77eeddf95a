"""Who serves the calls of one description: found once, known again by a key of the operands, counted at each call."""

import warnings
from functools import lru_cache
from typing import NamedTuple

from fastlora import selection
from fastlora.backends import tuning
from fastlora.counts import calls, fallbacks
from fastlora.problem import Launcher, LaunchSpec, PassingReason


class Route(NamedTuple):
    """Who serves the calls of one description, with what, and why nobody faster."""

    name: str
    passed_over: tuple[str, ...]
    launcher: Launcher


@lru_cache(maxsize=4096)
def find_route(spec: LaunchSpec, requested: str | None) -> Route:
    """The route to the backend that selection.select_backend chooses, whose errors it raises."""
    name, passed_over = selection.select_backend(spec, requested)
    if name == "reference" and passed_over:
        _warn_once(spec, passed_over)
    return launching_route(spec, name, passed_over)


@lru_cache(maxsize=4096)
def launching_route(spec: LaunchSpec, name: str, passed_over: tuple[str, ...]) -> Route:
    """The route to a given backend."""
    return Route(name, passed_over, selection.serving_module(name, spec).prepare(spec))


_MOST_KEYS = 4096
by_key: dict[tuple, Route] = {}  # of calls whose operands kernels take as they are
unserved: dict[tuple, tuple[str, ...]] = {}  # of calls that no one launch serves: why none of the backends


def forget_routes() -> None:
    """Has every route found anew."""
    by_key.clear()
    unserved.clear()
    find_route.cache_clear()
    launching_route.cache_clear()


tuning.on_change(forget_routes)


def remember(key: tuple, route: Route, given: tuple, described: tuple) -> None:
    """Spares later calls of this key their description, where that changes nothing in their operands."""
    if all(one is other for one, other in zip(given, described, strict=True)):
        _remember(by_key, key, route, route.passed_over)


def remember_unserved(key: tuple, passed_over: tuple[str, ...]) -> None:
    """Likewise where no one launch serves them, for these reasons."""
    _remember(unserved, key, passed_over, passed_over)


def _remember(known: dict, key: tuple, what: object, reasons: tuple[str, ...]) -> None:
    if any(isinstance(reason, PassingReason) for reason in reasons):
        return
    if len(known) >= _MOST_KEYS:
        known.clear()
    known[key] = what


_warned = False


def _warn_once(spec: LaunchSpec, passed_over: tuple[str, ...]) -> None:
    """Says that a GPU's user gets the slow path, why, and what helps; once a process."""
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"fastlora serves a {spec.direction} of {spec.dtype} on {spec.device} by its reference in plain PyTorch,"
            f" which is slow there. It helps to mend one of these: {'; '.join(passed_over)}. This is said once;"
            " fastlora.dispatch_counts() has every call",
            stacklevel=2,
        )


def counted(route: Route) -> Launcher:
    """The launcher of the call at hand. Where a reason may have passed by the next call, routes are found anew."""
    calls[route.name] += 1
    for reason in route.passed_over:
        fallbacks[reason] += 1
        if isinstance(reason, PassingReason):
            forget_routes()
    return route.launcher
