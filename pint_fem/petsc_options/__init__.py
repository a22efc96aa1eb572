"""Checks of the names and types in PETSc options before a solver reads them."""
