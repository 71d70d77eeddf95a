"""Rows of .jsonl and .json files: what is in them, and a refusal with file and line for anything else."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastlora.errors import CommandError

SUFFIXES = (".jsonl", ".json")
SHAPES = "a row is {messages}, {prompt, completion} or {text}"


@dataclass(frozen=True)
class Pair:
    """A prompt and what is learned to follow it. `where`: file and line, for errors about it."""

    where: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages with `role` and `content`, of which the assistant's are learned."""

    where: str
    messages: tuple[dict[str, str], ...]


def read_rows(path: Path, text: str) -> list[str | Pair | Chat]:
    """The rows of a file: a JSON array, or one JSON value a line. A row {text} is the string alone.

    Raises:
        CommandError: a row is none of the three kinds, or no JSON; the message has file and line.
    """
    try:
        values = _array(path, text) if text.lstrip().startswith("[") else _lines(path, text)
    except RecursionError as error:
        raise CommandError(f"{path}: not rows: brackets nested too deeply") from error
    return [_row(value, f"{path} line {line}") for line, value in values]


def _lines(path: Path, text: str) -> list[tuple[int, object]]:
    """(line, value) of every line that is not blank; only a line feed ends one, as U+2028 may stand in a string."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise CommandError(f"{path} line {number}: not JSON: {error.msg} at column {error.colno}") from error
    return found


def _array(path: Path, text: str) -> list[tuple[int, object]]:
    """(line, value) of every element of the array that the file is."""
    decoder, found = json.JSONDecoder(), []
    try:
        values = decoder.decode(text)
        line, seen, position = 1, 0, text.index("[")
        for _ in values:
            position = _next_value(text, position + 1)
            line, seen = line + text.count("\n", seen, position), position
            value, position = decoder.raw_decode(text, position)
            position = _next_value(text, position)  # at the comma or the closing bracket
            found.append((line, value))
    except json.JSONDecodeError as error:
        raise CommandError(f"{path} line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    if not found:
        raise CommandError(f"{path} is an empty array")
    return found


def _next_value(text: str, position: int) -> int:
    while text[position] in " \t\r\n":
        position += 1
    return position


def _row(value: object, where: str) -> str | Pair | Chat:
    if not isinstance(value, dict):
        raise CommandError(f"{where}: {type(value).__name__}, not an object; {SHAPES}")
    keys = set(value)
    if keys == {"text"}:
        return _string(value, "text", where)
    if keys == {"prompt", "completion"}:
        return Pair(where, _string(value, "prompt", where), _string(value, "completion", where))
    if keys == {"messages"}:
        return Chat(where, _messages(value["messages"], where))
    raise CommandError(f"{where}: has {', '.join(sorted(map(repr, keys))) or 'nothing'}; {SHAPES}, and nothing besides")


def _string(value: dict, key: str, where: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise CommandError(f"{where}: {key} is {type(text).__name__}, not a string")
    if not text.strip():
        raise CommandError(f"{where}: {key} is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise CommandError(f"{where}: {key} has half of a surrogate pair, which is no character")
    return text


def _messages(messages: object, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise CommandError(f"{where}: messages is no list of objects")
    for number, message in enumerate(messages, start=1):
        if set(message) != {"role", "content"}:
            raise CommandError(f"{where}: message {number} has {sorted(message)}, not role and content alone")
        for key in ("role", "content"):
            _string(message, key, f"{where}: message {number}")
    if not any(message["role"] == "assistant" for message in messages):
        raise CommandError(f"{where}: no message has the role 'assistant', so there is nothing to learn")
    return tuple(messages)
