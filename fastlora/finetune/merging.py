"""A sample before and after training, and proof that the merged model answers as the one with its adapter does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.errors import CommandError, first_line
from fastlora.finetune.data import IGNORED, Sequences
from fastlora.finetune.models import position_limit
from fastlora.finetune.settings import Settings
from fastlora.model import merge, unmerge

DEFAULT_TEXT_PROMPT = 'The "with" statement is used to'
PROMPT_TOKENS = 32
ANSWER_TOKENS = 24
CHECK_PARTS = ("sample before", "sample after", "sample merged")


@dataclass(frozen=True)
class MergeCheck:
    """Greedy continuations of one prompt: by the base model, with the adapter, and merged.

    Over a quantised base nothing is merged: the branch would be rounded away. What is not there then is None.

    Attributes:
        same_answer: the last two are the same tokens.
        max_logit_difference: largest |difference| of the logits over prompt and answer.
        max_logit: largest |logit| there, to judge the difference by.
    """

    prompt: str
    base_answer: str
    answer: str
    merged_answer: str | None
    same_answer: bool | None
    max_logit_difference: float | None
    max_logit: float


def prompt_tokens(tokenizer, held_out: Sequences, settings: Settings, limit: int | None) -> Tensor:
    """What the models will continue, as token ids [1, length].

    Args:
        held_out: where the settings name a text but no prompt, the first of these gives it: what comes before its first
            label, or its first tokens where all are learned.
        limit: positions of the model, or None.

    Raises:
        CommandError: the prompt is no token, or leaves no position for an answer.
    """
    prompt = settings.prompt or (None if settings.text else DEFAULT_TEXT_PROMPT)
    if not prompt:
        given = int((held_out.labels[0] != IGNORED).nonzero()[0])
        return held_out.ids[:1, : given or min(PROMPT_TOKENS, (limit or PROMPT_TOKENS + 1) - 1)]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not prompt_ids or (limit is not None and len(prompt_ids) >= limit):
        room = "at least one" if limit is None else f"1 to {limit - 1}"
        raise CommandError(f"--prompt is {len(prompt_ids)} tokens; this model takes {room}")
    return torch.tensor([prompt_ids])


@torch.no_grad()
def check_merge(
    base: nn.Module,
    model: nn.Module,
    tokenizer,
    prompt_ids: Tensor,
    settings: Settings,
    begin: Callable[[str], None],
) -> MergeCheck:
    """Generates with the base model and with the adapted one, merges, generates again, and takes the merge back.

    Args:
        prompt_ids: as `prompt_tokens` gives them.
        begin: gets the name of each of CHECK_PARTS as it begins.

    Raises:
        CommandError: a merged weight is not finite.
    """
    base.eval()
    model.eval()
    limit = position_limit(base)
    prompt_ids = prompt_ids.to(settings.device)
    answer_tokens = ANSWER_TOKENS if limit is None else min(ANSWER_TOKENS, limit - prompt_ids.shape[1])
    start = prompt_ids.shape[1]
    begin(CHECK_PARTS[0])
    base_sequence = _continue(base, prompt_ids, tokenizer, answer_tokens)
    begin(CHECK_PARTS[1])
    sequence = _continue(model, prompt_ids, tokenizer, answer_tokens)
    logits = model(input_ids=sequence, use_cache=False).logits.float()
    found = {
        "prompt": tokenizer.decode(prompt_ids[0]),
        "base_answer": tokenizer.decode(base_sequence[0, start:]),
        "answer": tokenizer.decode(sequence[0, start:]),
        "max_logit": logits.abs().max().item(),
    }
    begin(CHECK_PARTS[2])
    if settings.base_quant:
        return MergeCheck(**found, merged_answer=None, same_answer=None, max_logit_difference=None)
    _merge(model, settings)
    merged_sequence = _continue(model, prompt_ids, tokenizer, answer_tokens)
    merged_logits = model(input_ids=sequence, use_cache=False).logits.float()
    _unmerge(model, settings)
    return MergeCheck(
        **found,
        merged_answer=tokenizer.decode(merged_sequence[0, start:]),
        same_answer=torch.equal(sequence, merged_sequence),
        max_logit_difference=(logits - merged_logits).abs().max().item(),
    )


def _continue(model: nn.Module, prompt_ids: Tensor, tokenizer, answer_tokens: int) -> Tensor:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return model.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        do_sample=False,
        max_new_tokens=answer_tokens,
        pad_token_id=pad,
    )


def _merge(model: nn.Module, settings: Settings) -> None:
    if settings.via == "peft":
        model.merge_adapter()
    else:
        try:
            merge(model, safe=True)
        except ValueError as error:
            raise CommandError(f"cannot merge: {first_line(error)}") from error


def _unmerge(model: nn.Module, settings: Settings) -> None:
    if settings.via == "peft":
        model.unmerge_adapter()
    else:
        unmerge(model)
