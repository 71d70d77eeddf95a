"""A fine-tuning run from its settings to its files: what happens in which order, and what an interruption leaves."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora.errors import CommandError
from fastlora.finetune import report as reporting
from fastlora.finetune.arms import (
    PEFT,
    adapter_snapshot,
    fastlora_arm,
    peft_arm,
    require_peft,
    save_arm,
    start_alike,
)
from fastlora.finetune.compare import Agreement, compare_losses
from fastlora.finetune.data import TokenBlocks, batch_at, make_blocks, read_text
from fastlora.finetune.full import measure_full_finetuning
from fastlora.finetune.interrupt import Interrupted, Interruption
from fastlora.finetune.loop import Arm, held_out_loss, train
from fastlora.finetune.merging import check_merge, prompt_tokens
from fastlora.finetune.models import check_tokens, find_model, load_model, position_limit
from fastlora.finetune.settings import Settings
from fastlora.finetune.state import FILE_NAME, SavedState, save_state
from fastlora.model import trainable_parameters
from fastlora.outputs import directory_for_results, staged

DONE, DISAGREED, INTERRUPTED = 0, 1, 130


class Runner:
    """One call of `fastlora finetune`.

    Args:
        settings: what to compute.
        output: directory for the results and for the state of an interrupted run.
        saved: the state to go on from, or None.
        say: shows one line to the user.
    """

    def __init__(self, settings: Settings, output: Path, saved: SavedState | None, say: Callable[[str], None]) -> None:
        self.settings = settings
        self.output = output
        self.saved = saved
        self.say = say
        self.device = torch.device(settings.device)
        self.arms: list[Arm] = []
        self.fingerprint = ""
        self.interruption = Interruption()

    def run(self) -> int:
        """Trains, measures, writes. Returns DONE, DISAGREED (a check failed, results written) or INTERRUPTED.

        Raises:
            CommandError: an input cannot be used or a result cannot be written.
        """
        with self.interruption, ExitStack() as closing:
            try:
                return self._run(closing)
            except Interrupted:
                self.interruption.caught()
                return self._stop()

    def _run(self, closing: ExitStack) -> int:
        settings = self.settings
        text = read_text(settings.text)
        source = find_model(settings.model)
        if PEFT in (settings.compare, settings.via):
            require_peft()
        closing.enter_context(directory_for_results(self.output))
        self.say(f"Loading {source.label}{'' if source.local else ' from the hub'} in {settings.dtype}")
        base, tokenizer = load_model(source, getattr(torch, settings.dtype), self.device)
        token_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        check_tokens(base, token_ids, settings.block_size)
        blocks = make_blocks(token_ids, settings.block_size, settings.held_out, settings.seed)
        self.fingerprint = blocks.fingerprint()
        if self.saved is not None and self.saved.fingerprint != self.fingerprint:
            raise CommandError(f"cannot resume from {self.saved.path}: the text or the tokenizer is no longer the same")
        prompt_ids = prompt_tokens(tokenizer, blocks.held_out, settings, position_limit(base))
        self.say(
            f"{blocks.tokens:,} tokens: {len(blocks.train)} blocks of {settings.block_size} to train on, "
            f"{len(blocks.held_out)} held out"
        )
        agreement = self._train_arms(base, blocks)
        results = self._measure(base, tokenizer, prompt_ids, blocks, agreement)
        return self._write(source.label, blocks, results)

    def _train_arms(self, base: nn.Module, blocks: TokenBlocks) -> Agreement | None:
        arm = fastlora_arm(base, self.settings)
        initial = adapter_snapshot(arm)
        counts = trainable_parameters(arm.model)
        share = f"{counts.trainable:,} of {counts.total:,} parameters ({counts.share:.2%})"
        self.say(f"Training {share} in {len(initial) // 2} layers")
        self._train_arm(arm, blocks)
        if self.settings.compare != PEFT:
            return None
        other = peft_arm(base, self.settings)
        same_seed_start = start_alike(other, initial)
        # The adapter starts at zero effect, so the held-out loss before training is the same model's.
        other.record.held_out_before = arm.record.held_out_before
        self._train_arm(other, blocks)
        return compare_losses(arm.record.losses, other.record.losses, self.settings, same_seed_start)

    def _train_arm(self, arm: Arm, blocks: TokenBlocks) -> None:
        """Trains and evaluates one arm, or what its saved state lacks of that."""
        from tqdm import tqdm

        settings = self.settings
        if self.saved is not None and arm.name in self.saved.records:
            self.saved.restore(arm)
        self.arms.append(arm)
        record = arm.record
        if record.held_out_before is None:
            record.held_out_before = held_out_loss(arm.model, blocks, settings.batch_size, self.device)
        with tqdm(total=settings.steps, initial=record.step, desc=arm.name, unit="step") as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                bar.update()

            train(arm, blocks, settings, self.interruption, on_step)
        if record.held_out_after is None:
            record.held_out_after = held_out_loss(arm.model, blocks, settings.batch_size, self.device)
        # The next measurement of memory should not find this arm's gradients and moments.
        arm.optimizer = None
        arm.model.zero_grad(set_to_none=True)

    def _measure(
        self, base: nn.Module, tokenizer, prompt_ids: Tensor, blocks: TokenBlocks, agreement: Agreement | None
    ) -> reporting.Results:
        arm = self.arms[0]
        counts = trainable_parameters(arm.model)
        layers = len(arm.adapter()) // 2
        merge = check_merge(arm.model, tokenizer, prompt_ids, self.settings, position_limit(base))
        # Last, and on weights that every arm shares: the adapter is kept, the base model is not.
        batch = batch_at(blocks.train, 0, self.settings.batch_size, self.settings.seed)
        full = measure_full_finetuning(base, batch, self.settings)
        records = {entry.name: entry.record for entry in self.arms}
        return reporting.Results(records, counts, layers, merge, full, agreement)

    def _write(self, model_label: str, blocks: TokenBlocks, results: reporting.Results) -> int:
        report = reporting.as_dict(self.settings, model_label, blocks, results)
        with staged(self.output) as stage:
            save_arm(self.arms[0], stage / "adapter", self.settings)
            (stage / "loss.png").write_bytes(reporting.curve_png(report))
            (stage / "report.json").write_bytes(json.dumps(report, indent=2, allow_nan=False).encode())
        (self.output / FILE_NAME).unlink(missing_ok=True)
        for line in reporting.as_lines(report, results.agreement):
            self.say(line)
        self.say(f"Wrote {self.output}/adapter, {self.output}/loss.png and {self.output}/report.json")
        disagreed = results.agreement is not None and results.agreement.failed
        merge_failed = self.settings.dtype == "float32" and not results.merge.same_answer
        return DISAGREED if disagreed or merge_failed else DONE

    def _stop(self) -> int:
        """Saves what the arms have reached, unless the state on disk is further: a resumed run may not be there yet."""
        begun = {arm.name for arm in self.arms}
        if self.saved is not None and not begun.issuperset(self.saved.records):
            self.say(f"Interrupted; the state in {self.saved.path} is as it was")
        elif not any(arm.record.losses for arm in self.arms):
            self.say("Interrupted before the first step: there is nothing to save")
            return INTERRUPTED
        else:
            with self.interruption.deferred():
                path = save_state(self.output, self.settings, self.fingerprint, self.arms)
            done = ", ".join(f"{arm.name} {arm.record.step} of {self.settings.steps} steps" for arm in self.arms)
            self.say(f"Interrupted ({done}); state saved in {path}")
        self.say(f"Go on with: fastlora finetune --resume --output {self.output}")
        return INTERRUPTED
