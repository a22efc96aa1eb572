"""Settings shared by all tests."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("PETSC_OPTIONS", "-options_left no")  # pytest's own flags are no PETSc options

# a worker of pytest-xdist inherits what made its parent a rank: programs that tests start are to be none
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in [n for n in os.environ if n.startswith(("PMIX", "ORTE", "OMPI_APP", "OMPI_MCA_orte_", "OMPI_MCA_ess"))]:
        if name != "OMPI_MCA_orte_execute_quiet":
            del os.environ[name]
    os.environ.pop("OMPI_MCA_pmix", None)
