"""Language models of characters, sunspots, and features learned without labels (S12, S14, S17)."""

from __future__ import annotations

import io
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import char_language_model, denoising_autoencoder, sunspots
from fnet.core.numerics import stream
from fnet.layers import identity

pytestmark = pytest.mark.long


def run_quietly(experiment, tmp_path_factory, **settings):
    """The experiment's results, what it printed, and its settings."""
    text = io.StringIO()
    config = experiment.Config(run_dir=tmp_path_factory.mktemp("runs"), name="test", **settings)
    results = experiment.run(config, Console(file=text, width=200))
    return results, text.getvalue(), config


def written(folder):
    return {path.name for path in folder.iterdir()}


# --- characters ------------------------------------------------------------------------------------------------------

TEXT = "".join(f"the {i % 7} cats ate {i % 5} of {i % 3} rats.\n" for i in range(110))
TINY = {
    "length": 8,
    "features": 16,
    "epochs": 8,
    "batch_size": 16,
    "warmup_steps": 5,
    "learning_rate": 0.01,
    "sample": 30,
}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", params=["lstm", "gpt"])
def language(request, tmp_path_factory, text_file):
    settings = {"model": request.param, "text": text_file, "layers": 1, "heads": 2, **TINY}
    return run_quietly(char_language_model, tmp_path_factory, **settings)


@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 4), (8, 3), (30, 30), (5, 1)])
@pytest.mark.parametrize("n", [9, 10, 24, 25, 26])
def test_windows_count_every_target_once(n, length, stride):
    ids = np.arange(n, dtype=np.int32)  # an id is its own place in the text
    inputs, targets, weights = (np.asarray(a) for a in char_language_model.windows(ids, length, stride))
    counted = weights == 1
    np.testing.assert_array_equal(np.sort(targets[counted]), np.arange(1, n))
    np.testing.assert_array_equal(targets[counted], inputs[counted] + 1)
    # what is counted in a later window has at least length − stride characters before it, or the text has no more
    rows, columns = np.nonzero(counted)
    assert (columns >= np.where(rows == 0, 0, length - stride)).all()


def test_windows_hold_no_validation_character():
    ids = np.arange(100, dtype=np.int32)
    data = char_language_model.windows(ids[:90], 8, 8)
    assert data.inputs.max() < 90 and data.targets.max() < 90


def test_counted_bits_are_those_of_the_frequencies():
    train, seen = "abacabad", "dabca"
    ids = {c: i for i, c in enumerate("abcd")}
    train_ids, seen_ids = (np.array([ids[c] for c in text]) for text in (train, seen))
    bits = char_language_model.counted_bits(train_ids, seen_ids, 4)
    single = [(train.count(c) + 1) / (8 + 4) for c in seen[1:]]
    pairs = [train[i : i + 2] for i in range(7)]
    double = [(pairs.count(a + b) + 1) / (train[:-1].count(a) + 4) for a, b in itertools.pairwise(seen)]
    for name, p in {"unigram": single, "bigram": double}.items():
        assert bits[name] == pytest.approx(-np.mean(np.log2(p)), rel=1e-12)


def test_bits_of_an_lstm_are_those_of_reading_character_by_character():
    config = char_language_model.Config(features=8)
    model = char_language_model.make_model(config, 5)
    ids = np.random.default_rng(0).integers(0, 5, 21).astype(np.int32)
    params, state = fnet.init(model, jax.random.key(0), jnp.array(ids[None, :1]))
    params = jax.tree.map(lambda p: 3 * p, params)  # far from uniform
    read = jax.jit(lambda now, carry: fnet.apply(model, params, state, (now, carry)))
    _, carry = read(jnp.array([[0]]), None)
    carry, bits = jax.tree.map(jnp.zeros_like, carry), []
    for now, following in itertools.pairwise(ids):
        logits, carry = read(jnp.array([[now]]), carry)
        z = np.asarray(logits[0, 0], np.float64)
        bits.append((np.log(np.exp(z).sum()) - z[following]) / math.log(2))
    assert np.std(bits) > 0.01
    got = char_language_model.validation_bits(config, model, params, state, ids)
    assert got == pytest.approx(np.mean(bits), rel=1e-5)


def test_bits_of_a_gpt_are_those_of_its_windows():
    config = char_language_model.Config(model="gpt", length=6, layers=1, features=8, heads=2)
    model = char_language_model.make_model(config, 5)
    ids = np.random.default_rng(0).integers(0, 5, 20).astype(np.int32)
    params, state = fnet.init(model, jax.random.key(0), jnp.array(ids[None, :6]))
    params = jax.tree.map(lambda p: 3 * p, params)
    logits_of = jax.jit(lambda x: fnet.apply(model, params, state, x))
    bits = []
    for target in range(1, 20):  # from the beginning of the text, or from 4 to 6 characters before
        start = 0 if target <= 6 else (target - 4) // 3 * 3
        window = np.zeros(6, np.int32)
        window[: target - start] = ids[start:target]
        z = np.asarray(logits_of(jnp.array(window[None]))[0, target - start - 1], np.float64)
        bits.append((np.log(np.exp(z).sum()) - z[ids[target]]) / math.log(2))
    assert np.std(bits) > 0.01
    got = char_language_model.validation_bits(config, model, params, state, ids)
    assert got == pytest.approx(np.mean(bits), rel=1e-5)


def test_a_language_model_beats_counting(language):
    results, text, _ = language
    assert results["bits"]["0"] < results["counted_bits"]["unigram"]
    assert results["runs"][0]["training bits"][-1] < results["runs"][0]["training bits"][0]
    assert f"{results['bits']['0']:.3f} bits each" in text and results["sha256"] in text


def test_a_language_model_writes_after_its_prompt(language):
    results, text, config = language
    end = len(TEXT) * 9 // 10
    assert results["prompt"] == TEXT[end : end + 40]
    assert results["sample"].startswith(results["prompt"])
    assert len(results["sample"]) == 40 + config.sample and set(results["sample"]) <= set(TEXT)
    assert results["sample"] in text
    assert written(results["folder"]) == {"config.json", "seed_0", "results.json", "bits.png", "sample.txt"}


def test_a_language_model_is_reproducible_and_the_engines_agree(language, tmp_path_factory, text_file):
    results, _, config = language
    settings = {"model": config.model, "text": text_file, "layers": 1, "heads": 2, **TINY}
    again, _, _ = run_quietly(char_language_model, tmp_path_factory, **settings)
    assert (again["bits"], again["sample"]) == (results["bits"], results["sample"])
    other, _, _ = run_quietly(char_language_model, tmp_path_factory, **{**settings, "engine": "autodiff"})
    # two ways of rounding; a hundred steps of Adam pull them apart somewhat
    assert other["bits"]["0"] == pytest.approx(results["bits"]["0"], rel=1e-2)


def test_a_prompt_of_unknown_characters_is_refused_before_training(tmp_path, text_file):
    config = char_language_model.Config(text=text_file, prompt="the ü", run_dir=tmp_path)
    with pytest.raises(SystemExit, match="'ü' does not occur in the text"):
        char_language_model.run(config, Console(file=io.StringIO()))
    assert not list(tmp_path.iterdir())


def test_too_short_a_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    config = char_language_model.Config(text=tmp_path / "short.txt", run_dir=tmp_path)
    with pytest.raises(SystemExit, match="8 characters to train on; expected more than length = 64"):
        char_language_model.run(config, Console(file=io.StringIO()))


# --- sunspots --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spots(tmp_path_factory):
    settings = {"updates": 40, "every": 20, "members": 2, "units": 4, "seeds": (0, 1), "orders": 10, "resamples": 200}
    return run_quietly(sunspots, tmp_path_factory, **settings)


def test_the_series_is_the_known_one():
    years, x = sunspots.load()
    np.testing.assert_array_equal(years, np.arange(1700, 2009))
    assert (x[0], x[1957 - 1700], x[-1]) == (5.0, 190.2, 2.9)


def test_autoregression_recovers_a_recursion():
    x = [1.0, 2.0, 1.5]
    for t in range(3, 40):
        x.append(0.3 + 0.5 * x[t - 1] - 0.7 * x[t - 2] + 0.2 * x[t - 3])
    x = np.array(x)
    forecasts = sunspots.autoregression(x, 3, 20)
    assert np.isnan(forecasts[:3]).all()
    np.testing.assert_allclose(forecasts[3:], x[3:], atol=1e-9)
    np.testing.assert_allclose(sunspots.free_autoregression(x, 3, 20), x[20:], atol=1e-9)


def test_no_reference_looks_ahead():
    config = sunspots.Config(orders=5)
    _, x = sunspots.load()
    begin, test = 129, 229
    plain = sunspots.references(config, x, begin, test)
    later = np.concatenate([x[:250], x[250:] + 500])
    chosen = [name for name in plain if "best" not in name]
    changed = sunspots.references(config, later, begin, test)
    assert len(chosen) == 3
    for name in chosen:  # neither the order nor a forecast of a year until 250 has changed
        for a, b in zip(plain[name], changed[name], strict=True):
            np.testing.assert_array_equal(a[:251], b[:251])


def test_persistence_and_autoregression_are_numpys(spots):
    results, text, config = spots
    _, x = sunspots.load()
    test = len(x) - config.test_size
    p = results["order"]
    design = np.array([[1, *x[t - p : t]] for t in range(p, len(x))])
    fitted = np.linalg.solve(
        design[: test - p].T @ design[: test - p], design[: test - p].T @ x[p:test]
    )  # the normal equations
    linear = np.sqrt(np.mean((design[test - p :] @ fitted - x[test:]) ** 2))
    assert results["test_rmse"][f"AR({p})"] == pytest.approx(linear, rel=1e-8)
    persistence = np.sqrt(np.mean(np.diff(x)[test - 1 :] ** 2))
    assert results["test_rmse"]["persistence"] == pytest.approx(persistence)
    assert f"{linear:.2f}" in text and f"{persistence:.2f}" in text


def test_the_printed_error_is_that_of_the_forecasts(spots):
    results, text, _ = spots
    _, x = sunspots.load()
    scores = np.sqrt(((results["forecasts"] - x[-80:]) ** 2).mean(1))
    np.testing.assert_allclose(results["seeds"], scores, rtol=1e-12)
    assert results["test_rmse"]["GRU"] == pytest.approx(scores.mean())
    assert f"GRU {scores.mean():.2f} ± {scores.std(ddof=1):.2f}" in text
    curve = results["validation_curve"].mean(0)
    assert curve.shape == (2,) and results["updates"] == 20 * (1 + curve.argmin())


def test_a_forecast_sees_the_years_before_and_no_other():
    config = sunspots.Config(units=4)
    model = sunspots.make_model(config)
    z = np.sin(np.arange(30.0))
    params, state = fnet.init(model, jax.random.key(0), sunspots.sequence(z))
    said = fnet.apply(model, params, state, sunspots.sequence(z))
    changed = fnet.apply(model, params, state, sunspots.sequence(np.where(np.arange(30) < 20, z, 5.0)))
    np.testing.assert_array_equal(said[:, :20], changed[:, :20])
    assert (said[:, 20:] != changed[:, 20:]).all()


def test_a_free_run_feeds_back_what_it_forecasts():
    config = sunspots.Config(units=4)
    model = sunspots.make_model(config)
    z = np.sin(np.arange(12.0))
    keys = jax.random.split(jax.random.key(0), 2)
    params = jax.vmap(lambda key: model.init(key, sunspots.sequence(z))[0])(keys)
    params["head"]["w"] = 50 * params["head"]["w"]
    got = sunspots.free_run(config, params, z, 9)
    said = jax.jit(jax.vmap(lambda p, z: fnet.apply(model, p, {"gru": (), "head": ()}, z), in_axes=(0, None)))
    fed = np.where(np.arange(12) < 9, z, 0.0)
    for t in range(9, 12):
        fed[t] = np.mean(said(params, sunspots.sequence(fed))[:, 0, t - 1, 0])
    np.testing.assert_allclose(got, fed[9:], rtol=1e-5, atol=1e-6)
    unseen = sunspots.free_run(config, params, np.where(np.arange(12) < 9, z, 7.0), 9)
    np.testing.assert_array_equal(got, unseen)


def test_a_series_of_another_height_is_a_multiple_of_the_roots():
    config = sunspots.Config(noise=0.0, height=0.5)
    seen = []

    def engine(params, state, batch, key):
        seen.append(batch)
        return (), state, {}

    roots, mean, deviation = np.array([3.0, 5.0, 2.0, 7.0]), 4.0, 2.0
    z = sunspots.sequence((roots - mean) / deviation)
    sunspots.varied(engine, config, -mean / deviation)((), (), fnet.Batch(z[:, :-1], z[:, 1:]), jax.random.key(1))
    inputs, targets = (np.asarray(a)[0, :, 0] * deviation + mean for a in seen[0][:2])
    factor = inputs[0] / 3.0
    assert abs(factor - 1) > 0.05
    np.testing.assert_allclose(inputs, factor * roots[:-1], rtol=1e-5)
    np.testing.assert_allclose(targets, factor * roots[1:], rtol=1e-5)


def test_the_gains_interval_is_of_the_same_years():
    errors = np.random.default_rng(1).normal(size=80)
    low, high = sunspots.gain_interval(errors + 0.0, np.stack([errors, errors]), 300)
    assert abs(low) < 1e-12 and abs(high) < 1e-12  # the same errors in the same years, however they are drawn
    low, high = sunspots.gain_interval(2 * errors, errors[None], 300)
    assert 0 < low < np.sqrt(np.mean(errors**2)) < high


def test_sunspots_leave_pictures_and_refuse_what_cannot_be(spots, tmp_path):
    names = {"config.json", "results.json", "forecasts.png", "free_run.png"}
    assert written(spots[0]["folder"]) == names
    with pytest.raises(SystemExit, match="updates = 30; expected a multiple of every = 20"):
        sunspots.run(sunspots.Config(updates=30, every=20, run_dir=tmp_path))
    with pytest.raises(SystemExit, match="9 years remain to train on"):
        sunspots.run(sunspots.Config(validation_size=220, run_dir=tmp_path))


# --- features without labels -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    settings = {
        "code": 32,
        "epochs": 10,
        "batch_size": 16,
        "unlabelled": 800,
        "validation": 200,
        "test": 300,
        "labels": (5, 10),
    }
    return run_quietly(
        denoising_autoencoder, tmp_path_factory, **settings, seeds=(0,), decays=(0.01, 0.1), probe_updates=40
    )


def test_the_parts_share_no_digit():
    config = denoising_autoencoder.Config(unlabelled=3500)
    parts = denoising_autoencoder.load(config, 0)
    assert [len(part.targets) for part in parts] == [3500, 500, 1000]
    whole = np.concatenate([part.inputs for part in parts])
    expected = np.asarray(fnet.data.mnist_5k().inputs)
    np.testing.assert_array_equal(np.sort(whole.sum(1)), np.sort(expected.sum(1)))
    labelled = denoising_autoencoder.few(parts[0], 20)
    np.testing.assert_array_equal(np.bincount(labelled.targets), np.full(10, 20))
    digits = {row.tobytes() for row in np.asarray(parts[0].inputs)}
    assert all(row.tobytes() in digits for row in np.asarray(labelled.inputs))


def test_masking_hides_its_share_and_touches_nothing_else():
    x = jnp.ones((200, 784))
    y = np.asarray(denoising_autoencoder.masked(x, 0.3, jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, 1.0}
    assert (y == 0).mean() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / y.size))


def test_the_target_is_the_whole_digit():
    seen = []

    def engine(params, state, batch, key):
        seen.append(batch)
        return (), state, {}

    x = jnp.ones((4, 784))
    denoising_autoencoder.noisy(engine, 0.5)((), (), fnet.Batch(x, x), jax.random.key(0))
    assert (seen[0].targets == 1).all() and 0.4 < seen[0].inputs.mean() < 0.6


def test_principal_components_are_numpys():
    x = np.random.default_rng(0).normal(size=(30, 6)) * np.arange(1, 7)
    params = denoising_autoencoder.components(jnp.array(x, jnp.float32), 2)
    values, axes = np.linalg.eigh(np.cov(x.T))
    got = np.asarray(x @ np.asarray(params["w"]) + np.asarray(params["b"]))
    np.testing.assert_allclose(got.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(got.var(0, ddof=1), values[::-1][:2], rtol=1e-4)
    expected = (x - x.mean(0)) @ axes[:, ::-1][:, :2]
    np.testing.assert_allclose(np.abs(got), np.abs(expected), rtol=1e-3, atol=1e-3)


def test_features_are_scaled_over_the_unlabelled_digits():
    images = jnp.array(np.random.default_rng(0).normal(3, 2, (50, 7)), jnp.float32)
    params = denoising_autoencoder.fit_features(identity(), (), images)
    model = denoising_autoencoder.standardized(identity())
    got = np.asarray(fnet.apply(model, params, {"features": (), "scale": ()}, images))
    np.testing.assert_allclose(got.mean(0), 0, atol=1e-5)
    assert got.std() == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(np.ptp(got, 0) / np.ptp(np.asarray(images), 0), got.std() / images.std(), rtol=0.2)


def test_the_probe_descends_on_fixed_features_and_leaves_them():
    config = denoising_autoencoder.Config(code=16, probe_updates=25, unlabelled=300)
    unlabelled, validation, _ = denoising_autoencoder.load(config, 0)
    labelled, key = denoising_autoencoder.few(unlabelled, 3), jax.random.key(0)
    params, _ = fnet.init(denoising_autoencoder.make_autoencoder(config), key, unlabelled.inputs[:1])
    encoder, params = denoising_autoencoder.rows_of(config, params, params, unlabelled.inputs)["denoising encoder"]
    fitted = denoising_autoencoder.fit_features(encoder, params, unlabelled.inputs)
    model = denoising_autoencoder.standardized(encoder)
    train = jax.jit(partial(denoising_autoencoder.probe, config, model))
    (got,), trained = train(fitted, 0.1, labelled, (validation,))
    assert np.abs(trained["probe"]["w"]).max() > 0.1
    for a, b in zip(jax.tree.leaves(trained["frozen"]), jax.tree.leaves(fitted), strict=True):
        np.testing.assert_array_equal(a, b)

    # softmax regression by Adam on the features, in NumPy
    _, state = model.init(key, labelled.inputs)
    h, h_held = (
        np.asarray(fnet.apply(model, fitted, state, x), np.float64) for x in (labelled.inputs, validation.inputs)
    )
    y = np.eye(10)[np.asarray(labelled.targets)]
    theta = np.zeros((17, 10))
    m = v = np.zeros_like(theta)
    for t in range(1, 26):
        z = h @ theta[:16] + theta[16]
        p = np.exp(z - z.max(1, keepdims=True))
        dz = (p / p.sum(1, keepdims=True) - y) / len(y)
        g = np.concatenate([h.T @ dz + 0.1 * theta[:16], dz.sum(0)[None]])
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        theta = theta - 0.03 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-7)
    # Adam divides gradients by their size, the rounding of the smallest ones too
    w = np.asarray(trained["probe"]["w"])
    assert np.linalg.norm(w - theta[:16]) < 0.01 * np.linalg.norm(theta[:16])
    right = (h_held @ theta[:16] + theta[16]).argmax(1) == np.asarray(validation.targets)
    assert float(got) == pytest.approx(right.mean(), abs=0.01)


def test_restored_digits_are_nearer_than_masked_ones(features):
    results, text, config = features
    _, _, test = denoising_autoencoder.load(config, 0)
    noisy = denoising_autoencoder.masked(test.inputs, config.mask, stream(jax.random.key(0), "test noise"))
    assert results["noisy_error"] == pytest.approx(float(np.mean((np.asarray(noisy) - test.inputs) ** 2)), rel=1e-5)
    assert results["restored_error"] < results["noisy_error"]
    assert f"{results['noisy_error']:.4f}, restored {results['restored_error']:.4f}" in text
    assert results["losses"][0, -1] < results["losses"][0, 0]


def test_the_pretraining_is_given_no_label():
    config = denoising_autoencoder.Config(code=4, epochs=1)
    images = jax.ShapeDtypeStruct((64, 784), jnp.float32)
    program = jax.make_jaxpr(lambda x: denoising_autoencoder.pretrain(config, jax.random.key(0), x))(images)
    assert len(program.jaxpr.invars) == 1


def test_the_gains_are_differences_of_the_accuracies(features):
    results, text, _ = features
    assert list(results["accuracies"]) == ["raw pixels", "principal components", "random encoder", "denoising encoder"]
    for name, row in results["gains"].items():
        for count, (gain,) in row.items():
            ours, theirs = (results["accuracies"][which][count][0] for which in ("denoising encoder", name))
            assert gain == pytest.approx(ours - theirs) and 0.2 < theirs < 1
            assert f"{theirs:.3f}" in text
    names = {"config.json", "results.json", "digits.png", "probes.png"}
    assert written(results["folder"]) == names


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask": 0.0}, "mask = 0.0; expected between 0 and 1"),
        ({"unlabelled": 4000}, "expected at least 1 each, 5000 in all"),
        ({"labels": (400,)}, "labels = 400; expected at most"),
    ],
    ids=["mask", "sizes", "labels"],
)
def test_the_autoencoder_refuses_what_cannot_be(settings, words, tmp_path):
    with pytest.raises(SystemExit, match=words):
        denoising_autoencoder.run(denoising_autoencoder.Config(run_dir=tmp_path, **settings))
    assert not list(tmp_path.iterdir())
