"""The dropout mask: known answers of the generator, layout of its bits, statistics."""

import math

import pytest
import torch

from fastlora import philox


@pytest.mark.parametrize(
    "rounds, expected",
    [
        (7, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        (10, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ],
)
def test_known_answers(rounds, expected):
    """Counter and key zero, from the test vectors of the generator's authors (Random123, kat_vectors)."""
    words = philox.random_words(0, torch.zeros(1, dtype=torch.int64), rounds)
    assert words[0].tolist() == expected


def test_layout():
    """Element k of row m takes 16 bits of word k % 8 // 2 of call m * ceil(K / 8) + k // 8, low half first."""
    m, k, p, seed = 5, 21, 0.5, 2**40 + 3
    mask = philox.keep_mask(seed, p, m, k)
    for row in range(m):
        for column in range(k):
            call = torch.tensor([row * 3 + column // 8])
            word = int(philox.random_words(seed, call)[0, column % 8 // 2])
            bits = word >> 16 if column % 2 else word & 0xFFFF
            assert bool(mask[row, column]) == (bits >= 32768)


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 0.9, 1.0])
def test_share_of_dropped_elements(p):
    mask = philox.keep_mask(11, p, 512, 512)
    deviation = 5 * math.sqrt(p * (1 - p) / mask.numel())
    assert abs((~mask).double().mean().item() - p) <= deviation + 1 / 65536


@pytest.mark.parametrize(
    ("p", "dropped"), [(0.0, 0), (1e-9, 1), (0.1, 6554), (0.5, 32768), (1 - 1e-9, 65535), (1.0, 65536)]
)
def test_a_dropout_between_none_and_all_is_neither(p, dropped):
    """Kernels compare with the highest bits that are dropped, of which there are none at a threshold of 0."""
    assert philox.threshold(p) == dropped
    kept = 65536 - dropped
    assert philox.inverse_keep(p) == (65536 / kept if kept else 0.0)


def test_a_seed_that_is_a_tensor_is_not_read_on_the_host():
    """As a captured graph requires of one on the device."""
    counter, seed = torch.arange(40), 2**62 + 2**33 + 12345
    words = philox.random_words(torch.tensor(seed), counter)
    assert torch.equal(words, philox.random_words(seed, counter))
    drawn = torch.empty((), dtype=torch.int64, device="meta")
    assert philox.keep_mask(drawn, 0.3, 5, 21, device="meta").shape == (5, 21)


def test_rows_and_seeds_differ():
    mask = philox.keep_mask(1, 0.5, 64, 256)
    assert len({tuple(row.tolist()) for row in mask}) == 64
    agreement = (mask == philox.keep_mask(2, 0.5, 64, 256)).double().mean()
    assert 0.45 < agreement < 0.55


def test_counters_beyond_32_bits():
    words = philox.random_words(5, torch.tensor([1, 2**32 + 1]))
    assert not torch.equal(words[0], words[1])


def test_seed_follows_the_generator():
    torch.manual_seed(3)
    first = [philox.draw_seed(torch.device("cpu")).item() for _ in range(2)]
    torch.manual_seed(3)
    assert first == [philox.draw_seed(torch.device("cpu")).item() for _ in range(2)]
    assert first[0] != first[1]


@pytest.mark.parametrize("p", (0.0, 1e-6, 1e-5, 0.1, 0.2, 0.5, 0.9, 0.999, 0.9999, 0.99999, 0.9999999))
def test_the_mean_of_a_dropped_out_element_is_the_element(p):
    """Exactly, over the 65536 values of its random bits, though p is rounded to one of them."""
    kept = 65536 - philox.threshold(p)
    assert kept * philox.inverse_keep(p) == pytest.approx(65536, rel=1e-15)
    assert abs(kept / 65536 - (1 - p)) < 1 / 65536


def test_scale_of_kept_elements():
    assert philox.inverse_keep(0.0) == 1.0
    assert philox.inverse_keep(0.25) == 4 / 3
    assert philox.inverse_keep(0.2) == pytest.approx(1.25, rel=1e-5)
    assert philox.inverse_keep(1.0) == 0.0 and philox.threshold(1.0) == 65536
