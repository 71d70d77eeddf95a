"""One process's part of a study: the model is loaded once, and every run that nobody else has gets trained."""

import datetime
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastlora.conv1d import linear_features
from fastlora.environment import commit
from fastlora.errors import CommandError, first_line
from fastlora.finetune.arms import adapter_snapshot, fastlora_arm, save_arm
from fastlora.finetune.data import TokenBlocks, make_blocks, read_text
from fastlora.finetune.interrupt import Interruption
from fastlora.finetune.loop import Arm, DivergedError, held_out_loss, train
from fastlora.finetune.models import find_model, load_model
from fastlora.finetune.report import versions
from fastlora.finetune.settings import Settings
from fastlora.outputs import check_writable, reported_write_errors
from fastlora.study.plan import Plan, RunSpec, StudySettings, make_plan
from fastlora.study.store import RunStore
from fastlora.study.trend_plan import TrendPlan, make_trend_plan
from fastlora.targets import match_targets

SPLIT_SEED = 0  # one split for all runs: their held-out losses compare
POLL_SECONDS = 0.5


@dataclass
class Trainer:
    """The model, the text and the plan, ready to train.

    Attributes:
        label: the model's name.
        base: the frozen model; runs train copies that share its tensors.
        commit: the checkout's, or None.
    """

    settings: StudySettings
    device: torch.device
    store: RunStore
    label: str
    base: nn.Module
    blocks: TokenBlocks
    plan: Plan | TrendPlan
    commit: str | None

    def run_all(self, interruption: Interruption, say: Callable[[str], None]) -> None:
        """Trains until every run of the plan has a result, this process's or another's.

        Raises:
            Interrupted: between two steps; the runs that have ended are stored.
            CommandError: a result cannot be written.
        """
        steps, waiting = self.settings.steps, False
        with tqdm(total=self.plan.count * steps, unit="step", file=sys.stderr, smoothing=0.05) as bar:
            while len(finished := self.store.finished(specs := self.runs)) < len(specs):
                trained = False
                for spec in (spec for spec in specs if spec not in finished):
                    with self.store.claim(spec) as mine:
                        if mine:
                            self._show(bar, spec.key)
                            self._run(spec, interruption, bar)
                            trained = True
                if not trained:
                    if not waiting:
                        say("The rest is being trained by other processes; waiting for them")
                        waiting = True
                    time.sleep(POLL_SECONDS)
                self._show(bar, "")

    @property
    def runs(self) -> list[RunSpec]:
        """The plan's runs as far as the results so far decide them; all, once these have ended."""
        return self.plan.runs + self.plan.further_runs(self.store.result)

    def run_settings(self, spec: RunSpec) -> Settings:
        """The run as fine-tuning would be asked for it; its seed decides the batches."""
        settings = self.settings
        return Settings(
            model=settings.model,
            text=settings.text,
            targets=tuple(settings.projections[index] for index in spec.group),
            rank=spec.rank,
            alpha=settings.alpha,
            steps=settings.steps,
            batch_size=settings.batch_size,
            block_size=settings.block_size,
            held_out=settings.held_out,
            learning_rate=spec.learning_rate or settings.learning_rate,
            dtype=settings.dtype,
            device=str(self.device),
            seed=spec.data_seed,
        )

    def base_loss(self) -> float:
        """The frozen model's held-out loss."""
        return held_out_loss(self.base, self.blocks, self.settings.batch_size, self.device)

    def _show(self, bar: tqdm, label: str) -> None:
        """Counts what other processes have finished, too."""
        bar.n = len(self.store.finished(self.runs)) * self.settings.steps
        bar.set_description(label or "waiting")

    def _run(self, spec: RunSpec, interruption: Interruption, bar: tqdm) -> None:
        """Trains, measures and stores one run; one that diverges is stored as such."""
        started = _now()
        settings = self.run_settings(spec)
        arm = fastlora_arm(self.base, replace(settings, seed=spec.start_seed))
        initial = adapter_snapshot(arm)
        states, failure = [], None
        try:
            for step in self.plan.kept_steps(settings.steps):
                train(arm, self.blocks, settings, interruption, lambda loss: bar.update(), until=step)
                loss = held_out_loss(arm.model, self.blocks, settings.batch_size, self.device)
                states.append(
                    {"step": step, "held_out_loss": loss, "relative_change_of_a": _relative_change(arm, initial)}
                )
                if spec.kept:
                    directory = self.store.adapter(spec, None if step == settings.steps else step)
                    with interruption.deferred(), reported_write_errors(directory):
                        save_arm(arm, directory, settings)
        except DivergedError as error:
            failure = first_line(error)
        with interruption.deferred():
            self.store.save(spec, self._result(spec, arm, initial, states, failure, started))

    def _result(
        self,
        spec: RunSpec,
        arm: Arm,
        initial: dict[str, Tensor],
        states: list[dict],
        failure: str | None,
        started: str,
    ) -> dict:
        final = {"held_out_loss": None, "relative_change_of_a": None} if failure else states[-1]
        return {
            "key": spec.key,
            "label": spec.label,
            "targets": [self.settings.projections[index] for index in spec.group],
            "rank": spec.rank,
            "seed": spec.seed,
            "parameters": sum(value.numel() for value in initial.values()),
            "learning_rate": spec.learning_rate or self.settings.learning_rate,
            "held_out_loss": final["held_out_loss"],
            "failure": failure,
            "losses": arm.record.losses,
            "relative_change_of_a": final["relative_change_of_a"],
            "states": states,
            "seconds": round(arm.record.seconds, 3),
            "started": started,
            "ended": _now(),
            "process": os.getpid(),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "dispatch_counts": arm.record.calls,
            "versions": versions(),
            "commit": self.commit,
        }


def prepare(
    settings: StudySettings, device: torch.device, store: RunStore, interruption: Interruption, say: Callable
) -> Trainer:
    """Loads the model and the text and begins, or joins, the study in the store's directory.

    Raises:
        CommandError: something cannot be read, a projection matches no layer, or the directory holds another study.
    """
    text, source = read_text(settings.text), find_model(settings.model)
    check_writable(store.directory)
    say(f"Loading {source.label}{'' if source.local else ' from the hub'} in {settings.dtype}")
    base, tokenizer = load_model(source, getattr(torch, settings.dtype), device)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = make_blocks(ids, settings.block_size, settings.held_out, SPLIT_SEED)
    costs = _costs(base, settings.projections)
    plan = make_trend_plan(settings, costs) if settings.learning_rates else make_plan(settings, costs)
    facts = {"model": source.label, "text": blocks.fingerprint(), "costs": list(plan.costs)}
    with interruption.deferred():
        store.begin(settings, facts)
    return Trainer(settings, device, store, source.label, base, blocks, plan, commit())


def _costs(base: nn.Module, projections: tuple[str, ...]) -> tuple[int, ...]:
    """Parameters that one rank adds to each projection, over all layers.

    Raises:
        CommandError: a projection matches no linear layer.
    """
    modules, costs = dict(base.named_modules()), []
    for name in projections:
        try:
            found = [modules[path] for path in match_targets(base, [name])]
        except ValueError as error:
            raise CommandError(f"--projections: {first_line(error)}") from error
        sizes = [linear_features(module) for module in found]
        if None in sizes:
            raise CommandError(f"--projections: {name} names modules that are not linear layers")
        costs.append(sum(sum(features) for features in sizes if features))
    return tuple(costs)


def _relative_change(arm: Arm, initial: dict[str, Tensor]) -> float:
    """‖A − A₀‖ / ‖A₀‖, the mean over the layers."""
    names = [name for name in initial if name.endswith("lora_A")]
    after = arm.adapter()
    return sum(((after[n] - initial[n]).norm() / initial[n].norm()).item() for n in names) / len(names)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
