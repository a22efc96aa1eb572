"""``pint-fem check``: the steps, derivatives and transfers of a user's evolution."""

from __future__ import annotations

from collections.abc import Sequence

from mpi4py import MPI

from pint_fem.cli import last_lines, positive, waiting
from pint_fem.commands.common import named_object, parser_of
from pint_fem.errors import InputError

__all__ = ["check_command"]


def check_command(arguments: Sequence[str]) -> None:
    """Check the steps, derivatives and transfers of an evolution or a reduced functional (a small one)."""
    parser = parser_of("check", check_command.__doc__)
    parser.add_argument("problem", help="module:function of an evolution or reduced functional")
    parser.add_argument("--rtol", type=positive(float), default=1e-10, help="relative accuracy (1e-10)")
    parser.add_argument("--seed", type=positive(int, zero=True), default=0, help="of states and directions (0)")
    opts = parser.read(arguments)
    made = named_object(opts.problem, "problem")
    from pint_fem.evolution.evolution import Evolution
    from pint_fem.sweeps.checking import check_sweeps
    from pint_fem.sweeps.selection import mgrit_options
    from pint_fem.sweeps.sweeps import Sweeps

    made = made() if callable(made) and not isinstance(made, Evolution) and not hasattr(made, "problem") else made
    if isinstance(made, Evolution):
        from pint_fem.spacetime import SpaceTime

        world, space = MPI.COMM_WORLD, made.V.mesh().comm.size
        if world.size % space:
            raise InputError(f"{opts.problem}: a mesh on {space} of {world.size} ranks; give it SpaceTime().space_comm")
        sweeps = Sweeps(made, SpaceTime((space, world.size // space)), options=mgrit_options(None))
    else:
        sweeps = getattr(getattr(made, "problem", None), "sweeps", None)  # type: ignore[assignment]
        if not isinstance(sweeps, Sweeps):
            kind = type(made).__name__
            raise InputError(f"{opts.problem}: give an Evolution or TimeParallelReducedFunctional, not {kind}")
    with waiting("checking steps, derivatives and transfers"):
        passed = check_sweeps(sweeps, seed=opts.seed, rtol=opts.rtol).passed
    if not passed:
        last_lines(next_step="correct what the first line with 'failed' names; the lines after it may follow from it")
        raise SystemExit(1)
    last_lines(next_step="pint-fem plan MODULE:FUNCTION --ranks P predicts the fastest grid")
