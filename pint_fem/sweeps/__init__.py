"""State, adjoint, tangent-linear and second-order adjoint sweeps: each solves all time steps of an evolution at once.

:class:`~pint_fem.sweeps.sweeps.Sweeps` poses the sweeps and :class:`~pint_fem.sweeps.time_solvers.TimeSolvers` makes
the objects that solve them. **A new time solver** is a class with the interface
:class:`~pint_fem.sweeps.time_solver.TimeSolver`, in a module of its own beside
:mod:`~pint_fem.sweeps.frequencies.solver` and :mod:`~pint_fem.sweeps.krylov`;
:meth:`~pint_fem.sweeps.time_solvers.TimeSolvers.constructors` constructs it, and
:func:`~pint_fem.sweeps.selection.read_time_solver` reads its name, one of ``selection.KINDS``, and its options.
"""
