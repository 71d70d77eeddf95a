"""A file with one line a training step, as CSV or JSON lines, written while the run goes on."""

import csv
import json
from pathlib import Path
from typing import TextIO

from fastlora.finetune.loop import Record
from fastlora.outputs import reported_write_errors

FORMATS = ("csv", "jsonl")
COLUMNS = ("run", "step", "loss", "learning_rate", "tokens", "seconds", "held_out_loss")


def log_name(kind: str) -> str:
    return f"steps.{kind}"


class StepLog:
    """The log of a run. It follows from the records: a resumed run writes what was done, then adds to it.

    Held-out losses have lines of their own; step 0 is before training.
    """

    def __init__(self, directory: Path, kind: str) -> None:
        self._directory, self._kind = directory, kind
        self._written: dict[str, tuple[int, int]] | None = None  # run -> steps, evaluations

    def update(self, records: dict[str, Record]) -> None:
        """Writes what the records have more than at the last call. The first call replaces an earlier run's log.

        Raises:
            CommandError: the log cannot be written.
        """
        path = self._directory / log_name(self._kind)
        with reported_write_errors(path):
            if self._written is None:
                for kind in FORMATS:
                    (self._directory / log_name(kind)).unlink(missing_ok=True)
                path.write_text(",".join(COLUMNS) + "\n" if self._kind == "csv" else "")
                self._written = {}
            with open(path, "a", newline="") as file:
                for name, record in records.items():
                    self._append(file, self._new_lines(name, record))
                    self._written[name] = (record.step, len(record.held_out))

    def _new_lines(self, name: str, record: Record) -> list[dict]:
        steps, evaluations = self._written.get(name, (0, 0))
        lines = [
            {
                "run": name,
                "step": index + 1,
                "loss": record.losses[index],
                "learning_rate": record.learning_rates[index],
                "tokens": record.step_tokens[index],
                "seconds": round(record.step_seconds[index], 6),
            }
            for index in range(steps, record.step)
        ]
        lines += [{"run": name, "step": step, "held_out_loss": loss} for step, loss in record.held_out[evaluations:]]
        return sorted(lines, key=lambda line: line["step"])

    def _append(self, file: TextIO, lines: list[dict]) -> None:
        if self._kind == "csv":
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(lines)
        else:
            file.writelines(json.dumps(line) + "\n" for line in lines)
