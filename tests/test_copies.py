"""Layers stacked by `repeat` are updated as the same layers apart: leaves know how many copies they stack."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.core.trees import Copies, named_leaves, stacked_axes
from fnet.export import export_inference, load_inference, load_weights, save_weights
from fnet.layers import dense, gelu, layer_norm, repeat, residual, serial
from fnet.optimizers import (
    adafactor,
    adam,
    adamw,
    averaged,
    averages,
    chain,
    describe,
    dynamic_loss_scale,
    groups,
    lamb,
    lion,
    lookahead,
    master_weights,
    momentum,
    muon,
    sgd,
    skip_nonfinite,
    transforms,
)
from tests.oracles import assert_leaves_close

COUNT = 3
by_rank = lambda path, leaf: leaf.ndim > 1  # noqa: E731
by_size = lambda path, leaf: np.prod(leaf.shape) > 4  # noqa: E731

OPTIMIZERS = {
    "lamb": lamb(0.1),
    "lamb, decaying": lamb(0.1, weight_decay=0.3, mask=by_rank),
    "adafactor": adafactor(0.1),
    "adafactor, decaying": adafactor(0.1, weight_decay=0.3, mask=by_rank),
    "adamw, by rank": adamw(0.1, weight_decay=0.5, mask=by_rank),
    "adamw, by size": adamw(0.1, weight_decay=0.5, mask=by_size),
    "sgd, by rank": sgd(0.1, weight_decay=0.5, mask=by_rank),
    "lion": lion(0.1, weight_decay=0.5, mask=by_rank),
    "adaptive_clip": chain(transforms.adaptive_clip(0.01), sgd(0.1)),
    "clip_by_leaf_norm": chain(transforms.clip_by_leaf_norm(0.1), sgd(0.1)),
    "clip_by_global_norm": chain(transforms.clip_by_global_norm(0.1), sgd(0.1)),
    "centralize": chain(transforms.centralize(), sgd(0.1)),
    "l2_decay": chain(transforms.l2_decay(0.5, by_rank), momentum(0.1)),
    "several": chain(transforms.centralize(), transforms.clip_by_leaf_norm(0.1), lamb(0.1)),
    "groups": groups({"*w": muon(0.1)}, default=lamb(0.1)),
    "groups of transforms": groups({"*w": chain(transforms.centralize(), adafactor(0.1))}, default=adam(0.1)),
    "groups within groups": groups({"*w": groups({"*": lamb(0.1)})}, default=sgd(0.1)),
    "averaged": averaged(lamb(0.1), 0.9),
    "lookahead": lookahead(lamb(0.1), every=2),
    "skip_nonfinite": skip_nonfinite(adafactor(0.1)),
    "master_weights": master_weights(chain(transforms.centralize(), lamb(0.1))),
    "dynamic_loss_scale": dynamic_loss_scale(master_weights(adafactor(0.1))),
}


def apart(params):
    """The parameters of a `repeat`, at any depth, as those of a serial of its copies, each by the number it has."""
    if isinstance(params, Copies):
        return {str(i): apart(params.one(i)) for i in range(params.counts[0])}
    return {name: apart(child) for name, child in params.items()} if isinstance(params, dict) else params


def like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)


MODELS = {
    "dense": repeat(dense(4), COUNT),
    "as many copies as features": repeat(dense(4), 4),
    "block": serial(dense(4), ("blocks", repeat(residual(layer_norm(), dense(6), gelu(), dense(4)), COUNT)), dense(2)),
    "nested": serial(("outer", repeat(serial(("inner", repeat(dense(4), 2)), layer_norm()), COUNT)), dense(2)),
    "copies of copies": repeat(repeat(dense(4), 2), COUNT),
    "copies of copies, all counts alike": repeat(repeat(repeat(dense(2), 2), 2), 2),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_of_stacked_layers_is_that_of_the_same_layers_apart(name, model, key, x64):
    optimizer = OPTIMIZERS[name]
    params = like(fnet.init(MODELS[model], key, jnp.ones((2, 2 if "alike" in model else 4)))[0], 0)
    if name.startswith("groups") and model in ("block", "nested"):  # muon and patterns are for matrices
        optimizer = groups({"*/w": muon(0.1) if name == "groups" else adafactor(0.1)}, default=lamb(0.1))
    each = apart(params)
    opt_state, each_state = optimizer.init(params), optimizer.init(each)
    for seed in (1, 2):
        grads = like(params, seed)
        params, opt_state = jax.jit(optimizer.update)(grads, opt_state, params)
        each, each_state = jax.jit(optimizer.update)(apart(grads), each_state, each)
        assert_leaves_close(apart(params), each, 1e-12)
    if name == "averaged":
        assert_leaves_close(apart(averages(opt_state, params)), averages(each_state, each), 1e-12)


def test_the_rows_of_the_bug_report_in_float32(key):
    stacked, alone = repeat(dense(4), 3), serial(*((str(i), dense(4)) for i in range(3)))
    params, _ = fnet.init(stacked, key, jnp.ones((2, 4)))
    each, _ = fnet.init(alone, key, jnp.ones((2, 4)))
    assert_leaves_close(apart(params), each, 0)
    params = jax.tree.map(lambda p: p + 0.1, params)
    grads = like(params, 1)
    for optimizer in (lamb(0.1), adafactor(0.1), *(chain(t, sgd(0.1)) for t in (transforms.centralize(),))):
        new, _ = optimizer.update(grads, optimizer.init(params), params)
        expected, _ = optimizer.update(apart(grads), optimizer.init(apart(params)), apart(params))
        assert_leaves_close(apart(new), expected, 1e-6)


def test_copies_are_a_dict_in_all_else(key):
    model = serial(("blocks", repeat(dense(4), COUNT)), dense(2))
    params, state = fnet.init(model, key, jnp.ones((2, 4)))
    blocks = params["blocks"]
    assert isinstance(blocks, dict) and blocks["w"].shape == (COUNT, 4, 4) and blocks == dict(blocks)
    assert [path for path, _ in named_leaves(params)] == ["blocks/b", "blocks/w", "dense_0/b", "dense_0/w"]
    assert stacked_axes(params) == [1, 1, 0, 0]
    assert fnet.parameter_paths(model, jnp.ones((2, 4))) == ["blocks/b", "blocks/w", "dense_0/w", "dense_0/b"]
    for same in (blocks.copy(), blocks | {}, {} | blocks, blocks | {"w": blocks["w"]}, copy.copy(blocks)):
        assert isinstance(same, Copies) and same == blocks and same.counts == (COUNT,)
    # a copy taken from each leaf is no stack, though the container is of the same kind
    assert stacked_axes(jax.tree.map(lambda leaf: leaf[0], blocks)) == [0, 0]
    # parameters and gradients in plain dicts, from a file say, serve too
    plain = {**params, "blocks": dict(blocks)}
    y = fnet.apply(model, params, state, jnp.ones((2, 4)))
    np.testing.assert_array_equal(fnet.apply(model, plain, state, jnp.ones((2, 4))), y)
    optimizer = chain(transforms.centralize(), lamb(0.1))
    grads = like(params, 3)
    new, _ = optimizer.update({**grads, "blocks": dict(grads["blocks"])}, optimizer.init(params), params)
    expected, _ = optimizer.update(grads, optimizer.init(params), params)
    assert_leaves_close(new, expected, 0)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert "blocks/w   (3, 4, 4)" in describe(lamb(0.1), params)


BLOCKS = {
    "copies": repeat(residual(dense(4)), COUNT),
    "copies of copies": repeat(repeat(dense(4), 2), COUNT),
}


@pytest.mark.parametrize("blocks", BLOCKS)
def test_every_engine_returns_the_gradient_in_the_parameters_tree(blocks, key):
    model = serial(("blocks", BLOCKS[blocks]), dense(2))
    x, labels = jax.random.normal(key, (5, 4)), jnp.arange(5) % 2
    params, state = fnet.init(model, key, x)
    for engine in (
        fnet.backprop(model, fnet.softmax_cross_entropy),
        fnet.autodiff(model, fnet.softmax_cross_entropy),
        fnet.autodiff(fnet.layers.with_hand_backward(model), fnet.softmax_cross_entropy),
        fnet.accumulate(fnet.backprop(model, fnet.softmax_cross_entropy), 2),
        fnet.backprop(fnet.layers.freeze(model), fnet.softmax_cross_entropy),
        fnet.backprop(fnet.layers.mixed_precision(model), fnet.softmax_cross_entropy),
    ):
        grads, _, _ = engine(params, state, (x, labels), key)
        assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_a_run_of_stacked_layers_is_saved_resumed_swept_and_exported(blocks, key, tmp_path):
    model = serial(("blocks", BLOCKS[blocks]), dense(2))
    data = fnet.Batch(jax.random.normal(key, (12, 4)), jnp.arange(12) % 2)
    params, state = fnet.init(model, key, data.inputs)
    optimizer = lamb(0.01)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    start = fnet.init_train_state(params, optimizer, key, state)
    straight, _ = fnet.fit(step, start, data, epochs=4, batch_size=4)
    run = fnet.Run(tmp_path / "run")
    fnet.fit(step, start, data, epochs=2, batch_size=4, run=run)
    resumed, _ = fnet.fit(step, start, data, epochs=4, batch_size=4, run=run._replace(resume=True))
    assert_leaves_close(resumed.params, straight.params, 0)
    members = jax.jit(jax.vmap(lambda key: fnet.train(step, start._replace(key=key), data, epochs=1, batch_size=4)[0]))(
        jax.random.split(key, 2)
    )
    stacked, swept = straight.params["blocks"], members.params["blocks"]
    assert isinstance(swept, Copies) and swept.counts == stacked.counts
    assert [leaf.shape for leaf in jax.tree.leaves(swept)] == [(2, *leaf.shape) for leaf in jax.tree.leaves(stacked)]
    path = tmp_path / "weights.safetensors"
    save_weights(path, straight.params)
    assert_leaves_close(load_weights(path, straight.params), straight.params, 0)
    export_inference(model, straight.params, state, data.inputs, tmp_path / "model")
    y = fnet.apply(model, straight.params, state, data.inputs)
    np.testing.assert_allclose(load_inference(tmp_path / "model")(data.inputs), y, rtol=1e-6)
