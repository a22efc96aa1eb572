"""The systems of the frequencies by factorisations of stages, controls and multipliers together."""

from pint_fem.kkt.coupled.systems import CoupledSystems

__all__ = ["CoupledSystems"]
