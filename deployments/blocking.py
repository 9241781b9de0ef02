"""Running a coroutine from synchronous code, even inside an event loop, as in a notebook."""

import asyncio
import contextvars
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end and return its result, in the caller's context.

    If an event loop runs in this thread, the coroutine gets its own thread and loop, and the
    caller's loop is blocked meanwhile. Ctrl-C cancels the coroutine, and is raised once it has
    ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    loop = asyncio.new_event_loop()
    task = loop.create_task(work, context=contextvars.copy_context())

    def run() -> T:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(_result(task))

    with ThreadPoolExecutor(1, thread_name_prefix="fedpool-blocking") as thread:
        ended = thread.submit(run)
        try:
            return ended.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            raise


async def _result(task: "asyncio.Task[T]") -> T:
    return await task
