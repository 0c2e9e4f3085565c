"""The checkout: what is installed, what the makefile says and does, what importing fnet costs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fnet
from fnet.core.extras import DISTRIBUTION, EXTRAS
from tests.pages import blocks_of

ROOT = Path(__file__).parents[1]
GENERATED = re.compile(r"\.git|\.venv.*|__pycache__|\..*_cache|\.hypothesis|.*\.egg-info")  # as .gitignore


def project_files():
    """Every file that git knows or would add; without git, every file outside of the folders that .gitignore names."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    kept = [path for path in paths if path.parts[0] not in ("build", "dist", "runs")]
    return [ROOT / path for path in kept if not any(GENERATED.fullmatch(folder) for folder in path.parts[:-1])]


CONSTRAINTS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]


def pins_of(python):
    """The constraints that hold on a Python."""
    pins = [Requirement(line) for line in CONSTRAINTS]
    return [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]


def test_constraints_are_names_and_exact_versions():
    marker = r'( ; python_version (<|>=) "3\.\d+"( and python_version < "3\.\d+")?)?'
    assert [line for line in CONSTRAINTS if not re.fullmatch(r"[\w.-]+==\d[\w.]*" + marker, line, re.ASCII)] == []
    for python in ("3.11", "3.12", "3.13", "3.14"):
        pins = pins_of(python)
        assert len(pins) == len({canonicalize_name(pin.name) for pin in pins}) > 70
    assert pins_of("3.11") != pins_of("3.12")


def test_the_constraints_are_merged_from_what_each_python_has(tmp_path):
    (tmp_path / "a").write_text("Ab_c==1\nold==3\nsame==1.0\nfnet-jax @ file:///somewhere\n")
    (tmp_path / "b").write_text("ab-c==2\nsame==1.0\n")
    (tmp_path / "c").write_text("ab.c==2\nnew==1\nsame==1.0\n-e git+https://host/fnet\n")
    files = [f"3.{minor}={tmp_path / name}" for minor, name in ((9, "a"), (10, "b"), (11, "c"))]
    command = [sys.executable, ROOT / ".ci" / "constraints.py", *files]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert [line for line in printed.splitlines() if not line.startswith("#")] == [
        'ab-c==1 ; python_version < "3.10"',
        'ab-c==2 ; python_version >= "3.10"',
        'new==1 ; python_version >= "3.11"',
        'old==3 ; python_version < "3.10"',
        "same==1.0",
    ]


def test_constraints_hold_whatever_the_tests_install():
    here = pins_of("{}.{}".format(*sys.version_info))
    pins = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in here}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["experiments"], *extras["test"], *extras["lint"]]
    queue = [Requirement(text) for text in [*wanted, *project["build-system"]["requires"]]]
    seen, missing = set(), set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name == "fnet-jax" or (name, *requirement.extras) in seen:
            continue
        seen.add((name, *requirement.extras))
        if name not in pins:
            missing.add(name)
        elif not requirement.specifier.contains(pins[name]):
            missing.add(f"{requirement} is not {pins[name]}")
        try:
            needs = [Requirement(text) for text in distribution(name).requires or ()]
        except PackageNotFoundError:  # lint's and the build's packages need not be here; their own pin was looked up
            continue
        environments = [{"extra": extra} for extra in (*requirement.extras, "")]
        queue += [need for need in needs if need.marker is None or any(map(need.marker.evaluate, environments))]
    assert missing == set()
    assert {"jax", "scipy", "execnet", "pytest"} <= {name for name, *_ in seen}


def test_no_file_names_a_registry_or_a_path_of_one_machine():
    hosts = ["pypi" + ".org", "python" + "hosted", "npm" + "js", "registry" + "."]
    machine = re.compile("|".join([*map(re.escape, hosts), r"(?<![\w.<-])/" + r"(root|work|home|Users|opt|tmp)/"]))
    files = project_files()
    assert {ROOT / "Makefile", ROOT / "fnet" / "__init__.py"} <= set(files)
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        for number, line in enumerate(path.read_bytes().decode("utf-8", "replace").splitlines(), 1)
        if machine.search(line)
    ]
    assert found == []


def test_the_changelog_begins_with_the_version():
    entries = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert fnet.__version__ in entries[:2]  # the first may be the next, unreleased


def test_importing_fnet_imports_no_plotting_no_command_line_and_no_other_framework():
    heavy = {"matplotlib", "rich", "tyro", "sklearn", "mlxtend", "pandas", "optax", "flax", "chex", "pytest"}
    code = f"import sys, fnet; print(sorted({{name.split('.')[0] for name in sys.modules}} & {heavy}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


# --- the makefile, with an interpreter that writes down what it is asked to do ---------------------------------------

FAKE_PYTHON = """#!/bin/sh
case "$1 $2" in
    "-c "*) echo {version}; exit {unfit} ;;
    "-m venv") mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    *) echo "$*" >> calls
        case "$*" in
            *"$FAIL"*) for i in 1 2 3 4 5 6 7 8 9; do echo "one $i"; echo "two $i" >&2; echo; done; exit 3 ;;
            *"pip install"*) echo "Collecting jax"; echo "Successfully installed jax-0.10.2 numpy-2.4" ;;
        esac ;;
esac
"""


def fake_python(path, version="3.11.9", unfit=0):
    path.parent.mkdir(exist_ok=True)
    path.write_text(FAKE_PYTHON.format(version=version, unfit=unfit))
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path):
    """A checkout in a folder whose name has a space, and ``bin``, the only folder with interpreters."""
    root = tmp_path / "a checkout"
    (root / "benchmarks").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root)
    (root / "benchmarks" / "requirements.txt").touch()
    (root / "bin").mkdir()
    for tool in ("sh", "mkdir", "cp", "touch", "rm", "cat", "sed", "tail", "wc"):
        os.symlink(shutil.which(tool) or tool, root / "bin" / tool)
    return root


def make(checkout, *arguments, fail="nothing", **environment):
    """Run make; the calls that the fake interpreter saw, and make's result."""
    env = {"PATH": str(checkout / "bin"), "FAIL": fail, **environment}
    run = subprocess.run(
        [shutil.which("make") or "make", *arguments], cwd=checkout, env=env, capture_output=True, text=True, check=False
    )
    calls = checkout / "calls"
    seen = calls.read_text().splitlines() if calls.exists() else []
    calls.unlink(missing_ok=True)
    return seen, run


def test_an_old_python_is_refused_with_what_to_do(checkout):
    fake_python(checkout / "bin" / "python3.9", version="3.9.18", unfit=1)
    calls, run = make(checkout, "train", "PYTHON=python3.9")
    assert run.returncode != 0 and calls == [] and not (checkout / ".venv").exists()
    assert run.stderr.startswith(
        "error: fnet needs Python 3.11 or newer with its venv module; found\n"
        "  python3.9: 3.9.18\n"
        "Install one (Debian, Ubuntu: apt install python3-venv) or name one: make train PYTHON=/path/to/python3.11\n"
    )


def test_the_probe_refuses_an_old_python_and_takes_this_one(checkout):
    """The fake's verdict is the probe's: here the probe itself runs, with the version it sees replaced."""
    line = next(line for line in make(checkout, "-p", "help")[1].stdout.splitlines() if line.startswith("PROBE = "))
    probe = line.removeprefix("PROBE = ")
    for version, code in (((3, 10, 14), 1), ((3, 11, 0), 0), ((3, 14, 2), 0), ((2, 7, 18), 1)):
        run = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.version_info = {version}; {probe}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (run.returncode, run.stdout) == (code, "{}.{}.{}\n".format(*version))


def test_without_any_python_all_candidates_are_listed(checkout):
    _, run = make(checkout, "test")
    assert run.returncode != 0
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        assert f"  {name}: does not run\n" in run.stderr


def test_the_first_candidate_that_will_do_is_taken(checkout):
    fake_python(checkout / "bin" / "python3", version="3.9.2", unfit=1)
    fake_python(checkout / "bin" / "python3.12", version="3.12.1")
    fake_python(checkout / "bin" / "python3.11", version="3.11.7")
    (checkout / "bin" / "python3.13").write_text(
        "#!/bin/sh\necho 'pyenv: python3.13: command not found' >&2\nexit 127\n"
    )
    (checkout / "bin" / "python3.13").chmod(0o755)
    _, run = make(checkout, ".venv/.created")
    assert run.returncode == 0 and "creating .venv with Python 3.12.1 (python3.12)\n" in run.stdout


def test_an_interpreter_may_lie_in_a_folder_with_a_space(checkout):
    fake_python(checkout / "some where" / "python", version="3.13.1")
    _, run = make(checkout, ".venv/.created", "PYTHON=./some where/python")
    assert run.returncode == 0, run.stderr


def test_a_second_run_installs_nothing_and_a_changed_pin_installs_again(checkout):
    fake_python(checkout / "bin" / "python3")
    train = "-m experiments.digits_mlp --epochs 3"
    install = "-m pip install --editable .[{}]".format
    assert make(checkout, "train", "ARGS=--epochs 3")[0] == [install("experiments"), train]
    assert make(checkout, "train", "ARGS=--epochs 3")[0] == [train]
    assert make(checkout, "test")[0] == [install("test"), "-m pytest -n 2"]
    assert make(checkout, "test")[0] == ["-m pytest -n 2"]
    later = (checkout / ".venv" / ".installed-test").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    assert make(checkout, "test")[0] == [install("test"), "-m pytest -n 2"]


def test_another_python_makes_the_environment_anew_and_the_same_does_not(checkout):
    fake_python(checkout / "bin" / "python3", version="3.11.7")
    fake_python(checkout / "bin" / "other", version="3.12.1")
    install = "-m pip install --editable .[test]"
    assert make(checkout, "test")[0] == [install, "-m pytest -n 2"]
    calls, run = make(checkout, "test", "PYTHON=other")
    assert calls == [install, "-m pytest -n 2"] and "creating .venv with Python 3.12.1 (other)\n" in run.stdout
    assert make(checkout, "test", "PYTHON=other")[0] == ["-m pytest -n 2"]
    assert make(checkout, "test")[0] == ["-m pytest -n 2"]  # what is there, when none is named
    calls, run = make(checkout, "test", "PYTHON=python3", "VENV=.venv-beside")
    assert calls == [install, "-m pytest -n 2"] and "creating .venv-beside with Python 3.11.7" in run.stdout
    assert make(checkout, "test", "PYTHON=other")[0] == ["-m pytest -n 2"]
    fake_python(checkout / "bin" / "python3.9", version="3.9.18", unfit=1)
    calls, run = make(checkout, "test", "PYTHON=python3.9")
    assert run.returncode != 0 and calls == [] and (checkout / ".venv" / "bin" / "python").exists()


def test_the_newest_releases_are_installed_anew_each_time_without_constraints(checkout):
    fake_python(checkout / "bin" / "python3", version="3.11.7")
    fake_python(checkout / "bin" / "python3.13", version="3.13.0")
    expected = [
        "-m pip install --upgrade --upgrade-strategy eager --editable .[test,loggers]",
        "-m pip freeze --exclude-editable",
        "-m pytest -n 2 -m not slow -k adam",
    ]
    calls, run = make(checkout, "test-newest", "ARGS=-k adam")
    assert calls == expected and "creating .venv-newest with Python 3.13.0 (python3.13)\n" in run.stdout
    assert make(checkout, "test-newest", "ARGS=-k adam")[0] == expected
    rules = (ROOT / "Makefile").read_text()
    assert "test-newest: export PIP_CONSTRAINT =\n" in rules and "test-newest: export PIP_BUILD_CONSTRAINT =\n" in rules


def test_a_failed_install_is_tried_again(checkout):
    fake_python(checkout / "bin" / "python3")
    calls, run = make(checkout, "test", fail="install")
    assert run.returncode != 0 and calls == ["-m pip install --editable .[test]"]
    assert make(checkout, "test")[0] == ["-m pip install --editable .[test]", "-m pytest -n 2"]


def test_an_install_is_two_lines_and_what_pip_says_is_in_a_log(checkout):
    fake_python(checkout / "bin" / "python3", version="3.12.1")
    _, run = make(checkout, "train")
    assert run.stdout.splitlines() == [
        "creating .venv with Python 3.12.1 (python3)",
        "installing fnet[experiments] into .venv: a few minutes the first time; log: .venv/install.log",
        "installed 2 packages",
        ".venv/bin/python -m experiments.digits_mlp ",
    ]
    assert run.stderr == "" and "Collecting jax\n" in (checkout / ".venv" / "install.log").read_text()


def test_a_failed_install_ends_with_pips_status_the_end_of_its_log_and_where_it_is(checkout):
    fake_python(checkout / "bin" / "python3")
    _, run = make(checkout, "test", fail="install")
    *said, error, of_make = run.stderr.splitlines()
    assert len(said) == 20 and said[-3:] == ["one 9", "two 9", ""]
    assert error == "error: fnet[test] could not be installed; all that pip says: .venv/install.log"
    assert run.returncode == 2 and of_make.endswith("Error 3")
    _, run = make(checkout, "test", fail="install", CI="true")
    assert run.stderr.startswith("one 1\ntwo 1\n")


def test_lint_runs_its_tools_on_what_tests_install_and_bench_has_its_own_environment(checkout):
    fake_python(checkout / "bin" / "python3")
    installs = ["-m pip install --editable .[lint]", "-m pip install --editable .[test]"]
    tools = ["-m ruff check .", "-m ruff format --check .", "-m pyright --pythonpath .venv/bin/python"]
    assert make(checkout, "lint")[0] == installs + tools
    bench = ["-m pip install --editable . --requirement benchmarks/requirements.txt", "-m benchmarks.s1"]
    assert make(checkout, "bench")[0] == bench
    assert make(checkout, "bench", "MODULE=benchmarks.other")[0] == ["-m benchmarks.other"]
    assert make(checkout, "bench-all", "ARGS=--only s1")[0] == ["-m benchmarks --only s1"]
    make(checkout, "clean")
    assert not (checkout / ".venv").exists() and not (checkout / ".venv-bench").exists()


FAKE_MAKE = """#!/bin/sh
echo "$*" >> calls
case "$1" in lint) mkdir -p .venv/bin && cp bin/python3.11 .venv/bin/python ;; esac
"""


@pytest.fixture
def ci(checkout):
    """Run `.ci/run` with the interpreters of ``bin`` and of a pyenv: what it had make do, and what it printed."""
    (checkout / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci")
    (checkout / "bin" / "make").write_text(FAKE_MAKE)
    (checkout / "bin" / "make").chmod(0o755)
    for tool in ("bash", "dirname", "env"):
        os.symlink(shutil.which(tool) or tool, checkout / "bin" / tool)
    fake_python(checkout / "bin" / "python3.11", version="3.11")

    def run():
        (checkout / "calls").unlink(missing_ok=True)
        env = {"PATH": str(checkout / "bin"), "PYENV_ROOT": str(checkout / "pyenv")}
        done = subprocess.run([checkout / ".ci" / "run"], env=env, capture_output=True, text=True, check=True)
        return (checkout / "calls").read_text().splitlines(), done.stdout

    return run


def test_ci_says_so_when_there_is_no_second_python(ci, checkout):
    fake_python(checkout / "bin" / "python3.14", version="3.10", unfit=1)
    calls, printed = ci()
    assert calls == ["lint", "docs", "test", "test-long"]
    assert printed.startswith("NOT TESTED on a second Python: this machine has none from 3.11 on but 3.11;")


def test_ci_runs_what_touches_jaxs_insides_on_the_newest_other_python(ci, checkout):
    fake_python(checkout / "bin" / "python3.12", version="3.12")
    calls, printed = ci()
    assert calls[:4] == ["lint", "docs", "test", "test-long"] and len(calls) == 5 and "NOT TESTED" not in printed
    assert calls[4].startswith("test VENV=.venv-other PYTHON=python3.12 ARGS=tests/test_jax_insides.py ")
    files, options = calls[4].split("ARGS=")[1].split(" -m ")
    assert options == "'not slow'"  # so the long ones too
    files = files.split()
    assert len(files) > 5 and all((ROOT / file).exists() for file in files)
    (checkout / "pyenv" / "versions" / "3.13.0").mkdir(parents=True)
    fake_python(checkout / "pyenv" / "versions" / "3.13.0" / "bin" / "python3", version="3.13")
    assert "PYTHON=" + str(checkout / "pyenv/versions/3.13.0/bin/python3") in ci()[0][4]


# --- the wheel -------------------------------------------------------------------------------------------------------


def test_no_message_and_no_page_names_a_command_that_fetches_another_project():
    """`fnet` on the package index is somebody else's."""
    command = re.compile(r"(install|add)\b[^\n]*?[\s'\"=]" + "fn" + r"et(?![\w/.-]|-jax)")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in project_files()
        for match in command.finditer(path.read_bytes().decode("utf-8", "replace"))
    ]
    assert found == []
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    assert name == DISTRIBUTION == "fnet-jax"


def test_every_package_that_is_asked_for_is_in_its_extra():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for package, extra in EXTRAS.items():
        names = [canonicalize_name(Requirement(text).name) for text in extras[extra]]
        assert any(name.startswith(canonicalize_name(package.split(".")[0])) for name in names), (package, extra)


def core_packages():
    """The packages that jax, jaxlib and numpy are made of, with all that they need."""
    queue, found = ["jax", "jaxlib", "numpy"], {}
    while queue:
        name = queue.pop()
        if name not in found:
            found[name] = distribution(name)
            needs = [Requirement(text) for text in found[name].requires or ()]
            queue += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found.values()


@pytest.mark.long
def test_a_wheel_of_a_clean_clone_runs_the_readmes_first_snippet_with_nothing_but_the_core(tmp_path):
    clone, site, work = tmp_path / "clone", tmp_path / "site", tmp_path / "work"
    for path in project_files():
        target = clone / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", tmp_path]
    subprocess.run(command, cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("fnet_jax-*.whl")
    shutil.unpack_archive(wheel, site, "zip")
    assert (site / "fnet" / "py.typed").exists()
    assert {path.name for path in site.iterdir()} == {"fnet", f"fnet_jax-{fnet.__version__}.dist-info"}
    for package in core_packages():
        for top in {file.parts[0] for file in package.files or () if not file.parts[0].startswith(("..", "__pyc"))}:
            if not (site / top).exists():
                os.symlink(package.locate_file(top), site / top)
    snippet = blocks_of(ROOT / "README.md")[0]
    work.mkdir()
    # -I -S: neither this folder nor what else is installed here
    code = f"import sys; sys.path.append({str(site)!r})\n{snippet}\nassert fnet.__file__.startswith({str(site)!r})"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=work, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert sum(line.split()[-1:] == ["ok"] for line in run.stdout.splitlines()) == 12, run.stdout
