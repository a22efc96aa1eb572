"""Total variation of controls: the smoothed functional, its derivatives, and the primal-dual form of its Hessian."""
