"""Looks for mutants, each in a process of its own, which it may end; what finds each is a row of JSON."""

import importlib
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from types import ModuleType
from typing import Any

from tqdm import tqdm

_MOST_BYTES = 8 << 30  # of address space: a mutant may ask for any
_CONTEXT = multiprocessing.get_context("forkserver")  # forks from a process that has imported what follows


def _language(name: str) -> ModuleType:
    return importlib.import_module(f"tests.support.generated_{name}")


def _quick(item: tuple[str, Any]) -> dict:
    """The row of a mutant after the quick checks."""
    from tests.support.generated import why_equivalent

    language, mutant = item
    row = {"language": language, "mutant": mutant.name, "rule": mutant.mutation.rule, "reason": why_equivalent(mutant)}
    row |= {"stillborn": None, "found": None, "wanted": mutant.ways, "by": [], "seconds": 0.0}
    row = _look_in_process(row, mutant, thorough=False)
    return row | {"pending": not (row["stillborn"] or row["reason"] or len(row["by"]) == row["wanted"])}


def _thorough(item: tuple[dict, Any]) -> dict:
    """Its row after all others, where the quick ones have not found it as often as they should."""
    return _look_in_process(*item, thorough=True) | {"pending": False}


def _look_in_process(row: dict, mutant: Any, thorough: bool) -> dict:
    """``_look`` in a process of its own; a signal that ends that one is a find."""
    receiving, sending = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send, args=(sending, row, mutant, thorough))
    process.start()
    sending.close()
    try:
        row = receiving.recv()
    except EOFError:
        process.join()
        if process.exitcode >= 0:
            raise RuntimeError(f"the search itself failed at {row['mutant']}") from None
        if row["found"] is None:
            row |= {"found": "the process ended", "message": f"signal {-process.exitcode}"}
        row |= {"by": [*row["by"], "a check that ended the process"]}
    process.join()
    return row


def _send(sending: Any, *arguments: Any) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, hard))
    sending.send(_look(*arguments))


def _look(row: dict, mutant: Any, thorough: bool) -> dict:
    from tests.support.generated import Stillborn, findings

    started = time.process_time()
    checks = _language(row["language"]).checks(mutant)[thorough]
    try:
        # What compiles for common layers must do so for all.
        found = findings(checks, row["wanted"] - len(row["by"]), must_compile=thorough)
    except Stillborn as refused:
        return row | {"stillborn": str(refused)[:200]}
    if found and row["found"] is None:
        row |= {"found": found[0].check, "message": found[0].message.split("\n")[0][:200]}
    row |= {"by": row["by"] + [each.by for each in found]}
    return row | {"seconds": round(row["seconds"] + time.process_time() - started, 1)}


def _kept(row: dict, mutant: Any) -> dict:
    """A row of an earlier run; a reason may be on record since."""
    from tests.support.generated import why_equivalent

    reason = why_equivalent(mutant)
    return row | {"reason": reason, "pending": row["pending"] and not reason}


def run(language: str, seed: int, count: int, jobs: int, done: dict[str, dict], save: Callable[[list[dict]], None]):
    """The rows of ``count`` mutants that live, and of the stillborn ones among them.

    Args:
        language: "triton" or "cuda".
        done: rows by a mutant's name, which stay as they are.
        save: gets what there is after every mutant.
    """
    from tests.support.generated import in_order

    order = in_order(seed, _language(language).mutations())
    by_name = {each.name: each for each in order}
    rows: dict[str, dict] = {}

    def living() -> int:
        return sum(not row["stillborn"] for row in rows.values())

    def keep(found: Iterable[dict]) -> None:
        for row in found:
            rows[row["mutant"]] = row
            save(list(rows.values()))
            progress.n = living() - sum(row["pending"] for row in rows.values())
            progress.refresh()

    progress = tqdm(total=count, desc=language)
    _CONTEXT.set_forkserver_preload([f"tests.support.generated_{language}"])
    with ThreadPool(jobs) as pool:
        while living() < count and order:
            batch, order = order[: count - living()], order[count - living() :]
            rows |= {each.name: _kept(done[each.name], each) for each in batch if each.name in done}
            keep(pool.imap_unordered(_quick, [(language, each) for each in batch if each.name not in done]))
        pending = [row for row in rows.values() if row["pending"]]
        keep(pool.imap_unordered(_thorough, [(row, by_name[row["mutant"]]) for row in pending]))
    save(list(rows.values()))
    return list(rows.values())
