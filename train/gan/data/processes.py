"""One function of many items, in this process or in several that start anew."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def results(work: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[tuple[Item, Result]]:
    """(item, what ``work`` makes of it), in whatever order they are done. Every process has a copy of ``work``."""
    if min(workers, len(items)) < 2:
        for item in items:
            yield item, work(item)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(items)), context, initializer=_begin, initargs=(work,))
    try:
        waiting = {pool.submit(_call, item): item for item in items}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    except BrokenProcessPool as error:
        raise ChildProcessError("a process that reads images has died: the same command continues") from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]  # in a worker, what it does


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the business of the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed can end nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _work(item)
