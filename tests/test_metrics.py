"""Metrics against NumPy.

Legend: B batch, T time, K classes, F features.
"""

import re
from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import sklearn.metrics

from fnet import metrics
from fnet.metrics import accuracy, binary_accuracy, confusion, gradient_norms, merge, top_k, weighted_mean
from fnet.types import Mean

NAN, INF = np.nan, np.inf


def scores(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def labels(*shape, classes, seed=1):
    return np.random.default_rng(seed).integers(0, classes, shape)


CLASS_METRICS = {"accuracy": accuracy, "top_k": top_k(2), "confusion": confusion(4)}


# --- one value for each example --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(9,), (3, 5)])
def test_accuracy_is_the_share_of_largest_logits_at_the_label(rows):
    z, y = scores(*rows, 4), labels(*rows, classes=4)
    right = accuracy(z, y)
    assert right.dtype == jnp.float32 and 0 < right.sum() < right.size
    np.testing.assert_array_equal(right, z.argmax(-1) == y)


def test_top_k_is_membership_in_the_k_largest():
    z, y = scores(40, 6), labels(40, classes=6)
    for k in (1, 2, 5, 6):
        best = np.argsort(-z, -1)[:, :k]
        np.testing.assert_array_equal(top_k(k)(z, y), (best == y[:, None]).any(-1))
    np.testing.assert_array_equal(top_k(1)(z, y), accuracy(z, y))


def test_equal_logits_rank_by_index():
    y = np.arange(4)
    zeros = np.zeros((4, 4), np.float32)
    assert accuracy(zeros, y).tolist() == [1, 0, 0, 0]
    assert top_k(2)(zeros, y).tolist() == [1, 1, 0, 0]
    z = np.array([[1, 3, 3, 3]] * 4, np.float32)
    assert accuracy(z, y).tolist() == [0, 1, 0, 0]
    assert top_k(2)(z, y).tolist() == [0, 1, 1, 0]
    np.testing.assert_array_equal(confusion(4)(z, y).sum(0)[:, 1], [1, 1, 1, 1])


@pytest.mark.parametrize("rows", [(9,), (3, 5)])
def test_confusion_counts_label_by_row_and_prediction_by_column(rows):
    z, y = scores(*rows, 4), labels(*rows, classes=4)
    cells = confusion(4)(z, y)
    assert cells.shape == (*rows, 4, 4) and cells.dtype == jnp.float32
    expected = np.zeros((4, 4))
    for true, predicted in zip(y.ravel(), z.argmax(-1).ravel(), strict=True):
        expected[true, predicted] += 1
    assert np.any(expected != expected.T)
    np.testing.assert_array_equal(cells.reshape(-1, 4, 4).sum(0), expected)


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_probabilities_count_as_the_label_of_their_largest_entry(name):
    metric, z, y = CLASS_METRICS[name], scores(9, 4), labels(9, classes=4)
    soft = 0.6 * np.eye(4, dtype=np.float32)[y] + np.float32(0.1)
    np.testing.assert_array_equal(metric(z, soft), metric(z, y))


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_an_example_with_a_nan_logit_is_never_right(name):
    for at in range(4):
        z = np.eye(4, dtype=np.float32)
        z[:, at] = NAN
        assert np.all(np.asarray(CLASS_METRICS[name](z, np.arange(4))) == 0)
    assert np.all(top_k(4)(np.full((4, 4), NAN, np.float32), np.arange(4)) == 0)


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_a_traced_label_out_of_range_is_never_right(name):
    z = jnp.tile(jnp.arange(4.0)[None], (3, 1))  # class 3 is predicted, which a wrapped -1 or a clamped 4 would be
    counted = jax.jit(CLASS_METRICS[name])(z, jnp.array([-1, 3, 4]))
    assert counted.reshape(3, -1).sum(1).tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_class_metrics_run_in_x64_and_in_low_precision(name, x64):
    z, y = scores(9, 4), labels(9, classes=4)
    expected = CLASS_METRICS[name](z, y)
    np.testing.assert_array_equal(jax.jit(CLASS_METRICS[name])(z.astype(np.float64), y), expected)
    low = CLASS_METRICS[name](jnp.asarray(z, jnp.bfloat16), jnp.asarray(y, jnp.int8))
    assert low.dtype == expected.dtype == jnp.float32


def test_binary_accuracy_compares_the_logit_with_zero():
    z = np.array([2, -1, 3, -4, 0, 0, INF, -INF, NAN, NAN], np.float32)
    y = np.array([1, 1, 0, 0, 0, 1, 1, 0, 1, 0])
    expected = [1, 0, 0, 1, 1, 0, 1, 1, 0, 0]
    for targets in (y, y == 1, y.astype(np.float32)):
        assert binary_accuracy(z, targets).tolist() == expected
    assert binary_accuracy(z[:4], np.array([0.9, 0.6, 0.4, 0.5], np.float32)).tolist() == [1, 0, 0, 1]


def test_binary_accuracy_of_several_features_is_their_mean():
    z, y = scores(7, 5), labels(7, 5, classes=2)
    np.testing.assert_allclose(binary_accuracy(z, y), ((z > 0) == (y == 1)).mean(-1), rtol=1e-6)
    assert binary_accuracy(scores(2, 3, 5), labels(2, 3, 5, classes=2)).shape == (2, 3)


# --- sums and counts -------------------------------------------------------------------------------------------------


def test_weighted_mean_is_a_sum_and_a_weight():
    values, weights = scores(6), np.array([1, 0.5, 0, 2, 3, 0], np.float32)
    mean = weighted_mean(jnp.asarray(values), jnp.asarray(weights))
    np.testing.assert_allclose(mean, ((values * weights).sum(), 6.5), rtol=1e-6)
    np.testing.assert_allclose(mean.value, np.average(values.astype(np.float64), weights=weights), rtol=1e-6)
    np.testing.assert_allclose(weighted_mean(jnp.asarray(values)), (values.sum(), 6), rtol=1e-6)


def test_weighted_mean_sums_over_time_too_and_weights_may_be_of_steps_or_of_sequences():
    values = scores(3, 5)
    of_steps = np.arange(15, dtype=np.float32).reshape(3, 5)
    of_rows = np.array([1, 0, 2], np.float32)
    pairs = [(None, np.ones((3, 5))), (of_steps, of_steps), (of_rows, np.repeat(of_rows[:, None], 5, 1))]
    for weights, each in pairs:
        mean = weighted_mean(jnp.asarray(values), None if weights is None else jnp.asarray(weights), 2)
        np.testing.assert_allclose(mean, ((values * each).sum(), each.sum()), rtol=1e-5)


def test_a_weighted_confusion_is_counted_in_weights():
    z, y = scores(3, 5, 4), labels(3, 5, classes=4)
    weights = np.arange(15, dtype=np.float32).reshape(3, 5)
    mean = weighted_mean(confusion(4)(z, y), jnp.asarray(weights), 2)
    expected = np.zeros((4, 4))
    np.add.at(expected, (y, z.argmax(-1)), weights)
    np.testing.assert_array_equal(mean.sum, expected)
    assert mean.count == weights.sum() == mean.sum.sum()
    assert np.trace(mean.value) == weighted_mean(accuracy(z, y), jnp.asarray(weights), 2).value


def test_a_value_of_weight_zero_counts_nothing_even_if_it_is_not_finite():
    for value in (NAN, INF):
        assert weighted_mean(jnp.array([1.0, value]), jnp.array([2.0, 0.0])) == (2, 2)
    assert np.isnan(weighted_mean(jnp.array([1.0, NAN]), jnp.array([2.0, 1e-9])).sum)


def test_nothing_counted_has_mean_zero():
    assert weighted_mean(jnp.ones(3), jnp.zeros(3)).value == 0


@pytest.mark.parametrize(
    "values, sums", [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)]
)
@pytest.mark.parametrize("weights", [None, jnp.float32, jnp.bool_, jnp.int32])
def test_sums_and_counts_are_in_float32_at_least(values, sums, weights, x64):
    mean = weighted_mean(jnp.ones(300, values), None if weights is None else jnp.ones(300, weights))
    assert mean.sum.dtype == mean.count.dtype == sums
    assert mean == (300, 300)  # a bfloat16 sum would stop at 256


def test_weights_of_another_shape_are_refused():
    for weights in (jnp.ones(3), jnp.ones((4, 1)), jnp.ones((4, 5))):
        with pytest.raises(ValueError, match=r"weights of shape .* do not fit values of shape \(4,\)"):
            weighted_mean(jnp.ones(4), weights)


@pytest.mark.parametrize("sizes", [(4, 4, 2), (7, 3), (1, 8, 1)])
def test_merged_means_of_ragged_batches_are_the_mean_of_all_and_a_mean_of_means_is_not(sizes):
    right = np.repeat([1.0, 0.0], [sum(sizes[:-1]), sizes[-1]]).astype(np.float32)
    batches = [jnp.asarray(part) for part in np.split(right, np.cumsum(sizes)[:-1])]
    means = [{"accuracy": weighted_mean(batch)} for batch in batches]
    merged = means[0]
    for mean in means[1:]:
        merged = merge(merged, mean)
    assert merged == {"accuracy": Mean(right.sum(), right.size)}
    assert abs(merged["accuracy"].value - right.mean()) < 1e-7
    assert abs(np.mean([mean["accuracy"].value for mean in means]) - right.mean()) > 0.09


# --- gradient norms --------------------------------------------------------------------------------------------------


def norm(*arrays):
    return np.sqrt(sum((np.asarray(a, np.float64) ** 2).sum() for a in arrays))


def test_gradient_norms_are_of_each_child_and_of_all():
    w, b, deep = scores(3, 4), scores(4, seed=1), scores(5, seed=2)
    grads = {"dense_0": {"w": w, "b": b}, "relu_0": (), "block": {"dense": {"w": deep}, "relu": ()}}
    norms = jax.jit(gradient_norms)(grads)
    assert set(norms) == {"dense_0", "block", "all"}
    for name, arrays in {"dense_0": (w, b), "block": (deep,), "all": (w, b, deep)}.items():
        assert norms[name].shape == () and abs(norms[name] - norm(*arrays)) < 1e-6 * norm(*arrays)


Pair = namedtuple("Pair", "encoder decoder")


@pytest.mark.parametrize(
    "grads, expected",
    [
        (np.array([3.0, 4.0]), {"all": 5}),
        ((np.array([3.0]), (), np.array([[4.0]])), {"0": 3, "2": 4, "all": 5}),
        (Pair(np.array([3.0]), {"w": np.array([4.0])}), {"encoder": 3, "decoder": 4, "all": 5}),
        ({"w": np.float64(-2), "none": None, "count": np.int32(7)}, {"w": 2, "all": 2}),
        ({"relu_0": ()}, {"all": 0}),
        ((), {"all": 0}),
    ],
)
def test_gradient_norms_name_the_children_of_any_tree(grads, expected, x64):
    assert gradient_norms(grads) == expected


def test_norms_are_computed_in_float32_at_least(x64):
    grads: dict[str, Any] = {
        "half": jnp.full((100,), 3e3, jnp.float16),  # its square, and its sum of squares, overflow float16
        "brain": jnp.full((1000,), 1.0, jnp.bfloat16),  # its sum would stop at 256
    }
    norms = gradient_norms(grads)
    assert all(n.dtype == jnp.float32 for n in norms.values())
    np.testing.assert_allclose(norms["half"], 3e4, rtol=1e-3)  # 3e3 is exact in float16
    np.testing.assert_allclose(norms["brain"], np.sqrt(1000), rtol=1e-6)
    mixed = gradient_norms({**grads, "double": jnp.full((2,), 1 + 1e-12)})
    assert mixed["double"].dtype == mixed["all"].dtype == jnp.float64 and mixed["half"].dtype == jnp.float32
    np.testing.assert_allclose(mixed["double"], np.sqrt(2) * (1 + 1e-12), rtol=1e-15)


def test_nan_gradients_have_a_nan_norm():
    norms = gradient_norms({"a": jnp.array([1.0, NAN]), "b": jnp.array([2.0])})
    assert np.isnan(norms["a"]) and norms["b"] == 2 and np.isnan(norms["all"])


def test_a_child_called_all_is_refused():
    with pytest.raises(ValueError, match="gradient_norms: a child is called 'all'"):
        gradient_norms({"all": jnp.ones(2)})


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_targets_that_do_not_fit_are_refused_by_the_metrics_name(name):
    metric = CLASS_METRICS[name]
    with pytest.raises(ValueError, match=rf"^{name}: outputs \(5, 4\) do not go with int32 targets \(5, 1\)"):
        metric(jnp.zeros((5, 4)), jnp.zeros((5, 1), jnp.int32))
    with pytest.raises(ValueError, match=rf"^{name}: label 4 at \(1,\) is outside 0..3 \(outputs have 4 classes\)"):
        metric(jnp.zeros((2, 4)), np.array([0, 4]))
    with pytest.raises(ValueError, match=f"^{name}: outputs are int32; expected floating"):
        metric(jnp.zeros((2, 4), jnp.int32), np.array([0, 1]))


def test_binary_accuracy_does_not_broadcast():
    with pytest.raises(ValueError, match=r"^binary_accuracy: outputs \(4, 1\) and targets \(4,\) must have one shape"):
        binary_accuracy(jnp.zeros((4, 1)), jnp.zeros(4))


@pytest.mark.parametrize(
    "metric, message",
    [
        (lambda: top_k(0), "top_k: k = 0; expected at least 1"),
        (lambda: top_k(4)(jnp.zeros((1, 3)), np.array([0])), "top_k: k = 4, but outputs have 3 classes"),
        (lambda: confusion(4)(jnp.zeros((1, 3)), np.array([0])), "confusion: expected 4 classes, but outputs have 3"),
    ],
)
def test_numbers_of_classes_that_do_not_fit_are_refused(metric, message):
    with pytest.raises(ValueError, match=message):
        metric()


# --- of a whole set ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["macro", "micro", None])
@pytest.mark.parametrize("weighted", [False, True])
def test_precision_recall_f1_and_intersection_over_union_are_scikit_learns(average, weighted):
    rng = np.random.default_rng(3)
    logits, labels = rng.standard_normal((60, 4)), rng.integers(0, 3, 60)  # class 3 has no example
    logits[:, 2] -= 9  # and class 2 is never predicted
    weights = rng.uniform(0, 2, 60) if weighted else np.ones(60)
    counts = metrics.weighted_mean(metrics.confusion(4)(logits, labels), jnp.asarray(weights)).sum
    for ours, theirs in (
        (metrics.precision, sklearn.metrics.precision_score),
        (metrics.recall, sklearn.metrics.recall_score),
        (metrics.f1, sklearn.metrics.f1_score),
        (metrics.intersection_over_union, sklearn.metrics.jaccard_score),
    ):
        options = {"labels": range(4), "average": average, "sample_weight": weights, "zero_division": 0}
        expected = theirs(labels, logits.argmax(1), **options)
        np.testing.assert_allclose(ours(counts, average), expected, rtol=1e-5, atol=1e-7)


def test_intersection_over_union_of_pixels_is_that_of_sets_of_places():
    z, y = scores(2, 5, 6, 3), labels(2, 5, 6, classes=3)
    counts = metrics.weighted_mean(confusion(3)(z, y), axes=3).sum
    answers, found = z.argmax(-1), metrics.intersection_over_union(counts, None)
    for k in range(3):
        both, either = (answers == k) & (y == k), (answers == k) | (y == k)
        np.testing.assert_allclose(found[k], both.sum() / either.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics.intersection_over_union(counts), found.mean(), rtol=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_area_under_the_curve_is_scikit_learns(weighted):
    rng = np.random.default_rng(4)
    labels = rng.integers(0, 2, 200)
    scores = np.round(rng.standard_normal(200) + labels, 1)  # many ties
    weights = rng.uniform(0, 2, 200) if weighted else None
    expected = sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weights)
    np.testing.assert_allclose(metrics.roc_auc(scores, labels, weights), expected, rtol=1e-12)
    assert metrics.roc_auc(labels, labels) == 1 and metrics.roc_auc(-labels, labels) == 0


def test_r_squared_and_absolute_error_are_scikit_learns():
    rng = np.random.default_rng(5)
    targets = rng.standard_normal((50, 3))
    outputs, weights = targets + 0.3 * rng.standard_normal((50, 3)), rng.uniform(0, 2, 50)
    for w in (None, weights):
        expected = sklearn.metrics.r2_score(targets, outputs, sample_weight=w)
        np.testing.assert_allclose(metrics.r_squared(outputs, targets, w), expected, rtol=1e-12)
    expected = sklearn.metrics.mean_absolute_error(targets, outputs, sample_weight=weights)
    found = metrics.weighted_mean(metrics.absolute_error(outputs, targets), jnp.asarray(weights)).value
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_allclose(
        metrics.r_squared(outputs[:, 0], targets[:, 0]),
        sklearn.metrics.r2_score(targets[:, 0], outputs[:, 0]),
        rtol=1e-12,
    )


def test_perplexity_is_that_of_as_many_equally_likely_ids():
    loss = metrics.weighted_mean(jnp.full(7, np.log(50.0)))
    np.testing.assert_allclose(metrics.perplexity(loss), 50, rtol=1e-6)
    np.testing.assert_allclose(metrics.perplexity(np.log(3.0)), 3, rtol=1e-6)


def test_counts_that_are_no_numbers_have_no_score():
    counts = jnp.array([[1.0, jnp.nan], [0.0, 2.0]])
    for score in (metrics.precision, metrics.recall, metrics.f1, metrics.intersection_over_union):
        assert np.isnan(score(counts)) and np.isnan(score(counts, "micro"))
        assert np.isnan(np.asarray(score(counts, None))).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.precision(jnp.ones((2, 3))), r"precision: counts of shape (2, 3); expected (K, K), the sum"),
        (
            lambda: metrics.f1(jnp.ones((2, 2)), "weighted"),
            "f1: average = 'weighted'; expected 'macro', 'micro' or None",
        ),
        (lambda: metrics.roc_auc([0.1, 0.2], [0, 2]), "roc_auc: expected labels 0 and 1, and scores that are numbers"),
        (lambda: metrics.roc_auc([0.1, np.nan], [0, 1]), "roc_auc: expected labels 0 and 1, and scores that are"),
        (lambda: metrics.roc_auc([0.1, 0.2], [1, 1]), "roc_auc: one label alone has weight; expected examples of both"),
        (lambda: metrics.roc_auc([0.1, 0.2], [1]), "roc_auc: scores (2,) and labels (1,); expected (N,) for both"),
        (lambda: metrics.roc_auc(np.ma.masked_equal([1.0, 2], 2), [0, 1]), "roc_auc: scores has 1 masked values"),
        (lambda: metrics.roc_auc([1.0, 2], [0, 1], np.ma.masked_equal([1.0, 2], 2)), "roc_auc: weights has 1 masked"),
        (lambda: metrics.r_squared([1.0, 2], np.ma.masked_equal([1.0, 2], 2)), "r_squared: targets has 1 masked"),
        (lambda: metrics.r_squared([np.nan, 2.0], [3.0, 4.0]), "r_squared: outputs hold what is not finite"),
        (lambda: metrics.r_squared([1.0, 2.0], [np.inf, 4.0]), "r_squared: targets hold what is not finite"),
        (lambda: metrics.r_squared([1.0, 2.0], [3.0, 3.0]), "r_squared: targets that are all the same; expected some"),
        (
            lambda: metrics.absolute_error(jnp.ones((2, 1)), jnp.ones(2)),
            "absolute_error: outputs (2, 1) and targets (2,)",
        ),
    ],
)
def test_what_no_whole_set_metric_is_of_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_metrics_of_a_whole_set_leave_examples_of_weight_0_out():
    t, y, w = np.array([1.0, 2.0, 4.0, np.nan]), np.array([1.5, 2.0, 3.0, np.inf]), np.array([1.0, 2.0, 1.0, 0.0])
    mean = (1 + 2 * 2 + 4) / 4
    expected = 1 - (0.25 + 0 + 1) / ((1 - mean) ** 2 + 2 * (2 - mean) ** 2 + (4 - mean) ** 2)
    assert metrics.r_squared(y, t, w) == pytest.approx(expected, rel=1e-12)
    auc = metrics.roc_auc([0.1, 0.4, 0.35, 0.8, np.nan], [0, 0, 1, 1, -1], [1, 1, 1, 1, 0])
    assert auc == 0.75
    with pytest.raises(ValueError, match="targets that are all the same"):
        metrics.r_squared(np.arange(3.0), np.full(3, 0.1))
    for weights in ([1, 1], [1, -1, 1, 1], [0, 0, 0, 0], [1, np.nan, 1, 1]):
        with pytest.raises(ValueError, match=r"weights .*; expected \(4,\), one for each example: finite numbers"):
            metrics.r_squared(y, t, weights)
        with pytest.raises(ValueError, match=r"weights .*; expected \(4,\), one for each example: finite numbers"):
            metrics.roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], weights)


def test_integers_are_not_made_narrower_before_they_are_floats():
    assert metrics.absolute_error(np.array([2**33]), np.array([0])).tolist() == [2.0**33]
    np.testing.assert_allclose(metrics.precision(np.array([[2**32, 2**32], [0, 5]]), None), [1, 5 / (2**32 + 5)])
    assert metrics.precision(np.array([[3, 1], [0, 2]]) * 2**40) == metrics.precision(np.array([[3, 1], [0, 2]]))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_metrics_of_a_whole_set_do_not_depend_on_the_scale(scale):
    assert metrics.roc_auc([1.0, 2.0], [0, 1], [scale, scale]) == 1
    assert metrics.r_squared([0, scale], [0, 2 * scale]) == pytest.approx(0.5)
    assert metrics.r_squared([0.0, 1], [0, 2.0], [scale, scale]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: metrics.roc_auc(np.array([1 + 2j, 2]), [0, 1]),
            "roc_auc: scores have dtype complex128; expected real",
        ),
        (lambda: metrics.roc_auc(["a", "b"], [0, 1]), "roc_auc: scores have dtype <U1; expected real numbers"),
        (lambda: metrics.r_squared(np.ones((3, 0)), np.ones((3, 0))), "r_squared: targets (3, 0) hold no number"),
        (
            lambda: metrics.absolute_error(1.0, 2.0),
            "absolute_error: outputs () and targets (); expected one shape, (B,",
        ),
        (lambda: metrics.precision(np.ma.masked_equal([[1, 2], [3, 4]], 2)), "precision: counts has 1 masked values"),
        (
            lambda: metrics.accuracy(np.ma.masked_equal(np.eye(2), 1), np.arange(2)),
            "accuracy: outputs have 2 masked values; expected none, since a mask would be dropped",
        ),
        (
            lambda: metrics.accuracy(pd.DataFrame(np.eye(2)), np.arange(2)),
            "accuracy: outputs are a DataFrame of DataFrame[2, 2]; expected one array: of a table take .to_numpy()",
        ),
        (
            lambda: metrics.accuracy(np.eye(2), pd.Series([0, 1], dtype="Int64")),
            "accuracy: targets are a Series of Int64[2]; expected one array: of a table take .to_numpy()",
        ),
    ],
)
def test_what_is_no_array_of_real_numbers_is_named(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
