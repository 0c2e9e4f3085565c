"""Interpretability (S17): which pixels a network reads a digit by, from gradients by its input; and checks of the maps.

    python -m experiments.saliency
    python -m experiments.saliency --images 300 --seeds 0

Maps of the logit z of a class, for an image x, all from ∂z/∂x by the model's backward by hand:

    gradient              ∂z/∂x at x                                       (Simonyan et al., arXiv:1312.6034)
    SmoothGrad            its mean over noisy copies of x                  (Smilkov et al., arXiv:1706.03825)
    gradient × input      x ∂z/∂x
    integrated gradients  x times the mean of ∂z/∂x along the straight line from an empty page to x, at the midpoints of
                          equal steps                                      (Sundararajan et al., arXiv:1703.01365)

A map that only looks right is worth nothing, so four checks are made in numbers:

    completeness    integrated gradients add up to z(x) − z(empty page), up to the error of the steps
    deletion        wiping out the pixels that a map ranks first should lower z faster than pixels at random, of the
                    page or of the ink; blackest first is the control that knows no network. Wiping out paper changes
                    nothing, so the first two maps, which rank it too, fall behind random ink in the end
    randomisation   fresh weights, layer by layer from the top, must change the map      (Adebayo et al., 1810.03292)
    engines         the gradient by hand is autodiff's

The first two maps rank pixels by size, the others, whose sums mean something, by value.

Legend: B images, H W height and width, P = H W pixels, M numbers of wiped-out pixels, K steps or copies.
"""

from __future__ import annotations

import dataclasses
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from scipy.stats import rankdata

import fnet
from experiments.common import load_images, main, new_run_folder, open_console, say_written, write_results
from experiments.options import Amount, ByEngine, Count, Counts, InFolder, Seed, Seeds, Wholes, engine_of
from experiments.pictures.parts import first_of_each, mean_and_spread
from experiments.pictures.saliency import Checks, draw_checks, draw_maps, print_checks
from fnet.core.numerics import stream
from fnet.layers import conv, dense, flatten, relu
from fnet.metrics import accuracy
from fnet.optimizers.schedules import cosine

LOSS = fnet.softmax_cross_entropy
BY_SIZE = ("gradient", "SmoothGrad")  # ranked by |map|; the others by the map
METHODS = (*BY_SIZE, "gradient × input", "integrated gradients")
CONTROLS = ("random pixels", "random ink", "blackest first")
LAYERS = ("dense_1", "dense_0", "conv_1", "conv_0")  # from the top


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Train a small convolutional network on the digits and look at what it looks at."""

    images: Count = 100  # of the test digits, in the checks
    copies: Count = 32  # of SmoothGrad
    noise: Amount = 0.15  # its standard deviation; pixels go from 0 to 1
    path_steps: Counts = (4, 16, 64)  # along the path of integrated gradients; the last is used
    wiped_out: Wholes = (0, 5, 10, 20, 30, 40, 60, 80, 120, 160)  # pixels, in the deletion check
    learning_rate: Amount = 2e-3  # Adam's first; half a cosine brings it to 0
    batch_size: Count = 50
    epochs: Count = 12
    seeds: Seeds = (0, 1, 2)  # of the parameters, the orders and the noise
    split_seed: Seed = 0  # all networks are trained on the same 4,000 digits and look at the same others
    test_size: Count = 1000  # of the 5,000 digits
    tolerance: Amount = 0.01  # of completeness: mean |Σ map − (z(x) − z(empty))| over mean |z(x) − z(empty)|


def network() -> fnet.Layer:
    """Two convolutions of stride 2 and two dense layers."""
    layers = [conv(8, (5, 5), stride=2), relu(), conv(16, (5, 5), stride=2), relu(), flatten()]
    return fnet.serial(*layers, dense(32), relu(), dense(10))


def train_seed(config: Config, key, train_data: fnet.Batch, test_data: fnet.Batch):
    """A whole run as a function of its key: parameters, state, and accuracy on the test digits."""
    model, steps = network(), config.epochs * -(-len(train_data.targets) // config.batch_size)
    params, state = model.init(stream(key, "model"), train_data.inputs[:1])
    optimizer = fnet.adam(cosine(config.learning_rate, steps))
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    step = fnet.make_step(engine_of(config)(model, LOSS), optimizer)
    ts, *_ = fnet.train(step, start, train_data, epochs=config.epochs, batch_size=config.batch_size)
    tested = fnet.make_evaluate(model, LOSS, {"accuracy": accuracy})(ts.params, ts.state, test_data)
    return ts.params, ts.state, tested["accuracy"].value


# --- maps ------------------------------------------------------------------------------------------------------------


def logits_of(model: fnet.Layer, params, state, x, labels) -> jax.Array:
    """z, the logit of each image's label ``(B,)``."""
    return jnp.take_along_axis(fnet.apply(model, params, state, x), labels[:, None], 1)[:, 0]


def input_gradient(model: fnet.Layer, params, state, x, labels) -> jax.Array:
    """∂z/∂x ``(B, H, W, 1)`` by hand: the backward of the model from a gradient of 1 at the label's logit."""
    logits, _, residuals = model.forward(params, state, x)
    return model.backward(params, residuals, jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))[1]


def smooth_gradient(gradient, x, key, copies: int, noise) -> jax.Array:
    """The mean of ``gradient`` over ``copies`` of x with normal noise."""

    def add(total, key):
        return total + gradient(x + noise * jax.random.normal(key, x.shape, x.dtype)), None

    return jax.lax.scan(add, jnp.zeros_like(x), jax.random.split(key, copies))[0] / copies


def integrated_gradients(gradient, x, steps: int) -> jax.Array:
    """``x ∫₀¹ gradient(a x) da`` by the midpoints of equal steps; the path begins at an empty page, all 0."""

    def add(total, a):
        return total + gradient(a * x), None

    middles = (jnp.arange(steps, dtype=x.dtype) + 0.5) / steps
    return x * jax.lax.scan(add, jnp.zeros_like(x), middles)[0] / steps


def maps_of(config: Config, params, state, x, labels, key) -> dict[str, jax.Array]:
    """The four maps of the logits of ``labels``, each ``(B, H, W, 1)``."""
    gradient = partial(input_gradient, network(), params, state, labels=labels)
    at_x = gradient(x=x)
    return {
        "gradient": at_x,
        "SmoothGrad": smooth_gradient(lambda x: gradient(x=x), x, key, config.copies, config.noise),
        "gradient × input": x * at_x,
        "integrated gradients": integrated_gradients(lambda x: gradient(x=x), x, config.path_steps[-1]),
    }


def scores_of(maps) -> dict:
    """What a map ranks the pixels by."""
    return {name: abs(m) if name in BY_SIZE else m for name, m in maps.items()}


# --- checks ----------------------------------------------------------------------------------------------------------


def completeness(config: Config, params, state, x, labels) -> jax.Array:
    """``Σ map − (z(x) − z(empty page))`` of integrated gradients by number of steps and image, and the difference."""
    model = network()
    z = partial(logits_of, model, params, state, labels=labels)
    difference = z(x=x) - z(x=jnp.zeros_like(x))
    gradient = partial(input_gradient, model, params, state, labels=labels)
    sums = [integrated_gradients(lambda x: gradient(x=x), x, k).sum((1, 2, 3)) for k in config.path_steps]
    return jnp.stack([*(total - difference for total in sums), difference])


def deletion(config: Config, params, state, x, labels, scores) -> jax.Array:
    """z after the pixels of the highest scores are wiped out ``(M, B)``, by how many they are."""
    order = jnp.argsort(-scores.reshape(len(x), -1), axis=1)  # (B, P)
    rank = jnp.argsort(order, axis=1).reshape(x.shape)

    def wiped(count):
        return logits_of(network(), params, state, jnp.where(rank < count, 0, x), labels)

    return jax.lax.map(wiped, jnp.asarray(config.wiped_out))


def alike(a: np.ndarray, b: np.ndarray, ink: np.ndarray) -> float:
    """The mean over images of the rank correlation of two scores, over the pixels of ``ink``; constant maps count 0.

    On the whole page maps that contain x agree for that reason alone.
    """
    pairs = [(p[i], q[i]) for p, q, i in zip(a, b, ink, strict=True)]
    ranks = [(rankdata(p), rankdata(q)) for p, q in pairs]
    return float(np.mean([np.corrcoef(r)[0, 1] if np.ptp(r[0]) and np.ptp(r[1]) else 0.0 for r in ranks]))


def randomised(params: dict, fresh: dict):
    """The parameters with fresh ones from the top down to each layer: names and trees."""
    for i, name in enumerate(LAYERS):
        yield f"from {name} up", {**params, **{layer: fresh[layer] for layer in LAYERS[: i + 1]}}


def by_autodiff(params, state, x, labels) -> jax.Array:
    """∂z/∂x by jax; images do not touch one another, so one gradient of the sum has all."""
    return jax.grad(lambda x: logits_of(network(), params, state, x, labels).sum())(x)


def misread(config: Config, trained, key, test_data: fnet.Batch, maps) -> tuple | None:
    """Up to eight digits that the network misreads, the maps of the class read and of the true one, and which they are.

    None where it misreads none.
    """
    params, state, _ = trained
    read = np.asarray(fnet.apply(network(), params, state, test_data.inputs)).argmax(1)
    wrong = np.flatnonzero(read != np.asarray(test_data.targets))[:8]
    if not len(wrong):
        return None
    rows = np.resize(wrong, config.images)  # as many as the maps are compiled for
    x, both = test_data.inputs[rows], {}
    for name, labels in (("for the class read", read[rows]), ("for the true class", test_data.targets[rows])):
        of = maps(params, state, x, jnp.asarray(labels), stream(key, "noise"))
        both[name] = np.asarray(of["integrated gradients"])[: len(wrong)]
    return np.asarray(x)[: len(wrong)], both, [f"read {read[i]}, is {int(test_data.targets[i])}" for i in wrong]


# --- the experiment --------------------------------------------------------------------------------------------------


def run(config: Config, console: Console | None = None) -> dict:
    """Train, map, check, print the tables, draw; returns what was measured."""
    console = open_console(config, console)
    if config.wiped_out[0] != 0:
        raise SystemExit(f"wiped_out = {config.wiped_out}; expected 0 first: the logit that the others are compared to")
    folder, begin = new_run_folder(config, "saliency"), time.perf_counter()
    train_data, test_data = load_images(config.split_seed, config.test_size)
    keys = [jax.random.key(seed) for seed in config.seeds]
    train, maps, check, wipe, compare = (
        jax.jit(partial(f, config))
        for f in (train_seed, maps_of, completeness, deletion, lambda _, *a: by_autodiff(*a))
    )
    with console.status(f"{len(keys)} networks, {config.epochs} epochs each"):
        networks = [train(key, train_data, test_data) for key in keys]
        tests = np.array([float(network[2]) for network in networks])
    console.print(f"accuracy on {config.test_size} test digits: {mean_and_spread(tests, '.4f')}", highlight=False)

    x, labels = (a[: config.images] for a in test_data[:2])
    ink = np.asarray(x)[..., 0] > 0
    results, likeness, first = [], [], {}
    for seed, (key, (params, state, _)) in enumerate(zip(keys, networks, strict=True)):
        with console.status(f"maps and checks of network {seed}"):
            of = maps(params, state, x, labels, stream(key, "noise"))
            first = first or {"maps": jax.device_get(of), "levels": {}}
            scores = scores_of(of)
            page, inked = (jax.random.uniform(stream(key, name), x.shape) for name in ("page", "ink"))
            controls = dict(zip(CONTROLS, (page, jnp.where(x > 0, inked, -1), x), strict=True))
            z = {name: np.asarray(wipe(params, state, x, labels, s)) for name, s in {**scores, **controls}.items()}
            *errors, difference = np.asarray(check(params, state, x, labels))
            hand, auto = of["gradient"], compare(params, state, x, labels)
            results.append(
                {
                    "deletion": {name: z_MB.mean(1) for name, z_MB in z.items()},  # (M,)
                    "completeness": np.abs(errors).mean(1) / np.abs(difference).mean(),
                    "engines": float(jnp.abs(hand - auto).max() / jnp.abs(auto).max()),
                }
            )
            fresh, _ = fnet.init(network(), stream(key, "fresh"), x[:1])
            changed = dict(randomised(params, fresh))
            if len(networks) > 1:
                changed["another training"] = networks[(seed + 1) % len(networks)][0]
            host, against = {m: np.asarray(s)[..., 0] for m, s in scores.items()}, {}
            for level, other in changed.items():
                its = jax.device_get(maps(other, state, x, labels, stream(key, "noise")))
                against[level] = {m: alike(host[m], s[..., 0], ink) for m, s in scores_of(its).items()}
                if seed == 0 and level != "another training":
                    first["levels"][level] = its["integrated gradients"][:8]
            likeness.append(against)

    stacked = jax.tree.map(lambda *seeds: np.stack(seeds), *results)
    checks = Checks(
        maps=METHODS,
        counts=config.wiped_out,
        deletion={name: stacked["deletion"][name] for name in (*METHODS, *CONTROLS)},
        steps=config.path_steps,
        completeness=stacked["completeness"],
        randomisation=likeness,
        engines=stacked["engines"],
    )
    print_checks(checks, console)
    draw_checks(checks, config.tolerance, folder / "checks.png")
    digits, shown = np.asarray(x), first_of_each(np.asarray(labels))
    of_class = {m: first["maps"][m][shown] for m in METHODS}
    title = "what raises (red) and lowers (blue) the logit of the digit's class"
    draw_maps(digits[shown], of_class, title, folder / "saliency.png")
    with_fresh = {"as trained": first["maps"]["integrated gradients"][:8], **first["levels"]}
    draw_maps(digits[:8], with_fresh, "integrated gradients with fresh weights", folder / "randomised.png")
    if mistakes := misread(config, networks[0], keys[0], test_data, maps):
        wrong, both, below = mistakes
        title = "misread digits: integrated gradients of two logits (red raises)"
        draw_maps(wrong, both, title, folder / "mistakes.png", below)

    at = list(config.wiped_out)
    curves = stacked["deletion"]
    lost = {name: (z[:, :1] - z).mean(1).tolist() for name, z in curves.items()}
    lead = min((curves["blackest first"] - curves["integrated gradients"]).mean(1))
    error = stacked["completeness"][:, -1].max()
    numbers = {
        "test_accuracy": tests.tolist(),
        "mean logit lost over the deletion, by seed": lost,
        "pixels wiped out": at,
        "completeness": dict(zip(map(str, config.path_steps), stacked["completeness"].mean(0).tolist(), strict=True)),
        "engines": stacked["engines"].tolist(),
        "rank correlation": likeness,
    }
    write_results(folder, numbers)
    fresh = max(max(of_map.values()) for seed in likeness for level, of_map in seed.items() if "from" in level)
    console.print(
        f"completeness {error:.1e} of the difference (expected at most {config.tolerance:g}); integrated gradients "
        f"lower the logit by {lead:.2f} more than blackest first (expected above 1); with fresh weights maps correlate "
        f"by at most {fresh:.2f} (expected at most 0.2)  {time.perf_counter() - begin:.0f} s",
        highlight=False,
        soft_wrap=True,
    )
    say_written(console, folder)
    return {**numbers, **stacked, "likeness": likeness, "folder": folder}


if __name__ == "__main__":
    main(run, Config)
