"""Counts what every order of a LoRA layer's work reads, writes and multiplies, on the kernels' own PTX.

The emulator of tests/emulator runs the compiled kernels and counts the bytes that cross between the grid and each
tensor, the matrix instructions and the barriers. Ours are the launchers' real launches; other packages' orders are
those of peer_orders.py, from plain kernels with the same tile. Every row's results are checked against fp64 before its
counters count. Traffic between L2 and the multiprocessors is what is counted; time is not.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from unittest import mock

import torch

from benchmarks.traffic.peer_orders import ORDERS, Order
from benchmarks.traffic.report import key_of
from fastlora.backends import workspace
from fastlora.backends.configs import TILE_TABLES, TileConfig
from fastlora.backends.cuda import launch as cuda
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.environment import package_versions
from fastlora.problem import Needs
from tests.emulator import LaunchOptions, LaunchStats, load_ptx
from tests.support import cuda_emulation, launches, numerics, triton_emulation
from tests.support.compile_target import Launch, compile_for

SHAPE = {"m": 512, "n": 512, "k": 384, "r": 16}
DROPOUT = 0.1
NEEDS = Needs(True, True, True, False)  # the bias of a fine-tuned layer is frozen
# A CTA (or cluster) at a time: no wait polls, so that counters are the kernel's own. A busy machine is no failure.
OPTIONS = LaunchOptions(resident=1, timeout_s=1200.0)

# Kernel arguments by the names of the mathematics.
_PARTIAL = {"partial_a_ptr": "partial sums", "partial_b_ptr": "partial sums", "gradient_partials": "partial sums"}
TRITON_NAMES = {
    "x": "X", "x_ptr": "X", "weight": "W0", "lora_a": "A", "lora_a_ptr": "A", "lora_b": "B", "lora_b_ptr": "B",
    "y_ptr": "Y", "s_ptr": "S", "dy": "dY", "dy_ptr": "dY", "dx_ptr": "dX", "ds_ptr": "dS", "da_ptr": "dA",
    "db_ptr": "dB", **_PARTIAL,
}  # fmt: skip
_CUDA = {"weight": "W0", "lora_a": "A", "lora_b": "B", "split_partials": "parts of tiles", **_PARTIAL}
_CUDA_FORWARD = {**_CUDA, "act": "X", "out": "Y", "s": "S"}
_CUDA_BACKWARD = {
    **_CUDA, "act": "dY", "out": "dX", "s": "dS", "layer_input": "X", "saved_s": "S", "grad_a": "dA", "grad_b": "dB",
}  # fmt: skip


def summed(launches: list[tuple[LaunchStats, dict[str, str]]]) -> dict:
    """The counters of a direction: of its launches, each with the names of its buffers' tensors.

    Bytes of a tensor are summed over launches; "distinct" ones are those that a launch touches at all.
    """
    total = {"launches": len(launches), "barriers": 0, "matrix_instructions": 0, "multiply_adds": 0, "tensors": {}}
    for stats, names in launches:
        total["barriers"] += stats.barriers
        total["matrix_instructions"] += stats.mma + stats.wgmma
        total["multiply_adds"] += stats.macs
        for argument, buffer in stats.buffers.items():
            if argument.startswith("workspace"):
                continue
            tensor = total["tensors"].setdefault(
                names[argument], dict.fromkeys(("read", "read_distinct", "written", "written_distinct"), 0)
            )
            tensor["read"] += buffer.bytes_read
            tensor["read_distinct"] += buffer.first_touch_read
            tensor["written"] += buffer.bytes_written
            tensor["written_distinct"] += buffer.first_touch_written
    return total


def added_up(counters: list[dict]) -> dict:
    """Launches and bytes of several counters, in one."""
    total: dict = {"launches": 0, "tensors": {}}
    for each in counters:
        total["launches"] += each["launches"]
        for name, tensor in each["tensors"].items():
            into = total["tensors"].setdefault(name, dict.fromkeys(tensor, 0))
            for counter, value in tensor.items():
                into[counter] += value
    return total


class PeerRun:
    """Runs plain Triton launches in the emulator and keeps their counters; memory that nobody wrote may not be read."""

    def __init__(self, inputs: list[torch.Tensor]):
        self.launches: list[tuple[LaunchStats, dict[str, int]]] = []
        self._written = {tensor.data_ptr() for tensor in inputs}

    def __call__(self, launch: Launch) -> None:
        addresses: dict[int, str] = {}
        for name, argument in launch.args.items():
            if isinstance(argument, torch.Tensor):
                addresses.setdefault(argument.data_ptr(), name)  # out and addend may be one tensor: one buffer
        metadata = launch.kernel.metadata
        stats = load_ptx(launch.kernel.asm["ptx"]).launch(
            metadata.name,
            grid=launch.grid,
            block=32 * metadata.num_warps,
            args=launch.args | {"global scratch": None, "profile scratch": None},
            shared_bytes=metadata.shared,
            uninitialised=[name for address, name in addresses.items() if address not in self._written],
            options=OPTIONS,
        )
        self._written |= addresses.keys()
        self.launches.append((stats, {name: address for address, name in addresses.items()}))

    def counters(self, tensors: dict[str, torch.Tensor]) -> dict:
        """The counters since the last call, by the names of ``tensors``."""
        names = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        named = [(stats, {argument: names[a] for argument, a in buffers.items()}) for stats, buffers in self.launches]
        self.launches = []
        return summed(named)


def count_peer(order: Order, case: numerics.Case, arch: int, tile: TileConfig) -> tuple[dict, dict]:
    """Counters of both directions of an order of peer_orders.py, whose results are checked."""
    inputs = {"X": case.x, "W0": case.weight, "A": case.lora_a, "B": case.lora_b, "dY": case.dy}
    run = PeerRun(list(inputs.values()))
    with compile_for(arch, run):
        made = order.forward(case, tile)
        forward = run.counters(inputs | made)
        grads = order.backward(case, made, tile)
        backward = run.counters(inputs | made | grads)
    if "dA" in grads:
        results = {"y": made["Y"], "dx": grads["dX"], "da": grads["dA"], "db": grads["dB"]}
        numerics.assert_accurate(results, case)
    else:
        frozen = replace(case, lora_b=torch.zeros_like(case.lora_b))
        numerics.assert_accurate({"y": made["Y"], "dx": grads["dX"]}, frozen)
    return forward, backward


@contextmanager
def own_workspace():
    with mock.patch.object(workspace, "_by_stream", {}):
        yield


def count_triton(case: numerics.Case, arch: int, tile: TileConfig) -> tuple[dict, dict]:
    """Counters of the Triton kernels' launch forward and launch backward, whose results are checked."""
    c, target = case, Target(arch, n_sms=8)
    shared = (c.scaling, c.dropout_p, c.seed)
    with (
        own_workspace(),
        mock.patch.object(triton_lora, "target_of", lambda device: target),
        triton_emulation.emulated(arch, OPTIONS) as stats,
    ):
        y, s = launches.forward(triton_lora, c.x, c.weight, c.lora_a, c.lora_b, c.bias, *shared, config=tile)
        forward = [(launch, TRITON_NAMES) for launch in stats]
        grads = launches.backward(triton_lora, c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, *shared, NEEDS, config=tile)
    numerics.assert_accurate({"y": y, "dx": grads.dx, "da": grads.da, "db": grads.db}, case)
    return summed(forward), summed([(launch, TRITON_NAMES) for launch in stats[len(forward) :]])


def count_cuda(case: numerics.Case, tile: cuda.CudaTile) -> tuple[dict, dict] | None:
    """Counters of the CUDA kernels' launch forward and launch backward, whose results are checked; None where the tile
    has a fused shrink that a kernel cannot do."""
    transposed = cuda_emulation.lies_transposed(case.weight)
    variants = cuda_emulation.variants_for(tile, case.dropout_p > 0, case.lora_a.shape[0], transposed=transposed)
    if tile.fused and not all(variant["fuses"] for variant in variants):
        return None
    with own_workspace(), cuda_emulation.emulated(OPTIONS) as launch:
        results, _ = cuda_emulation.run_layer(case, tile, ctas=8, needs=NEEDS)
    numerics.assert_accurate(results, case)
    forward, backward = launch.stats
    return summed([(forward, _CUDA_FORWARD)]), summed([(backward, _CUDA_BACKWARD)])


@dataclass(frozen=True)
class Group:
    """Rows that are compared with each other: one architecture, one tile."""

    name: str
    arch: int
    tile: TileConfig  # of the plain kernels
    peers: tuple[str, ...]
    ours: dict[str, Callable[[numerics.Case], tuple[dict, dict] | None]]


def square_tile(table: str) -> TileConfig:
    """The shipped tile of 64 x 64, in groups so short that gradients have parts at this size."""
    tiles = (*TILE_TABLES[table], *TILE_TABLES[f"{table} few rows"])
    tile = next(config for config in tiles if (config.block_m, config.block_n) == (64, 64))
    return replace(tile, group_m=4)


def groups() -> list[Group]:
    """What the table holds."""
    made = []
    for arch, table in ((80, "ampere"), (90, "hopper")):
        tile = square_tile(table)
        name = f"Triton, sm_{arch}, tile {tile.block_m}x{tile.block_n}x{tile.block_k}"
        ours = {
            "fastlora": partial(count_triton, arch=arch, tile=replace(tile, fused=True)),
            "fastlora, separate shrink": partial(count_triton, arch=arch, tile=replace(tile, fused=False)),
        }
        made.append(Group(name, arch, tile, tuple(ORDERS), ours))
    wide, small = cuda.CudaTile(128, 256, group_m=2), cuda.CudaTile(64, 128, group_m=4)
    for tile, variants in (
        (wide, {"": {"fused": True}, ", separate shrink": {}}),
        (small, {"": {"fused": True}, ", separate shrink": {}, ", separate shrink, 2 parts": {"splits": 2}}),
    ):
        shape = (tile.block_m, tile.block_n, 64)
        ours = {
            f"fastlora{label}": partial(count_cuda, tile=replace(tile, **change)) for label, change in variants.items()
        }
        name = "CUDA, sm_90a, tile " + "x".join(map(str, shape))
        made.append(Group(name, 90, TileConfig(*shape, 1, 8, 3), ("frozen layer",), ours))
    return made


def _cases(shape: dict[str, int]) -> dict[float, numerics.Case]:
    return {p: numerics.draw_case(*shape.values(), torch.bfloat16, dropout_p=p, bias=False) for p in (0.0, DROPOUT)}


def count(group: Group, shape: dict[str, int], only: tuple[str, float] | None = None) -> Iterator[dict]:
    """The rows of a group, or the one of an order and a dropout probability."""
    cases = _cases(shape)
    counters = {name: partial(count_peer, ORDERS[name], arch=group.arch, tile=group.tile) for name in group.peers}
    for order, counted in (counters | group.ours).items():
        drops = order not in ORDERS or ORDERS[order].drops
        for p, case in cases.items():
            if (p and not drops) or (only and only != (order, p)):
                continue
            directions = counted(case)
            if directions is None:
                continue
            forward, backward = directions
            yield {"group": group.name, "order": order, "dropout": p, "forward": forward, "backward": backward}


def _count_group(number: int, shape: dict[str, int]) -> list[dict]:
    """The rows of a group, by its number: a group itself holds functions, which go into no other process."""
    return list(count(groups()[number], shape))


def make_table(shape: dict[str, int], jobs: int = 1) -> dict:
    """Counts everything, in so many processes."""
    versions = package_versions(("torch", "triton"))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        counted = list(pool.map(_count_group, range(len(groups())), repeat(shape)))
    rows = [row for group in counted for row in group]
    options = "" if shape == SHAPE else "".join(f" --{name} {size}" for name, size in shape.items())
    return {"command": f"python -m benchmarks.traffic{options}", "versions": versions, "shape": shape, "rows": rows}


def differences(table: dict, again: dict) -> list[str]:
    """Which rows of a table are not those counted again."""
    old, new = ({key_of(row): row for row in each["rows"]} for each in (table, again))
    return [f"{key}: differs" for key in old.keys() | new.keys() if old.get(key) != new.get(key)]
