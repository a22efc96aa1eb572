"""Kernels in C on *lanes*: arrays ``(n, W)`` of W states side by side, so that each entry of a matrix or factor is
loaded once for W states and multiplied by vectors of them.

The operations on one lane do not depend on the other lanes, nor on W: a state has bitwise identical results in every
lane and for every width.
"""
