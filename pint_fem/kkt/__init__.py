"""The KKT system of all steps at once: optimal control of linear evolutions, by skew-circulant preconditioners."""
