"""The error that a command shows to its user as one line."""

import click


class CommandError(click.ClickException):
    """Something the user can put right. Shown as one line on stderr; the command exits with code 2."""

    exit_code = 2


def first_line(error: BaseException) -> str:
    """The first non-empty line of an exception's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
