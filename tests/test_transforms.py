"""Transforms by hand and in NumPy; chains, groups and wrappers as optimizers of their own; accumulation.

Legend: B batch, T updates.
"""

from __future__ import annotations

import functools
import math
import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.numerics import weighted_mean
from fnet.core.trees import named_leaves
from fnet.gradients.engines import accumulate
from fnet.layers import batch_norm, dense, dropout, serial, tanh
from fnet.metrics import gradient_norms
from fnet.optimizers import (
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamw,
    amsgrad,
    averaged,
    averages,
    chain,
    describe,
    dynamic_loss_scale,
    frozen,
    groups,
    lamb,
    lookahead,
    master_weights,
    momentum,
    muon,
    nadam,
    nonfinite,
    radam,
    reduce_on_plateau,
    rmsprop,
    set_hyper,
    sgd,
    skip_nonfinite,
    told,
)
from fnet.optimizers.schedules import exponential
from fnet.optimizers.transforms import (
    adaptive_clip,
    centralize,
    clip_by_global_norm,
    clip_by_leaf_norm,
    clip_by_value,
    gradient_noise,
    l2_decay,
)
from fnet.types import Optimizer, Schedule
from tests.oracles import assert_leaves_close


def applied(transform, grads, params=None):
    """The gradients after one update of a transform."""
    params = jax.tree.map(jnp.zeros_like, grads) if params is None else params
    return transform.update(grads, transform.init(params), params)[0]


def updates(optimizer, params, grads, values=None):
    """The parameters and the state after each of the gradients, one compiled update at a time."""
    opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i, g in enumerate(grads):
        value = {} if values is None else {"value": values[i]}
        params, opt_state = update(g, opt_state, params, **value)
        yield params, opt_state


def compilations(function) -> int:
    return function._cache_size()


def arrays(*rows):
    return [jnp.asarray(row, jnp.float32) for row in rows]


# --- clipping --------------------------------------------------------------------------------------------------------

GRADS = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0], [0.0]])}


@pytest.mark.parametrize(
    "transform, a, b",
    [
        (clip_by_value(3.5), [3, 0], [3.5, 0]),
        (clip_by_value(0.5), [0.5, 0], [0.5, 0]),
        (clip_by_leaf_norm(3.5), [3, 0], [3.5, 0]),
        (clip_by_leaf_norm(1.0), [1, 0], [1, 0]),
        (clip_by_global_norm(5.0), [3, 0], [4, 0]),  # ‖g‖ is 5
        (clip_by_global_norm(1.0), [0.6, 0], [0.8, 0]),
        (clip_by_global_norm(100.0), [3, 0], [4, 0]),
    ],
    ids=["value 3.5", "value 0.5", "leaf 3.5", "leaf 1", "global 5", "global 1", "global 100"],
)
def test_clipping_by_hand(transform, a, b):
    clipped = applied(transform, GRADS)
    np.testing.assert_allclose(clipped["a"], a, rtol=1e-6)
    np.testing.assert_allclose(clipped["b"].ravel(), b, rtol=1e-6)
    clipped = applied(transform, jax.tree.map(jnp.negative, GRADS))
    np.testing.assert_allclose(clipped["a"], np.negative(a), rtol=1e-6)


def test_adaptive_clipping_is_by_unit_relative_to_its_weights():
    # columns are units: gradients of norm 5 and 1, weights of norm 10 and 0 (which counts as eps = 1)
    params = {"w": jnp.asarray([[6.0, 0.0], [8.0, 0.0]]), "b": jnp.asarray([2.0, 0.0])}
    grads = {"w": jnp.asarray([[3.0, 0.6], [4.0, 0.8]]), "b": jnp.asarray([-1.0, 0.05])}
    clipped = applied(adaptive_clip(0.1, 1.0), grads, params)
    np.testing.assert_allclose(clipped["w"], [[0.6, 0.06], [0.8, 0.08]], rtol=1e-6)
    np.testing.assert_allclose(clipped["b"], [-0.2, 0.05], rtol=1e-6)


CLIPPINGS = [clip_by_value, clip_by_leaf_norm, clip_by_global_norm, adaptive_clip]


@pytest.mark.parametrize("build", CLIPPINGS)
def test_zero_gradients_and_empty_trees_stay_what_they_are(build):
    assert (applied(build(1.0), jnp.zeros(3)) == 0).all()
    for tree in ((), {}, {"a": jnp.zeros((0, 3))}):
        clipped = applied(build(1.0), tree)
        assert jax.tree.structure(clipped) == jax.tree.structure(tree)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_norms_of_large_16_bit_gradients_do_not_overflow(dtype):
    # 30000² overflows float16; the norm is 60000
    grads = {"a": jnp.full(2, 30000.0, dtype), "b": jnp.full((1, 2), 30000.0, jnp.float16)}
    clipped = applied(clip_by_global_norm(6.0), grads)
    assert [leaf.dtype for leaf in jax.tree.leaves(clipped)] == [dtype, jnp.float16]
    np.testing.assert_allclose(np.asarray(clipped["a"], np.float32), 3.0, rtol=2**-8)
    np.testing.assert_allclose(np.asarray(applied(clip_by_leaf_norm(6.0), grads)["b"], np.float32), 4.2426, rtol=1e-3)
    # the factor 1e-6 / 6e4 is 0 in float16
    tiny = applied(clip_by_global_norm(1e-3), grads)["a"]
    np.testing.assert_allclose(np.asarray(tiny, np.float32), 5e-4, rtol=2**-8)


def test_a_gradient_that_is_not_finite_stays_to_be_found():
    clipped = applied(clip_by_global_norm(1.0), {"a": jnp.asarray([math.nan, 1.0]), "b": jnp.ones(1)})
    assert np.isnan(clipped["a"][0])
    clipped = applied(clip_by_global_norm(1.0), {"a": jnp.asarray([math.inf, 1.0])})
    assert not np.isfinite(clipped["a"]).all()


def test_infinite_gradients_stay_for_skip_nonfinite_to_find():
    g = jnp.asarray([math.inf, -math.inf, math.nan, 3.0, -0.5])
    np.testing.assert_array_equal(applied(clip_by_value(1.0), g), [math.inf, -math.inf, math.nan, 1, -0.5])
    for build in CLIPPINGS:
        optimizer = chain(build(1.0), skip_nonfinite(sgd(1.0)))
        params, opt_state = optimizer.update(g, optimizer.init(g), jnp.ones(5))
        assert opt_state.optimizer.skipped == 1 and (params == 1).all()


def test_transforms_of_16_bit_gradients_hold_their_numbers_in_float32():
    # 1e-8 is 0 in float16, 1e-8 · 2000 is not
    g, p = jnp.zeros(3, jnp.float16), jnp.full(3, 2000.0, jnp.float16)
    decayed = applied(l2_decay(1e-8), g, p)
    assert decayed.dtype == jnp.float16
    np.testing.assert_array_equal(decayed, np.float16(1e-8 * 2000))
    # of the noise beside zeros, float32's rounded once
    key, zeros = jax.random.key(0), jnp.zeros(100)
    noise, wide = (applied(gradient_noise(key, 1e-7, 0.0), zeros.astype(dtype)) for dtype in (jnp.float16, None))
    assert noise.dtype == jnp.float16
    np.testing.assert_array_equal(noise, np.asarray(wide).astype(np.float16))


# --- decay, centring, noise ------------------------------------------------------------------------------------------


def test_l2_decay_adds_to_the_gradients_of_the_leaves_of_its_mask():
    params = {"b": jnp.asarray([2.0]), "w": jnp.asarray([[2.0]])}
    grads = {"b": jnp.asarray([1.0]), "w": jnp.asarray([[1.0]])}
    assert jax.tree.leaves(applied(l2_decay(0.5), grads, params)) == [2, 2]
    assert jax.tree.leaves(applied(l2_decay(0.5, "w"), grads, params)) == [1, 2]
    assert jax.tree.leaves(applied(l2_decay(0.5, lambda path, leaf: leaf.ndim < 2), grads, params)) == [2, 1]
    with pytest.raises(ValueError, match=re.escape("l2_decay: the pattern '*/w' matches no parameter; there are b, w")):
        l2_decay(0.5, "*/w").init(params)


def test_decay_in_the_gradient_and_decoupled_decay_are_one_for_sgd_and_two_for_adam():
    start, grads = jnp.asarray([1.0, -2.0]), arrays([0.5, 1.0], [-1.0, 2.0])
    one, two = (
        [p for p, _ in updates(o, start, grads)][-1]
        for o in (chain(l2_decay(0.3), sgd(0.1)), sgd(0.1, weight_decay=0.3))
    )
    np.testing.assert_allclose(one, two, rtol=1e-6)
    one, two = (
        [p for p, _ in updates(o, start, grads)][-1]
        for o in (chain(l2_decay(0.3), adam(0.1)), adamw(0.1, weight_decay=0.3))
    )
    assert np.abs(np.asarray(one - two)).max() > 0.01


def test_centralize_takes_off_each_units_mean_and_leaves_vectors(x64):
    g = np.random.default_rng(0).normal(size=(2, 3, 4))
    grads = {"conv": jnp.asarray(g), "w": jnp.asarray(g[0]), "b": jnp.asarray(g[0, 0]), "scale": jnp.asarray(1.5)}
    centred = applied(centralize(), grads)
    np.testing.assert_allclose(centred["conv"], g - g.mean((0, 1)), atol=1e-15)
    np.testing.assert_allclose(centred["w"], g[0] - g[0].mean(0), atol=1e-15)
    np.testing.assert_array_equal(centred["b"], g[0, 0])
    assert centred["scale"] == 1.5


def test_gradient_noise_has_the_variance_of_its_count_and_one_draw_for_each_count_leaf_and_key():
    transform, zeros = gradient_noise(jax.random.key(1), 0.5, 0.8), {"a": jnp.zeros(20000), "b": jnp.zeros(20000)}
    first = state = transform.init(zeros)
    draws = []
    for count in range(3):
        assert state.count == count
        noise, state = transform.update(zeros, state, zeros)
        draws += [np.asarray(leaf) for leaf in noise.values()]
        # the standard error of a standard deviation of 40000 draws is 0.35 %
        np.testing.assert_allclose(np.std(draws[-2:]), 0.5 / (1 + count) ** 0.4, rtol=0.02)
    draws.append(np.asarray(applied(gradient_noise(jax.random.key(2), 0.5, 0.8), zeros)["a"]))
    assert np.abs(np.corrcoef(draws) - np.eye(7)).max() < 0.03  # four standard errors
    again, _ = transform.update(zeros, first, zeros)
    np.testing.assert_array_equal(again["a"], draws[0])
    shifted, _ = transform.update({"a": jnp.full(20000, 3.0), "b": zeros["b"]}, first, zeros)
    np.testing.assert_allclose(shifted["a"], draws[0] + 3, rtol=1e-6)


def test_the_key_of_the_noise_is_copied_so_that_a_state_can_be_donated():
    key = jax.random.key(0)
    transform = gradient_noise(key)
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf, state), donate_argnums=0)(transform.init(jnp.ones(2)))
    assert not key.is_deleted()


@pytest.mark.parametrize(
    "build, options, message",
    [
        (clip_by_value, (0,), "clip_by_value: limit = 0; expected 0 < limit < inf"),
        (clip_by_leaf_norm, (-1,), "clip_by_leaf_norm: limit = -1; expected 0 < limit < inf"),
        (clip_by_global_norm, (math.nan,), "clip_by_global_norm: limit = nan; expected 0 < limit < inf"),
        (adaptive_clip, (0.1, 0), "adaptive_clip: eps = 0; expected 0 < eps < inf"),
        (l2_decay, (-0.1,), "l2_decay: l2 = -0.1; expected 0 <= l2 < inf"),
        (gradient_noise, (None, -1), "gradient_noise: scale = -1; expected 0 <= scale < inf"),
        (functools.partial(averaged, sgd(0.1)), (1.0,), "averaged: decay = 1.0; expected 0 <= decay < 1"),
        (functools.partial(lookahead, sgd(0.1)), (0,), "lookahead: every = 0; expected a whole number, 1 <= every <= "),
        (
            functools.partial(dynamic_loss_scale, sgd(0.1)),
            (0,),
            "dynamic_loss_scale: initial = 0; expected 0 < initial",
        ),
        (functools.partial(reduce_on_plateau, sgd(0.1), window=1), (1.0,), "factor = 1.0; expected 0 < factor < 1"),
        (
            functools.partial(reduce_on_plateau, sgd(0.1), window=0),
            (),
            "window = 0; expected a whole number, 1 <= window",
        ),
        (functools.partial(reduce_on_plateau, sgd(0.1), window=2.5), (), "window = 2.5; expected a whole number, 1 <="),
        (
            functools.partial(reduce_on_plateau, sgd(0.1), window=1, patience=0.5),
            (),
            "patience = 0.5; expected a whole",
        ),
        (functools.partial(averaged, sgd(0.1), every=0.5), (), "averaged: every = 0.5; expected a whole number, 1 <= "),
        # float32 would make it 16777216
        (functools.partial(averaged, sgd(0.1), start=2**24 + 1), (), "0 <= start <= 16777216"),
        (functools.partial(lookahead, sgd(0.1)), (0.5,), "lookahead: every = 0.5; expected a whole number, 1 <= every"),
        (
            functools.partial(lookahead, sgd(0.1)),
            (5, 1.5),
            "lookahead: slow_rate = 1.5; expected 0 <= slow_rate <= 1",
        ),
        (
            functools.partial(dynamic_loss_scale, sgd(0.1), interval=0.5),
            (),
            "dynamic_loss_scale: interval = 0.5; expected a",
        ),
    ],
)
def test_a_number_out_of_range_is_named(build, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build(*options)


def test_what_is_no_optimizer_and_no_key_is_named_at_construction():
    wrappers = averaged, lookahead, skip_nonfinite, master_weights, dynamic_loss_scale
    for wrapper in (*wrappers, functools.partial(reduce_on_plateau, window=1)):
        for inner in (0.1, sgd):
            with pytest.raises(TypeError, match=r"expected (an|the) Optimizer"):
                wrapper(inner)
    with pytest.raises(
        TypeError, match=re.escape("gradient_noise: key = 0; expected a key, such as jax.random.key(0)")
    ):
        gradient_noise(0)  # type: ignore[arg-type]
    for key in (jax.random.key(0), jax.random.PRNGKey(0)):
        gradient_noise(key).init(())


# --- chains ----------------------------------------------------------------------------------------------------------


def test_a_chain_applies_its_transforms_in_order():
    start, g = jnp.zeros(1), jnp.asarray([5.0])
    decay_of_2 = l2_decay(1.0)
    for transforms, expected in [
        ((clip_by_value(1.0), decay_of_2), 3.0),  # 1 + 2
        ((decay_of_2, clip_by_value(1.0)), 1.0),  # min(5 + 2, 1)
        ((decay_of_2, clip_by_value(6.0), decay_of_2), 8.0),  # min(7, 6) + 2
    ]:
        optimizer = chain(*transforms, sgd(1.0))
        params, opt_state = optimizer.update(g, optimizer.init(start + 2), start + 2)
        assert params == 2 - expected
        assert opt_state.step == 1 and opt_state.rate == 1
    assert list(opt_state.transforms) == ["l2_decay", "clip_by_value", "l2_decay_1"]


def test_changing_a_transforms_number_compiles_nothing_and_changes_that_number_only():
    optimizer = chain(clip_by_value(1.0), l2_decay(0.0), l2_decay(0.0), momentum(1.0, 0.5))
    update, params, g = jax.jit(optimizer.update), jnp.asarray([2.0]), jnp.asarray([5.0])
    first = optimizer.init(params)
    assert update(g, first, params)[0] == 1
    assert update(g, set_hyper(first, limit=3.0), params)[0] == -1
    assert update(g, set_hyper(first, **{"l2_decay_1/l2": 1.0}), params)[0] == -1
    assert update(g, set_hyper(first, learning_rate=0.5, limit=4), params)[0] == 0
    assert compilations(update) == 1
    names = "clip_by_value/limit, l2_decay/l2, l2_decay_1/l2, learning_rate, decay"
    with pytest.raises(ValueError, match=re.escape(f"several hyperparameters are called 'l2'; there are {names}")):
        set_hyper(first, l2=1.0)
    with pytest.raises(ValueError, match=re.escape(f"no hyperparameter is called 'eps'; there are {names}")):
        set_hyper(first, eps=1.0)


def test_a_chain_of_anything_else_is_refused():
    for parts in [
        (),
        (clip_by_value(1.0),),
        (sgd(0.1), clip_by_value(1.0)),
        (sgd(0.1), sgd(0.1)),
        (lambda g: g, sgd(1.0)),
    ]:
        with pytest.raises(TypeError, match="expected transforms and then one optimizer"):
            chain(*parts)


def test_a_chain_loses_no_transform_to_another_of_its_name():
    clip = clip_by_value(1.0)
    with pytest.raises(ValueError, match="chain: two transforms would be called 'clip_by_value_1'; give one of them"):
        chain(clip, clip._replace(name="clip_by_value_1"), clip, sgd(0.1))


def test_a_wrappers_numbers_do_not_pass_for_the_optimizers():
    opt_state = averaged(momentum(0.1, 0.5), 0.9).init(jnp.ones(1))
    changed = set_hyper(opt_state, decay=0.25)
    assert (changed.hyper.decay, changed.optimizer.hyper.decay) == (np.float32(0.9), 0.25)
    changed = set_hyper(opt_state, **{"averaged/decay": 0.25})
    assert (changed.hyper.decay, changed.optimizer.hyper.decay) == (0.25, 0.5)
    assert set_hyper(opt_state, every=3).hyper.every == 3
    nested = lookahead(averaged(sgd(0.1)), 5).init(jnp.ones(1))
    assert set_hyper(nested, **{"averaged/every": 3}).optimizer.hyper.every == 3


def test_a_number_that_stands_twice_at_one_path_is_changed_in_the_state_within():
    for optimizer, name, problem in [
        (chain(clip_by_value(1.0), chain(clip_by_value(2.0), sgd(0.1))), "clip_by_value/limit", "limit"),
        (averaged(averaged(sgd(0.1), 0.5), 0.25), "averaged/decay", "decay"),
    ]:
        opt_state = optimizer.init(jnp.ones(1))
        for given in (name, problem):
            with pytest.raises(ValueError, match=f"set_hyper: several hyperparameters are called '{given}'"):
                set_hyper(opt_state, **{given: 0.75})
        within = opt_state._replace(optimizer=set_hyper(opt_state.optimizer, **{name: 0.75}))
        changed = [
            float(new) for new, old in zip(*map(jax.tree.leaves, (within, opt_state)), strict=True) if new != old
        ]
        assert changed == [0.75]


@pytest.mark.parametrize(
    "optimizer, changes, message",
    [
        (averaged(sgd(0.1)), {"every": 0}, "every = 0; expected a whole number, 1 <= every <= 16777216"),
        (averaged(sgd(0.1)), {"start": 0.5}, "start = 0.5; expected a whole number, 0 <= start"),
        (averaged(sgd(0.1)), {"every": np.asarray([1.5])}, "every has shape (1,); expected one number"),
        (lookahead(sgd(0.1)), {"slow_rate": 2}, "slow_rate = 2; expected 0 <= slow_rate <= 1"),
        (dynamic_loss_scale(sgd(0.1)), {"backoff": 3}, "backoff = 3; expected 0 < backoff < 1"),
        (dynamic_loss_scale(sgd(0.1)), {"growth": 0}, "growth = 0; expected 0 < growth < inf"),
        (reduce_on_plateau(sgd(0.1), window=1), {"factor": 1}, "factor = 1; expected 0 < factor < 1"),
        (reduce_on_plateau(sgd(0.1), window=1), {"window": 2.5}, "window = 2.5; expected a whole number"),
        (chain(clip_by_value(1.0), sgd(0.1)), {"limit": 0}, "limit = 0; expected 0 < limit < inf"),
        (chain(adaptive_clip(), sgd(0.1)), {"eps": 0}, "eps = 0; expected 0 < eps < inf"),
    ],
)
def test_a_wrappers_numbers_stay_in_the_range_that_its_construction_asks(optimizer, changes, message):
    with pytest.raises(ValueError, match=re.escape(f"set_hyper: {message}")):
        set_hyper(optimizer.init(jnp.ones(2)), **changes)


# --- groups ----------------------------------------------------------------------------------------------------------

MODEL = {
    "dense_0": {"b": jnp.ones(2), "w": jnp.ones((3, 2))},
    "dense_1": {"b": jnp.ones(1), "w": jnp.ones((2, 1))},
    "embedding_0": (jnp.ones((4, 3)),),
}
GROUPED = groups({"embedding_0/*": frozen(), "*/b": sgd(0.5), "dense_1/*": sgd(0.25)}, default=sgd(0.125))


def test_each_group_has_its_own_optimizer_and_the_first_pattern_decides():
    (params, opt_state), *_ = updates(GROUPED, MODEL, [MODEL])
    leaves = {path: float(leaf.ravel()[0]) for path, leaf in named_leaves(params)}
    expected = {"dense_0/b": 0.5, "dense_0/w": 0.875, "dense_1/b": 0.5, "dense_1/w": 0.75, "embedding_0/0": 1.0}
    assert leaves == expected
    assert jax.tree.structure(params) == jax.tree.structure(MODEL)
    assert opt_state.step == 1
    assert {k: float(v) for k, v in opt_state.rate.items()} == {
        "embedding_0/*": 0, "*/b": 0.5, "dense_1/*": 0.25, "default": 0.125
    }  # fmt: skip


def test_a_number_of_one_group_changes_by_its_path_without_compiling():
    update, first = jax.jit(GROUPED.update), GROUPED.init(MODEL)
    update(MODEL, first, MODEL)
    params, _ = update(MODEL, set_hyper(first, **{"*/b/learning_rate": 1.0}), MODEL)
    assert params["dense_0"]["b"][0] == 0 and params["dense_0"]["w"][0, 0] == 0.875
    assert compilations(update) == 1
    with pytest.raises(ValueError, match="several hyperparameters are called 'learning_rate'; there are"):
        set_hyper(first, learning_rate=1.0)


def test_a_clipping_within_a_group_is_over_that_group_and_one_before_it_over_all():
    params, g = {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.asarray([3.0]), "b": jnp.asarray([4.0])}
    within = groups({"a": chain(clip_by_global_norm(1.0), sgd(1.0))}, default=sgd(1.0))
    before = chain(clip_by_global_norm(1.0), groups({"a": sgd(1.0)}, default=sgd(2.0)))
    (new, _), *_ = updates(within, params, [g])
    np.testing.assert_allclose([new["a"][0], new["b"][0]], [-1, -4], rtol=1e-6)
    (new, _), *_ = updates(before, params, [g])
    np.testing.assert_allclose([new["a"][0], new["b"][0]], [-0.6, -1.6], rtol=1e-6)


@pytest.mark.parametrize(
    "by_pattern, default, message",
    [
        (
            {"dense_7/*": sgd(0.1)},
            sgd(0.1),
            "groups: the pattern 'dense_7/*' matches no parameter; there are dense_0/b",
        ),
        (
            {"*": sgd(0.1), "*/b": sgd(0.2)},
            None,
            "all that '*/b' matches belongs to patterns before it; order them anew",
        ),
        ({"*/b": sgd(0.1)}, None, "groups: dense_0/w matches none of */b, and there is no default"),
    ],
    ids=["nothing", "shadowed", "no default"],
)
def test_a_pattern_without_leaves_and_a_leaf_without_a_group_are_errors(by_pattern, default, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        groups(by_pattern, default).init(MODEL)


def test_a_group_of_what_is_no_optimizer_is_an_error():
    with pytest.raises(TypeError, match=re.escape("groups: what belongs to '*/b' is 0.1; expected an Optimizer")):
        groups({"*/b": 0.1})


def test_two_leaves_of_one_path_are_refused():
    params = {"a": {"b": jnp.ones(1)}, "a/b": jnp.zeros(1)}
    for optimizer in (groups({"a/b": sgd(0.1)}), adam()):
        with pytest.raises(ValueError, match="two leaves have the path 'a/b'; expected one: rename"):
            optimizer.init(params)
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        sgd(0.1).update(params, sgd(0.1).init(()), params)


def test_frozen_parameters_still_want_gradients_that_fit():
    with pytest.raises(ValueError, match="gradient does not fit the parameters: missing w; unexpected v"):
        frozen().update({"v": jnp.ones(1)}, frozen().init({}), {"w": jnp.ones(1)})


def test_groups_train_a_network_with_muon_inside_and_adam_outside():
    model = fnet.mlp(8, 8, 3)
    x = jax.random.normal(jax.random.key(0), (24, 5))
    batch = fnet.Batch(x, jnp.argmax(x[:, :3], 1))
    params, state = fnet.init(model, jax.random.key(1), x)
    optimizer = groups({"dense_1/w": muon(0.05), "*/w": adamw(0.02)}, default=adam(0.02))
    step = jax.jit(fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer))
    ts = fnet.init_train_state(params, optimizer, jax.random.key(2), state)
    losses = []
    for _ in range(40):
        ts, metrics = step(ts, batch)
        losses.append(float(metrics["loss"].value))
    assert losses[-1] < 0.3 * losses[0]


# --- description -----------------------------------------------------------------------------------------------------


def test_describe_says_which_leaf_gets_what():
    optimizer = chain(
        clip_by_global_norm(1.0),
        l2_decay(0.5, "dense_1/w"),
        groups({"*/b": sgd(exponential(0.5, 0.9, 10)), "embedding_0/*": frozen()}, adamw(0.01, mask="dense_0/*")),
    )
    adam_numbers = "adamw learning_rate=0.01 b1=0.9 b2=0.999 eps=1e-08 eps_root=0"
    schedule = "sgd learning_rate=(start 0.5, decay_rate 0.9, decay_steps 10)"
    before = "clip_by_global_norm limit=1 → "
    expected = [
        f"dense_0/b      (2,)    {before}[*/b] {schedule}",
        f"dense_0/w      (3, 2)  {before}[default] {adam_numbers} weight_decay=0.01",
        f"dense_1/b      (1,)    {before}[*/b] {schedule}",
        f"dense_1/w      (2, 1)  {before}l2_decay l2=0.5 → [default] {adam_numbers} no decay",
        f"embedding_0/0  (4, 3)  {before}[embedding_0/*] frozen",
    ]
    assert describe(optimizer, MODEL).splitlines() == expected
    assert describe(optimizer, jax.eval_shape(lambda: MODEL)).splitlines() == expected


def test_describe_knows_wrappers_traced_numbers_optimizers_of_ones_own_and_no_parameters():
    wrapped = averaged(lookahead(skip_nonfinite(master_weights(sgd(0.1)))))
    assert describe(wrapped, jnp.ones(2)).endswith(
        "averaged: lookahead: skip_nonfinite: master_weights: sgd learning_rate=0.1"
    )
    texts = []
    jax.jit(lambda rate: texts.append(describe(sgd(rate), jnp.ones(2))))(0.1)
    assert texts[0].endswith("sgd learning_rate=traced")
    assert "an optimizer without a description" in describe(
        Optimizer(lambda p: (), lambda g, s, p, value=None: (p, s)), jnp.ones(2)
    )
    assert describe(sgd(0.1), {}) == "no parameters"
    assert "(independent of the rate)" in describe(adamw(0.1, independent=True), jnp.ones(1))


def test_a_schedule_whose_numbers_are_a_tuple_or_arrays_is_described_and_changed():
    optimizer = sgd(Schedule(lambda hyper, count: hyper[0] * hyper[1][0], (0.5, jnp.ones(3))))
    params = jnp.ones(1)
    assert describe(optimizer, params).endswith("sgd learning_rate=(0 0.5, 1 3 numbers)")
    changed = set_hyper(optimizer.init(params), learning_rate=(-0.25, np.full(3, 2.0)))
    assert optimizer.update(params, changed, params)[0] == 1.5
    with pytest.raises(TypeError, match=re.escape("learning_rate = 0.1; expected what stands in the state: (Array(")):
        set_hyper(changed, learning_rate=0.1)
    with pytest.raises(ValueError, match="learning_rate = nan; expected a number"):
        set_hyper(changed, learning_rate=(math.nan, np.ones(3)))


# --- averages --------------------------------------------------------------------------------------------------------


def walk(count, seed=0):
    """A start, gradients, and where gradient descent at a rate of 0.1 stands after each of them."""
    rng = np.random.default_rng(seed)
    start, grads = rng.normal(size=3), rng.normal(size=(count, 3))
    return jnp.asarray(start), jnp.asarray(grads), start - 0.1 * np.cumsum(grads, axis=0)


@pytest.mark.parametrize(
    "decay, start, every",
    [(0.9, 0, 1), (0.0, 0, 1), (0.5, 3, 2), (None, 0, 1), (None, 4, 1), (None, 2, 5)],
    ids=["ema", "ema 0", "ema late", "mean", "polyak", "swa"],
)
def test_averages_are_those_of_numpy_and_the_run_is_as_without_them(decay, start, every, x64):
    params, grads, path = walk(20)
    optimizer = averaged(sgd(0.1), decay, start=start, every=every)
    for t, (p, opt_state) in enumerate(updates(optimizer, params, grads), start=1):
        np.testing.assert_allclose(p, path[t - 1], rtol=1e-12)
        taken = [path[i - 1] for i in range(1, t + 1) if i > start and (i - start) % every == 0]
        n = len(taken)
        assert opt_state.count == n and opt_state.step == t
        weights = np.ones(n) if decay is None else np.asarray([decay ** (n - i) for i in range(1, n + 1)])
        expected = np.average(taken, axis=0, weights=weights) if n else path[t - 1]
        np.testing.assert_allclose(averages(opt_state, p), expected, rtol=1e-12, atol=1e-15)


def test_averages_are_kept_wide_read_in_the_parameters_dtype_and_found_within_others():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    optimizer = chain(clip_by_value(1.0), skip_nonfinite(averaged(sgd(2.0**-7), None)))
    *_, (new, opt_state) = updates(optimizer, params, [params] * 3)
    mean = averages(opt_state, new)["w"]
    assert mean.dtype == jnp.bfloat16
    assert opt_state.optimizer.optimizer.average["w"].dtype == jnp.float32
    # 1 − 1/128, 1 − 2/128, 1 − 3/128 are bfloat16 numbers
    assert mean[0] == jnp.bfloat16(1 - 2 / 128)
    in_groups = groups({"w": averaged(sgd(0.5), None)})
    (_, opt_state), *_ = updates(in_groups, {"w": jnp.ones(2)}, [{"w": jnp.ones(2)}])
    assert averages(opt_state.groups["w"], {"w": jnp.ones(2)})["w"][0] == 0.5
    with pytest.raises(
        ValueError, match=re.escape("averages: no average in SgdState; expected the state of averaged(...)")
    ):
        averages(sgd(0.1).init(jnp.ones(1)), jnp.ones(1))


def test_averages_of_some_groups_are_read_beside_the_parameters_of_the_others():
    params = {"b": {"w": jnp.ones(1), "v": jnp.ones(1)}, "a": (jnp.ones(1),)}
    optimizer = groups({"b/w": averaged(sgd(0.5), None), "b/*": sgd(1.0)}, default=averaged(sgd(0.25), None))
    *_, (new, opt_state) = updates(optimizer, params, [params] * 2)
    read = averages(opt_state, new)
    assert jax.tree.structure(read) == jax.tree.structure(params)
    # means of 0.5, 0 and of 0.75, 0.5; not averaged: 1 − 2
    assert (read["b"]["w"], read["b"]["v"], read["a"][0]) == (0.25, -1, 0.625)
    with pytest.raises(ValueError, match="average does not fit the parameters: missing nothing; unexpected a/0"):
        averages(opt_state, {"b": new["b"]})


def test_an_update_that_was_left_out_is_not_averaged():
    grads = arrays([1.0], [math.nan], [math.nan], [1.0])
    *_, (_, opt_state) = updates(averaged(skip_nonfinite(sgd(1.0)), None), jnp.zeros(1), grads)
    assert opt_state.count == 2 and averages(opt_state, jnp.zeros(1)) == -1.5  # the mean of −1 and −2


@pytest.mark.parametrize("every, slow_rate", [(5, 0.5), (2, 0.8), (1, 0.25), (3, 1.0)])
def test_lookahead_is_that_of_numpy(every, slow_rate, x64):
    params, grads, _ = walk(12)
    fast = slow = np.asarray(params)
    v = np.zeros(3)
    run = updates(lookahead(momentum(0.1, 0.5), every, slow_rate), params, grads)
    for t, (p, opt_state) in enumerate(run, start=1):
        v = 0.5 * v + np.asarray(grads[t - 1])
        fast = fast - 0.1 * v
        if t % every == 0:
            fast = slow = slow + slow_rate * (fast - slow)
        np.testing.assert_allclose(p, fast, rtol=1e-12)
        np.testing.assert_allclose(opt_state.slow, slow, rtol=1e-12)


# --- gradients that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_update_with_a_gradient_that_is_not_finite_is_left_out_and_its_leaf_named(bad):
    params = {"a": jnp.ones(2), "b": {"w": jnp.ones(2)}}
    good, wrong = params, {"a": jnp.ones(2), "b": {"w": jnp.asarray([1.0, bad])}}
    optimizer = skip_nonfinite(adam(0.1))
    states = list(updates(optimizer, params, [good, wrong, good, good]))
    without = list(updates(adam(0.1), params, [good] * 3))
    for i, j in [(0, 0), (1, 0), (2, 1), (3, 2)]:
        for new, old in zip(
            jax.tree.leaves((states[i][0], states[i][1].optimizer)), jax.tree.leaves(without[j]), strict=True
        ):
            np.testing.assert_array_equal(new, old)
    assert [int(s.skipped) for _, s in states] == [0, 1, 1, 1]
    assert nonfinite(states[0][1], params) is None
    assert (
        nonfinite(states[3][1], params)
        == "b/w: the gradient at count 1, or its update, was not finite; 1 updates left out"
    )


SQUARING = {
    "adam": adam(0.1), "amsgrad": amsgrad(0.1), "nadam": nadam(0.1), "radam": radam(0.1), "rmsprop": rmsprop(0.1),
    "adagrad": adagrad(0.1), "adadelta": adadelta(1.0), "adafactor": adafactor(0.1), "lamb": lamb(0.1),
    "muon": muon(0.1), "clipped": chain(clip_by_global_norm(1.0), adam(0.1)), "groups": groups({"*": adam(0.1)}),
    "amsgrad corrected": amsgrad(0.1, variant="corrected"), "radam torch": radam(0.1, variant="torch"),
}  # fmt: skip


@pytest.mark.parametrize("size", [1e20, 1e30, 3e38])
@pytest.mark.parametrize("name", SQUARING)
def test_a_finite_gradient_whose_square_is_not_is_left_out_or_taken_and_stays_in_no_moment(name, size):
    optimizer, ones = skip_nonfinite(SQUARING[name]), {"a": jnp.ones((3, 2)), "w": jnp.ones((2, 2))}
    huge = {"a": jnp.full((3, 2), size), "w": ones["w"]}
    (_, before), (new, after), (last, end) = updates(optimizer, ones, [ones, huge, ones])
    for tree in (new, last, after.optimizer, end.optimizer):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    assert int(after.skipped) in (0, 1) and int(end.skipped) == int(after.skipped)
    if after.skipped:
        jax.tree.map(np.testing.assert_array_equal, after.optimizer, before.optimizer)
        assert nonfinite(after, ones) == "a: the gradient at count 1, or its update, was not finite; 1 updates left out"
    assert all((leaf < 1).all() for leaf in jax.tree.leaves(last))  # and the run goes on


@pytest.mark.parametrize("name", SQUARING)
def test_a_run_that_begins_with_a_huge_gradient_goes_on(name):
    # at the first update the correction divides the second moment by 1 − b2: that may overflow where it does not
    optimizer, ones = skip_nonfinite(SQUARING[name]), jnp.ones((3, 2))
    (new, after), (last, end) = updates(optimizer, ones, [jnp.full((3, 2), 1e20), ones])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((new, last, end.optimizer)))
    assert after.skipped or (new < 1).all()
    assert (last < 1).all()


@pytest.mark.parametrize("variant", ["standard", "torch"])
def test_radam_takes_its_first_steps_by_the_gradient_alone_however_large(variant):
    ((new, _),) = updates(radam(0.1, variant=variant), jnp.ones(2), [jnp.full(2, 1e30)])
    np.testing.assert_allclose(new, np.full(2, 1 - 0.1 * 1e30), rtol=1e-6)


def test_adafactor_alone_takes_a_gradient_whose_square_is_not_finite_as_one_small_step():
    for shape in ((3, 2), (5,), ()):
        params = jnp.ones(shape)
        (first, _), (second, _) = updates(adafactor(), params, [jnp.full(shape, 1e20), jnp.ones(shape)])
        assert ((first < 1) & (first > 0.9)).all() and (jnp.isfinite(second) & (second <= first)).all()


def test_a_limit_of_infinity_that_a_state_holds_clips_nothing():
    grads = {"w": jnp.asarray([3.0, -4.0])}
    for transform in (clip_by_global_norm(1.0), clip_by_leaf_norm(1.0)):
        state = transform.init(grads)
        state = state._replace(hyper=jax.tree.map(lambda limit: jnp.full_like(limit, jnp.inf), state.hyper))
        np.testing.assert_array_equal(transform.update(grads, state, grads)[0]["w"], grads["w"])


def test_clips_by_a_factor_that_is_no_normal_number():
    huge = jnp.full(4, 1e38)
    for transform in (clip_by_global_norm(1.0), clip_by_leaf_norm(1.0)):
        np.testing.assert_allclose(applied(transform, {"w": huge})["w"], np.full(4, 0.5), rtol=1e-6)
        np.testing.assert_allclose(applied(transform, {"w": huge / 16})["w"], np.full(4, 0.5), rtol=1e-6)
    tiny = applied(clip_by_global_norm(1e-9), {"w": jnp.full(4, 1e30)})["w"]
    np.testing.assert_allclose(tiny, np.full(4, 5e-10), rtol=1e-6)
    np.testing.assert_allclose(applied(adaptive_clip(1e-3, 1.0), {"w": huge})["w"], np.full(4, 1e-3), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e18, 1e25, 1e36])
def test_norms_are_right_up_to_the_largest_numbers(size):
    limit = 0.1 * min(1.0, size)
    grads = {"a": jnp.asarray([[3.0, -4.0]]) * size, "b": jnp.asarray([6.0]) * size}
    norm = np.sqrt(9 + 16 + 36) * size
    np.testing.assert_allclose(gradient_norms(grads)["all"], norm, rtol=1e-6)
    np.testing.assert_allclose(gradient_norms(grads)["a"], 5 * size, rtol=1e-6)
    for name, transform, limits in (
        (
            "global",
            clip_by_global_norm(limit),
            {"a": np.array([[3, -4]]) / np.sqrt(61), "b": np.array([6]) / np.sqrt(61)},
        ),
        ("leaf", clip_by_leaf_norm(limit), {"a": np.array([[0.6, -0.8]]), "b": np.array([1.0])}),
        ("unit", adaptive_clip(limit, 1.0), {"a": np.array([[1.0, -1.0]]), "b": np.array([1.0])}),
    ):
        found = applied(transform, grads)
        for leaf in grads:
            np.testing.assert_allclose(found[leaf], limits[leaf] * limit, rtol=1e-5, err_msg=name)
    under_vmap = jax.vmap(lambda g: applied(clip_by_global_norm(limit), {"g": g})["g"])(
        jnp.stack([grads["b"], grads["b"] / size])
    )
    np.testing.assert_allclose(under_vmap, np.full((2, 1), limit), rtol=1e-5)


def test_a_norm_of_what_is_not_finite_is_not_finite():
    for bad in (jnp.inf, -jnp.inf, jnp.nan):
        assert not np.isfinite(gradient_norms({"a": jnp.asarray([1.0, bad]), "b": jnp.full(2, 1e30)})["all"])
    assert gradient_norms({"a": jnp.zeros(3)})["all"] == 0


def test_with_stop_nothing_is_updated_after_the_first_bad_gradient():
    params, bad = jnp.ones(1), jnp.asarray([math.nan])
    states = list(
        updates(chain(clip_by_value(9.0), skip_nonfinite(sgd(0.25), stop=True)), params, [params, bad, params, bad])
    )
    assert [float(p[0]) for p, _ in states] == [0.75, 0.75, 0.75, 0.75]
    assert states[-1][1].step == 1
    found = nonfinite(states[-1][1], params)
    assert (
        found is not None
        and "the gradient at count 1, or its update, was not finite; 3 updates left out; stopped there" in found
    )
    with pytest.raises(ValueError, match=re.escape("nonfinite: SgdState holds no state of skip_nonfinite(...)")):
        nonfinite(sgd(0.1).init(params), params)


def test_a_bad_leaf_within_a_group_is_named_in_the_whole_tree():
    # compiled, jax sorts the patterns: "*" would come first
    params = {"b": {"w": jnp.ones(1), "v": jnp.ones(1)}, "a": (jnp.ones(1), jnp.ones(1))}
    optimizer = groups({"b/*": skip_nonfinite(sgd(0.1)), "*": skip_nonfinite(sgd(0.1))})
    (_, first), (_, last) = updates(
        optimizer,
        params,
        [
            {"b": params["b"], "a": (jnp.ones(1), jnp.asarray([math.inf]))},
            {"b": {"w": jnp.asarray([math.nan]), "v": jnp.ones(1)}, "a": params["a"]},
        ],
    )
    assert nonfinite(optimizer.init(params), params) is None
    assert nonfinite(first, params) == "a/1: the gradient at count 0, or its update, was not finite; 1 updates left out"
    found = nonfinite(last, params)
    assert found is not None and sorted(found.splitlines()) == [
        "a/1: the gradient at count 0, or its update, was not finite; 1 updates left out",
        "b/w: the gradient at count 1, or its update, was not finite; 1 updates left out",
    ]


# --- precision -------------------------------------------------------------------------------------------------------


def test_master_weights_keep_updates_smaller_than_the_parameters_rounding():
    params = {"w": jnp.ones(1, jnp.bfloat16)}
    grads = [{"w": jnp.ones(1, jnp.bfloat16)}] * 64
    *_, (lost, _) = updates(sgd(2.0**-10), params, grads)  # bfloat16 below 1 has steps of 2⁻⁸
    *_, (kept, opt_state) = updates(master_weights(sgd(2.0**-10)), params, grads)
    assert lost["w"][0] == 1
    assert kept["w"].dtype == jnp.bfloat16 and kept["w"][0] == 1 - 2.0**-4
    assert opt_state.master["w"].dtype == jnp.float32 and opt_state.step == 64


WRAPPERS = [
    averaged,
    lookahead,
    skip_nonfinite,
    master_weights,
    dynamic_loss_scale,
    lambda inner: chain(clip_by_value(1.0), inner),
    lambda inner: groups({"*": inner}),
]


@pytest.mark.parametrize("wrap", [*WRAPPERS, functools.partial(reduce_on_plateau, window=1)])
def test_a_loss_scale_that_no_engine_would_read_is_refused(wrap):
    with pytest.raises(ValueError, match="dynamic_loss_scale is within, where no gradient engine reads its scale; put"):
        wrap(dynamic_loss_scale(sgd(0.1))).init({"w": jnp.ones(1)})


def test_lookahead_goes_within_master_weights():
    params = {"w": jnp.ones(1)}
    for inner in (master_weights(sgd(0.1)), chain(clip_by_value(1.0), averaged(master_weights(sgd(0.1))))):
        with pytest.raises(ValueError, match="lookahead: master_weights is within, which does not read the parameters"):
            lookahead(inner).init(params)
    *_, (new, _) = updates(master_weights(lookahead(sgd(0.5), 2, 0.5)), params, [params] * 2)
    assert new["w"] == 0.5  # half of the way from 1 to 0


def test_master_weights_ask_what_the_parameters_own_dtypes_ask():
    half_of = {"w": jnp.ones(1, jnp.float16)}
    with pytest.raises(TypeError, match="master_weights: parameter w has dtype int32; expected a float"):
        master_weights(sgd(0.1)).init({"w": jnp.ones(1, int)})
    for build in (master_weights, dynamic_loss_scale):
        optimizer = build(sgd(0.5))
        for grads, message in [
            ({}, "gradient does not fit the parameters: missing w; unexpected nothing"),
            ({"w": jnp.ones(1, int)}, "w: gradient has dtype int32; expected a float"),
        ]:
            with pytest.raises(ValueError, match=message):
                optimizer.update(grads, optimizer.init(half_of), half_of)
    optimizer = master_weights(sgd(0.5))
    assert optimizer.update(1.0, optimizer.init(2.0), 2.0)[0] == 1.5


def float16_problem():
    """A network and gradients that vanish in float16 without a scale: the inputs are tiny."""
    model = serial(dense(8), tanh(), dense(3))
    x = jax.random.normal(jax.random.key(0), (16, 4))
    batch = fnet.Batch(x, jnp.argmax(x[:, :3], 1))
    params, state = fnet.init(model, jax.random.key(1), x)
    return model, params, state, batch


def half(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float16) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def train_run(model, params, state, batch, optimizer, steps, engine=fnet.backprop):
    step = jax.jit(fnet.make_step(engine(model, fnet.softmax_cross_entropy), optimizer))
    ts = fnet.init_train_state(params, optimizer, jax.random.key(2), state)
    for _ in range(steps):
        ts, metrics = step(ts, batch)
        yield ts, metrics


@pytest.mark.parametrize("engine", [fnet.backprop, fnet.autodiff])
def test_a_scale_of_a_power_of_2_changes_no_bit_in_float32(engine):
    """Operation by operation: compiled, a product and a sum may be rounded once, in one of the programs alone."""
    problem = float16_problem()
    with jax.disable_jit():
        *_, (plain, plain_metrics) = train_run(*problem, adam(0.01), 10, engine)
        *_, (scaled, metrics) = train_run(*problem, dynamic_loss_scale(adam(0.01), 2.0**10, interval=4), 10, engine)
    assert scaled.opt_state.loss_scale == 2.0**12 and scaled.opt_state.skipped == 0
    for new, old in zip(jax.tree.leaves(scaled.params), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_array_equal(new, old)
    assert metrics["loss"].value == plain_metrics["loss"].value


@pytest.mark.parametrize("engine", [fnet.backprop, fnet.autodiff])
def test_a_float16_network_trains_under_a_scale_that_backs_off_and_grows(engine):
    model, params, state, batch = float16_problem()
    optimizer = dynamic_loss_scale(master_weights(adam(0.02)), 2.0**24, interval=15)
    run = list(train_run(model, half(params), state, half(batch), optimizer, 80, engine))
    scales = [float(ts.opt_state.loss_scale) for ts, _ in run]
    backed_off = sum(new == old / 2 for old, new in zip([2.0**24, *scales], scales, strict=False))
    grown = sum(new == old * 2 for old, new in pairwise(scales))
    last = run[-1][0].opt_state
    assert backed_off == last.skipped > 0 and grown > 0
    assert last.step == 80 - last.skipped
    assert all(leaf.dtype == jnp.float16 for leaf in jax.tree.leaves(run[-1][0].params))
    *_, (_, wide) = train_run(model, params, state, batch, adam(0.02), int(last.step))
    # three digits are what float16 has
    np.testing.assert_allclose(float(run[-1][1]["loss"].value), float(wide["loss"].value), rtol=0.1)


def test_the_scale_is_applied_by_hand_and_never_falls_below_1():
    optimizer = dynamic_loss_scale(sgd(1.0), 4.0, interval=2)
    grads = arrays([8.0], [8.0], [8.0], [math.inf], [math.nan], [math.inf], [math.inf], [math.inf], [1.0])
    run = list(updates(optimizer, jnp.zeros(1), grads))
    assert [float(s.loss_scale) for _, s in run] == [4, 8, 8, 4, 2, 1, 1, 1, 1]
    assert [float(p[0]) for p, _ in run] == [-2, -4, -5, -5, -5, -5, -5, -5, -6]
    assert [int(s.good) for _, s in run] == [1, 0, 1, 0, 0, 0, 0, 0, 1]


# --- the plateau -----------------------------------------------------------------------------------------------------


def plateau(losses, rate, factor, window, patience, least_change, least_rate):
    """The rate after each update, from the definition in NumPy."""
    best, waited, seen = math.inf, 0, []
    for loss in losses:
        seen.append(loss)
        if len(seen) == window:
            mean, seen = np.mean(seen), []
            threshold = best - least_change * abs(best) if math.isfinite(best) else math.inf
            best, waited = (mean, 0) if mean < threshold else (best, waited + 1)
            if waited == patience:
                rate, waited = min(rate, max(rate * factor, least_rate)), 0
        yield rate


PLATEAUS = [
    {"factor": 0.5, "window": 1, "patience": 2, "least_change": 0.0, "least_rate": 0.0},
    {"factor": 0.1, "window": 3, "patience": 1, "least_change": 0.05, "least_rate": 2e-3},
    {"factor": 0.7, "window": 2, "patience": 3, "least_change": 0.01, "least_rate": 0.05},
]


@pytest.mark.parametrize("options", PLATEAUS, ids=["each", "window", "least"])
def test_the_rate_falls_on_a_plateau_as_in_numpy_in_a_loop_a_scan_and_under_vmap(options, x64):
    rng = np.random.default_rng(0)
    losses = 1 + np.exp(-np.arange(60) / 8) + 0.05 * rng.normal(size=(3, 60))
    losses[2] -= 1.5  # also below 0
    optimizer = reduce_on_plateau(sgd(0.1), **options)

    @jax.jit
    @jax.vmap
    def rates(losses):
        def one(carry, loss):
            params, opt_state = optimizer.update(jnp.ones(1), carry[1], carry[0], value=loss)
            return (params, opt_state), (opt_state.optimizer.hyper.learning_rate, params[0])

        start = jnp.zeros(1)
        return jax.lax.scan(one, (start, optimizer.init(start)), losses)[1]

    after, params = rates(jnp.asarray(losses))
    for row in range(3):
        expected = np.asarray(list(plateau(losses[row], 0.1, **options)))
        assert len(set(expected)) > 1
        np.testing.assert_allclose(after[row], expected, rtol=1e-12)
        # update t goes by the rate that the losses before it left
        np.testing.assert_allclose(params[row], -np.cumsum([0.1, *expected[:-1]]), rtol=1e-12)
    run = updates(optimizer, jnp.zeros(1), [jnp.ones(1)] * 60, jnp.asarray(losses[0]))
    np.testing.assert_allclose([s.optimizer.hyper.learning_rate for _, s in run], after[0], rtol=1e-12)


def test_make_step_hands_the_loss_to_the_plateau():
    model, params, state, batch = float16_problem()
    optimizer = reduce_on_plateau(sgd(0.0), 0.5, window=2, patience=1)  # a loss that stands still
    rates = [float(m["learning_rate"].value) for _, m in train_run(model, params, state, batch, optimizer, 3)]
    assert rates == [0, 0, 0]
    optimizer = chain(clip_by_value(1e-9), reduce_on_plateau(sgd(1.0), 0.5, window=2, patience=1))
    rates = [float(m["learning_rate"].value) for _, m in train_run(model, params, state, batch, optimizer, 7)]
    assert rates == [1, 1, 1, 1, 0.5, 0.5, 0.25]  # the first window is the best


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_every_wrapper_hands_the_loss_on(wrap):
    params = {"w": jnp.zeros(1)}
    optimizer = wrap(reduce_on_plateau(sgd(1.0), 0.5, window=1, patience=1))
    run = updates(optimizer, params, [params] * 4, jnp.ones(4))  # a loss that stands still
    assert [float(jax.tree.leaves(opt_state.rate)[0]) for _, opt_state in run] == [1, 1, 0.5, 0.25]


def test_what_the_plateau_needs_is_said():
    optimizer = reduce_on_plateau(sgd(0.1), window=1)
    with pytest.raises(ValueError, match=re.escape("reduce_on_plateau: value is None; expected the loss")):
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)), jnp.ones(1))
    for inner in (sgd(exponential(0.1, 0.5, 10)), chain(clip_by_value(1.0), sgd(0.1)), lookahead(sgd(0.1)), GROUPED):
        with pytest.raises(TypeError, match="expected an optimizer with a number for its learning_rate"):
            reduce_on_plateau(inner, window=1).init(MODEL)


@pytest.mark.parametrize("cooldown", [0, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_rate_falls_on_a_plateau_of_an_evaluation_in_fit_and_in_train(cooldown, sign, x64):
    curve = [1.0, 0.8, 0.9, 0.85, 0.81, 0.7, math.nan, 0.75, 0.71, 0.7, 0.69999, 0.72, 0.73, 0.5, 0.6]
    best, waited, cooling, rate, rates = math.inf, 0, 0, 1.0, []
    for value in curve:  # Keras' rule with torch's relative change and cooldown
        better = value < best - 1e-4 * (abs(best) if math.isfinite(best) else 0)
        best = value if better else best
        waited, cooling = (0, cooling - 1) if cooling else (0 if better else waited + 1, 0)
        if waited == 2:
            rate, waited, cooling = max(rate * 0.5, 0.2), 0, cooldown
        rates.append(rate)
    assert len(set(rates)) > 2
    inner = reduce_on_plateau(
        sgd(1.0), 0.5, metric="validation_loss", greatest=sign < 0, patience=2, least_rate=0.2, cooldown=cooldown
    )
    optimizer = skip_nonfinite(chain(clip_by_value(1.0), inner))

    def step(ts, batch):
        params, opt_state = optimizer.update(jnp.ones(()), ts.opt_state, ts.params)
        metrics = {"x": weighted_mean(batch.inputs), "learning_rate": opt_state.rate}
        return ts._replace(step=ts.step + 1, params=params, opt_state=opt_state), metrics

    def evaluate(params, state, data):
        return {"loss": sign * jnp.asarray(curve)[opt_step(params)]}

    def opt_step(params):  # parameters say how far the run is: they fall by at least 0.2 a step
        return jnp.searchsorted(jnp.cumsum(jnp.asarray([1.0, *rates])), -params - 1e-9)

    data = fnet.Batch(jnp.ones(2), jnp.ones(2))
    start = fnet.init_train_state(jnp.zeros(()), optimizer, jax.random.key(0))
    options = {"epochs": len(curve), "batch_size": 2, "evaluate": evaluate, "validation": data}
    for chunk_steps in (None, 4):
        end, history = fnet.fit(step, start, data, chunk_steps=chunk_steps, **options)
        assert history.epochs["learning_rate"].tolist() == [1.0, *rates[:-1]]
        assert float(end.opt_state.optimizer.optimizer.optimizer.hyper.learning_rate) == rates[-1]
    pure, metrics, _ = jax.jit(lambda ts, data: fnet.train(step, ts, data, **options | {"validation": data}))(
        start, data
    )
    assert metrics["learning_rate"][:, 0].tolist() == [1.0, *rates[:-1]]
    assert jax.tree.map(lambda a: np.asarray(a).tolist(), pure.opt_state) == jax.tree.map(
        lambda a: np.asarray(a).tolist(), end.opt_state
    )


def test_a_result_that_the_plateau_waits_for_must_come():
    model, params, state, batch = float16_problem()
    optimizer = reduce_on_plateau(sgd(1.0), metric="validation_accuracy")
    step = fnet.make_step(fnet.autodiff(model, fnet.softmax_cross_entropy), optimizer)
    start = fnet.init_train_state(params, optimizer, jax.random.key(0), state)
    evaluate = fnet.make_evaluate(model, fnet.softmax_cross_entropy)
    for options, there in (
        ({}, "there is none without evaluate and validation"),
        ({"evaluate": evaluate, "validation": batch}, "validation_loss"),
    ):
        message = "reduce_on_plateau: metric = 'validation_accuracy'; expected the name of a result: " + there
        with pytest.raises(ValueError, match=re.escape(message)):
            fnet.fit(step, start, batch, epochs=1, batch_size=2, **options)
        with pytest.raises(ValueError, match=re.escape(message)):
            fnet.train(step, start, batch, epochs=1, batch_size=2, **options)
    with pytest.raises(ValueError, match=re.escape("accuracy has shape (2,); expected one number")):
        told(start.opt_state, {"validation_accuracy": jnp.ones(2)})
    for neither in ({}, {"window": 1, "metric": "validation_loss"}):
        with pytest.raises(
            ValueError, match="expected one of them: so many losses of training on average, or a result"
        ):
            reduce_on_plateau(sgd(1.0), **neither)


# --- accumulation ----------------------------------------------------------------------------------------------------


def ragged_problem():
    model = serial(dense(6), tanh(), dense(3))
    x = jax.random.normal(jax.random.key(3), (11, 4), jnp.float64)
    weights = jnp.asarray([0, 0, 0, 2, 1, 0.5, 3, 0, 1, 1, 0.25])  # with four parts the first weighs nothing
    batch = fnet.Batch(x, jax.random.randint(jax.random.key(4), (11,), 0, 3), weights)
    params, state = model.init(jax.random.key(5), x)
    return model, params, state, batch


def plain_loss(model):
    def loss_fn(params, state, batch, key):
        outputs, state, _ = model.forward(params, state, batch.inputs, train=True)
        mean = weighted_mean(fnet.softmax_cross_entropy(outputs, batch.targets), batch.weights)
        return mean.value, state, {"loss": mean}

    return fnet.from_loss(loss_fn, has_state=True)


ENGINES = {
    "autodiff": lambda model: fnet.autodiff(model, fnet.softmax_cross_entropy),
    "backprop": lambda model: fnet.backprop(model, fnet.softmax_cross_entropy),
    "from_loss": plain_loss,
}


@pytest.mark.parametrize("parts", [2, 4, 11])
@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_accumulated_gradients_are_those_of_the_whole_batch_in_float64(engine, parts, x64):
    model, params, state, batch = ragged_problem()
    gradient = engine(model)
    whole, _, metrics = jax.jit(gradient)(params, state, batch, None)
    grads, _, summed = jax.jit(accumulate(gradient, parts))(params, state, batch, jax.random.key(0))
    assert_leaves_close(grads, whole, 1e-12)
    np.testing.assert_allclose(summed["loss"].value, metrics["loss"].value, rtol=1e-13)
    np.testing.assert_allclose(summed["loss"].count, 8.75)


def test_accumulation_without_weights_and_with_a_scale(x64):
    model, params, state, batch = ragged_problem()
    batch = batch._replace(weights=None)
    gradient = ENGINES["backprop"](model)
    whole, _, _ = gradient(params, state, batch, None)
    grads, _, _ = jax.jit(lambda b: accumulate(gradient, 3)(params, state, b, jax.random.key(0), scale=8.0))(batch)
    assert_leaves_close(grads, jax.tree.map(lambda g: 8 * g, whole), 1e-12)


def test_a_mean_of_the_parts_means_would_be_wrong(x64):
    model, params, state, batch = ragged_problem()
    gradient = jax.jit(ENGINES["autodiff"](model))
    whole, _, _ = gradient(params, state, batch, None)
    cuts = [slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 11)]
    parts = [gradient(params, state, jax.tree.map(lambda a, cut=cut: a[cut], batch), None)[0] for cut in cuts]
    naive = jax.tree.map(lambda *gs: sum(gs) / 4, *parts)
    with pytest.raises(AssertionError):
        assert_leaves_close(naive, whole, 1e-2)


def test_each_microbatch_has_a_key_of_its_own_and_the_state_passes_through_all(x64):
    model = serial(dense(6), dropout(0.5), batch_norm(), dense(3))
    _, _, _, batch = ragged_problem()
    params, state = model.init(jax.random.key(5), batch.inputs)
    gradient, key = fnet.autodiff(model, fnet.softmax_cross_entropy), jax.random.key(7)
    grads, new_state, _ = jax.jit(accumulate(gradient, 3))(params, state, batch, key)
    total, weight = jax.tree.map(jnp.zeros_like, params), 0.0
    for i, cut in enumerate([slice(0, 4), slice(4, 8), slice(8, 11)]):
        part = jax.tree.map(lambda a, cut=cut: a[cut], batch)
        g, state, _ = jax.jit(gradient)(params, state, part, jax.random.fold_in(key, i))
        w = part.weights.sum()
        total, weight = jax.tree.map(lambda t, g, w=w: t + w * g, total, g), weight + w
    assert_leaves_close(grads, jax.tree.map(lambda t: t / weight, total), 1e-11)
    assert_leaves_close(new_state, state, 1e-12)


def test_gradients_in_16_bits_are_summed_in_32():
    # in bfloat16 the sum of 512 ones stalls at 256
    gradient = fnet.from_loss(lambda params, batch, key: (params * batch[0].astype(jnp.bfloat16)).mean())
    batch, params = (jnp.full((512,), 1e-3),), jnp.ones((), jnp.bfloat16)
    grads, _, _ = accumulate(gradient, 512)(params, (), batch, jax.random.key(0))
    assert grads.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(grads), 1e-3, rtol=2**-8)


def test_parts_that_do_not_fit_are_named():
    model, params, state, batch = float16_problem()
    gradient = fnet.backprop(model, fnet.softmax_cross_entropy)
    with pytest.raises(ValueError, match=re.escape("accumulate: parts = 0; expected at least 1")):
        accumulate(gradient, 0)
    with pytest.raises(
        ValueError, match=re.escape("accumulate: parts = 17; expected at most 16, the examples of the batch")
    ):
        accumulate(gradient, 17)(params, state, batch, jax.random.key(0))
    inputs = fnet.backprop(model, fnet.softmax_cross_entropy, inputs=True)
    with pytest.raises(ValueError, match="accumulate: the engine's gradients are not a tree like the parameters'"):
        accumulate(inputs, 2)(params, state, batch, jax.random.key(0))


# --- other libraries -------------------------------------------------------------------------------------------------


def test_l2_decay_before_adam_is_torchs_adam_with_weight_decay(x64):
    torch = pytest.importorskip("torch")
    params, grads, _ = walk(30)
    tensor = torch.nn.Parameter(torch.tensor(np.asarray(params)))
    theirs = torch.optim.Adam([tensor], lr=0.1, weight_decay=0.3)
    for i, (p, _) in enumerate(updates(chain(l2_decay(0.3), adam(0.1)), params, grads)):
        tensor.grad = torch.tensor(np.asarray(grads[i]))
        theirs.step()
        np.testing.assert_allclose(p, tensor.detach().numpy(), rtol=1e-11)


def test_clippings_are_those_of_optax(x64):
    optax = pytest.importorskip("optax")
    g = np.random.default_rng(0).normal(size=(2, 4, 3))
    grads, params = ({"a": jnp.asarray(rows), "b": jnp.asarray(rows[0])} for rows in g)
    with jax.numpy_rank_promotion("allow"):
        pairs = [
            (clip_by_value(0.3), optax.clip(0.3)),
            (clip_by_global_norm(0.3), optax.clip_by_global_norm(0.3)),
            (l2_decay(0.3), optax.add_decayed_weights(0.3)),
        ]
        for ours, theirs in pairs:
            expected, _ = theirs.update(grads, theirs.init(params), params)
            assert_leaves_close(applied(ours, grads, params), expected, 1e-14)
        agc = optax.adaptive_grad_clip(0.05, 1e-3)
        expected, _ = agc.update(grads, agc.init(params), params)
        # theirs takes the first axis for the units
        turned = {"a": grads["a"].T}
        centred, _ = optax.centralize().update(turned, optax.centralize().init(turned))
    np.testing.assert_allclose(applied(centralize(), grads)["a"], centred["a"].T, rtol=1e-12)
    ours = applied(adaptive_clip(0.05, 1e-3), grads, params)
    np.testing.assert_allclose(ours["a"], expected["a"], rtol=1e-12)


def test_global_norm_clipping_is_torchs_but_for_its_1e_minus_6(x64):
    torch = pytest.importorskip("torch")
    g = np.random.default_rng(0).normal(size=5)
    tensor = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    tensor.grad = torch.tensor(g)
    torch.nn.utils.clip_grad_norm_([tensor], 0.5)
    ours, norm = np.asarray(applied(clip_by_global_norm(0.5), jnp.asarray(g))), np.linalg.norm(g)
    np.testing.assert_allclose(tensor.grad.numpy(), ours * norm / (norm + 1e-6), rtol=1e-12)
