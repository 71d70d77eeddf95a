"""What projections that share an input launch, read and write, counted on the kernels' own PTX; writes
results/projection_traffic.*.

As count.py has it for one layer, by the sm_80 kernels of one tile: ours in one launch each way for all of them; a
launch of ours for each; each frozen; and PEFT's order, from the plain kernels of peer_kernels.py. All but the first
make a dX for each projection, which autograd adds up by a launch for every one after the first. Each Y and gradient is
checked against float64 first.
"""

import json
from dataclasses import replace
from unittest import mock

import click
import torch

from benchmarks import RESULTS
from benchmarks.traffic.count import (
    OPTIONS,
    TRITON_NAMES,
    PeerRun,
    added_up,
    count_peer,
    count_triton,
    own_workspace,
    square_tile,
    summed,
)
from benchmarks.traffic.peer_kernels import elementwise
from benchmarks.traffic.peer_orders import ORDERS
from benchmarks.traffic.segments import moved
from fastlora.backends.configs import TileConfig
from fastlora.backends.target import Target
from fastlora.backends.triton import projection_launch
from fastlora.environment import package_versions
from fastlora.problem import Needs
from fastlora.tables import Table
from tests.support import projection_checks as checks
from tests.support.compile_target import compile_for
from tests.support.triton_emulation import emulated

RESULT = RESULTS / "projection_traffic.json"
ARCH, M, K, RANK = 80, 512, 192, 16
GROUPS = {"q, k, v": (256, 64, 64), "gate, up": (320, 320)}
NEEDS = Needs(True, True, True, False)
FROZEN, PEFT, EACH, OURS = "frozen layers", "PEFT", "a fused launch each", "fastlora, one launch"
_NAMES = TRITON_NAMES | {
    "weights": "W0", "lora_as": "A", "lora_bs": "B", "y_ptrs": "Y", "s_ptrs": "S", "dy_ptrs": "dY", "da_ptrs": "dA",
    "db_ptrs": "dB",
}  # fmt: skip
Counters = tuple[dict, dict]


def drawn(name: str) -> checks.Group:
    members = tuple(checks.Member(n, RANK, scaling=1.7, needs=NEEDS) for n in GROUPS[name])
    return checks.draw(M, K, members, bias=False)


def tile() -> TileConfig:
    return replace(square_tile("ampere"), fused=True)


def count_ours(group: checks.Group) -> Counters:
    """One launch each way."""
    device = mock.patch.object(projection_launch, "target_of", lambda device: Target(ARCH, n_sms=8))
    with own_workspace(), device, emulated(ARCH, OPTIONS) as stats:
        results = checks.run(group, tile(), True, projection_launch)
    checks.assert_accurate(results, group)
    forward, backward = (
        summed([(each, {name: _NAMES[name.partition(".")[0]] for name in each.buffers if "workspace" not in name})])
        for each in stats
    )
    return forward, backward


def count_additions(group: checks.Group) -> dict:
    """Autograd's, of each projection's dX to that of those before."""
    dxs = [torch.zeros_like(case.x) for case in group.cases]
    run = PeerRun(dxs)
    with compile_for(ARCH, run):
        for each in dxs[1:]:
            elementwise(each, plus=dxs[0], out=dxs[0])
    return summed([(stats, dict.fromkeys(buffers, "dX")) for stats, buffers in run.launches])


def count_each(group: checks.Group, order: str) -> Counters:
    """Each projection by itself, and autograd's additions."""
    counted = [
        count_triton(case, ARCH, tile()) if order == EACH else count_peer(ORDERS[_PEERS[order]], case, ARCH, tile())
        for case in group.cases
    ]
    forwards, backwards = zip(*counted, strict=True)
    return added_up([*forwards]), added_up([*backwards, count_additions(group)])


_PEERS = {FROZEN: "frozen layer", PEFT: "PEFT, eager"}


def make_report() -> dict:
    rows = []
    for name in GROUPS:
        group = drawn(name)
        for order in (FROZEN, PEFT, EACH, OURS):
            forward, backward = count_ours(group) if order == OURS else count_each(group, order)
            rows.append({"group": name, "order": order, "forward": forward, "backward": backward})
    versions = package_versions(("torch", "triton"))
    return {"command": "python -m benchmarks.traffic.projections", "versions": versions, "rows": rows}


def passes(direction: dict, tensor: str) -> str:
    """How often launches read and write a tensor of the size of X, each launch counted once."""
    counted = direction["tensors"][tensor]
    return f"{(counted['read_distinct'] + counted['written_distinct']) / (M * K * 2):.3g}"


def projection_table(report: dict) -> Table:
    lines = []
    for row in report["rows"]:
        (frozen,) = (r for r in report["rows"] if r["group"] == row["group"] and r["order"] == FROZEN)
        cells = [row["group"], row["order"]]
        for way, tensor in (("forward", "X"), ("backward", "dX")):
            ratio = moved(row[way], "_distinct") / moved(frozen[way], "_distinct")
            cells += [str(row[way]["launches"]), f"{ratio:.2f}", passes(row[way], tensor)]
        lines.append(cells)
    ways = (("", "X"), (", backward", "dX"))
    columns = [f"{name}{way}" for way, of in ways for name in ("launches", "bytes / frozen", f"passes over {of}")]
    columns = ["projections", "order of work", *columns]
    sizes = "; ".join(f"{name}: N = {', '.join(map(str, ns))}" for name, ns in GROUPS.items())
    note = f"{M} rows, K = {K}, R = {RANK}, bf16. {sizes}. Bytes that every launch touches, as a ratio."
    return Table("Counted traffic of projections that share an input", note, columns, lines)


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where the file is not what is counted now.")
def main(check: bool) -> None:
    report = make_report()
    if check:
        if report != json.loads(RESULT.read_text()):
            raise click.ClickException(f"{RESULT.name} is not what is counted now")
        return
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(projection_table(report).to_markdown())


if __name__ == "__main__":
    main()
