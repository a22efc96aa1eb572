"""Virtual ranks: greenlets with clocks, messages between them, and a scheduler that names a deadlock.

A rank runs until it waits for a message or a collective that is not there yet; then the next one that can go on does.
A message carries the sender's clock, and whoever takes it cannot be earlier than its arrival. As each receive names
its source, clocks do not depend on the order in which ranks are run: the result is that of any schedule.
"""

from __future__ import annotations

import gc
from collections import Counter, deque
from collections.abc import Callable
from functools import partial

from greenlet import getcurrent, greenlet

from pint_fem.scaling.network import Network

__all__ = ["DeadlockError", "World"]


class DeadlockError(RuntimeError):
    """Ranks wait for each other; the message says who waits for what."""


class World:
    """``size`` virtual ranks.

    Parameters
    ----------
    size
        Number of ranks.
    network
        Costs of messages.

    Attributes
    ----------
    clocks : list of float
        Seconds of each rank.
    current : int
        The rank that runs now.
    busy : list of float
        Seconds of work charged to each rank.
    counts : Counter
        States a ``(kind, level)`` of work was charged for, and under ``("messages", tag)`` and ``("bytes", tag)`` what
        was sent, on all ranks together.
    """

    def __init__(self, size: int, network: Network):
        if size < 1:
            raise ValueError(f"{size} virtual ranks: give at least 1")
        self.size, self.network = size, network
        self.clocks, self.busy = [0.0] * size, [0.0] * size
        self.counts: Counter = Counter()
        self.current = 0
        self.contexts = 0
        self._mail: dict[tuple, deque] = {}
        self._wanted: dict[tuple, int] = {}
        self._reasons: dict[int, str | Callable[[], str]] = {}
        self._ready: deque[int] = deque()
        self._hub = getcurrent()

    def run(self, program: Callable[[int], object]) -> list:
        """``program(rank)`` on all ranks; their results.

        Raises
        ------
        DeadlockError
            If all ranks that have not ended wait.
        Exception
            What a rank raises, of the first one that does.
        """
        collects = gc.isenabled()
        gc.disable()  # many thousand objects that live to the end: looking through them again and again takes long
        try:
            return self._run(program)
        finally:
            if collects:
                gc.enable()

    def _run(self, program: Callable[[int], object]) -> list:
        self._hub, results = getcurrent(), [None] * self.size
        tasks = [greenlet(partial(self._one, program, rank, results)) for rank in range(self.size)]
        running = self.size
        self._ready = deque(range(self.size))
        while self._ready:
            self.current = rank = self._ready.popleft()
            self._reasons.pop(rank, None)
            tasks[rank].switch()
            if tasks[rank].dead:
                tasks[rank], running = None, running - 1
        if running:
            raise DeadlockError(self._who_waits(running))
        if any(self._mail.values()):
            (_, source, dest, tag), _ = next((k, v) for k, v in self._mail.items() if v)
            raise DeadlockError(f"a message from rank {source} to rank {dest} with tag {tag} is never received")
        return results

    @staticmethod
    def _one(program: Callable[[int], object], rank: int, results: list) -> None:
        results[rank] = program(rank)

    def _who_waits(self, running: int) -> str:
        waits = [(rank, r if isinstance(r, str) else r()) for rank, r in sorted(self._reasons.items())]
        text = "; ".join(f"rank {rank} waits for {what}" for rank, what in waits[:4])
        return f"deadlock: {running} of {self.size} ranks wait: {text}" + ("; ..." if len(waits) > 4 else "")

    # -- for the rank that runs -----------------------------------------------------------------------------------
    def charge(self, seconds: float) -> None:
        """Let the rank work."""
        if not seconds >= 0:
            raise ValueError(f"work of {seconds} seconds")
        self.clocks[self.current] += seconds
        self.busy[self.current] += seconds

    def until(self, clock: float) -> None:
        """Let it be no earlier than ``clock``."""
        if clock > self.clocks[self.current]:
            self.clocks[self.current] = clock

    def sleep(self, reason: str | Callable[[], str]) -> None:
        """Let others run until somebody calls :meth:`wake`."""
        self._reasons[self.current] = reason
        self._hub.switch()

    def wake(self, rank: int) -> None:
        """Let a sleeping rank go on."""
        self._ready.append(rank)

    def post(self, key: tuple, data, nbytes: float) -> None:
        """Send; ``key`` is ``(context, source, dest, tag)``."""
        self.counts["messages", key[3]] += 1
        self.counts["bytes", key[3]] += nbytes
        self._mail.setdefault(key, deque()).append((data, self.clocks[self.current] + self.network.message(nbytes)))
        waiting = self._wanted.pop(key, None)
        if waiting is not None:
            self.wake(waiting)

    def take(self, key: tuple):
        """Receive."""
        mail = self._mail.get(key)
        if not mail:
            self._wanted[key] = self.current
            self.sleep(lambda: f"a message from rank {key[1]} with tag {key[3]}")
            mail = self._mail[key]
        data, arrival = mail.popleft()
        if not mail:
            del self._mail[key]
        self.until(arrival)
        return data

    def has_mail(self, key: tuple) -> bool:
        """Whether a message is on its way."""
        return bool(self._mail.get(key))
