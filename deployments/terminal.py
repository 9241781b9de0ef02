"""The console of commands and environments: as wide as the terminal, or without a limit."""

from rich.console import Console

_WIDE = 10_000
"""Columns for a file or a pipe: rich assumes 80, and cuts longer lines."""


def open_console(*, quiet: bool = False) -> Console:
    """A console on standard output.

    Args:
        quiet: print nothing.
    """
    console = Console(quiet=quiet)
    if not console.is_terminal and not console.is_jupyter:
        console.width = _WIDE
    return console
