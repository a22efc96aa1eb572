"""Checks that all ranks hold the same evolution, misfits, data and controls, and that data are as they were read."""
