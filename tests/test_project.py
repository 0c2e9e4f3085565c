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

ROOT = Path(__file__).parents[1]
GENERATED = re.compile(
    r"\.git|\.venv.*|__pycache__|\..*_cache|\.hypothesis|.*\.egg-info|build|dist|runs"
)  # as .gitignore


def project_files():
    """Every file that git knows or would add; without git, every file outside of the folders that .gitignore names."""
    if (ROOT / ".git").exists():
        command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        return [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    paths = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return [ROOT / path for path in paths if not any(GENERATED.fullmatch(folder) for folder in path.parts[:-1])]


def test_constraints_are_names_and_exact_versions():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==\d[\w.]*", line, re.ASCII)] == []
    names = [canonicalize_name(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names)) > 0


def test_constraints_hold_whatever_the_tests_install():
    lines = (line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {canonicalize_name(name): version for name, version in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *extras["experiments"], *extras["test"], *extras["lint"]]
    queue = [Requirement(text) for text in [*wanted, *project["build-system"]["requires"]]]
    seen, missing = set(), set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name == "fnet" or (name, *requirement.extras) in seen:
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
    *) echo "$*" >> calls; case "$*" in *"$FAIL"*) exit 1 ;; esac ;;
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
    for tool in ("sh", "mkdir", "cp", "touch", "rm"):
        os.symlink(shutil.which(tool) or tool, root / "bin" / tool)
    return root


def make(checkout, *arguments, fail="nothing"):
    """Run make; the calls that the fake interpreter saw, and make's result."""
    env = {"PATH": str(checkout / "bin"), "FAIL": fail}
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


def test_a_failed_install_is_tried_again(checkout):
    fake_python(checkout / "bin" / "python3")
    calls, run = make(checkout, "test", fail="install")
    assert run.returncode != 0 and calls == ["-m pip install --editable .[test]"]
    assert make(checkout, "test")[0] == ["-m pip install --editable .[test]", "-m pytest -n 2"]


def test_lint_runs_its_tools_on_what_tests_install_and_bench_has_its_own_environment(checkout):
    fake_python(checkout / "bin" / "python3")
    installs = ["-m pip install --editable .[lint]", "-m pip install --editable .[test]"]
    tools = ["-m ruff check .", "-m ruff format --check .", "-m pyright --pythonpath .venv/bin/python"]
    assert make(checkout, "lint")[0] == installs + tools
    bench = ["-m pip install --editable . --requirement benchmarks/requirements.txt", "-m benchmarks.s1"]
    assert make(checkout, "bench")[0] == bench
    assert make(checkout, "bench", "MODULE=benchmarks.other")[0] == ["-m benchmarks.other"]
    make(checkout, "clean")
    assert not (checkout / ".venv").exists() and not (checkout / ".venv-bench").exists()


def test_ci_is_make_lint_then_make_test():
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert commands == ["make lint </dev/null", "make test </dev/null"]
