"""Loops of a kernel's machine code, and the costliest way through one of their steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.cuda_resources.sass import Instruction


@dataclass(frozen=True)
class Loop:
    """Instructions from a conditional jump's target to the jump, as they lie in memory.

    Waits return from behind the kernel's end by unconditional jumps; the loop over tiles ends with one as well: they
    are none of these.
    """

    code: tuple[Instruction, ...]

    @property
    def first(self) -> int:
        return self.code[0].address

    @property
    def end(self) -> int:
        return self.code[-1].address

    def __contains__(self, other: "Loop") -> bool:
        return self.first <= other.first and other.end <= self.end and self is not other


def find_loops(code: Sequence[Instruction]) -> list[Loop]:
    """The loops of a kernel, in the order of their ends."""
    index = {each.address: i for i, each in enumerate(code)}
    return [
        Loop(tuple(code[index[each.target] : i + 1]))
        for i, each in enumerate(code)
        if each.target is not None and each.predicate and each.target <= each.address
    ]


def is_waterfall(loop: Loop) -> bool:
    """Whether the assembler made this loop: it elects one lane at a time and moves its operands into uniform registers,
    because it could not prove that all lanes hold the same. An election in the sources is in no loop that starts with
    it."""
    moves = any(each.is_a("R2UR") for each in loop.code)
    return moves and loop.code[0].is_a("ELECT") and sum(each.is_a("ELECT") for each in loop.code) == 1


def is_wait(loop: Loop) -> bool:
    """Whether the loop only polls a barrier or a flag."""
    polls = sum(each.is_a("SYNCS", "LDG", "LD", "NANOSLEEP") for each in loop.code)
    return polls > 0 and len(loop.code) <= 8 and not any(each.is_a("ST", "STG", "STS") for each in loop.code)


def costliest_way(
    code: Sequence[Instruction],
    avoided: Callable[[Instruction], bool],
    shared: Callable[[Instruction], bool],
    share: int,
) -> list[Instruction] | None:
    """The way from the first instruction to the last, by jumps forward, with the highest sum of stalls.

    Of those that meet no ``avoided`` instruction and one in ``share``, rounded up, of the ``shared`` ones that can be
    gone around: a CTA of a cluster takes its turn at them. None where there is no way.
    """
    index = {each.address: i for i, each in enumerate(code)}
    total = sum(shared(each) for each in code)
    # To each instruction, by the number of shared ones met: (stalls, the one before).
    best: list[dict[int, tuple[int, tuple[int, int] | None]]] = [{} for _ in code]
    best[0][0] = (0, None)
    for i, each in enumerate(code):
        if avoided(each):
            continue
        falls_through = each.predicate is not None or not each.is_a("BRA", "EXIT", "RET")
        following = [i + 1] if falls_through else []
        if each.target in index and index[each.target] > i:
            following.append(index[each.target])
        for met, (stalls, _) in best[i].items():
            now = met + shared(each)
            for k in following:
                if k < len(code) and best[k].get(now, (-1, None))[0] < stalls + each.stall:
                    best[k][now] = (stalls + each.stall, (i, met))
    counts = {met + shared(code[-1]) for met in best[-1]}
    if not counts:
        return None
    wanted = min(counts) + -(-(total - min(counts)) // share)
    met = min(counts, key=lambda count: (count < wanted, abs(count - wanted))) - shared(code[-1])
    way = [code[-1]]
    before = best[-1][met][1]
    while before is not None:
        i, met = before
        way.append(code[i])
        before = best[i][met][1]
    return way[::-1]
