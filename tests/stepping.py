"""Sequential stepping: what MGRIT is compared with."""

import numpy as np


def sequential(propagator, u0, nsteps, G=None):
    """Step by step."""
    U = np.zeros((nsteps + 1, *np.shape(u0)))
    U[0] = u0
    for n in range(nsteps):
        propagator.step(range(n, n + 1), U[n : n + 1], U[n + 1 : n + 2])
        if G is not None:
            U[n + 1] += G[n]
    return U
