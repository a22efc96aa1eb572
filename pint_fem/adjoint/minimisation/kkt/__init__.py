"""Minimisation by KKT systems of all steps: inverse Hessians for conjugate gradients, and when they are used."""
