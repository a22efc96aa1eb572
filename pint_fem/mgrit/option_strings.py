"""MGRIT options from strings, as PETSc's options database has them."""

from __future__ import annotations

from collections.abc import Mapping

from pint_fem.mgrit.options import MGRITOptions

__all__ = ["parse_options"]

_TRUE, _FALSE = ("", "1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse_options(strings: Mapping[str, str]) -> dict:
    """Values of options given as strings.

    Lists are separated by commas (``8,4``), a level's C-points by colons (``0:5:9:16,2``); ``none`` is ``None``, a
    flag without a value is true.

    Parameters
    ----------
    strings
        Names without prefix, such as ``{"coarsening": "8,4", "level_1_relax": "F", "monitor": ""}``.

    Returns
    -------
    dict
        For :meth:`MGRITOptions.make`, which refuses unknown names.

    Raises
    ------
    ValueError
        On a value that cannot be read, naming the option.
    """
    out = {}
    for name, text in strings.items():
        plain = name.split("_", 2)[2] if name.startswith("level_") and name.count("_") >= 2 else name
        field = MGRITOptions.__dataclass_fields__.get(plain)
        try:
            value = text if field is None else _value(plain, str(text or "").strip())
            one = plain != name and isinstance(value, list) and len(value) == 1  # of one level
            out[name] = value[0] if one else value
        except ValueError:
            raise ValueError(f"mgrit {name} {text!r}: {_EXPECTED.get(plain, 'give a number')}") from None
    return out


_EXPECTED = {
    "coarsening": "give whole numbers such as 8,4, or a level's C-points such as 0:4:8",
    "monitor": "give true or false",
    "view": "give true or false",
}


def _value(name: str, text: str):
    if text.lower() == "none":
        return None
    if name in ("monitor", "view"):
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError
        return text.lower() in _TRUE
    if name == "coarsening":
        parts = [tuple(int(c) for c in part.split(":")) for part in text.split(",")]
        return [part[0] if len(part) == 1 else part for part in parts]
    if name == "relax":
        return [int(part) if part.strip().isdigit() else part.strip() for part in text.split(",")]
    if name == "c_weight":
        return [float(part) for part in text.split(",")]
    if name in ("levels", "f_cycles", "nested_cycles", "coarse_sweeps", "max_it"):
        return int(text)
    if name in ("rtol", "atol", "dtol", "stagnation"):
        return float(text)
    if name == "time_norm":
        return int(text) if text.isdigit() else text
    return text
