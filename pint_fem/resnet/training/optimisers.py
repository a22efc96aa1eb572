r"""Optimisers whose step on distributed parameters is not that of a network on one rank are refused before they step.

A rank has the parameters of its own layers only. An optimiser that works entry by entry (SGD, Adam, RMSprop ...) takes
the step of a network on one rank. One that sums over all parameters (LBFGS: inner products, line search) or over the
entries of a tensor (Adafactor, Muon, LAMB: norms, factors), where a tensor holds the layers of one rank, does not: its
ranks take other steps, without an error. The networks mark their parameters by :func:`mark_distributed`, and a hook
that torch calls before the step of every ``torch.optim.Optimizer`` refuses what does not fit, on all ranks alike.

How a class works is found by steps on two small tensors: those of an optimiser of both, of one optimiser for each, and
of an optimiser of one tensor that is made of both.

``torch.nn.utils.clip_grad_norm_`` cannot be detected: it takes the norm of this rank's gradients alone. Networks have
``net.clip_grad_norm_(max_norm)`` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pint_fem.errors import InputError
from pint_fem.logs import logger

__all__ = ["Coupling", "coupling", "mark_distributed", "require_local_step"]

_MARK = "_pint_fem_distributed"
_BY_NAME = {
    "LBFGS": (True, True),
    "Adafactor": (False, True),
    "Muon": (False, True),
    "SparseAdam": (False, False),  # takes sparse gradients only
}
_found: dict[type, Coupling | None] = {}
"""How classes of optimisers work, as far as they have been used; ``None``: it could not be found."""


class Coupling(NamedTuple):
    """Whether the step of an entry depends on other parameters, and on other entries of its parameter."""

    parameters: bool
    entries: bool


def mark_distributed(parameters: Iterable[torch.nn.Parameter], *, stacked: bool) -> None:
    """Mark parameters of a network whose layers more than one rank has.

    Copies of a parameter (``copy.deepcopy``) have no mark: a network that is copied marks its parameters again.

    Parameters
    ----------
    parameters
        This rank's parameters.
    stacked
        Whether one tensor holds several layers, those of this rank.
    """
    for p in parameters:
        setattr(p, _MARK, bool(stacked))


def require_local_step(optimizer: torch.optim.Optimizer) -> None:
    """Require that the step of an optimiser on this rank's parameters is that on all of them.

    Raises
    ------
    InputError
        Where it has marked parameters and sums over all parameters, or has stacked ones and sums over their entries.
    """
    marks = [getattr(p, _MARK, None) for group in optimizer.param_groups for p in group["params"]]
    if all(mark is None for mark in marks):
        return
    how, name = coupling(optimizer), type(optimizer).__name__
    if how is not None and how.parameters:
        raise InputError(
            f"optimiser {name}: it sums over all parameters, of which this rank has those of its own layers only, so "
            "ranks would take other steps than one rank: take one that works entry by entry (SGD, Adam), or minimise "
            'TrainingProblem(net, x, y) by scipy_minimize(..., "L-BFGS-B", comm=net.grid.layer_comm)'
        )
    if how is not None and how.entries and any(marks):
        raise InputError(
            f"optimiser {name}: its step of an entry depends on the other entries of the tensor, which holds the "
            "layers of this rank, so the steps would depend on the number of ranks: take one that works entry by "
            "entry (SGD, Adam), or LayerParallel, whose layers have tensors of their own"
        )


def coupling(optimizer: torch.optim.Optimizer) -> Coupling | None:
    """Find on what the step of an entry depends; ``None`` where a class cannot be tried, which is logged once."""
    kind = type(optimizer)
    if kind not in _found:
        try:
            with torch.random.fork_rng(devices=[]):
                _found[kind] = _try(kind, optimizer.defaults)
        except Exception as error:
            known = [_BY_NAME[base.__name__] for base in kind.__mro__ if base.__name__ in _BY_NAME]
            _found[kind] = Coupling(*known[0]) if known else None
            if not known:
                logger.info(
                    "optimiser %s: could not be tried (%s: %s): on several ranks it is right only if it works entry "
                    "by entry",
                    kind.__name__, type(error).__name__, error,
                )  # fmt: skip
    return _found[kind]


def _try(kind: type[torch.optim.Optimizer], defaults: dict) -> Coupling:
    """Steps of a class on small tensors, compared."""
    accepted = inspect.signature(kind.__init__).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    options = {k: v for k, v in defaults.items() if anything or k in accepted}
    fixed = {"lr": 0.1, "capturable": False, "differentiable": False}  # a schedule may begin with lr = 0
    options |= {k: v for k, v in fixed.items() if k in options}
    values = torch.linspace(-2.0, 2.0, 24, dtype=torch.float64).sin().reshape(4, 6)
    weights = torch.linspace(0.5, 3.0, 24, dtype=torch.float64).reshape(4, 6)
    make: Callable = lambda parameters: kind(parameters, **options)
    both = [slice(0, 2), slice(2, 4)]
    whole, apart = _steps(make, [[slice(0, 4)]], values, weights), _steps(make, [[b] for b in both], values, weights)
    joint, again = (_steps(make, [both], values, weights) for _ in range(2))
    if not torch.equal(joint, again):
        raise ValueError("its steps are random")
    near = lambda a, b: torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    return Coupling(not near(joint, apart), not near(whole, apart))


def _steps(make: Callable, optimisers: list[list[slice]], values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows of ``values`` after two steps towards zero, by optimisers with a parameter for each of their slices."""
    out = values.clone()
    for rows in optimisers:
        parameters = [torch.nn.Parameter(values[r].clone()) for r in rows]
        optimizer = make(parameters)

        def closure(optimizer=optimizer, parameters=parameters, rows=rows) -> torch.Tensor:
            with torch.enable_grad():
                optimizer.zero_grad()
                loss = sum((weights[r] * p**2).sum() for p, r in zip(parameters, rows, strict=True))
                loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        for p, r in zip(parameters, rows, strict=True):
            out[r] = p.detach()
    return out


register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: require_local_step(optimizer))
