"""Random step programs, and their evaluation by dense algebra of numpy."""

import numpy as np
from scipy.sparse import random_array

from pint_fem.kernels.lanes.program import STATE, StepProgram
from pint_fem.kernels.lanes.triangular import TriangularFactors
from tests.random_matrices import regular

__all__ = ["dense_steps", "random_program", "states"]


def random_program(seed, *, parts=1, sizes=(13, 9), kinds=("spd", "nonsymmetric", "saddle", "permuted")):
    """A program of every kind of operation on states of one or two parts, whose rows are mixed, and of two loads."""
    rng = np.random.default_rng([seed, parts])
    names, sizes = ["a", "b"][:parts], sizes[:parts]
    size = sum(sizes)
    rows = np.split(rng.permutation(size), np.cumsum(sizes)[:-1])
    made = StepProgram(dict(zip(names, rows, strict=True)), size)
    number = dict(zip(names, sizes, strict=True))
    whole, own = ["v", "w"], {name: f"of {name}" for name in names}
    for name in whole:
        made.copy(made.vector(name), STATE, 0.5)
    for part, name in own.items():
        made.copy(made.vector(name, [part]), STATE, 0.5, x_part=part)
    factors = {}
    for part in names:
        order = None
        for kind in rng.choice(kinds, 2):
            A, symmetric = regular(kind, number[part], seed)
            factors[part, order is None] = TriangularFactors(A, symmetric=symmetric, order=order)
            factors[part, order is None].dense = A.toarray()
            order = factors[part, True].order
    factor = lambda: rng.uniform(-0.5, 0.5)
    for _ in range(12):
        kind = rng.choice(["multiply", "solve", "copy", "blend", "zero", "clear", "load", "store", "project"])
        part, x_part = rng.choice(names, 2)
        out, x = rng.choice([STATE, *whole], 2, replace=False)
        if kind == "multiply":
            A = random_array((number[part], number[x_part]), density=0.3, rng=rng).tocsr()
            made.multiply(out, A, own[x_part], factor(), add=rng.random() < 0.5, part=part, scale=factor())
            A = random_array((number[part], number[x_part]), density=0.3, rng=rng).tocsr()
            made.multiply(own[part], A, x, factor(), add=rng.random() < 0.5, x_part=x_part)
        elif kind == "solve":
            made.solve(own[part], factors[part, rng.random() < 0.5], transposed=rng.random() < 0.5)
        elif kind == "copy":
            made.copy(out, x, factor())
            made.add(out, x, factor())
            made.copy(own[part], out, factor(), x_part=part)
            made.add(out, own[part], factor(), part=part)
        elif kind == "blend":
            made.blend(out, x, factor())
            made.exchange(x, out)
        elif kind == "zero":
            made.zero(own[part])
            made.add(own[part], out, factor(), x_part=part)
        elif kind == "clear":
            made.clear(out, rng.choice(size, rng.integers(0, size // 2), replace=False))
        elif kind in ("load", "store"):
            getattr(made, kind)(out, int(kind == "load") + 2 * int(rng.integers(2)))
        else:
            made.project(own[part], np.linalg.qr(rng.standard_normal((number[part], 2)))[0].T)
    made.load("w", 1)
    made.store("w", 0)
    made.load("v", 3)
    made.store("v", 2)
    made.add(STATE, "v", 0.3)
    made.add(STATE, "w", 0.3)
    for part in names:
        made.solve(own[part], factors[part, True])
        made.add(STATE, own[part], 0.3, part=part)
    return made


def states(seed, k, steps, n):
    """A start, what is added, and the given states number 0 to 3, of which the odd ones are loads."""
    rng = np.random.default_rng([seed, k, steps])
    u, added = rng.standard_normal((k, n)), rng.standard_normal((k, steps, n))
    return u, added, [rng.standard_normal((k, steps, n)) if i % 2 else np.full((k, steps, n), np.nan) for i in range(4)]


def dense_steps(program, u, steps, added=None, given=()):
    """The results ``(k, steps, n)`` of a program, and what it stores, by number."""
    out = np.empty((len(u), steps, program.size))
    stored = {op.what: np.empty_like(out) for op in program.operations if op.kind == "store"}
    order = np.concatenate([program.parts[part] for part in program.vectors[STATE]])
    place = np.argsort(order)
    for lane, start in enumerate(u):
        vectors = {
            name: {part: np.full(len(program.parts[part]), np.nan) for part in parts}
            for name, parts in program.vectors.items()
        }

        def get(name, part=None):
            return np.concatenate(list(vectors[name].values())) if part is None else vectors[name][part]  # noqa: B023

        def put(name, part, values):
            parts, first = vectors[name], 0  # noqa: B023
            for key in parts if part is None else [part]:
                parts[key] = values[first : first + len(parts[key])].copy()
                first += len(parts[key])

        put(STATE, None, start[order])
        for step in range(steps):
            for op in program.operations:
                value, x = get(op.out, op.part), get(op.x, op.x_part)
                if op.kind == "multiply":
                    value = op.factor * (op.what.toarray() @ x) + (op.scale * value if op.flag else 0.0)
                elif op.kind == "solve":
                    value = np.linalg.solve(op.what.dense.T if op.flag else op.what.dense, value)
                elif op.kind == "copy":
                    value = op.factor * x
                elif op.kind == "add":
                    value = value + op.factor * x
                elif op.kind == "blend":
                    value = op.factor * value + (1 - op.factor) * x
                elif op.kind == "exchange":
                    put(op.x, None, value)
                    value = x
                elif op.kind == "zero":
                    value = np.zeros_like(value)
                elif op.kind == "clear":
                    value[place[op.what]] = 0.0
                elif op.kind == "load":
                    value = (
                        value
                        if op.what >= len(given) or given[op.what] is None
                        else value + given[op.what][lane, step][order]
                    )
                elif op.kind == "store":
                    stored[op.what][lane, step] = value[place]
                else:
                    value = value - op.what * (op.what @ value)
                put(op.out, op.part, value)
            if added is not None:
                put(STATE, None, get(STATE) + added[lane, step][order])
            out[lane, step] = get(STATE)[place]
    return out, stored
