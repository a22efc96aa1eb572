r"""Compiled forms of a stage: its residual, matrices of first derivatives and vectors of second derivatives.

Stage ``i`` solves :math:`F(U, W, z) = 0` for ``U``. With an adjoint :math:`y` of the stage and :math:`L = F(U, W, z;
y)`, first derivatives are the matrices :math:`F_U, F_W, F_z`, and second ones, in the direction :math:`(dU, dW, dz)`,
the vectors :math:`D L_U, D L_W, D L_z` with :math:`D` the derivative in it. A matrix that depends on none of ``U``,
``W``, ``z`` and the time is assembled once for each stage coefficient and shared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import ufl
from firedrake import Cofunction, Constant, DirichletBC, Function, TestFunction, TrialFunction, derivative, replace
from firedrake.assemble import ParloopFormAssembler, get_assembler
from firedrake.functionspaceimpl import WithGeometry
from firedrake.petsc import PETSc
from ufl.algorithms import expand_derivatives

from pint_fem.evolution.evolution import Evolution
from pint_fem.evolution.private_copies import data_of
from pint_fem.evolution.tableaux import DIRK
from pint_fem.kernels.arrays import boundary_rows, get, is_real, own_size, put, split_values

__all__ = ["MatrixForm", "StageForms"]


class MatrixForm:
    """The matrix of a bilinear form that is compiled once.

    Parameters
    ----------
    form
        The bilinear form.
    moving
        Functions whose values change.
    bcs
        Conditions whose rows and columns become those of the identity.
    counts, name
        Counter of assemblies, and the name under which they are counted.
    mat_type
        Firedrake's matrix type; ``None`` for a 1-form.

    Attributes
    ----------
    empty, constant : bool
        Whether the form vanishes; whether it contains none of the moving functions.
    coefficients : set
        Functions and constants in the form.
    """

    def __init__(
        self,
        form: ufl.Form,
        moving: set,
        *,
        bcs: Sequence[DirichletBC] = (),
        counts: Counter,
        name: str,
        mat_type: str | None = "aij",
    ):
        form = expand_derivatives(form)
        self.empty = form.empty()
        coefficients = set() if self.empty else set(data_of(form))
        self.constant = not moving & coefficients
        self.coefficients, self._counts, self._name = coefficients, counts, name
        options = {} if mat_type is None else {"mat_type": mat_type}
        self._assembler = None if self.empty else get_assembler(form, bcs=bcs, **options)
        self._work = None
        self._shared: dict[float, PETSc.Mat] = {}

    def assemble(self) -> PETSc.Mat:
        """The matrix at the present values; the next call overwrites it."""
        if self._work is None:
            self._work = self._assembler.allocate()
        self._assembler.assemble(tensor=self._work)
        self._counts[self._name] += 1
        return self._work.petscmat

    def matrix(self, h: float, into: PETSc.Mat | None) -> PETSc.Mat | None:
        """A copy of the matrix at the present values, or ``None`` where the form vanishes.

        Parameters
        ----------
        h
            Coefficient of the stage; constant matrices are assembled once for each and shared.
        into
            A matrix that is overwritten by the copy, or ``None``.
        """
        if self.empty:
            return None
        if self.constant:
            if h not in self._shared:
                self._shared[h] = self.assemble().copy()
            return self._shared[h]
        matrix = self.assemble()
        if into is None:
            return matrix.copy()
        matrix.copy(into, structure=PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
        return into


class _RealColumn(MatrixForm):
    """The derivative by a real number as a matrix of one column; the first rank in space owns the number."""

    def __init__(self, F, control: Function, moving: set, *, counts: Counter):
        one = Function(control.function_space()).assign(1.0)
        super().__init__(derivative(F, control, one), moving, counts=counts, name="derivative", mat_type=None)
        self._space, self._owned = F.arguments()[0].function_space(), own_size(control.function_space())

    def assemble(self) -> PETSc.Mat:
        """The column at the present values; the next call overwrites it."""
        if self._work is None:
            self._vector = Cofunction(self._space.dual())
            sizes = ((own_size(self._space), None), (self._owned, 1))
            self._work = PETSc.Mat().createDense(sizes, comm=self._space.mesh().comm)
            self._work.setUp()
        self._work.getDenseArray()[:, 0] = get(self._assembler.assemble(tensor=self._vector))
        self._work.assemble()
        self._counts[self._name] += 1
        return self._work


class _VectorForm:
    """A 1-form that is compiled once; calls assemble it, and return zero where it vanishes."""

    def __init__(self, form: ufl.Form, space: WithGeometry):
        form = expand_derivatives(form)
        self.empty = form.empty()
        self._tensor = Cofunction(space.dual())
        self._assembler = None if self.empty else get_assembler(form)

    def __call__(self) -> np.ndarray | float:
        return 0.0 if self.empty else get(self._assembler.assemble(tensor=self._tensor))


class StageForms:
    """The forms of the stages of one level, with the functions in them.

    Parameters
    ----------
    evolution
        A private evolution.
    dirk
        Coefficients of the integrator.
    dt
        Step size of the level.

    Attributes
    ----------
    F : ufl.Form
        The residual.
    U, W, h
        Stage value, base value and coefficient ``a_ii dt`` in the residual.
    J, F_W, F_z, F_U : MatrixForm
        Derivatives by ``U`` with conditions, ``W`` and each control, and that by ``U`` without conditions, which is
        ``None`` unless controls are in boundary values.
    bc_rows : ndarray
        Own rows with a condition.
    step_sizes : ndarray
        Coefficients ``h`` of the stages.
    counts : Counter
        Assemblies of ``"residual"``, ``"jacobian"`` and ``"derivative"`` matrices.
    linear : bool
        Whether the residual is affine in ``U``.
    """

    def __init__(self, evolution: Evolution, dirk: DIRK, dt: float):
        self.evolution, self.dirk, self.dt = evolution, dirk, dt
        V = evolution.V
        self.comm = V.mesh().comm
        self.counts: Counter = Counter()
        self.controls = list(evolution.parameters)
        self.bc_rows = boundary_rows(evolution.bcs, V)
        self.U, self.W, self.y = Function(V, name="U"), Function(V, name="W"), Function(V, name="y")
        self.dU, self.dW = Function(V), Function(V)
        self.dz = [Function(z.function_space()) for z in self.controls]
        self.h, self.step_sizes = Constant(1.0), dirk.diagonal * dt
        self.F = evolution.stage_form(self.U, self.W, self.h)
        moving = {self.U, self.W, *self.controls} | ({evolution.t} if evolution.t is not None else set())
        homogeneous = [bc.reconstruct(g=0) for bc in evolution.bcs]
        matrix = lambda x, **given: MatrixForm(
            derivative(self.F, x, TrialFunction(x.function_space())), moving, counts=self.counts, **given
        )
        self.J = matrix(self.U, bcs=homogeneous, name="jacobian")
        self.linear = self.U not in self.J.coefficients
        self.F_W = matrix(self.W, name="derivative")
        self.F_z = [
            _RealColumn(self.F, z, moving, counts=self.counts)
            if is_real(z.function_space())
            else matrix(z, name="derivative")
            for z in self.controls
        ]
        self.F_U = None if evolution.boundary_controls is None else matrix(self.U, name="derivative")
        self._residual, self._tensor = get_assembler(self.F), Cofunction(V.dual())
        self._boundary: dict = {}
        self._control: np.ndarray | None = None

    @cached_property
    def second(self) -> tuple[_VectorForm, _VectorForm, list[_VectorForm]]:
        """The forms ``D L_U``, ``D L_W`` and ``D L_z`` of each control; compiled when first used."""
        L = replace(self.F, {self.F.arguments()[0]: self.y})
        pairs = [(self.U, self.dU), (self.W, self.dW), *zip(self.controls, self.dz, strict=True)]

        def along(x):
            gradient = derivative(L, x, TestFunction(x.function_space()))
            return _VectorForm(sum((derivative(gradient, w, dw) for w, dw in pairs), 0 * gradient), x.function_space())

        return along(self.U), along(self.W), [along(z) for z in self.controls]

    def update_data(self, changed: set) -> bool:
        """Discard boundary values, as data have changed; ``False`` where these are in matrices that are shared."""
        self._boundary.clear()
        matrices = [form for form in (self.J, self.F_W, self.F_U, *self.F_z) if form is not None]
        return not any(form.constant and changed & form.coefficients for form in matrices)

    # -- values --------------------------------------------------------------------------------------------------------
    def set(self, t: float, control: np.ndarray | None, stage: int) -> None:
        """Set the control of the step from ``t``, and the time and coefficient of a stage."""
        ev = self.evolution
        self._control = control
        self._put_control(control)
        if ev.t is not None:
            ev.t.assign(t + self.dirk.c[stage] * self.dt)
        self.h.assign(self.step_sizes[stage])

    def _put_control(self, vector: np.ndarray | None) -> None:
        """Assign a step's controls to their functions."""
        for z, part in zip(self.controls, self.parts(vector), strict=True):
            put(z, part)

    def _put_direction(self, vector: np.ndarray | None) -> None:
        """Assign a direction of a step's controls to its functions; ``None`` is zero."""
        for dz, part in zip(self.dz, self.parts(vector), strict=True):
            put(dz, 0.0 if part is None else part)

    def parts(self, vector: np.ndarray | None) -> list:
        """Each control's part of a step's vector of controls; ``None`` for each where that is ``None``."""
        return [None] * len(self.controls) if vector is None else split_values(vector, self.controls)

    def boundary(self, t: float, stage: int) -> np.ndarray:
        """Boundary values ``(len(bc_rows),)`` of a stage of the step from ``t``, for the control that is set.

        They are affine in the controls: interpolated once for each time unless their derivative depends on time.
        """
        controls = self.evolution.boundary_controls
        key = (float(t), stage) if self.evolution.depends_on_time else None
        if controls is not None and controls.depends_on_time:
            return self._interpolated(t, stage)
        if key not in self._boundary:
            if controls is None:
                self._boundary[key] = self._interpolated(t, stage)
            else:
                self._put_control(np.zeros(self.evolution.control_size))
                self._boundary[key] = self._interpolated(t, stage)
                self._put_control(self._control)
        values = self._boundary[key]
        return values if controls is None else values + controls.lift(self._control)[self.bc_rows]

    def _interpolated(self, t: float, stage: int) -> np.ndarray:
        """Boundary values at the time of a stage, for the values that the controls' functions have."""
        lift = Function(self.evolution.V)
        if self.evolution.t is not None:
            self.evolution.t.assign(t + self.dirk.c[stage] * self.dt)
        for bc in self.evolution.bcs:
            bc.apply(lift)
        return get(lift)[self.bc_rows]

    # -- assembled -----------------------------------------------------------------------------------------------------
    def put_state(self, W: np.ndarray, U: np.ndarray) -> None:
        """Set a stage's base value and value."""
        put(self.W, W)
        put(self.U, U)

    def residual(self, U: np.ndarray, out: PETSc.Vec) -> None:
        """Assemble ``F`` at ``U`` and the other values that are set; zero on rows with a condition, and projected where
        there is a nullspace.
        """
        put(self.U, U)
        self.counts["residual"] += 1
        if isinstance(self._residual, ParloopFormAssembler):
            # assemble() would check the tensor each time
            self._tensor.dat.zero()
            self._residual.execute_parloops(self._tensor)
        else:  # of forms with interpolations in them
            self._residual.assemble(tensor=self._tensor)
        with self._tensor.dat.vec_ro as vec:
            vec.copy(out)
        out.array[self.bc_rows] = 0
        if self.evolution.nullspace is not None:
            self.evolution.nullspace.project_source(out.array)

    def second_order(
        self,
        pair: tuple[np.ndarray, np.ndarray],
        tangent: tuple[np.ndarray, np.ndarray],
        y: np.ndarray,
        dz: np.ndarray | None,
    ) -> tuple:
        """The vectors ``D L_U``, ``D L_W`` and ``D L_z``.

        Parameters
        ----------
        pair, tangent
            Base value and value ``(W, U)`` of a stage, and their directions ``(dW, dU)``.
        y
            Adjoint of the stage.
        dz
            Direction of the controls, or ``None``.
        """
        for function, values in zip((self.W, self.U, self.dW, self.dU, self.y), (*pair, *tangent, y), strict=True):
            put(function, values)
        self._put_direction(dz)
        of_U, of_W, of_z = self.second
        return of_U(), of_W(), self.control_vector([form() for form in of_z])

    def control_vector(self, parts: list[np.ndarray | float]) -> np.ndarray:
        """A step's vector of controls ``(nz,)`` from each control's part."""
        out = np.zeros(self.evolution.control_size)
        for place, part in zip(self.parts(out), parts, strict=True):
            place[:] = part
        return out
