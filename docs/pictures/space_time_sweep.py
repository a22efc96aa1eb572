"""A state over space and time, and its error before and after a cycle: slabs of ranks, C-points, F-points."""

import numpy as np
from matplotlib.colors import LogNorm
from style import POSITIVE, SIGNED, Theme, plt, save

from pint_fem.mgrit import MGRIT, split_steps

STEPS, CELLS, M, RANKS = 64, 96, 8, 4


class Heat:
    """Backward Euler steps of heat conduction in a rod whose source moves from end to end and back."""

    def __init__(self, stride):
        self.dt, h = stride / STEPS, 1 / CELLS
        x = np.linspace(0, 1, CELLS + 1)[1:-1]
        second = (np.diag(np.full(CELLS - 1, 2.0)) - np.eye(CELLS - 1, k=1) - np.eye(CELLS - 1, k=-1)) / h**2
        self.inverse = np.linalg.inv(np.eye(CELLS - 1) + self.dt * 0.02 * second)
        self.source = lambda t: 12 * np.cos(7 * t) * np.exp(-(((x - 0.5 - 0.3 * np.sin(5 * t)) / 0.08) ** 2))

    def step(self, steps, u, out):
        """See :class:`pint_fem.all_at_once.propagator.Propagator`."""
        G = np.array([self.source((n + 1) * self.dt) for n in steps])
        out[...] = (u + self.dt * G) @ self.inverse


def states(cycles):
    """All states after some cycles."""
    U = np.zeros((STEPS + 1, CELLS - 1))
    levels = [Heat(1), Heat(M)] if cycles is not None else [Heat(1)]
    options = {"levels": 1} if cycles is None else {"coarsening": M, "relax": "F", "rtol": 0, "max_it": cycles}
    MGRIT(levels, STEPS, options=options).solve(U)
    return U


def draw(path, dark):
    """The state, its error after one cycle and after two."""
    look, exact = Theme(dark), states(None)
    with look.used():
        fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.9), layout="constrained", sharey=True)
        box = (0, 1, -0.5, STEPS + 0.5)
        given = dict(origin="lower", extent=box, aspect="auto", interpolation="nearest", rasterized=True)
        limit = np.abs(exact).max()
        first = axes[0].imshow(exact, cmap=SIGNED, vmin=-limit, vmax=limit, **given)
        axes[0].set_title("State of all steps")
        fig.colorbar(first, ax=axes[0], label="temperature rise (scaled)", location="bottom")
        norm = LogNorm(1e-6, 1e-1)
        for ax, cycles in zip(axes[1:], (1, 2), strict=True):
            error = np.abs(states(cycles) - exact) / limit
            shown = ax.imshow(np.maximum(error, 1e-12), cmap=POSITIVE, norm=norm, **given)
            ax.set_title(f"Error after {cycles} cycle{'s' if cycles > 1 else ''}")
        fig.colorbar(shown, ax=axes[1:], label="error / largest temperature rise", location="bottom", extend="min")
        bounds = split_steps(STEPS, RANKS)
        for ax in axes:
            for n in bounds[1:-1]:
                ax.axhline(n + 0.5, color="white" if ax is not axes[0] else "black", lw=1.6)
            points = np.arange(0, STEPS + 1, M)
            ax.plot(np.full(len(points), 1.02), points, "<", color=look.orange, ms=5, clip_on=False)
            ax.set(xlabel="x (length of the rod)", xlim=(0, 1), ylim=(-0.5, STEPS + 0.5))
        for rank in range(RANKS):
            middle = (bounds[rank] + bounds[rank + 1]) / 2
            axes[0].text(0.03, middle, f"rank {rank}", va="center", fontsize=9, color="black")
        axes[0].set(ylabel="time step", yticks=range(0, STEPS + 1, 16))
        fig.suptitle(
            "Lines: between the slabs of ranks. Triangles: C-points, every eighth", fontsize=10, x=0.02, ha="left"
        )
        save(fig, path)
