"""Minimisation under equality constraints by composite steps: a matrix-free SQP method with a trust region."""
