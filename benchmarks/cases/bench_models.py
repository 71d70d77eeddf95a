"""One decoder layer, and the fine-tuning step of the demo model's shape, under pytest-benchmark; models are compared
with each other before they are timed."""

import pytest
import torch

from fastlora.bench.models import VARIANTS, WHOLE_MODEL_VARIANTS, build_stages, decoder_case, finetune_case, make_inputs


@pytest.fixture(scope="module", params=["decoder", "finetune"])
def built(request):
    """The section, and its stages by variant."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = request.param == "finetune"
    case = (finetune_case if whole else decoder_case)(device)
    _, stages, missing = build_stages(case, *make_inputs(case, device), whole)
    return request.param, stages, missing


@pytest.mark.parametrize("variant", VARIANTS)
def bench_model(benchmark, built, variant, device):
    section, stages, missing = built
    if section == "finetune" and variant not in WHOLE_MODEL_VARIANTS:
        pytest.skip("not timed as a whole model")
    if variant not in stages:
        pytest.skip(missing.get(variant, "transformers is not installed"))
    benchmark.group = section
    stage = stages[variant]

    def step():
        stage.forward()
        stage.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5 if section == "finetune" else 20, warmup_rounds=1)
