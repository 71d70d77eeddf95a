"""The parts of fastlora finetune that compute something by themselves: batches, schedule, memory, comparison, files."""

import errno
import os

import pytest
import torch

from fastlora import outputs
from fastlora.errors import CommandError
from fastlora.finetune.compare import LOSS_TOLERANCE, compare_losses
from fastlora.finetune.data import Sequences, batch_at, make_blocks, read_text
from fastlora.finetune.full import measure_full_finetuning
from fastlora.finetune.loop import causal_loss, learning_rate_at
from fastlora.finetune.memory import SavedTensors, distinct_bytes, peak_bytes, peak_method, reset_peak
from fastlora.finetune.settings import Settings

CPU = torch.device("cpu")


def learned(rows):
    """Sequences whose every token the loss counts."""
    return Sequences(torch.tensor(rows), torch.tensor(rows))


def test_blocks_are_the_text_without_its_tail_each_on_one_side():
    blocks = make_blocks(list(range(105)), block_size=10, held_out=3, seed=0)
    assert blocks.train.ids.shape == (7, 10)
    assert blocks.held_out.ids.shape == (3, 10)
    rows = torch.cat([blocks.train.ids, blocks.held_out.ids])
    assert torch.equal(rows[rows[:, 0].argsort()].flatten(), torch.arange(100))


def test_held_out_blocks_are_at_most_half():
    blocks = make_blocks(list(range(50)), block_size=10, held_out=100, seed=0)
    assert (len(blocks.train), len(blocks.held_out)) == (3, 2)


def test_seed_and_text_change_the_fingerprint():
    ids = list(range(100))
    prints = {make_blocks(ids, 10, 2, seed).fingerprint() for seed in (0, 0, 1)}
    prints.add(make_blocks([*ids[:-1], 0], 10, 2, 0).fingerprint())
    assert len(prints) == 3


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_every_epoch_covers_every_block_once_in_another_order(batch_size):
    blocks = torch.arange(6).view(6, 1)
    steps = 2 * 6 // batch_size
    stream = torch.cat([batch_at(blocks, step, batch_size, seed=3) for step in range(steps)]).flatten()
    first, second = stream[:6], stream[6:12]
    assert torch.equal(first.sort().values, torch.arange(6))
    assert torch.equal(second.sort().values, torch.arange(6))
    assert not torch.equal(first, second)


def test_default_text_is_that_of_pydoc_topics():
    from pydoc_data.topics import topics

    text = read_text(())
    assert all(topic in text for topic in topics.values())


def test_learning_rate_warms_up_peaks_and_decays():
    rates = [learning_rate_at(step, 40, 1.0) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert max(rates) == 1.0
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert 0.1 <= rates[-1] < 0.12
    assert learning_rate_at(0, 1, 1.0) == 1.0


def test_causal_loss_predicts_the_next_token():
    vocabulary = 7
    tokens = learned([[1, 2, 3, 4]])

    class Successor(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            from types import SimpleNamespace

            logits = 50.0 * torch.nn.functional.one_hot(input_ids + 1, vocabulary)
            return SimpleNamespace(logits=logits)

    assert causal_loss(Successor(), tokens).item() < 1e-6


def test_saved_tensors_counts_each_storage_once_and_no_parameter():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    x = torch.ones(4, 8, requires_grad=True)
    with SavedTensors([weight]) as saved:
        # The products keep x, twice, and the weight; exp keeps its own output.
        y = x @ weight + x @ weight.t()
        y = y.exp()
    assert saved.bytes == x.nbytes + y.nbytes


def test_distinct_bytes_counts_views_once():
    x = torch.zeros(10)
    assert distinct_bytes([x, x[2:], x.view(2, 5), torch.zeros(3)]) == 52


@pytest.mark.skipif(peak_method(CPU) is None, reason="this system cannot reset a process's peak memory")
def test_peak_memory_sees_what_was_freed_and_forgets_on_reset():
    reset_peak(CPU)
    start = peak_bytes(CPU)
    block = torch.ones(64 * 2**20 // 4)
    del block
    assert peak_bytes(CPU) - start >= 60 * 2**20
    reset_peak(CPU)
    assert peak_bytes(CPU) - start < 30 * 2**20


class Model(torch.nn.Module):
    """Embedding and a tied output: enough for a causal loss."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.frozen = torch.nn.Linear(6, 6).requires_grad_(False)

    def forward(self, input_ids, use_cache):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.frozen(self.embedding(input_ids)) @ self.embedding.weight.t())


def test_full_finetuning_counts_all_parameters_and_freezes_again():
    model = Model()
    full = measure_full_finetuning(model, learned([[1, 2, 3]]), Settings(measure_full=True))
    parameters = 4 * (11 * 6 + 6 * 6 + 6)
    assert full.tensor_bytes["weights"] == full.tensor_bytes["gradients"] == parameters
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, False]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_full_finetuning_is_only_estimated_where_memory_is_short(monkeypatch):
    from fastlora.finetune import full as module

    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    model = Model()
    before = [parameter.clone() for parameter in model.parameters()]
    full = measure_full_finetuning(model, learned([[1, 2, 3]]), Settings(measure_full=True))
    assert not full.measured
    assert "saved for backward" not in full.tensor_bytes
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("difference", "fails"), [(0.9 * LOSS_TOLERANCE, False), (1.1 * LOSS_TOLERANCE, True)])
def test_agreement_is_judged_at_every_step(difference, fails):
    agreement = compare_losses([3.0, 2.0, 1.0], [3.0, 2.0 + difference, 1.0], Settings(), True)
    assert agreement.failed is fails
    assert agreement.worst_step == 2
    assert agreement.max_difference == pytest.approx(difference)


def test_nan_never_agrees():
    assert compare_losses([1.0, float("nan")], [1.0, 1.0], Settings(), True).failed


@pytest.mark.parametrize("settings", [Settings(dtype="bfloat16"), Settings(dropout=0.1)])
def test_agreement_is_not_judged_where_it_cannot_be_expected(settings):
    agreement = compare_losses([1.0], [2.0], settings, True)
    assert not agreement.failed
    assert "not expected" in agreement.describe()


def test_settings_survive_json():
    settings = Settings(text=("a", "b"), rank=3, alpha=0.1, compare="peft")
    assert Settings.from_json(settings.to_json()) == settings
    with pytest.raises(ValueError, match="not those of this version"):
        Settings.from_json('{"rank": 3}')


def test_replace_file_keeps_the_old_content_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CommandError, match=f"cannot write {path}: No space left on device"):
        outputs.replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_in_a_staged_directory_leaves_what_was_there(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "weights").write_text("old")
    (tmp_path / "other").write_text("")

    def write(text: str) -> None:
        with outputs.staged(tmp_path) as stage:
            (stage / "adapter").mkdir()
            (stage / "adapter" / "weights").write_text(text)
            if text == "broken":
                raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(CommandError, match=f"cannot write {tmp_path}: Input/output error"):
        write("broken")
    assert (tmp_path / "adapter" / "weights").read_text() == "old"
    write("new")
    assert (tmp_path / "adapter" / "weights").read_text() == "new"
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["adapter", "other"]
