"""Which extra of the package installs a library that is missing, for messages."""

from __future__ import annotations

__all__ = ["how_to_install", "missing"]

_FIREDRAKE = ("firedrake", "finat", "irksome", "petsc4py", "pyadjoint", "pyop2", "tsfc", "ufl")
_EXTRAS = {
    "fem": ("h5py", "petsctools", "scipy"),
    "plots": ("matplotlib",),
    "resnet": ("sklearn", "torch"),
    "scaling": ("greenlet",),
    "vtk": ("vtk",),
}


def how_to_install(module: str | None) -> str | None:
    """What to install for a module that could not be imported, as a clause; ``None`` for modules of no extra."""
    root = (module or "").partition(".")[0]
    if root in _FIREDRAKE:
        return (
            "install Firedrake (https://www.firedrakeproject.org/install.html), then, in its environment, "
            "pip install irksome 'pint_fem[fem]'"
        )
    return next((f"pip install 'pint_fem[{extra}]'" for extra, roots in _EXTRAS.items() if root in roots), None)


def missing(error: ImportError, what: str) -> ImportError | None:
    """An exception whose message names what requires a library and how it is installed.

    Parameters
    ----------
    error
        That of the import.
    what
        What requires the library, such as ``"pint_fem.Evolution"``.

    Returns
    -------
    ImportError or None
        ``None`` where no extra installs the library, as where a user's own module is missing.
    """
    how = how_to_install(error.name)
    if how is None or error.name is None or not isinstance(error, ModuleNotFoundError):
        return None
    library = error.name.partition(".")[0]
    return ModuleNotFoundError(f"{what} requires {library}, which is not installed: {how}", name=error.name)
