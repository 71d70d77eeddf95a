"""How often each backend served a call, and why a faster one did not."""

from collections import Counter

from fastlora.problem import BACKENDS

GROUPS = "groups"  # their count, among those of backends

calls: Counter[str] = Counter()
fallbacks: Counter[str] = Counter()


def count_fallback(reason: str) -> None:
    """Counts a call that something above the kernels (an integration, say) served without fastlora."""
    fallbacks[reason] += 1


def count_group() -> None:
    """Counts a forward in which layers of a model that share an input were computed together."""
    calls[GROUPS] += 1


def dispatch_counts() -> dict:
    """Calls since the last reset: ``{"cuda": n, "triton": n, "composed": n, "reference": n}`` and, under "fallbacks",
    ``{reason: n}``.

    Each forward and each backward pass of a layer is one call. Where layers that share an input were computed together
    (``group=``), "groups" says in how many forward passes of a group.
    """
    groups = {GROUPS: calls[GROUPS]} if calls[GROUPS] else {}
    return {**{name: calls[name] for name in BACKENDS}, **groups, "fallbacks": dict(fallbacks)}


def reset_dispatch_counts() -> None:
    """Sets every count to zero."""
    calls.clear()
    fallbacks.clear()
