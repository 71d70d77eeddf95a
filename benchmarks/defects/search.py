"""Looks for defects (tests/support/defects.py) in processes of its own; each defect's finding is a row of JSON."""

import multiprocessing
import time

from tqdm import tqdm


def _defects(group: str) -> list:
    """Made anew in each process: the checks are closures."""
    from tests.support import defects

    if group not in _defects.made:
        _defects.made[group] = defects.GROUPS[group]()
    return _defects.made[group]


_defects.made = {}


def _find(item: tuple[str, int]) -> tuple[int, dict]:
    group, number = item
    defect = _defects(group)[number]
    start = time.monotonic()
    findings = defect.find()
    row = {"group": group, "defect": defect.name, "place": defect.place, "reason": defect.redundant}
    row |= {"seconds": round(time.monotonic() - start, 1), "wanted": defect.ways, "ways": len(findings)}
    if findings:
        first = findings[0]
        row |= {"found": first.check, "by": first.by, "also": [each.by for each in findings[1:]]}
        row["message"] = first.message.split("\n")[0][:300]
    else:
        row |= {"found": None, "checks": len(defect.checks), "further": len(defect.further)}
        for missed in defect.find_further():
            row |= {"reason": None, "missed": missed.check, "by": missed.by, "message": missed.message[:300]}
    return number, row


def run_group(group: str, jobs: int, done: dict, save) -> list[dict]:
    """The rows of one group; those in ``done`` stay as they are. ``save`` gets what there is after every defect."""
    defects = _defects(group)
    rows = [done.get((group, defect.name, defect.place)) for defect in defects]
    items = [(group, number) for number, row in enumerate(rows) if row is None]
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(items)) or 1) as pool:
        for number, row in tqdm(pool.imap_unordered(_find, items), total=len(items), desc=group):
            rows[number] = row
            save([row for row in rows if row])
    return rows


def what_is_wrong(row: dict) -> str | None:
    """Missed, found by luck, or recorded as redundant although it is not; or None. Of the compiler's instructions the
    reason is the same for all, the needed ones included."""
    if row["found"] is None:
        return None if row["reason"] else "found by nothing, and not on record as redundant"
    if row["reason"] is not None and "compiled" not in row["group"]:
        return f"found by {row['found']}, though on record as redundant"
    if row["ways"] < row["wanted"]:
        return f"found by {row['ways']} of the tests' launches, of at least {row['wanted']}"
    return None
