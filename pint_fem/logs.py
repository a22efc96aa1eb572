"""Messages of the package to its user: the logger ``pint_fem`` and the category of its warnings.

Monitors and descriptions of solvers are logged at level ``INFO`` by the first rank. A program that has set logging up
(``logging.basicConfig()``, a handler of its own) receives them there; elsewhere they are printed to standard output.
``logging.getLogger("pint_fem").setLevel("WARNING")`` silences them.
"""

from __future__ import annotations

import logging
import sys

__all__ = ["ConvergenceWarning", "logger"]


class ConvergenceWarning(UserWarning):
    """A time-parallel solver need not converge, or has been replaced by sequential stepping."""


class _StandardOutput(logging.Handler):
    """Prints where nobody has set logging up, to the ``sys.stdout`` of that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stdout, flush=True)


logger = logging.getLogger("pint_fem")
logger.addHandler(_StandardOutput())
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)
