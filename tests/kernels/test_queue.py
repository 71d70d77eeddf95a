"""The queue's order is written by hand twice, in csrc/schedule.h and in backends/triton/schedule.py. Both are held to
one oracle, benchmarks/schedule/queue_order.py, which the schedule model runs on."""

import types

import pytest

from benchmarks.schedule import queue_order
from benchmarks.schedule.queue_order import Schedule, Tile
from fastlora.backends.cuda import extension

# Row blocks, columns of the output, gradient tiles of a group (dB, dA), row blocks of a group, tiles at once.
QUEUES = (
    (1, 1, (0, 0), 1, 1),
    (1, 5, (2, 1), 4, 2),
    (7, 5, (2, 3), 3, 1),
    (7, 5, (2, 3), 3, 11),
    (16, 9, (0, 4), 8, 132),
    (33, 5, (3, 0), 8, 16),
    (36, 2, (1, 1), 16, 66),
    (10, 1, (4, 5), 4, 7),
    (9, 0, (2, 2), 4, 5),  # a backward without dX: separate shrink
)


def expected(rows, columns, gradients, group_m, wave, fused, last, ahead=1) -> list[tuple[int, int, int]]:
    """(row block or group, column, gradient tile or -1); the first columns, ``ahead`` of them, make S."""

    def listed(tile: Tile) -> tuple[int, int, int]:
        if tile.kind in ("dA", "dB"):
            return tile.block, 0, tile.column + (gradients[0] if tile.kind == "dA" else 0)
        return tile.block, tile.column if tile.kind == "shrink" or fused else tile.column + ahead, -1

    schedule = Schedule(group_m=group_m, fused=fused, gradients_last=last)
    return [listed(tile) for tile in queue_order.build_queue(rows, columns, ahead, gradients, schedule, wave)]


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("ahead", (1, 3))
@pytest.mark.parametrize("rows, columns, gradients, group_m, wave", QUEUES)
def test_triton(rows, columns, gradients, group_m, wave, ahead, fused, last):
    """The source of locate itself, on Python's integers; also where several projections have a column that makes S."""
    pytest.importorskip("triton")
    from fastlora.backends.triton import schedule

    if fused and columns < ahead:
        return
    integers = types.SimpleNamespace(
        cdiv=queue_order.cdiv, minimum=min, maximum=max, where=lambda condition, yes, no: yes if condition else no
    )
    locate = types.FunctionType(schedule.locate.fn.__code__, {"tl": integers})
    n_columns, n_gradients = columns + (0 if fused else ahead), sum(gradients)
    n_tiles = rows * n_columns + queue_order.cdiv(rows, group_m) * n_gradients
    found = []
    for ticket in range(n_tiles):
        row, column, group, gradient = locate(ticket, rows, n_columns, n_gradients, int(last), wave, group_m, ahead)
        found.append((row, column, -1) if gradient < 0 else (group, 0, gradient))
    assert found == expected(rows, columns, gradients, group_m, wave, fused, last, ahead)


@pytest.mark.skipif(extension.load()[0] is None, reason=f"{extension.load()[1]}")
@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("tile", ((128, 256), (128, 128)))
@pytest.mark.parametrize("rows, columns, gradients, group_m, wave", QUEUES)
def test_cuda(rows, columns, gradients, group_m, wave, tile, fused, last):
    """By the plan of a launch of as many tiles, in units of the cluster's tiles."""
    if fused and not columns:
        return
    makes = {"makes_out": columns > 0, "grad_a": gradients[1] > 0, "grad_b": gradients[0] > 0}
    variant = next(
        v for v in extension.variants() if v["backward"] and (v["block_m"], v["block_n"], v["rank"]) == (*tile, 16)
    )
    gradient_columns = variant["gradient_columns"] * variant["cluster"]
    # Any size of so many blocks; N decides on the columns and on dA's blocks, so one of the two counts is the plan's.
    n = columns * tile[1] if columns else gradients[1] * gradient_columns
    blocks = gradients[0], queue_order.cdiv(n, gradient_columns) if gradients[1] else 0
    plan = extension.loaded().Plan(
        backward=True, fp16=False, dropout=False, block_m=tile[0], block_n=tile[1], r=16, splits=1, fused=fused,
        m=rows * tile[0] * variant["cluster"] - 5, n=n, k=max(gradients[0] * gradient_columns - 8, 8),
        group_m=group_m * variant["cluster"], ctas=wave * variant["cluster"], gradients_last=last, **makes,
    )  # fmt: skip
    found = [(row, column, gradient) for row, column, split, gradient in plan.queue()]
    wave = plan.ctas // variant["cluster"]
    assert found == expected(rows, columns, blocks, group_m, wave, fused, last)


@pytest.mark.skipif(extension.load()[0] is None, reason=f"{extension.load()[1]}")
@pytest.mark.parametrize("m, ctas", ((64, 4), (300, 4), (1500, 20)))
def test_each_split_of_a_cuda_tile_is_claimed_once_and_in_order(m, ctas):
    """The last split waits for the others, and every tile for its row's column 0: both must be claimed before."""
    plan = extension.loaded().Plan(
        backward=False, fp16=False, dropout=False, m=m, n=264, k=520, r=8, block_m=128, block_n=128, splits=3,
        group_m=2, ctas=ctas, fused=False,
    )  # fmt: skip
    place = {tuple(tile): i for i, tile in enumerate(plan.queue())}
    assert len(place) == len(plan.queue()) == -(-m // 128) * (3 + 1) * 3
    for (row, column, split, _), i in place.items():
        assert split == 0 or place[row, column, split - 1, -1] < i
        assert column == 0 or place[row, 0, 2, -1] < i


def expected_of_projections(rows, shrink_columns, columns, group_m, wave) -> list[tuple[int, int]]:
    """(row block, column) of a forward of several projections: the first columns make S."""
    groups = [[*range(first, min(first + group_m, rows))] for first in range(0, rows, group_m)]
    of_s = [[(row, column) for row in group for column in range(shrink_columns)] for group in groups]
    found, ahead = list(of_s[0]), [*of_s[1:], []]
    for group, next_s in zip(groups, ahead, strict=True):
        others = [(row, column) for column in range(shrink_columns, columns) for row in group]
        cut = max(len(others) - wave, 0)
        found += [*others[:cut], *next_s, *others[cut:]]
    return found


@pytest.mark.skipif(extension.load()[0] is None, reason=f"{extension.load()[1]}")
@pytest.mark.parametrize("fused", (False, True))
@pytest.mark.parametrize("tile", ((128, 256), (128, 128)))
@pytest.mark.parametrize("rows, group_m, ctas", ((1, 1, 1), (7, 3, 2), (33, 8, 16), (36, 16, 66)))
def test_projections_of_cuda(rows, group_m, ctas, tile, fused):
    """Three columns of one, one of another, and two of one without an adapter."""
    block_m, block_n = tile
    cluster = 2 if block_n == 256 else 1
    sizes = ((3 * block_n - 8, 64), (block_n, 8), (2 * block_n, 0))
    plan = extension.loaded().Plan(
        backward=False, fp16=False, dropout=False, m=rows * block_m * cluster - 5, n=0, k=64, r=0, block_m=block_m,
        block_n=block_n, splits=1, fused=fused, group_m=group_m * cluster, ctas=ctas * cluster,
        projections=[(n, r, False, False, False) for n, r in sizes],
    )  # fmt: skip
    assert plan.variant["shared"]
    columns = 6 if fused else 8
    found = [(row, column) for row, column, split, gradient in plan.queue()]
    assert found == expected_of_projections(rows, 2, columns, group_m, plan.ctas // cluster)
