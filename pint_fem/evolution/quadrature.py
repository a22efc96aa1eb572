r"""Quadrature degrees of a form, written into its integrals so that derivatives and parts of it inherit them.

Firedrake estimates the degree of a quadrature rule from the integrand that it compiles. The parts of a form, its
derivatives and its values at some coefficients have other integrands, hence other rules: with data that no rule
integrates exactly, the sum of :math:`\int u^2`, :math:`-2 \int u d` and :math:`\int d^2` can be negative, where
:math:`\int (u - d)^2` is not. With the degrees that ``assemble`` takes for the form as it is given written into its
integrals, all parts belong to one sum over quadrature points.

The estimate is UFL's, and its place in the pipeline is that of Firedrake's form compiler: integrals over the same
subdomain with the same metadata share one degree, the largest of theirs, and each block of a mixed test function has
degrees of its own.

So derivatives are exactly those of the values. Firedrake and pyadjoint estimate the degree of each derivative again:
where no rule is exact, their gradient is that of another quadrature. To compare with them give a degree,
``dx(degree=4)``.

FIAT's rules for tetrahedra, except those of degrees 1, 2 and 5, are not symmetric: their points in a cell depend on
the order of its vertices, which follows the numbering of the mesh and is another on another number of ranks in space.
Integrals of polynomials up to the degree do not change with it, all others change by as much as the rule is inexact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import ufl
from finat.ufl import MixedElement
from firedrake import parameters
from firedrake.formmanipulation import ExtractSubBlock
from ufl.algorithms import extract_arguments, extract_coefficients
from ufl.algorithms.compute_form_data import preprocess_form
from ufl.algorithms.estimate_degrees import estimate_total_polynomial_degree
from ufl.classes import Form, Integral, Zero
from ufl.protocols import id_or_none
from ufl.utils.sorting import canonicalize_metadata

__all__ = ["with_fixed_degrees"]

_UNSET = (None, "auto", "default", -1, "-1")
"""Values of ``quadrature_degree`` that leave the choice to the estimate."""
_QUADRATURE = frozenset({"Quadrature", "Boundary Quadrature"})
"""Families of elements with values at the points of a rule, which is used where no degree is given."""


def with_fixed_degrees(form: Form) -> Form:
    """The form with the quadrature degrees that Firedrake would take for it written into its integrals.

    Degrees that the user gave (``dx(degree=3)``, ``parameters["form_compiler"]["quadrature_degree"]``) stay, as do
    quadrature schemes and the rules of quadrature elements. ``assemble`` gives the same for the result as for the form.

    Parameters
    ----------
    form
        A functional, or a form with one test function, with or without Irksome's ``Dt`` replaced by a coefficient.

    Returns
    -------
    ufl.Form
        A form with the same integrands, a few of them split by subdomain or by block of a mixed test function.
    """
    integrals, blocks = form.integrals(), _blocks(form)
    degrees = [_degrees([compiled(integral) for integral in integrals], integrals) for _, compiled in blocks]
    out = []
    for i, integral in enumerate(integrals):
        found = [of[i] for of in degrees if of[i] is not None]
        if all(parts == found[0] for parts in found):
            out += [part.of(integral) for part in found[0]] if found else []
            continue
        for (mask, _), of in zip(blocks, degrees, strict=True):
            if of[i] is not None:
                out += [part.of(masked) for masked in ufl.replace(Form([integral]), mask).integrals() for part in of[i]]
    return Form(out)


def _blocks(form: Form) -> list[tuple[dict, Callable[[Integral], Form]]]:
    """The blocks that Firedrake compiles one by one, those of the fields of a mixed test function: for each the
    replacement that restricts a form to it, and a function that returns its part of an integral.
    """
    arguments = form.arguments()
    if len(arguments) != 1 or len(arguments[0].function_space()) == 1:
        return [({}, lambda integral: Form([integral]))]
    (test,) = arguments
    blocks, start = [], 0
    for number, field in enumerate(test.function_space()):
        inside = range(start, start + int(np.prod(field.value_shape)))
        mask = {test: ufl.as_vector([test[i] if i in inside else 0 for i in range(len(test))])}
        blocks.append((mask, lambda integral, k=number: ExtractSubBlock().split(Form([integral]), (k,))))
        start = inside.stop
    return blocks


class _Part(NamedTuple):
    """A multiple of an integral over some subdomains, with metadata."""

    sign: int
    subdomains: object
    metadata: dict

    def of(self, integral: Integral) -> Integral:
        """The part of an integral."""
        integrand = integral.integrand() if self.sign == 1 else -integral.integrand()
        return integral.reconstruct(integrand=integrand, subdomain_id=self.subdomains, metadata=self.metadata)


class _Term(NamedTuple):
    """An integral with its estimated degree and the functions in it; those with one place and rule share a degree."""

    integral: Integral
    degree: int | tuple[int, ...]
    functions: tuple
    place: tuple
    rule: int

    @property
    def subdomains(self) -> tuple:
        """Numbers of the subdomains, or ``"everywhere"``."""
        ids = self.integral.subdomain_id()
        return ids if isinstance(ids, tuple) else (ids,)

    def is_in(self, subdomain) -> bool:
        """Whether it contributes to what is assembled over a subdomain."""
        return subdomain in self.subdomains or self.subdomains == ("everywhere",)


def _degrees(compiled: Sequence[Form], integrals: Sequence[Integral]) -> list[list[_Part] | None]:
    """For each integral the parts with degrees that it is the sum of: one, unless the degree is not the same on all its
    subdomains; ``None`` where it vanishes.
    """
    terms = [_term(form, integral) for form, integral in zip(compiled, integrals, strict=True)]
    groups, present = defaultdict(list), defaultdict(set)
    for term in terms:
        if term is not None:
            groups[term.place, term.rule].append(term)
            present[term.place].update(set(term.subdomains) - {"everywhere"})  # these are compiled one by one
    out = []
    for term in terms:
        if term is None:
            out.append(None)
            continue
        group = groups[term.place, term.rule]
        on = lambda i, term=term, group=group: _metadata(term, [other for other in group if other.is_in(i)])
        ids = term.subdomains
        if ids == ("everywhere",):
            # everywhere with the degree of the rest, replaced on subdomains by integrals with their degree
            rest = on("everywhere")
            parts = [_Part(1, "everywhere", rest)]
            for i in sorted(present[term.place], key=str):
                if on(i) != rest:
                    parts += [_Part(-1, i, rest), _Part(1, i, on(i))]
        elif all(on(i) == on(ids[0]) for i in ids):
            parts = [_Part(1, term.integral.subdomain_id(), on(ids[0]))]
        else:
            parts = [_Part(1, i, on(i)) for i in ids]
        out.append(parts)
    return out


def _term(form: Form, integral: Integral) -> _Term | None:
    """An integral with the form that is compiled for it; ``None`` where that vanishes."""
    compiled = () if not isinstance(form, Form) else preprocess_form(form, False).integrals()
    if not compiled or isinstance(compiled[0].integrand(), Zero):
        return None
    (compiled,) = compiled
    place = (
        integral.integral_type(),
        integral.ufl_domain(),
        id_or_none(integral.subdomain_data()),
        tuple(integral.extra_domain_integral_type_map().items()),
    )
    functions = (*extract_arguments(compiled), *extract_coefficients(compiled))
    degree = estimate_total_polynomial_degree(compiled.integrand())
    return _Term(integral, degree, functions, place, hash(canonicalize_metadata(integral.metadata())))


def _metadata(term: _Term, group: Sequence[_Term]) -> dict:
    """An integral's metadata with the common degree of the group of integrals that is compiled at once."""
    given = {**parameters["form_compiler"], **term.integral.metadata()}
    metadata = dict(term.integral.metadata())
    if given.get("quadrature_degree") not in _UNSET:
        metadata["quadrature_degree"] = given["quadrature_degree"]
        return metadata
    elements = [e for other in group for f in other.functions for e in _parts(f.ufl_element())]
    rules = {(e.degree(), e.quadrature_scheme() or "default") for e in elements if e.family() in _QUADRATURE}
    if len(rules) == 1:
        ((metadata["quadrature_degree"], metadata["quadrature_rule"]),) = rules
    elif not rules:
        degree = _largest([other.degree for other in group])
        most = given.get("max_quadrature_degree")
        metadata["quadrature_degree"] = degree if most is None else min(degree, most)
    return metadata


def _parts(element) -> Sequence:
    """The elements of a mixed element, or the element itself."""
    return element.sub_elements if type(element) is MixedElement else (element,)


def _largest(degrees: Sequence) -> int | tuple[int, ...]:
    """The degree of a sum; degrees on tensor-product cells are tuples."""
    if not any(isinstance(degree, tuple) for degree in degrees):
        return max(degrees)
    size = next(len(degree) for degree in degrees if isinstance(degree, tuple))
    return tuple(map(max, zip(*(d if isinstance(d, tuple) else (d,) * size for d in degrees), strict=True)))
