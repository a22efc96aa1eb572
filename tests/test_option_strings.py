"""MGRIT options as PETSc's options database has them."""

import pytest

from pint_fem.mgrit import MGRITOptions

GOOD = {
    "levels": ("3", 3),
    "coarsening": ("8,4", (8, 4)),
    "relax": ("FCF,1,0", ("FCF", "FCF", "F")),
    "c_weight": ("1.3,0.9", (1.3, 0.9)),
    "rtol": ("1e-6", 1e-6),
    "atol": ("0", 0.0),
    "max_it": ("7", 7),
    "dtol": ("1e3", 1e3),
    "stagnation": ("none", None),
    "f_cycles": ("2", 2),
    "cycle": ("F", "F"),
    "start": ("nested", "nested"),
    "nested_cycles": ("2", 2),
    "coarse_solver": ("relax", "relax"),
    "coarse_steps": ("2", 2),
    "precision": ("double", "double"),
    "coarse_sweeps": ("3", 3),
    "storage": ("C", "C"),
    "residual": ("full", "full"),
    "check": ("cycle", "cycle"),
    "rtol_of": ("first", "first"),
    "time_norm": ("inf", "inf"),
    "on_divergence": ("serial", "serial"),
    "monitor": ("", True),
    "view": ("no", False),
    "trace": ("t.json", "t.json"),
}


def test_every_option_can_be_a_string():
    assert set(GOOD) == set(MGRITOptions.names())
    options = MGRITOptions.make(MGRITOptions.parse({name: text for name, (text, _) in GOOD.items()}))
    for name, (_, value) in GOOD.items():
        assert getattr(options, name) == value, name
    assert MGRITOptions.make(MGRITOptions.parse({"time_norm": "1"})).time_norm == 1


def test_c_points_and_levels():
    """A level's own options, and C-points by their numbers."""
    strings = {"coarsening": "0:3:8:16,2", "level_1_relax": "F", "level_2_c_weight": "2"}
    options = MGRITOptions.make(MGRITOptions.parse(strings))
    assert options.coarsening == ((0, 3, 8, 16), 2)
    assert [options.scheme(i) for i in range(4)] == ["FCF", "F", "FCF", "FCF"]
    assert [options.weight(i) for i in range(4)] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("levels", "x"),
        ("coarsening", "8;4"),
        ("coarsening", ""),
        ("rtol", "small"),
        ("monitor", "maybe"),
        ("max_it", "2.5"),
    ],
)
def test_bad_string_is_refused_by_name(name, text):
    with pytest.raises(ValueError, match=f"mgrit {name} '{text}': give"):
        MGRITOptions.parse({name: text})


def test_unknown_name_is_left_to_the_options():
    with pytest.raises(ValueError, match="did you mean 'levels'"):
        MGRITOptions.make(MGRITOptions.parse({"level": "3"}))
    with pytest.raises(ValueError, match="level_1_monitor"):
        MGRITOptions.make(MGRITOptions.parse({"level_1_monitor": "1"}))
