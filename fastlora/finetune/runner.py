"""A fine-tuning run from its settings to its files: what happens in which order, and what an interruption leaves."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora.errors import CommandError, first_line
from fastlora.finetune import report as reporting
from fastlora.finetune import summary
from fastlora.finetune.arms import (
    PEFT,
    adapter_snapshot,
    check_targets,
    fastlora_arm,
    peft_arm,
    require_peft,
    save_arm,
    start_alike,
)
from fastlora.finetune.compare import Agreement, compare_losses
from fastlora.finetune.data import TokenBlocks, batch_at, make_blocks, read_documents
from fastlora.finetune.directory import ADAPTER, PICTURE, REPORT, remove_results
from fastlora.finetune.encode import encode
from fastlora.finetune.full import measure_full_finetuning
from fastlora.finetune.interrupt import Interrupted, Interruption
from fastlora.finetune.log import StepLog
from fastlora.finetune.loop import Arm, held_out_loss, train
from fastlora.finetune.memory import estimate_full_finetuning
from fastlora.finetune.merging import CHECK_PARTS, check_merge, prompt_tokens
from fastlora.finetune.models import (
    ModelSource,
    check_tokens,
    find_model,
    load_skeleton,
    load_tokenizer,
    load_weights,
    position_limit,
)
from fastlora.finetune.quantise import quantise_linears, require_library
from fastlora.finetune.settings import Settings
from fastlora.finetune.state import SavedState, save_state
from fastlora.model import trainable_parameters
from fastlora.outputs import directory_for_results, reported_write_errors, staged
from fastlora.tables import wrapped

DONE, DISAGREED, INTERRUPTED = 0, 1, 130


class Runner:
    """One call of `fastlora finetune`.

    Args:
        settings: what to compute.
        output: directory for the results and for the state.
        saved: the state to go on from, or None.
        say: shows one line to the user.
        save_every: steps from one save of the state to the next; 0 for a save at the end of the training alone.
        log: the format of the log, one of log.FORMATS.
    """

    def __init__(
        self,
        settings: Settings,
        output: Path,
        saved: SavedState | None,
        say: Callable[[str], None],
        save_every: int = 0,
        log: str = "csv",
    ) -> None:
        self.settings = settings
        self.output = output
        self.saved = saved
        self.show = say
        self.save_every = save_every
        self.device = torch.device(settings.device)
        self.arms: list[Arm] = []
        self.fingerprint = ""
        self.log = StepLog(output, log)
        self.interruption = Interruption()

    def say(self, text: str) -> None:
        self.show(wrapped(text))

    def run(self) -> int:
        """Trains, measures, writes. Returns DONE, DISAGREED (a check failed, results written) or INTERRUPTED.

        Raises:
            CommandError: an input cannot be used, memory is too small, or a result cannot be written.
        """
        with self.interruption, ExitStack() as closing:
            try:
                return self._run(closing)
            except Interrupted:
                self.interruption.caught()
                return self._stop()
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                raise CommandError(
                    f"out of memory ({first_line(error)}): halve --batch-size and double --grad-accum, or use a "
                    "smaller --block-size or --dtype bfloat16"
                ) from error

    def _run(self, closing: ExitStack) -> int:
        settings = self.settings
        documents = read_documents(settings.text)
        source = find_model(settings.model)
        if PEFT in (settings.compare, settings.via):
            require_peft()
        if settings.base_quant:
            require_library(settings.base_quant)
        closing.enter_context(directory_for_results(self.output))
        quantised = f", its linear layers in {settings.base_quant}" if settings.base_quant else ""
        self.say(f"{source.announcement} in {settings.dtype}{quantised}")
        # All that can be wrong with the options and the data shows before the weights are loaded, where the model can
        # be built without them.
        skeleton = load_skeleton(source)
        if skeleton is not None:
            check_targets(skeleton, settings)
        tokenizer = load_tokenizer(source)
        encoded = encode(documents, tokenizer, settings.block_size)
        blocks = make_blocks(encoded.token_ids, settings.block_size, settings.held_out, settings.seed, encoded.rows)
        self.fingerprint = blocks.fingerprint()
        if self.saved is not None and self.saved.fingerprint != self.fingerprint:
            raise CommandError(f"cannot resume from {self.saved.path}: the text or the tokenizer is no longer the same")
        if skeleton is not None:
            self._checked_prompt(skeleton, tokenizer, blocks)
        base = load_weights(source, getattr(torch, settings.dtype), self.device, show_progress=True)
        check_targets(base, settings)
        prompt_ids = self._checked_prompt(base, tokenizer, blocks)
        for note in encoded.notes:
            self.say(f"Note: {note}")
        self.say(
            f"{blocks.tokens:,} tokens: {len(blocks.train)} sequences of up to {settings.block_size} to train on, "
            f"{len(blocks.held_out)} held out"
        )
        dense = estimate_full_finetuning(base)
        if settings.base_quant:
            quantise_linears(base, settings.base_quant, getattr(torch, settings.dtype))
        agreement = self._train_arms(base, blocks)
        results = self._measure(base, tokenizer, prompt_ids, blocks, agreement, dense)
        return self._write(source, blocks, results)

    def _checked_prompt(self, model: nn.Module, tokenizer, blocks: TokenBlocks) -> Tensor:
        """The prompt of the sample, once model, tokenizer and settings were found to go together."""
        highest = max(int(blocks.train.ids.max()), int(blocks.held_out.ids.max()))
        check_tokens(model, highest, self.settings.block_size)
        return prompt_tokens(tokenizer, blocks.held_out, self.settings, position_limit(model))

    def _train_arms(self, base: nn.Module, blocks: TokenBlocks) -> Agreement | None:
        arm = fastlora_arm(base, self.settings)
        initial = adapter_snapshot(arm)
        counts = trainable_parameters(arm.model)
        share = f"{counts.trainable:,} of {counts.total:,} parameters ({counts.share:.2%})"
        self.say(f"Training {share} in {len(initial) // 2} layers")
        self._train_arm(arm, blocks, None)
        if self.settings.compare != PEFT:
            return None
        other = peft_arm(base, self.settings)
        same_seed_start = start_alike(other, initial)
        # The adapter starts at zero effect, so the held-out loss before training is the same model's.
        self._train_arm(other, blocks, arm.record.held_out_before)
        return compare_losses(arm.record.losses, other.record.losses, self.settings, same_seed_start)

    def _train_arm(self, arm: Arm, blocks: TokenBlocks, held_out_before: float | None) -> None:
        """Trains and evaluates one arm, or what its saved state lacks of that, and saves what came of it."""
        from tqdm import tqdm

        settings = self.settings
        if self.saved is not None and arm.name in self.saved.records:
            self.saved.restore(arm)
            if arm.record.step >= settings.steps:
                self.say(f"{arm.name}: all {settings.steps} steps are done; more --steps would go further")
        record = arm.record
        if not record.held_out:
            before = self._held_out(arm, blocks) if held_out_before is None else held_out_before
            record.held_out.append((0, before))
        self.arms.append(arm)
        with tqdm(total=settings.steps, initial=record.step, desc=arm.name, unit="step", file=sys.stderr) as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()
                self._update_log()

            while record.step < settings.steps:
                self._evaluate(arm, blocks, due=self._is_due(settings.eval_every, record.step))
                train(arm, blocks, settings, self.interruption, on_step, until=self._next_stop(record.step))
                if self._is_due(self.save_every, record.step):
                    self._save()
        self._evaluate(arm, blocks, due=True)
        self._save()
        if len(self.arms) == 1:
            self._write_adapter(arm)
        # The next measurement of memory should not find this arm's gradients and moments.
        arm.optimizer = None
        arm.model.zero_grad(set_to_none=True)

    @staticmethod
    def _is_due(every: int, step: int) -> bool:
        return every > 0 and step % every == 0

    def _next_stop(self, step: int) -> int:
        """The next step after which something is evaluated or saved, or the last."""
        return min(
            [step + n - step % n for n in (self.settings.eval_every, self.save_every) if n] + [self.settings.steps]
        )

    def _evaluate(self, arm: Arm, blocks: TokenBlocks, due: bool) -> None:
        record = arm.record
        if due and record.held_out[-1][0] != record.step:
            record.held_out.append((record.step, self._held_out(arm, blocks)))
            self._update_log()

    def _update_log(self) -> None:
        self.log.update({arm.name: arm.record for arm in self.arms})

    def _held_out(self, arm: Arm, blocks: TokenBlocks) -> float:
        from tqdm import tqdm

        with tqdm(total=len(blocks.held_out), desc="held-out loss", leave=False, file=sys.stderr) as bar:
            return held_out_loss(arm.model, blocks, self.settings.batch_size, self.device, bar.update)

    def _save(self) -> Path:
        with self.interruption.deferred():
            return save_state(self.output, self.settings, self.fingerprint, self.arms, self.saved)

    def _write_adapter(self, arm: Arm) -> None:
        """Before anything is measured about it, which may fail or take long."""
        with self.interruption.deferred():
            with staged(self.output) as stage:
                save_arm(arm, stage / ADAPTER, self.settings)
            with reported_write_errors(self.output):
                remove_results(self.output)
        self.say(f"Wrote {self.output / ADAPTER}")

    def _measure(
        self,
        base: nn.Module,
        tokenizer,
        prompt_ids: Tensor,
        blocks: TokenBlocks,
        agreement: Agreement | None,
        dense: dict[str, int],
    ) -> reporting.Results:
        arm = self.arms[0]
        counts = trainable_parameters(arm.model)
        layers = len(arm.adapter()) // 2
        with _parts(len(CHECK_PARTS) + self.settings.measure_full) as begin:
            merge = check_merge(base, arm.model, tokenizer, prompt_ids, self.settings, begin)
            # Last, and on weights that every arm shares: the adapter is kept, the base model is not.
            if self.settings.measure_full:
                begin("full fine-tuning")
            batch = batch_at(blocks.train, 0, self.settings.batch_size, self.settings.seed).trimmed()
            full = measure_full_finetuning(base, batch, self.settings, dense)
        records = {entry.name: entry.record for entry in self.arms}
        return reporting.Results(records, counts, layers, merge, full, agreement)

    def _write(self, source: ModelSource, blocks: TokenBlocks, results: reporting.Results) -> int:
        report = reporting.as_dict(self.settings, source.label, blocks, results)
        with staged(self.output) as stage:
            (stage / PICTURE).write_bytes(reporting.curve_png(report))
            (stage / REPORT).write_bytes(json.dumps(report, indent=2, allow_nan=False).encode())
        self.show(summary.text(report, results.agreement, source, self.output))
        disagreed = results.agreement is not None and results.agreement.failed
        merge_failed = self.settings.dtype == "float32" and results.merge.same_answer is False
        return DISAGREED if disagreed or merge_failed else DONE

    def _stop(self) -> int:
        """Saves what the arms have reached."""
        if self.saved is not None and not self.arms:
            self.say(f"Interrupted; the state in {self.saved.path} is as it was")
        elif not any(arm.record.losses for arm in self.arms):
            self.say("Interrupted before the first step: there is nothing to save")
            return INTERRUPTED
        else:
            path = self._save()
            done = ", ".join(f"{arm.name} {arm.record.step} of {self.settings.steps} steps" for arm in self.arms)
            self.say(f"Interrupted ({done}); state saved in {path}")
        self.show(f"Go on with: fastlora finetune --resume --output {shlex.quote(str(self.output))}")
        return INTERRUPTED


@contextmanager
def _parts(total: int) -> Iterator[Callable[[str], None]]:
    """A bar over parts whose names are shown as they begin."""
    from tqdm import tqdm

    with tqdm(total=total, desc="measuring", unit="part", leave=False, file=sys.stderr) as bar:
        begun = 0

        def begin(name: str) -> None:
            nonlocal begun
            bar.update(begun and 1)
            begun += 1
            bar.set_description(name)

        yield begin


def _is_out_of_memory(error: RuntimeError) -> bool:
    """torch's own error of a GPU, or the CPU allocator's, which has no type."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
