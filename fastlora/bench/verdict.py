"""What a report comes to: its result in a sentence, and the rows that the sentence and the first picture are of."""

from statistics import geometric_mean

from fastlora.bench.peers import FASTLORA, FROZEN
from fastlora.bench.tables import case_label, unique
from fastlora.tables import time_text

PEFT = "peft"
MODELS = ("decoder", "finetune", "experts", "batches")


def headline_case(rows: list[dict]) -> list[dict]:
    """The rows of a step at the case that most variants serve; of several such, the first."""
    steps = [row for row in rows if row["pass"] == "step"]
    labels = [case_label(row) for row in steps]
    if not labels:
        return []
    chosen = max(dict.fromkeys(labels), key=labels.count)
    return [row for row, label in zip(steps, labels, strict=True) if label == chosen]


def means_over_cases(rows: list[dict]) -> tuple[dict[str, float], int]:
    """Geometric means of the ratios to the frozen layer's step, of the variants that serve every case; how many cases.

    A variant that lacks a case has no mean here: it would be one over other work.
    """
    steps = [row for row in rows if row["pass"] == "step"]
    cases = unique(map(case_label, steps))
    ratios: dict[str, list[float]] = {}
    for row in steps:
        ratios.setdefault(row["variant"], []).append(row["ratio_to_frozen"])
    whole = {name: geometric_mean(found) for name, found in ratios.items() if len(found) == len(cases)}
    return whole, len(cases)


def percent(ratio: float) -> str:
    """A ratio to the frozen layer as what is added: 1.104 is +10.4%."""
    return f"{ratio - 1:+.1%}"


def verdict(report: dict) -> str:
    """The result of the widest section that was measured, in a sentence or two."""
    if report["layer"]:
        return _layer_verdict(report["layer"])
    for section in MODELS:
        rows = report.get(section, [])
        steps = {row["variant"]: row for row in rows if row["pass"] == "step" and row["name"] == rows[0]["name"]}
        if FASTLORA.name in steps:
            return _ratios(f"A step of {rows[0]['name']}", steps) + "."
    rows = {row["variant"]: row for row in report["host"]}
    if FASTLORA.name in rows:
        return _host_verdict(rows)
    return "Nothing was measured with fastlora in it."


def _layer_verdict(rows: list[dict]) -> str:
    chosen = headline_case(rows)
    steps = {row["variant"]: row for row in chosen}
    if FASTLORA.name not in steps:
        return "Nothing was measured with fastlora in it."
    text = _ratios(f"A step of one layer ({case_label(chosen[0])})", steps)
    others = {name: row for name, row in steps.items() if name not in (FASTLORA.name, FROZEN.name, PEFT)}
    if others:
        best = min(others.values(), key=lambda row: row["ratio_to_frozen"])
        text += f"; the fastest of {len(others)} others is {best['variant']}, {percent(best['ratio_to_frozen'])}"
    means, cases = means_over_cases(rows)
    if cases > 1 and FASTLORA.name in means:
        beside = f", PEFT {percent(means[PEFT])}" if PEFT in means else ""
        text += f". Over {cases} cases: fastlora {percent(means[FASTLORA.name])}{beside} (geometric means)"
    return text + "."


def _ratios(what: str, steps: dict[str, dict]) -> str:
    ours = steps[FASTLORA.name]
    text = f"{what} takes fastlora {time_text(ours['median_us'])}, {percent(ours['ratio_to_frozen'])} against the"
    text += " frozen layer"
    return text + (f" (PEFT {percent(steps[PEFT]['ratio_to_frozen'])})" if PEFT in steps else "")


def _host_verdict(rows: dict[str, dict]) -> str:
    ours = rows[FASTLORA.name]
    text = f"A call of a tiny layer, forward and backward, takes fastlora {time_text(ours['median_us'])} of the CPU"
    if ours["ratio_to_peft"] is not None:
        text += f", {ours['ratio_to_peft']:.2f} of PEFT's"
    return text + f" and {ours['ratio_to_frozen']:.2f} of the frozen layer's."
