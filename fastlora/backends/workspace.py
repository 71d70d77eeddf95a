"""Flags and counters of the kernels: zero when a launch starts, left zero by it.

Two launches that may run at once must not have the same words. Who owns them is therefore what nothing can fake:

- A launch on one of torch's own streams: that stream, by torch's id for it. Torch makes these streams once and never
  destroys them, and launches on one follow each other, so they share a buffer, and no memset is launched.
- A launch on any other stream (``torch.cuda.ExternalStream``): the call. Such a stream is known by its handle alone,
  which is another stream's once it is destroyed, and for ``cudaStreamPerThread`` is another stream in every thread. The
  words are zeroed by a memset, and an event in the launch's own stream keeps the allocator from handing them on before
  it has ended.
- A launch that is captured into a CUDA graph: the graph's node, for as long as the process lives, since a replay may
  run at the same time as anything but itself.

Words that outlive a call come from a reserve, which is allocated by a thread of its own. What surrounds the call may
send this thread's allocations to a pool of CUDA graphs: in the warm-up of ``torch.compile(mode="reduce-overhead")``,
say, when no capture is active, and torch raises if one of them is alive after it.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

_MINIMUM_WORDS = 4096
_RESERVE_WORDS = 1 << 20  # 4 MiB: some two thousand captured launches
_GRAIN_WORDS = 32  # 128 bytes: a kernel compiled for aligned pointers must serve every slice of the reserve

_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_reserves: dict[torch.device, Tensor] = {}  # what is left of each device's
_spent: list[Tensor] = []  # reserves that others followed, and whose slices are in use
_low: set[torch.device] = set()  # whose reserve captures have used up, or nearly
_side_streams: dict[torch.device, torch.cuda.Stream] = {}
_lock = threading.RLock()


def borrow_workspace(n_words: int, device: torch.device) -> Tensor:
    """An int32 tensor of at least ``n_words`` zeros, for one launch on the current stream of ``device``.

    To be asked for right before the launch, and kept no longer than until it has been made.
    """
    if device.type != "cuda":  # Triton's interpreter
        return _shared(n_words, (device, 0))
    if device.index not in (None, torch.cuda.current_device()):
        with torch.cuda.device(device):  # whose stream may be capturing
            return borrow_workspace(n_words, device)
    if torch.cuda.is_current_stream_capturing():
        return _for_capture(n_words, device)
    if _low:
        _refill_low()
    stream = torch.cuda.current_stream(device)
    if _is_external(stream):
        return _for_call(n_words, device, stream)
    return _shared(n_words, (device, stream.stream_id))


def _is_external(stream: torch.cuda.Stream) -> bool:
    """Whether a stream is not torch's own. Ids of torch's own are odd, or 0 for the default stream; an external one's
    is its handle, an address or cudaStreamPerThread's 2 (c10/cuda/CUDAStream.cpp, "StreamId assignment")."""
    return stream.stream_id % 2 == 0 and stream.stream_id != 0


def _shared(n_words: int, key: tuple[torch.device, int]) -> Tensor:
    """The buffer of all launches on one stream. One that has become too small may still be in use by the launches
    before: it is left to them."""
    workspace = _by_stream.get(key)
    if workspace is None or workspace.numel() < n_words:
        n_words = max(_MINIMUM_WORDS, 2 * n_words)
        make = _take_or_make if key[0].type == "cuda" else _zeros
        workspace = _by_stream[key] = make(n_words, key[0])
    return workspace


def _for_call(n_words: int, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    """Words for one launch on a stream whose handle says nothing.

    Allocated for another stream, for one that the allocator would take for the same may be at work on what it gives
    out; what that other stream has been given before is waited for. ``record_stream`` makes the allocator put an event
    into ``stream`` when the caller drops the words, right after the launch, and wait for it.
    """
    with _lock:
        side = _side_streams.get(device)
        if side is None:
            side = _side_streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        words = torch.empty(n_words, dtype=torch.int32, device=device)
    stream.wait_stream(side)
    words.zero_()
    words.record_stream(stream)
    return words


def _for_capture(n_words: int, device: torch.device) -> Tensor:
    """Words that were zeroed before the capture began, so that the graph holds no memset. Nothing can be reserved
    during a capture: where too little is left, the memset becomes part of the graph and runs at each replay, and the
    words are the graph's own memory, as its other temporary tensors are."""
    with _lock:
        words = _take(n_words, device)
        if device not in _reserves or _reserves[device].numel() < _RESERVE_WORDS // 2:
            _low.add(device)
    return torch.zeros(n_words, dtype=torch.int32, device=device) if words is None else words


def _refill_low() -> None:
    """For the next capture."""
    with _lock:
        while _low:
            _make_reserve(0, _low.pop())


def _take_or_make(n_words: int, device: torch.device) -> Tensor:
    with _lock:
        words = _take(n_words, device)
        if words is None:
            _make_reserve(n_words, device)
            words = _take(n_words, device)
    assert words is not None
    return words


def _take(n_words: int, device: torch.device) -> Tensor | None:
    """A slice of the reserve that nobody else has, or None where it is too small. To be called under the lock."""
    n_words = _in_grains(n_words)
    reserve = _reserves.get(device)
    if reserve is None or reserve.numel() < n_words:
        return None
    words, _reserves[device] = reserve.split([n_words, reserve.numel() - n_words])
    return words


def _in_grains(n_words: int) -> int:
    return -(-n_words // _GRAIN_WORDS) * _GRAIN_WORDS


def _make_reserve(n_words: int, device: torch.device) -> None:
    """A reserve of at least ``n_words``, in the allocator's ordinary memory whatever this thread's allocations go to: a
    new thread has no pool, no stream but the default one, and none of torch's modes."""
    if device in _reserves:
        _spent.append(_reserves[device])
    with ThreadPoolExecutor(1) as alone:
        _reserves[device] = alone.submit(_zeros, max(_RESERVE_WORDS, _in_grains(n_words)), device).result()


def _zeros(n_words: int, device: torch.device) -> Tensor:
    """Zeros that are there for every stream when this returns."""
    words = torch.zeros(n_words, dtype=torch.int32, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return words
