"""Trust-region Newton-CG, unconstrained, within bounds and with constraints."""
