"""Input files are either understood or refused in one line that says where, why, and what would do."""

import os
import shutil

import numpy as np
import pytest

pytest.importorskip("firedrake")

from firedrake import COMM_WORLD, RectangleMesh, UnitSquareMesh

from pint_fem.errors import InputError
from problems.heat_readings import READINGS, write
from problems.meshfile import locate, read_mesh
from problems.plate import BOUNDARIES, FINAL_TIME, MESH, MESH_FINE, REGIONS, SENSORS
from problems.readings import Readings, read_readings

HEADER = "sensor,x,y,time,temperature"
GOOD = f"""# two sensors, two times

{HEADER}
a,0.1,0.2,0.5,1.0
a,0.1,0.2,1.0,2.0
# b is out of order
b,0.3,0.4,1.0,4.0
b,0.3,0.4,0.5,3.0
"""


def csv_file(tmp_path, content):
    """Write a file of readings."""
    path = tmp_path / "readings.csv"
    path.write_text(content, encoding="utf-8")
    return path


def refuse_one_line(excinfo, path):
    """A message names the file and fits the command line's one line."""
    assert str(excinfo.value).startswith(str(path))
    assert "\n" not in str(excinfo.value)


def test_reads_sensors_in_order_and_times_ascending(tmp_path):
    """Lines may come in any order."""
    readings = read_readings(csv_file(tmp_path, GOOD), 1.0)
    assert isinstance(readings, Readings)
    assert readings.sensors == ("a", "b")
    np.testing.assert_array_equal(readings.points, [[0.1, 0.2], [0.3, 0.4]])
    np.testing.assert_array_equal(readings.times, [0.5, 1.0])
    np.testing.assert_array_equal(readings.values, [[1.0, 3.0], [2.0, 4.0]])


def test_reads_what_spreadsheets_save(tmp_path):
    """A byte order mark, quotes, blanks and carriage returns do no harm."""
    saved = "\ufeff" + GOOD.partition("\n\n")[2].replace("a,0.1", '"a", 0.1').replace("\n", "\r\n")
    np.testing.assert_array_equal(read_readings(csv_file(tmp_path, saved), 1.0).values, [[1.0, 3.0], [2.0, 4.0]])


@pytest.mark.parametrize(
    ("old", "new", "line", "match"),
    [
        (HEADER, "sensor,x,y,temperature", 3, "wrong columns .got 'sensor,x,y,temperature'"),
        (HEADER, "sensor,x,y,temperature,time", 3, "wrong columns"),
        (HEADER + "\n", "", 3, "wrong columns"),
        ("0.5,1.0", "0.5", 4, "wrong number of fields .got 4"),
        ("0.5,1.0", "0.5,1.0,", 4, "wrong number of fields .got 6"),
        ("0.5,1.0", "0.5,warm", 4, "temperature is not a number .got 'warm'"),
        ("0.5,1.0", "0.5,", 4, "temperature is not a number .got ''"),
        ("0.5,1.0", "0.5,nan", 4, "temperature is not finite .got 'nan'"),
        ("0.5,1.0", "0.5,1e999", 4, "temperature is not finite"),
        ("0.1,0.2,0.5", "0.1,-inf,0.5", 4, "y is not finite"),
        ("0.2,0.5,1.0", "0.2,0.0,1.0", 4, "time is not positive .got 0"),
        ("0.2,0.5,1.0", "0.2,-0.5,1.0", 4, "time is not positive .got -0.5"),
        ("0.2,1.0,2.0", "0.2,1.5,2.0", 5, "time is beyond the final time .got 1.5; should be at most 1"),
        ("0.2,1.0,2.0", "0.2,0.5,2.0", 5, "duplicate reading .sensor a at time 0.5 is already on line 4"),
        ("0.4,0.5", "0.41,0.5", 8, "sensor b has moved .*line 7"),
        ("b,0.3,0.4,0.5,3.0\n", "", 7, "missing reading .sensor b, first named on this line, has none at time 0.5"),
        ("a,0.1,0.2,0.5", ",0.1,0.2,0.5", 4, "sensor has no name"),
    ],
)
def test_refuses_a_line(tmp_path, old, new, line, match):
    """The message names the line at fault."""
    assert old in GOOD
    path = csv_file(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InputError, match=match) as excinfo:
        read_readings(path, 1.0)
    assert str(excinfo.value).startswith(f"{path}:{line}: ")
    refuse_one_line(excinfo, path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", ":1: the file is empty"),
        ("\n# nothing\n\n", ":1: the file is empty"),
        (f"# no rows\n{HEADER}\n", ":2: no readings"),
    ],
)
def test_refuses_a_file_without_readings(tmp_path, content, match):
    """Empty, only comments, or only column names."""
    path = csv_file(tmp_path, content)
    with pytest.raises(InputError, match=match) as excinfo:
        read_readings(path, 1.0)
    refuse_one_line(excinfo, path)


def test_refuses_what_is_not_a_text_file(tmp_path):
    """Missing, a directory, or binary."""
    binary = tmp_path / "readings.csv"
    binary.write_bytes(b"\x89PNG\xff\xfe\x00")
    for path, match in (
        (tmp_path / "none.csv", "no such file"),
        (tmp_path, "is a directory"),
        (binary, "not a text file"),
    ):
        with pytest.raises(InputError, match=match) as excinfo:
            read_readings(path, 1.0)
        refuse_one_line(excinfo, path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_refuses_an_unreadable_file(tmp_path):
    """No permission to read."""
    path = csv_file(tmp_path, GOOD)
    path.chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        read_readings(path, 1.0)


def test_shipped_readings():
    """24 sensors where the plate has them, 64 equidistant times."""
    readings = read_readings(READINGS, FINAL_TIME)
    assert readings.values.shape == (64, 24)
    np.testing.assert_array_equal(readings.points, SENSORS)
    np.testing.assert_array_equal(readings.times, np.arange(1, 65) / 64)


def test_written_readings_are_read_back(tmp_path):
    """What the script writes is what the reader reads."""
    values = np.random.default_rng(0).standard_normal((5, len(SENSORS)))
    write(tmp_path / "readings.csv", values, noise=0.0)
    readings = read_readings(tmp_path / "readings.csv", FINAL_TIME)
    np.testing.assert_allclose(readings.values, values, atol=0.5e-6)  # six digits after the point
    np.testing.assert_allclose(readings.times, np.arange(1, 6) / 5)


@pytest.mark.parametrize("path", [MESH, MESH_FINE])
def test_shipped_meshes(path):
    """Both meshes pass their checks and have the sensors inside."""
    mesh = read_mesh(path, COMM_WORLD, REGIONS, BOUNDARIES)
    assert mesh.geometric_dimension == 2
    locate(SENSORS, mesh)


def mesh_file(tmp_path, edit, name="plate.msh"):
    """Write an edited copy of the plate's mesh."""
    path = tmp_path / name
    path.write_text(edit(MESH.read_text()))
    return path


TETRAHEDRON = """$MeshFormat
2.2 0 8
$EndMeshFormat
$Nodes
4
1 0 0 0
2 1 0 0
3 0 1 0
4 0 0 1
$EndNodes
$Elements
1
1 4 2 1 1 1 2 3 4
$EndElements
"""


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda text: "not a mesh", "not a gmsh mesh"),
        (lambda text: "", "not a gmsh mesh"),
        (lambda text: text[: len(text) // 2], "truncated mesh"),
        (lambda text: text[: len(text) // 2] + "\n$EndElements\n", "not a readable mesh"),
        (lambda text: text.replace("2.2 0 8", "9.9 0 8"), "not a readable mesh"),
        (
            lambda text: text.replace(" 2 2 2 2 ", " 2 2 2 2 99999 ", 1),
            r"\d: not a readable mesh .an element's corners",
        ),
        (lambda text: text.replace("\n1 0 0 0\n", "\n1 nan 0 0\n"), "coordinates that are not finite"),
        (lambda text: TETRAHEDRON, "not a mesh of triangles"),
        (lambda text: text.replace("\n1 0 0 0\n", "\n1 0 0 0.5\n"), "not a plane mesh .its z coordinates span 0.5"),
        (lambda text: text.replace(" 2 2 2 2 ", " 2 2 3 2 "), r"no Physical Surface 2 \(it has 1, 3"),
        (lambda text: text.replace(" 1 2 13 ", " 1 2 11 "), r"no Physical Curve 13 \(it has 11, 12, 14"),
    ],
)
def test_refuses_a_mesh(tmp_path, edit, match):
    """Not gmsh's, truncated, garbled, of the wrong dimension, or with tags missing."""
    path = mesh_file(tmp_path, edit)
    assert path.read_text() != MESH.read_text()
    with pytest.raises(InputError, match=match) as excinfo:
        read_mesh(path, COMM_WORLD, REGIONS, BOUNDARIES)
    refuse_one_line(excinfo, path)


def test_refuses_a_mesh_with_another_region():
    """Cells without a material would make a singular system."""
    with pytest.raises(InputError, match="triangles are in none of the regions"):
        read_mesh(MESH, COMM_WORLD, [1], BOUNDARIES)


def test_refuses_what_is_not_a_mesh_file(tmp_path):
    """Missing, a directory, or another type of file."""
    other = tmp_path / "plate.geo"
    shutil.copy(MESH, other)
    (tmp_path / "folder.msh").mkdir()
    for path, match in (
        (tmp_path / "none.msh", "no such file"),
        (tmp_path / "folder.msh", "is a directory"),
        (other, "not a .msh file"),
    ):
        with pytest.raises(InputError, match=match) as excinfo:
            read_mesh(path, COMM_WORLD)
        refuse_one_line(excinfo, path)


def test_refuses_a_sensor_outside():
    """In the notch, in a hole, or a fraction of a cell outside the edge."""
    mesh = read_mesh(MESH, COMM_WORLD, REGIONS, BOUNDARIES)
    for x, y in ((1.7, 1.0), (0.45, 0.8), (2.001, 0.4)):
        points = np.vstack([SENSORS[:3], [(x, y)], SENSORS[4:]])
        with pytest.raises(InputError, match=rf"sensor 3 at \({x:g}, {y:g}\) is outside the mesh \(1 of 24"):
            locate(points, mesh)


def test_names_the_sensor_outside():
    """By the name it has in the file."""
    with pytest.raises(InputError, match=r"sensor west at \(-2, 0.5\)"):
        locate([(0.5, 0.5), (-2, 0.5)], UnitSquareMesh(2, 2), names=["centre", "west"])


@pytest.mark.parallel(3)
def test_all_ranks_refuse(tmp_path):
    """Every rank raises the same error: one that did not would leave the others waiting."""
    bad = COMM_WORLD.bcast(str(tmp_path / "bad.msh"), root=0)
    if COMM_WORLD.rank == 0:
        with open(bad, "w") as file:
            file.write(MESH.read_text()[:5000] + "\n$EndElements\n")
    COMM_WORLD.barrier()
    messages = []
    mesh = read_mesh(MESH, COMM_WORLD, REGIONS, BOUNDARIES)
    for refused in (
        lambda: read_mesh(bad, COMM_WORLD),
        lambda: read_mesh(MESH, COMM_WORLD, [7]),
        lambda: read_mesh("none.msh", COMM_WORLD),
        lambda: locate([(0.2, 0.2), (0.45, 0.8)], mesh),
        lambda: locate([(9.0, 9.0)], RectangleMesh(4, 4, 2, 2)),
    ):
        with pytest.raises(InputError) as excinfo:
            refused()
        messages.append(str(excinfo.value))
    assert COMM_WORLD.allgather(messages) == [messages] * COMM_WORLD.size
