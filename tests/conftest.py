"""Strict settings for every test: no implicit promotion of dtypes or ranks; x64 only where a test asks for it.

Tests compile many small programs, often the same ones, so both workers share jax's compilation cache on the disk.
"""

import gc
import os
import pathlib
import subprocess
import sys
from contextlib import contextmanager

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")


import jax
import numpy as np
import pytest
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache

from fnet.core import drawing
from fnet.core.jax_insides import quick_options
from fnet.gradcheck import kept
from fnet.runs import compilation


def flags_that_are_known(*flags: str) -> str:
    """Those of XLA's flags that this jaxlib has: an unknown one ends a process at once, so each is tried in another."""
    parse = "import jaxlib.xla_client as client; client.CompileOptions()"

    def known(flag: str) -> bool:
        environment = {**os.environ, "XLA_FLAGS": flag}
        done = subprocess.run([sys.executable, "-c", parse], env=environment, capture_output=True, text=True)
        assert done.returncode == 0 or "Unknown flag" in done.stderr, done.stderr
        return done.returncode == 0

    return " ".join(filter(known, flags))


# most of a test's time is compiling: level 1 of LLVM's optimizations needs three quarters of the default's time,
# and the older emitters, until jax 0.10, about half of it; level 0 makes a loop and a scan differ in their bits, so
# that it is for the modules that are not `EXACT`. A program is one piece, since the workers take all cores
if "XLA_FLAGS" not in os.environ:  # read at the first program; the workers have them from the process that starts them
    os.environ["XLA_FLAGS"] = flags_that_are_known(
        "--xla_backend_optimization_level=1",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish():
    """The cache is shared from here on, and what stands is not looked through for garbage again and again.

    While they collect, both workers import the same modules at once, and one may read what the other wrote in part.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"))
    compilation_cache.reset_cache()


# modules that compare bits of two programs or processes, or run longer than they compile: optimized as processes are
EXACT = {
    "lbfgs",
    "test_bad_input",
    "test_data_forms",
    "test_drawing",
    "test_experiments_images",
    "test_experiments_options",
    "test_export",
    "test_initializers",
    "test_resumes",
    "test_runs",
    "test_training",
}
added: dict[str, object] = {}  # to the options of every program that is compiled
options_of = compiler.get_compile_options


def with_those_added(*args, env_options_overrides=None, **kwargs):
    """The compiler's options of a program; jax has no setting for those of all programs of a module."""
    return options_of(*args, env_options_overrides={**added, **(env_options_overrides or {})}, **kwargs)


compiler.get_compile_options = with_those_added


@pytest.fixture(autouse=True)
def own_numbers(request, monkeypatch):
    """What a module's generator draws for a test is the same whatever has run before it in its worker."""
    for name in ("RNG", "rng"):
        if isinstance(getattr(getattr(request, "module", None), name, None), np.random.Generator):
            monkeypatch.setattr(request.module, name, np.random.default_rng(0))


@pytest.fixture(scope="module", autouse=True)
def own_programs(request):
    """A module's programs are compiled quickly, unless it is `EXACT`; what it has traced and compiled is forgotten.

    A worker would hold gigabytes; and jax' own memory of programs is bounded, so that late tests lost theirs to others.
    """
    added.update({} if request.node.path.stem in EXACT else quick_options())
    yield
    added.clear()
    jax.clear_caches()
    compilation._kept.clear()
    drawing._kept.clear()
    compilation._asked.clear()
    kept.forget()


@pytest.fixture
def x64():
    """Float64 within the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(0)


@contextmanager
def compiled_programs():
    """The names of the programs that XLA compiles meanwhile."""
    names = []

    def listen(event: str, duration_secs: float, **fields):
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(fields["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def on_two_devices(code: str) -> str:
    """What the code prints in a process of its own that sees two devices and finds the test modules."""
    tests = pathlib.Path(__file__).parent
    environment = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {os.environ['XLA_FLAGS']}",
        "PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent))),
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="session")
def browser():
    """One browser for all pages of a worker."""
    from tests.browser import chromium  # the other modules need no playwright

    with chromium() as found:
        yield found


DIFFERENTIATION = {
    "grad",
    "value_and_grad",
    "vjp",
    "jvp",
    "linearize",
    "linear_transpose",
    "jacrev",
    "jacfwd",
    "hessian",
}


@pytest.fixture
def no_autodiff(monkeypatch):
    """Every way into jax's differentiation raises."""
    from jax._src.interpreters import ad

    def refuse(*args, **kwargs):
        raise AssertionError("differentiation was called")

    for name in DIFFERENTIATION & set(dir(jax)):
        monkeypatch.setattr(jax, name, refuse)
    for name in ("vjp", "jvp", "linearize", "jvpfun", "linearize_jaxpr"):
        if hasattr(ad, name):
            monkeypatch.setattr(ad, name, refuse)
