r"""The time that messages and collective operations of MPI take, by latency and bandwidth.

With latency :math:`\ell` and bandwidth :math:`\beta`, on ``P`` ranks:

====================================================  ===================================================
a message of ``b`` bytes                              :math:`\ell + b/\beta` after it was sent
broadcast, scatter                                    :math:`\lceil\log_2 P\rceil \ell + b/\beta` after the root
reduce, gather (root), allreduce, allgather, barrier  the same after the last rank
all-to-all (``b`` bytes sent by a rank)               :math:`(P - 1) \ell + b/\beta` after the last rank
====================================================  ===================================================

(R. Thakur, R. Rabenseifner, W. Gropp, Int. J. High Perform. Comput. Appl. 19(1), 2005: trees and recursive doubling;
messages of different sizes to all ranks are exchanged pair by pair.) Messages are assumed not to share a link, and
sending to cost the sender no time.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pint_fem.errors import InputError

__all__ = ["Network"]

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_BYTES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Network:
    """Latency and bandwidth of a network.

    Parameters
    ----------
    latency : float
        Seconds, at least zero.
    bandwidth : float
        Bytes per second, positive.
    name : str
        Where the numbers come from, for reports.
    """

    latency: float
    bandwidth: float
    name: str = "given"

    @classmethod
    def parse(cls, text: str) -> Network:
        """Read a network from a text such as ``"2us,12GB/s"``.

        Raises
        ------
        InputError
            If the text has another form or the bandwidth is zero.
        """
        number = r"(\d+(?:\.\d*)?(?:e-?\d+)?)"
        found = re.fullmatch(rf"\s*{number}\s*(ns|us|ms|s)\s*,\s*{number}\s*([KMGT]?)B/s\s*", text)
        if not found or float(found[3]) <= 0:
            raise InputError(f"network {text!r}: give latency and bandwidth, such as 2us,12GB/s")
        return cls(float(found[1]) * _SECONDS[found[2]], float(found[3]) * _BYTES[found[4]])

    def message(self, nbytes: float) -> float:
        """Seconds from the sending of a message of ``nbytes`` bytes to its arrival."""
        return self.latency + nbytes / self.bandwidth

    def collective(self, ranks: int, nbytes: float) -> float:
        """Seconds of a collective operation of ``ranks`` ranks in which ``nbytes`` bytes pass each of them."""
        if ranks <= 1:
            return 0.0
        return math.ceil(math.log2(ranks)) * self.latency + nbytes / self.bandwidth

    def alltoall(self, ranks: int, nbytes: float) -> float:
        """Seconds of an exchange of all of ``ranks`` ranks with all, in which each sends ``nbytes`` bytes."""
        return (ranks - 1) * self.latency + nbytes / self.bandwidth

    def __str__(self) -> str:
        return f"{1e6 * self.latency:.3g} us, {self.bandwidth / 1e9:.3g} GB/s ({self.name})"
