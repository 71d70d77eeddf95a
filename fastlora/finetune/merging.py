"""Proof that the merged model answers as the model with its adapter does."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastlora.errors import CommandError, first_line
from fastlora.finetune.settings import Settings
from fastlora.model import merge, unmerge

DEFAULT_TEXT_PROMPT = 'The "with" statement is used to'
PROMPT_TOKENS = 32
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class MergeCheck:
    """Greedy continuations of one prompt before and after merging.

    Attributes:
        same_answer: both continuations are the same tokens.
        max_logit_difference: largest |difference| of the logits over prompt and answer.
        max_logit: largest |logit| there, to judge the difference by.
    """

    prompt: str
    answer: str
    merged_answer: str
    same_answer: bool
    max_logit_difference: float
    max_logit: float


def prompt_tokens(tokenizer, held_out: Tensor, settings: Settings, limit: int | None) -> Tensor:
    """What the merged model will continue, as token ids [1, length].

    Args:
        held_out: token ids [h, block_size]; the first ones are the prompt where the settings name a text but no prompt.
        limit: positions of the model, or None.

    Raises:
        CommandError: the prompt is no token, or leaves no position for an answer.
    """
    prompt = settings.prompt or (None if settings.text else DEFAULT_TEXT_PROMPT)
    if not prompt:
        return held_out[:1, : min(PROMPT_TOKENS, (limit or PROMPT_TOKENS + 1) - 1)]
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not prompt_ids or (limit is not None and len(prompt_ids) >= limit):
        room = "at least one" if limit is None else f"1 to {limit - 1}"
        raise CommandError(f"--prompt is {len(prompt_ids)} tokens; this model takes {room}")
    return torch.tensor([prompt_ids])


@torch.no_grad()
def check_merge(model: nn.Module, tokenizer, prompt_ids: Tensor, settings: Settings, limit: int | None) -> MergeCheck:
    """Generates, merges, generates again, and takes the merge back.

    Args:
        prompt_ids, limit: as of `prompt_tokens`.

    Raises:
        CommandError: a merged weight is not finite.
    """
    model.eval()
    prompt_ids = prompt_ids.to(settings.device)
    answer_tokens = ANSWER_TOKENS if limit is None else min(ANSWER_TOKENS, limit - prompt_ids.shape[1])
    sequence = _continue(model, prompt_ids, tokenizer, answer_tokens)
    logits = model(input_ids=sequence, use_cache=False).logits.float()
    _merge(model, settings)
    merged_sequence = _continue(model, prompt_ids, tokenizer, answer_tokens)
    merged_logits = model(input_ids=sequence, use_cache=False).logits.float()
    _unmerge(model, settings)
    start = prompt_ids.shape[1]
    return MergeCheck(
        prompt=tokenizer.decode(prompt_ids[0]),
        answer=tokenizer.decode(sequence[0, start:]),
        merged_answer=tokenizer.decode(merged_sequence[0, start:]),
        same_answer=torch.equal(sequence, merged_sequence),
        max_logit_difference=(logits - merged_logits).abs().max().item(),
        max_logit=logits.abs().max().item(),
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
