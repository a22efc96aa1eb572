"""The site: code of its pages runs, command lines name programs and options that exist, links lead somewhere, and the
tutorials and the build work.
"""

import ast
import contextlib
import io
import os
import random
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from pint_fem import commands
from pint_fem.mgrit import MGRITOptions
from pint_fem.paradiag import ParaDiagOptions
from tests.limits import patience

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def is_source(path):
    return not {"_build", "generated"} & set(path.relative_to(ROOT).parts)


PAGES = [ROOT / "README.md", *sorted(filter(is_source, DOCS.rglob("*.md")))]
TUTORIALS = sorted((DOCS / "tutorials").glob("[0-9][0-9]_*.py"))
HEADERS = [DOCS / "tutorials" / "GALLERY_HEADER.rst"]
name_of = lambda path: str(path.relative_to(ROOT))


@cache
def fenced(path):
    """Blocks of code of a page: language, text and the number of the first line."""
    found, lines, opened = [], path.read_text().splitlines(), None
    for number, line in enumerate(lines, 1):
        mark = re.match(r"\s*(`{3,}|~{3,})\s*(\S*)", line)
        if opened is None and mark:
            opened, start, language, text = mark[1], number + 1, mark[2], []
        elif opened is not None and line.strip().startswith(opened) and not line.strip().strip(opened[0]):
            found.append((language, "\n".join(text) + "\n", start))
            opened = None
        elif opened is not None:
            text.append(line)
    assert opened is None, f"{name_of(path)}:{start}: a block of code that does not end"
    return found


@contextlib.contextmanager
def as_user(folder, monkeypatch):
    """A working directory of its own, seeds, pictures without a display; what a program leaves behind is undone."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(ROOT))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - what a page's code may draw from
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    if "pyadjoint" in sys.modules:
        from pyadjoint import get_working_tape, pause_annotation

        pause_annotation()
        get_working_tape().clear_tape()


ELSEWHERE = {DOCS / "theory" / name for name in ("mgrit.md", "optimisers.md", "paradiag.md")}
"""Pages whose code other tests run and check: test_mgrit_page, test_optimize_page, test_paradiag_algebra."""
WITH_CODE = [p for p in PAGES if p not in ELSEWHERE and any(language == "python" for language, _, _ in fenced(p))]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page(page, tmp_path, monkeypatch):
    """All blocks in order in one namespace; a failure has the line of the page in its traceback."""
    names = {"__name__": "__main__"}
    with as_user(tmp_path, monkeypatch):
        for language, text, start in fenced(page):
            if language == "python":
                exec(compile("\n" * (start - 1) + text, str(page), "exec"), names)


@pytest.mark.parametrize("program", TUTORIALS, ids=name_of)
def test_tutorial(program, tmp_path, monkeypatch):
    """As ``python docs/tutorials/NN_name.py`` runs it; what its text states it asserts itself."""
    monkeypatch.setattr(sys, "argv", [str(program)])
    with as_user(tmp_path, monkeypatch):
        runpy.run_path(str(program), run_name="__main__")


def test_tutorials_are_numbered_once():
    numbers = [path.name[:2] for path in (DOCS / "tutorials").glob("[0-9][0-9]*") if path.suffix in (".py", ".md")]
    assert len(set(numbers)) == len(numbers)
    for path in TUTORIALS:
        assert re.match(r'r?"""\n?[^\n]+\n[=~-]{3,}\n', path.read_text()), f"{name_of(path)}: begins with no title"


# -- command lines -----------------------------------------------------------------------------------------------------
def command_lines(page):
    """Lines of a shell that start a program of this package, continuations joined."""
    for language, text, start in fenced(page):
        if language in ("bash", "console", "sh", "shell", ""):
            joined = text.replace("\\\n", " ")
            for line in joined.splitlines():
                words = line.strip().removeprefix("$ ")
                if re.match(r"(\w+=\S+ )*(python3?|mpiexec|mpirun|srun|make|pint-fem)\b", words):
                    yield start, words


def module_path(name):
    """File of a module of this repository; None of another one."""
    path = ROOT.joinpath(*name.split("."))
    for found in (path / "__main__.py", path.with_suffix(".py"), path / "__init__.py"):
        if found.is_file():
            return found
    return None


@cache
def words_and_imports(path):
    """Strings of a file that are options with two dashes, and the files of programs and problems that it imports."""
    words, modules = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"--[\w-]+", node.value):
            words.add(node.value)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    own = (m for m in modules if m.startswith(("demos", "problems", "tests", "pint_fem.cli", "pint_fem.progress")))
    return words, {found for m in own if (found := module_path(m)) is not None}


@cache
def options_of(path):
    """Options with two dashes that a program, or what it imports, gives to a parser."""
    seen, todo = set(), {path}
    while todo:
        seen |= todo
        todo = {other for one in todo for other in words_and_imports(one)[1]} - seen
    return {"--help"}.union(*(words_and_imports(one)[0] for one in seen))


@cache
def help_of(words):
    """What ``pint-fem WORDS --help`` prints."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        commands.command([*words, "--help"])
    return text.getvalue()


PREFIXED = re.compile(r"-(?:\w+_)?(mgrit|paradiag|kkt|pint)_(\w+)$")


def require_petsc_option(word):
    """An option with one dash: of this package, or of a solver of PETSc behind its prefix, or of PETSc itself."""
    match = PREFIXED.match(word)
    if match is None:
        assert word in ("-h", "-log_view", "-options_left", "-options_view", "-malloc_debug"), f"option {word}"
        return
    kind, name = match.groups()
    if kind in ("mgrit", "paradiag"):
        names = (MGRITOptions if kind == "mgrit" else ParaDiagOptions).names()
        level = re.fullmatch(r"level_\d+_(\w+)", name)
        petsc = name.startswith(("ksp_", "pc_", "mat_", "sub_", "snes_"))
        assert petsc or (level[1] if level else name) in names, f"option {word}"


def require_options(words, known):
    for word in words:
        if word.startswith("--"):
            assert word.split("=")[0] in known, f"option {word}"
        elif re.match(r"-[A-Za-z]", word):
            require_petsc_option(word)


def check_python(words):
    """The words after ``python``."""
    while words and words[0] in ("-u", "-O", "-X", "-W"):
        words = words[2:] if words[0] in ("-X", "-W") else words[1:]
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[0] == "-m":
        path = module_path(words[1])
        if words[1].split(".")[0] in ("pint_fem", "tests", "demos", "problems"):
            assert path is not None, f"there is no module {words[1]}"
            require_options(words[2:], options_of(path))
    elif "/" in words[0] or not OWN_PROGRAMS.fullmatch(words[0]):
        assert (ROOT / words[0]).is_file(), f"there is no program {words[0]}"
        require_options(words[1:], options_of(ROOT / words[0]))


OWN_PROGRAMS = re.compile(r"my_\w+\.py|your_\w+\.py")
"""Programs of the reader, in whose place the page has a name."""


@cache
def makefile():
    """Recipes of the Makefile by target, and the names of its variables."""
    text = (ROOT / "Makefile").read_text()
    recipes = dict(re.findall(r"^([\w-]+):[^=\n]*\n((?:\t.*\n)*)", text, re.M))
    return recipes, set(re.findall(r"\b([A-Z][A-Z_0-9]+)\b", text))


def check_make(words):
    """The words after ``make``: targets, variables, and the options in ``ARGS`` of the target's program."""
    recipes, variables = makefile()
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    for word in targets:
        assert word in recipes, f"make {word}: there is no such target"
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name.startswith("-"):
            continue
        assert name in variables, f"make {name}=: the Makefile does not read it"
        if name == "ARGS" and targets:
            program = re.search(r"\$\(PY\) (\S+\.py)|-m (\S+)", recipes[targets[0]])
            if program[1]:
                check_python([program[1], *shlex.split(value)])
            elif program[2] != "sphinx":
                check_python(["-m", program[2], *shlex.split(value)])


WITH_VALUE = ("-n", "-np", "--map-by", "--bind-to", "-N", "-c", "--ntasks")


def check_words(words):
    while words and re.match(r"\w+=", words[0]):
        words = words[1:]
    program, *rest = words
    if program in ("mpiexec", "mpirun", "srun"):
        while rest and rest[0].startswith("-"):
            rest = rest[2:] if rest[0] in WITH_VALUE else rest[1:]
        if rest and rest[0] in ("python", "python3", "pint-fem"):
            check_words(rest)
    elif program in ("python", "python3"):
        check_python(rest)
    elif program == "make":
        check_make(rest)
    elif rest and not rest[0].startswith("-"):
        known = dict(re.findall(r"^pint-fem (\w+)(?: ([a-z]\w+)\b)?", help_of(()), re.M))
        assert rest[0] in known, f"pint-fem {rest[0]}: there is no such command"
        name = tuple(rest[: 2 if known[rest[0]] else 1])
        require_options(rest, set(re.findall(r"--[\w-]+", help_of(name))) | {"--help"})


def first_command(line):
    """Words of a line of a shell before a comment, and before what joins it to another command or a file."""
    parser = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    parser.whitespace_split = True
    words = []
    for word in parser:
        if set(word) <= set(";&|<>"):
            break
        words.append(word)
    return words


@pytest.mark.parametrize("page", [p for p in PAGES if any(command_lines(p))], ids=name_of)
def test_command_lines_of_a_page(page):
    wrong = []
    for start, line in command_lines(page):
        try:
            check_words(first_command(line))
        except (AssertionError, ValueError, SyntaxError) as error:
            wrong.append(f"{name_of(page)}, block at line {start}: {line}: {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    "line",
    [
        "python demos/heat_sauce_inversion.py",
        "python demos/heat_source_inversion.py --gird 1x2",
        "mpiexec -n 2 python demos/heat_source_inversion.py -mgrit_levles 3",
        "python -m tests.benchmarks.lanse",
        "make dmeo",
        "make demo ARGS='--metod map'",
        "pint-fem paln heat-source",
        "pint-fem plan heat-source --rank 3",
    ],
)
def test_a_wrong_command_line_is_found(line):
    with pytest.raises(AssertionError):
        check_words(shlex.split(line))


# -- links and images --------------------------------------------------------------------------------------------------
def anchors_of(path):
    """Anchors of a page as GitHub and MyST make them from headings, and those that are written out."""
    found, text = set(), re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for heading in re.findall(r"^#{1,6} +(.*?)\s*#*$", text, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading).lower()
        slug = re.sub(r"\s", "-", re.sub(r"[^\w\- ]", "", plain))
        count = sum(one == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", one) is not None for one in found)
        found.add(f"{slug}-{count}" if count else slug)
    return found | set(re.findall(r'(?:id|name)="([^"]+)"', text)) | set(re.findall(r"^\(([\w-]+)\)=$", text, re.M))


def links_of(path):
    """Targets of links and images within the repository."""
    text = re.sub(r"(`+)[^`].*?\1", "", re.sub(r"^\s*```.*?^\s*```", "", path.read_text(), flags=re.DOTALL | re.M))
    targets = re.findall(r"\]\(<?([^)\s>]+)>?(?: \"[^\"]*\")?\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page(page):
    """Files, and headings of pages; labels and documents are what the build checks."""
    wrong = []
    for target in links_of(page):
        file, _, anchor = target.partition("#")
        path = (DOCS / file[1:] if file.startswith("/") else page.parent / file) if file else page
        if not path.exists() and path.with_suffix(".md").exists():
            path = path.with_suffix(".md")
        made = "_build/pictures" in target or (path.parent == DOCS / "tutorials" and path.with_suffix(".py").is_file())
        if not path.exists() and not made and not path.with_name(f"{path.name}.md").exists():
            wrong.append(target)
        elif anchor and path.suffix == ".md" and anchor not in anchors_of(path):
            wrong.append(f"{target}: there is no such heading")
    assert not wrong, wrong


def test_there_are_pages_and_links():
    assert len(PAGES) > 20
    assert WITH_CODE
    assert sum(len(links_of(page)) for page in PAGES) > 20
    assert {"pose", "observe", "minimise", "infer", "solve", "learn", "options"} <= {p.stem for p in PAGES}


def test_every_public_name_is_in_the_reference():
    import pint_fem
    import pint_fem.optimize

    listed = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    assert [name for name in pint_fem.__all__ if f"~pint_fem.{name}\n" not in listed] == []
    missing = [name for name in pint_fem.optimize.__all__ if not re.search(rf"~pint_fem[\w.]*\.{name}\n", listed)]
    assert missing == []


# -- the build ---------------------------------------------------------------------------------------------------------
def test_the_site_builds_without_warnings(tmp_path):
    """From a copy, as from a fresh clone, without running the tutorials; pages are read and resolved, not written."""
    pytest.importorskip("sphinx_gallery")
    pytest.importorskip("myst_parser")
    kept = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "docs"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for name in kept:
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for path in ROOT.iterdir():
        if path.name not in ("docs", ".git", "results", ".venv"):
            (tmp_path / path.name).symlink_to(path)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX", "ORTE", "PMI"))}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "dummy", "-D", "plot_gallery=0"]
    run = subprocess.run(
        [*command, "docs", "docs/_build/dummy"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=240 * patience(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]


# -- the tools of the build --------------------------------------------------------------------------------------------
@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))


@pytest.mark.usefixtures("tools")
def test_broken_links_of_built_pages_are_found(tmp_path):
    import check_site

    (tmp_path / "sub").mkdir()
    links = '<a href="sub/b.html#there"></a><a href="#top"></a>'
    (tmp_path / "a.html").write_text(f'<h1 id="top"></h1>{links}<img src="c.svg">')
    (tmp_path / "sub" / "b.html").write_text('<p id="there"><a href="../a.html#gone"></a><a href="https://x.org/y"></a>')
    found, count = check_site.broken_links(tmp_path)
    assert count == 2
    assert found == ["a.html: c.svg", "sub/b.html: ../a.html#gone: there is no such place on the page"]


@pytest.mark.usefixtures("tools")
def test_text_of_notebooks_is_markdown():
    pytest.importorskip("sphinx")
    from notebooks import markdown

    assert markdown("A :class:`~pint_fem.Misfit` of ``u`` in m\\ :sup:`2`") == "A `Misfit` of `u` in m<sup>2</sup>"
    assert markdown(":doc:`the page </howto/bounds>` and :doc:`/install`") == "*the page* and *install*"
    assert markdown("as follows::\n\n    x = 1") == "as follows:\n\n    x = 1"
    assert markdown("```bash\nmake\n```") == "```bash\nmake\n```"


@pytest.mark.usefixtures("tools")
def test_pages_of_results_have_the_attributes_of_their_base_classes():
    pytest.importorskip("numpydoc")
    from api_pages import MISSING, add_inherited_attributes, found_object

    cls = found_object("pint_fem.optimize.TrustRegionResult")
    lines = cls.__doc__.splitlines()
    add_inherited_attributes(None, "class", "", cls, None, lines)
    text = "\n".join(lines)
    assert text.count("Attributes\n") == 1
    assert {"value_calls", "converged", "history"} <= set(re.findall(r"\w+", text.partition("Attributes\n")[2]))
    assert found_object("pint_fem.optimize.TrustRegionResult.histroy") is MISSING
    assert found_object("pint_fem.optimize.TrustRegionResult.history") is not MISSING


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("cls", [MGRITOptions, ParaDiagOptions])
def test_tables_of_options_are_complete(cls):
    pytest.importorskip("numpydoc")
    from option_tables import option_rows

    rows = list(option_rows(cls, "x_"))
    assert [name for name, *_ in rows] == [f"``-x_{name}``" for name in cls.names()]
    assert all(text for *_, text in rows)
    for name, default, *_ in rows:
        given = {} if not default else cls.parse({name.strip("`")[3:]: default.strip("`")})
        assert cls.make(given) == cls(), name
