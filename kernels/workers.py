"""Shares the (batch, kv head) pairs of a CPU kernel among Python threads.

The kernels are long rows of small calls that stay in one core's cache. Splitting every call over
torch's threads costs a barrier each; a worker that owns whole pairs and computes alone needs none.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import torch

# Fewer logits than this a worker are computed before a thread has started.
_LEAST = 1 << 21


def share_pairs(pairs: int, logits: int, work: Callable[[slice], None]) -> None:
    """Call ``work`` on slices that cover ``range(pairs)``; ``logits`` is the size of it all.

    Raises:
        BaseException: the first that a worker raised.
    """
    threads = torch.get_num_threads()
    workers = min(threads, pairs, max(1, logits // _LEAST))
    if workers <= 1:
        work(slice(0, pairs))
        return
    failures: list[BaseException] = []

    def run(part: slice) -> None:
        torch.set_num_threads(max(1, threads // workers))
        try:
            # Grad mode belongs to a thread, and a new one starts with gradients on.
            with torch.no_grad():
                work(part)
        except BaseException as error:
            failures.append(error)

    bounds = [pairs * worker // workers for worker in range(workers + 1)]
    started = [
        threading.Thread(target=run, args=(slice(first, stop),))
        for first, stop in itertools.pairwise(bounds)
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    # A worker's setting is what threads that start later would inherit.
    torch.set_num_threads(threads)
    if failures:
        raise failures[0]
