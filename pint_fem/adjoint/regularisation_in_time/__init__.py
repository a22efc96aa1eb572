"""Regularisation of controls with one value per step by their rates of change."""
