"""Runs the sections of a benchmark and collects them in one JSON-able report."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora.bench.batches import batch_cases, measure_batches
from fastlora.bench.cases import CPU_HEADLINE, DTYPES, LayerCase, preset_cases
from fastlora.bench.experts import experts_cases, measure_experts
from fastlora.bench.host import measure_host
from fastlora.bench.layer import measure_layer
from fastlora.bench.models import decoder_case, finetune_case, measure_model
from fastlora.bench.names import SECTIONS
from fastlora.bench.peaks import larger_peaks, measure_peaks
from fastlora.bench.peers import FASTLORA, FROZEN, ORDINARY, STORED_S, Peer, backend_peers
from fastlora.environment import describe

FORMAT = 1
COMPILED = "compiled peft"
TIMED_AGAINST_PEAKS = tuple(section for section in SECTIONS if section != "host")


@dataclass(frozen=True)
class BenchOptions:
    """What to run.

    seconds: timing budget of one case; the quick preset's headline gets twice as much.
    peers: beyond fastlora and the frozen layer.
    """

    preset: str
    device: str
    sections: tuple[str, ...] = SECTIONS
    seconds: float = 3.0
    peers: tuple[Peer, ...] = ORDINARY
    cases: tuple[LayerCase, ...] | None = None
    command: str = ""
    on_progress: Callable[[str], None] = field(default=lambda label: None)


def lowest_cpu_share(report: dict) -> float | None:
    """The least of the rows' shares of a CPU (timing.Timing.cpu_share); None where none was measured."""
    shares = [row.get("cpu_share") for section in SECTIONS for row in report.get(section, ())]
    return min((share for share in shares if share is not None), default=None)


class Unfinished(Exception):
    """A run that ended early. ``report`` holds what was measured until then; the cause says why it ended."""

    def __init__(self, report: dict):
        super().__init__(report["unfinished"])
        self.report = report


def steps_of(options: BenchOptions) -> int:
    """How many times ``on_progress`` will be called."""
    cases = len(_cases(options)) if "layer" in options.sections else 0
    models = sum(section in options.sections for section in SECTIONS[1:] if section not in _GROUPED)
    return 1 + cases + models + len(_grouped_cases(options))


def _cases(options: BenchOptions) -> list[LayerCase]:
    return list(options.cases) if options.cases is not None else preset_cases(options.preset, options.device)


# Of each section of rows in segments: its cases, and how one is measured.
_GROUPED = {"experts": (experts_cases, measure_experts), "batches": (batch_cases, measure_batches)}


def _grouped_cases(options: BenchOptions) -> list[tuple[str, Any, Callable]]:
    """(section, case, how it is measured) of the sections that are asked for."""
    return [
        (section, case, measure)
        for section, (cases, measure) in _GROUPED.items()
        if section in options.sections
        for case in cases(options.device)
    ]


def run_bench(options: BenchOptions) -> dict:
    """The report: environment, peaks, rows per section, and what was missing and why.

    Raises:
        Unfinished: it was interrupted or failed after some rows were measured; they are not lost.
        WrongResult: before any row, fastlora or the frozen layer computes something wrong, and was not timed.
    """
    started, begun = time.perf_counter(), []

    def begin(label: str) -> None:
        begun.append(label)
        options.on_progress(label)

    report: dict = {
        "format": FORMAT,
        "command": options.command,
        "preset": options.preset,
        "environment": describe(options.device),
        "missing": {},
        **{section: [] for section in SECTIONS},
    }
    try:
        _measure_sections(report, options, begin)
    except (KeyboardInterrupt, Exception) as error:
        if not any(report[section] for section in SECTIONS):
            raise
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        report["unfinished"] = f"stopped at part {len(begun)} of {steps_of(options)}, {begun[-1]}: {reason}"
        raise Unfinished(report) from error
    finally:
        _add_shares(report)
        report["seconds"] = round(time.perf_counter() - started, 1)
    return report


def _measure_sections(report: dict, options: BenchOptions, begin: Callable[[str], None]) -> None:
    """Fills the report's peaks and sections."""
    device, cases = options.device, _cases(options)
    models = [
        (section, make(device), whole)
        for section, make, whole in (("decoder", decoder_case, False), ("finetune", finetune_case, True))
        if section in options.sections
    ]
    grouped = _grouped_cases(options)
    used = {case.torch_dtype for case in cases} | {case.dtype for _, case, _ in models}
    used |= {DTYPES[case.dtype] for _, case, _ in grouped}
    dtypes = {name: dtype for name, dtype in DTYPES.items() if dtype in used or not used}
    begin("peaks of this machine")
    report["peaks"] = measure_peaks(device, dtypes)
    ours = [FROZEN, FASTLORA, *backend_peers(device)]
    if "layer" in options.sections:
        for case in cases:
            begin(case.label)
            headline = case in CPU_HEADLINE
            peers = [*ours, STORED_S, *(p for p in options.peers if _worth_it(p, case, device))]
            budget = options.seconds * (2 if headline else 1)
            _collect(report, "layer", *measure_layer(case, peers, device, report["peaks"], budget))
            _free(device)
    if "host" in options.sections:
        begin("host overhead")
        peers = [*ours, STORED_S, *(peer for peer in options.peers if peer.name != COMPILED)]
        _collect(report, "host", *measure_host(peers, device, options.seconds))
    for section, case, whole in models:
        begin(case.name)
        _collect(report, section, *measure_model(case, device, options.seconds, whole))
        _free(device)
    for section, case, measure in grouped:
        begin(case.name)
        _collect(report, section, *measure(case, device, options.seconds))
        _free(device)
    # Again, and the better of the two: what ran beside the first must not make the shares of peak exceed one.
    report["peaks"] = larger_peaks(report["peaks"], measure_peaks(device, dtypes))


def _add_shares(report: dict) -> None:
    for row in (row for section in TIMED_AGAINST_PEAKS for row in report[section]):
        peak = report["peaks"]["matmul_tflops"][row["dtype"]]
        row["share_of_peak"] = max(row["tflops"] / peak, row["gbs"] / report["peaks"]["copy_gbs"])


def _worth_it(peer: Peer, case: LayerCase, device: str) -> bool:
    """Compiling for a CPU takes longer than the rest of a case, so only the headline is compiled there."""
    return peer.name != COMPILED or device == "cuda" or case in CPU_HEADLINE


def _collect(report: dict, section: str, rows: list[dict], missing: dict[str, str]) -> None:
    report[section] += rows
    for name, reason in missing.items():
        found = report["missing"].setdefault(name, [])
        if reason not in found:
            found.append(reason)


def _free(device: str) -> None:
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
