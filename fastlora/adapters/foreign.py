"""Adapter files of other tools (kohya and ComfyUI, diffusers, loralib), read into PEFT's names. Never a pickle.

What such a file leaves out (the model's paths, where names are underscored; often alpha) comes from the model that it
is for and from conventions: kohya's and diffusers' files mean alpha = rank where they hold none, loralib's say nothing.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastlora.adapters.files import MAX_HEADER, is_number, listed
from fastlora.conv1d import linear_features
from fastlora.model import canonical_name

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
_PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
# What a tool writes in front of the paths of one model.
_PREFIXES = (
    "base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "unet.",
    "transformer.",
    "text_encoder.",
    "text_encoder_2.",
    "lora_unet_",
    "lora_transformer_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
)
_KEY = re.compile(
    r"(?P<name>.+?)(?:"
    r"(?P<kohya>\.lora_(?:(?P<down>down)|up)\.weight)|"
    r"(?P<peft>\.lora_(?:(?P<a>A)|B)(?:\.default)?\.weight)|"
    r"(?P<loralib>\.lora_(?:(?P<factor_a>A)|B))|"
    r"(?P<attention>(?:\.lora|\.lora_linear_layer|_lora)\.(?:(?P<old_down>down)|up)\.weight)|"
    r"(?P<alpha>\.alpha))",
    re.DOTALL,
)
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the configuration, since its 0.35


class ForeignLayer(NamedTuple):
    """One layer of such a file: A [r, in], B [out, r] as stored, and its alpha."""

    lora_a: Tensor
    lora_b: Tensor
    alpha: float


class Foreign(NamedTuple):
    """What was read: layers by module path, whether the scaling is alpha / sqrt(r), and entries left out by prefix."""

    layers: dict[str, ForeignLayer]
    rslora: bool
    skipped: int


def read_foreign(path: Path, model: nn.Module, alpha: float | None = None, prefix: str = "") -> Foreign:
    """Reads an adapter file of another tool for a model, which may be on "meta".

    Args:
        path: a safetensors file.
        model: what the adapter is for; its linear layers give the paths that the file's names stand for.
        alpha: for a file that holds none.
        prefix: read the entries alone whose names begin with this: one model's, in a file for several.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is a pickle, which is never opened, is damaged, or does not map to the model whole: entries
            of other kinds, names that stand for no linear layer or for several, shapes; each with its list.
    """
    with _open(path) as file:
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118  (the handle is not iterable)
        skipped = len(file.keys()) - len(keys)
        names, alphas, unexpected = _sorted_out(keys)
        problems = [f"entries of other kinds: {listed(unexpected)}"] if unexpected else []
        if not names and not problems:
            raise ValueError(f"{path} holds no LoRA entry" + (f" that begins with {prefix!r}" if prefix else ""))
        lone = [name for name in alphas if name not in names]
        problems += [f"alpha without a branch: {listed(lone)}"] if lone else []
        halves = [f"{name} (lora_{'B' if 'A' in found else 'A'})" for name, found in names.items() if len(found) < 2]
        problems += [f"missing: {listed(halves)}"] if halves else []
        paths, unmapped = _mapped(names, model)
        problems += unmapped
        whole = [name for name in paths if len(names[name]) == 2]
        problems += _misfits({name: paths[name] for name in whole}, names, file, model)
        if problems:
            raise ValueError(f"{path} does not map to {type(model).__name__}; {'; '.join(problems)}")
        settings = _Settings(path, file.metadata() or {}, [names[name]["A"] for name in names])
        layers = {}
        for name in whole:
            a, b = (file.get_tensor(names[name][factor]) for factor in "AB")
            held = _number(alphas[name], file) if name in alphas else settings.alpha_of(paths[name])
            layers[paths[name]] = ForeignLayer(a, b, settings.chosen(name, held, alpha, a.shape[0]))
    return Foreign(layers, settings.rslora, skipped)


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        start = file.read(9)
    # A header's length may look like the start of a pickle; behind it comes the header's brace.
    is_safetensors = start[8:] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER
    if not is_safetensors and (path.suffix.lower() in PICKLES or start.startswith(_PICKLE_STARTS)):
        raise ValueError(
            f"{path} is a pickle, which can run code when opened and is refused; convert it where you trust it: "
            "save_file({k: v.contiguous() for k, v in torch.load(FILE, weights_only=True).items()}, "
            "'adapter.safetensors') with safetensors.torch.save_file"
        )
    if not is_safetensors:
        raise ValueError(f"{path} is damaged or is not a safetensors file")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or is not a safetensors file: {error}") from error


def _sorted_out(keys: list[str]) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """The keys of A and B by name, those of alpha by name, and the others."""
    names: dict[str, dict[str, str]] = {}
    alphas, unexpected = {}, []
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            unexpected.append(key)
        elif match["alpha"]:
            alphas[match["name"]] = key
        else:
            is_a = match["down"] or match["a"] or match["factor_a"] or match["old_down"]
            factor = "A" if is_a else "B"
            if factor in names.setdefault(match["name"], {}):
                unexpected.append(key)  # the same factor under two names
            names[match["name"]][factor] = key
    return names, alphas, unexpected


def _mapped(names: dict[str, Any], model: nn.Module) -> tuple[dict[str, str], list[str]]:
    """The module path that each name stands for, and the problems."""
    dotted: dict[str, str] = {}
    underscored: dict[str, list[str]] = {}
    for module_name, module in model.named_modules():
        if linear_features(module) is not None:
            path = canonical_name(module_name)
            dotted[path] = path
            underscored.setdefault(path.replace(".", "_"), []).append(path)
    paths: dict[str, str] = {}
    unknown: list[str] = []
    several: list[str] = []
    for name in names:
        found = {dotted[each] for each in _spellings(name) if each in dotted}
        if "." not in name:
            found |= {path for each in _spellings(name) for path in underscored.get(each, ())}
        if len(found) == 1:
            (paths[name],) = found
        else:
            (several if found else unknown).append(name)
    problems = [f"no linear layer has these names: {listed(unknown)}"] if unknown else []
    problems += [f"these may stand for several layers: {listed(several)}"] if several else []
    by_path: dict[str, list[str]] = {}
    for name, path in paths.items():
        by_path.setdefault(path, []).append(name)
    twice = [" and ".join(found) for found in by_path.values() if len(found) > 1]
    problems += [f"these stand for one layer: {listed(twice)} (choose by --prefix)"] if twice else []
    return paths, problems


def _spellings(name: str) -> Iterator[str]:
    """The name without what tools put in front, and as the module path where it is diffusers' of an attention."""
    for each in {name, *(name.removeprefix(prefix) for prefix in _PREFIXES)}:
        yield each
        yield re.sub(r"\.processor\.to_out$", ".to_out.0", each).replace(".processor.", ".")


def _misfits(paths: dict[str, str], names: dict[str, dict[str, str]], file: Any, model: nn.Module) -> list[str]:
    modules = {canonical_name(name): module for name, module in model.named_modules()}
    wrong, dtypes = [], []
    for name, path in paths.items():
        views = [file.get_slice(names[name][factor]) for factor in "AB"]
        a, b = (list(view.get_shape()) for view in views)
        out_features, in_features = linear_features(modules[path]) or (0, 0)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1 or (b[0], a[1]) != (out_features, in_features):
            wrong.append(f"{name}: A {a}, B {b}, the layer [{out_features}, {in_features}]")
        dtypes += [f"{names[name]['A']} ({view.get_dtype()})" for view in views if view.get_dtype() not in _DTYPES]
    problems = [f"shapes differ: {listed(wrong, '; ')}"] if wrong else []
    return problems + ([f"dtype not one of {', '.join(_DTYPES)}: {listed(dtypes)}"] if dtypes else [])


_DTYPES = ("F64", "F32", "F16", "BF16")


def _number(key: str, file: Any) -> float:
    value = file.get_tensor(key)
    number = value.item() if value.numel() == 1 else math.nan
    if not math.isfinite(number):
        raise ValueError(f"{key} is no finite number")
    return int(number) if number == int(number) else float(number)


class _Settings:
    """What a file says of alpha besides its entries, and what its kind means where it says nothing."""

    def __init__(self, path: Path, metadata: dict[str, str], keys: list[str]):
        self._path, self.rslora = path, False
        self._is_loralib = any((match := _KEY.fullmatch(key)) and match["loralib"] for key in keys)
        self._alpha: float | None = None
        self._alpha_pattern: dict[str, float] = {}
        if _METADATA in metadata:
            self._read(metadata[_METADATA])

    def _read(self, text: str) -> None:
        """diffusers' JSON: the fields of PEFT's configuration, each with the model's name in front."""
        given: dict[str, Any] = {}
        with suppress(ValueError, RecursionError):
            given = json.loads(text)
        given = {key.rpartition(".")[2]: value for key, value in given.items()} if isinstance(given, dict) else {}
        odd = [field for field in ("use_dora", "lora_bias") if given.get(field)]
        alpha, pattern = given.get("lora_alpha"), given.get("alpha_pattern") or {}
        numbers = [*([] if alpha is None else [alpha]), *(pattern.values() if isinstance(pattern, dict) else [None])]
        if not all(map(is_number, numbers)):
            odd.append("lora_alpha or alpha_pattern")
        if odd:
            raise ValueError(f"{self._path}: its configuration ({_METADATA}) has {', '.join(odd)}, not served here")
        self._alpha, self._alpha_pattern = alpha, pattern
        self.rslora = bool(given.get("use_rslora", False))

    def alpha_of(self, path: str) -> float | None:
        for key, value in self._alpha_pattern.items():
            if path == key or path.endswith(f".{key}"):
                return value
        return self._alpha

    def chosen(self, name: str, held: float | None, given: float | None, rank: int) -> float:
        """The alpha of a layer: the file's, or else the caller's, or else the rank."""
        if held is not None and given is not None and held != given:
            raise ValueError(f"{self._path} holds the alpha {held:g} of {name}: leave the other one, {given:g}, out")
        if held is None and given is None and self._is_loralib:
            raise ValueError(
                f"{self._path} is loralib's and holds no alpha: give the one that it was trained with "
                "(--alpha; loralib's default is 1)"
            )
        return held if held is not None else given if given is not None else rank
