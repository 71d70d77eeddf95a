"""Documents to token ids: what is learned in a row, and the end-of-sequence token between texts."""

from dataclasses import dataclass, field

from fastlora.errors import CommandError, first_line
from fastlora.finetune.data import IGNORED, LabelledRow
from fastlora.finetune.rows import Chat, Pair


@dataclass
class Encoded:
    """Token ids of running text, rows with labels of their own, and what the user should know of the rows."""

    token_ids: list[int] = field(default_factory=list)
    rows: list[LabelledRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def encode(documents: list[str | Pair | Chat], tokenizer, block_size: int) -> Encoded:
    """Joins the texts, with the end-of-sequence token between two, and gives every row its labels.

    A row longer than a block loses its end; one in which nothing to learn is left then is left out. Notes say so.

    Raises:
        CommandError: the tokenizer lacks what the documents need (an end-of-sequence token, a chat template, positions
            of its tokens in the text), the template cannot render a row, or no row has anything to learn.
    """
    texts = [document for document in documents if isinstance(document, str)]
    rows = [document for document in documents if not isinstance(document, str)]
    encoded = Encoded()
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
        encoded.token_ids += [_end(tokenizer), *ids] if encoded.token_ids else ids
    if rows and not tokenizer.is_fast:
        raise CommandError("rows need a tokenizer of the tokenizers library, which knows the tokens' places")
    cut, empty = [], []
    for row in rows:
        ids, labels = _labelled(row, tokenizer)
        if len(ids) > block_size:
            cut.append(row.where)
        # The first token follows nothing, so it is never predicted.
        if all(label == IGNORED for label in labels[1:block_size]):
            empty.append(row.where)
        else:
            encoded.rows.append((ids[:block_size], labels[:block_size]))
    if rows and not encoded.rows:
        raise CommandError(f"no row has anything to learn within --block-size {block_size} (first: {empty[0]})")
    if cut:
        encoded.notes.append(f"{len(cut)} of {len(rows)} rows are cut at --block-size {block_size} (first: {cut[0]})")
    if empty:
        encoded.notes.append(f"{len(empty)} of them are left out, nothing to learn being left (first: {empty[0]})")
    return encoded


def _end(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise CommandError("the tokenizer has no end-of-sequence token, which separates documents and ends completions")
    return tokenizer.eos_token_id


def _labelled(row: Pair | Chat, tokenizer) -> LabelledRow:
    """Token ids of a row, and as labels the ids of those that begin in what is learned."""
    if isinstance(row, Pair):
        text, spans = row.prompt + row.completion, [(len(row.prompt), len(row.prompt) + len(row.completion))]
    else:
        text, spans = _rendered(row, tokenizer)
    # A template writes its special tokens itself; a prompt gets those that it gets at inference.
    found = tokenizer(text, add_special_tokens=isinstance(row, Pair), return_offsets_mapping=True)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    learned = [any(first <= start < end <= last for first, last in spans) for start, end in offsets]
    if isinstance(row, Pair):
        end = _end(tokenizer)
        if ids[-1] != end:
            ids.append(end)
            learned.append(True)
        learned[-1] = True
    return ids, [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]


def _rendered(row: Chat, tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """A chat as its template writes it, and where the assistant's turns lie: from where generation would begin."""
    messages, spans = list(row.messages), []
    text = _render(row, messages, tokenizer)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(row, messages[:index], tokenizer, add_generation_prompt=True)
            with_turn = _render(row, messages[: index + 1], tokenizer)
            if not (text.startswith(with_turn) and with_turn.startswith(before)):
                raise CommandError(
                    f"{row.where}: the chat template writes message {index + 1} in another way when more follow, so "
                    "its tokens cannot be told apart; give each turn a row of its own"
                )
            spans.append((len(before), len(with_turn)))
    return text, spans


def _render(row: Chat, messages: list[dict[str, str]], tokenizer, **options: bool) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise CommandError(f"{row.where}: the tokenizer has no chat template; use an instruct model or rows of prompts")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        raise CommandError(f"{row.where}: the chat template refuses it: {first_line(error)}") from error
