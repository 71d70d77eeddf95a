"""Who owns a launch's flags: streams, calls and graphs, under everything that may surround a call.

On a stand-in for torch's streams and pools; tests/integrations/test_cuda_graphs.py does the same on a GPU."""

import contextlib
import itertools
import threading

import pytest
import torch

from fastlora.backends import workspace
from tests.support.graph_pool import (
    DEFAULT,
    DEVICE,
    EXTERNAL,
    OTHER_POOL_STREAM,
    PER_THREAD,
    POOL_STREAM,
    Machine,
)


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(workspace, "torch", made)
    for name, empty in (
        ("_by_stream", {}), ("_reserves", {}), ("_spent", []), ("_low", set()), ("_side_streams", {}),
    ):  # fmt: skip
        monkeypatch.setattr(workspace, name, empty)
    return made


def borrow(n_words=100):
    """As a launch does: the words are zero when it starts. Returns where they lie."""
    words = workspace.borrow_workspace(n_words, DEVICE)
    assert words.dtype == torch.int32 and len(words) >= n_words and not words.any()
    return range(words.data_ptr(), words.data_ptr() + 4 * n_words)


def meet(*places) -> bool:
    return any(a.start < b.stop and b.start < a.stop for a, b in itertools.combinations(places, 2))


def memsets(machine) -> int:
    return sum(each.zeroed and each.n_words < workspace._RESERVE_WORDS for each in machine.allocations)


def test_the_launches_of_a_stream_share_words_and_no_memset(machine):
    first = borrow()
    assert all(borrow() == first for _ in range(3))
    with machine.on(POOL_STREAM):
        other = borrow()
    assert not meet(first, other) and borrow() == first
    assert len(machine.allocations) == 1 and memsets(machine) == 0


def test_what_has_become_too_small_is_left_to_the_launches_before(machine):
    small = borrow()
    large = borrow(workspace._MINIMUM_WORDS + 1)
    assert not meet(small, large) and borrow().start == large.start
    huge = borrow(3 * workspace._RESERVE_WORDS)
    assert not meet(small, large, huge)


def test_a_warm_up_leaves_nothing_in_the_pool_of_the_graphs(machine):
    """The first launch of a process may be within it, and an eager step before is on another stream."""
    for eager_before in (False, True):
        if eager_before:
            borrow()
        with machine.warming_up():
            borrow()
            borrow(10 * workspace._MINIMUM_WORDS)
        assert machine.alive_in_the_graphs_pool() == []


def test_the_reserve_is_there_for_all_streams_before_it_is_used(machine):
    with machine.warming_up():
        borrow()
    assert machine.log == [("synchronize", DEFAULT)]


def test_a_captured_launch_has_words_that_nothing_else_ever_has(machine):
    """A replay may run while anything else does: another graph, or eager launches on the stream of the capture."""
    places = [borrow()]
    with machine.warming_up():
        places.append(borrow())
    for _ in range(2):
        with machine.capturing():
            places += [borrow(), borrow(5)]
        assert machine.alive_in_the_graphs_pool() == []
    places.append(borrow(9000))
    assert not meet(*places)
    assert memsets(machine) == 0, "a memset in a graph is another launch"


def test_slices_are_aligned(machine):
    """Triton would compile anew, during the capture, for a pointer that is less aligned than the one before."""
    start = borrow().start
    with machine.capturing():
        places = [borrow(n_words) for n_words in (5, 33, 64, 1)]
    assert all((place.start - start) % 128 == 0 for place in places)


def test_a_capture_without_a_launch_before_it_zeroes_its_own_words(machine):
    for n in range(1, 4):
        with machine.capturing():
            borrow()
        assert machine.alive_in_the_graphs_pool() == [] and memsets(machine) == n
    borrow()
    with machine.capturing():
        borrow()
    assert memsets(machine) == 3


def test_a_reserve_that_captures_have_used_up_is_made_anew(machine):
    """Not during one; and what was taken of the old one stays whose it is."""
    places = [borrow()]
    piece = workspace._RESERVE_WORDS // 4
    with machine.capturing():
        taken = [workspace.borrow_workspace(piece, DEVICE) for _ in range(5)]
        places += [range(t.data_ptr(), t.data_ptr() + 4 * piece) for t in taken]
    assert memsets(machine) == 2, "three pieces were there"
    del taken
    places.append(borrow())
    assert places[0] == places.pop()
    with machine.capturing():
        places += [borrow(piece), borrow(piece)]
    assert memsets(machine) == 2
    borrow(9000)  # the stream has left the first one, which graphs alone use now
    reserves = [each for each in machine.allocations if each.n_words == workspace._RESERVE_WORDS]
    assert len(reserves) == 2 and all(each.alive and each.pool == "ordinary" for each in reserves)
    assert not meet(*places[:4], *places[6:])


def test_a_stream_that_is_not_torchs_own_is_no_owner(machine):
    """Its handle may have been another stream's, whose launch is not over: each call has words of its own, zeroed in
    the launch's order, which the allocator does not hand on before the launch is over."""
    with machine.on(EXTERNAL):
        one, other = (workspace.borrow_workspace(100, DEVICE) for _ in range(2))
    assert one.data_ptr() != other.data_ptr() and not one.any() and not other.any()
    assert [each.stream_id for each in machine.allocations] == [OTHER_POOL_STREAM] * 2
    order = [(what, who) if what == "record" else (what,) for what, who, *_ in machine.log]
    assert order == [("wait",), ("zero",), ("record", EXTERNAL)] * 2
    assert all(event[1:] == (EXTERNAL, OTHER_POOL_STREAM) for event in machine.log if event[0] == "wait")
    assert workspace._by_stream == {}


def test_one_handle_that_is_a_stream_in_every_thread(machine):
    """cudaStreamPerThread."""
    words = []

    def launch():
        with machine.on(PER_THREAD):
            words.append(workspace.borrow_workspace(100, DEVICE))

    threads = [threading.Thread(target=launch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert words[0].data_ptr() != words[1].data_ptr()


def test_streams_that_are_first_used_at_once(machine, monkeypatch):
    """Two threads in the middle of taking a slice."""
    borrow()
    inside, places = threading.Barrier(2, timeout=0.2), []
    split = torch.Tensor.split

    def slow_split(self, *args, **options):
        with contextlib.suppress(threading.BrokenBarrierError):
            inside.wait()  # for both threads, if nothing keeps the second one out
        return split(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "split", slow_split)

    def launch(stream_id):
        with machine.on(stream_id):
            places.append(borrow())

    threads = [threading.Thread(target=launch, args=(stream_id,)) for stream_id in (POOL_STREAM, OTHER_POOL_STREAM)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(places) == 2 and not meet(*places)


def test_the_capture_that_counts_is_that_of_the_tensors_device(machine):
    """A thread's current device may be another one, which captures nothing."""
    borrow()
    with machine.capturing():
        machine.current_device = 1
        words = borrow()
        assert machine.current_device == 1
    machine.current_device = 0
    with machine.on(POOL_STREAM):
        assert not meet(words, borrow())
