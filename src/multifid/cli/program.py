"""The program that the commands belong to. Each imports what it needs when it is called: help needs no torch."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Pre-train graph foundation models for atoms on many inconsistent sources of quantum-mechanical data at once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from multifid import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and stop")
    ] = False,
) -> None:
    """Options of the program itself."""


def command(panel: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a command of the program, listed in a panel of its help."""
    return app.command(rich_help_panel=panel)


def main() -> None:
    """Entry point: the user's errors are one message and exit code 1, ours keep their traceback."""
    try:
        app()
    except RuntimeError as error:
        from multifid.parallel.launch import OtherRankFailed

        if not isinstance(error, OtherRankFailed):
            raise
        sys.exit(1)  # the other rank says why: one message is read and not many
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"multifid: error: {error}", file=sys.stderr)
        sys.exit(1)
