"""What fastlora finetune trains on: rows and their refusals, what is learned in a row, batches in parts, the log."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fastlora.errors import CommandError
from fastlora.finetune.compare import LOSS_TOLERANCE
from fastlora.finetune.data import IGNORED, Sequences, TokenBlocks, make_blocks, read_documents, read_text
from fastlora.finetune.encode import encode
from fastlora.finetune.loop import causal_loss, held_out_loss
from fastlora.finetune.rows import Chat, Pair

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}{{ raise_exception('no such role') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As templates of reasoning models: an earlier turn is written without what a last turn has.
REWRITING = TEMPLATE.replace(
    "{{ m['content'] }}", "{{ '[last]' if loop.last and m['role'] == 'assistant' }}{{ m['content'] }}"
)
TURNS = [("user", "hi"), ("assistant", "a low rank"), ("user", "and"), ("assistant", "one")]


def chat(*turns, where="f line 1"):
    return Chat(where, tuple({"role": role, "content": content} for role, content in turns))


@pytest.fixture
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tiny_model)
    loaded.chat_template = TEMPLATE
    return loaded


def learned(tokenizer, row, block_size=100):
    """The whole row and its learned tokens as text; a row of one token a byte."""
    ((ids, labels),) = encode([row], tokenizer, block_size).rows
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != IGNORED])


def test_a_completion_and_its_end_are_learned(tokenizer):
    assert learned(tokenizer, Pair("f line 1", "the frozen", " weight")) == ("the frozen weight<eos>", " weight<eos>")


def test_special_tokens_of_the_tokenizer_are_not_learned_and_its_end_is_not_doubled(tokenizer):
    from tokenizers.processors import TemplateProcessing

    special = [("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A <eos>", special_tokens=special)
    assert learned(tokenizer, Pair("f line 1", "the", " rank")) == ("<eos>the rank<eos>", " rank<eos>")


def test_the_assistants_turns_are_learned_as_the_template_writes_them(tokenizer):
    whole, answers = learned(tokenizer, chat(*TURNS))
    assert whole == "<user>hi<eos>\n<assistant>a low rank<eos>\n<user>and<eos>\n<assistant>one<eos>\n"
    assert answers == "a low rank<eos>\none<eos>\n"


def test_texts_are_joined_by_the_end_of_a_sequence(tokenizer):
    assert tokenizer.decode(encode(["a low", "rank", "one"], tokenizer, 10).token_ids) == "a low<eos>rank<eos>one"
    tokenizer.eos_token = None
    assert tokenizer.decode(encode(["a low"], tokenizer, 10).token_ids) == "a low"
    for documents in (["a low", "rank"], [Pair("f line 1", "a", "b")]):
        with pytest.raises(CommandError, match="no end-of-sequence token"):
            encode(documents, tokenizer, 10)


def test_long_rows_are_cut_and_counted(tokenizer):
    rows = [Pair("f line 1", "abc", "defgh"), Pair("f line 2", "a", "b"), Pair("f line 3", "abcdef", "g")]
    encoded = encode(rows, tokenizer, 5)
    assert [tokenizer.decode(ids) for ids, _ in encoded.rows] == ["abcde", "ab<eos>"]
    assert encoded.notes == [
        "2 of 3 rows are cut at --block-size 5 (first: f line 1)",
        "1 of them are left out, nothing to learn being left (first: f line 3)",
    ]
    with pytest.raises(CommandError, match=r"no row has anything to learn within --block-size 5 \(first: f line 3\)"):
        encode(rows[2:], tokenizer, 5)


@pytest.mark.parametrize(
    ("change", "row", "words"),
    [
        ({"chat_template": None}, chat(*TURNS), "f line 1: the tokenizer has no chat template"),
        ({}, chat(("tool", "x"), ("assistant", "y")), "f line 1: the chat template refuses it: no such role"),
        ({"chat_template": REWRITING}, chat(*TURNS), "f line 1: the chat template writes message 2 in another way"),
    ],
)
def test_a_chat_that_cannot_be_told_apart_is_refused(tokenizer, change, row, words):
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(CommandError, match=words):
        encode([row], tokenizer, 100)


def test_one_turn_of_a_rewriting_template_is_learned(tokenizer):
    tokenizer.chat_template = REWRITING
    assert learned(tokenizer, chat(*TURNS[:2]))[1] == "[last]a low rank<eos>\n"


def test_a_tokenizer_without_places_is_refused():
    with pytest.raises(CommandError, match="tokenizers library"):
        encode([Pair("f line 1", "a", "b")], SimpleNamespace(is_fast=False), 10)


ROWS = [
    {"text": "one"},
    {"prompt": "two", "completion": "three"},
    {"messages": [{"role": "assistant", "content": "x"}]},
]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("a.JSONL", "\r\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json", "\ufeff" + "\n".join(map(json.dumps, ROWS))),
    ],
    ids=["lines", "crlf", "array", "lines-in-json"],
)
def test_rows_are_read_from_lines_and_arrays(tmp_path, name, text):
    (tmp_path / name).write_text(text, newline="")
    (tmp_path / "b.md").write_text("# plain\u2028text")
    documents = read_documents((str(tmp_path / name), str(tmp_path / "b.md")))
    assert documents[0] == "one" and documents[3:] == ["# plain\u2028text"]
    assert (documents[1].prompt, documents[1].completion) == ("two", "three")
    assert documents[2].messages == ({"role": "assistant", "content": "x"},)


def test_a_line_separator_within_a_string_ends_no_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n{"text": "three"}')
    assert read_documents((str(tmp_path / "a.jsonl"),)) == ["one\u2028two", "three"]


GOOD = '{"text": "x"}'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", f'{GOOD}\n{{"text": "x"', "a.jsonl line 2: not JSON: Expecting ',' delimiter"),
        ("a.jsonl", f"{GOOD}\n\n7", "a.jsonl line 3: int, not an object"),
        ("a.jsonl", f'{GOOD}\n{{"instruction": "x", "output": "y"}}', "a.jsonl line 2: has 'instruction', 'output'"),
        ("a.jsonl", '{"text": "x", "messages": []}', "a.jsonl line 1: has 'messages', 'text'"),
        ("a.jsonl", '{"prompt": "x"}', "a.jsonl line 1: has 'prompt'"),
        ("a.jsonl", "{}", "a.jsonl line 1: has nothing"),
        ("a.jsonl", '{"text": 3}', "a.jsonl line 1: text is int, not a string"),
        ("a.jsonl", '{"prompt": "x", "completion": " "}', "a.jsonl line 1: completion is empty"),
        ("a.jsonl", '{"text": "\\ud800"}', "a.jsonl line 1: text has half of a surrogate pair"),
        ("a.jsonl", '{"messages": "x"}', "a.jsonl line 1: messages is no list of objects"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "line 1: no message has the role 'assistant'"),
        ("a.jsonl", '{"messages": [{"role": "assistant"}]}', "a.jsonl line 1: message 1 has ['role']"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": []}]}', "line 1: message 1: content is list"),
        ("a.json", f"[\n  {GOOD},\n\n  {{}}\n]", "a.json line 4: has nothing"),
        ("a.json", f"[{GOOD},\n{GOOD},\n]", "a.json line "),
        ("a.json", f"[{GOOD}", "a.json line 1: not JSON"),
        ("a.json", "[]", "a.json is an empty array"),
        ("a.json", "[" * 200_000, "a.json: not rows: brackets nested too deeply"),
        ("a.csv", "text\nx\n", "Trainer, TRL or axolotl with fastlora.integrations.peft.patch"),
    ],
)
def test_anything_else_is_refused_with_file_and_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(CommandError) as refusal:
        read_documents((str(tmp_path / name),))
    assert words in refusal.value.message and "\n" not in refusal.value.message


def test_a_dataset_by_name_is_led_elsewhere(finetune, tmp_path):
    result = finetune("--text", "HuggingFaceH4/no_robots", "--output", tmp_path / "out")
    assert result.code == 2 and "datasets by name" in result.error_line and "Trainer, TRL" in result.error_line


def test_commands_of_plain_text_refuse_rows(tmp_path):
    (tmp_path / "a.jsonl").write_text(GOOD)
    with pytest.raises(CommandError, match="a.jsonl holds rows, which fastlora finetune takes"):
        read_text((str(tmp_path / "a.jsonl"),))


def test_padding_and_prompts_add_nothing_to_the_loss(tokenizer, tiny_model):
    """Rows side by side: the mean over the learned tokens of each, computed alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    pairs = [("the frozen", " weight"), ("a", " low rank product and one"), ("trains", " to")]
    blocks = make_blocks([], 60, 1, 0, encode([Pair("f", *pair) for pair in pairs], tokenizer, 60).rows)
    total, count = 0.0, 0
    with torch.no_grad():
        for prompt, completion in pairs:
            ids = torch.tensor([tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]])
            logits = model(ids).logits[0, len(prompt) - 1 : -1]  # one token a byte
            total += F.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").item()
            count += len(completion) + 1
        halves = [(part.targets, causal_loss(model, part.trimmed()).item()) for part in (blocks.train, blocks.held_out)]
    assert sum(targets for targets, _ in halves) == count
    assert sum(targets * loss for targets, loss in halves) == pytest.approx(total, rel=1e-5)
    everything = TokenBlocks(blocks.train, Sequences(*(torch.cat(parts) for parts in zip(
        (blocks.train.ids, blocks.train.labels), (blocks.held_out.ids, blocks.held_out.labels), strict=True
    ))))  # fmt: skip
    for batch_size in (1, 2):
        mean = held_out_loss(model, everything, batch_size, torch.device("cpu"))
        assert mean == pytest.approx(total / count, rel=1e-5)
    lengths = [len(prompt) + len(completion) + 1 for prompt, completion in pairs]
    assert blocks.tokens == sum(lengths) and blocks.train.trimmed().ids.shape[1] <= max(lengths)


@pytest.fixture
def rows_file(tmp_path):
    words = ["the frozen weight", "a low rank product", "one adapter", "and", "trains the adapter to one product"]
    rows = [{"prompt": words[i % 5], "completion": " " + words[(2 * i + 1) % 5]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def test_gradients_of_parts_are_those_of_the_whole_batch(finetune, rows_file, tmp_path):
    """Also where the parts have different numbers of learned tokens."""
    options = ["--text", rows_file, "--block-size", 60, "--compare", "peft"]
    for name, sizes in (("whole", ("--batch-size", 4)), ("parts", ("--batch-size", 1, "--grad-accum", 4))):
        result = finetune(*options, *sizes, "--output", tmp_path / name)
        assert result.code == 0, result.err
    runs = [
        json.loads((tmp_path / name / "report.json").read_text())["runs"]["fastlora"] for name in ("whole", "parts")
    ]
    assert max(abs(a - b) for a, b in zip(*(run["losses"] for run in runs), strict=True)) <= LOSS_TOLERANCE
    assert runs[0]["tokens"] == runs[1]["tokens"]
    assert runs[1]["dispatch_counts"]["reference"] == 4 * runs[0]["dispatch_counts"]["reference"]
    saved = [run["tensor_bytes"]["saved for backward"] for run in runs]
    assert saved[1] < 0.5 * saved[0]


def test_chats_train_end_to_end(finetune, tiny_model, tokenizer, tmp_path):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
    (tmp_path / "chats.json").write_text(json.dumps([row] * 6))
    options = ["--model", tmp_path / "model", "--text", tmp_path / "chats.json", "--block-size", 100, "--prompt", ""]
    result = finetune(*options, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["merge"]["prompt"] == "<user>hi<eos>\n<assistant>"  # a held-out row up to its first answer
    assert report["runs"]["fastlora"]["held_out_loss_after"] < report["runs"]["fastlora"]["held_out_loss_before"]
