"""What a finished run tells: a dictionary for JSON, and a picture of the loss curves."""

import io
from dataclasses import asdict, dataclass

import torch

import fastlora
from fastlora.environment import package_versions
from fastlora.finetune.compare import Agreement
from fastlora.finetune.data import TokenBlocks
from fastlora.finetune.full import FullFinetuning
from fastlora.finetune.loop import Record
from fastlora.finetune.memory import peak_method
from fastlora.finetune.merging import MergeCheck
from fastlora.finetune.settings import Settings
from fastlora.model import TrainableParameters

_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao")
SMOOTHED_STEPS = 20  # the mean is over as many at most, and over a fifth of the run


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
    runs = {}
    for name, record in results.records.items():
        tokens = sum(record.step_tokens)
        runs[name] = {
            "losses": record.losses,
            "held_out_losses": [list(point) for point in record.held_out],
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


def running_mean(values: list[float]) -> list[float]:
    """Means over the last steps, as many as there are up to a fifth of all and SMOOTHED_STEPS."""
    window = max(1, min(SMOOTHED_STEPS, len(values) // 5))
    return [sum(part) / len(part) for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))]


def curve_png(report: dict) -> bytes:
    """Every run's training loss, smoothed over its single steps, and its held-out losses as points."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, (name, run) in enumerate(report["runs"].items()):
        steps = range(1, len(run["losses"]) + 1)
        # Curves that agree lie on each other: the later one is dashed, thinner and black, its points hollow and larger,
        # so that both are seen.
        later = index > 0
        color = "black" if later else "C0"
        axes.plot(steps, run["losses"], color=color, linewidth=0.7, alpha=0.3)
        style = {"linewidth": 1.2, "linestyle": "--"} if later else {"linewidth": 3, "alpha": 0.7}
        axes.plot(steps, running_mean(run["losses"]), color=color, label=f"{name}: training, smoothed", **style)
        points = {"markersize": 10, "markerfacecolor": "none"} if later else {"markersize": 6}
        held_out = list(zip(*run["held_out_losses"], strict=True))
        axes.plot(*held_out, "o", color="black" if later else "C1", label=f"{name}: held out", **points)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("cross entropy (nats per token), lower is better")
    settings = report["settings"]
    ends = {name: (run["held_out_loss_before"], run["held_out_loss_after"]) for name, run in report["runs"].items()}
    result = ", ".join(f"{name} {before:.3f} to {after:.3f}" for name, (before, after) in ends.items())
    axes.set_title(f"Held-out loss: {result}\n{report['model']}, r={settings['rank']}, {settings['dtype']}")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
