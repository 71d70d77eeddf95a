"""What a finished run tells: a dictionary for JSON, lines for the terminal, a picture of the loss curves."""

import io
import math
from dataclasses import asdict, dataclass

import torch

import fastlora
from fastlora.environment import package_versions
from fastlora.finetune.arms import FASTLORA
from fastlora.finetune.compare import Agreement
from fastlora.finetune.data import TokenBlocks
from fastlora.finetune.full import FullFinetuning
from fastlora.finetune.loop import Record
from fastlora.finetune.memory import peak_method
from fastlora.finetune.merging import MergeCheck
from fastlora.finetune.settings import Settings
from fastlora.model import TrainableParameters
from fastlora.tables import MIB

_PACKAGES = ("torch", "triton", "transformers", "peft")


@dataclass(frozen=True)
class Results:
    """Everything measured in a run; `records` by arm name, fastlora's first."""

    records: dict[str, Record]
    parameters: TrainableParameters
    layers: int
    merge: MergeCheck
    full: FullFinetuning
    agreement: Agreement | None


def versions() -> dict[str, str]:
    """Versions of what is installed of the packages that decide the numbers."""
    installed = {name: number for name, number in package_versions(_PACKAGES).items() if number is not None}
    return {"fastlora": fastlora.__version__, **installed}


def as_dict(settings: Settings, model_label: str, blocks: TokenBlocks, results: Results) -> dict:
    """The JSON report. Bytes, seconds and losses are plain numbers; what could not be measured is null."""
    step_tokens = settings.batch_size * settings.block_size
    runs = {}
    for name, record in results.records.items():
        tokens = step_tokens * record.step
        runs[name] = {
            "losses": record.losses,
            "held_out_loss_before": record.held_out_before,
            "held_out_loss_after": record.held_out_after,
            "seconds": record.seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / record.seconds,
            "peak_memory_bytes": record.peak_bytes or None,
            "tensor_bytes": record.tensor_bytes,
            "dispatch_counts": record.calls,
        }
    return {
        "settings": asdict(settings),
        "model": model_label,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "text": {
            "tokens": blocks.tokens,
            "training_blocks": len(blocks.train),
            "held_out_blocks": len(blocks.held_out),
            "sha256": blocks.fingerprint(),
        },
        "parameters": {
            **results.parameters._asdict(),
            "layers": results.layers,
        },
        "runs": runs,
        "memory": {
            "measured_as": peak_method(torch.device(settings.device)),
            "full_finetuning_peak_bytes": results.full.peak_bytes or None,
            "full_finetuning_tensor_bytes": results.full.tensor_bytes,
            "full_finetuning_measured": results.full.measured,
        },
        "merge": asdict(results.merge),
        "agreement": None if results.agreement is None else asdict(results.agreement),
    }


def as_lines(report: dict, agreement: Agreement | None) -> list[str]:
    """The report for people."""
    lines = [
        _run_line(name, run, report["settings"]["steps"], report["threads"], report["settings"]["device"])
        for name, run in report["runs"].items()
    ]
    if agreement is not None:
        start = "the same seed gave both" if agreement.same_seed_start else "PEFT was given fastlora's copy of"
        lines.append(f"{FASTLORA} and PEFT ({start} the same start): {agreement.describe()}")
    lines += _memory_lines(report)
    counts = report["runs"][FASTLORA]["dispatch_counts"]
    served = ", ".join(f"{name} {n:,}" for name, n in counts.items() if name != "fallbacks")
    lines.append(f"Calls served, forward and backward each one: {served}")
    lines += [f"  fell back {n:,} times: {reason}" for reason, n in counts["fallbacks"].items()]
    merge = report["merge"]
    verdict = "the same answer as" if merge["same_answer"] else "ANOTHER ANSWER than"
    lines += [
        f"The merged model gives {verdict} the adapter: largest logit difference {merge['max_logit_difference']:.1e} "
        f"of {merge['max_logit']:.1f}",
        f"  prompt: {_one_line(merge['prompt'])}",
        f"  answer: {_one_line(merge['answer'])}",
    ]
    if not merge["same_answer"]:
        lines.append(f"  merged: {_one_line(merge['merged_answer'])}")
    return lines


def _run_line(name: str, run: dict, steps: int, threads: int, device: str) -> str:
    before, after = run["held_out_loss_before"], run["held_out_loss_after"]
    where = f"{threads} CPU threads" if device == "cpu" else device
    return (
        f"{name}: held-out loss {before:.4f} -> {after:.4f} (perplexity {math.exp(before):.2f} -> "
        f"{math.exp(after):.2f}) in {steps} steps, {run['tokens_per_second']:.0f} tokens/s on {where}"
    )


def _memory_lines(report: dict) -> list[str]:
    memory = report["memory"]
    peaks = {name: run["peak_memory_bytes"] for name, run in report["runs"].items()}
    peaks["full fine-tuning"] = memory["full_finetuning_peak_bytes"]
    tensors = {name: run["tensor_bytes"] for name, run in report["runs"].items()}
    tensors["full fine-tuning"] = memory["full_finetuning_tensor_bytes"]
    how = f"measured: {memory['measured_as']}" if memory["measured_as"] else "no way to measure it here"
    full_peak = peaks["full fine-tuning"]
    shown = ", ".join(_peak(name, value, full_peak) for name, value in peaks.items())
    lines = [f"Peak memory ({how}): {shown}"]
    if memory["full_finetuning_measured"]:
        lines.append("  all in this process, one after another; full fine-tuning for one AdamW step after the training")
    else:
        lines.append("  full fine-tuning was not run (too large for the free memory, or no way to measure): estimated")
    for name, parts in tensors.items():
        counted = ", ".join(f"{part} {_mib(value)}" for part, value in parts.items())
        verb = "counted" if name != "full fine-tuning" or memory["full_finetuning_measured"] else "at least"
        lines.append(f"  {name}, {verb}: {counted}; {_mib(sum(parts.values()))} in all")
    return lines


def _peak(name: str, value: int | None, full_peak: int | None) -> str:
    if not value:
        return f"{name} not measured"
    share = f" ({value / full_peak:.0%} of full fine-tuning)" if full_peak and value != full_peak else ""
    return f"{name} {_mib(value)}{share}"


def _mib(count: int) -> str:
    return f"{count / MIB:,.0f} MiB"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def curve_png(report: dict) -> bytes:
    """The loss of every step, one curve a run, and fastlora's held-out loss before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, run) in enumerate(report["runs"].items()):
        steps = range(1, len(run["losses"]) + 1)
        # Curves that agree lie on each other: the later ones are dashed and thinner, so that both are seen.
        style = (
            {"linewidth": 3, "alpha": 0.6} if index == 0 else {"linewidth": 1.2, "linestyle": "--", "color": "black"}
        )
        axes.plot(steps, run["losses"], label=f"{name}: training", **style)
    run = report["runs"][FASTLORA]
    axes.plot(
        [0, len(run["losses"])],
        [run["held_out_loss_before"], run["held_out_loss_after"]],
        "o:",
        label=f"{FASTLORA}: held out",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy (nats per token)")
    settings = report["settings"]
    axes.set_title(f"{report['model']}, r={settings['rank']}, {settings['dtype']}")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
