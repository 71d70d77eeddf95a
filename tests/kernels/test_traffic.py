"""Counters as evidence: what a launch reads and writes, counted on its own PTX, and that others' orders of the same
work do not pass. benchmarks/results/traffic.* hold the same at a larger size."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from benchmarks import ROOT
from benchmarks.readme_tables import block_text
from benchmarks.traffic import __main__ as command
from benchmarks.traffic import count as traffic
from benchmarks.traffic import projections as projection_traffic
from benchmarks.traffic import segments as segment_traffic
from benchmarks.traffic.peer_orders import ORDERS
from benchmarks.traffic.report import Claims, as_markdown, claims, excess, faults, frozen_rows, is_ours, key_of
from fastlora.backends.cuda import launch as cuda
from fastlora.backends.triton import launch as triton_lora
from tests.emulator import UninitialisedError
from tests.support import cuda_emulation, numerics
from tests.support.cuda_checks import lying_transposed

pytestmark = pytest.mark.skipif(
    triton_lora.triton.knobs.runtime.interpret,
    reason="the interpreter compiles no PTX; these tests have their own process",
)

M, N, K, R = 320, 256, 128, 16  # M×K bytes are more than anything that is R wide has
SHAPE = {"m": M, "n": N, "k": K, "r": R}
PASS_X, PASS_DY = M * K * 2, M * N * 2


def draw(dropout_p: float, r: int = R) -> numerics.Case:
    return numerics.draw_case(M, N, K, r, torch.bfloat16, dropout_p=dropout_p, bias=False)


def tile(arch: int):
    """The table's, in groups of three row blocks of five, so that gradients have two parts."""
    group = next(group for group in traffic.groups() if group.arch == arch)
    return replace(group.tile, group_m=3)


def row(counters) -> dict:
    return dict(zip(("forward", "backward"), counters, strict=True))


@pytest.fixture(scope="module")
def frozen():
    """The frozen layer's two products in tiles of 64 x 64; what they move does not depend on the architecture."""
    return row(traffic.count_peer(ORDERS["frozen layer"], draw(0.0), 80, tile(80)))


def reads(direction: dict) -> dict[str, int]:
    return {name: tensor["read"] for name, tensor in direction["tensors"].items() if tensor["read"]}


def test_the_frozen_layer_reads_its_operands_once_for_every_tile_across(frozen):
    assert reads(frozen["forward"]) == {"X": N // 64 * PASS_X, "W0": M // 64 * N * K * 2}
    assert reads(frozen["backward"]) == {"dY": K // 64 * PASS_DY, "W0": M // 64 * N * K * 2}
    assert claims(frozen, frozen, SHAPE) == Claims(0, 0, 0, 0)


@pytest.mark.parametrize("arch, dropout_p", [(80, 0.0), (90, 0.1)])
def test_one_launch_adds_no_pass_but_those_of_the_gradients(frozen, arch, dropout_p):
    """S costs no pass over X, dS none over dY; dB one over dY, dA one over X; nothing wide is written but Y and dX."""
    counted = row(traffic.count_triton(draw(dropout_p), arch, tile(arch)))
    forward, backward = counted["forward"], counted["backward"]
    assert forward["launches"] == backward["launches"] == 1
    assert forward["tensors"]["X"]["read"] == frozen["forward"]["tensors"]["X"]["read"] == N // 64 * PASS_X
    assert backward["tensors"]["dY"]["read"] == frozen["backward"]["tensors"]["dY"]["read"] + PASS_DY
    assert backward["tensors"]["X"]["read"] == PASS_X
    for direction, outputs in ((forward, {"Y": PASS_DY, "S": M * R * 2}), (backward, {"dX": PASS_X, "dS": M * R * 2})):
        written = {name: t["written"] for name, t in direction["tensors"].items() if t["written"]}
        assert written.items() >= outputs.items()
        # What is left are dA, dB and the sums of their first parts, in fp32.
        assert sum(written.values()) <= sum(outputs.values()) + (N + K) * R * (2 + 4)
        for name, tensor in direction["tensors"].items():
            assert tensor["written"] == tensor["written_distinct"], f"{name} is written twice"
    assert excess(counted, frozen, SHAPE) == {}


def test_above_rank_64_tiles_of_their_own_make_s(frozen):
    """Then S and dS cost a pass each out of the last cache, and the counters say so."""
    wide = next(config for config in traffic.TILE_TABLES["ampere large-rank"] if config.block_n == 128)
    counted = row(traffic.count_triton(draw(0.0, r=72), 80, replace(wide, block_n=64)))
    assert claims(counted, frozen, SHAPE) == Claims(1, 2, 1, 0)
    assert claims(counted, frozen, SHAPE, "read_distinct") == Claims(0, 0, 1, 0), "memory delivers X and dY once"


@pytest.mark.skipif(cuda_emulation.unavailable() is not None, reason=f"CUDA kernels: {cuda_emulation.unavailable()}")
@pytest.mark.parametrize("fused", [True, False])
def test_cuda_kernels_add_a_pass_only_where_s_has_tiles_of_its_own(frozen, fused):
    counted = row(traffic.count_cuda(draw(0.1), cuda.CudaTile(64, 128, group_m=3, fused=fused)))
    assert counted["forward"]["tensors"]["X"]["read"] == (N // 128 + (not fused)) * PASS_X
    assert counted["backward"]["tensors"]["dY"]["read"] == (K // 128 + (not fused) + 1) * PASS_DY
    assert counted["backward"]["tensors"]["X"]["read"] == PASS_X
    assert claims(counted, frozen, SHAPE).wide_bytes == 0


@pytest.mark.skipif(cuda_emulation.unavailable() is not None, reason=f"CUDA kernels: {cuda_emulation.unavailable()}")
def test_a_transposed_weight_costs_what_a_dense_one_does():
    """The same bytes of every operand, and the same products."""
    case, tile = draw(0.0), cuda.CudaTile(128, 256, group_m=2)
    assert traffic.count_cuda(lying_transposed(case), tile) == traffic.count_cuda(case, tile)


@pytest.mark.parametrize(
    "name, launches, expected",
    [
        # drop(X), the mask, the branch twice, Y's first half; scaled dY, the branch of dX twice, dX's first half
        ("PEFT, eager", (6, 8), Claims(2, 3, 1, 4 * PASS_DY + 4 * PASS_X + M * K)),
        ("Unsloth", (3, 7), Claims(1, 3, 2, PASS_DY + PASS_X)),  # Y and dX, written again by addmm_
        ("LoRAFusion", (3, 7), Claims(2, 1, 1, PASS_X + M * K)),  # drop(X) and the mask
    ],
)
def test_other_orders_break_the_claims(frozen, name, launches, expected):
    order = ORDERS[name]
    counted = row(traffic.count_peer(order, draw(0.1 if order.drops else 0.0), 80, tile(80)))
    assert (counted["forward"]["launches"], counted["backward"]["launches"]) == launches
    assert claims(counted, frozen, SHAPE) == expected
    assert {"forward_x", "wide_bytes"} <= excess(counted, frozen, SHAPE).keys()


def test_memory_that_no_launch_wrote_is_not_counted_but_refused():
    broken = ORDERS["Unsloth"]._replace(forward=lambda layer, tile: {"S": torch.empty(M, R, dtype=layer.x.dtype)})
    broken = broken._replace(backward=ORDERS["LoRAFusion"].backward)
    with pytest.raises(UninitialisedError, match="s_ptr"):
        traffic.count_peer(broken, draw(0.0), 80, tile(80))


@pytest.mark.parametrize(
    "options, message",
    [
        ("--m 300", "--m 300 must be a multiple of 64"),
        ("--n 100", "--n 100, --k 384 and --r 16 must be multiples of 8"),
        ("--r 72", "--r 72 is above 64"),
        ("--k 136", "another shape needs --output"),
    ],
)
def test_a_shape_that_the_table_is_not_for_is_refused(options, message):
    before = command.TABLE.stat().st_mtime_ns
    result = CliRunner().invoke(command.main, options.split())
    assert result.exit_code == 2 and message in result.output
    assert command.TABLE.stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def table():
    return json.loads(command.TABLE.read_text())


def test_the_table_holds_every_row_and_obeys_the_claims(table):
    assert table["shape"] == traffic.SHAPE
    expected = {
        (group.name, order, p)
        for group in traffic.groups()
        for order in (*group.peers, *group.ours)
        for p in (0.0, traffic.DROPOUT)
        if not p or order not in ORDERS or ORDERS[order].drops
    }
    assert {key_of(row) for row in table["rows"]} == expected and len(table["rows"]) == len(expected)
    assert faults(table) == []
    assert command.TABLE.with_suffix(".md").read_text() == as_markdown(table)
    assert "| fastlora, dropout 0.1 | 1 + 1 | 0 | 1 (0) | 1 | 0 |" in block_text("traffic", str(command.TABLE), ROOT)
    frozen = frozen_rows(table)
    for counted in table["rows"]:
        if not is_ours(counted) and counted["order"] != "frozen layer":
            assert excess(counted, frozen[counted["group"]], table["shape"]), key_of(counted)


def test_a_table_that_breaks_a_claim_is_at_fault(table):
    doctored = json.loads(json.dumps(table))
    rows = {row["order"]: row for row in doctored["rows"]}
    rows["fastlora"]["forward"]["tensors"]["X"]["read"] += 2
    rows["fastlora"]["backward"]["tensors"]["dX"]["written"] += 2
    alone = rows["fastlora, separate shrink"]["backward"]["tensors"]["dY"]
    alone["read"] += 2  # it may read dY once more, but not from memory
    alone["read_distinct"] += 2
    assert [(text.split("'")[3], text.split(": ")[1].split()[0]) for text in faults(doctored)] == [
        ("fastlora", "forward_x"),
        ("fastlora", "wide_bytes"),
        ("fastlora", "wide_bytes"),
        ("fastlora, separate shrink", "backward_dy"),
    ]
    assert len(traffic.differences(table, doctored)) == 2


def test_a_row_counted_again_is_the_table_s(table):
    """If this fails because a kernel or a tile has changed: python -m benchmarks.traffic."""
    (group,) = (group for group in traffic.groups() if group.name.startswith("Triton, sm_90"))
    only = ("fastlora", traffic.DROPOUT)
    (again,) = traffic.count(group, traffic.SHAPE, only)
    recorded = next(row for row in table["rows"] if key_of(row) == (group.name, *only))
    for name in ("forward", "backward"):
        assert again[name]["tensors"] == recorded[name]["tensors"]
        assert again[name]["launches"] == recorded[name]["launches"]
    if table["versions"]["triton"] == triton_lora.triton.__version__:  # another compiler may need other barriers
        assert again == recorded


class TestSegments:
    def test_the_page_is_made_of_the_file(self):
        report = json.loads(segment_traffic.RESULT.read_text())
        table = segment_traffic.segment_table(report)
        assert segment_traffic.RESULT.with_suffix(".md").read_text() == table.to_markdown()

    def test_pefts_copy_of_the_weights_is_counted(self):
        """W + ΔW of all experts forward; backward a gradient of those that have rows."""
        case = segment_traffic.cases()[segment_traffic.EXPERTS]
        forward, backward = segment_traffic.count_peft_experts(case)
        assert forward["tensors"]["W + ΔW"]["written"] == case.weight.numel() * 2
        assert backward["tensors"]["dW"]["written"] == case.weight[:7].numel() * 2
        (row,) = (
            row
            for row in json.loads(segment_traffic.RESULT.read_text())["rows"]
            if (row["case"], row["order"]) == (segment_traffic.EXPERTS, segment_traffic.PEFT)
        )
        assert (row["forward"], row["backward"]) == (forward, backward)

    @pytest.mark.sweep
    def test_the_file_is_what_is_counted_now(self):
        assert segment_traffic.make_report() == json.loads(segment_traffic.RESULT.read_text())


class TestProjections:
    def test_the_page_is_made_of_the_file(self):
        report = json.loads(projection_traffic.RESULT.read_text())
        table = projection_traffic.projection_table(report)
        assert projection_traffic.RESULT.with_suffix(".md").read_text() == table.to_markdown()

    def test_one_launch_writes_dx_once_and_reads_x_once(self):
        """As it is in the file; others write a dX each, and autograd reads two and writes one for each addition."""
        rows = {(r["group"], r["order"]): r for r in json.loads(projection_traffic.RESULT.read_text())["rows"]}
        for group, ns in projection_traffic.GROUPS.items():
            ours, each = (rows[group, o] for o in (projection_traffic.OURS, projection_traffic.EACH))
            n, size = len(ns), projection_traffic.M * projection_traffic.K * 2
            assert (ours["forward"]["launches"], ours["backward"]["launches"]) == (1, 1)
            assert (each["forward"]["launches"], each["backward"]["launches"]) == (n, 2 * n - 1)
            assert ours["forward"]["tensors"]["X"]["read_distinct"] == size
            assert ours["backward"]["tensors"]["dX"]["written"] == size
            assert each["backward"]["tensors"]["dX"]["written"] == (2 * n - 1) * size

    @pytest.mark.sweep
    def test_the_file_is_what_is_counted_now(self):
        assert projection_traffic.make_report() == json.loads(projection_traffic.RESULT.read_text())
