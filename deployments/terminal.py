"""The console of commands and environments: as wide as the terminal, or without a limit."""

from rich.console import Console

from fedpool.deployments.access import Access

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


def ui_address(console: Console, access: Access, otherwise: str) -> str:
    """What to print of a UI: a link that signs in, for the eyes of the person at a terminal or a
    notebook. A file may have other readers, so it gets only the address.

    Args:
        otherwise: how the reader of a file signs in.
    """
    if console.file.isatty() or console.is_jupyter:
        return access.link
    return f"{access.address} ({otherwise})"
