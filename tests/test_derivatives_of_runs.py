"""A run differentiates: by the learning rate and by every number of every optimizer, where gradients are 0 too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.layers import dense, serial, tanh
from fnet.optimizers import (
    adadelta,
    adafactor,
    adagrad,
    adam,
    adamax,
    adamw,
    amsgrad,
    averaged,
    chain,
    dynamic_loss_scale,
    groups,
    lamb,
    lion,
    lookahead,
    master_weights,
    momentum,
    muon,
    nadam,
    radam,
    reduce_on_plateau,
    rmsprop,
    schedules,
    sgd,
    skip_nonfinite,
    transforms,
)
from tests.test_optimizers import FIRSTS, TABLE

MODEL = serial(dense(5), tanh(), dense(1))


def problem():
    """Data whose first feature is 0 throughout, as a pixel at an image's edge: its weights never have a gradient."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((12, 4))
    x[:, 0] = 0
    y = np.sin(x.sum(1, keepdims=True))
    params, _ = fnet.init(MODEL, jax.random.key(0), jnp.asarray(x))
    return (
        params,
        fnet.Batch(jnp.asarray(x[:8]), jnp.asarray(y[:8])),
        fnet.Batch(jnp.asarray(x[8:]), jnp.asarray(y[8:])),
    )


def loss_after(engine, build, params, data, held, epochs=3):
    """The validation loss after a run of two steps an epoch, and its derivative, by the optimizer's numbers."""
    loss = fnet.losses.half_squared_error
    state = {"dense_0": (), "dense_1": (), "tanh_0": ()}

    def f(numbers):
        optimizer, opt_state = build(numbers)
        step = fnet.make_step(engine(MODEL, loss), optimizer)
        ts = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
        ts = ts if opt_state is None else ts._replace(opt_state=opt_state(ts.opt_state))
        end, _, _ = fnet.train(step, ts, data, epochs=epochs, batch_size=4)
        return loss(fnet.apply(MODEL, end.params, state, held.inputs), held.targets).mean()

    return jax.jit(jax.value_and_grad(f))


def central(f, x, h=1e-6):
    """The slope of a function of one number that returns its value first."""
    h = h * max(abs(x), 1e-3)
    return (f(x + h)[0] - f(x - h)[0]) / (2 * h)


def richardson(f, x, h=1e-4):
    """The same with an error of h⁴: from slopes over h and 2h."""
    return (4 * central(f, x, h) - central(f, x, 2 * h)) / 3


# small enough that no run is chaotic: then no difference measures a slope
RATES = {
    "sgd": (sgd, 0.1),
    "momentum": (momentum, 0.05),
    "rmsprop": (rmsprop, 0.01),
    "rmsprop, eps outside": (lambda rate: rmsprop(rate, eps_in_sqrt=False), 0.01),
    "rmsprop, centered": (lambda rate: rmsprop(rate, centered=True, momentum=0.5), 0.003),
    "adagrad": (adagrad, 0.1),
    "adadelta": (adadelta, 1.0),
    "adam": (adam, 0.01),
    "adam, keras": (lambda rate: adam(rate, variant="keras"), 0.01),
    "adamw": (adamw, 0.01),
    "amsgrad": (amsgrad, 0.01),
    "amsgrad, corrected": (lambda rate: amsgrad(rate, variant="corrected"), 0.01),
    "adamax": (adamax, 0.01),
    "nadam": (nadam, 0.01),
    "radam": (radam, 0.01),
    "lion": (lion, 0.0009),
    "lamb": (lamb, 0.003),
    "adafactor": (adafactor, 0.01),
    "muon": (lambda rate: groups({"*w": muon(rate)}, default=sgd(rate)), 0.006),
    "clipped": (lambda rate: chain(transforms.clip_by_global_norm(0.1), adam(rate)), 0.01),
    "clipped by leaf": (lambda rate: chain(transforms.clip_by_leaf_norm(0.1), adam(rate)), 0.01),
    "clipped by unit": (lambda rate: chain(transforms.adaptive_clip(), adam(rate)), 0.0003),
    "centralized": (lambda rate: chain(transforms.centralize(), transforms.l2_decay(0.1), adam(rate)), 0.01),
    "groups": (lambda rate: groups({"*b": adam(rate)}, default=lamb(rate)), 0.003),
    "averaged, skipping": (lambda rate: averaged(skip_nonfinite(adam(rate))), 0.01),
    "lookahead": (lambda rate: lookahead(adam(rate), every=2), 0.01),
    "master weights, scaled": (lambda rate: dynamic_loss_scale(master_weights(adam(rate))), 0.01),
    "on a plateau": (lambda rate: reduce_on_plateau(adam(rate), window=3), 0.01),
    "a schedule": (lambda rate: adam(schedules.warmup_cosine(rate, 2, 9)), 0.01),
}


@pytest.mark.parametrize(
    ("name", "engine"), [("adam", fnet.autodiff), ("lamb", fnet.autodiff), *((name, fnet.backprop) for name in RATES)]
)
def test_the_derivative_of_200_steps_by_the_learning_rate_is_the_measured_slope(name, engine, x64):
    build, rate = RATES[name]
    f = loss_after(engine, lambda rate: (build(rate), None), *problem(), epochs=100)
    np.testing.assert_allclose(f(rate)[1], richardson(f, rate), rtol=1e-6)


@pytest.mark.parametrize("name", [*FIRSTS.values(), "adam b1 0", "adam keras", "adamax keras", "adagrad keras"])
def test_the_derivatives_by_all_numbers_of_an_optimizer_are_finite_and_the_measured_slopes(name, x64):
    case = TABLE[name]
    if case.matrices:
        optimizer = groups({"*w": case.optimizer(0.02)}, default=sgd(0.02))
        own = lambda opt_state: opt_state.groups["*w"]  # noqa: E731
        put = lambda opt_state, own: opt_state._replace(groups={**opt_state.groups, "*w": own})  # noqa: E731
    else:
        optimizer, own, put = case.optimizer(0.02), lambda opt_state: opt_state, lambda opt_state, own: own
    params, data, held = problem()
    hyper = own(optimizer.init(params)).hyper

    def build(hyper):
        return optimizer, lambda opt_state: put(opt_state, own(opt_state)._replace(hyper=hyper))

    f = loss_after(fnet.backprop, build, params, data, held)
    _, found = f(hyper)
    for number, value in hyper._asdict().items():
        if value is None:
            continue
        slope = getattr(found, number)
        assert np.isfinite(slope), number
        one = lambda x, number=number: f(hyper._replace(**{number: jnp.asarray(x, jnp.float64)}))  # noqa: E731
        # not those that are too small to be measured; a clip of 1 is a kink, as at first RMS(u) is 1
        if value > 0 and number not in ("eps", "eps_root", "threshold") and (name, number) != ("adafactor", "clip"):
            np.testing.assert_allclose(slope, central(one, float(value)), rtol=2e-4, atol=1e-9, err_msg=number)


def test_the_row_of_the_bug_report(x64):
    # with eps_root = 1e-12 it was finite before, and close
    params, data, held = problem()
    exact, near = (
        loss_after(fnet.autodiff, lambda rate, e=e: (adam(rate, eps_root=e), None), params, data, held)(0.01)[1]
        for e in (0.0, 1e-12)
    )
    assert np.isfinite(exact)
    np.testing.assert_allclose(exact, near, rtol=1e-3)


def run(held, optimizer=adam(0.01), **options):
    """A function of where a run begins, its inputs and their weights: the validation loss after it."""
    loss, state = fnet.losses.half_squared_error, {"dense_0": (), "dense_1": (), "tanh_0": ()}
    step = fnet.make_step(fnet.backprop(MODEL, loss), optimizer)

    def after(params, data):
        ts = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
        end, _, _ = fnet.train(step, ts, data, **{"epochs": 3, "batch_size": 4, **options})
        return loss(fnet.apply(MODEL, end.params, state, held.inputs), held.targets).mean()

    return after


def test_derivatives_by_the_start_the_data_and_their_weights_are_the_measured_slopes(x64):
    params, data, held = problem()
    data = data._replace(weights=jnp.linspace(0.5, 2, 8))
    after = run(held)
    found = jax.jit(jax.grad(after, (0, 1)))(params, data)
    rng = np.random.default_rng(1)
    for part in ("params", "inputs", "targets", "weights"):
        given = params if part == "params" else getattr(data, part)
        slope = found[0] if part == "params" else getattr(found[1], part)
        way = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), given)
        if part == "inputs":
            way[:, 0] = 0  # where v is 0, Adam's m / √v has a kink

        def moved(t, part=part, given=given, way=way):
            given = jax.tree.map(lambda a, d: a + t * d, given, way)
            return after(given, data) if part == "params" else after(params, data._replace(**{part: given}))

        along = sum(jax.tree.leaves(jax.tree.map(lambda a, d: float((a * d).sum()), slope, way)))
        np.testing.assert_allclose(along, (moved(1e-5) - moved(-1e-5)) / 2e-5, rtol=1e-7, err_msg=part)


def test_forward_mode_and_a_population_give_what_reverse_mode_gives(x64):
    params, data, held = problem()
    after = lambda rate: run(held, adam(rate))(params, data)  # noqa: E731
    rates = jnp.array([0.003, 0.01, 0.02])
    forward, reverse = (jax.jit(jax.vmap(derivative(after)))(rates) for derivative in (jax.jacfwd, jax.grad))
    np.testing.assert_allclose(forward, reverse, rtol=1e-11)


@pytest.mark.long
def test_the_check_of_gradients_takes_a_run_and_finds_a_wrong_one(x64):
    params, data, held = problem()
    after = run(held, sgd(0.1))
    assert fnet.check_gradients(lambda params: after(params, data), params).ok

    @jax.custom_jvp
    def forgetful(x):
        return jnp.tanh(x)

    forgetful.defjvp(lambda primals, tangents: (jnp.tanh(primals[0]), tangents[0]))
    wrong = lambda params: after(params | {"dense_1": jax.tree.map(forgetful, params["dense_1"])}, data)  # noqa: E731
    report = fnet.check_gradients(wrong, params)
    assert {leaf.path for leaf in report.leaves if leaf.verdict == "wrong"} == {
        "dense_1/w"
    }  # b begins at 0, where tanh' is 1


def test_checkpoints_change_no_derivative(x64):
    # seven epochs of three steps, the last with fewer examples: no number of levels divides them
    params, data, held = problem()
    derivative = lambda levels: jax.jit(  # noqa: E731
        jax.value_and_grad(run(held, sgd(0.1), epochs=7, batch_size=3, checkpoint=levels))
    )(params, data)
    expected = derivative(None)
    for levels in (1, 4):
        for a, b in zip(jax.tree.leaves(derivative(levels)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13 * float(jnp.abs(b).max()))


def test_checkpoints_that_are_no_number_are_refused():
    params, data, held = problem()
    with pytest.raises(ValueError, match="train: checkpoint = 0; expected at least 1"):
        run(held, checkpoint=0)(params, data)


def states_kept(model, x, levels) -> float:
    """Scratch memory of a run's derivative by its rate, ten thousand steps, in states."""
    labels = jnp.zeros(len(x), int)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)

    def after(rate, params):
        step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), sgd(rate))
        ts = fnet.init_train_state(params, sgd(rate), jax.random.key(0), state)
        data = fnet.Batch(x, labels)
        end, _, _ = fnet.train(step, ts, data, epochs=10_000, batch_size=len(x), checkpoint=levels)
        return fnet.softmax_cross_entropy(fnet.apply(model, end.params, state, x), labels).mean()

    memory = jax.jit(jax.grad(after)).lower(0.1, params).compile().memory_analysis()
    return memory.temp_size_in_bytes / sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


@pytest.mark.long
def test_ten_thousand_steps_are_differentiated_in_the_memory_of_thirty_states():
    model, x = fnet.mlp(128, 64, 10), jnp.zeros((32, 784))
    assert states_kept(model, x, 8) < 30
    assert 200 < states_kept(model, x, 2) < 210
