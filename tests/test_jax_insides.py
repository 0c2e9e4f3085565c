"""What fnet takes of jax beyond its stable interface: found by trying, named when it is not there, in one module."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import ShapedArray

from fnet.core import jax_insides
from fnet.core.jax_insides import constant, quick_jit, quick_options, scan_parts

ROOT = Path(__file__).parents[1]


def scan_of(consts, carry):
    """The equation of a scan over 3 steps with so many constants and so many carried."""

    def function(constants, carried, xs):
        return jax.lax.scan(lambda c, x: ([a * sum(constants, x) for a in c], x), carried, xs)

    numbers = [jnp.ones(()) * i for i in range(consts + carry)]
    closed = jax.make_jaxpr(function)(numbers[:consts], numbers[consts:], jnp.ones(3))
    return next(eqn for eqn in closed.jaxpr.eqns if eqn.primitive.name == "scan")


@pytest.mark.parametrize(("consts", "carry"), [(0, 1), (2, 1), (1, 3), (3, 0)])
def test_a_scans_constants_and_carry_are_counted(consts, carry):
    eqn = scan_of(consts, carry)
    # a scan over nothing carried has no use of its constants
    assert scan_parts(eqn) == (consts if carry else 0, carry)
    assert len(eqn.invars) == sum(scan_parts(eqn)) + 1


def test_a_scan_of_a_release_that_is_not_known_names_the_file_to_mend():
    with pytest.raises(
        NotImplementedError, match=r"describes a scan by \['jaxpr', 'parts'\].*fnet/core/jax_insides\.py"
    ):
        scan_parts(SimpleNamespace(params={"parts": 3, "jaxpr": None}))


def test_compile_options_that_a_release_does_not_have_are_left_out(monkeypatch):
    quick_options.cache_clear()
    monkeypatch.setattr(jax_insides, "QUICK", {"xla_no_such_thing": True, "xla_llvm_disable_expensive_passes": True})
    assert quick_options() == {"xla_llvm_disable_expensive_passes": True}
    assert quick_jit(lambda x: x + 1)(1) == 2
    monkeypatch.undo()
    quick_options.cache_clear()
    assert quick_options()["xla_backend_optimization_level"] == 0


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (True, bool, np.bool_),
        (3, np.int32, np.int32),
        (0.5, jnp.bfloat16, jnp.bfloat16),
        (1j, np.complex64, np.complex64),
    ],
)
def test_python_numbers_in_a_program_have_its_dtypes(value, dtype, expected):
    found = constant(value, ShapedArray((), jnp.dtype(dtype)))
    assert type(found) is jnp.dtype(expected).type and found == value


def test_numpy_arrays_in_a_program_have_its_dtypes():
    aval = ShapedArray((2,), jnp.dtype(np.float32))
    assert constant(np.array([1.0, 2.0]), aval).dtype == np.float32
    array = np.array([1.0, 2.0], np.float32)
    assert constant(array, aval) is array


def test_nothing_else_depends_on_a_release_of_jax():
    inside = re.compile(r"(?<!of )jax\._src|jax\.extend|num_consts|ft_in|xla_(?!flags)")
    files = [path for path in (ROOT / "fnet").rglob("*.py") if path.name != "jax_insides.py"]
    assert len(files) > 50
    found = [
        f"{path.name}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if inside.search(line)
    ]
    assert found == []


# --- forks ------------------------------------------------------------------------------------------------------------

FORKED = """
import multiprocessing, sys
import fnet, jax, jax.numpy as jnp

def step(ts, batch):
    return ts._replace(step=ts.step + 1), {"loss": jnp.mean(batch.targets)}

def work(_):
    ts = fnet.TrainState(jnp.asarray(0, jnp.int32), (), (), (), jax.random.key(0)) if sys.argv[1] == "before" else START
    return float(fnet.fit(step, ts, ([1.0, 2.0], [3.0, 5.0]), epochs=1, batch_size=2)[1].epochs["loss"][0])

if sys.argv[1] == "after":
    START = fnet.TrainState(jnp.asarray(0, jnp.int32), (), (), (), jax.random.key(0))
with multiprocessing.get_context("fork").Pool(1) as pool:
    print(pool.map_async(work, [0]).get(timeout=60))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_was_forked_after_jax_had_begun_is_told_so(when):
    command = [sys.executable, "-W", "ignore", "-c", FORKED, when]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    if when == "before":
        assert ended.stdout == "[4.0]\n", ended.stderr
    else:
        said = "fit: this process was forked after jax had begun, and lacks its threads; expected one that begins anew"
        assert said in ended.stderr and ended.returncode == 1
