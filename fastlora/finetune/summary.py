"""What a finished run shows in a terminal: the result, a sample, what it cost, and what to do next. 80 columns."""

import math
import shlex
from pathlib import Path

from fastlora.finetune.arms import FASTLORA
from fastlora.finetune.compare import Agreement
from fastlora.finetune.directory import ADAPTER, PICTURE, REPORT
from fastlora.finetune.models import PACKAGED, ModelSource
from fastlora.tables import MIB, Table, wrapped

FULL = "full fine-tuning"
SAMPLE_CHARACTERS = 300


def text(report: dict, agreement: Agreement | None, source: ModelSource, output: Path) -> str:
    """The summary of a report (report.as_dict), in paragraphs."""
    parts = [
        _result(report),
        _sample(report["merge"], report["settings"].get("base_quant")),
        _cost(report, agreement),
        _memory(report),
        f"Wrote {output / ADAPTER}, {PICTURE} and {REPORT} beside it",
        _next(report["settings"], source, output),
    ]
    return "\n" + "\n\n".join(parts)


def _result(report: dict) -> str:
    run, parameters = report["runs"][FASTLORA], report["parameters"]
    before, after = run["held_out_loss_before"], run["held_out_loss_after"]
    verb = "fell" if after < before else "did not fall"
    sentence = (
        f"Result: the held-out loss {verb}, {before:.4f} -> {after:.4f} (perplexity {_perplexity(before)} -> "
        f"{_perplexity(after)}), in {len(run['losses'])} steps over {run['tokens']:,} tokens, {run['seconds']:.1f} s, "
        f"training {parameters['share']:.2%} of the parameters."
    )
    if after >= before:
        sentence += " Try a lower --learning-rate, other data, or fewer --steps."
    return wrapped(sentence)


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 100 else f"e^{loss:.0f}"


def _sample(merge: dict, base_quant: str | None) -> str:
    lines = [
        "Sample, greedy:",
        _labelled("prompt", merge["prompt"]),
        _labelled("before", merge["base_answer"]),
        _labelled("after", merge["answer"]),
    ]
    if merge["same_answer"] is None:
        note = (
            f"Not merged: into {base_quant} weights the branch would be rounded away. The merge below adds it to the "
            "model as it was before it was quantised, whose answers differ a little."
        )
        return "\n".join([*lines, wrapped(note)])
    verdict = "the same answer as" if merge["same_answer"] else "ANOTHER ANSWER than"
    difference = f"largest logit difference {merge['max_logit_difference']:.1e} of {merge['max_logit']:.1f}"
    if not merge["same_answer"]:
        lines.append(_labelled("merged", merge["merged_answer"]))
    return "\n".join([*lines, wrapped(f"The merged model gives {verdict} the adapter: {difference}.")])


def _labelled(label: str, answer: str) -> str:
    """One line's text, its control characters written as Python writes them."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else repr(c)[1:-1] for c in answer)
    shown = " ".join(shown.split())
    if len(shown) > SAMPLE_CHARACTERS:
        shown = shown[:SAMPLE_CHARACTERS] + " ..."
    return wrapped(f"{label + ':':8}{shown or '(nothing)'}", "  ", " " * 8, break_words=True)


def _cost(report: dict, agreement: Agreement | None) -> str:
    lines = []
    if agreement is not None:
        start = "the same seed gave both" if agreement.same_seed_start else "PEFT was given fastlora's copy of"
        lines.append(f"{FASTLORA} and PEFT ({start} the same start): {agreement.describe()}.")
    device = report["settings"]["device"]
    where = f"the CPU ({report['threads']} threads)" if device == "cpu" else device
    speeds = ", ".join(f"{name} {run['tokens_per_second']:,.0f}" for name, run in report["runs"].items())
    lines.append(f"Speed on {where}, tokens/s: {speeds}.")
    counts = report["runs"][FASTLORA]["dispatch_counts"]
    served = ", ".join(f"{name} {n:,}" for name, n in counts.items() if name != "fallbacks")
    lines.append(f"Calls served, forward and backward each one: {served}.")
    lines += [f"  fell back {n:,} times: {reason}" for reason, n in counts["fallbacks"].items()]
    return "\n".join(map(wrapped, lines))


def _memory(report: dict) -> str:
    memory, runs = report["memory"], report["runs"]
    columns = {name: (run["tensor_bytes"], run["peak_memory_bytes"]) for name, run in runs.items()}
    columns[FULL] = (memory["full_finetuning_tensor_bytes"], memory["full_finetuning_peak_bytes"])
    rows = [
        [part, *(_mib(tensors.get(part)) for tensors, _ in columns.values())] for part in runs[FASTLORA]["tensor_bytes"]
    ]
    rows.append(["in all", *(_mib(sum(tensors.values())) for tensors, _ in columns.values())])
    rows.append(["peak", *(_mib(peak) for _, peak in columns.values())])
    peak = f"peak: {memory['measured_as']}" if memory["measured_as"] else "no way to measure the peak here"
    if memory["full_finetuning_measured"]:
        full = f"{FULL}: one AdamW step after the training, in the same process"
    elif report["settings"]["measure_full"]:
        full = f"{FULL}: at least; not run, as the free memory is too small or not known"
    else:
        full = f"{FULL}: at least, estimated; --measure-full takes one step of it"
    note = f"Tensors are counted in the first step; {peak}. {full[0].upper()}{full[1:]}."
    return Table("Memory, MiB", note, ["", *columns], rows).to_text()


def _mib(count: int | None) -> str:
    return "-" if not count else f"{count / MIB:,.0f}" if count >= 10 * MIB else f"{count / MIB:.2f}"


def _next(settings: dict, source: ModelSource, output: Path) -> str:
    adapter, base = shlex.quote(str(output / ADAPTER)), shlex.quote(settings["model"] or PACKAGED)
    commands = [
        f"fastlora merge {adapter} --base {base} --output {shlex.quote(str(output / 'merged'))}",
        f"fastlora analyze {adapter} --base {base} --output {shlex.quote(str(output / 'analysis'))}",
        f"fastlora finetune --resume --steps {2 * settings['steps']} --output {shlex.quote(str(output))}",
    ]
    lines = ["Next: a plain model of both, what was learned, or more steps:"]
    lines += ["  " + " \\\n    ".join(_split(command)) for command in commands]
    return "\n".join([*lines, "In Python, with PEFT:", *(f"  {line}" for line in peft_lines(source, output / ADAPTER))])


def _split(command: str) -> list[str]:
    """A command that is too long for a line, before its options."""
    return [command] if len(command) <= 76 else command.replace(" --", "\n--").split("\n")


def peft_lines(source: ModelSource, adapter: Path) -> list[str]:
    """The Python lines that load the adapter: PEFT's own one, or where the base is a GGUF file, the base first."""
    if source.gguf_file is None:
        return [
            "from peft import AutoPeftModelForCausalLM",
            f"model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r})",
        ]
    return [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "base = AutoModelForCausalLM.from_pretrained(",
        f"    {source.location!r},",
        f"    gguf_file={source.gguf_file!r},",
        ")",
        f"model = PeftModel.from_pretrained(base, {str(adapter)!r})",
    ]
