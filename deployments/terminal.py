"""What commands and environments print to: as wide as the terminal is; where there is none,
nothing is cut.
"""

from rich.console import Console

_WIDE = 10_000
"""Columns of a file or a pipe: rich takes 80, and cuts what is longer."""


def open_console(*, quiet: bool = False) -> Console:
    """A console on standard output.

    Args:
        quiet: print nothing.
    """
    console = Console(quiet=quiet)
    if not console.is_terminal and not console.is_jupyter:
        console.width = _WIDE
    return console
