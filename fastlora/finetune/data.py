"""Text to token sequences: reading, splitting into training and held-out blocks, the batch of each step."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fastlora.errors import CommandError


def read_text(paths: tuple[str, ...]) -> str:
    """The files' text joined by blank lines, or the text of CPython's `pydoc_data.topics` where no file is named.

    Raises:
        CommandError: a file is missing, unreadable, not UTF-8, or empty.
    """
    return "\n\n".join(_read_file(Path(path)) for path in paths) if paths else _python_topics()


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CommandError(f"cannot read text file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"text file {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text.strip():
        raise CommandError(f"text file {path} is empty")
    return text


def _python_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise CommandError("this Python comes without pydoc_data, the default text; name a file with --text") from error
    return "\n\n".join(topics[name] for name in sorted(topics))


@dataclass(frozen=True)
class TokenBlocks:
    """Sequences of token ids: train [n, block_size], held_out [h, block_size], int64."""

    train: Tensor
    held_out: Tensor

    @property
    def tokens(self) -> int:
        return self.train.numel() + self.held_out.numel()

    def fingerprint(self) -> str:
        """A hash of all ids, which tells a resumed run that it sees the text it began with."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(f"{tuple(part.shape)}".encode())
            digest.update(part.numpy().tobytes())
        return digest.hexdigest()


def make_blocks(token_ids: list[int], block_size: int, held_out: int, seed: int) -> TokenBlocks:
    """Cuts ids into whole blocks and draws the held-out ones at random, at most half of all.

    Raises:
        CommandError: there are not two whole blocks.
    """
    count = len(token_ids) // block_size
    if count < 2:
        raise CommandError(
            f"the text has {len(token_ids)} tokens, but training and evaluation need a block of {block_size} each: "
            "use a longer text or a smaller --block-size"
        )
    blocks = torch.tensor(token_ids[: count * block_size], dtype=torch.int64).view(count, block_size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held_out = min(held_out, count // 2)
    return TokenBlocks(train=blocks[order[held_out:]], held_out=blocks[order[:held_out]])


def batch_at(blocks: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """The batch [batch_size, block_size] of a step: every epoch is a new permutation, and the step alone decides.

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
