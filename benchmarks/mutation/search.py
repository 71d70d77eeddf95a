"""Looks for mutants in processes of its own; what finds each is a row of JSON."""

import importlib
import multiprocessing
import resource
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tqdm import tqdm

_MOST_BYTES = 12 << 30  # of address space: a mutant may ask for any


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))


def _language(name: str) -> ModuleType:
    return importlib.import_module(f"tests.support.generated_{name}")


def _find(item: tuple[str, Any]) -> dict:
    from tests.support.generated import Stillborn, why_equivalent

    language, mutant = item
    row = {"language": language, "mutant": mutant.name, "rule": mutant.mutation.rule, "reason": why_equivalent(mutant)}
    started = time.process_time()
    try:
        finding = _language(language).look_for(mutant)
    except Stillborn as refused:
        return row | {"stillborn": str(refused)[:200], "found": None}
    row |= {"stillborn": None, "found": finding and finding.check, "by": finding and finding.by}
    row["message"] = finding and finding.message.split("\n")[0][:200]
    return row | {"seconds": round(time.process_time() - started, 1)}


def run(language: str, seed: int, count: int, jobs: int, done: dict[str, dict], save: Callable[[list[dict]], None]):
    """The rows of ``count`` mutants that live, and of the stillborn ones among them.

    Args:
        language: "triton" or "cuda".
        done: rows by a mutant's name, which stay as they are.
        save: gets what there is after every mutant.
    """
    from tests.support.generated import in_order

    order = in_order(seed, _language(language).mutations())
    rows: dict[str, dict] = {}

    def living() -> int:
        return sum(not row["stillborn"] for row in rows.values())

    progress = tqdm(total=count, desc=language)
    with multiprocessing.get_context("spawn").Pool(jobs, _limit_memory, maxtasksperchild=40) as pool:
        while living() < count and order:
            batch, order = order[: count - living()], order[count - living() :]
            rows |= {each.name: done[each.name] for each in batch if each.name in done}
            for row in pool.imap_unordered(_find, [(language, each) for each in batch if each.name not in done]):
                rows[row["mutant"]] = row
                save(list(rows.values()))
                progress.n = living()
                progress.refresh()
    save(list(rows.values()))
    return list(rows.values())
