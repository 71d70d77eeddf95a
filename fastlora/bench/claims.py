"""LoRA's own claims, measured on the demo model in one run: few trainable parameters, less memory, no added latency
once merged, and the loss that full fine-tuning reaches in as many steps."""

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from fastlora.bench.public_models import shares_table
from fastlora.bench.timing import time_calls
from fastlora.environment import describe
from fastlora.files import write_files
from fastlora.finetune.arms import fastlora_arm
from fastlora.finetune.data import TokenBlocks, make_blocks, read_text
from fastlora.finetune.interrupt import Interruption
from fastlora.finetune.loop import Arm, Record, held_out_loss, make_optimizer, train
from fastlora.finetune.models import check_device, find_model, load_model, shared_copy
from fastlora.finetune.settings import Settings
from fastlora.model import merge, trainable_parameters
from fastlora.tables import Table, mib, time_text

LORA, FULL = "LoRA", "full fine-tuning"
# LoRA wants a rate some ten times that of full fine-tuning, which diverges at LoRA's: both get the better of two.
LEARNING_RATES = {LORA: (1e-3, 2e-3), FULL: (5e-5, 2e-4)}
LATENCY_TOKENS = 64
LATENCY_SECONDS = 15.0
LATENCY_CALLS = 2


def measure_claims(settings: Settings, say: Callable[[str], None]) -> dict:
    """Trains LoRA and every weight of the same model on the same batches, and times base, adapted and merged inference.

    Args:
        settings: model, text, rank and steps; its learning rate is not used.
        say: shows one line to the user.

    Raises:
        CommandError: the model or the text cannot be loaded.
    """
    device = check_device(settings.device)
    settings = replace(settings, device=str(device))
    source = find_model(settings.model)
    say(f"Loading {source.label}")
    base, tokenizer = load_model(source, getattr(torch, settings.dtype), device)
    ids = tokenizer(read_text(settings.text), add_special_tokens=False)["input_ids"]
    blocks = make_blocks(ids, settings.block_size, settings.held_out, settings.seed)
    start = held_out_loss(base, blocks, settings.batch_size, device)
    runs, adapted = {}, None
    for name, rates in LEARNING_RATES.items():
        for rate in rates:
            say(f"{name} at learning rate {rate:g}: {settings.steps} steps")
            arm = _arm(name, base, replace(settings, learning_rate=rate))
            record = _trained(arm, blocks, replace(settings, learning_rate=rate))
            if name not in runs or record.held_out_after < runs[name][1].held_out_after:
                runs[name] = (rate, record)
                if name == LORA:
                    adapted = arm.model
            del arm
    say("inference of the base model, with the adapter, and merged")
    latency = _latencies(base, adapted, blocks, settings)
    return {
        "environment": describe(device.type),
        "model": source.label,
        "settings": asdict(settings),
        "parameters": trainable_parameters(adapted)._asdict(),
        "held_out_before": start,
        "runs": {
            name: {
                "learning_rate": rate,
                "learning_rates_tried": list(LEARNING_RATES[name]),
                "held_out_after": record.held_out_after,
                "final_training_loss": record.losses[-1],
                "seconds": record.seconds,
                "tensor_bytes": record.tensor_bytes,
                "peak_bytes": record.peak_bytes or None,
            }
            for name, (rate, record) in runs.items()
        },
        "latency": {name: asdict(timing) for name, timing in latency.items()},
    }


def _arm(name: str, base: nn.Module, settings: Settings) -> Arm:
    if name == LORA:
        return fastlora_arm(base, settings)
    model = copy.deepcopy(base).requires_grad_(True)
    return Arm(name, model, make_optimizer(model, settings.learning_rate))


def _trained(arm: Arm, blocks: TokenBlocks, settings: Settings) -> Record:
    from tqdm import tqdm

    device = torch.device(settings.device)
    with Interruption() as interruption, tqdm(total=settings.steps, desc=arm.name, unit="step") as bar:
        train(arm, blocks, settings, interruption, lambda loss: bar.update())
    loss = held_out_loss(arm.model, blocks, settings.batch_size, device)
    arm.record.held_out.append((arm.record.step, loss))
    arm.optimizer = None
    arm.model.zero_grad(set_to_none=True)
    return arm.record


def _latencies(base: nn.Module, adapted: nn.Module, blocks: TokenBlocks, settings: Settings) -> dict:
    """Time of one forward pass over LATENCY_TOKENS tokens, interleaved."""
    merged = shared_copy(adapted)
    merge(merged)
    tokens = blocks.held_out.ids[:1, :LATENCY_TOKENS].to(settings.device)

    def forward(model: nn.Module) -> Callable[[], None]:
        model.eval()

        def call() -> None:
            with torch.no_grad():
                model(input_ids=tokens, use_cache=False)

        return call

    models = {"base": base, "merged": merged, "adapter": adapted}
    calls = {name: forward(model) for name, model in models.items()}
    return time_calls(calls, torch.device(settings.device).type, LATENCY_SECONDS, LATENCY_CALLS)


def claims_tables(found: dict) -> list[Table]:
    """The promises beside what was measured, the trained share of public models, and the measurements."""
    return [_promises(found), shares_table(), _measurements(found), _memory(found)]


def _promises(found: dict) -> Table:
    parameters, latency = found["parameters"], found["latency"]
    memory = [_total_bytes(found["runs"][name]) for name in (LORA, FULL)]
    merged, base = latency["merged"], latency["base"]
    low, high = merged["q25_us"] / base["q75_us"], merged["q75_us"] / base["q25_us"]
    return Table(
        "LoRA's three promises",
        _setting(found),
        ["promise", "the paper", "here"],
        [
            ["trained parameters", "1 in 10,000 (GPT-3 175B)", f"1 in {1 / parameters['share']:,.0f}"],
            ["memory of training ÷ full fine-tuning", "1/3 (GPT-3 175B)", f"{memory[0] / memory[1]:.3f}"],
            [
                "merged ÷ base inference time",
                "1",
                f"{merged['median_us'] / base['median_us']:.3f} (by quartiles {low:.3f} to {high:.3f})",
            ],
        ],
    )


def _total_bytes(run: dict) -> int:
    """Counted, not measured at the peak: the allocator's slack is no property of the method."""
    return sum(run["tensor_bytes"].values())


def _setting(found: dict) -> str:
    settings = found["settings"]
    return (
        f"{found['model']}, R {settings['rank']} on {len(settings['targets'])} projections, {settings['steps']} steps "
        f"of {settings['batch_size']} × {settings['block_size']} tokens, {settings['dtype']}."
    )


def _measurements(found: dict) -> Table:
    parameters, runs, latency = found["parameters"], found["runs"], found["latency"]
    lora, full = runs[LORA], runs[FULL]
    base = latency["base"]["median_us"]
    gap = found["held_out_before"] - full["held_out_after"]
    closed = (found["held_out_before"] - lora["held_out_after"]) / gap if gap > 0 else None
    rows = [
        ["trainable parameters", f"{parameters['trainable']:,} of {parameters['total']:,} ({parameters['share']:.3%})"],
        ["base inference time", time_text(base)],
        ["unmerged ÷ base inference time", f"{latency['adapter']['median_us'] / base:.3f}"],
        ["held-out loss before training", f"{found['held_out_before']:.4f}"],
        ["held-out loss, LoRA", f"{lora['held_out_after']:.4f} at learning rate {lora['learning_rate']:g}"],
        ["held-out loss, full fine-tuning", f"{full['held_out_after']:.4f} at learning rate {full['learning_rate']:g}"],
        ["of full fine-tuning's gain, LoRA reaches", "–" if closed is None else f"{closed:.0%}"],
    ]
    return Table("Behind them", _setting(found), ["", "measured"], rows)


def _memory(found: dict) -> Table:
    lora, full = (found["runs"][name] for name in (LORA, FULL))
    rows = []
    for part in full["tensor_bytes"]:
        ours, theirs = lora["tensor_bytes"][part], full["tensor_bytes"][part]
        rows.append([part, mib(ours), mib(theirs), f"{ours / theirs:.3f}"])
    totals = _total_bytes(lora), _total_bytes(full)
    rows.append(["total counted", *map(mib, totals), f"{totals[0] / totals[1]:.3f}"])
    if lora["peak_bytes"] and full["peak_bytes"]:
        peaks = lora["peak_bytes"], full["peak_bytes"]
        rows.append(["peak measured", *map(mib, peaks), f"{peaks[0] / peaks[1]:.3f}"])
    return Table("Memory", "MiB; counted tensor by tensor in the first step.", ["", LORA, FULL, "ratio"], rows)


def write_claims(found: dict, directory: Path) -> list[Path]:
    """Writes claims.json and claims.md."""
    env = found["environment"]
    facts = f"{env['device_name']}, {env['cpu_threads']} CPU threads, torch {env['versions']['torch']}, "
    facts += f"commit {env['commit'] or 'not a checkout'}, {env['date']}; {found['command']}"
    page = "\n".join(["# LoRA's claims, measured", "", facts, "", *_markdown(found)])
    files = {"claims.json": json.dumps(found, indent=1) + "\n", "claims.md": page}
    write_files(directory, {name: text.encode() for name, text in files.items()})
    return [directory / name for name in files]


def _markdown(found: dict) -> list[str]:
    return [table.to_markdown() for table in claims_tables(found)]
