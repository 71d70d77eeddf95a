"""An adapter's layers, one after another: everything that can be said of each, as plain values."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict

from torch import Tensor

from fastlora.adapters.files import AdapterLayer
from fastlora.analysis.projections import amplification
from fastlora.analysis.spectra import effective_rank, spectrum
from fastlora.analysis.subspaces import delta_cosine, random_similarity, row_similarity, subspace_similarity

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
# Mean cosine of corresponding rows of two A above which they began alike. Rows of independent ones have one of 0 with
# a standard deviation of 1 / sqrt(rows·K), which matters where A is tiny.
_SAME_START, _DEVIATIONS = 0.3, 5.0
_FLAT_LIST = re.compile(
    r"\"(?:[^\"\\]|\\.)*\"|\[[^\[\]{}\"]*\]"
)  # a string, which stays as it is, or a list of numbers


def matrix_type(path: str) -> str:
    """What the paper calls the type of a weight matrix: the last component of its path, q_proj say."""
    return path.rpartition(".")[2]


def layer_number(path: str) -> int | None:
    """The first number in a module path, which counts the decoder layers; None without one."""
    found = _NUMBER.search(path)
    return int(found[1]) if found else None


def analyze_layers(
    layers: Mapping[str, AdapterLayer],
    weights: Mapping[str, Tensor] | None = None,
    others: Mapping[str, AdapterLayer] | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Spectrum, effective rank and norm of every layer's ΔW; amplification and similarity where there is what it takes.

    Args:
        layers: the adapter, by module path.
        weights: the frozen weight [N, K] of each of these paths, or None.
        others: a second adapter on the same paths, of any rank, or None.
        on_layer: called after each layer.

    Returns:
        A dictionary a layer, in the adapter's order: path, type, layer, shape [N, K], rank, scaling, delta_norm,
        spectrum, effective_rank; with weights "amplification" (the fields of `Amplification`); with others
        "similarity": rank_against, delta_cosine, the tables a and b [r1][r2], what chance would give for them (random
        and random_b), and rows_of_a, the mean cosine of A's corresponding rows, with same_start, what it means.

    Raises:
        ValueError: a layer holds NaN, or does not fit its weight or its other; the message names the path.
        TypeError: a weight is not a floating-point one; likewise.
    """
    found = []
    for path, layer in layers.items():
        try:
            found.append(_analyze(path, layer, weights and weights[path], others and others[path]))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from error
        on_layer()
    return found


def _analyze(path: str, layer: AdapterLayer, weight: Tensor | None, other: AdapterLayer | None) -> dict:
    a, b, scaling = layer
    values = spectrum(a, b, scaling)
    row = {
        "path": path,
        "type": matrix_type(path),
        "layer": layer_number(path),
        "shape": [b.shape[0], a.shape[1]],
        "rank": a.shape[0],
        "scaling": scaling,
        "delta_norm": values.norm().item(),
        "spectrum": values.tolist(),
        "effective_rank": effective_rank(values),
    }
    if weight is not None:
        row["amplification"] = asdict(amplification(weight, a, b, scaling))
    if other is not None:
        ranks = a.shape[0], other.lora_a.shape[0]
        rows_of_a = row_similarity(a, other.lora_a)
        row["similarity"] = {
            "rank_against": ranks[1],
            "delta_cosine": delta_cosine(layer, other),
            "a": subspace_similarity(a, other.lora_a).tolist(),
            "b": subspace_similarity(b, other.lora_b, side="left").tolist(),
            "random": random_similarity(*ranks, a.shape[1]).tolist(),
            "random_b": random_similarity(*ranks, b.shape[0]).tolist(),
            "rows_of_a": rows_of_a,
            "same_start": rows_of_a > max(_SAME_START, _DEVIATIONS / math.sqrt(min(ranks) * a.shape[1])),
        }
    return row


def json_values(value: object) -> object:
    """The value for JSON, which has no NaN and no infinity: null stands for what is not defined."""
    if isinstance(value, dict):
        return {key: json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_text(value: object) -> str:
    """The value, as `json_values` has it, in indented JSON; a list of numbers takes one line."""
    text = json.dumps(json_values(value), indent=1, allow_nan=False)
    return _FLAT_LIST.sub(_on_one_line, text) + "\n"


def _on_one_line(found: re.Match) -> str:
    text = found[0]
    return text if text.startswith('"') else "[" + ", ".join(text[1:-1].replace(",", " ").split()) + "]"
