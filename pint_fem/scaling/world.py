"""Virtual ranks in one process: coroutines with clocks, the messages between them, and their scheduler.

A rank runs until it waits for a message or a collective operation that is not complete yet; then the next rank that can
continue runs. A message carries the time of its arrival, and its receiver's clock is set to that time if it is earlier.
As each receive names its source, the clocks do not depend on the order in which the ranks run.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet

from pint_fem.scaling.network import Network

__all__ = ["DeadlockError", "World"]


class DeadlockError(RuntimeError):
    """No virtual rank can continue; the message names what each of them waits for."""


class World:
    """Virtual ranks with clocks.

    Parameters
    ----------
    size, network
        Number of ranks, and costs of messages.

    Attributes
    ----------
    clocks, work : list of float
        Seconds since the start, and seconds of work, on each rank.
    counts : Counter
        By ``(kind, level)``, the states that work was charged for; by ``("messages", tag)`` and ``("bytes", tag)``,
        what all ranks have sent.
    current, contexts : int
        The rank that runs now; number of communicators made so far.
    """

    def __init__(self, size: int, network: Network):
        if size < 1:
            raise ValueError(f"{size} virtual ranks: give at least 1")
        self.size, self.network = size, network
        self.clocks, self.work = [0.0] * size, [0.0] * size
        self.counts: Counter = Counter()
        self.current = self.contexts = 0
        self._messages: dict[tuple, deque] = {}
        self._receivers: dict[tuple, int] = {}
        self._reasons: dict[int, Callable[[], str]] = {}
        self._ready: deque[int] = deque()
        self._scheduler = getcurrent()

    def run(self, program: Callable[[int], object]) -> list:
        """Run ``program(rank)`` on all ranks and return their results.

        Raises
        ------
        DeadlockError
            If all ranks that have not ended wait, or a message is never received.
        Exception
            The first exception that a rank raises.
        """
        self._scheduler, results, running = getcurrent(), [None] * self.size, self.size

        def run_rank(rank: int) -> None:
            results[rank] = program(rank)

        tasks = [greenlet(run_rank) for _ in range(self.size)]
        self._ready = deque(range(self.size))
        collects = gc.isenabled()
        gc.disable()  # thousands of objects live until the end: collections would traverse them again and again
        try:
            while self._ready:
                self.current = rank = self._ready.popleft()
                self._reasons.pop(rank, None)
                tasks[rank].switch(rank)
                if tasks[rank].dead:
                    tasks[rank], running = None, running - 1
        finally:
            if collects:
                gc.enable()
        if running:
            raise DeadlockError(self._describe_deadlock(running))
        for (_, source, dest, tag), messages in self._messages.items():
            if messages:
                raise DeadlockError(f"a message from rank {source} to rank {dest} with tag {tag} is never received")
        return results

    def _describe_deadlock(self, running: int) -> str:
        waits = [f"rank {rank} waits for {reason()}" for rank, reason in sorted(self._reasons.items())[:4]]
        waits += ["..."] * (len(self._reasons) > 4)
        return f"deadlock: {running} of {self.size} ranks wait: {'; '.join(waits)}"

    # -- for the rank that runs -----------------------------------------------------------------------------------
    def now(self) -> float:
        """Clock of the current rank, in seconds."""
        return self.clocks[self.current]

    def charge(self, seconds: float) -> None:
        """Advance the current rank's clock by ``seconds`` of work.

        Raises
        ------
        ValueError
            If ``seconds`` is negative or NaN.
        """
        if not seconds >= 0:
            raise ValueError(f"work of {seconds} seconds")
        self.clocks[self.current] += seconds
        self.work[self.current] += seconds

    def wait_until(self, clock: float) -> None:
        """Set the current rank's clock to ``clock`` if it is earlier."""
        if clock > self.clocks[self.current]:
            self.clocks[self.current] = clock

    def suspend(self, reason: Callable[[], str]) -> None:
        """Let other ranks run until one of them resumes the current one; ``reason()`` is a text for errors."""
        self._reasons[self.current] = reason
        self._scheduler.switch()

    def resume(self, rank: int) -> None:
        """Let a suspended rank continue."""
        self._ready.append(rank)

    def send(self, key: tuple, data: Any, nbytes: float) -> None:
        """Send ``data``, which stands for ``nbytes`` bytes; ``key`` is ``(context, source, dest, tag)``."""
        self.counts["messages", key[3]] += 1
        self.counts["bytes", key[3]] += nbytes
        self._messages.setdefault(key, deque()).append((data, self.now() + self.network.message(nbytes)))
        receiver = self._receivers.pop(key, None)
        if receiver is not None:
            self.resume(receiver)

    def receive(self, key: tuple) -> Any:
        """Wait for the message of ``key`` and return its data."""
        if not self._messages.get(key):
            self._receivers[key] = self.current
            self.suspend(lambda: f"a message from rank {key[1]} with tag {key[3]}")
        messages = self._messages[key]
        data, arrival = messages.popleft()
        if not messages:
            del self._messages[key]
        self.wait_until(arrival)
        return data
