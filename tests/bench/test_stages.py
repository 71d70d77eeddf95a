"""Three stages or four: the pipeline's steady state by hand, and counts that are the committed kernels'."""

import re

import pytest

from benchmarks import RESULTS
from benchmarks.cuda_resources import table
from benchmarks.schedule.stages import (
    MMA_CLOCKS,
    PIPELINES,
    RELEASE_CLOCKS,
    WAIT_CLOCKS,
    Epilogue,
    Pipeline,
    as_text,
    break_even,
    tile_clocks,
)

FREE = Epilogue(0, 0)


def per_step(stages: int, producer_step: int, copy_clocks: int) -> float:
    pipeline = Pipeline(stages, producer_step, FREE)
    return (tile_clocks(pipeline, 64 * 128, copy_clocks) - tile_clocks(pipeline, 64 * 64, copy_clocks)) / 64


@pytest.mark.parametrize("stages", (3, 4))
def test_a_copy_is_hidden_until_it_outlasts_the_other_stages(stages):
    hidden = (stages - 1) * MMA_CLOCKS - RELEASE_CLOCKS - WAIT_CLOCKS - 100
    assert per_step(stages, 100, hidden) == MMA_CLOCKS
    assert per_step(stages, 100, hidden + 300) == pytest.approx(MMA_CLOCKS + 300 / stages, rel=0.002)


def test_the_slower_of_producer_and_tensor_cores_sets_the_pace():
    assert per_step(4, 2000, 0) == 2000


def test_what_is_compared_was_counted():
    kernels = table.from_json((RESULTS / "cuda_resources.json").read_text())["kernels"]
    for direction, (three, _) in PIPELINES.items():
        rows = kernels[f"lora_sm90_{direction}_bf16_128x256_r16"]["rows"]
        assert rows["consumer base: epilogue"]["stalls"] == three.epilogue.stalls
        assert rows["consumer base: epilogue"]["barriers"] == three.epilogue.barriers
        assert rows["producer base: loop"]["stalls"] == three.producer_step


def test_the_table_says_where_both_are_equal():
    three, four = PIPELINES["forward"]
    equal = break_even("forward", 4096)
    assert tile_clocks(four, 4096, equal) < tile_clocks(three, 4096, equal)
    assert tile_clocks(four, 4096, equal - 20) >= tile_clocks(three, 4096, equal - 20)
    assert re.search(rf"forward, 4096 contracted .* {equal}$", as_text(), re.M)
