"""What programs print: a status line on a terminal, nothing of it elsewhere, quiet and verbose, and the last lines."""

import ast
import io
import logging
import re
import sys
import warnings
from pathlib import Path

import pytest
from mpi4py import MPI

from pint_fem import progress
from pint_fem.cli import ProgramParser, last_lines, run, say, waiting
from pint_fem.errors import InputError, SolverFailure
from pint_fem.logs import logger
from pint_fem.progress import ErasingStream, update

DEMOS = Path(__file__).parents[1] / "demos"
ERASED = "\r\x1b[2K"


class Terminal(io.StringIO):
    """What a terminal is sent."""

    def isatty(self):
        return True

    @property
    def shown(self):
        """What is on its last line."""
        return self.getvalue().rpartition(ERASED)[2]


@pytest.fixture
def started(monkeypatch):
    """``started(*words, stream=Terminal)`` reads options of a program, and returns its standard error, a terminal or
    not; the display is as it was afterwards.
    """

    def start(*words, stream=Terminal):
        stderr = stream()
        monkeypatch.setattr(sys, "stderr", stderr)  # in the test itself: pytest sets it anew after each fixture
        read(*words)
        return stderr

    yield start
    read()
    progress._display.terminal = None


def read(*words):
    """Options of a program with no others."""
    return ProgramParser(prog="program").read(words)


def test_the_status_line_is_that_of_the_innermost_wait_and_erased_at_the_end(started, capsys):
    stderr = started()
    with waiting("outer"):
        assert stderr.shown == "outer (0 s)"
        with waiting("inner") as wait:
            wait.update("2 of 3")
            assert stderr.shown == "inner: 2 of 3 (0 s)"
            update("3 of 3")
            assert stderr.shown == "inner: 3 of 3 (0 s)"
        assert stderr.shown == "outer (0 s)"
        wait.update("too late")
        assert stderr.shown == "outer (0 s)"
    assert stderr.shown == ""
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["say", "log", "print"])
def test_the_status_line_is_erased_before_anything_is_printed(kind, started, capsys, monkeypatch):
    stderr = started()
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's own
    seen = []

    class Out(io.StringIO):
        def write(self, text):
            seen.append((text, stderr.shown))

    monkeypatch.setattr(sys, "stdout", Out())
    with waiting("work"):
        if kind == "say":
            say("a line")
        elif kind == "log":
            logger.info("a line")
        else:
            print("a line", file=ErasingStream(sys.stdout))
    assert ("a line", "") in [(text.strip(), shown) for text, shown in seen]


def test_no_status_line_where_there_is_no_terminal(started, capsys):
    stderr = started(stream=io.StringIO)
    with waiting("work") as wait:
        wait.update("1 of 2")
        say("a line")
    assert stderr.getvalue() == ""
    assert capsys.readouterr().out == "a line\n"


def test_quiet_prints_nothing_but_errors(started, capsys):
    with warnings.catch_warnings():
        stderr = started("--quiet")
        with waiting("work"):
            say("a line")
            logger.info("a line")
            logger.warning("a line")
            warnings.warn("a line", stacklevel=1)
        last_lines(Path("results"), ["picture.png"], "open it")
        with pytest.raises(SystemExit) as stop:
            run(lambda: read("--no-such-option"))
    assert stop.value.code == 2
    assert stderr.getvalue() == "error: unknown argument '--no-such-option': see --help\n"
    assert capsys.readouterr().out == ""
    read()
    assert logger.getEffectiveLevel() == logging.INFO
    say("a line")
    assert capsys.readouterr().out == "a line\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_verbose_prints_a_line_on_each_wait(stream, started, capsys):
    started("--verbose", stream=stream)
    with waiting("outer"), waiting("inner"):
        pass
    inner, outer = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"  inner: \d+\.\d\d s", inner)
    assert re.fullmatch(r"outer: \d+\.\d\d s", outer)


def test_an_expected_error_has_a_traceback_where_the_program_is_verbose(started):
    def main():
        raise SolverFailure("it does not converge")

    for words, traceback in (((), False), (("--verbose",), True)):
        stderr = started(*words)
        with pytest.raises(SystemExit):
            run(main)
        assert "error: SolverFailure: it does not converge\n" in stderr.getvalue()
        assert ("Traceback" in stderr.getvalue()) == traceback


def test_compiled_kernels_are_shown_and_counted(started, capsys):
    """By the log of PyOP2, of which nothing else is printed."""
    stderr = started("--verbose")
    kernels, passed = logging.getLogger("pyop2"), []
    handler = logging.Handler()
    handler.emit = passed.append
    kernels.addHandler(handler)
    kernels.setLevel("WARNING")  # as Firedrake does when it is imported
    try:
        with waiting("set-up"):
            for _ in range(2):
                kernels.info("Compiling wrapper...")
                assert stderr.shown.startswith("first run: compiling kernels")
                kernels.info("Compiling wrapper...done")
                assert stderr.shown.startswith("set-up")
            kernels.info("something else")
            kernels.warning("a warning")
    finally:
        kernels.removeHandler(handler)
    assert [record.getMessage() for record in passed] == ["a warning"]
    assert capsys.readouterr().out.endswith(" s, 2 kernels compiled, which later runs find in the cache\n")


@pytest.mark.parallel([1, 2])
def test_the_first_rank_prints_the_last_lines(started, capsys):
    started()
    last_lines(Path("results"), ["a.png", "b.png"], "open a.png")
    printed = f"written: {Path('results').resolve()}: a.png, b.png\nnext: open a.png\n"
    assert capsys.readouterr().out == (printed if MPI.COMM_WORLD.rank == 0 else "")


def test_both_at_once_are_refused():
    with pytest.raises(InputError, match="--quiet and --verbose"):
        read("--quiet", "--verbose")


def programs():
    """Demos that are started, by name."""
    texts = {path.stem: path.read_text() for path in sorted(DEMOS.glob("*.py"))}
    return {name: text for name, text in texts.items() if "__main__" in text}


@pytest.mark.parametrize("name", programs())
def test_a_demo_has_the_options_and_the_last_lines_of_all_programs(name):
    """Its parser is ``ProgramParser`` with a next step, or it ends with ``last_lines``; nothing prints otherwise."""
    tree = ast.parse(programs()[name])
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    parsers = [call for call in calls if ast.unparse(call.func) == "ProgramParser"]
    assert len(parsers) == 1
    given = {keyword.arg for keyword in parsers[0].keywords}
    assert "next_step" in given or "last_lines" in {ast.unparse(call.func) for call in calls}
    for path in DEMOS.glob("*.py"):
        assert not re.search(r"(?<![\w.])print\(", path.read_text()), path
