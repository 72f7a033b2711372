"""What a function shows while it works, for a caller that goes through it step by step."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue


def as_it_happens(work: Callable[[Callable], object]) -> Iterator:
    """Call work(show) in a thread: what it shows is yielded at once, and at the end what it returns."""
    shown, nothing_more = SimpleQueue(), object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work, shown.put)
        future.add_done_callback(lambda _: shown.put(nothing_more))
        yield from iter(shown.get, nothing_more)
        yield future.result()
