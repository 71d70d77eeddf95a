"""A tiny language model on disk, and the command line called in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

WORDS = ["the", "adapter", "adds", "a", "low", "rank", "product", "to", "one", "frozen", "weight", "and", "trains"]


@dataclass(frozen=True)
class Result:
    """What a call of the command left: its exit code and its two streams."""

    code: int
    out: str
    err: str

    @property
    def error_line(self) -> str:
        """The one line on stderr; fails where there are more, or none."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        return lines[0]

    @property
    def text(self) -> str:
        """What is on stdout as one line, however it is wrapped."""
        return " ".join(self.out.split())


def save_tokenizer(directory: Path) -> int:
    """Writes a byte-level tokenizer without merges; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, **{character: index + 1 for index, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return len(vocabulary)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a directory with a two-layer Llama of some width and its tokenizer, as `from_pretrained` reads them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(hidden_size: int, intermediate_size: int) -> Path:
        directory = tmp_path_factory.mktemp("model")
        config = LlamaConfig(
            vocab_size=save_tokenizer(directory),
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            eos_token_id=0,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    return make_model(32, 48)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 2,000 bytes of words in an order without period."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    picks = torch.randint(len(WORDS), (400,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(WORDS[i] for i in picks.tolist()))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Operations this small run faster on one thread, the more so beside other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fastlora_cli(capfd: pytest.CaptureFixture) -> Callable[..., Result]:
    """Calls `fastlora` with the given arguments."""
    from fastlora.cli.main import main

    def call(*args: object) -> Result:
        capfd.readouterr()  # what a fixture printed (a bar of transformers') is not the command's
        with pytest.raises(SystemExit) as exit_info:
            main([str(arg) for arg in args])
        streams = capfd.readouterr()
        return Result(exit_info.value.code, streams.out, streams.err)

    return call


@pytest.fixture
def finetune(fastlora_cli: Callable[..., Result], tiny_model: Path, text_file: Path) -> Callable[..., Result]:
    """Calls `fastlora finetune` on the tiny model and text; the arguments come after these and so override them."""
    small = ["--model", tiny_model, "--steps", 6, "--batch-size", 2, "--block-size", 24, "--held-out", 4]
    small += ["--learning-rate", 0.01, "--device", "cpu", "--prompt", "the frozen"]

    def call(*args: object) -> Result:
        text = [] if "--text" in args else ["--text", text_file]
        return fastlora_cli("finetune", *small, *text, *args)

    return call
