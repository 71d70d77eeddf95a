"""What layers on rows in segments launch, read and write, counted on the kernels' own PTX; writes
results/segment_traffic.*.

As count.py has it for one adapter, by the sm_80 kernels of one tile: ours in one launch each way, without an adapter
(the frozen layer) and with; a launch of ours for each segment; and PEFT's order from the plain kernels of
peer_kernels.py. Over experts that is a copy W + ΔW of all of them (``baddbmm``), torch's grouped product, and a
gradient of all weights in the backward; a product for all experts counts as one launch. For ``adapter_names``, at
inference alone: one base product, and for each adapter a gather of its rows, two products, a scaling and a sum into Y.
Each Y and gradient is checked against float64 first.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import click
import torch
from torch import Tensor

from benchmarks import RESULTS
from benchmarks.traffic.count import (
    OPTIONS,
    TRITON_NAMES,
    PeerRun,
    added_up,
    count_triton,
    own_workspace,
    square_tile,
    summed,
)
from benchmarks.traffic.peer_kernels import elementwise, product
from fastlora.backends.configs import TileConfig
from fastlora.environment import package_versions
from fastlora.problem import Needs
from fastlora.segments import NO_ADAPTER
from fastlora.tables import Table
from tests.support import numerics, segment_checks, segments
from tests.support.compile_target import compile_for

RESULT = RESULTS / "segment_traffic.json"
ARCH, RANK, N, K = 80, 16, 256, 192
NEEDS = Needs(True, True, True, False)
EXPERTS, BATCH = "8 experts", "3 adapters in a batch"
FROZEN, OURS, EACH, PEFT = "frozen layer, grouped", "fastlora", "a fused launch a segment", "PEFT"
NAMES = TRITON_NAMES | {"weight_ptr": "W0", **dict.fromkeys(("ends_ptr", "experts_ptr", "adapters_ptr"), "segments")}
Counters = tuple[dict, dict | None]


def cases() -> dict[str, segments.Case]:
    """512 rows each: skewed loads, of which one is none; samples with adapters, of which one has none."""
    options = {"n_adapters": 3, "n_weights": 1, "adapters": [0, 1, NO_ADAPTER, 2]}
    return {
        EXPERTS: segments.draw_case([64, 128, 0, 96, 32, 64, 64, 64], N, K, RANK, torch.bfloat16),
        BATCH: segments.draw_case([128] * 4, N, K, RANK, torch.bfloat16, **options),
    }


def tile() -> TileConfig:
    return square_tile("ampere")


def count_ours(case: segments.Case) -> Counters:
    """One launch each way."""
    with own_workspace():
        results, stats = segment_checks.run(case, tile(), ARCH, OPTIONS, NEEDS)
    segments.assert_accurate(results, case)
    forward, backward = (summed([(each, NAMES)]) for each in stats)
    return forward, backward


def count_frozen(case: segments.Case) -> Counters:
    """The same kernels where no segment has an adapter, and dX alone is wanted."""
    none = torch.full_like(case.ends, NO_ADAPTER)
    experts = torch.arange(len(case.ends)) if len(case.weight) > 1 else None
    frozen = segments.changed(case, adapters=none, experts=experts)
    with own_workspace():
        results, stats = segment_checks.run(frozen, tile(), ARCH, OPTIONS, Needs(True, False, False, False))
    segments.assert_accurate(results, frozen)
    forward, backward = (summed([(each, NAMES)]) for each in stats)
    return forward, backward


def _parts(case: segments.Case) -> list[tuple[slice, int, int]]:
    """(rows, weight, adapter) of each segment with rows."""
    found, start = [], 0
    for g, end in enumerate(case.ends.tolist()):
        adapter = g if case.adapters is None else int(case.adapters[g])
        if end > start:
            found.append((slice(start, end), g if len(case.weight) > 1 else 0, adapter))
        start = end
    return found


def count_each(case: segments.Case) -> Counters:
    """The launches of a layer of one adapter, segment by segment."""
    forwards, backwards = [], []
    for rows, expert, adapter in _parts(case):
        factors = case.lora_a[adapter], case.lora_b[adapter]
        if adapter == NO_ADAPTER:
            factors = tuple(torch.zeros_like(factor) for factor in factors)
        alone = numerics.Case(
            case.x[rows], case.weight[expert], *factors, None, case.dy[rows], case.scaling, 0.0, None
        )  # fmt: skip
        forward, backward = count_triton(alone, ARCH, replace(tile(), fused=True))
        forwards.append(forward), backwards.append(backward)
    return added_up(forwards), added_up(backwards)


class _Plain(PeerRun):
    """Plain launches by the names of the mathematics: every matrix is named by its address."""

    def __init__(self, case: segments.Case):
        self.parts, self.names = _parts(case), {}
        self.x = [self.named("X", case.x[rows]) for rows, _, _ in self.parts]
        self.dy = [self.named("dY", case.dy[rows]) for rows, _, _ in self.parts]
        self.a, self.b = ([self.named(n, f) for f in given] for n, given in (("A", case.lora_a), ("B", case.lora_b)))
        super().__init__([])
        self._written = set(self.names)

    def named(self, name: str, matrix: Tensor) -> Tensor:
        self.names[matrix.data_ptr()] = name
        return matrix

    def given(self, name: str, matrix: Tensor) -> Tensor:
        """A matrix that was there before."""
        self._written.add(matrix.data_ptr())
        return self.named(name, matrix)

    def taken(self, launches: int) -> dict:
        """What was counted since the last call, as so many launches."""
        counted = [(stats, {a: self.names[p] for a, p in where.items()}) for stats, where in self.launches]
        self.launches = []
        return {**summed(counted), "launches": launches}


def count_peft_experts(case: segments.Case) -> Counters:
    """ParamWrapper: W + ΔW of all experts, torch's grouped product over it, and a gradient of all weights."""
    run, by = _Plain(case), tile()
    with compile_for(ARCH, run):
        whole = [run.given("W + ΔW", weight.clone()) for weight in case.weight]
        for weight, a, b in zip(whole, run.a, run.b, strict=True):
            product(b, a, by, alpha=case.scaling, onto=weight)
        y = [run.named("Y", product(x, whole[e].t(), by)) for x, (_, e, _) in zip(run.x, run.parts, strict=True)]
        forward = run.taken(2)
        grads: dict[str, dict[int, Tensor]] = {"dx": {}, "da": {}, "db": {}}
        for (rows, e, _), x, dy in zip(run.parts, run.x, run.dy, strict=True):
            grads["dx"][rows.start] = run.named("dX", product(dy, whole[e], by))
            dw = run.named("dW", product(dy.t(), x, by))
            grads["db"][e] = run.named("dB", product(dw, run.a[e].t(), by, alpha=case.scaling))
            grads["da"][e] = run.named("dA", product(run.b[e].t(), dw, by, alpha=case.scaling))
    _check(case, y, grads)
    return forward, run.taken(4)


def _check(case: segments.Case, y: list[Tensor], grads: dict[str, dict[int, Tensor]]) -> None:
    """Within rounding of W + ΔW in the case's dtype, which is coarser than that of the branch."""
    wanted = segments.by_loop(case.to(torch.float64))
    found = {"y": torch.cat(y)}
    if grads:
        found["dx"] = torch.cat([*grads["dx"].values()])
        for name, like in (("da", case.lora_a), ("db", case.lora_b)):
            found[name] = torch.stack([grads[name].get(e, torch.zeros_like(factor)) for e, factor in enumerate(like)])
    for name, value in found.items():
        error = ((value.double() - wanted[name]).norm() / wanted[name].norm()).item()
        if not error <= 2e-2:
            raise RuntimeError(f"{name} is wrong by {error:.3g} of its norm, and was not counted")


def count_peft_batch(case: segments.Case) -> Counters:
    """adapter_names, at inference: PEFT trains no such batch."""
    run, by = _Plain(case), tile()
    with compile_for(ARCH, run):
        run.given("X", case.x)
        y = run.named("Y", product(case.x, run.given("W0", case.weight[0]).t(), by))
        launches = 1
        for (rows, _, adapter), x in zip(run.parts, run.x, strict=True):
            if adapter == NO_ADAPTER:
                continue
            gathered = run.named("X of an adapter", elementwise(x))
            s = run.named("S", product(gathered, run.a[adapter].t(), by))
            branch = run.named("branch", product(s, run.b[adapter].t(), by))
            scaled = run.named("scaled branch", elementwise(branch, factor=case.scaling))
            part = run.given("Y", y[rows])
            before = run.named("Y of an adapter", elementwise(part))
            elementwise(scaled, plus=before, out=before)
            elementwise(before, out=part)
            launches += 7
    _check(case, [y], {})
    return run.taken(launches), None


ORDERS: dict[str, dict[str, Callable[[segments.Case], Counters]]] = {
    EXPERTS: {FROZEN: count_frozen, PEFT: count_peft_experts, EACH: count_each, OURS: count_ours},
    BATCH: {FROZEN: count_frozen, PEFT: count_peft_batch, EACH: count_each, OURS: count_ours},
}


def make_report() -> dict:
    rows = []
    for name, case in cases().items():
        for order, count in ORDERS[name].items():
            forward, backward = count(case)
            rows.append({"case": name, "order": order, "forward": forward, "backward": backward})
    versions = package_versions(("torch", "triton"))
    return {"command": "python -m benchmarks.traffic.segments", "versions": versions, "rows": rows}


def moved(direction: dict, suffix: str = "") -> int:
    """Bytes that are read and written, all or ("_distinct") those that a launch touches at all."""
    tensors = direction["tensors"].values()
    return sum(tensor[f"{verb}{suffix}"] for tensor in tensors for verb in ("read", "written"))


def segment_table(report: dict) -> Table:
    lines = []
    for row in report["rows"]:
        (frozen,) = (r for r in report["rows"] if r["case"] == row["case"] and r["order"] == FROZEN)
        cells = [row["case"], row["order"]]
        for name in ("forward", "backward"):
            direction = row[name]
            if direction is None:
                cells += ["-"] * 3
                continue
            weights = direction["tensors"].get("W + ΔW", {"written": 0})["written"]
            weights += direction["tensors"].get("dW", {"written": 0})["written"]
            cells += [
                str(direction["launches"]),
                f"{moved(direction, '_distinct') / moved(frozen[name], '_distinct'):.2f}",
                f"{weights / 1024:.4g}",
            ]
        lines.append(cells)
    each = ["launches", "bytes / frozen", "written of the weights' size, KiB"]
    columns = ["case", "order of work", *each, *(f"{name}, backward" for name in each)]
    note = f"512 rows, N = {N}, K = {K}, R = {RANK}, bf16. Bytes that every launch touches, as a ratio."
    return Table("Counted traffic of rows in segments", note, columns, lines)


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Write nothing; exit code 1 where the file is not what is counted now.")
def main(check: bool) -> None:
    report = make_report()
    if check:
        if report != json.loads(RESULT.read_text()):
            raise click.ClickException(f"{RESULT.name} is not what is counted now")
        return
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(segment_table(report).to_markdown())


if __name__ == "__main__":
    main()
