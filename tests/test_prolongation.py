"""The matrix that interpolates a space on the next finer mesh: fields of the coarse space stay what they are."""

from itertools import permutations, product

import numpy as np
import pytest
from firedrake import (
    ExtrudedMeshHierarchy,
    Function,
    FunctionSpace,
    Mesh,
    MeshHierarchy,
    SpatialCoordinate,
    UnitSquareMesh,
    VectorFunctionSpace,
    as_vector,
    assemble,
    curl,
    div,
    dx,
    grad,
    inner,
    rot,
)
from firedrake.mesh import plex_from_cell_list
from firedrake.mg.interface import assemble_prolongation_aij
from mpi4py import MPI

from pint_fem.errors import InputError
from pint_fem.kernels import prolongation as prolongation_module
from pint_fem.kernels.arrays import get, own_size, put
from pint_fem.kernels.prolongation import cell_averages, prolongation

SIMPLE = {"partitioner_type": "simple"}
NODAL = [("CG", 1), ("CG", 2), ("DG", 0), ("DG", 1), ("vector", 1)]
PIOLA = [("N1curl", 1), ("N1curl", 2), ("RT", 1), ("RT", 2), ("N2curl", 1), ("BDM", 1)]
MESHES = {}


def meshes(dim, refinements=1):
    """A hierarchy on a sheared and reflected box: no right angles, no equal edges, negative determinants."""
    if (dim, refinements) not in MESHES:
        shape = (3, 2, 1)[:dim] if dim == 2 else (2, 1, 1)
        shear = np.array([[1.1, 0.3, 0.2], [-0.2, -0.7, 0.1], [0.1, 0.2, 0.9]])[:dim, :dim]
        points = np.array(list(product(*(range(n + 1) for n in shape))), dtype=float)
        number = {tuple(point): index for index, point in enumerate(points)}
        cells = []
        for corner, order in product(product(*map(range, shape)), permutations(range(dim))):
            path = np.cumsum([corner, *np.eye(dim)[list(order)]], axis=0)
            cells.append([number[tuple(point)] for point in path])
        plex = plex_from_cell_list(dim, np.array(cells, dtype=np.int32), points @ shear, MPI.COMM_WORLD)
        MESHES[dim, refinements] = MeshHierarchy(Mesh(plex, distribution_parameters=SIMPLE), refinements)
    return MESHES[dim, refinements]


def space(mesh, family, degree):
    return VectorFunctionSpace(mesh, "CG", degree) if family == "vector" else FunctionSpace(mesh, family, degree)


def field(V, family, degree):
    """A polynomial in the space on any mesh."""
    x = SpatialCoordinate(V.mesh())
    bilinear = 1 + 2 * x[0] - 3 * x[1]
    power = degree - 1 if family in ("N1curl", "RT") else degree
    if not V.value_shape:
        return bilinear**degree
    constant = as_vector([2.0, -1.0, 0.5][: len(x)])
    value = constant * bilinear**power
    if family == "RT":
        value += x * x[1] ** power
    if family == "N1curl":
        a = as_vector([1.0, 2.0, -1.0])
        turned = (
            as_vector((-x[1], x[0]))
            if len(x) == 2
            else as_vector((a[1] * x[2] - a[2] * x[1], a[2] * x[0] - a[0] * x[2], a[0] * x[1] - a[1] * x[0]))
        )
        value += turned * x[1] ** power
    return value


def of_random(V, seed=0):
    """A function of random coefficients, the same on any number of ranks only in distribution."""
    f = Function(V)
    put(f, np.random.default_rng(seed + V.comm.rank).standard_normal(own_size(V)))
    return f


def prolonged(P, u, V):
    f = Function(V)
    with u.dat.vec_ro as x, f.dat.vec_wo as y:
        P.mult(x, y)
    return f


def check(family, degree, dim, monkeypatch):
    """A polynomial is interpolated exactly; integrals of any function of the space stay the same."""
    monkeypatch.setattr(prolongation_module, "assemble_prolongation_aij", None)  # no entry is Firedrake's
    coarse, fine = meshes(dim)
    V, W = space(fine, family, degree), space(coarse, family, degree)
    P = prolongation(W, V)
    assert P.getSizes() == ((own_size(V), V.dim()), (own_size(W), W.dim()))
    f, g = (Function(S).interpolate(field(S, family, degree)) for S in (V, W))
    assert np.abs(get(prolonged(P, g, V)) - get(f)).max(initial=0) < 1e-12
    u = of_random(W)
    square = lambda w: assemble(SpatialCoordinate(w.function_space().mesh())[0] ** 2 * inner(w, w) * dx)
    expected = square(u)
    assert abs(square(prolonged(P, u, V)) - expected) < 1e-12 * expected


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize(("family", "degree"), NODAL + PIOLA)
def test_functions_of_the_coarse_space_stay_what_they_are(family, degree, dim, monkeypatch):
    check(family, degree, dim, monkeypatch)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(("family", "degree", "dim"), [("CG", 2, 2), ("N1curl", 2, 3), ("RT", 2, 2), ("vector", 1, 3)])
def test_they_do_on_several_ranks(family, degree, dim, monkeypatch):
    check(family, degree, dim, monkeypatch)


@pytest.mark.parametrize(("family", "degree"), [*NODAL, ("N1curl", 2)])
def test_entries_are_those_of_firedrake(family, degree):
    """Which assembles this for each mesh by locating points; for Raviart-Thomas elements it may reuse the code of
    Nedelec elements, whose degrees of freedom belong to the same entities in the plane.
    """
    coarse, fine = meshes(2)
    V, W = space(fine, family, degree), space(coarse, family, degree)
    difference = prolongation(W, V) - assemble_prolongation_aij(W, V).petscmat
    assert difference.norm() < 1e-12


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("dim", [2, 3])
def test_interpolation_commutes_with_derivatives(dim, degree):
    """grad, curl and div of the interpolated function are the interpolated grad, curl and div."""
    coarse, fine = meshes(dim)
    steps = [("CG", grad, ("N1curl", degree)), ("RT", div, ("DG", degree - 1))]
    steps.append(("N1curl", rot, ("DG", degree - 1)) if dim == 2 else ("N1curl", curl, ("RT", degree)))
    for family, derivative, image in steps:
        (Vf, Vc), (Wf, Wc) = ([FunctionSpace(m, *e) for m in (fine, coarse)] for e in ((family, degree), image))
        u = of_random(Vc)
        first = Function(Wf).interpolate(derivative(prolonged(prolongation(Vc, Vf), u, Vf)))
        then = prolonged(prolongation(Wc, Wf), Function(Wc).interpolate(derivative(u)), Wf)
        assert np.abs(get(first) - get(then)).max(initial=0) < 1e-11 * np.abs(get(then)).max(initial=1)


def test_what_is_no_successive_pair_is_refused():
    hierarchy = meshes(2, 2)
    spaces = [FunctionSpace(mesh, "N1curl", 1) for mesh in hierarchy]
    for pair in (
        (spaces[0], spaces[2]),
        (spaces[1], spaces[0]),
        (FunctionSpace(UnitSquareMesh(1, 1), "N1curl", 1),) * 2,
    ):
        with pytest.raises(InputError, match="successive meshes"):
            prolongation(*pair)
    with pytest.raises(InputError, match="same element"):
        prolongation(FunctionSpace(hierarchy[0], "CG", 1), FunctionSpace(hierarchy[1], "CG", 2))


def test_what_is_not_known_is_refused():
    """Moments on quadrilaterals, and extruded meshes; nodal values on quadrilaterals are known."""
    flat = MeshHierarchy(UnitSquareMesh(2, 2, quadrilateral=True), 1)
    extruded = ExtrudedMeshHierarchy(MeshHierarchy(UnitSquareMesh(1, 1), 1), 1, base_layer=1)
    for hierarchy, element in ((flat, ("RTCE", 1)), (flat, ("RTCF", 1)), (extruded, ("CG", 1))):
        coarse, fine = (FunctionSpace(mesh, *element) for mesh in hierarchy)
        with pytest.raises(InputError, match="meshes of simplices only"):
            prolongation(coarse, fine)
        with pytest.raises(InputError, match="no projection"):
            cell_averages(coarse, fine)
    coarse, fine = (FunctionSpace(mesh, "CG", 2) for mesh in flat)
    assert (prolongation(coarse, fine) - assemble_prolongation_aij(coarse, fine).petscmat).norm() < 1e-12


def test_averages_of_polynomials():
    """Those of one degree less than the element's are kept, where cells meet, too."""
    coarse, fine = meshes(2)
    for family, degree in PIOLA:
        W, V = (FunctionSpace(mesh, family, degree) for mesh in (coarse, fine))
        x, y = (as_vector([(1 + 2 * z[0] - z[1]) ** (degree - 1), 2.0]) for z in map(SpatialCoordinate, (coarse, fine)))
        f, g = Function(V).interpolate(y), Function(W).interpolate(x)
        assert np.abs(get(prolonged(cell_averages(W, V), f, W)) - get(g)).max() < 1e-12
