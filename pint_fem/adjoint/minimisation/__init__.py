"""Minimisation of a reduced functional in the inner product of its controls.

A call ``J.minimize_trust_region()`` (:mod:`~pint_fem.adjoint.minimisation.minimisable`) makes an ``Objective``, which
evaluates ``J`` and its derivatives on flat arrays and turns dual vectors into Riesz representatives, and passes it to
:func:`pint_fem.optimize.minimize_trust_region`. There a ``GuardedProblem`` counts, checks and calls its methods
collectively, an oracle chooses their accuracy, and conjugate gradients call the oracle: a product with the Hessian passes
``SteihaugPath``, oracle, ``GuardedProblem``, ``Objective`` and the reduced problem. A further optional method of
problems is one line of :data:`pint_fem.optimize.protocol.RETURNS`, a method of ``Objective`` and its use.
"""
