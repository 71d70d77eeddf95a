"""Adapters in context: one decoder layer, and a whole fine-tuning step of a model of the demo model's shape."""

import itertools
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from fastlora.bench.correctness import TOLERANCE, WrongResult
from fastlora.bench.cost import PASSES, model_cost
from fastlora.bench.decompositions import eager
from fastlora.bench.memory import allocation_peak, launches, saved_bytes
from fastlora.bench.peers import SCALING
from fastlora.bench.timing import Stage, time_interleaved
from fastlora.finetune.models import shared_copy

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# An error of one layer passes through a few more roundings here.
MODEL_TOLERANCE = {dtype: 5 * bound for dtype, bound in TOLERANCE.items()}


@dataclass(frozen=True)
class ModelCase:
    """Dimensions of a Llama-like model and the batch: tokens are batch × length."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    r: int
    dtype: torch.dtype

    @property
    def key_value_width(self) -> int:
        return self.hidden // self.heads * self.key_value_heads

    @property
    def projections(self) -> tuple[tuple[int, int], ...]:
        """(out_features, in_features) of a layer's PROJECTIONS."""
        square, narrow = (self.hidden, self.hidden), (self.key_value_width, self.hidden)
        up, down = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return square, narrow, narrow, square, up, up, down


def decoder_case(device: str) -> ModelCase:
    """One layer of the demo model on a CPU, of Llama-3.1-8B on a GPU."""
    if device == "cpu":
        return ModelCase("SmolLM2-135M decoder layer", 576, 1536, 9, 3, 1, 256, 2, 128, 8, torch.float32)
    return ModelCase("Llama-3.1-8B decoder layer", 4096, 14336, 32, 8, 1, 256, 2, 2048, 16, torch.bfloat16)


def finetune_case(device: str) -> ModelCase:
    """The demo model's shape, randomly initialised: times do not depend on the weights' values."""
    batch, length, dtype = (1, 64, torch.float32) if device == "cpu" else (8, 1024, torch.bfloat16)
    return ModelCase("SmolLM2-135M fine-tuning step", 576, 1536, 9, 3, 30, 49152, batch, length, 8, dtype)


class EagerLoRA(nn.Module):
    """A linear layer and its branch as plain composition."""

    def __init__(self, linear: nn.Linear, r: int):
        super().__init__()
        self.weight = linear.weight
        self.lora_A = nn.Parameter(linear.weight.new_empty(r, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_empty(linear.out_features, r))

    def forward(self, x: Tensor) -> Tensor:
        return eager(x, self.weight, self.lora_A, self.lora_B, SCALING, 0.0)


def build_model(case: ModelCase, device: str) -> nn.Module:
    """A frozen, randomly initialised causal language model.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_value_heads,
        num_hidden_layers=case.layers,
        vocab_size=case.vocabulary,
        max_position_embeddings=case.length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(device=device, dtype=case.dtype).requires_grad_(False)


def _with_eager(model: nn.Module, case: ModelCase) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in PROJECTIONS:
                setattr(module, name, EagerLoRA(child, case.r))
    return model


def _with_fastlora(model: nn.Module, case: ModelCase) -> nn.Module:
    from fastlora.model import inject

    inject(model, PROJECTIONS, r=case.r, alpha=SCALING * case.r)
    return model


def _with_groups(model: nn.Module, case: ModelCase) -> nn.Module:
    """q, k and v, and gate and up, computed together."""
    from fastlora.model import inject

    inject(model, PROJECTIONS, r=case.r, alpha=SCALING * case.r, group=True)
    return model


def _with_peft(model: nn.Module, case: ModelCase) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=case.r, lora_alpha=SCALING * case.r, target_modules=list(PROJECTIONS), bias="none")
    return inject_adapter_in_model(config, model)


def _with_patched_peft(model: nn.Module, case: ModelCase) -> nn.Module:
    from fastlora.integrations.peft import patch

    model = _with_peft(model, case)
    patch(model)
    return model


GROUPED = "fastlora, layers of one input together"
# Whole models leave out the eager composition but for its check: a step takes seconds on a CPU.
WHOLE_MODEL_VARIANTS = ("frozen", "fastlora", "peft", "peft patched by fastlora")

VARIANTS: dict[str, Callable[[nn.Module, ModelCase], nn.Module]] = {
    "frozen": lambda model, case: model,
    "fastlora": _with_fastlora,
    GROUPED: _with_groups,
    "eager": _with_eager,
    "peft": _with_peft,
    "peft patched by fastlora": _with_patched_peft,
}


def fill_adapters(model: nn.Module) -> None:
    """Draws A and B from their layer's path, so that every variant of a model holds the same adapters."""
    for name, parameter in model.named_parameters():
        found = re.search(r"(.*)\.lora_([AB])", name)
        if found:
            generator = torch.Generator().manual_seed(zlib.crc32("".join(found.groups()).encode()))
            values = torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5
            parameter.data.copy_(values)


def build_variants(case: ModelCase, device: str) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """name -> model with adapters that train, and name -> why it is missing."""
    base = build_model(case, device)
    built, missing = {}, {}
    for name, adapt in VARIANTS.items():
        try:
            built[name] = adapt(shared_copy(base), case)
        except ImportError as error:
            missing[name] = f"not installed: {error}"
            continue
        fill_adapters(built[name])
    return built, missing


def check_outputs(outputs: dict[str, Tensor]) -> None:
    """Every adapted model gives what the eager one gives, and not what the frozen one gives.

    Raises:
        WrongResult: naming the variant and its error.
    """
    wanted = outputs["eager"].double()
    for name, output in outputs.items():
        error = ((output.double() - wanted).norm() / wanted.norm()).item()
        bound = MODEL_TOLERANCE[output.dtype]
        if (name == "frozen") == (error <= bound):
            raise WrongResult(f"{name}: output is off by {error:.2e} of eager's norm; rounding explains {bound:.0e}")


def make_inputs(case: ModelCase, device: str) -> tuple[Tensor, Tensor]:
    """Hidden states [batch, length, hidden] and token ids [batch, length]."""
    generator = torch.Generator(device=device).manual_seed(1)
    hidden = torch.randn(
        case.batch, case.length, case.hidden, device=device, dtype=torch.float32, generator=generator
    ).to(case.dtype)
    return hidden, torch.randint(case.vocabulary, (case.batch, case.length), device=device, generator=generator)


def build_stages(
    case: ModelCase, hidden: Tensor, ids: Tensor, whole: bool
) -> tuple[dict[str, nn.Module], dict[str, Stage], dict[str, str]]:
    """Models and their stages by variant, checked against each other, and name -> why it is missing.

    Args:
        case: dimensions; hidden, ids: of make_inputs.
        whole: a training step (loss, backward, AdamW) rather than forward and backward of the hidden states.

    Raises:
        WrongResult: a variant is wrong.
    """
    try:
        models, missing = build_variants(case, hidden.device.type)
    except ImportError as error:
        return {}, {}, {case.name: f"not installed: {error}"}
    with torch.no_grad():
        check_outputs({name: model.model(inputs_embeds=hidden).last_hidden_state for name, model in models.items()})
    if whole:
        models = {name: model for name, model in models.items() if name in WHOLE_MODEL_VARIANTS}
    make = _training_stage if whole else _layer_stage
    return models, {name: make(model, hidden, ids) for name, model in models.items()}, missing


def measure_model(case: ModelCase, device: str, seconds: float, whole: bool) -> tuple[list[dict], dict[str, str]]:
    """Rows per variant and pass, and name -> why it is missing.

    Args:
        case, whole: as of build_stages.
        device: "cpu" or "cuda".
        seconds: time to spend on timing.
    """
    hidden, ids = make_inputs(case, device)
    models, stages, missing = build_stages(case, hidden, ids, whole)
    if not stages:
        return [], missing
    timings = time_interleaved({name: [stage] for name, stage in stages.items()}, device, seconds, warm_up=1)
    passes = ("step",) if whole else PASSES
    rows = []
    for name, model in models.items():
        stage = stages[name]

        def step(stage=stage) -> None:
            stage.forward()
            stage.backward()

        counts = {
            # A profile of 30 layers' backward takes longer than the benchmark.
            "launches": None if whole and device == "cpu" else launches(step, device),
            "saved_bytes": saved_bytes(stage.forward, itertools.chain(model.parameters(), [hidden])),
            "peak_bytes": allocation_peak(step, device),
        }
        for which in passes:
            timing, cost = timings[name][which], model_cost(case, which, name != "frozen", whole)
            rows.append(
                {
                    "device": device,
                    "variant": name,
                    "pass": which,
                    **{**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")},
                    **asdict(timing),
                    "tflops": cost.flops / timing.median_us / 1e6,
                    "gbs": cost.bytes / timing.median_us / 1e3,
                    "ratio_to_frozen": timing.median_us / timings["frozen"][which].median_us,
                    **(counts if which == "step" else {}),
                }
            )
    return rows, missing


def _layer_stage(model: nn.Module, hidden: Tensor, ids: Tensor) -> Stage:
    x = hidden.detach().requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dy = torch.randn(hidden.shape, device=hidden.device).to(hidden.dtype)
    held: list = [None]

    def forward() -> None:
        held[0] = model.model(inputs_embeds=x).last_hidden_state

    def backward() -> None:
        torch.autograd.grad(held[0], [x, *trained], dy)
        held[0] = None  # as in fastlora.bench.layer.make_stage

    return Stage(lambda: None, forward, backward)


def _training_stage(model: nn.Module, hidden: Tensor, ids: Tensor) -> Stage:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # The frozen model trains its embeddings' output alone: the same passes, and nothing for the optimiser to do.
    embeds = hidden.detach().requires_grad_(not trained)
    optimizer = torch.optim.AdamW(trained or [embeds], lr=1e-4)
    model.train()
    held: list = [None]

    def forward() -> None:
        inputs = {"input_ids": ids} if trained else {"inputs_embeds": embeds}
        held[0] = model(**inputs, labels=ids, use_cache=False).loss

    def backward() -> None:
        held[0].backward()
        if trained:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Stage(lambda: None, forward, backward)
