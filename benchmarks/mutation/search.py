"""Looks for mutants in processes of its own; what finds each is a row of JSON."""

import multiprocessing
import resource
import time
from collections.abc import Callable

from tqdm import tqdm

_MOST_BYTES = 12 << 30  # of address space: a mutant may ask for any


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MOST_BYTES, _MOST_BYTES))


def _find(generated) -> dict:
    from tests.support import generated as mutants

    mutation = generated.mutation
    key = (generated.module, mutation.rule, mutation.old, mutation.new)
    row = {"mutant": generated.name, "rule": mutation.rule, "reason": mutants.EQUIVALENT.get(key)}
    started = time.process_time()
    try:
        finding = mutants.look_for(generated)
    except mutants.Stillborn as refused:
        return row | {"stillborn": str(refused)[:200], "found": None}
    row |= {"stillborn": None, "found": finding and finding.check, "by": finding and finding.by}
    row["message"] = finding and finding.message.split("\n")[0][:200]
    return row | {"seconds": round(time.process_time() - started, 1)}


def run(seed: int, count: int, jobs: int, done: dict[str, dict], save: Callable[[list[dict]], None]) -> list[dict]:
    """The rows of ``count`` mutants that live, and of the stillborn ones among them; ``done``: by a mutant's name.
    ``save`` gets what there is after every mutant."""
    from tests.support import generated as mutants

    order = mutants.in_order(seed, mutants.of_triton())
    rows: dict[str, dict] = {}

    def living() -> int:
        return sum(not row["stillborn"] for row in rows.values())

    progress = tqdm(total=count, desc=f"seed {seed}")
    with multiprocessing.get_context("spawn").Pool(jobs, _limit_memory, maxtasksperchild=40) as pool:
        while living() < count and order:
            batch, order = order[: count - living()], order[count - living() :]
            rows |= {each.name: done[each.name] for each in batch if each.name in done}
            for row in pool.imap_unordered(_find, [each for each in batch if each.name not in done]):
                rows[row["mutant"]] = row
                save(list(rows.values()))
                progress.n = living()
                progress.refresh()
    save(list(rows.values()))
    return list(rows.values())
