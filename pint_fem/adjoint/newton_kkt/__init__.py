"""Newton's method for the KKT system of an evolution: state, control and adjoint of all steps at once."""
