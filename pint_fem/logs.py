"""Messages of the package to its user: the logger ``pint_fem``.

Monitors and descriptions of solvers are logged at level ``INFO``, a-priori estimates above one and files that could not
be written at level ``WARNING``, by the first rank only. A program that has set logging up (``logging.basicConfig()``, a
handler of its own at this logger or the root) receives them there; elsewhere they are printed to standard output. The
logger has the level ``INFO`` whatever that of the root logger is;
``logging.getLogger("pint_fem").setLevel("WARNING")`` leaves the warnings only.
"""

from __future__ import annotations

import logging
import sys

from pint_fem.progress import erase

__all__ = ["logger"]


class _StandardOutput(logging.Handler):
    """Prints where the program has no handler, to the ``sys.stdout`` of that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        if logger.handlers == [self] and not logging.getLogger().handlers:
            erase()
            try:
                print(self.format(record), file=sys.stdout, flush=True)
            except OSError:  # such as a closed pipe: logging reports it and the run goes on
                self.handleError(record)


logger = logging.getLogger("pint_fem")
logger.addHandler(_StandardOutput())
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)
