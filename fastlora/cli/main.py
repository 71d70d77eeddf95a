"""Entry point of `fastlora`: a click group whose commands are imported when they are used."""

import importlib
import sys
from collections.abc import Sequence

import click

COMMANDS = {
    "info": "fastlora.cli.info:info",
    "finetune": "fastlora.cli.finetune:finetune",
    "merge": "fastlora.cli.merge:merge",
    "convert": "fastlora.cli.convert:convert",
    "bench": "fastlora.cli.bench:bench",
    "tune": "fastlora.cli.tune:tune",
    "analyze": "fastlora.cli.analyze:analyze",
    "study": "fastlora.cli.study:study",
}

INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command (or the list of all) is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        return getattr(importlib.import_module(module), attribute)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastlora")
def cli() -> None:
    """LoRA layers in one launch each way."""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 for a user's error (one line on stderr), 130 interrupted.

    A command may return an int, which becomes the exit code.
    """
    try:
        code = cli.main(args=args, prog_name="fastlora", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as request:
        click.echo(request.ctx.get_help(), err=True)
        code = request.exit_code
    except click.ClickException as error:
        # click's own display adds usage lines; users and scripts get the one line that says what was wrong.
        click.echo(f"fastlora: error: {error.format_message()}", err=True)
        code = error.exit_code
    except click.Abort:
        click.echo("fastlora: interrupted", err=True)
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
