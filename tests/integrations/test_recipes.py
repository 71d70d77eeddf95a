"""PEFT's common recipes, each built and run: patched as stock, served as benchmarks/results/recipes.* says."""

import importlib.util
import json

import pytest

pytest.importorskip("peft")

import fastlora
from benchmarks import recipes, segments

NEEDS = {"QLoRA, bitsandbytes nf4": "bitsandbytes", "torchao int8 weights": "torchao"}
BUILT = {recipe.name: recipe for recipe in recipes.RECIPES}


def test_there_are_22():
    assert len(BUILT) == len(recipes.RECIPES) == 22


@pytest.mark.parametrize("name", BUILT)
def test_a_recipe_agrees_with_stock_and_is_served_as_the_page_says(name):
    """After a change of what is served: ``python -m benchmarks.recipes`` and ``python -m benchmarks.readme_tables``."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    row = recipes.run(BUILT[name])
    assert row["agrees"]
    (page,) = [row for row in json.loads(recipes.RESULT.read_text())["rows"] if row["recipe"] == name]
    assert row == page


@pytest.mark.parametrize("case", segments.CASES, ids=lambda case: case.name)
def test_rows_in_segments_are_all_served_and_agree_with_stock(case):
    """Tiny models with experts and attention targeted; batches of three adapters and of rows without."""
    row = recipes.run(case)
    assert row["agrees"] and not row["by_peft"]
    counts = fastlora.dispatch_counts()
    served = sum(count for name, count in counts.items() if name != "fallbacks")
    assert served == row["layers"] * (2 if case.trains else 1) and not counts["fallbacks"]
    assert row in json.loads(segments.RESULT.read_text())["rows"]


def test_the_page_of_rows_in_segments_is_made_of_its_file():
    report = json.loads(segments.RESULT.read_text())
    assert [row["recipe"] for row in report["rows"]] == [case.name for case in segments.CASES]
    assert segments.RESULT.with_suffix(".md").read_text() == segments.segments_table(report).to_markdown()


def test_a_recipe_that_computes_something_else_is_seen(monkeypatch):
    """Without its branch, with half a gradient: the comparison is no formality."""
    recipe = BUILT["LoRA on linear layers"]
    real = recipes.patch

    def broken(model):
        real(model)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.scaling["default"] *= 1.001

    monkeypatch.setattr(recipes, "patch", broken)
    assert not recipes.run(recipe)["agrees"]
    assert (
        "| LoRA on linear layers | 6 | fastlora | - | NO |"
        in recipes.results_table({"rows": [recipes.run(recipe)]}).to_markdown()
    )
