"""What is drawn in pieces has the bits of the one program, whatever the model, the key and the settings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.drawing import KEPT, _kept, folded
from fnet.core.numerics import words_of
from fnet.layers.children import init_of
from tests.conftest import compiled_programs

IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")
IDS = jax.ShapeDtypeStruct((2, 8), "int32")
ROWS = jax.ShapeDtypeStruct((2, 6), "float32")


def written(init) -> fnet.Layer:
    """A layer of a user, of whom only the init matters here."""
    return fnet.Layer("written", init, lambda params, state, x, *, key=None, train=False: (x, state, ()), lambda *_: ())


def split_by_hand(key, x):
    a, b = jax.random.split(key)
    return {
        "a": jax.random.normal(a, (3, 4)),
        "b": jax.random.uniform(b, (3, 4)),
        "c": jax.random.normal(a, (3, 4)),
    }, ()


def one_flat_draw(key, x):
    flat = jax.random.normal(key, (40,))
    return {"w": flat[:30].reshape(5, 6) / 7, "b": flat[30:]}, {"mean": jnp.zeros(3)}


def of_unit_rows(key, x):
    w = jax.random.normal(jax.random.fold_in(key, 3), (64, 33))
    return {"w": w / jnp.linalg.norm(w, axis=1, keepdims=True), "sum": w.sum()}, ()


def of_constants(key, x):
    table = jnp.arange(12.0).reshape(3, 4)
    return {"table": table, "n": np.arange(3), "k": 2.5, "w": table * jax.random.normal(key, (3, 4))}, {"key": key}


def in_a_loop(key, x):
    def add(i, w):
        return w + jax.random.normal(jax.random.fold_in(key, i), (5,))

    return {"w": jax.lax.fori_loop(0, 3, add, jnp.zeros(5))}, ()


WRITTEN = split_by_hand, one_flat_draw, of_unit_rows, of_constants, in_a_loop
MODELS = {
    "mlp": (fnet.mlp(5, 4, 3), ROWS),
    "resnet": (fnet.models.resnet(10, width=4), IMAGES),
    "gates": (fnet.layers.serial(fnet.layers.embedding(9, 6), fnet.layers.lstm(5), fnet.layers.gru(4)), IDS),
    "gpt": (fnet.models.gpt(9, length=8, layers=2, features=6, heads=2), IDS),
    "gpt, repeated": (fnet.models.gpt(9, length=8, layers=3, features=6, heads=2, repeated=True), IDS),
    "copies of copies": (fnet.layers.repeat(fnet.layers.repeat(fnet.layers.dense(6), 2), 3), ROWS),
    "hand rule": (fnet.layers.with_hand_backward(fnet.mlp(5, 3)), ROWS),
    "no parameters": (fnet.layers.relu(), ROWS),
    **{f"written: {init.__name__}": (written(init), ROWS) for init in WRITTEN},
}
KEYS = {
    "threefry": lambda: jax.random.key(3),
    "raw words": lambda: jax.random.PRNGKey(3),
    "folded": lambda: jax.random.fold_in(jax.random.key(3), 5),
    "rbg": lambda: jax.random.key(3, impl="rbg"),
    "unsafe_rbg": lambda: jax.random.key(3, impl="unsafe_rbg"),
}


def whole(model, key, x):
    """What one program draws."""
    return jax.jit(lambda key: init_of(model, key, x))(key)


def require_same(one, other):
    """Of trees: the same leaves to the bit, of the same types."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.aval == b.aval  # dtype, shape and weak type
        a, b = words_of(a), words_of(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", MODELS)
def test_pieces_have_the_bits_of_the_one_program(name, key):
    model, x = MODELS[name]
    require_same(fnet.init(model, key, x), whole(model, key, x))


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize(
    "name", ["mlp", "gates", "copies of copies", "written: split_by_hand", "written: of_constants"]
)
def test_keys_of_every_kind_are_followed(name, kind):
    (model, x), key = MODELS[name], KEYS[kind]()
    require_same(fnet.init(model, key, x), whole(model, key, x))


@pytest.mark.parametrize("name", ["mlp", "gates", "written: split_by_hand"])
def test_settings_of_jax_are_followed(name, key):
    model, x = MODELS[name]
    for setting in (jax.threefry_partitionable(False), jax.threefry_partitionable(True), jax.enable_x64(True)):
        with setting:
            require_same(fnet.init(model, key, x), whole(model, key, x))


def test_float64_is_drawn_as_such(key, x64):
    model, x = MODELS["mlp"][0], jax.ShapeDtypeStruct((2, 6), "float64")
    made = fnet.init(model, key, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {np.dtype("float64")}
    require_same(made, whole(model, key, x))


@pytest.mark.parametrize("name", ["mlp", "gates", "gpt, repeated", "written: of_unit_rows"])
def test_they_are_what_the_layers_draw_one_by_one(name, key):
    model, x = MODELS[name]
    made, apart = fnet.init(model, key, x), model.init(key, x)
    for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(apart), strict=True):
        # operations by themselves round once more: a draw is a handful of them
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=16 * float(np.finfo(np.float32).eps), atol=1e-7)


def test_a_traced_key_is_traced(key):
    model, x = MODELS["gpt"]
    require_same(jax.jit(lambda key: fnet.init(model, key, x))(key), whole(model, key, x))
    keys = jax.random.split(key, 3)
    require_same(jax.vmap(lambda key: fnet.init(model, key, x))(keys), jax.vmap(lambda key: whole(model, key, x))(keys))
    shapes = jax.eval_shape(lambda key: fnet.init(model, key, x), key)
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [
        leaf.shape for leaf in jax.tree.leaves(whole(model, key, x))
    ]


def test_a_key_that_is_known_within_a_traced_function_is_staged(key):
    model, x = MODELS["mlp"]
    require_same(jax.jit(lambda: fnet.init(model, key, x))(), whole(model, key, x))
    assert str(jax.make_jaxpr(lambda: fnet.init(model, key, x))()).count("random_bits") == 3
    doubled = jax.vmap(lambda a: a * fnet.init(model, key, x)[0]["dense_0"]["w"][0, 0])(jnp.arange(3.0))
    assert doubled[1] == fnet.init(model, key, x)[0]["dense_0"]["w"][0, 0]


def test_an_initializer_of_a_traced_number_is_traced(key):
    def norm(stddev):
        model = fnet.layers.dense(4, weights=fnet.initializers.constant(stddev), bias=None)
        return jnp.square(fnet.init(model, key, ROWS)[0]["w"]).sum()

    assert jax.grad(norm)(3.0) == 2 * 3.0 * 24  # d/ds Σ s² over 6 × 4 entries


def test_nothing_is_compiled_where_nothing_is_to_be(key):
    model, x = MODELS["mlp"]
    with jax.disable_jit():
        with compiled_programs() as names:
            made = fnet.init(model, key, x)
        require_same(dict(enumerate(made)), dict(enumerate(model.init(key, x))))
    assert "draw" not in names


def test_what_calls_back_to_the_host_does_so_once(key):
    seen = []

    def init(key, x):
        jax.debug.callback(lambda w: seen.append(float(w)), jax.random.normal(jax.random.fold_in(key, 1), ()))
        return {"w": jax.random.normal(jax.random.fold_in(key, 2), (3,))}, ()

    jax.block_until_ready(fnet.init(written(init), key, ROWS))
    jax.effects_barrier()
    assert seen == [float(jax.random.normal(jax.random.fold_in(key, 1), ()))]


def test_leaves_are_buffers_of_their_own(key):
    model, x = MODELS["gpt"]
    leaves = jax.tree.leaves(fnet.init(model, key, x))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_depth_costs_no_programs_and_a_second_init_none(key):
    def programs(layers):
        model = fnet.models.gpt(9, length=8, layers=layers, features=10, heads=2)
        with compiled_programs() as names:
            fnet.init(model, key, IDS)
        return len(names)

    first = programs(2)
    # the table, positions, four weights of a block, the zeros and ones; and some are the same
    assert 3 <= first <= 8
    assert programs(5) == 1  # the zeros and ones
    assert programs(2) == programs(5) == 0


def test_arrays_that_a_model_holds_go_with_it(key):
    def programs():
        model = fnet.layers.dense(4, weights=lambda key, shape, dtype: jnp.asarray(table), bias=None)
        with compiled_programs() as names:
            np.testing.assert_array_equal(fnet.init(model, key, ROWS)[0]["w"], table)
        return len(names)

    table, before = np.arange(24, dtype="float32").reshape(6, 4), len(_kept)
    assert programs() == programs() == 1
    assert len(_kept) == before <= KEPT


def test_what_failed_to_compile_is_compiled_another_time(key, monkeypatch):
    def compile(lowered, options):
        raise RuntimeError("no memory")

    model, before = fnet.mlp(7, 11), len(_kept)
    with monkeypatch.context() as patched:
        patched.setattr(jax.stages.Lowered, "compile", compile)
        with pytest.raises(RuntimeError, match="no memory"):
            fnet.init(model, key, ROWS)
    assert len(_kept) == before
    require_same(fnet.init(model, key, ROWS), whole(model, key, ROWS))


def test_a_key_on_a_chosen_device_draws_there(key):
    model, x = MODELS["mlp"]
    made = fnet.init(model, jax.device_put(key, jax.devices()[0]), x)
    assert all(leaf.committed for leaf in jax.tree.leaves(made))
    assert not any(leaf.committed for leaf in jax.tree.leaves(fnet.init(model, key, x)))


def test_keys_are_folded_on_the_host_as_jax_folds_them():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, (50, 2), np.uint32)
    data = np.append(rng.integers(0, 2**32, 49, np.uint32), np.uint32(2**32 - 1))
    keys = jax.random.wrap_key_data(jnp.asarray(words))
    expected = jax.random.key_data(jax.vmap(jax.random.fold_in)(keys, data))
    np.testing.assert_array_equal(folded(words, data), expected)
    np.testing.assert_array_equal([folded(*each) for each in zip(words, data, strict=True)], expected)
    by_one = jax.random.key_data(jax.vmap(jax.random.fold_in, (0, None))(keys, data[0]))
    np.testing.assert_array_equal(folded(words, data[0]), by_one)
    of_one = jax.random.key_data(jax.vmap(jax.random.fold_in, (None, 0))(keys[0], data))
    np.testing.assert_array_equal(folded(words[0], data), of_one)


ALL = """
import jax, numpy as np
import fnet
from experiments.gradient_audit import constructors, layer_cases
from fnet.layers.children import init_of

for name, (layer, x) in layer_cases(constructors(None), np.random.default_rng(0)).items():
    shapes, key = jax.eval_shape(lambda x: x, x), jax.random.key(1)
    made, whole = fnet.init(layer, key, x), jax.jit(lambda key: init_of(layer, key, shapes))(key)
    bits = lambda a: (a.aval, np.asarray(a).tobytes())
    same = jax.tree.map(lambda a, b: bits(a) == bits(b), made, whole)
    print(name, all(jax.tree.leaves(same)))
"""


@pytest.mark.slow
def test_every_layer_has_the_bits_of_the_one_program_as_processes_compile():
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", ALL], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert len(told) > 100 and [name for name, same in told if same != "True"] == []
