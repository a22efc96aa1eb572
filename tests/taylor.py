"""Taylor remainders by pyadjoint's own ``taylor_to_dict``, at sizes that say something of derivatives."""

from firedrake.adjoint import taylor_to_dict

__all__ = ["FLOOR", "check_orders"]

FLOOR = 1e-11
"""Remainders below this part of J are none. Two solves to the same tolerance leave 1e-14 to 1e-13 of J, and an error e
of remainders R and R/8 is one of up to (1 + 8) e / (R ln 2) of the rate: 0.13 at e = 1e-13 J and R = 1e-11 J, 0.013 at
the round-off of Newton and of exact termination that the tests run at.
"""


def check_orders(rf, m, h) -> dict:
    """Orders 2.0 +- 0.05 with the gradient and 3.0 +- 0.1 with the Hessian, every rate of them; all remainders have to
    be above :data:`FLOOR`. What pyadjoint computed.
    """
    rates = taylor_to_dict(rf, m, h)
    least = FLOOR * abs(float(rf(m)))
    for name, order, tolerance in (("R1", 2.0, 0.05), ("R2", 3.0, 0.1)):
        remainders, found = rates[name]["Residual"], rates[name]["Rate"]
        assert min(remainders) > least, f"{name} {remainders} is round-off: take a longer direction"
        assert max(abs(rate - order) for rate in found) <= tolerance, f"{name}: rates {found}"
    return rates
