"""The schedule model of projections that share an input: what one of them is alone, who waits for whom; the file."""

import json
from dataclasses import replace

import pytest

from benchmarks import RESULTS
from benchmarks.schedule import projections
from benchmarks.schedule.machine import Machine
from benchmarks.schedule.model import Problem, Simulation, simulate
from benchmarks.schedule.projections import SharedSimulation
from benchmarks.schedule.queue_order import Schedule, Tile

SMALL = Schedule(block_m=64, block_n=32, block_k=16, group_m=2, grad_columns=32, cluster=1)
MACHINE = Machine(sm_count=4)
NS = (96, 32, 64)


@pytest.mark.parametrize("backward", (False, True))
@pytest.mark.parametrize("fused", (False, True))
def test_one_projection_is_a_layer(backward, fused):
    problem, schedule = Problem(300, 96, 64, 16, backward), replace(SMALL, fused=fused)
    assert SharedSimulation(problem, (96,), schedule, MACHINE).run() == simulate(problem, schedule, MACHINE)


@pytest.mark.parametrize("fused", (False, True))
def test_a_column_waits_for_its_own_projections_s(fused):
    found = SharedSimulation(Problem(300, sum(NS), 64, 16), NS, replace(SMALL, fused=fused), MACHINE)
    first = 3 if fused else 0
    awaited = [list(found._awaited(Tile("base", 0, column))) for column in range(first, 6)]
    assert awaited == ([[0], [0], [2]] if fused else [[0], [0], [0], [1], [2], [2]])
    assert found.shrink == 3 and found.run().tiles == 5 * (6 + 3 * (not fused))


@pytest.mark.parametrize("fused", (False, True))
def test_a_backward_contracts_all_columns_once(fused):
    problem, schedule = Problem(300, sum(NS), 64, 16, backward=True), replace(SMALL, fused=fused)
    found = SharedSimulation(problem, NS, schedule, MACHINE)
    base = found._steps(Tile("base", 0, 1))
    shrinks = [found._steps(Tile("shrink", 0, i)) for i in range(found.shrink)]
    assert sum(depth for _, depth in base) == sum(NS)
    assert [sum(depth for _, depth in each) for each in shrinks] == ([sum(NS)] if fused else [*NS])
    assert found.run().tiles == 5 * (2 + 3 * (not fused)) + 3 * (6 + 3 * 2)
    assert len(found.queue) < sum(len(Simulation(replace(problem, n=n), schedule, MACHINE).queue) for n in NS)


def test_columns_must_be_whole_tiles():
    with pytest.raises(ValueError, match="must be whole tiles, 192 together"):
        SharedSimulation(Problem(64, 192, 64, 16), (100, 92), SMALL, MACHINE)


def test_the_page_is_made_of_the_file_and_the_file_of_the_model():
    path = RESULTS / "projection_schedule.json"
    found = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == projections.projection_table(found).to_markdown()
    row = projections._row("q, k, v", 512, True, Schedule(), Machine())
    assert projections.report([row])["rows"][0] in found["rows"]
