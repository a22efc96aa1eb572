"""Taylor remainders by pyadjoint's own ``taylor_to_dict``, at sizes that say something of derivatives."""

from firedrake.adjoint import taylor_to_dict

__all__ = ["FLOOR", "check_orders"]

FLOOR = 1e-12
"""Remainders have to be above this part of J. Round-off, of Newton's method and of exactly terminated cycles too,
leaves about 1e-15 of J (rates get lost at remainders of 3e-15). An error e of the remainders R and R/8 is one of up to
(8 + 1) e / (R ln 2) of the rate: 0.013 at e = 1e-15 and R = 1e-12.
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
