"""Options that nothing would read are refused with the nearest name: levels, dictionaries, command lines."""

import pytest

from pint_fem.cli import ProgramParser
from pint_fem.errors import InputError
from pint_fem.mgrit import MGRIT, MGRITOptions
from pint_fem.paradiag import ParaDiagOptions
from pint_fem.petsc_options.spelling import distance, meant


class Step:
    def step(self, steps, u, out):
        out[...] = u


# -- levels ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"levels": 3, "level_7_relax": "F"}, "level_7_relax.*levels 0 to 2.*'level_1_relax'"),
        ({"levels": 3, "level_2_relax": "F"}, "level_2_relax.*2 is stepped through.*'level_1_relax'"),
        ({"levels": 3, "level_3": {"c_weight": 1.2}}, "level_3_c_weight.*'level_1_c_weight'"),
        ({"level_2_coarsening": 4}, "level_2_coarsening.*levels 0 to 2"),  # three levels by default
        ({"levels": 1, "level_0_relax": "F"}, "level_0_relax.*level 0 only"),
        ({"level_999999999999_relax": "F"}, "no hierarchy has a level 999999999999"),
        ({"levels": 2, "relax": ("F", "FCF", "F")}, "relax.*for 2 levels: give at most one for each"),
        ({"levels": 2, "coarsening": (4, 4, 4)}, "coarsening.*for 2 levels: give at most one for each"),
    ],
)
def test_options_of_levels_that_do_not_exist(options, text):
    with pytest.raises(ValueError, match=text):
        MGRITOptions.make(options).factors(512)


def test_the_solver_refuses_them_for_its_own_levels():
    with pytest.raises(ValueError, match=r"'level_2_relax'.*'level_0_relax'"):
        MGRIT([Step(), Step()], 64, options={"level_2_relax": "F"})


@pytest.mark.parametrize(
    "options",
    [
        {"levels": 3, "level_1_relax": "F"},
        {"levels": 3, "relax": ("F", "FCF"), "coarsening": (8, 4)},
        {"levels": 2, "coarse_solver": "relax", "level_1_coarsening": 2},
        {"cycle": "F", "f_cycles": 1},
        {"coarse_solver": "relax", "coarse_sweeps": 2},
        {"start": "nested", "nested_cycles": 2},
        {"nested_cycles": 2},
    ],
    ids=str,
)
def test_options_that_are_read_are_taken(options):
    assert MGRITOptions.make(options).factors(512)


# -- what nothing reads ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"f_cycles": 2}, "f_cycles 2 has no effect with cycle 'V': give cycle 'F'"),
        ({"coarse_sweeps": 2}, "coarse_sweeps 2 has no effect with coarse_solver 'sequential'"),
        ({"start": "skip", "nested_cycles": 2}, "nested_cycles 2 has no effect with start 'skip'"),
        ({"leevls": 2}, "did you mean 'levels'"),
        ({"coarse": {"solver": "relax", "swep": 1}}, "did you mean 'coarse_sweeps'"),
        ({"of_levels": ()}, "unknown mgrit option"),
    ],
)
def test_options_of_mgrit_that_nothing_reads(options, text):
    with pytest.raises(ValueError, match=text):
        MGRITOptions.make(options)


@pytest.mark.parametrize(("name", "near"), [("alhpa", "alpha"), ("max_its", "max_it"), ("Rtol", "rtol")])
def test_options_of_paradiag_that_nothing_reads(name, near):
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        ParaDiagOptions.make({name: 1e-4})


# -- the command line --------------------------------------------------------------------------------------------------
def test_distance_is_that_of_damerau():
    """Worked by hand: one slip of each kind, and two."""
    pairs = {("mgrit", "mgrit"): 0, ("mgri", "mgrit"): 1, ("mgriit", "mgrit"): 1, ("mgryt", "mgrit"): 1}
    pairs |= {("mgirt", "mgrit"): 1, ("", "abc"): 3, ("prdiag", "paradiag"): 2}
    assert {pair: distance(*pair) for pair in pairs} == pairs


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("mgri_levels", "mgrit_levels"),
        ("MGRIT_levels", "mgrit_levels"),
        ("mgirt_level_1_relax", "mgrit_level_1_relax"),
        ("mgrit-levels", "mgrit_levels"),
        ("mgritlevels", "mgrit_levels"),
        ("paradig_alpha", "paradiag_alpha"),
        ("ParaDiag_alpha", "paradiag_alpha"),
        ("pnt_ksp_type", "pint_ksp_type"),
        ("PINT_ksp_type", "pint_ksp_type"),
    ],
)
def test_near_misses_of_our_prefixes(given, wanted):
    assert meant(given) == wanted


@pytest.mark.parametrize(
    "name",
    "mg_levels_ksp_type ksp_type pc_type snes_monitor log_view info mat_view options_left help malloc_debug vec_type "
    "mgrit_levels paradiag_alpha pint_ksp_view tao_monitor firedrake_0_ksp_type ts_type dm_view citations "
    "mat_mumps_icntl_4 on_error_abort start_in_debugger fieldsplit_0_pc_type sub_pc_type version viewer_type".split(),
)
def test_names_of_petsc_stay_allowed(name):
    assert meant(name) is None


def parser(**given):
    made = ProgramParser(prog="demo", **given)
    made.add_argument("--steps", type=int, default=8)
    made.add_argument("--levels", type=int, default=2)
    made.add_argument("--time-solver", default="mgrit")
    return made


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-steps", "5"], "'-steps': did you mean --steps"),
        (["-steps=5"], "'-steps': did you mean --steps"),
        (["-step", "5"], "'-step': did you mean --steps"),
        (["-time_solver", "serial"], "'-time_solver': did you mean --time-solver"),
        (["-mgri_levels", "3"], "'-mgri_levels': did you mean '-mgrit_levels'"),
        (["-MGRIT_levels", "3"], "'-MGRIT_levels': did you mean '-mgrit_levels'"),
        (["--mgrit_levels", "3"], "'--mgrit_levels': did you mean -mgrit_levels"),
        (["--stpes", "5"], "did you mean --steps"),
    ],
)
def test_misspelt_options_of_a_program(words, text):
    with pytest.raises(InputError, match=text):
        parser().read(words)


def test_options_of_petsc_stay_in_its_database():
    words = ["--steps", "5", "-ksp_type", "cg", "-log_view", "-mgrit_levels", "3", "-mg_levels_pc_type", "sor", "-info"]
    assert parser().read(words).steps == 5


@pytest.mark.parametrize(("word", "text"), [("-mgrit_levels", "did you mean --levels"), ("-ksp_type", "no options of")])
def test_a_program_without_petsc_refuses_its_options(word, text):
    with pytest.raises(InputError, match=text):
        parser(petsc=False).read([word, "3"])


# -- PETSc's own names -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ksp_typ": "cg"}, "solver_parameters: ksp_typ: .*did you mean 'ksp_type'"),
        ({"ksp_type": "cg", "ksp_rtoll": 1e-9}, "ksp_rtoll: .*'ksp_rtol'"),
        ({"sub": {"pc_tpye": "lu"}}, "sub_pc_tpye: .*'pc_type'"),
        ({"fieldsplit_0_ksp_max_itt": 3}, "fieldsplit_0_ksp_max_itt: .*'ksp_max_it'"),
    ],
)
def test_misspelt_names_of_petsc(options, text):
    pytest.importorskip("firedrake")  # it has to start PETSc
    from pint_fem.petsc_options import checks as names

    with pytest.raises(InputError, match=text):
        names.require_names(options, "pint_test_")


def test_names_that_petsc_has_are_taken():
    """Common ones behind prefixes, and rare ones that differ from others by a letter."""
    pytest.importorskip("firedrake")  # it has to start PETSc
    from pint_fem.petsc_options import checks as names

    given = "ksp_rtol ksp_atol sub_pc_type fieldsplit_0_ksp_max_it mg_levels_ksp_max_it pc_sor_its pc_sor_lits"
    given += " mat_mumps_icntl_14 ksp_cg_type snes_lag_jacobian pc_hypre_boomeramg_max_iter ksp_max_its_not_ours"
    given += " pc_gasm_type sub_pc_gasm_overlap"  # a letter more than those of pc_asm
    names.require_names(dict.fromkeys(given.split(), "1"), "pint_test_")
    assert names._is_in_petsc("ksp_rtol")
    assert not names._is_in_petsc("ksp_rtoll")


@pytest.mark.parametrize("prefix", ["mgrit_", "paradiag_", "pint_"])
def test_misspelt_names_of_petsc_on_the_command_line(prefix):
    pytest.importorskip("firedrake")  # it has to start PETSc
    from petsc4py import PETSc

    from pint_fem.petsc_options import checks as names

    PETSc.Options()[f"{prefix}ksp_typ"] = "cg"
    try:
        with pytest.raises(InputError, match=f"-{prefix}ksp_typ: .*did you mean 'ksp_type'"):
            names.require_names({"ksp_rtol": 1e-9}, prefix)  # also beside options that are right
    finally:
        PETSc.Options().delValue(f"{prefix}ksp_typ")
