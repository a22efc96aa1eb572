"""Training of layer-parallel networks: modes, warm starts, regularisation, grids, deterministic optimisers, restarts."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="pint_fem.resnet needs torch (pip install 'pint_fem[resnet]')")

from mpi4py import MPI
from torch import nn

from pint_fem.errors import InputError
from pint_fem.optimize import minimize_one_shot, minimize_trust_region, scipy_minimize
from pint_fem.resnet import (
    Adaptive,
    Dense,
    Grid,
    LayerParallelResNet,
    Regularisation,
    SerialResNet,
    TrainingProblem,
    load_checkpoint,
    refine,
    save_checkpoint,
)
from pint_fem.resnet.data import peaks, shared_loader
from pint_fem.resnet.training import train_epoch
from tests.test_resnet import COMM, build, one_thread, parts, serial_copy, step  # noqa: F401

ALONE = MPI.COMM_SELF


def peaks_network(nlayers, grid=None, *, levels=1, rtol=1e-12, T=2.0, classes=5, count=60, width=4, **options):
    """A network for peaks, its full batch, all in float64."""
    torch.manual_seed(1)
    points, labels = peaks(count, classes, seed=4).tensors
    opening, closing = nn.Sequential(nn.Linear(2, width), nn.Tanh()), nn.Linear(width, classes)
    options["mgrit"] = {"levels": levels, "coarsening": 2, "rtol": rtol, **options.get("mgrit", {})}
    options = dict(final_time=T, grid=grid or Grid(), dtype=torch.float64) | options
    return LayerParallelResNet(opening, Dense(width), nlayers, closing, **options), points, labels


def problem(nlayers, grid=None, *, weights=(1e-3, 1e-3, 1e-3), inner_product="l2", **how):
    """Deterministic training of it."""
    net, x, y = peaks_network(nlayers, grid, **how)
    return TrainingProblem(net, x, y, regularisation=Regularisation(net, *weights), inner_product=inner_product)


def direction(p, seed):
    """A vector that does not depend on the ranks: parts of one of all layers."""
    rng, out = np.random.default_rng(seed), np.zeros(len(p.weights))
    net = p.net
    for q in net.stack:
        full = rng.standard_normal((net.nlayers, *q.shape[1:]))
        out[p._where(q)] = full[net.lo : net.hi].ravel()
    ends = rng.standard_normal(200)
    for module in (net.opening, net.closing):
        for q in module.parameters() if module is not None else ():
            out[p._where(q)] = ends[: q.numel()]
    return out


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(("levels", "inner"), [(1, "L2"), (3, "l2")])
def test_taylor_remainders_of_the_training_problem(levels, inner):
    """Remainders of J fall with the third power of the step, given gradient and Hessian action."""
    p = problem(11, levels=levels, rtol=1e-14, inner_product=inner)
    z, v = p.x0, direction(p, 0)
    J, g, Hv = p.value(z), p.gradient(z).copy(), p.hessian_action(z, v).copy()
    first, second = p.inner(g, v), p.inner(Hv, v)
    steps = [2e-2, 1e-2, 5e-3]
    remainders = [abs(p.value(z + e * v) - J - e * first - 0.5 * e**2 * second) for e in steps]
    rates = np.diff(np.log(remainders)) / np.log(0.5)
    assert (rates > 2.8).all(), rates
    w = direction(p, 1)
    assert p.inner(Hv, w) == pytest.approx(p.inner(p.hessian_action(z, w), v), rel=1e-10)


@pytest.mark.parallel([1, 2, 4])
def test_lbfgs_reproduces_itself(capsys):
    """Acceptance: 32 layers, full batch, L-BFGS: the same for every number of ranks and of levels."""
    def run(grid, levels):
        p = problem(32, grid, levels=levels, rtol=1e-13)
        result = scipy_minimize(p, p.x0, "L-BFGS-B", comm=p.net.grid.layer_comm, options={"maxiter": 12})
        return p, result, p.value(result.x)

    p, here, J = run(Grid(), 4)
    factors = {name: result.factor for name, result in p.net.results.items()}
    _, alone, J1 = run(Grid(comm=ALONE), 4)
    _, serial, J2 = run(Grid(comm=ALONE), 1)
    with capsys.disabled():
        if COMM.rank == 0:
            print(f"\n  residual factors on {COMM.size} ranks: forward {factors['forward']:.3f}, backward {factors['backward']:.3f}")
    assert all(f < 0.3 for f in factors.values())
    assert J == pytest.approx(J1, rel=1e-12)
    assert pytest.approx(J2, rel=1e-8) == J
    assert here.nit == alone.nit == serial.nit
    assert J < 0.9 * problem(32, Grid(comm=ALONE)).value(problem(32, Grid(comm=ALONE)).x0)
