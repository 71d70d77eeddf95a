"""The output directory of a run: what it may hold beforehand, and the files that a run writes there."""

from pathlib import Path

from fastlora.errors import CommandError
from fastlora.files import STAGE_PREFIX
from fastlora.finetune.state import FILE_NAME

ADAPTER, PICTURE, REPORT = "adapter", "loss.png", "report.json"
_SHOWN = 3


def check_output(output: Path, resume: bool, overwrite: bool) -> None:
    """Refuses a directory in which something would be lost.

    Raises:
        CommandError: it holds anything, and neither --resume nor --overwrite was given; or it is no directory.
    """
    if output.exists() and not output.is_dir():
        raise CommandError(f"cannot write {output}: Not a directory")
    if resume or overwrite or not output.is_dir():
        return
    names = sorted(path.name for path in output.iterdir() if not path.name.startswith(STAGE_PREFIX))
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        state = "goes on with the run there" if FILE_NAME in names else f"needs a {FILE_NAME}"
        raise CommandError(
            f"output directory {output} holds {', '.join(names[:_SHOWN])}{more}: name another --output; "
            f"--resume {state}; --overwrite replaces an earlier run's files and keeps others"
        )


def remove_results(output: Path) -> None:
    """Removes what an earlier adapter's run said about it, once another adapter is in its place."""
    for name in (PICTURE, REPORT):
        (output / name).unlink(missing_ok=True)
