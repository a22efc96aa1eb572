"""Gaussian laws of controls and of readings: priors and noise."""
