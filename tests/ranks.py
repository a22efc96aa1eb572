"""Which cases of a test run on several ranks, where each costs as many processes."""

from mpi4py import MPI


def cases(all_of_them, *, on_ranks):
    """All cases on one rank, those that exercise the ranks on several: for ``pytest.mark.parametrize``."""
    return list(all_of_them if MPI.COMM_WORLD.size == 1 else on_ranks)
