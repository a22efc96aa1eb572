"""Which cases of a test run on several ranks, where each costs as many processes; the environment of MPI programs."""

import os

from mpi4py import MPI


def cases(all_of_them, *, on_ranks):
    """All cases on one rank, those that exercise the ranks on several: for ``pytest.mark.parametrize``."""
    return list(all_of_them if MPI.COMM_WORLD.size == 1 else on_ranks)


def program_environment():
    """The environment for a program that starts MPI, without what MPI has set for this process."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_COMM", "OMPI_UNIVERSE", "PMIX", "ORTE"))}
