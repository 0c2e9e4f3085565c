"""The experiments on images: LeNet-5, a residual network, saliency and adversarial examples (S17), segmentation."""

from __future__ import annotations

import io
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from rich.console import Console

import fnet
from experiments import adversarial, digits_lenet, digits_mlp, digits_resnet, saliency, segmentation
from experiments.common import load_images
from fnet.core.numerics import stream
from fnet.layers import conv, dense, flatten, relu

pytestmark = pytest.mark.long


def run_quietly(experiment, tmp_path_factory, **settings):
    """The experiment's results, what it printed, and its settings."""
    text = io.StringIO()
    config = experiment.Config(run_dir=tmp_path_factory.mktemp("runs"), name="test", **settings)
    results = experiment.run(config, Console(file=text, width=120))
    return results, text.getvalue(), config


def files(results) -> set[str]:
    return {path.name for path in results["folder"].iterdir()}


def small_images(seed: int, count: int, dtype: type = np.float32):
    """Images of 8x8 with entries in 0..1, exact zeros among them, and labels."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.random((count, 8, 8, 1)) - 0.3, 0).astype(dtype)
    return jnp.asarray(x), jnp.asarray(rng.integers(0, 10, count).astype(np.int32))


def tiny_network() -> fnet.Layer:
    """`saliency.network` on 8x8 images, smaller; its children have the same names."""
    layers = [conv(2, (3, 3), stride=2), relu(), conv(3, (3, 3), stride=2), relu(), flatten()]
    return fnet.serial(*layers, dense(6), relu(), dense(10))


# --- data ------------------------------------------------------------------------------------------------------------


def test_training_test_and_held_out_digits_have_none_in_common():
    train_data, test_data = load_images(0, 1000)
    fewer, held_out = load_images(0, 1000, held_out=500)
    key = stream(jax.random.key(0), "split")
    _, same = digits_mlp.load(digits_mlp.Config(), key)
    np.testing.assert_array_equal(test_data.inputs.reshape(1000, 784), same.inputs)

    def as_set(data):
        return {np.asarray(image).tobytes() for image in data.inputs}

    assert train_data.inputs.shape == (4000, 28, 28, 1) and fewer.inputs.shape == (3500, 28, 28, 1)
    assert not as_set(train_data) & as_set(test_data)
    assert not as_set(fewer) & as_set(held_out) and as_set(fewer) | as_set(held_out) == as_set(train_data)


def test_images_are_moved_by_whole_pixels_and_zeros_come_in(key):
    x, _ = small_images(0, 50)
    moved = np.asarray(digits_lenet.move(x, key, 2))
    found = set()
    for image, original in zip(moved[..., 0], np.asarray(x)[..., 0], strict=True):
        room = np.zeros((12, 12), np.float32)
        room[2:10, 2:10] = original
        places = [(i, j) for i in range(5) for j in range(5) if (room[i : i + 8, j : j + 8] == image).all()]
        assert len(places) == 1
        found.add(places[0])
    assert {i for i, _ in found} == {j for _, j in found} == set(range(5))  # all five distances, both ways
    np.testing.assert_array_equal(digits_lenet.move(x, key, 2), moved)
    np.testing.assert_array_equal(digits_lenet.move(x, key, 0), x)
    assert (np.asarray(digits_lenet.move(x, jax.random.key(1), 2)) != moved).any()


# --- LeNet-5 and the residual network --------------------------------------------------------------------------------

SHORT = {"epochs": 2, "test_size": 4000, "held_out": 800, "seeds": (0,), "batch_size": 50}


@pytest.fixture(scope="module")
def lenet(tmp_path_factory):
    return run_quietly(digits_lenet, tmp_path_factory, **SHORT)


def test_the_confusion_counts_every_test_digit_once_and_has_the_accuracy(lenet):
    results, text, _ = lenet
    _, held_out = load_images(0, 4000, 800)
    counts, reached = results["curves"]["confusion"][0], results["test_accuracy"]["0"]
    np.testing.assert_array_equal(counts.sum(1), np.bincount(held_out.targets, minlength=10))
    assert np.trace(counts) / 800 == pytest.approx(reached, abs=1e-6)
    assert f"test accuracy {reached:.4f} ± 0.0000 (expected at least 0.97)" in text


def test_lenet_learns_and_leaves_numbers_and_pictures(lenet):
    results, text, _ = lenet
    losses = results["curves"]["training loss"]
    assert losses.shape == (1, 2) and losses[0, 1] < losses[0, 0] < 3
    assert files(results) == {"config.json", "results.json", "curves.png", "confusion.png", "seed_0"}
    assert json.loads((results["folder"] / "results.json").read_text())["parameters"] == 61706
    assert "conv_1" in text and "61,706" in text


def train_tiny(tmp_path, data, **settings):
    """The curves of a run of `digits_lenet` on a tiny network."""
    config, model = digits_lenet.Config(batch_size=10, **settings), tiny_network()
    parts = digits_lenet.learning(config, model, len(data[0].targets))
    folder, console = tmp_path / config.engine, Console(file=io.StringIO())
    return digits_lenet.train_seed(config, model, parts, 0, data, folder, console)


def test_both_engines_take_the_same_run(x64, tmp_path):
    data = [fnet.Batch(*small_images(seed, count, np.float64)) for seed, count in ((0, 40), (1, 30))]
    by_hand, by_autodiff = (train_tiny(tmp_path, data, engine=name, epochs=5) for name in ("backprop", "autodiff"))
    for name in ("training loss", "test loss"):
        np.testing.assert_allclose(by_hand[name], by_autodiff[name], rtol=1e-9)


def test_the_rate_is_adams_alone_until_it_ends_at_zero(tmp_path):
    # with a rate that is 0 from the first update on, nothing moves
    data = [fnet.Batch(*small_images(seed, 20)) for seed in (0, 1)]
    run = train_tiny(tmp_path, data, learning_rate=0.0, epochs=2, shift=0)
    np.testing.assert_allclose(run["training loss"][0], run["training loss"][1], rtol=1e-6)
    np.testing.assert_array_equal(run["test loss"][0], run["test loss"][1])


def test_a_run_that_was_cut_is_resumed_with_the_schedule_that_it_began_with(tmp_path):
    options = SHORT | {"run_dir": tmp_path, "test_size": 4500, "held_out": 400, "epochs": 3}
    silent = lambda **own: digits_lenet.run(digits_lenet.Config(**options, **own), Console(file=io.StringIO()))  # noqa: E731
    straight = silent(name="straight")
    silent(name="cut", steps=4)
    with pytest.raises(SystemExit, match=r"seed 0: .*cut/seed_0 stands at step 4,.* is to end at step 2"):
        silent(name="cut", resume=True, steps=2)
    resumed = silent(name="cut", resume=True)
    for name, curve in straight["curves"].items():
        np.testing.assert_array_equal(resumed["curves"][name], curve)


@pytest.mark.parametrize("experiment", [digits_lenet, digits_resnet])
def test_an_engine_that_does_not_exist_is_refused(experiment, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(experiment.Config, args=["--engine", "magic"])
    assert "magic" in capsys.readouterr().err


def test_the_residual_network_has_eight_layers():
    model = digits_resnet.network(digits_resnet.Config())
    x = jax.ShapeDtypeStruct((1, 28, 28, 1), "float32")
    params, _ = jax.eval_shape(lambda key: model.init(key, x), jax.random.key(0))
    shapes = [leaf.shape for leaf in jax.tree.leaves(params)]
    deep = [shape for shape in shapes if len(shape) == 4 and shape[0] > 1]  # the shortcuts' kernels are 1x1
    assert len(deep) + sum(len(shape) == 2 for shape in shapes) == 8
    w, convs = 16, 0
    for i, o in ((w, w), (w, 2 * w), (2 * w, 4 * w)):
        convs += 9 * i * o + 9 * o * o + (i * o if i != o else 0)
    norms = 2 * (w + 2 * w + 3 * 2 * w + 3 * 4 * w)
    assert sum(int(np.prod(shape)) for shape in shapes) == 25 * w + convs + norms + 10 * (4 * w + 1)


@pytest.mark.slow
def test_the_residual_network_is_tested_by_its_running_statistics(tmp_path_factory):
    settings = {**SHORT, "epochs": 1, "blocks": (1,), "width": 2, "learning_rate": 0.0}
    results, text, config = run_quietly(digits_resnet, tmp_path_factory, **settings)
    train_data, held_out = load_images(0, 4000, 800)
    # at a rate of 0 only the state moves, and four batches move it by far more than rounding (1e-6)
    key = jax.random.key(0)
    model = digits_resnet.network(config)
    params, state = model.init(stream(key, "model"), train_data.inputs[:1])
    at_start = fnet.make_evaluate(model, fnet.softmax_cross_entropy)(params, state, held_out)["loss"].value
    assert abs(results["curves"]["test loss"][0, 0] - at_start) > 1e-4
    assert files(results) == {"config.json", "results.json", "curves.png", "confusion.png", "seed_0"}
    assert "test accuracy" in text


# --- saliency --------------------------------------------------------------------------------------------------------


def test_the_input_gradient_by_hand_is_autodiffs_and_finite_differences(x64, key, monkeypatch):
    monkeypatch.setattr(saliency, "network", tiny_network)
    x, labels = small_images(0, 6, np.float64)
    model = tiny_network()
    params, state = model.init(key, x)
    hand = np.asarray(saliency.input_gradient(model, params, state, x, labels))
    auto = np.asarray(saliency.by_autodiff(params, state, x, labels))
    np.testing.assert_allclose(hand, auto, rtol=0, atol=1e-12 * np.abs(auto).max())
    direction = np.random.default_rng(1).normal(size=x.shape)
    at = partial(saliency.logits_of, model, params, state, labels=labels)
    numerical = (at(x=x + 1e-6 * direction) - at(x=x - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose((hand * direction).sum((1, 2, 3)), numerical, rtol=1e-6)


def test_integrated_gradients_are_the_midpoint_rule(x64):
    x, _ = small_images(0, 3, np.float64)
    # of Σ x³ with gradient 3 x²: x³ at full length; K midpoints sum a² to 1/3 − 1/(12 K²)
    for steps in (1, 4, 64):
        got = saliency.integrated_gradients(lambda at: 3 * at**2, x, steps)
        np.testing.assert_allclose(got, x**3 * (1 - 1 / (4 * steps**2)), rtol=1e-12, atol=1e-15)


def test_smooth_gradients_are_means_over_noise_of_the_given_size(key):
    x, _ = small_images(0, 3)
    np.testing.assert_allclose(saliency.smooth_gradient(jnp.sin, x, key, 4, 0.0), np.sin(x), rtol=1e-6)
    got = saliency.smooth_gradient(lambda at: jnp.square(at - x), x, key, 400, 0.5)  # E noise² = 0.25
    assert float(got.mean()) == pytest.approx(0.25, rel=0.02)  # of 76,800 squares: deviation 0.25 √(2 / 76800)


def test_deletion_wipes_out_the_pixels_ranked_first(key, monkeypatch):
    monkeypatch.setattr(saliency, "network", tiny_network)
    x, labels = small_images(0, 4)
    model = tiny_network()
    params, state = model.init(key, x)
    scores = np.random.default_rng(2).normal(size=x.shape).astype(np.float32)
    config = saliency.Config(wiped_out=(0, 1, 7, 64))
    got = jax.jit(partial(saliency.deletion, config))(params, state, x, labels, scores)
    expected = []
    for count in config.wiped_out:
        images = np.array(x).reshape(4, 64)
        for image, score in zip(images, scores.reshape(4, 64), strict=True):
            image[np.argsort(-score)[:count]] = 0
        logits = fnet.apply(model, params, state, jnp.asarray(images.reshape(4, 8, 8, 1)))
        expected.append(np.asarray(logits)[np.arange(4), labels])
    np.testing.assert_allclose(got, np.stack(expected), rtol=1e-5, atol=1e-6)


def test_likeness_is_spearmans_over_the_ink():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5, 5))
    ink = rng.random((3, 5, 5)) > 0.4
    expected = []
    for p, q in ((a[i][ink[i]], b[i][ink[i]]) for i in range(3)):
        d, n = p.argsort().argsort() - q.argsort().argsort(), len(p)
        expected.append(1 - 6 * (d**2).sum() / (n * (n**2 - 1)))
    assert saliency.alike(a, b, ink) == pytest.approx(np.mean(expected))
    assert saliency.alike(a, np.exp(a), ink) == pytest.approx(1) and saliency.alike(a, -a, ink) == pytest.approx(-1)
    assert saliency.alike(a, np.zeros_like(a), ink) == 0


def test_weights_are_made_fresh_from_the_top_down():
    old, fresh = ({name: f"{age} {name}" for name in saliency.LAYERS} for age in ("old", "fresh"))
    got = [
        sorted(name for name in tree if tree[name].startswith("fresh")) for _, tree in saliency.randomised(old, fresh)
    ]
    assert got == [["dense_1"], ["dense_0", "dense_1"], ["conv_1", "dense_0", "dense_1"], sorted(saliency.LAYERS)]
    params, _ = saliency.network().init(jax.random.key(0), jax.ShapeDtypeStruct((1, 28, 28, 1), "float32"))
    assert [name for name in params if params[name]] == list(reversed(saliency.LAYERS))


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    settings = {"images": 12, "copies": 2, "path_steps": (2, 16), "wiped_out": (0, 20, 784), "epochs": 3}
    return run_quietly(saliency, tmp_path_factory, test_size=4000, seeds=(0, 1), **settings)


def test_all_deletions_begin_at_one_logit_and_end_at_the_empty_pages(looked):
    z = looked[0]["deletion"]
    assert set(z) == {*saliency.METHODS, *saliency.CONTROLS}
    for curve in z.values():
        np.testing.assert_allclose(curve[:, [0, 2]], z["gradient"][:, [0, 2]], rtol=1e-5, atol=1e-6)
    for control in saliency.CONTROLS:
        assert (z["integrated gradients"][:, 1] < z[control][:, 1]).all(), control


def test_the_checks_of_saliency_hold_and_are_printed(looked):
    results, text, _ = looked
    few, many = results["completeness"].T
    assert (many < few).all() and (many < 0.03).all()
    assert (results["engines"] < 1e-5).all()
    for seed in results["likeness"]:
        for level, by_map in seed.items():
            if level != "another training":
                assert abs(by_map["integrated gradients"]) < seed["another training"]["integrated gradients"]
    assert all(name in text for name in ("SmoothGrad", "blackest first", "from conv_0 up", "16 steps", "by hand"))
    pages = {"saliency.png", "mistakes.png", "randomised.png", "checks.png"}
    assert files(results) == {"config.json", "results.json", *pages}


def test_a_deletion_that_does_not_begin_with_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"wiped_out = \(5, 10\); expected 0 first"):
        saliency.run(saliency.Config(wiped_out=(5, 10), run_dir=tmp_path))


# --- adversarial examples --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    """Logits ``x W`` of two classes on 8x8 images, whose worst case in the box is known."""
    model = fnet.serial(flatten(), dense(2, bias=None))
    w = np.random.default_rng(3).normal(size=(64, 2)).astype(np.float32)
    x, labels = small_images(4, 16)
    return model, {"flatten_0": (), "dense_0": {"w": jnp.asarray(w)}}, x, labels % 2, w


def worst_case(x, labels, w, epsilon):
    """The loss of two classes rises with the other's logit less the label's, a linear function of the pixels."""
    uphill = np.where(np.asarray(labels)[:, None] == 0, w[:, 1] - w[:, 0], w[:, 0] - w[:, 1])
    return np.clip(x + np.float32(epsilon) * np.sign(uphill).reshape(x.shape), 0, 1)


def test_fgsm_finds_the_worst_case_of_a_linear_model(linear):
    model, params, x, labels, w = linear
    _, state = model.init(jax.random.key(0), x)
    got = adversarial.fgsm(model, params, state, x, labels, 0.1)
    np.testing.assert_allclose(got, worst_case(x, labels, w, 0.1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_pgd_finds_the_worst_case_of_a_linear_model(linear, key, steps):
    model, params, x, labels, w = linear
    _, state = model.init(key, x)
    got = adversarial.pgd(model, params, state, x, labels, key, 0.1, steps)  # 2.5 ε of steps cross a box of 2 ε
    np.testing.assert_allclose(got, worst_case(x, labels, w, 0.1), rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def attacks():
    """Images, labels, and the compiled attacks at any ε on a small network with random weights."""
    model, (x, labels), key = tiny_network(), small_images(6, 100), jax.random.key(0)
    params, state = fnet.init(model, key, x)

    def at(epsilon):
        images = {
            "noise": adversarial.noise(x, key, epsilon),
            "FGSM": adversarial.fgsm(model, params, state, x, labels, epsilon),
            "PGD": adversarial.pgd(model, params, state, x, labels, key, epsilon, 20),
        }
        logits = {name: fnet.apply(model, params, state, its) for name, its in {"none": x, **images}.items()}
        return images, {name: fnet.softmax_cross_entropy(z, labels).mean() for name, z in logits.items()}

    return np.asarray(x), jax.jit(at)


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.4])
def test_attacks_stay_within_epsilon_and_within_0_and_1(attacks, epsilon):
    x, at = attacks
    attacked = jax.device_get(at(jnp.float32(epsilon))[0])
    for name, images in attacked.items():
        assert images.min() >= 0 and images.max() <= 1, name
        assert np.abs(images - x).max() <= epsilon + 1e-7, name  # a rounding of numbers up to 1
    reachable = np.abs(attacked["noise"] - x)[(x > epsilon) & (x < 1 - epsilon)]
    np.testing.assert_allclose(reachable, epsilon, atol=1e-6)  # the control is as large as an attack may be


def test_pgd_raises_the_loss_more_than_fgsm_and_fgsm_more_than_noise(attacks):
    loss = attacks[1](jnp.float32(0.2))[1]
    assert loss["none"] < loss["FGSM"] < loss["PGD"] and loss["noise"] < loss["FGSM"]


def test_the_defence_grows_over_the_first_half_of_the_training(key):
    model, (x, labels) = tiny_network(), small_images(7, 10)
    params, state = model.init(key, x)
    config = adversarial.Config(epsilon=0.3, train_steps=3)
    seen = jax.jit(adversarial.on_attacked(lambda ts, batch: batch, model, config, steps=100))
    for step, epsilon in ((0, 0.0), (10, 0.06), (50, 0.3), (99, 0.3)):
        ts = fnet.TrainState(jnp.asarray(step), params, state, (), key)
        batch = seen(ts, fnet.Batch(x, labels))
        np.testing.assert_array_equal(batch.targets, labels)
        assert np.abs(np.asarray(batch.inputs) - x).max() == pytest.approx(epsilon, abs=1e-6)


def test_measures_count_what_is_read_right_and_how_far_a_pixel_is_out():
    x, labels = np.full((4, 2, 2, 1), 0.5), np.array([0, 1, 2, 3])
    far = x.copy()
    far[2, 1, 1] = 0.9
    attacked = {"noise": (x, labels), "FGSM": (far, np.array([0, 1, 0, 0]))}
    got = adversarial.measures(x, labels, 0.3, attacked)
    assert got == {"noise": 1.0, "FGSM": 0.5, "beyond": pytest.approx(0.1)}
    assert adversarial.measures(x, labels, 0.3, {"noise": (x + 0.6, labels)})["beyond"] == pytest.approx(0.3)


@pytest.fixture(scope="module")
def fought(tmp_path_factory):
    settings = {"epsilons": (0.0, 0.1, 0.4), "epsilon": 0.1, "attacked": 60, "epochs": 4, "test_size": 4000}
    return run_quietly(adversarial, tmp_path_factory, seeds=(0,), attack_steps=5, train_steps=2, **settings)


def test_training_on_attacked_digits_defends_against_the_attack(fought):
    results, text, _ = fought
    plain, robust = results["models"].values()
    for r in (plain, robust):
        assert len({float(r[a][0, 0]) for a in adversarial.ATTACKS}) == 1  # at ε = 0 no attack is one
        assert r["PGD"][0, 1] < r["noise"][0, 1] and r["PGD"][0, 2] <= r["PGD"][0, 1]
    assert robust["PGD"][0, 1] > plain["PGD"][0, 1] + 0.1
    assert results["beyond"] <= 1e-6
    assert f"plain {plain['PGD'][0, 1]:.3f}, adversarially trained {robust['PGD'][0, 1]:.3f}" in text


def test_the_pictures_show_the_digits_that_were_counted(fought):
    results, _, config = fought
    _, test_data = load_images(0, 4000)
    x, labels = results["pictures"]["digits"]
    np.testing.assert_array_equal(x, test_data.inputs[:60])
    images, read = results["pictures"]["plain"]["PGD"]
    assert np.abs(images - x).max() == pytest.approx(config.epsilon, abs=1e-6)
    assert (read == labels).mean() == pytest.approx(results["models"]["plain"]["PGD"][0, 1])
    assert files(results) == {"config.json", "results.json", "accuracy.png", "images.png"}


@pytest.mark.parametrize("wrong", [{"epsilon": 0.0}, {"epsilon": 1.5}, {"epsilons": (0.1, -0.1)}])
def test_an_epsilon_that_is_no_change_or_more_than_the_page_is_refused(tmp_path, wrong):
    with pytest.raises(SystemExit, match="expected numbers between 0 and 1"):
        adversarial.run(adversarial.Config(run_dir=tmp_path, **wrong))
    assert not list(tmp_path.iterdir())


# --- segmentation ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    small = {"side": 16, "training": 40, "test": 8, "width": 2, "stack_width": 3, "batch_size": 8, "epochs": 1}
    return run_quietly(segmentation, tmp_path_factory, **small)


def test_shapes_have_the_area_of_a_disc_and_a_depth_that_is_a_distance():
    y, x = np.indices((400, 400)) / 10 - 20
    for kind in (1, 2, 3):
        depth = segmentation.depth_within(kind, 8.0, 0.3, y, x)
        assert (depth > 0).sum() / 100 == pytest.approx(np.pi * 64, rel=5e-3)
        # within, a step of 0.1 changes it by 0.1 at most, and by that towards the border
        slope = np.hypot(*np.gradient(depth, 0.1))[depth > 0.5]
        assert slope.max() <= 1 + 1e-6 and np.median(slope) == pytest.approx(1, abs=1e-3)


def test_inside_and_outside_look_alike_and_an_outline_lies_between():
    data = segmentation.draw_images(60, 32, 0.0, (0,))
    ink, labels = data.inputs[..., 0], data.targets
    assert set(np.unique(labels)) == {0, 1, 2, 3} and ink.min() == 0 and ink.max() == 1
    blank = ink == 0
    assert (blank & (labels == 0)).any() and all((blank & (labels == k)).any() for k in (1, 2, 3))
    for axis in (1, 2):  # from a pixel to its neighbour of another class: half the ink at least on both
        a, b = (np.take(labels, range(i, 31 + i), axis) for i in (0, 1))
        crossing = a != b
        for i in (0, 1):
            assert np.take(ink, range(i, 31 + i), axis)[crossing].min() >= 0.5 - 1e-6


def test_images_are_a_function_of_the_seed():
    a, b, c = (segmentation.draw_images(3, 16, 0.5, seed) for seed in ((0, 0), (0, 0), (0, 1)))
    np.testing.assert_array_equal(a.inputs, b.inputs)
    assert (a.inputs != c.inputs).all() and a.inputs.dtype == np.float32 and a.targets.shape == (3, 16, 16)


def test_both_models_have_as_many_convolutions_and_nearly_as_many_parameters():
    net, stack = segmentation.make_models(segmentation.Config()).values()
    counts = [segmentation.parameters_of(model, 32) for model in (net, stack)]
    assert abs(counts[0] - counts[1]) < 0.1 * counts[0]
    assert [str(model).count("conv_") - str(model).count("conv_transpose") for model in (net, stack)] == [10, 11]


def test_the_intersections_over_unions_are_those_of_the_answers_in_the_picture(segmented):
    results, text, config = segmented
    truth = segmentation.draw_images(8, 16, config.noise, (0, 1)).targets
    for name, found in results["numbers"].items():
        answers, each = results["answers"][name], []
        for k in range(4):
            both, either = (answers == k) & (truth == k), (answers == k) | (truth == k)
            each.append(both.sum() / max(1, either.sum()))
        np.testing.assert_allclose([found[f"IoU, {c}"] for c in segmentation.CLASSES], each, rtol=1e-5)
        assert found["mean IoU"] == pytest.approx(np.mean(each), rel=1e-5)
        assert found["test accuracy"] == pytest.approx((answers == truth).mean(), rel=1e-5)
    ours, theirs = (results["numbers"][name]["mean IoU"] for name in ("U-Net", "plain stack"))
    assert f"mean intersection over union {ours:.3f} by the U-Net, {theirs:.3f} by the stack" in text
    assert files(results) == {"config.json", "results.json", "images.png"}


@pytest.mark.parametrize("wrong", [{"side": 30}, {"side": 8}, {"training": 10, "batch_size": 20}])
def test_sides_and_batches_that_will_not_do_are_refused(tmp_path, wrong):
    with pytest.raises(SystemExit, match="expected"):
        segmentation.run(segmentation.Config(run_dir=tmp_path, **wrong))
    assert not list(tmp_path.iterdir())
