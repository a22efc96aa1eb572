r"""Spectra of pencils :math:`A x = \kappa M x`, and products :math:`A^{-1/2} b`, by Lanczos and Arnoldi iterations with
distributed products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from firedrake.petsc import PETSc
from scipy.linalg import eigh_tridiagonal

__all__ = ["ACCURACY", "NotPositive", "Pencil", "inverse_root"]

ACCURACY = 1e-2
"""Relative accuracy of the ends of a spectrum."""
LANCZOS_STEPS, ARNOLDI_STEPS = 100, 40
"""Most steps of the iterations."""
ROOT_STEPS, ROOT_CHECK = 4000, 10
"""Most steps of the iteration for a root, and the number of steps between checks of its accuracy."""


class NotPositive(ArithmeticError):
    """A matrix is not symmetric positive definite."""


class Pencil:
    """A mass matrix on the free degrees of freedom, with which pencils are formed; fixed ones are decoupled.

    Parameters
    ----------
    M
        Symmetric positive definite, with rows and columns of the fixed ones those of the identity.
    fixed
        Own rows with a condition.
    """

    def __init__(self, M: PETSc.Mat, fixed: np.ndarray):
        self.M, self.fixed, self.comm, self.size = M, fixed, M.comm, M.getSize()[0]
        self._b, self._x = M.createVecs()
        # the mass matrix is well conditioned: some 20 products and no factorisation
        self.ksp = PETSc.KSP().create(M.comm)
        self.ksp.setOperators(M)
        self.ksp.setType("cg")
        self.ksp.getPC().setType("jacobi")
        self.ksp.setTolerances(rtol=1e-8, max_it=1000)

    def solve_mass(self, b: np.ndarray) -> np.ndarray:
        """The solution of ``M x = b``, own degrees of freedom.

        Raises
        ------
        NotPositive
            If conjugate gradients fail.
        """
        self._b.array[:] = b
        self.ksp.solve(self._b, self._x)
        if self.ksp.getConvergedReason() < 0:
            raise NotPositive
        return self._x.array_r.copy()

    def product(self, A: PETSc.Mat) -> Callable[[np.ndarray], np.ndarray]:
        """The map ``x -> A x`` on own degrees of freedom."""

        def apply(x):
            self._x.array[:] = x
            A.mult(self._x, self._b)
            return self._b.array_r.copy()

        return apply

    def ends(self, apply: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        """Ends of the spectrum of ``apply(x) = kappa M x``, symmetric; the upper one increased by its residual.

        By Lanczos iteration in the mass inner product without reorthogonalisation: copies of converged ends are
        harmless.

        Raises
        ------
        NotPositive
            If the mass matrix is not positive definite.
        """
        comm = self.comm.tompi4py()
        dot = lambda x, y: comm.allreduce(float(x @ y))
        w, alphas, betas = self._start(), [], []
        q_dual = np.zeros_like(w)
        while True:
            v = self.solve_mass(w)
            square = dot(v, w)
            if square < 0:
                raise NotPositive
            beta = square**0.5
            if alphas:
                T = np.diag(alphas) + np.diag(betas[1:], 1) + np.diag(betas[1:], -1)
                done = beta <= 1e-10 * np.abs(T).max()
                if done or len(alphas) % 5 == 0 or len(alphas) == LANCZOS_STEPS:
                    values, vectors = np.linalg.eigh(T)
                    residuals = beta * np.abs(vectors[-1, [0, -1]])
                    if done or len(alphas) == LANCZOS_STEPS or residuals.max() <= ACCURACY * np.abs(values).max():
                        return float(values[0]), float(values[-1] + residuals[1])
            elif beta == 0:
                return 0.0, 0.0
            betas.append(beta)
            q_before, q_dual, q = q_dual, w / beta, v / beta
            w = apply(q)
            alphas.append(dot(q, w))
            w = w - alphas[-1] * q_dual - (beta * q_before if len(alphas) > 1 else 0)

    def ritz(self, apply: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values of a map and their residuals, ``(k,)`` each, by Arnoldi iteration in the mass inner product."""
        comm, mass = self.comm.tompi4py(), self.product(self.M)
        n, steps = self.M.getLocalSize()[0], ARNOLDI_STEPS
        Q, H, w = np.zeros((steps + 1, n)), np.zeros((steps + 1, steps)), self._start()
        Q[0] = w / comm.allreduce(float(w @ mass(w))) ** 0.5
        for k in range(steps):
            w = apply(Q[k])
            for _ in range(2):  # the second pass corrects the cancellation of the first
                h = comm.allreduce(Q[: k + 1] @ mass(w))
                w = w - h @ Q[: k + 1]
                H[: k + 1, k] += h
            H[k + 1, k] = max(comm.allreduce(float(w @ mass(w))), 0.0) ** 0.5
            if H[k + 1, k] <= 1e-10 * np.abs(H).max():
                break
            Q[k + 1] = w / H[k + 1, k]
        values, vectors = np.linalg.eig(H[: k + 1, : k + 1])
        return values.astype(complex), H[k + 1, k] * np.abs(vectors[-1])

    def _start(self) -> np.ndarray:
        """A random vector, zero on fixed rows."""
        start = np.random.default_rng(self.comm.rank).standard_normal(self.M.getLocalSize()[0])
        start[self.fixed] = 0
        return start


def inverse_root(
    apply: Callable[[np.ndarray], np.ndarray],
    rows: np.ndarray,
    dot: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    rtol: float = 1e-10,
) -> np.ndarray:
    r"""Return :math:`A^{-1/2} b` for several vectors ``b``.

    After ``m`` steps of the Lanczos iteration that starts at ``b``, with the basis ``V`` and the tridiagonal matrix
    ``T``, the approximation is :math:`\|b\| V T^{-1/2} e_1`. Its error is at most
    :math:`\lambda_{\min}^{-1/2} \|r_m\|` with the residual of conjugate gradients for :math:`A x = b`, which follows
    from the pivots :math:`d_j` of ``T``, as does :math:`\|A^{-1/2} b\|^2 \ge \|b\|^2 (T^{-1})_{11}`:

    .. math:: \|r_m\| = \|b\| \prod_{j \le m} \beta_j / d_j, \qquad
              (T^{-1})_{11} = \sum_j (\|r_{j-1}\| / \|b\|)^2 / d_j .

    The basis is computed a second time rather than stored.

    Parameters
    ----------
    apply
        Products ``(k, n)`` of a symmetric matrix with vectors ``(k, n)``, own unknowns.
    rows
        The vectors ``b``, ``(k, n)``.
    dot
        Dot products ``(k,)`` of the rows of two arrays, summed over all ranks and identical on them.
    rtol
        Relative accuracy.

    Raises
    ------
    NotPositive
        If the matrix is not positive definite.
    ArithmeticError
        If the accuracy is not reached.

    Notes
    -----
    E. Chow, Y. Saad, Preconditioned Krylov subspace methods for sampling multivariate Gaussian distributions, SIAM J.
    Sci. Comput. 36 (2014) A588-A608. The bound follows from :math:`A^{-1/2} = \frac{2}{\pi} \int_0^\infty (A +
    s^2)^{-1} ds`, as the residual of conjugate gradients for ``A + s^2`` is a multiple of :math:`r_m` that is no longer
    than it.
    """
    norms = np.sqrt(dot(rows, rows))
    start = rows / np.where(norms > 0, norms, 1.0)[:, None]
    weights: list[np.ndarray | None] = [np.zeros(0) if norm == 0 else None for norm in norms]
    alphas, betas = np.zeros((len(rows), 0)), np.zeros((len(rows), 0))
    pivot, residual, square = np.full(len(rows), np.inf), np.ones(len(rows)), np.zeros(len(rows))
    for m, (_, alpha, beta) in enumerate(_lanczos(apply, start, dot), 1):
        missing = np.array([found is None for found in weights], dtype=bool)
        pivot = np.where(missing, alpha - (betas[:, -1] ** 2 if m > 1 else 0.0) / pivot, 1.0)
        if not (pivot > 0).all():
            raise NotPositive
        square, residual = square + residual**2 / pivot, np.where(missing, residual * beta / pivot, 0.0)
        alphas, betas = np.column_stack([alphas, alpha]), np.column_stack([betas, beta])
        for i in np.flatnonzero(missing & (residual <= rtol)):  # as lambda_min (T^-1)_11 is at most one
            if beta[i] and m % ROOT_CHECK:
                continue
            least = eigh_tridiagonal(alphas[i], betas[i, :-1], eigvals_only=True, select="i", select_range=(0, 0))[0]
            if beta[i] == 0 or residual[i] <= rtol * np.sqrt(max(least, 0.0) * square[i]):
                values, vectors = eigh_tridiagonal(alphas[i], betas[i, :-1])
                if not values[0] > 0:
                    raise NotPositive
                weights[i] = vectors @ (vectors[0] / np.sqrt(values))
        if all(found is not None for found in weights):
            break
        if m == ROOT_STEPS:
            raise ArithmeticError(f"the Lanczos iteration for a root has not converged in {m} steps")
    out, steps = np.zeros(rows.shape), max((len(w) for w in weights if w is not None), default=0)
    padded = np.array([np.pad(w, (0, steps - len(w))) for w in weights if w is not None])
    for m, (v, _, _) in zip(range(steps), _lanczos(apply, start, dot)):  # noqa: B905
        out += (norms * padded[:, m])[:, None] * v
    return out


def _lanczos(apply, start: np.ndarray, dot) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the basis vectors ``(k, n)``, the entries of ``T`` on the diagonal and those below it, ``(k,)`` each; zero
    below it, and zero vectors from there on, where the vectors span an invariant space.
    """
    before, v, beta = np.zeros_like(start), start, np.zeros(len(start))
    scale = np.zeros(len(start))
    while True:
        w = apply(v) - beta[:, None] * before
        alpha = dot(w, v)
        w -= alpha[:, None] * v
        beta = np.sqrt(np.maximum(dot(w, w), 0.0))
        scale = np.maximum(scale, np.abs(alpha) + beta)
        beta = np.where(beta <= 1e-14 * scale, 0.0, beta)
        yield v, alpha, beta
        before, v = v, np.where(beta[:, None] > 0, w, 0.0) / np.where(beta > 0, beta, 1.0)[:, None]
