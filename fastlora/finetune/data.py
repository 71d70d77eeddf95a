"""Files to documents, and token ids to sequences: training and held-out ones, the batch of each step."""

import codecs
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastlora.errors import CommandError
from fastlora.finetune.rows import SUFFIXES, Chat, Pair, read_rows

IGNORED = -100  # the label of a token that is not learned; cross_entropy's own
TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".xlsx", ".yaml", ".yml")
ELSEWHERE = "for other data, and datasets by name, use Trainer, TRL or axolotl with fastlora.integrations.peft.patch"
LabelledRow = tuple[list[int], list[int]]  # token ids, and as many labels


def read_documents(paths: tuple[str, ...]) -> list[str | Pair | Chat]:
    """The rows of .jsonl and .json files, any other file as one text; CPython's help topics where no file is named.

    Raises:
        CommandError: a file is missing, unreadable, not UTF-8, empty, or a table; a row is none that is known.
    """
    if not paths:
        return _python_topics()
    documents: list[str | Pair | Chat] = []
    for path in map(Path, paths):
        text = _read_file(path)
        documents += read_rows(path, text) if path.suffix.lower() in SUFFIXES else [text]
    return documents


def read_text(paths: tuple[str, ...]) -> str:
    """The files' text joined by blank lines, or the text of CPython's `pydoc_data.topics` where no file is named.

    Raises:
        CommandError: as for `read_documents`; or a file holds rows.
    """
    for path in paths:
        if Path(path).suffix.lower() in SUFFIXES:
            raise CommandError(f"{path} holds rows, which fastlora finetune takes; this command takes plain text")
    return "\n\n".join(_read_file(Path(path)) for path in paths) if paths else "\n\n".join(_python_topics())


def _read_file(path: Path) -> str:
    if path.suffix.lower() in TABLES:
        raise CommandError(f"{path}: text files and rows in .jsonl or .json are read; {ELSEWHERE}")
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CommandError(f"cannot read text file {path}: {error.strerror}; {ELSEWHERE}") from error
    except OSError as error:
        raise CommandError(f"cannot read text file {path}: {error.strerror}") from error
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode()
    except UnicodeDecodeError as error:
        place = f"{error.reason} {data[mark + error.start]:#04x} at byte {mark + error.start}"
        raise CommandError(f"text file {path} is not UTF-8: {place}") from error
    if not text.strip():
        raise CommandError(f"text file {path} is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _python_topics() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError("this Python comes without pydoc_data, the default text; name a file with --text") from error
    return [topics[name] for name in sorted(topics)]


@dataclass(frozen=True)
class Sequences:
    """Token ids [n, length], int64, and labels of the same shape: the id where the loss counts it, IGNORED elsewhere.

    A short sequence ends in padding, whose labels are IGNORED. No attention mask is needed: a causal model does not see
    what follows a token.
    """

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> "Sequences":
        return Sequences(self.ids[rows], self.labels[rows])

    def split(self, size: int) -> list["Sequences"]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> "Sequences":
        return Sequences(self.ids.to(device), self.labels.to(device))

    @property
    def targets(self) -> int:
        """Tokens that the loss counts; the first of a sequence follows nothing and is not predicted."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def lengths(self) -> Tensor:
        """Tokens up to the last that counts, int64 [n]: what follows changes no loss."""
        positions = torch.arange(1, self.labels.shape[1] + 1)
        return ((self.labels != IGNORED) * positions).amax(dim=1)

    @property
    def tokens(self) -> int:
        """All of them, without padding."""
        return int(self.lengths().sum())

    def trimmed(self) -> "Sequences":
        """Without the columns that change no loss."""
        longest = int(self.lengths().max())
        return Sequences(self.ids[:, :longest], self.labels[:, :longest])


@dataclass(frozen=True)
class TokenBlocks:
    """Sequences of one length, on either side of the split."""

    train: Sequences
    held_out: Sequences

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.held_out.tokens

    def fingerprint(self) -> str:
        """A hash of all ids and labels, which tells a resumed run that it sees the text it began with."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            for tensor in (part.ids,) if torch.equal(part.ids, part.labels) else (part.ids, part.labels):
                digest.update(f"{tuple(tensor.shape)}".encode())
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def make_blocks(
    token_ids: list[int], block_size: int, held_out: int, seed: int, rows: Sequence[LabelledRow] = ()
) -> TokenBlocks:
    """Cuts ids into whole blocks, adds a sequence a row, and draws the held-out ones at random, at most half of all.

    Args:
        rows: of at most ``block_size`` tokens each.

    Raises:
        CommandError: there are not two sequences.
    """
    cut = torch.tensor(token_ids[: len(token_ids) // block_size * block_size], dtype=torch.int64).view(-1, block_size)
    ids = torch.zeros(len(rows), block_size, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for index, (row_ids, row_labels) in enumerate(rows):
        ids[index, : len(row_ids)] = torch.tensor(row_ids)
        labels[index, : len(row_ids)] = torch.tensor(row_labels)
    sequences = Sequences(torch.cat([cut, ids]), torch.cat([cut, labels]))
    if len(sequences) < 2:
        has = f"{len(token_ids)} tokens" + (f" and {len(rows)} row" if rows else "")
        raise CommandError(
            f"the text has {has}, but training and evaluation need a block of {block_size} or a row each: "
            "use a longer text or a smaller --block-size"
        )
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    held_out = min(held_out, len(sequences) // 2)
    return TokenBlocks(train=sequences[order[held_out:]], held_out=sequences[order[:held_out]])


def batch_at(blocks: Sequences, step: int, batch_size: int, seed: int) -> Sequences:
    """The ``batch_size`` sequences of a step: every epoch is a new permutation, and the step alone decides.

    A resumed run needs no position in a stream, and two runs from one seed see the same batches.
    """
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(position, len(blocks))
        rows.append(_epoch_order(len(blocks), epoch, seed)[index])
    return blocks[torch.stack(rows)]


@lru_cache(maxsize=2)
def _epoch_order(count: int, epoch: int, seed: int) -> Tensor:
    # Seeds beyond that of the split, which would otherwise give the same permutation.
    generator = torch.Generator().manual_seed((seed + 1 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)
