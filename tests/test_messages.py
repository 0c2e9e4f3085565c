"""The commonest slips of someone who writes a layer or a loop: each case's whole message.

A message names the thing, what was given, what was expected and what to do; the type is the one that is raised wherever
the slip is met, in `fnet.fit` too.
"""

from __future__ import annotations

import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet import DataError, LayerError, layers
from fnet.layers import dense, stateless
from fnet.training.population import Population, best, join, train_population
from fnet.types import Layer, Loss

KEY, X = jax.random.key(0), jnp.ones((4, 3))
BATCH = fnet.Batch(X, jnp.zeros(4, int))
MODEL, ADAM = fnet.mlp(3, 2), fnet.adam()
PARAMS, STATE = fnet.init(MODEL, KEY, X)
LOSS = fnet.softmax_cross_entropy
STEP = fnet.make_step(fnet.backprop(MODEL, LOSS), ADAM)
TS = fnet.init_train_state(PARAMS, ADAM, KEY, STATE)
GPT = fnet.models.gpt(5, length=4, layers=1, features=4, heads=1)


# --- layers of one's own that break the contract ----------------------------------------------------------------------


def scale(forward=lambda params, x: (params["w"][None] * x, x), backward=None, init=lambda key, x: {"w": jnp.ones(3)}):
    """``y = w x``, but for the changes."""
    return stateless(
        "scale", init, forward, backward or (lambda params, x, dy: ((dy * x).sum(0), params["w"][None] * dy))
    )


def by_hand(dw=lambda w, x, dy: (dy * x).sum(0), dx=lambda w, x, dy: w * dy):
    return lambda params, x, dy: ({"w": dw(params["w"][None], x, dy)}, dx(params["w"][None], x, dy))


NO_RESIDUALS = scale(forward=lambda params, x: params["w"][None] * x)
ONLY_DX = scale(backward=lambda params, x, dy: params["w"][None] * dy)
DW_OF_EACH_EXAMPLE = scale(backward=by_hand(dw=lambda w, x, dy: dy * x))
DX_SUMMED = scale(backward=by_hand(dx=lambda w, x, dy: (w * dy).sum(0)))
DW_WITHOUT_ITS_NAME = scale()
TWO_RETURNED = Layer("scale", scale().init, lambda params, state, x, **_: (params["w"][None] * x, x), by_hand())
NO_STATE = Layer("scale", lambda key, x: {"w": jnp.ones(3)}, scale().forward, by_hand())


def fit(layer):
    """A run of a model that holds the layer."""
    model = fnet.serial(dense(3), layer, dense(2))
    params, state = fnet.init(model, KEY, X)
    step = fnet.make_step(fnet.backprop(model, LOSS), ADAM)
    fnet.fit(step, fnet.init_train_state(params, ADAM, KEY, state), BATCH, epochs=1, batch_size=2)


def keras_loss(y_true, y_pred):
    return -(y_true * jnp.log(y_pred)).sum(-1)


def swapped_loss(wanted, given):
    return ((jnp.eye(2)[wanted] - given) ** 2).sum(-1)


def mean_loss(outputs, targets):
    return ((outputs - jax.nn.one_hot(targets, 2)) ** 2).mean()


WHOLE = (
    "is a TrainState; expected the parameters and the model's state that it holds, apart: ts.params, ts.state (of best "
    "= fnet.best_weights(ts), best.params, best.state)"
)


def width_run(hyper, key, data):
    model = fnet.mlp(hyper["width"], 2)
    params, state = model.init(key, data.inputs)
    return fnet.apply(model, params, state, data.inputs).sum() * hyper["scale"]


def depth_run(hyper, key, data):
    return jnp.stack([data.inputs.sum()] * int(hyper["depth"])).sum()


def members(**hyper):
    keys = jax.random.split(KEY, len(next(iter(hyper.values()))))
    return lambda run: train_population(run, hyper, keys, BATCH)


CASES = {  # what is done, the error, its whole message
    "a function of jax as a layer": (
        lambda: fnet.serial(dense(3), jax.nn.relu),
        TypeError,
        "serial: entry 1 is the function relu of jax; expected a Layer, with its backward by hand: fnet.layers.relu()",
    ),
    "a function of one's own as a layer": (
        lambda: fnet.serial(dense(3), lambda x: x),
        TypeError,
        "serial: entry 1 is the function <lambda> of tests.test_messages; expected a Layer, with its backward by hand: "
        "fnet.layers.stateless(name, init, forward, backward)",
    ),
    "a layer's function that is not called": (
        lambda: fnet.serial(dense(3), layers.relu),
        TypeError,
        "serial: entry 1 is the function relu; expected the Layer that it makes: call it, relu(...)",
    ),
    "in a pair": (
        lambda: fnet.serial(("act", layers.relu)),
        TypeError,
        "serial: entry 0, 'act', is the function relu; expected the Layer that it makes: call it, relu(...)",
    ),
    "a pair without a name": (
        lambda: fnet.serial((dense(3), layers.relu())),
        TypeError,
        "serial: entry 0 is (dense, relu); expected a Layer, or a pair (name, layer)",
    ),
    "a word as a layer": (
        lambda: fnet.serial("relu"),
        TypeError,
        "serial: entry 0 is 'relu'; expected a Layer, such as fnet.dense(10)",
    ),
    "a list of layers": (
        lambda: fnet.serial([dense(3), layers.relu()]),
        TypeError,
        "serial: entry 0 is [dense, relu]; expected a Layer, such as fnet.dense(10)",
    ),
    "in a residual": (
        lambda: layers.residual(layers.relu),
        TypeError,
        "residual: entry 0 is the function relu; expected the Layer that it makes: call it, relu(...)",
    ),
    "in a repeat": (
        lambda: layers.repeat(dense, 3),
        TypeError,
        "repeat: layer is the function dense; expected the Layer that it makes: call it, dense(...)",
    ),
    "in mixed precision": (
        lambda: layers.mixed_precision(fnet.mlp),
        TypeError,
        "mixed_precision: layer is the function mlp; expected the Layer that it makes: call it, mlp(...)",
    ),
    "an activation of jax": (
        lambda: layers.rnn(3, jnp.tanh),
        TypeError,
        "rnn: activation is the function tanh of jax.numpy; expected a Layer, with its backward by hand: "
        "fnet.layers.tanh()",
    ),
    "an audit of a function": (
        lambda: fnet.check_layer(layers.relu, X, key=KEY),
        TypeError,
        "check_layer: layer is the function relu; expected the Layer that it makes: call it, relu(...)",
    ),
    "a forward without residuals": (
        lambda: fit(NO_RESIDUALS),
        LayerError,
        "scale_0: forward returned float32[4, 3]; expected (y, residuals), with () for residuals that there are not",
    ),
    "a forward without a state": (
        lambda: fit(TWO_RETURNED),
        LayerError,
        "scale_0: forward returned (float32[4, 3], float32[4, 3]); expected (y, state, residuals), with () for "
        "residuals that there are not, and the state as it came where it does not change",
    ),
    "an init without a state": (
        lambda: fit(NO_STATE),
        LayerError,
        "scale_0: init returned {'w': float32[3]}; expected (params, state), with () for what there is not",
    ),
    "a backward of dx alone": (
        lambda: fit(ONLY_DX),
        LayerError,
        "scale_0: backward returned float32[2, 3]; expected (dparams, dx), the gradients of the parameters and of the "
        "inputs, with () for parameters that there are not",
    ),
    "a gradient that is not summed over the batch": (
        lambda: fit(DW_OF_EACH_EXAMPLE),
        LayerError,
        "scale_0: backward returned dparams {'w': float32[2, 3]}; expected {'w': float32[3]}, like the parameters",
    ),
    "a gradient that is not in a dict": (
        lambda: fit(DW_WITHOUT_ITS_NAME),
        LayerError,
        "scale_0: backward returned dparams float32[3]; expected {'w': float32[3]}, like the parameters",
    ),
    "a gradient of the inputs of another shape": (
        lambda: fit(DX_SUMMED),
        LayerError,
        "scale_0: backward returned dx float32[3]; expected float32[2, 3], like the inputs",
    ),
    "a model that is one wrong layer": (
        lambda: fnet.backprop(DX_SUMMED, fnet.losses.squared_error)({"w": jnp.ones(3)}, (), (X, X), KEY),
        LayerError,
        "backward returned dx float32[3]; expected float32[4, 3], like the inputs",
    ),
    "a gradient of another dtype": (
        lambda: fit(scale(backward=by_hand(dx=lambda w, x, dy: (w * dy).astype(jnp.bfloat16)))),
        LayerError,
        "scale_0: backward returned dx bfloat16[2, 3]; expected float32[2, 3], like the inputs",
    ),
    "a forward that takes no parameters": (
        lambda: stateless("scale", lambda key, x: (), lambda x: (x, ()), lambda params, residuals, dy: ((), dy)),
        TypeError,
        "stateless: scale's forward takes (x); expected (params, x)",
    ),
    "a forward without key and train": (
        lambda: fnet.apply(
            fnet.serial(Layer("scale", scale().init, lambda params, state, x: (x, state, ()), by_hand())),
            {"scale_0": ()},
            {"scale_0": ()},
            X,
        ),
        LayerError,
        "scale_0: forward takes (params, state, x); expected (params, state, x, *, key=None, train=False)",
    ),
    "a number as an initializer": (
        lambda: dense(3, weights=0),
        TypeError,
        "dense: weights = 0; expected an initializer, such as fnet.initializers.zeros()",
    ),
    "False as a bias": (
        lambda: layers.conv(3, (3, 3), bias=False),
        TypeError,
        "conv: bias = False; expected an initializer, such as fnet.initializers.zeros(), or None to leave the "
        "parameter out",
    ),
    "an initializer that is not called": (
        lambda: layers.gru(3, recurrent=fnet.initializers.orthogonal),
        TypeError,
        "gru: recurrent is the function orthogonal; expected the initializer that it makes: call it, orthogonal()",
    ),
    "a dtype as a policy": (
        lambda: layers.mixed_precision(dense(3), "bfloat16"),
        TypeError,
        "mixed_precision: policy = 'bfloat16'; expected a Policy: fnet.layers.Policy(compute=jnp.bfloat16)",
    ),
    "a fraction of copies in a loop": (
        lambda: layers.repeat(dense(3), 2, unroll=-1),
        ValueError,
        "repeat: unroll = -1; expected True, or a whole number of at least 1",
    ),
    "a state in 16 bits": (
        lambda: fnet.apply(
            layers.batch_norm(),
            {"scale": jnp.ones(3), "bias": jnp.zeros(3)},
            {"mean": jnp.zeros(3, jnp.bfloat16), "var": jnp.ones(3, jnp.bfloat16)},
            X,
        ),
        LayerError,
        "expected a state in float32 at least, got {'mean': bfloat16[3], 'var': bfloat16[3]}: 16 bits do not move",
    ),
    "a number as a key of dropout": (
        lambda: layers.dropout(0.5).forward((), (), X, key=0, train=True),
        TypeError,
        "dropout: key is 0; expected a random key: jax.random.key(0)",
    ),
    "a number as a key of a gradient": (
        lambda: fnet.backprop(MODEL, LOSS)(PARAMS, STATE, BATCH, 0),
        TypeError,
        "backprop: key is 0; expected a random key: jax.random.key(0)",
    ),
    "inputs alone as a batch": (
        lambda: fnet.autodiff(MODEL, LOSS)(PARAMS, STATE, X, KEY),
        DataError,
        "autodiff: batch is a ArrayImpl; expected Batch(inputs, targets) or Batch(inputs, targets, weights)",
    ),
    "a number as weights": (
        lambda: fnet.backprop(MODEL, LOSS)(PARAMS, STATE, (X, BATCH.targets, 2.0), KEY),
        DataError,
        "backprop: batch.weights = 2.0; expected an array, one weight for each example",
    ),
    "a batch in the place of a state": (
        lambda: STEP(BATCH, TS),
        TypeError,
        "step: ts is Batch(inputs=float32[4, 3], targets=int32[4], weights=None); expected a TrainState, as "
        "fnet.init_train_state makes one",
    ),
    "a run's arguments in another order": (
        lambda: fnet.train(TS, STEP, BATCH, epochs=1, batch_size=2),
        TypeError,
        "train: step is a TrainState; expected a step, as fnet.make_step makes one",
    ),
    "half an epoch": (
        lambda: fnet.train(STEP, TS, BATCH, epochs=1.5, batch_size=2),
        ValueError,
        "train: epochs = 1.5; expected a whole number of at least 1",
    ),
    "half a batch": (
        lambda: fnet.train(STEP, TS, BATCH, epochs=1, batch_size=2.5),
        DataError,
        "batch_size = 2.5; expected a whole number from 1 to 4, the number of examples in data (all of them at once: "
        "batch_size=4)",
    ),
    "an evaluation in slices of nothing": (
        lambda: fnet.make_evaluate(MODEL, LOSS, batch_size=0),
        ValueError,
        "make_evaluate: batch_size = 0; expected at least 1",
    ),
    "a loss with more than it says": (
        lambda: fnet.from_loss(lambda params, batch, key: (jnp.float32(1), {}))(PARAMS, STATE, BATCH, KEY),
        ValueError,
        "from_loss: the loss is (float32[], {}); expected a scalar, one float, the batch's mean; with has_state=True, "
        "(scalar, state, metrics)",
    ),
    "a metric that is not called": (
        lambda: fnet.backprop(MODEL, LOSS, {"top": fnet.metrics.top_k}),
        TypeError,
        "backprop: metrics['top'] is the function top_k, which takes (k: 'int') -> 'Callable[..., jax.Array]'; "
        "expected a function of (outputs, targets); one that makes such a function is called first, as top_k(5)",
    ),
    "a metric of a whole batch": (
        lambda: fnet.backprop(MODEL, LOSS, {"mean": lambda outputs, targets: outputs.mean()})(
            PARAMS, STATE, BATCH, KEY
        ),
        ValueError,
        "the metric 'mean' returned float32[]; expected a value for each of [4], as the loss has: what is measured of "
        "a whole batch is no mean over examples",
    ),
    "a population's arguments in another order": (
        lambda: train_population({"scale": [1.0]}, width_run, jax.random.split(KEY, 1)),
        TypeError,
        "train_population: run is {'scale': [1.0]} and hyper is the function width_run of tests.test_messages; "
        "expected a function of (hyper, key, *data), then a dict of numbers by name, such as {'learning_rate': [0.1, "
        "0.3]}",
    ),
    "a text that is generated without a context": (
        lambda: fnet.generate(GPT, *fnet.init(GPT, KEY, jnp.zeros((1, 4), int)), jnp.zeros((1, 2), int), 3, key=KEY),
        ValueError,
        "generate: the model maps ids to logits and keeps no carry; expected context=..., how many ids it is given",
    ),
    "metrics as a list": (
        lambda: fnet.backprop(MODEL, LOSS, metrics=["accuracy"]),
        TypeError,
        "backprop: metrics = ['accuracy']; expected a dict of names and functions of (outputs, targets): "
        "{'accuracy': fnet.metrics.accuracy}",
    ),
    "metrics by name": (
        lambda: fnet.make_evaluate(MODEL, LOSS, {"accuracy": "accuracy"}),
        TypeError,
        "make_evaluate: metrics['accuracy'] = 'accuracy'; expected a name and a function of (outputs, targets), such "
        "as fnet.metrics.accuracy",
    ),
    "monitors as a list": (
        lambda: fnet.make_step(fnet.backprop(MODEL, LOSS), ADAM, ["norms"]),
        TypeError,
        "make_step: monitors = ['norms']; expected a dict of names and functions of the gradients: "
        "{'gradient_norm': fnet.metrics.gradient_norms}",
    ),
    "a plain loss by hand": (
        lambda: fnet.backprop(MODEL, lambda outputs, targets: outputs.sum(-1)),
        TypeError,
        "backprop: loss is the function <lambda> of tests.test_messages, which has no gradient by hand; expected "
        "fnet.Loss(value, gradient), with gradient(outputs, targets) the derivative of each example's "
        "value by its outputs; autodiff needs none",
    ),
    "a loss by its name": (
        lambda: fnet.autodiff(MODEL, "cross_entropy"),
        TypeError,
        "autodiff: loss = 'cross_entropy'; expected a function of (outputs, targets) that gives one value per example, "
        "such as fnet.softmax_cross_entropy",
    ),
    "a loss that is not called": (
        lambda: fnet.backprop(MODEL, fnet.losses.huber),
        TypeError,
        "backprop: loss is the function huber, which makes one; call it: huber(...)",
    ),
    "a loss that takes targets first, as Keras' do": (
        lambda: fnet.autodiff(MODEL, keras_loss),
        TypeError,
        "autodiff: loss is the function keras_loss of tests.test_messages, which takes (y_true, y_pred); expected a "
        "function of (outputs, targets), in this order: the outputs come first",
    ),
    "a loss that takes targets first and does not say so": (
        lambda: fnet.fit(fnet.make_step(fnet.autodiff(MODEL, swapped_loss), ADAM), TS, BATCH, epochs=1, batch_size=2),
        ValueError,
        "loss is the function swapped_loss of tests.test_messages, which fails with outputs float32[2, 2] and targets "
        "int32[2], and does not with targets first; expected a function of (outputs, targets): take its arguments in "
        "this order",
    ),
    "a loss of the outputs alone": (
        lambda: fnet.make_evaluate(MODEL, lambda outputs: outputs.sum(-1)),
        TypeError,
        "make_evaluate: loss is the function <lambda> of tests.test_messages, which takes (outputs); expected a "
        "function of (outputs, targets)",
    ),
    "a loss that is a mean already": (
        lambda: fnet.fit(fnet.make_step(fnet.autodiff(MODEL, mean_loss), ADAM), TS, BATCH, epochs=1, batch_size=2),
        ValueError,
        "loss is the function mean_loss of tests.test_messages, which returned float32[] of outputs float32[2, 2] and "
        "targets int32[2]; expected one value for each of the 2 examples, shape (2,) or (2, ...): the mean over them "
        "is taken outside, by the batch's weights",
    ),
    "a loss by hand that is a mean already": (
        lambda: fnet.backprop(MODEL, Loss(mean_loss, lambda y, t: y))(PARAMS, STATE, BATCH, KEY),
        ValueError,
        "loss is the function mean_loss of tests.test_messages, which returned float32[] of outputs float32[4, 2] and "
        "targets int32[4]; expected one value for each of the 4 examples, shape (4,) or (4, ...): the mean over them "
        "is taken outside, by the batch's weights",
    ),
    "an evaluation by a loss that is a number": (
        lambda: fnet.make_evaluate(MODEL, lambda outputs, targets: 0.0)(PARAMS, STATE, BATCH),
        ValueError,
        "loss is the function <lambda> of tests.test_messages, which returned 0.0 of outputs float32[4, 2] and targets "
        "int32[4]; expected one value for each of the 4 examples, shape (4,) or (4, ...): the mean over them is taken "
        "outside, by the batch's weights",
    ),
    "a whole state as parameters to predict": (
        lambda: fnet.predict(MODEL, TS, STATE, X),
        TypeError,
        f"predict: params {WHOLE}",
    ),
    "a whole state as the model's state": (
        lambda: fnet.predict(MODEL, PARAMS, TS, X),
        TypeError,
        f"predict: state {WHOLE}",
    ),
    "a whole state as parameters to evaluate": (
        lambda: fnet.make_evaluate(MODEL, LOSS)(TS, STATE, BATCH),
        TypeError,
        f"evaluate: params {WHOLE}",
    ),
    "a whole state as parameters to apply": (
        lambda: fnet.apply(MODEL, TS, STATE, X),
        TypeError,
        f"apply: params {WHOLE}",
    ),
    "a whole state as parameters of layers": (
        lambda: fnet.backprop(MODEL, LOSS)(TS, STATE, BATCH, KEY),
        LayerError,
        "expected params of the children ['dense_0', 'relu_0', 'dense_1'], got a TrainState: pass what the model's "
        "init returned",
    ),
    "a model and a loss to from_loss": (
        lambda: fnet.from_loss(MODEL),
        TypeError,
        "from_loss: loss_fn is the layer mlp; expected a function of (params, batch, key) that gives one number; a "
        "model and a loss go to fnet.autodiff(model, loss)",
    ),
    "a model as an engine": (
        lambda: fnet.make_step(MODEL, ADAM),
        TypeError,
        "make_step: gradient is the layer mlp; expected a gradient engine, such as fnet.backprop(model, loss) makes "
        "one",
    ),
    "an optimizer that is not called": (
        lambda: fnet.make_step(fnet.backprop(MODEL, LOSS), fnet.adam),
        TypeError,
        "make_step: optimizer is the function adam; expected the Optimizer that it makes: call it, adam(...)",
    ),
    "arguments in another order": (
        lambda: fnet.make_step(ADAM, fnet.backprop(MODEL, LOSS)),
        TypeError,
        "make_step: gradient is an Optimizer; expected a gradient engine, such as fnet.backprop(model, loss) makes one",
    ),
    "a number as a key of init": (
        lambda: fnet.init(MODEL, 7, X),
        TypeError,
        "init: key is 7; expected a random key: jax.random.key(7)",
    ),
    "an array as a key of init": (
        lambda: fnet.init(MODEL, X, KEY),
        TypeError,
        "init: key is float32[4, 3]; expected a random key: jax.random.key(0)",
    ),
    "keys in the place of one": (
        lambda: fnet.init(MODEL, jax.random.split(KEY), X),
        TypeError,
        "init: key is key<fry>[2]; expected a random key: jax.random.key(0)",
    ),
    "a number as a key of a run": (
        lambda: fnet.init_train_state(PARAMS, ADAM, 0),
        TypeError,
        "init_train_state: key is 0; expected a random key: jax.random.key(0)",
    ),
    "an update without a state": (
        lambda: ADAM.update(PARAMS, None, PARAMS),
        TypeError,
        "adam: opt_state is None; expected the AdamState that this optimizer's init(params) made, or the one that its "
        "last update returned",
    ),
    "an update with another optimizer's state": (
        lambda: ADAM.update(PARAMS, fnet.sgd(0.1).init(PARAMS), PARAMS),
        TypeError,
        "adam: opt_state is a SgdState; expected the AdamState that this optimizer's init(params) made, or the one "
        "that its last update returned",
    ),
    "a chain's update without a state": (
        lambda: fnet.chain(fnet.transforms.clip_by_value(1.0), ADAM).update(PARAMS, None, PARAMS),
        TypeError,
        "chain: opt_state is None; expected the ChainState that this optimizer's init(params) made, or the one that "
        "its last update returned",
    ),
    "an update of no parameters": (
        lambda: ADAM.update(PARAMS, ADAM.init(PARAMS), None),
        ValueError,
        "params is None; expected the parameters: update(grads, opt_state, params)",
    ),
    "fractions of a split": (
        lambda: fnet.split(BATCH, (0.75, 0.25), KEY),
        DataError,
        "sizes = (0.75, 0.25); expected a fraction, or whole numbers that add up to 4: (3, 1), or 0.75",
    ),
    "three fractions": (
        lambda: fnet.split(BATCH, (0.5, 0.25, 0.25), KEY),
        DataError,
        "sizes = (0.5, 0.25, 0.25); expected a fraction, or whole numbers that add up to 4: (2, 1, 1)",
    ),
    "a number as a key of a split": (
        lambda: fnet.split(BATCH, 0.5, 3),
        TypeError,
        "split: key is 3; expected a random key: jax.random.key(3)",
    ),
    "a width in a sweep": (
        lambda: members(width=[8, 4, 8], scale=[1.0, 2.0, 3.0])(width_run),
        ValueError,
        "width decides a shape or what is computed, and members of one program have that in common; expected one "
        "population for each of width = 4, 8, with a run that takes it as a Python number: "
        "fnet.population.join(populations, width=values) makes one of them",
    ),
    "a depth in a sweep": (
        lambda: members(depth=[1, 2])(depth_run),
        ValueError,
        "depth decides a shape or what is computed, and members of one program have that in common; expected one "
        "population for each of depth = 1, 2, with a run that takes it as a Python number: "
        "fnet.population.join(populations, depth=values) makes one of them",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_slip_is_told_with_its_remedy(case):
    call, error, message = CASES[case]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    told = str(raised.value)
    assert told.startswith(message) if message.endswith(",") else told == message  # a tree goes on


def test_an_error_of_a_losss_own_says_what_it_was_given_and_to_whom_the_data_were():
    def own(outputs, targets):
        return (outputs - targets).sum(-1)  # of (2, 2) and (2,), which NumPy's rules would pair

    def unlike(outputs, targets):
        return jnp.concatenate([outputs, targets])

    for loss in (own, unlike):
        step = fnet.make_step(fnet.autodiff(MODEL, loss), ADAM)
        with pytest.raises((ValueError, TypeError)) as caught:
            fnet.fit(step, TS, BATCH, epochs=1, batch_size=2)
        notes = "\n".join(caught.value.__notes__)
        assert f"in the loss, the function {loss.__name__} of tests.test_messages, of outputs float32[2, 2]" in notes
    assert "targets int32[2]" in notes


def test_an_error_is_shown_once_and_ends_with_the_argument_and_its_shapes():
    labels = fnet.Batch(X, jnp.array([0, 1, 2, 0]))
    wide = fnet.Batch(jnp.ones((4, 5)), BATCH.targets)
    for data, last in (
        (
            labels,
            "DataError: data: softmax_cross_entropy: label 2 in example 2 is outside 0..1 (outputs have 2 classes)",
        ),
        (wide, "in data, given to fit: Batch(inputs=float32[2, 5], targets=int32[2], weights=None)"),
    ):
        with pytest.raises(ValueError) as caught:
            fnet.fit(STEP, TS, data, epochs=1, batch_size=2)
        shown = "".join(traceback.format_exception(caught.value)).strip()
        assert shown.count("Traceback (most recent call last)") == 1
        assert shown.splitlines()[-1].endswith(last)


def test_a_check_of_ones_own_that_names_no_example_is_told_with_those_that_it_saw():
    def picky(outputs, targets):
        if isinstance(targets, np.ndarray) and targets.max() > 1:
            raise ValueError("two classes alone")
        return outputs.sum(-1)

    step = fnet.make_step(fnet.autodiff(MODEL, picky), ADAM)
    with pytest.raises(DataError) as caught:
        fnet.fit(step, TS, fnet.Batch(X, jnp.array([1, 1, 2, 0])), epochs=1, batch_size=2)
    seen = "data, examples [2, 3] (those with the least and the greatest label or id): two classes alone"
    assert str(caught.value) == seen


def test_labels_are_named_by_their_example_in_microbatches_and_slices_too():
    labels = np.zeros(9, int)
    labels[7] = 5
    data = fnet.Batch(jnp.ones((9, 3)), labels)
    step = fnet.make_step(fnet.accumulate(fnet.backprop(MODEL, LOSS), 2), ADAM)
    with pytest.raises(DataError, match=r"^data: softmax_cross_entropy: label 5 in example 7 is"):
        fnet.fit(step, TS, data, epochs=1, batch_size=4)
    with pytest.raises(ValueError, match=r"^softmax_cross_entropy: label 5 in example 7 is"):
        fnet.make_evaluate(MODEL, LOSS, batch_size=4)(PARAMS, STATE, data)


@pytest.mark.parametrize(
    "layer", [DW_OF_EACH_EXAMPLE, DW_WITHOUT_ITS_NAME, DX_SUMMED], ids=["each example", "no name", "summed"]
)
def test_the_audit_reports_gradients_of_wrong_trees_and_shapes_instead(layer):
    report = fnet.check_layer(layer, X, key=KEY, precisions=(), cost=False)
    assert not report.ok
    assert any(
        leaf.verdict == "wrong" and leaf.cause.startswith(("wrong shape", "wrong tree")) for leaf in report.leaves
    )


def test_what_has_the_contracts_form_passes():
    ours = scale(backward=by_hand())
    fit(ours)
    assert fnet.check_layer(ours, X, key=KEY, precisions=(), cost=False).ok
    assert isinstance(fnet.backprop(MODEL, Loss(lambda o, t: o.sum(-1), lambda o, t: jnp.ones_like(o))), type(fit))


def test_train_takes_numpy_data_uncompiled_as_compiled():
    inputs, labels = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), np.array([0, 1, 1, 0])
    plain, *_ = fnet.train(STEP, TS, (inputs, labels), epochs=2, batch_size=2)
    compiled, *_ = jax.jit(lambda data: fnet.train(STEP, TS, data, epochs=2, batch_size=2))((inputs, labels))
    for a, b in zip(jax.tree.leaves(plain.params), jax.tree.leaves(compiled.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"data\.inputs has dtype <U1"):
        fnet.train(STEP, TS, (np.array([["a"] * 3] * 4), labels), epochs=2, batch_size=2)


# --- populations of other shapes, joined ------------------------------------------------------------------------------


def width_population(width, scales=(1.0, 2.0), returned=lambda x: x.sum()):
    def run(hyper, key, data, width):
        return returned(hyper["scale"] * jnp.ones((width,)) + 0 * data.inputs.sum())

    return train_population(partial(run, width=width), {"scale": scales}, jax.random.split(KEY, len(scales)), BATCH)


def test_joined_populations_rank_as_one():
    apart = [width_population(3), width_population(5, (1.0, 2.0, 3.0))]
    joined = join(apart, width=[3, 5])
    assert {name: values.tolist() for name, values in joined.hyper.items()} == {
        "scale": [1.0, 2.0, 1.0, 2.0, 3.0],
        "width": [3, 3, 5, 5, 5],
    }
    np.testing.assert_array_equal(joined.results, [3, 6, 5, 10, 15])
    np.testing.assert_array_equal(
        jax.random.key_data(joined.keys), np.concatenate([jax.random.key_data(p.keys) for p in apart])
    )
    assert joined.run_seconds == sum(p.run_seconds for p in apart)
    assert joined.member_bytes == max(p.member_bytes for p in apart)
    found = best(joined, joined.results, greatest=True)
    assert found.hyper == {"scale": 3.0, "width": 5}


def rename(population: Population) -> Population:
    return population._replace(hyper={"rate": population.hyper["scale"]})


@pytest.mark.parametrize(
    ("populations", "axes", "message"),
    [
        (lambda: [], {}, "join: populations = []; expected one at least"),
        (
            lambda: [width_population(3), width_population(5)],
            {"width": [3]},
            "join: width = [3]; expected one value for each of 2 populations, under a name that is not among theirs "
            "(scale)",
        ),
        (
            lambda: [width_population(3), width_population(5)],
            {"scale": [3, 5]},
            "join: scale = [3, 5]; expected one value for each of 2 populations, under a name that is not among theirs "
            "(scale)",
        ),
        (
            lambda: [width_population(w, returned=lambda x: {"w": x}) for w in (3, 5)],
            {"width": [3, 5]},
            "join: results/w of populations[0] is float32[3], of populations[1] float32[5]; expected the same of each "
            "member: let the runs return their scores",
        ),
        (
            lambda: [width_population(3), rename(width_population(5))],
            {"width": [3, 5]},
            "join: hyper/scale of populations[0] is float32[], of populations[1] not there; expected the same of each "
            "member: let the runs return their scores",
        ),
    ],
    ids=["none", "one value", "a name taken", "results of other shapes", "other names"],
)
def test_what_cannot_be_joined_is_refused(populations, axes, message):
    with pytest.raises(ValueError) as raised:
        join(populations(), **axes)
    assert str(raised.value) == message
