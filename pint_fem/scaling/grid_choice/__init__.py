"""The process grid, space x time x experiments, with the least predicted time, from kernels that are measured here."""

from pint_fem.scaling.grid_choice.choice import GridChoice, choose_grid, measured_costs

__all__ = ["GridChoice", "choose_grid", "measured_costs"]
