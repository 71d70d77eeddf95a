"""A stand-in for what decides where torch allocates on a GPU: streams, CUDA graphs' pools, captures. Tensors are the
CPU's.

Each thread has a current stream, and where a CUDA graph is warmed up or captured, allocations of that thread go to the
graphs' pool. Words that an allocation on a stream gives back are given out again by the next one on the *handle*, as
the caching allocator does it; unless other streams are recorded, whose work it waits for.
"""

import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

DEVICE = torch.device("cuda", 0)
DEFAULT, POOL_STREAM, OTHER_POOL_STREAM, PER_THREAD, EXTERNAL = 0, 65, 67, 2, 0x55D0_7A10


@dataclass(frozen=True)
class Stream:
    """As torch sees it: by id and device."""

    stream_id: int
    log: list = field(compare=False, default_factory=list)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(("wait", self.stream_id, other.stream_id))

    def synchronize(self) -> None:
        self.log.append(("synchronize", self.stream_id))


@dataclass
class Allocation:
    """One tensor that was made: where, on which stream, and whether a memset came with it."""

    tensor: weakref.ref
    n_words: int
    pool: str
    stream_id: int
    zeroed: bool

    @property
    def alive(self) -> bool:
        return self.tensor() is not None


class _Words(torch.Tensor):
    """Remembers its use on a stream."""

    log: list

    def zero_(self):
        self.log.append(("zero", threading.get_ident()))
        return super().zero_()

    def record_stream(self, stream):
        self.log.append(("record", stream.stream_id))


class Machine:
    """Stands in for the module ``torch`` in fastlora.backends.workspace."""

    int32, Tensor = torch.int32, torch.Tensor

    def __init__(self):
        self.log: list = []
        self.allocations: list[Allocation] = []
        self._state = threading.local()
        self.current_device = 0
        self.cuda = SimpleNamespace(
            Stream=lambda device: Stream(OTHER_POOL_STREAM, self.log),
            current_device=lambda: self.current_device,
            current_stream=lambda device: Stream(self._of("stream_id", DEFAULT), self.log),
            is_current_stream_capturing=lambda: self._of("capturing", False) and self.current_device == 0,
            stream=lambda stream: self.on(stream.stream_id),
            device=self._device,
        )

    def _of(self, name: str, default):
        return getattr(self._state, name, default)

    @contextmanager
    def _set(self, **values):
        before = {name: getattr(self._state, name, None) for name in values}
        vars(self._state).update(values)
        try:
            yield
        finally:
            vars(self._state).update({n: v for n, v in before.items() if v is not None})
            for name in (n for n, v in before.items() if v is None):
                delattr(self._state, name)

    @contextmanager
    def _device(self, device: torch.device):
        before, self.current_device = self.current_device, device.index
        try:
            yield
        finally:
            self.current_device = before

    def on(self, stream_id: int):
        """This thread's current stream."""
        return self._set(stream_id=stream_id)

    def warming_up(self):
        """As CUDAWarmupNode.run of torch._inductor.cudagraph_trees: a stream of its own, allocations to the pool, and
        no capture."""
        return self._set(stream_id=POOL_STREAM, pool="graphs")

    def capturing(self):
        """Within ``torch.cuda.graph``."""
        return self._set(stream_id=POOL_STREAM, pool="graphs", capturing=True)

    def zeros(self, n_words: int, dtype, device) -> torch.Tensor:
        assert not (self._of("capturing", False) and self._of("pool", "") != "graphs")
        return self._make(n_words, device, zeroed=True)

    def empty(self, n_words: int, dtype, device) -> torch.Tensor:
        return self._make(n_words, device, zeroed=False).fill_(-1)

    def _make(self, n_words: int, device: torch.device, zeroed: bool) -> torch.Tensor:
        assert device == DEVICE
        tensor = torch.zeros(n_words, dtype=torch.int32).as_subclass(_Words)
        tensor.log = self.log
        self.allocations.append(
            Allocation(
                weakref.ref(tensor.untyped_storage()),
                n_words,
                self._of("pool", "ordinary"),
                self._of("stream_id", DEFAULT),
                zeroed,
            )  # fmt: skip
        )
        return tensor

    def alive_in_the_graphs_pool(self) -> list[Allocation]:
        """What torch raises about after a warm-up and after a capture."""
        return [each for each in self.allocations if each.pool == "graphs" and each.alive]
