"""The choice of a tile, and who makes S: pure functions of sizes and of the GPU."""

import dataclasses

import pytest

from benchmarks.schedule.machine import Machine
from benchmarks.schedule.model import Problem, simulate
from benchmarks.schedule.queue_order import Schedule
from benchmarks.schedule.sweep import KERNELS, default_schedule
from fastlora.backends.configs import (
    FEW_ROWS,
    FUSED_RANK,
    TILE_TABLES,
    TileConfig,
    choose_config,
    fuses_shrink,
    table_for,
)


def choose(direction="forward", m=8192, n=4096, k=4096, r=16, arch=90, element_size=2, aligned=True) -> TileConfig:
    return choose_config(direction, m, n, k, r, arch=arch, n_sms=132, element_size=element_size, aligned=aligned)


@pytest.mark.parametrize("r", (1, 16, 40, 64, 65, 256))
@pytest.mark.parametrize("element_size, aligned", ((2, True), (2, False), (4, True)))
@pytest.mark.parametrize("arch", (80, 86, 90, 100, 120))
@pytest.mark.parametrize("m", (1, 32, 33, 100, 2048, 8192))
def test_a_choice_is_a_tile_of_its_table(m, arch, element_size, aligned, r):
    chosen = choose(m=m, r=r, arch=arch, element_size=element_size, aligned=aligned)
    table = TILE_TABLES[table_for(arch, r, element_size, aligned, m <= FEW_ROWS)]
    assert dataclasses.replace(chosen, fused=table[0].fused) in table


@pytest.mark.parametrize("arch", (80, 90, 100))
@pytest.mark.parametrize("m, height", ((1, 16), (16, 16), (17, 32), (33, 64), (64, 64)))
def test_one_row_block_where_it_is_asked_for(arch, m, height):
    """And of tiles of that height the one that gives most multiprocessors work."""
    shape = {"n": 4096, "k": 4096, "r": 16, "arch": arch, "n_sms": 132, "element_size": 2, "aligned": True}
    chosen = choose_config("forward", m, **shape, one_row_block=True)
    assert chosen.block_m == height and (m > 16 or chosen.block_n == 32)
    assert choose_config("forward", 33, **shape).block_m < 33, "by default several, where these are more tiles"


def test_columns_are_those_of_the_direction():
    """A layer of few outputs has few tiles forward and many backward."""
    forward, backward = (choose(direction, m=512, n=128, k=14336) for direction in ("forward", "backward"))
    assert forward.block_m * forward.block_n < backward.block_m * backward.block_n


def test_large_layers_fuse_the_shrink_and_small_ones_have_it_separate():
    """S then costs no pass over rows that are too many for the last cache, nor a wait where a launch is short."""
    assert choose(m=16384, r=16).fused and choose(m=16384, n=14336, r=64).fused
    assert not choose(m=512, r=16).fused and not choose(m=8192, r=64).fused
    assert not choose(m=16384, n=14336, r=FUSED_RANK + 1).fused
    assert choose(m=16, element_size=4).fused  # a separate tile of S spills


@pytest.mark.parametrize(
    "rank, block_n, waves, fused",
    (
        (16, 256, 8, False),
        (16, 256, 9, True),
        (32, 256, 9, True),
        (33, 256, 16, False),
        (64, 256, 17, True),
        (64, 64, 66, False),
    ),
)
def test_the_wait_for_s_is_a_small_part_of_the_launch(rank, block_n, waves, fused):
    """It is the share of S's columns in a tile, once a launch; part of a wave counts as one."""
    assert fuses_shrink(rank, block_n, (waves - 1) * 132 + 1, 132) == fused


def test_drawing_a_mask_in_front_of_a_product_makes_the_wait_for_s_longer():
    plain = dict(rank=16, block_n=256, n_tiles=40 * 132, n_programs=132)
    assert fuses_shrink(**plain) and not fuses_shrink(**plain, draws=True)
    assert fuses_shrink(**{**plain, "n_tiles": 41 * 132}, draws=True)
    sizes = dict(m=16384, n=14336, k=4096, r=16, arch=90, n_sms=132, element_size=2, aligned=True)
    drops = {direction: choose_config(direction, **sizes, dropout=True).fused for direction in ("forward", "backward")}
    assert drops == {"forward": True, "backward": True}
    sizes["n"] = 4096
    assert choose_config("forward", **sizes).fused and not choose_config("forward", **sizes, dropout=True).fused
    assert choose_config("backward", **sizes, dropout=True).fused, "dS is made of dY, which has no mask"


def default_and_other(kernel: str, problem: Problem, choice: str) -> tuple[Schedule, float, float]:
    """What the kernels are launched with, the model's time of it, and that of the other ``choice``."""
    default = default_schedule(kernel, problem, Machine())
    other = dataclasses.replace(default, **{choice: not getattr(default, choice)})
    return default, *(simulate(problem, schedule).makespan for schedule in (default, other))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("way", ("forward", "dropout"))
@pytest.mark.parametrize("m, n, k, r", ((512, 4096, 4096, 16), (8192, 8192, 8192, 16), (2048, 14336, 4096, 64)))
def test_shrinks_are_fused_where_the_schedule_model_finds_it_best(kernel, m, n, k, r, way):
    """To 3%, which is more than an uncalibrated model can tell apart."""
    _, found, found_other = default_and_other(kernel, Problem(m, n, k, r, dropout=way == "dropout"), "fused")
    assert found <= 1.03 * found_other


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "m, n, k, last",
    ((8192, 4096, 1024, True), (8192, 1024, 4096, False), (2048, 1024, 4096, True), (4096, 1024, 4096, False)),
)
def test_gradients_are_last_where_the_schedule_model_finds_it_best(kernel, m, n, k, last):
    """Few long tiles of dX, or many short ones whose rows would have to come from DRAM once more."""
    default, found, found_other = default_and_other(kernel, Problem(m, n, k, 16, backward=True), "gradients_last")
    assert default.gradients_last == last and 1.03 * found < found_other


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m, n, k, r", ((8192, 4096, 1024, 16), (8192, 4096, 1024, 64), (4096, 2048, 2048, 64)))
def test_gradients_with_dropout_are_where_the_schedule_model_finds_it_best(kernel, m, n, k, r):
    """Sizes at which they are last without: kernels that draw masks while products are in flight have them between.
    To 3%, as above."""
    problem = Problem(m, n, k, r, backward=True, dropout=True)
    default, found, found_other = default_and_other(kernel, problem, "gradients_last")
    assert default.gradients_last != default.overlap and found <= 1.03 * found_other


@pytest.mark.parametrize("m, n, k, rows", ((4096, 4096, 4096, 8), (8192, 1024, 4096, 8), (8192, 4096, 1024, 16)))
def test_groups_of_a_backward_with_dropout_are_as_long_as_the_schedule_model_finds_best(m, n, k, rows):
    problem = Problem(m, n, k, 16, backward=True, dropout=True)
    default = default_schedule("overlapped stores, multicast", problem, Machine())
    other = dataclasses.replace(default, group_m=24 - default.group_m)
    assert default.group_m == rows
    assert 1.03 * simulate(problem, default).makespan < simulate(problem, other).makespan
