"""The models that train: fastlora's layers in the base model, and PEFT's for comparison, from the same start."""

import importlib
import importlib.util
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from fastlora.adapters.io import save_adapter
from fastlora.conv1d import linear_features
from fastlora.errors import CommandError, first_line
from fastlora.finetune.loop import Arm, make_optimizer
from fastlora.finetune.models import shared_copy
from fastlora.finetune.settings import Settings
from fastlora.model import inject
from fastlora.targets import ALL_LINEAR, match_targets

FASTLORA = "fastlora"
PEFT = "peft"

# base_model.model.<path>.lora_A.default.weight in a PEFT model is <path>.lora_A here; DoRA's magnitude likewise.
_PEFT_NAME = re.compile(r"^base_model\.model\.(.+\.lora_(?:A|B|magnitude_vector))\.default\.weight$")


def require_peft() -> None:
    """Imports peft now: loaded between two runs, it would count as memory of the second one.

    Raises:
        CommandError: the package is not installed, or does not go with what else is.
    """
    if importlib.util.find_spec("peft") is None:
        raise CommandError("--compare peft and --via peft need the peft package: pip install peft")
    try:
        importlib.import_module("peft")
    except ImportError as error:  # of a name that another version of transformers has no longer, say
        raise CommandError(f"peft cannot be imported: {first_line(error)}") from error


def fastlora_arm(base: nn.Module, settings: Settings) -> Arm:
    """The base model with fastlora's layers: injected, or those of a PEFT model patched by fastlora (--via peft).

    Raises:
        CommandError: a target matches no layer, or one that cannot be adapted.
    """
    if settings.via == PEFT:
        from fastlora.integrations.peft import patch

        arm = peft_arm(base, settings)
        patch(arm.model)
        return Arm(FASTLORA, arm.model, arm.optimizer)
    model = shared_copy(base)
    torch.manual_seed(settings.seed)
    try:
        inject(
            model,
            _targets(settings),
            r=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            rslora=settings.rslora,
            dora=settings.dora,
            # As PEFT does: over a 16-bit model the adapters are float32.
            adapter_dtype=torch.float32,
        )
    except (ValueError, TypeError) as error:
        raise CommandError(first_line(error)) from error
    return Arm(FASTLORA, model, make_optimizer(model, settings.learning_rate))


def peft_arm(base: nn.Module, settings: Settings) -> Arm:
    """The base model with stock PEFT layers.

    Raises:
        CommandError: as for `fastlora_arm`.
    """
    import peft

    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=_targets(settings),
        task_type="CAUSAL_LM",
    )
    model = shared_copy(base)
    torch.manual_seed(settings.seed)
    with warnings.catch_warnings():
        # PEFT asks transformers for an attribute that newer versions of it rename.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out")  # PEFT sets it as each layer needs it, and says so
        # Of what it could not merge: nothing is merged over a quantised base here.
        warnings.filterwarnings("ignore", ".*get_apply_tensor_subclass", UserWarning)
        try:
            model = peft.get_peft_model(model, config)
        except (ValueError, TypeError, ImportError) as error:  # the last for optional packages of the wrong version
            raise CommandError(f"PEFT: {first_line(error)}") from error
    return Arm(PEFT, model, make_optimizer(model, settings.learning_rate))


def check_targets(model: nn.Module, settings: Settings) -> None:
    """Raises CommandError where a target matches no layer of the model, or one that fastlora cannot replace."""
    if settings.via == PEFT and _targets(settings) == ALL_LINEAR:
        return  # PEFT knows linear layers of more kinds
    try:
        paths = match_targets(model, _targets(settings))
    except (ValueError, TypeError) as error:
        raise CommandError(first_line(error)) from error
    modules = dict(model.named_modules())
    for path in paths if settings.via != PEFT else ():
        if linear_features(modules[path]) is None:
            raise CommandError(f"--targets: {path} is {type(modules[path]).__name__}, not a linear layer")


def _targets(settings: Settings) -> str | list[str]:
    return ALL_LINEAR if settings.targets == (ALL_LINEAR,) else list(settings.targets)


def adapter_snapshot(arm: Arm) -> dict[str, Tensor]:
    """Copies of the adapter's tensors under fastlora's names, whichever layers hold them."""
    return {_PEFT_NAME.sub(r"\1", name): parameter.detach().clone() for name, parameter in arm.adapter().items()}


@torch.no_grad()
def start_alike(arm: Arm, initial: dict[str, Tensor]) -> bool:
    """Gives the arm the initial adapter of another; returns whether its own, from the same seed, was that already.

    Raises:
        CommandError: the two adapt different layers.
    """
    own = {_PEFT_NAME.sub(r"\1", name): parameter for name, parameter in arm.adapter().items()}
    if own.keys() != initial.keys():
        different = sorted(own.keys() ^ initial.keys())
        raise CommandError(f"fastlora and PEFT adapt different layers: {', '.join(different[:4])}")
    identical = all(torch.equal(own[name], initial[name]) for name in initial)
    for name, value in initial.items():
        own[name].copy_(value)
    return identical


def save_arm(arm: Arm, directory: Path, settings: Settings) -> None:
    """Writes fastlora's adapter in PEFT's format. Raises OSError where that fails."""
    if settings.via == PEFT:
        arm.model.save_pretrained(directory, save_embedding_layers=False)  # "auto" may ask the hub
    else:
        save_adapter(arm.model, directory)
