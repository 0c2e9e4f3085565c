"""CTC against the sum over every path, written out; its gradient by finite differences and by autodiff; padding.

Legend: B batch, T frames, K classes, N labels.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fnet
from fnet.layers import dense, identity
from fnet.losses import CTCTargets, ctc, softmax_cross_entropy
from tests.oracles import numerical_gradient

T, K = 5, 3
rng = np.random.default_rng(0)


def merged(path, blank):
    """A path without repeats, then without blanks."""
    return [k for k, _ in itertools.groupby(path) if k != blank]


def brute_force(z, labels, blank=0):
    """``−log Σ_π Π_t softmax(z_t)_π_t`` over all ``K^T`` paths of one example, in float64."""
    log_q = z - np.logaddexp.reduce(z, -1, keepdims=True)
    paths = itertools.product(range(z.shape[1]), repeat=len(z))
    found = [log_q[np.arange(len(z)), list(p)].sum() for p in paths if merged(p, blank) == [*labels]]
    return -np.logaddexp.reduce(found) if found else np.inf


def compiled(loss):
    def total(z, targets):
        return loss.value(z, targets).sum()

    return jax.jit(lambda z, targets: (loss.value(z, targets), loss.gradient(z, targets), jax.grad(total)(z, targets)))


PADDED = compiled(ctc())
LABELS = np.array([[1, 2, -1], [1, 1, -1], [2, 1, 2], [-1, -1, -1], [2, 0, 0], [2, 2, 2]])
FITTING = [[1, 2], [1, 1], [2, 1, 2], [], [2], [2, 2, 2]]
Z = rng.normal(scale=2.0, size=(6, T, K))


def test_values_are_the_sums_over_all_paths(x64):
    values, *_ = PADDED(Z, LABELS)
    expected = [brute_force(z, labels) for z, labels in zip(Z, FITTING, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-13)


@pytest.mark.parametrize("blank", [1, 2])
def test_any_class_may_be_the_blank(blank, x64):
    exchanged = np.array([blank if k == 0 else 0 if k == blank else k for k in range(K)])
    labels = np.where(LABELS < 0, -1, exchanged[LABELS])
    values, by_hand, by_autodiff = compiled(ctc(blank))(Z, labels)
    fitting = [[k for k in row if k >= 0 and k != blank] for row in labels.tolist()]
    np.testing.assert_allclose(values, [brute_force(*pair, blank) for pair in zip(Z, fitting, strict=True)], rtol=1e-13)
    np.testing.assert_allclose(by_hand, by_autodiff, atol=1e-13)


def test_gradients_are_the_slopes_of_the_sums_over_all_paths(x64):
    _, by_hand, by_autodiff = PADDED(Z, LABELS)
    for i in (1, 2, 3):
        slopes = numerical_gradient(lambda z, i=i: brute_force(z, FITTING[i]), Z[i])
        np.testing.assert_allclose(by_hand[i], slopes, atol=1e-8)
    np.testing.assert_allclose(by_hand, by_autodiff, atol=1e-14)
    np.testing.assert_allclose(by_hand.sum(-1), 0, atol=1e-14)  # softmax and occupancies add up to 1


@pytest.mark.parametrize(
    "wrong", [lambda g: -g, lambda g: 1.000001 * g, lambda g: np.roll(g, 1, 1), lambda g: g * (np.arange(K) > 0)]
)
def test_wrong_gradients_are_not_the_slopes(wrong, x64):
    _, by_hand, _ = PADDED(Z, LABELS)
    slopes = numerical_gradient(lambda z: brute_force(z, FITTING[2]), Z[2])
    assert np.abs(wrong(np.asarray(by_hand[2])) - slopes).max() > 1e-8


def test_frames_and_labels_that_are_padding_count_nothing_whatever_they_hold(x64):
    lengths = np.array([3, 5, 4, 2, 1, 5])
    frames = np.arange(T) < lengths[:, None]
    spoilt = np.where(frames[..., None], Z, np.where(np.arange(K) == 1, np.inf, np.nan))
    values, by_hand, by_autodiff = PADDED(spoilt, CTCTargets(LABELS, frames))
    np.testing.assert_allclose(by_hand, by_autodiff, atol=1e-13)
    expected = [brute_force(z[:n], y) for z, n, y in zip(Z, lengths, FITTING, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-13)
    slopes = numerical_gradient(lambda z: brute_force(z, FITTING[2]), Z[2, :4])
    np.testing.assert_allclose(by_hand[2, :4], slopes, atol=1e-8)
    assert (np.asarray(by_hand)[~frames] == 0).all()


def test_padding_may_stand_anywhere(x64):
    expected = PADDED(Z[:2], np.array([[1, 2, -1, -1], [1, 1, -1, -1]]))
    for found, wanted in zip(PADDED(Z[:2], np.array([[-1, 1, 0, 2], [1, -5, 1, 0]])), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    late = np.concatenate([np.zeros((2, 2, K)), Z[:2]], 1)
    values, by_hand, _ = PADDED(late, CTCTargets(LABELS[:2], np.tile(np.arange(T + 2) > 1, (2, 1))))
    np.testing.assert_allclose(values, expected[0], rtol=1e-13)
    np.testing.assert_allclose(by_hand[:, 2:], expected[1], atol=1e-13)


def test_with_no_labels_it_is_the_cross_entropy_of_blanks_and_with_no_frames_0(x64):
    none = np.zeros((6, 0), int)
    values, by_hand, _ = PADDED(Z, none)
    blanks = np.zeros((6, T), int)
    np.testing.assert_allclose(values, softmax_cross_entropy(Z, blanks).sum(-1), rtol=1e-13)
    np.testing.assert_allclose(by_hand, softmax_cross_entropy.gradient(Z, blanks), atol=1e-14)
    for z, targets in ((Z, CTCTargets(LABELS * 0, np.zeros((6, T), bool))), (Z[:, :0], none)):
        values, by_hand = (part(z, targets) for part in ctc()[:2])
        assert (np.asarray(values) == 0).all() and (np.asarray(by_hand) == 0).all()
    values, by_hand, _ = PADDED(Z[:0], LABELS[:0])
    assert values.shape == (0,) and by_hand.shape == (0, T, K)


UNFIT = np.array([[1, 1, 1, 2], [1, 2, 1, 2]])  # the first needs 6 frames, the second 4


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_labels_that_fit_no_path_have_an_infinite_value_and_no_gradient_or_0_and_0(dtype, x64):
    z = Z[:2].astype(dtype)
    for loss, value, gradient in ((ctc(), np.inf, np.nan), (ctc(zero_infinity=True), 0, 0)):
        values, *gradients = compiled(loss)(z, UNFIT)
        assert values[0] == value and np.isfinite(values[1])
        for found in gradients:
            np.testing.assert_array_equal(found[0], np.full((T, K), gradient, dtype))
            assert np.isfinite(found[1]).all()


def test_a_label_of_probability_0_fits_no_path():
    z = np.array([[[0.0, -np.inf, 0.0]] * 4] * 2, np.float32)
    values, by_hand, _ = PADDED(z, np.array([[1], [2]]))
    assert values[0] == np.inf and np.isnan(by_hand[0]).all()
    expected = 4 * np.log(2) - np.log(10)  # 10 runs of ones in four frames, and the others blank
    np.testing.assert_allclose(values[1], expected, rtol=1e-6)
    assert np.isfinite(by_hand[1]).all() and (np.asarray(by_hand[1][:, 1]) == 0).all()


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-6), ("float64", 1e-14)])
def test_at_logits_of_1e4_the_one_path_that_is_left_has_the_gradient_of_its_cross_entropy(dtype, rtol, x64):
    z = np.full((2, 4, 3), -1e4, dtype)
    for t, k in enumerate([0, 1, 1, 2]):
        z[:, t, k] = 1e4
    values, by_hand, by_autodiff = PADDED(z, np.array([[1, 2], [2, 1]]))
    expected = brute_force(z[1].astype(np.float64), [2, 1])
    assert expected >= 2e4
    np.testing.assert_allclose(values, [0, expected], rtol)
    np.testing.assert_allclose(by_hand[0], np.zeros((4, 3)), atol=rtol)
    np.testing.assert_allclose(by_hand, by_autodiff, atol=10 * rtol)
    slopes = numerical_gradient(
        lambda z: brute_force(z, [2, 1]), z[1], h=0.5
    )  # straight pieces: no path is near another
    np.testing.assert_allclose(by_hand[1], slopes, atol=max(rtol, 1e-9))


def test_float32_gradients_of_long_sequences_are_the_float64_ones_to_its_rounding(x64):
    z, labels = rng.normal(scale=3.0, size=(2, 400, 20)), rng.integers(1, 20, (2, 60))
    run = jax.jit(lambda z: (ctc().value(z, labels), ctc().gradient(z, labels)))
    exact, found = run(z), run(z.astype(np.float32))
    # a value is a sum of 400 terms; what a frame is rounded by grows with the differences between states, some tens
    np.testing.assert_allclose(found[0], exact[0], rtol=400 * 6e-8)
    np.testing.assert_allclose(found[1], exact[1], atol=400 * 6e-8)
    assert found[0].dtype == found[1].dtype == jnp.float32


def test_bfloat16_logits_are_computed_in_float32():
    low = jnp.asarray(Z, jnp.bfloat16)
    values, by_hand, _ = PADDED(low, LABELS)
    wide, wide_gradient, _ = PADDED(low.astype(jnp.float32), LABELS)
    assert values.dtype == jnp.float32 and by_hand.dtype == jnp.bfloat16
    np.testing.assert_allclose(values, wide, rtol=1e-6)
    np.testing.assert_allclose(by_hand.astype(jnp.float32), wide_gradient, rtol=2**-8, atol=1e-7)


def test_nan_in_a_frame_and_a_traced_label_that_no_class_has_reach_value_and_gradient_of_their_example_alone():
    z = Z.astype(np.float32)
    z[1, 2, 0] = np.nan
    labels = np.where(np.arange(6)[:, None] == 4, 7, LABELS)
    values, by_hand, _ = PADDED(z, labels)
    for found in (values, by_hand):
        assert np.isnan(found).reshape(6, -1).any(1).tolist() == [False, True, False, False, True, False]


def test_a_population_by_vmap_has_the_values_of_its_members(x64):
    z = rng.normal(size=(2, 6, T, K))
    together = jax.jit(jax.vmap(lambda z: tuple(part(z, LABELS) for part in ctc()[:2])))(z)
    for i in range(2):
        for found, alone in zip(together, PADDED(z[i], LABELS)[:2], strict=True):
            np.testing.assert_allclose(found[i], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("engine", [fnet.autodiff, fnet.backprop], ids=lambda engine: engine.__name__)
def test_examples_of_weight_0_are_left_out_and_the_others_trained(engine, key, x64):
    frames = np.arange(T) < np.array([5, 5, 5, 3, 4, 5])[:, None]
    weights = np.array([1.0, 0.5, 0, 2, 1, 0])
    spoilt = CTCTargets(np.where(weights[:, None] == 0, 99, LABELS), frames)
    gradient = engine(identity(), ctc(), inputs=True)
    z = np.where(weights[:, None, None] == 0, np.nan, Z)
    (_, dz), _, metrics = gradient((), (), jax.tree.map(jnp.asarray, fnet.Batch(z, spoilt, weights)), key)
    each = [brute_force(z[: f.sum()], y) for z, f, y in zip(Z, frames, FITTING, strict=True)]
    np.testing.assert_allclose(metrics["loss"].value, weights @ each / weights.sum(), rtol=1e-13)
    _, expected, _ = PADDED(Z, CTCTargets(LABELS, frames))
    np.testing.assert_allclose(dz, expected * (weights / weights.sum())[:, None, None], atol=1e-15)


def test_a_model_learns_to_spell(key):
    words = rng.integers(1, 4, (16, 4))
    x = np.eye(4, dtype=np.float32)[np.repeat(words, 3, 1)] + rng.normal(scale=0.1, size=(16, 12, 4))
    model, x = dense(4), x.astype(np.float32)
    params, state = fnet.init(model, key, x)
    step = fnet.make_step(fnet.backprop(model, ctc()), fnet.adam(0.1))
    ts = fnet.init_train_state(params, fnet.adam(0.1), key, state)
    data = fnet.Batch(x, CTCTargets(words, np.ones((16, 12), bool)))
    _, history = fnet.fit(step, ts, data, epochs=40, batch_size=16)
    repeats = (words[:, 1:] == words[:, :-1]).any(1).mean()
    assert history.epochs["loss"][0] > 5 and history.epochs["loss"][-1] < 3 + 3 * repeats


def test_values_and_gradients_are_pytorchs(x64):
    torch = pytest.importorskip("torch")
    lengths, counts = np.array([5, 5, 5, 4, 3, 5]), np.array([2, 2, 3, 0, 1, 3])
    frames = np.arange(T) < lengths[:, None]
    z = torch.tensor(Z, requires_grad=True)
    labels = torch.tensor(np.where(LABELS < 0, 0, LABELS))
    theirs = torch.nn.CTCLoss(reduction="none")(
        z.log_softmax(-1).transpose(0, 1), labels, torch.tensor(lengths), torch.tensor(counts)
    )
    theirs.sum().backward()
    values, by_hand, _ = PADDED(Z, CTCTargets(LABELS, frames))
    np.testing.assert_allclose(values, theirs.detach(), rtol=1e-12)
    np.testing.assert_allclose(by_hand, z.grad, atol=1e-12)
    unfit = torch.nn.CTCLoss(reduction="none", zero_infinity=True)(
        z[:2].log_softmax(-1).transpose(0, 1), torch.tensor(UNFIT), torch.tensor([T, T]), torch.tensor([4, 4])
    )
    np.testing.assert_allclose(ctc(zero_infinity=True)(Z[:2], UNFIT), unfit.detach(), rtol=1e-12)


def test_values_and_gradients_are_optaxs(x64):
    optax = pytest.importorskip("optax")
    frames, labels = np.arange(T) < np.array([5, 5, 5, 4, 3, 5])[:, None], np.maximum(LABELS, 0)
    paddings = 1.0 - frames, 1.0 * (labels == 0)

    def theirs(z):
        return optax.losses.ctc_loss(z, paddings[0], labels, paddings[1])

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected, slopes = theirs(jnp.asarray(Z)), jax.grad(lambda z: theirs(z).sum())(jnp.asarray(Z))
    values, by_hand, _ = PADDED(Z, CTCTargets(LABELS, frames))
    fit = np.arange(6) < 5  # there is no path for the last, of which optax makes a number
    np.testing.assert_allclose(values[fit], expected[fit], rtol=1e-11)
    np.testing.assert_allclose(by_hand[fit], slopes[fit], atol=1e-11)


@pytest.mark.parametrize(
    "outputs, targets, message",
    [
        (np.zeros((2, 3)), LABELS[:2], r"outputs \(2, 3\); expected \(B, T, K\), the logits of T frames"),
        (np.zeros((2, 4, 3), int), LABELS[:2], "outputs are int.*expected floating"),
        (Z[:2], LABELS, r"outputs \(2, 5, 3\) do not go with int64 labels \(6, 3\); expected integer labels \(2, N\)"),
        (Z[:2], LABELS[:2] * 1.0, ".* do not go with float64 labels"),
        (Z, LABELS[:, 0], r".* do not go with int64 labels \(6,\)"),
        (Z, np.where(LABELS == 2, 3, LABELS), r"label 3 at \(0, 1\) is outside 0..2 \(outputs have 3 classes\)"),
        (
            Z,
            CTCTargets(LABELS, np.full(6, T)),
            r"frames are int64\[6\]; expected bool\[6, 5\], .*arange\(T\) < lengths",
        ),
        (Z, CTCTargets(LABELS, np.ones((6, 4), bool)), r"frames are bool\[6, 4\]; expected bool\[6, 5\]"),
        ((Z, np.ones((6, T), bool)), LABELS, r"outputs are a tuple .*drop_mask\(\)"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_computed(outputs, targets, message):
    for function in ctc()[:2]:
        with pytest.raises(ValueError, match=f"^ctc: {message}"):
            function(outputs, targets)


@pytest.mark.parametrize("blank", [-1, 1.5, True])
def test_a_blank_that_is_no_class_is_refused(blank):
    with pytest.raises(ValueError, match=f"^ctc: blank = {blank}; expected the index of a class"):
        ctc(blank)
    with pytest.raises(ValueError, match="with the blank 3 of K classes"):
        ctc(3)(Z, LABELS)
