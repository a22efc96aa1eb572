r"""Full-batch training as an optimisation constrained by an evolution, for the optimisers of :mod:`pint_fem.optimize`.

The control is the vector of all parameters, the state the batch in all layers, and
:math:`J(\theta) = \ell(u_N) + R(\theta)`. A rank has the part of a vector that belongs to its layers, to the opening
layer on the first rank and to the classification layer on the last. A Hessian action takes a tangent and a second
backward sweep. With
:math:`\delta z_n = L_n \delta u_n + \delta L_n u_n + \delta b_n`,

.. math::
    \delta u_{n+1} &= \delta u_n + h\, \sigma'(z_n)\, \delta z_n , \\
    \mu_n &= \Phi_{n,u}^T \mu_{n+1} + h \big[ \delta L_n^T (\sigma' \lambda_{n+1})
              + L_n^T (\sigma'' \delta z_n \lambda_{n+1}) \big] ,

from the derivative of the loss's gradient for :math:`\mu_N`, and layer :math:`n` has
:math:`h\, [\partial_\theta (\sigma' \mu_{n+1} + \sigma'' \delta z_n \lambda_{n+1},\, L_n u_n + b_n)
+ \partial_\theta (\sigma' \lambda_{n+1},\, L_n \delta u_n)]`. Right-hand sides and gradients are batched calls over all
own layers. The one-shot method takes one cycle forward and one backward per design, from the iterates of the last ones
(Günther, Ruthotto, Schroder, Cyr, Gauger, arXiv:1812.04352).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from pint_fem.all_at_once.norms import gather_in_order
from pint_fem.collective import all_ranks, collectively, require_same
from pint_fem.errors import InputError, SolverFailure, release
from pint_fem.resnet.network import LayerParallelResNet
from pint_fem.resnet.parallel.agreement import comparable
from pint_fem.resnet.regularisation import Regularisation

__all__ = ["TrainingProblem"]

_ONE_SHOT = "one-shot"
"""Name of the batch whose C-points the one-shot method starts from."""


class TrainingProblem:
    """The training of a network on one batch, as a :class:`pint_fem.optimize.Problem` for its optimisers.

    Parameters
    ----------
    net
        The network, in float64. Its numbers of cycles do not apply: values and gradients are computed up to its
        tolerance, or exactly with ``levels=1``.
    x, y
        The whole batch and its labels (or targets), the same on all ranks that share the layers.
    loss
        ``loss(outputs, y)``, a scalar, twice differentiable.
    regularisation
        Added to the loss.
    inner_product
        ``"l2"`` of the parameters, or ``"L2"``: layers weighted with ``h``, as functions of depth.

    Attributes
    ----------
    layout : list of (Parameter, slice)
        Places of the parameters in a vector.
    weights : ndarray
        Diagonal of the inner product's matrix.
    comm : mpi4py communicator
        All ranks of the network, which evaluate and decide collectively.
    failure : SolverFailure or None
        Why the last value was infinite.
    counts : dict
        Number of calls by kind.

    Raises
    ------
    InputError
        On every rank, on a network in float32, with several data groups, or where ranks are given different batches.
    """

    def __init__(
        self,
        net: LayerParallelResNet,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        loss: Callable = nn.functional.cross_entropy,
        regularisation: Regularisation | None = None,
        inner_product: str = "l2",
    ):
        if net.dtype != torch.float64:
            raise InputError("deterministic training requires float64: build the network with dtype=torch.float64")
        if net.grid.data_size > 1:
            raise InputError("deterministic training of one full batch: put all ranks in the layers (grid 1xP)")
        if inner_product not in ("l2", "L2"):
            raise InputError(f"inner_product {inner_product!r}: give 'l2' or 'L2'")
        require_same(net.grid.comm, x=comparable(x), y=comparable(y))
        self.net, self.x, self.y, self.loss, self.regularisation = net, x, y, loss, regularisation
        self.layout, start = [], 0
        for p in net.parameters():
            self.layout.append((p, slice(start, start + p.numel())))
            start += p.numel()
        self.weights = np.ones(start)
        if inner_product == "L2":
            for p in net.stack:
                self.weights[self._where(p)] = net.h
        self.comm = net.grid.comm
        self.failure: SolverFailure | None = None
        self._z: np.ndarray | None = None
        self._cache: dict = {}  # results at the present parameters
        self.counts = {"value": 0, "gradient": 0, "hessian": 0, "advance": 0}

    # -- vectors -------------------------------------------------------------------------------------------------------
    def _where(self, parameter: nn.Parameter) -> slice:
        """Place of a parameter in a vector."""
        return next(where for p, where in self.layout if p is parameter)

    @property
    def x0(self) -> np.ndarray:
        """The present parameters of the network as a vector."""
        return self._join([p for p, _ in self.layout])

    def _join(self, tensors) -> np.ndarray:
        """Vector of tensors in the order of the layout; ``None`` stands for zero."""
        out = np.zeros(len(self.weights))
        for (_, where), t in zip(self.layout, tensors, strict=True):
            if t is not None:
                out[where] = t.detach().numpy().reshape(-1)
        return out

    def _split(self, z: np.ndarray) -> list[torch.Tensor]:
        """Tensors of a vector, with the shapes of the parameters."""
        return [torch.from_numpy(np.array(z[where], dtype=float)).reshape(p.shape) for p, where in self.layout]

    def set(self, z: np.ndarray) -> None:
        """Set the parameters of the network from a vector."""
        with torch.no_grad():
            for (p, _), values in zip(self.layout, self._split(z), strict=True):
                p.copy_(values)

    def _move(self, z: np.ndarray) -> None:
        """Set the parameters and invalidate the cache, unless they are the present ones on all ranks (collective)."""
        z = np.asarray(z, dtype=float)
        unchanged = self._z is not None and np.array_equal(z, self._z) and np.array_equal(z, self.x0)
        if not all_ranks(self.comm, unchanged):
            self.set(z)
            self._cache = {}
        self._z = z.copy()

    def _parts(self, tensors: list) -> tuple[list, list, list]:
        """Tensors, given by the layout: those of the own layers, of the opening and of the classification layer."""
        index = {id(p): i for i, (p, _) in enumerate(self.layout)}
        pick = lambda parameters: [tensors[index[id(p)]] for p in parameters]
        ends = [pick(m.parameters()) for m in (self.net.opening, self.net.closing)]
        return pick(self.net.stack), *ends

    # -- value and gradient --------------------------------------------------------------------------------------------
    def inner(self, a: np.ndarray, b: np.ndarray) -> float:
        """Inner product of two vectors, bitwise independent of the number of ranks (collective)."""
        net, product = self.net, self.weights * a * b
        own = np.zeros(net.hi - net.lo)
        for p in net.stack:
            own += product[self._where(p)].reshape(len(p), -1).sum(axis=1)
        ends = np.zeros(2)
        for i, module in enumerate((net.opening, net.closing)):
            for p in module.parameters() if module is not None else ():
                ends[i] += product[self._where(p)].sum()
        rows = np.concatenate([ends[:1]] * net.grid.is_first + [own] + [ends[1:]] * net.grid.is_last)
        return float(gather_in_order(rows, net.grid.layer_comm).sum())

    def _evaluate(self, cycles: int | None, **how: Any) -> tuple[float, np.ndarray | None]:
        """J and its gradient by the network's autograd, with a number of cycles or, for ``None``, up to the tolerance.

        Where the propagation fails, J is infinite, the gradient ``None`` and ``failure`` the reason.
        """
        net, sweeps = self.net, (self.net.forward_sweeps, self.net.backward_sweeps)
        before = [(s.cycles, s.adaptive) for s in sweeps]
        self.failure = None
        try:
            for s in sweeps:
                s.cycles, s.adaptive = cycles, None
            net.zero_grad()
            total = collectively(self.comm, "loss", self.loss, net(self.x, **how), self.y)
            if self.regularisation is not None:
                total = total + self.regularisation()
            net.collective.backward(total)
        except SolverFailure as failure:
            release(failure)
            self.failure = failure
            return math.inf, None
        finally:
            for s, (number, rule) in zip(sweeps, before, strict=True):
                s.cycles, s.adaptive = number, rule
        return total.item(), self._join([p.grad for p, _ in self.layout]) / self.weights

    def _solve(self) -> None:
        """Value and gradient up to the tolerance, cached."""
        if "value" not in self._cache:
            self._cache["value"], self._cache["gradient"] = self._evaluate(None)

    def value(self, z: np.ndarray) -> float:
        """J; infinite where the propagation overflows (collective)."""
        self.counts["value"] += 1
        self._move(z)
        self._solve()
        return self._cache["value"]

    def gradient(self, z: np.ndarray) -> np.ndarray:
        """Riesz representative of J'; NaN where J is infinite (collective)."""
        self.counts["gradient"] += 1
        self._move(z)
        self._solve()
        found = self._cache["gradient"]
        return np.full_like(self.weights, np.nan) if found is None else found

    def advance(self, z: np.ndarray) -> tuple[float, np.ndarray, float]:
        """One cycle forward and one backward from the last iterates, for the one-shot method (collective).

        Returns
        -------
        value : float
        gradient : ndarray
        residual : float
            The larger of the relative residuals of both sweeps.
        """
        self.counts["advance"] += 1
        self._move(z)
        warm_starts = dict(self.net.warm_starts)
        value, gradient = self._evaluate(1, batch=_ONE_SHOT)
        if gradient is None:
            self.net.warm_starts = warm_starts
            return math.inf, np.zeros_like(self.weights), math.inf
        return value, gradient, max(result.relative_residual for result in self.net.results.values())

    # -- second derivatives --------------------------------------------------------------------------------------------
    def _linearise(self) -> dict:
        """State, slopes and adjoint at the present parameters, cached for Hessian actions."""
        if "trajectory" in self._cache:
            return self._cache
        net, grid, layer, found = self.net, self.net.grid, self.net.layer, {}

        def first_state() -> np.ndarray | None:
            if not grid.is_first:
                return None
            found["x0"] = layer.pack(net.opening(self.x.to(net.dtype)))
            return np.ascontiguousarray(found["x0"].detach().numpy())

        u0 = collectively(self.comm, "opening layer", first_state)
        shape = grid.layer_comm.bcast(None if u0 is None else u0.shape, root=0)
        trajectory = found["trajectory"] = net.sweeps.trajectory(shape, np.float64, curvatures=True)
        net.sweeps.forward(net.stack, u0, trajectory)
        found["slope"], found["curvature"] = trajectory.slopes, layer.activation.curvatures(trajectory.records)

        def last_adjoint() -> np.ndarray | None:
            if not grid.is_last:
                return None
            u = found["last"] = torch.from_numpy(trajectory.U[-1].copy()).requires_grad_()
            value = self.loss(net.closing(layer.unpack(u, len(self.x))), self.y)
            found["into"] = [u, *net.closing.parameters()]
            found["loss_gradient"] = torch.autograd.grad(value, found["into"], create_graph=True)
            return found["loss_gradient"][0].detach().contiguous().numpy()

        last = collectively(self.comm, "loss", last_adjoint)
        _, L = net.sweeps.adjoint(trajectory, last, None)
        found["lambda"] = torch.from_numpy(L[::-1].copy())
        self._cache |= found
        return self._cache

    def hessian_action(self, z: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Riesz representative of J''(z) v (collective)."""
        self.counts["hessian"] += 1
        self._move(z)
        net, grid, layer, h = self.net, self.net.grid, self.net.layer, self.net.h
        cache, act = self._linearise(), layer.activation
        d_theta, d_open, d_close = self._parts(self._split(np.asarray(v)))
        trajectory, slope, curvature = cache["trajectory"], cache["slope"], cache["curvature"]
        U, lam = torch.from_numpy(trajectory.U[:-1]), cache["lambda"][1:]
        with torch.no_grad():
            dz = layer.linear(d_theta, U, torch.empty_like(slope), 1.0)
            own, d_own = (layer.of_activation(theta) for theta in (trajectory.theta, d_theta))
            forcing = slope * dz + act.along(trajectory.records, own, d_own)
            work = self._tangent_of_opening if grid.is_first else lambda *_: None
            first = collectively(self.comm, "derivative of the opening layer", work, d_open)
            V = net.sweeps.tangent(trajectory, first, (h * forcing).numpy())
            dU = torch.from_numpy(V[:-1])
            no_bias = (trajectory.theta[0], torch.zeros_like(trajectory.theta[1]))
            dz += layer.linear(no_bias, dU, torch.empty_like(slope), 1.0)
            bent, of_own = act.second(curvature, trajectory.records, own, lam, dz, d_own)
            straight = slope * lam
            G = layer.adjoint(d_theta, straight, torch.zeros_like(slope), h, torch.empty_like(slope))
            G = layer.adjoint(trajectory.theta, bent, G, h, torch.empty_like(slope))

        def second_of_loss() -> list[torch.Tensor]:
            if not grid.is_last:
                return [None]
            direction = [torch.from_numpy(V[-1].copy()), *d_close]
            return self._derivative_along(cache["loss_gradient"], direction, cache["into"])

        last, *ends = collectively(self.comm, "second derivative of the loss", second_of_loss)
        last = None if last is None else last.contiguous().numpy()
        with torch.no_grad():
            _, M = net.sweeps.adjoint(trajectory, last, np.ascontiguousarray(G.numpy()[::-1]))
            mu = torch.from_numpy(M[::-1])
            one = layer.gradients(slope * mu[1:] + bent, U)
            two = layer.gradients(straight, dU)
            two[-1].zero_()  # the bias enters z alone, not L du
            one += act.gradients(trajectory.records, own, mu[1:])
            of_layers = [h * (a + b) for a, b in zip(one, [*two, *of_own], strict=True)]
        work = self._second_of_opening if grid.is_first else lambda *_: []
        where = "second derivative of the opening layer"
        of_opening = collectively(self.comm, where, work, d_open, cache["lambda"][0], mu[0])
        out = self._assemble(of_layers, of_opening, ends)
        if self.regularisation is not None:
            _, r_layers, r_ends = self.regularisation.evaluate(d_theta, d_close)
            out += self._assemble(r_layers, [None] * len(of_opening), r_ends)
        return out / self.weights

    def _assemble(self, layers: list, opening: list, closing: list) -> np.ndarray:
        """Vector of tensors of the own layers, of the opening and of the classification layer."""
        net = self.net
        found = {id(p): g for p, g in zip(net.stack, layers, strict=True)}
        for module, values in ((net.opening, opening), (net.closing, closing)):
            for p, g in zip(module.parameters(), values, strict=True) if module is not None else ():
                found[id(p)] = g
        return self._join([found[id(p)] for p, _ in self.layout])

    @staticmethod
    def _derivative_along(gradients, direction, into) -> list[torch.Tensor]:
        """Derivatives of ``sum (gradients, direction)`` with respect to ``into``; zero where there is no dependence."""
        product = sum((g * d).sum() for g, d in zip(gradients, direction, strict=True))
        if not product.requires_grad:
            return [torch.zeros_like(t) for t in into]
        out = torch.autograd.grad(product, into, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(out, into, strict=True)]

    def _tangent_of_opening(self, direction: list[torch.Tensor]) -> np.ndarray:
        """Derivative of the first state along a direction of the opening layer's parameters."""
        net = self.net
        names = [name for name, _ in net.opening.named_parameters()]
        values = [p.detach() for p in net.opening.parameters()]

        def state(*parameters):
            opened = torch.func.functional_call(
                net.opening, dict(zip(names, parameters, strict=True)), (self.x.to(net.dtype),)
            )
            return net.layer.pack(opened)

        if not values:
            return np.zeros(self._cache["trajectory"].U.shape[1:])
        return torch.func.jvp(state, tuple(values), tuple(direction))[1].contiguous().numpy()

    def _second_of_opening(self, direction, lam: torch.Tensor, mu: torch.Tensor) -> list[torch.Tensor]:
        """The opening layer's part of a Hessian action, from the first adjoints of both orders."""
        parameters = list(self.net.opening.parameters())
        if not parameters:
            return []
        x0 = self._cache["x0"]
        gradients = torch.autograd.grad((lam * x0).sum(), parameters, create_graph=True)
        second = self._derivative_along(gradients, direction, parameters)
        first = torch.autograd.grad((mu * x0).sum(), parameters, retain_graph=True)
        return [a + b for a, b in zip(first, second, strict=True)]
