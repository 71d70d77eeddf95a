"""Flags and counters that the kernels of one stream share: zeroed once when made, left zeroed by every launch."""

import torch
from torch import Tensor

_MINIMUM_WORDS = 4096
_POOL_WORDS = 1 << 20
_GRAIN_WORDS = 32  # 128 bytes: a kernel compiled for aligned pointers must serve every slice of a pool

_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_pools: dict[torch.device, Tensor] = {}
_held_by_graphs: list[Tensor] = []


def borrow_workspace(n_words: int, device: torch.device) -> Tensor:
    """An int32 tensor of at least ``n_words`` zeros for one launch on the current stream of ``device``.

    Launches on one stream follow each other, so they share a buffer. A launch that is being captured into a CUDA graph
    gets one of its own, which lives as long as the process: a replay may run concurrently with anything.
    """
    if device.type != "cuda":  # Triton's interpreter
        return _grown(_by_stream.get((device, 0)), (device, 0), n_words)
    if torch.cuda.is_current_stream_capturing():
        return _for_capture(n_words, device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if device not in _pools:
        _pools[device] = torch.zeros(_POOL_WORDS, dtype=torch.int32, device=device)
    return _grown(_by_stream.get(key), key, n_words)


def _grown(workspace: Tensor | None, key: tuple[torch.device, int], n_words: int) -> Tensor:
    if workspace is None or workspace.numel() < n_words:
        words = max(_MINIMUM_WORDS, 2 * n_words)
        workspace = _by_stream[key] = torch.zeros(words, dtype=torch.int32, device=key[0])
    return workspace


def _for_capture(n_words: int, device: torch.device) -> Tensor:
    """Words from a pool that was zeroed before the capture began, so that the graph holds no memset."""
    n_words = -(-n_words // _GRAIN_WORDS) * _GRAIN_WORDS
    pool = _pools.get(device)
    if pool is not None and pool.numel() >= n_words:
        workspace, _pools[device] = pool.split([n_words, pool.numel() - n_words])
    else:
        # Captured together with its memset, which then runs at each replay: correct, if not free.
        workspace = torch.zeros(n_words, dtype=torch.int32, device=device)
    _held_by_graphs.append(workspace)
    return workspace
