"""SIGTERM and SIGINT end a worker in order; a second signal ends it at once."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """End the block when a signal arrives, by cancelling the current task; in the main thread only.

    Prefect turns signals into a KeyboardInterrupt wherever the main thread happens to be, and some
    of the code it calls there treats that as its own error and goes on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signalled = threading.Event()

    def stop() -> None:
        signalled.set()
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        task.cancel()

    for number in _SIGNALS:
        loop.add_signal_handler(number, stop)
    try:
        yield
    except asyncio.CancelledError:
        if not signalled.is_set():
            raise
        task.uncancel()
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
