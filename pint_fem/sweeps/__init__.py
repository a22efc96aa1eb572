"""The state, adjoint, tangent-linear and second-order adjoint sweeps over all time steps."""
