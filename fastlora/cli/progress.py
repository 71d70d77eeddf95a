"""Progress on stderr: tqdm's bar, or a line for each part where tqdm is not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click


class Progress:
    """Parts of a run, named as they begin; ``say`` prints a line of results between them."""

    def __init__(self, bar=None):
        self._bar, self._begun = bar, False

    def begin(self, label: str) -> None:
        """The next part begins, and the one before has ended."""
        if self._bar is None:
            click.echo(label, err=True)
            return
        self._bar.set_description(label)
        self._bar.update(int(self._begun))
        self._begun = True

    def say(self, text: str) -> None:
        if self._bar is None:
            click.echo(text)
        else:
            self._bar.write(text)


@contextmanager
def progress(unit: str, total: int) -> Iterator[Progress]:
    """The display of a run of ``total`` parts."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield Progress()
        return
    with tqdm(total=total, unit=unit, file=sys.stderr) as bar:
        yield Progress(bar)
        bar.update()
