"""The shipped readings of the plate, thinned: what a serial tape costs is theirs, most of them are between steps."""

from pathlib import Path

from problems.heat_readings import READINGS
from problems.readings import COLUMNS


def some_readings(path: Path, every: int) -> Path:
    """Write every n-th of the times to a file, and name it."""
    lines = READINGS.read_text().splitlines()
    data = [line for line in lines if line[0].isdigit()]
    times = sorted({line.split(",")[3] for line in data}, key=float)[4::every]
    path.write_text("\n".join([",".join(COLUMNS), *(line for line in data if line.split(",")[3] in times)]))
    return path
