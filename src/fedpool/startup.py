"""Starting quickly: importing torch, Prefect and ourselves is most of what a small job costs."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_off() -> Iterator[None]:
    """No garbage collection inside: imports make objects that stay, and looking for garbage
    among them takes a quarter longer.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
