"""PETSc options: their names and types, checked before a solver reads them."""
