"""Reduced functionals of evolutions with exact derivatives, parallel in time, and their minimisation.

A value goes from ``J(z)`` to a PETSc solve through these objects:

1. ``functional.ControlFunctional``: Firedrake functions become a flat array (``ControlLayout`` of ``evolution``);
2. ``problem.ReducedProblem`` (of a sum ``composed.ComposedProblem``, term by term): ``value(z)``;
3. ``evaluation.EvaluationCache``: the cached state of this control, or a solve that starts from the last trajectory;
4. ``sweeps.sweeps.Sweeps``: boundary data and right-hand sides of all steps;
5. ``mgrit.solver.MGRIT`` or ``paradiag.solver.ParaDiag``: cycles over all steps on all time ranks;
6. ``sweeps.steps``: one step of one level as the solver requires it;
7. ``propagators``: the stages of a step as a program, and ``kernels.steps``: its execution for many states at once by
   compiled kernels, or by PETSc's solvers for one state after another.

The misfits (``misfits``, summed over the trajectory by ``trajectories``) and the ``regularisation`` give the value.

* The residual of a state in all steps: ``sweeps.sweeps.Sweeps.state_residual``; of iterates: ``all_at_once``.
* The symmetric approximation of the Hessian: ``ReducedProblem.symmetric_action``.
* A NaN on one rank is noted there and becomes ``errors.SolverFailure`` on all ranks at the next norm
  (``all_at_once.failures.Failures.raise_unless``): optimisers use infinity as value and shorten the step
  (``optimize.guarded_problem``), and the next solve starts without the failed trajectory.
"""

from pint_fem.adjoint.reduced_functional import TimeParallelReducedFunctional

__all__ = ["TimeParallelReducedFunctional"]
