"""Everything that decides what a fine-tuning run computes."""

import json
from dataclasses import asdict, dataclass, fields

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BASE_QUANTS = ("nf4", "fp4", "int8", "float8")
DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}


@dataclass(frozen=True)
class Settings:
    """The options of one run. Two runs with equal settings on one machine give the same losses, bit for bit.

    Attributes:
        model: a directory, a .gguf file or a hub name; None for the packaged SmolLM2-135M-Instruct.
        text: files to train on, plain text or rows; empty for the text of CPython's `pydoc_data.topics`.
        targets: suffixes of the names of the layers to adapt, or "all-linear" alone for all but the output head.
        block_size: tokens a sequence; batch_size: sequences at once; grad_accum: batches a step; held_out: sequences
            kept for evaluation; eval_every: steps from one evaluation to the next, 0 for the first and last alone.
        base_quant: one of BASE_QUANTS, what the base model's linear layers are quantised to, or None.
        dtype: a torch dtype's name. device: a torch device string.
        via: "fastlora" (its own layers) or "peft" (a PEFT model whose layers are patched by fastlora).
        compare: "peft" to repeat the run with unpatched PEFT, or None.
        prompt: what the models continue for the sample; None for the start of a held-out sequence.
        measure_full: take one step of full fine-tuning to measure its memory, rather than to estimate it.
    """

    model: str | None = None
    text: tuple[str, ...] = ()
    targets: tuple[str, ...] = PROJECTIONS
    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    steps: int = 40
    batch_size: int = 1
    grad_accum: int = 1
    block_size: int = 256
    held_out: int = 8
    eval_every: int = 0
    learning_rate: float = 2e-3
    base_quant: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    via: str = "fastlora"
    compare: str | None = None
    prompt: str | None = None
    measure_full: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Raises ValueError or TypeError where the text holds anything but these fields."""
        values = json.loads(text)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError("the saved settings are not those of this version")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
