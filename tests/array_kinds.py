"""Tests of solvers on numpy arrays, run a second time on torch tensors that share the arrays' memory.

Where the fixture ``array_kind`` is torch, the solvers in a test's module are those of :func:`replacements`: solves get
tensors. Propagators, transfers and norms have to be handed tensors; those of the test work on numpy views of them.
"""

import sys

import numpy as np
import torch

from pint_fem.mgrit import MGRIT, Transfer

METHODS = ("step", "sweep", "advance", "all_at_once")


def as_array(value):
    """A tensor's memory as a numpy array; other values as they are, but for numpy arrays, which nothing may be."""
    assert not isinstance(value, np.ndarray), "a numpy array in a solve with tensors"
    return value.numpy() if isinstance(value, torch.Tensor) else value


def as_tensor(value):
    """A numpy array's memory as a tensor, a copy where no tensor may have it; other values as they are."""
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value if min(value.strides, default=0) >= 0 and value.flags.writeable else value.copy())


class Stepper:
    """A test's propagator, called with tensors."""

    def __init__(self, propagator):
        self.__dict__["propagator"] = propagator

    def __getattr__(self, name):
        value = getattr(self.propagator, name)
        if name not in METHODS:
            return value

        def call(*args):
            return value(*map(as_array, args))

        return call

    def __setattr__(self, name, value):
        setattr(self.propagator, name, value)


def on_tensors(function):
    """A function of arrays, for tensors."""

    def call(*blocks):
        return as_tensor(function(*map(as_array, blocks)))

    return call


class _OnTensors:
    """A solver for numpy arrays by solves with tensors."""

    def __init__(self, propagators, *args, transfers=None, point_norms=None, **given):
        if point_norms is not None:
            given["point_norms"] = on_tensors(point_norms)
        if transfers is not None:
            transfers = [self._transfer(t) for t in transfers]
        super().__init__([Stepper(p) for p in propagators], *args, transfers=transfers, **given)

    @staticmethod
    def _transfer(given):
        made = Transfer.make(given)
        if made is None or not all(map(callable, given if not isinstance(given, Transfer) else ())):
            return made
        maps = (made.restrict, made.prolong, made.restrict_transposed, made.prolong_transposed)
        return Transfer(*(None if f is None else on_tensors(f) for f in maps))

    def solve(self, U, G=None, **how):
        tensor = as_tensor(U)
        if how.get("coarse_rhs") is not None:
            how["coarse_rhs"] = [as_tensor(g) for g in how["coarse_rhs"]]
        try:
            return super().solve(tensor, as_tensor(G), **how)
        finally:
            if isinstance(U, np.ndarray) and min(U.strides, default=0) < 0:
                U[...] = tensor.numpy()

    def states(self, U, G=None):
        for first, block in super().states(as_tensor(U), as_tensor(G)):
            yield first, as_array(block)


class OnTensors(_OnTensors, MGRIT):
    """MGRIT."""


def replacements():
    """Solvers that take the place of those of a test's module, by name."""
    found = {"MGRIT": OnTensors}
    if "pint_fem.mgrit.krylov" in sys.modules:
        base = sys.modules["pint_fem.mgrit.krylov"].KrylovMGRIT
        found["KrylovMGRIT"] = type("KrylovOnTensors", (_OnTensors, base), {})
    return found
