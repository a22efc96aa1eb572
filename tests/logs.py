"""What the package logs."""

import logging
from contextlib import contextmanager


class _Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextmanager
def logged():
    """A list that gets the messages of the package on this rank."""
    handler = _Lines()
    logger = logging.getLogger("pint_fem")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)
