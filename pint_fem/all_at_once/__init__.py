"""Solves of all time steps at once: what MGRIT and ParaDiag share.

Levels and their messages, norms over time, residuals, stopping criteria, failures and traces.
"""
