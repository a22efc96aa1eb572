"""Tables of options and the help of programs, taken from the code when the site is built."""

import contextlib
import inspect
import io
from dataclasses import fields

from docutils import nodes
from docutils.statemachine import StringList
from numpydoc.docscrape import NumpyDocString
from sphinx.util.docutils import SphinxDirective

KKT = {
    "ksp_type": "Krylov method: ``fgmres``, ``gmres``, or ``minres`` for misfits of the whole state at all steps",
    "ksp_rtol": "tolerance relative to the right-hand side's norm of coefficients",
    "ksp_atol": "absolute tolerance",
    "ksp_max_it": "largest number of iterations",
    "ksp_gmres_restart": "directions after which GMRES restarts",
}


def described(cls):
    """Descriptions of the parameters of a class by name."""
    found = {}
    for entry in NumpyDocString(inspect.cleandoc(cls.__doc__))["Parameters"]:
        for name in entry.name.split(","):
            found[name.strip()] = " ".join(line.strip() for line in entry.desc)
    return found


def accepted(cls, name):
    """The values that an option takes, in words."""
    if name in cls.choices:
        choices = cls.choices[name]
        text = ", ".join("``true``" if c is True else "``false``" if c is False else f"``{c}``" for c in choices)
    elif name in cls.counts:
        text = f"whole number, at least {cls.counts[name]}"
    elif name in cls.numbers:
        text = "number"
    else:
        text = {"coarsening": "``8,4``, or C-points ``0:4:8``", "relax": "``F``, ``FCF``, ...; ``FCF,F``",
                "c_weight": "numbers, ``1.0``", "trace": "name of a file"}.get(name, "")  # fmt: skip
    return f"{text}, ``none``" if name in cls.optional else text


def option_rows(cls, prefix):
    """Rows of a table: name on the command line, default, accepted values, description."""
    from pint_fem.all_at_once.options import SolverOptions

    texts = {**described(SolverOptions), **{k: v for k, v in described(cls).items() if "Those of" not in v}}
    defaults = {f.name: f.default for f in fields(cls)}
    for name in cls.names():
        default = defaults[name]
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        shown = {None: "none", True: "true", False: "false", "": ""}.get(default, default) if not isinstance(
            default, (int, float)) or isinstance(default, bool) else f"{default:g}"  # fmt: skip
        yield f"``-{prefix}{name}``", f"``{shown}``" if shown != "" else "", accepted(cls, name), texts[name]


class SolverOptionTable(SphinxDirective):
    """``.. solver-options:: mgrit | paradiag | kkt``: all options of a time solver with their defaults."""

    required_arguments = 1

    def run(self):
        """Make the table."""
        which = self.arguments[0]
        if which == "mgrit":
            from pint_fem.mgrit.options import MGRITOptions as cls
        elif which == "paradiag":
            from pint_fem.paradiag.options import ParaDiagOptions as cls
        else:
            from pint_fem.kkt.petsc import _DEFAULTS

            return self.table((f"``-kkt_{n}``", f"``{v}``", "PETSc's", KKT[n]) for n, v in _DEFAULTS.items())
        return self.table(option_rows(cls, f"{which}_"))

    def table(self, rows):
        """A list-table, parsed as reStructuredText."""
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 22 12 22 44", "   :class: options", ""]
        for row in (("option", "default", "values", "meaning"), *rows):
            lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
        holder = nodes.Element()
        self.state.nested_parse(StringList(lines, source="options"), 0, holder)
        return holder.children


class FunctionalOptionTable(SolverOptionTable):
    """``.. functional-options::``: entries of a functional's ``solver_parameters``."""

    required_arguments = 0

    def run(self):
        """Make the table; the names are those that the code reads."""
        from pint_fem.sweeps.selection import KINDS, READ

        rows = {
            "time_solver": (
                "``mgrit``",
                ", ".join(f"``{kind}``" for kind in KINDS),
                "``auto`` chooses the fastest one by measured times of a step and predicted cycles; it prints it",
            ),
            "typical_rtol": (
                "",
                "number",
                "relative tolerance of most solves, for ``auto``: 1e-2 with an inexact minimiser; default: between "
                "``rtol`` and its square root",
            ),
            "mgrit": ("", "dictionary", "options of MGRIT, above"),
            "paradiag": ("", "dictionary", "options of ParaDiag, above"),
        }
        if set(rows) != set(READ):
            raise self.error(f"entries of solver_parameters have changed: {READ}")
        rows |= {
            "spatial_coarsening": (
                "none",
                "list, ``true``",
                "for each coarse level, the refinements of a ``MeshHierarchy`` less than on the finest level",
            ),
            "norm": ("``l2``", "``l2``, ``L2``", "norm of residuals: of coefficients, or of functions"),
            "krylov": ("none", "dictionary", "PETSc's options of a Krylov method around the cycles of linear sweeps"),
        }
        return self.table((f"``{name}``", *row) for name, row in rows.items())


class StepOptionTable(SolverOptionTable):
    """``.. step-options::``: how the systems of a step are solved where no option is given."""

    required_arguments = 0

    def run(self):
        """Make the table from the options that the code chooses."""
        from mpi4py import MPI

        from pint_fem.kernels.direct import DISTRIBUTED, REDUNDANT, completed, default_solver

        text = lambda options: " ".join(f"``-pint_{k} {v}``" for k, v in options.items())
        alone = MPI.COMM_SELF
        rows = [
            ("one rank in space, symmetric positive definite", text(default_solver(alone, 1, spd=True))),
            ("one rank in space, other", text(default_solver(alone, 1))),
            (f"several, up to {REDUNDANT:,} unknowns", "the same on every rank, for the whole system"),
            (f"several, up to {DISTRIBUTED:,} unknowns", "``-pint_ksp_type preonly`` ``-pint_pc_factor_mat_solver_type "
             "mumps``; symmetric positive definite systems by this package's substructuring or multigrid"),
            ("several, more unknowns, or ``reproducible=True``", "Krylov iteration with overlapping subdomains"),
            ("a method without its tolerance, such as ``-pint_ksp_type cg``",
             text(completed({"ksp_type": "cg"}, alone, 1))),
        ]  # fmt: skip
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: 40 60", ""]
        for where, what in (("ranks and system", "solver"), *rows):
            lines += [f"   * - {where}", f"     - {what}"]
        holder = nodes.Element()
        self.state.nested_parse(StringList(lines, source="options"), 0, holder)
        return holder.children


class ProgramHelp(SphinxDirective):
    """``.. program-help:: plan``: what ``pint-fem plan --help`` prints."""

    optional_arguments = 1
    final_argument_whitespace = True

    def run(self):
        """Run the command with ``--help`` in this process."""
        from pint_fem.commands import command

        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            command([*" ".join(self.arguments).split(), "--help"])
        return [nodes.literal_block(text.getvalue().strip(), text.getvalue().strip(), language="text")]


def setup(app):
    """Register with Sphinx."""
    app.add_directive("solver-options", SolverOptionTable)
    app.add_directive("functional-options", FunctionalOptionTable)
    app.add_directive("step-options", StepOptionTable)
    app.add_directive("program-help", ProgramHelp)
    return {"parallel_read_safe": True}
