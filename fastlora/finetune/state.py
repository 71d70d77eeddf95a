"""The state of an interrupted run in one safetensors file: adapters, optimiser moments, random state, records."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastlora.errors import CommandError, first_line
from fastlora.finetune.loop import Arm, Record
from fastlora.finetune.settings import Settings
from fastlora.outputs import replace_file

FILE_NAME = "state.safetensors"
FORMAT = "fastlora-finetune-2"
RANDOM = "random"


def save_state(
    directory: Path, settings: Settings, fingerprint: str, arms: list[Arm], saved: "SavedState | None"
) -> Path:
    """Writes the state of a run, whole or not at all.

    What the file has of arms that hold no optimiser, since they have finished, stays there; so does what ``saved``, the
    state that the run was resumed from, has of arms that are not begun yet.

    Raises:
        CommandError: it cannot be written; a state from before is kept.
    """
    path = directory / FILE_NAME
    tensors = {}
    records = dict(saved.records) if saved is not None else {}
    records |= {arm.name: arm.record for arm in arms}
    active = {arm.name: arm for arm in arms if arm.optimizer is not None}
    for name in records:
        tensors |= _tensors_of(active[name], settings) if name in active else _read(path, f"{name}/")
    metadata = {
        "format": FORMAT,
        "settings": settings.to_json(),
        "fingerprint": fingerprint,
        "records": json.dumps({name: record.to_dict() for name, record in records.items()}),
    }
    replace_file(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))
    return path


def _tensors_of(arm: Arm, settings: Settings) -> dict[str, Tensor]:
    """Parameters, moments and the random state that the arm's next step begins with."""
    tensors = {f"{arm.name}/{RANDOM}/cpu": torch.get_rng_state()}
    if settings.device.startswith("cuda"):
        tensors[f"{arm.name}/{RANDOM}/cuda"] = torch.cuda.get_rng_state(settings.device)
    for name, parameter in arm.adapter().items():
        tensors[f"{arm.name}/parameter/{name}"] = parameter.detach()
        for key, value in arm.optimizer.state.get(parameter, {}).items():
            tensors[f"{arm.name}/{key}/{name}"] = value
    return tensors


class SavedState:
    """A state read back. Opening it reads the header; an arm's tensors are read when it is restored."""

    def __init__(self, directory: Path) -> None:
        """Raises CommandError where there is no state, or not one of this format."""
        self.path = directory / FILE_NAME
        if not self.path.is_file():
            raise CommandError(f"nothing to resume in {directory}: no {FILE_NAME} there")
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            self.settings = Settings.from_json(metadata["settings"])
            self.fingerprint = metadata["fingerprint"]
            records = json.loads(metadata["records"])
            self.records = {name: Record.from_dict(values) for name, values in records.items()}
            if not self.records:
                raise ValueError("it holds no run")
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CommandError(f"cannot resume from {self.path}: {first_line(error)}") from error

    @torch.no_grad()
    def restore(self, arm: Arm) -> None:
        """Puts the saved parameters, optimiser state and record into a freshly built arm; torch's random state too.

        Raises:
            CommandError: the file's tensors are not those of this arm; nothing was changed then.
        """
        saved, random = self._tensors(arm)
        for name, parameter in arm.adapter().items():
            values = saved[name]
            parameter.copy_(values.pop("parameter"))
            if arm.optimizer is not None and values:
                # `step` stays on the CPU, as AdamW made it; the moments live beside their parameter.
                moments = {key: value.to(parameter.device) for key, value in values.items() if key != "step"}
                arm.optimizer.state[parameter] = {"step": values["step"], **moments}
        arm.record = self.records[arm.name]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.settings.device)

    def _tensors(self, arm: Arm) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """The arm's tensors by parameter name and kind, checked against its parameters, and its random states."""
        saved: dict[str, dict[str, Tensor]] = {}
        random = {}
        for key, tensor in _read(self.path, f"{arm.name}/").items():
            _, kind, name = key.split("/", 2)
            if kind == RANDOM:
                random[name] = tensor
            else:
                saved.setdefault(name, {})[kind] = tensor
        adapter = arm.adapter()
        if saved.keys() != adapter.keys() or "cpu" not in random:
            raise CommandError(f"cannot resume from {self.path}: its parameters are not those of this model")
        for name, values in saved.items():
            shapes = {tuple(value.shape) for kind, value in values.items() if kind != "step"}
            if shapes != {tuple(adapter[name].shape)} or "parameter" not in values:
                raise CommandError(f"cannot resume from {self.path}: {name} has the shapes {sorted(shapes)}")
        return saved, random


def _read(path: Path, prefix: str) -> dict[str, Tensor]:
    """The file's tensors whose names begin so. Raises CommandError where it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CommandError(f"cannot resume from {path}: {first_line(error)}") from error
