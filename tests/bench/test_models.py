"""Adapters inside a model: every variant holds the same adapters and computes the same, or is not timed."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora.bench import models
from fastlora.bench.correctness import WrongResult
from fastlora.bench.cost import model_cost
from fastlora.bench.models import ModelCase, build_variants, check_outputs, decoder_case, finetune_case, measure_model

pytest.importorskip("transformers", reason="the models are transformers' own")

TINY = ModelCase("tiny", 16, 24, 4, 2, 2, 32, 2, 6, 3, torch.float32)


@pytest.mark.parametrize("whole", [False, True])
def test_every_variant_is_measured(whole):
    rows, missing = measure_model(TINY, "cpu", seconds=0.0, whole=whole)
    variants = {row["variant"] for row in rows}
    assert {"frozen", "fastlora"} <= variants and not variants & set(missing)
    assert {row["pass"] for row in rows} == ({"step"} if whole else {"forward", "backward", "step"})
    steps = {row["variant"]: row for row in rows if row["pass"] == "step"}
    assert steps["frozen"]["ratio_to_frozen"] == 1.0
    assert steps["fastlora"]["saved_bytes"] > steps["frozen"]["saved_bytes"]
    assert all(row["median_us"] > 0 and row["dtype"] == "float32" for row in rows)
    for row in rows:
        cost = model_cost(TINY, row["pass"], row["variant"] != "frozen", whole)
        assert (
            row["tflops"] == cost.flops / row["median_us"] / 1e6 and row["gbs"] == cost.bytes / row["median_us"] / 1e3
        )


def test_layers_of_one_input_are_computed_together_in_their_variant_alone():
    """q, k, v and gate, up of each of two layers, forward; the run of all variants is one."""
    models_of, stages, _ = models.build_stages(TINY, *models.make_inputs(TINY, "cpu"), whole=False)
    for name in models_of:
        fastlora.reset_dispatch_counts()
        stages[name].forward()
        assert fastlora.dispatch_counts().get("groups", 0) == (4 if name == models.GROUPED else 0)


@pytest.mark.parametrize("whole, variants", [(False, ("frozen", "eager")), (True, ("frozen",))])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_the_cost_of_a_model_is_what_torch_counts(which, whole, variants):
    """Of the products outside attention, which torch counts on some devices alone."""
    _, stages, _ = models.build_stages(TINY, *models.make_inputs(TINY, "cpu"), whole)
    for name in variants:
        stages[name].forward()
        with FlopCounterMode(display=False) as counter:
            getattr(stages[name], which)()
        counted = sum(flops for operator, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(operator))
        scores = TINY.layers * 2 * TINY.batch * TINY.length**2 * TINY.hidden  # both products of a causal half
        attention = scores * (1 if which == "forward" else 2)
        assert counted == model_cost(TINY, which, name != "frozen", whole).flops - attention


def outputs_of(built):
    hidden = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return {name: model.model(inputs_embeds=hidden).last_hidden_state for name, model in built.items()}


def test_variants_share_the_base_weights_and_hold_equal_adapters():
    built, _ = build_variants(TINY, "cpu")
    check_outputs(outputs_of(built))
    weights = [model.model.embed_tokens.weight.data_ptr() for model in built.values()]
    assert len(set(weights)) == 1
    trained = {name: sum(p.numel() for p in model.parameters() if p.requires_grad) for name, model in built.items()}
    assert trained.pop("frozen") == 0 and len(set(trained.values())) == 1


@pytest.mark.parametrize("defect", ["one adapter differs", "no adapter at all"])
def test_a_model_that_computes_something_else_is_found(defect):
    built, _ = build_variants(TINY, "cpu")
    for name, parameter in built["fastlora"].named_parameters():
        if "lora_B" in name and (defect == "no adapter at all" or "layers.1.mlp.down_proj" in name):
            parameter.data.zero_()
    with pytest.raises(WrongResult, match="fastlora: output is off"):
        check_outputs(outputs_of(built))


def test_an_eager_model_without_its_branch_is_found():
    outputs = outputs_of(build_variants(TINY, "cpu")[0])
    outputs["eager"] = outputs["frozen"]
    with pytest.raises(WrongResult):
        check_outputs(outputs)


def test_without_transformers_the_section_is_listed_as_missing(monkeypatch):
    def build_model(case, device):
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(models, "build_model", build_model)
    rows, missing = measure_model(TINY, "cpu", seconds=0.0, whole=False)
    assert rows == [] and missing == {"tiny": "not installed: No module named 'transformers'"}


def test_the_demo_models_shape():
    case = replace(finetune_case("cpu"), layers=1)
    model = models.build_model(replace(case, vocabulary=8), "cpu")
    assert model.model.layers[0].mlp.up_proj.weight.shape == (1536, 576)
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (192, 576)
    assert decoder_case("cuda").hidden == 4096 and finetune_case("cpu").layers == 30
