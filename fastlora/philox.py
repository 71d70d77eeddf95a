"""The dropout mask of the side branch, regenerated from a counter wherever it is needed and stored nowhere.

Philox-4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) keyed by the seed. One call gives
128 bits, which serve eight consecutive elements of a row with 16 bits each: at 32 bits an element the generator would
cost as much as the shrink product itself. Every backend draws the very same bits.
"""

import torch
from torch import Tensor

ROUNDS = 7  # the fewest that pass BigCrush (Salmon et al., table 2)
ELEMENTS_PER_CALL = 8

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_STEPS = 1 << 16  # values of an element's random bits


def draw_seed(device: torch.device) -> Tensor:
    """A seed for one forward pass, from torch's generator, so that ``torch.manual_seed`` and the recomputation of a
    checkpointed block give the same mask.

    Returns:
        An int64 tensor of one element. It lives on the CPU, where reading it costs no synchronisation; in a captured
        CUDA graph or a compiled one (which may be captured later) it lives on ``device``, so that replays draw anew.
    """
    in_graph = device.type == "cuda" and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing())
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device if in_graph else "cpu")


def threshold(dropout_p: float) -> int:
    """Elements whose 16 random bits are below this are dropped: p in steps of 1 / 65536, at least one where p > 0. Only
    p = 1 drops them all, for nothing could make up for it in the mean."""
    if dropout_p <= 0.0 or dropout_p >= 1.0:
        return 0 if dropout_p <= 0.0 else _STEPS
    return min(max(round(dropout_p * _STEPS), 1), _STEPS - 1)


def inverse_keep(dropout_p: float) -> float:
    """What kept elements are scaled by: 1 / (share of the elements that ``threshold`` keeps), and 0 where it keeps
    none. So the mean of a dropped-out element is the element itself, whatever p was rounded to."""
    kept = _STEPS - threshold(dropout_p)
    return _STEPS / kept if kept else 0.0


def random_words(seed: int | Tensor, counter: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Philox-4x32 of 64-bit counters [n] (int64) under a 64-bit key: [n, 4] words of 32 bits, in int64. The key may be
    an int64 tensor of one element on the counters' device: nothing reads its value on the host then."""
    c0, c1 = counter & _LOW, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(rounds):
        # Products of 32-bit words in 64-bit lanes, in place: what this costs is memory traffic.
        product0, product1 = c0.mul_(_MULTIPLIER_0), c2.mul_(_MULTIPLIER_1)
        high0, high1 = product0 >> 32, product1 >> 32
        c0 = high1.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_LOW)
        c2 = high0.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_LOW)
        c1, c3 = product1.bitwise_and_(_LOW), product0.bitwise_and_(_LOW)
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=1)


def keep_mask(seed: Tensor | int, dropout_p: float, m: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask of an ``[m, k]`` input: True where the element is kept.

    Args:
        seed: the 64-bit seed, as an int or a one-element int64 tensor.
        dropout_p: probability of dropping an element, in steps of 1 / 65536.

    Returns:
        bool tensor [m, k] on ``device``.
    """
    first_kept = threshold(dropout_p)
    if first_kept == _STEPS:
        return torch.zeros(m, k, dtype=torch.bool, device=device)
    calls_per_row = -(-k // ELEMENTS_PER_CALL)
    counter = torch.arange(m * calls_per_row, dtype=torch.int64, device=device)
    # Both halves of each word, low half first, as signed numbers, which a flipped top bit puts in the unsigned order.
    # A captured graph draws its seed, and reads it, on the device.
    on_device = isinstance(seed, Tensor) and seed.device.type != "cpu"
    key = seed.reshape(()) if on_device else int(seed)  # type: ignore[union-attr]
    halves = random_words(key, counter).to(torch.int32).view(torch.int16)
    keep = halves.bitwise_xor_(-(1 << 15)) >= first_kept - (1 << 15)
    return keep.view(m, calls_per_row * ELEMENTS_PER_CALL)[:, :k]


def drop_mask(seed: Tensor | int, dropout_p: float, m: int, k: int, device: torch.device | str = "cpu") -> Tensor:
    """The inverse of ``keep_mask``: True where the branch does not see an element."""
    return keep_mask(seed, dropout_p, m, k, device).logical_not_()
