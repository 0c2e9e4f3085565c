"""Uses (S16) and the network as a graph (S15): diagnosis, recommendation, control, and every number on a picture."""

from __future__ import annotations

import io
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import breast_cancer, control, network_graph, recommender
from fnet.losses import squared_error
from tests.oracles import assert_leaves_close, numerical_gradient

pytestmark = pytest.mark.long


def run_quietly(experiment, tmp_path_factory, **settings):
    """The experiment's results, what it printed, and its settings."""
    text = io.StringIO()
    config = experiment.Config(run_dir=tmp_path_factory.mktemp("runs"), name="test", **settings)
    results = experiment.run(config, Console(file=text, width=200))
    return results, text.getvalue(), config


# --- medical diagnosis -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cancer(tmp_path_factory):
    return run_quietly(breast_cancer, tmp_path_factory, epochs=8, hidden=(4,), seeds=(0, 1))


@pytest.fixture(scope="module")
def cases():
    return breast_cancer.load()


@pytest.mark.parametrize("folds", [4, 5, 7])
def test_each_case_is_in_exactly_one_test_fold_and_folds_have_the_classes_in_proportion(cases, folds):
    _, y = cases
    fold = breast_cancer.assign_folds(y, folds, seed=3)
    assert fold.shape == (569,) and set(fold) == set(range(folds)) and y.sum() == 212
    for k in range(folds):
        assert abs((y[fold == k] == 1).sum() - 212 / folds) < 1
        assert abs((y[fold == k] == 0).sum() - 357 / folds) < 1
    assert (fold != breast_cancer.assign_folds(y, folds, seed=4)).any()


def test_standardisation_knows_the_training_part_only(cases):
    x, _ = cases
    training = np.arange(len(x)) % 5 > 0
    scaled = breast_cancer.standardise(x, training)
    np.testing.assert_allclose(scaled[training].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(scaled[training].std(0), 1, rtol=1e-12)
    changed = np.where(training[:, None], x, 1e6)
    np.testing.assert_array_equal(breast_cancer.standardise(changed, training)[training], scaled[training])


def test_parts_hold_every_case_once_whatever_the_sizes_of_the_folds(cases):
    x, y = cases
    numbered = np.concatenate([x[:, :2], np.arange(len(y))[:, None]], 1)  # the last column tells the cases apart
    fold = breast_cancer.assign_folds(y, 5, seed=0)
    training, test = breast_cancer.make_parts(numbered, y, [fold], 5)
    assert test.weights.sum() == len(y) and training.weights.sum() == 4 * len(y)
    assert {113, 114} == set(np.asarray(test.weights.sum(1), int))  # so that some parts are filled up
    seen = []
    for k in range(5):
        parts = [jax.tree.map(lambda a, k=k: np.asarray(a)[k], part) for part in (training, test)]
        ids = np.arange(len(y))
        scale, shift = ids[fold != k].std(), ids[fold != k].mean()
        train_ids, test_ids = (np.rint(p.inputs[p.weights == 1, 2] * scale + shift).astype(int) for p in parts)
        assert sorted([*train_ids, *test_ids]) == list(ids)
        np.testing.assert_array_equal(parts[1].targets[parts[1].weights == 1, 0], y[test_ids])
        seen += list(test_ids)
    assert sorted(seen) == list(range(len(y)))


def test_what_fills_a_part_up_counts_nothing(cases):
    x, y = cases
    config, rows = breast_cancer.Config(epochs=2), np.arange(len(y)) < 70
    part = breast_cancer.part(breast_cancer.standardise(x, rows), y, rows, 72)
    assert part.weights.sum() == 70 and (part.weights[70:] == 0).all()
    other = part._replace(inputs=part.inputs.copy(), targets=part.targets.copy())
    other.inputs[70:], other.targets[70:] = 50.0, 1 - other.targets[70:]
    both = jax.tree.map(lambda *a: jnp.stack(a), part, other)
    train = jax.vmap(partial(breast_cancer.train_fold, config, (4,), fnet.backprop, jax.random.key(0)))
    p, curves = jax.jit(train)(both, both)
    np.testing.assert_array_equal(p[0, :70], p[1, :70])
    for losses in curves.values():
        np.testing.assert_array_equal(losses[0], losses[1])


def test_measures_are_their_definitions(cancer):
    results, _, _ = cancer
    r = results["variants"]["network, by hand"]
    p, y = r["each"][3]
    pairs = p[y == 1][:, None] - p[y == 0][None]  # Mann and Whitney
    assert r["folds"]["AUC"][3] == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), rel=1e-12)
    hits, cleared = (p[y == 1] > 0.5).mean(), (p[y == 0] <= 0.5).mean()
    assert (r["folds"]["sensitivity"][3], r["folds"]["specificity"][3]) == pytest.approx((hits, cleared))
    assert r["folds"]["accuracy"][3] == pytest.approx((hits * y.sum() + cleared * (y == 0).sum()) / len(y))
    assert r["folds"]["Brier score"][3] == pytest.approx(np.mean((p - y) ** 2))


def test_calibration_error_of_known_cases():
    p, y = np.array([0.05, 0.05, 0.05, 0.05, 1.0, 0.72]), np.array([0, 0, 0, 1, 1, 0])
    # bins: four at 0.05 of which a quarter is positive; one at 1, right; one at 0.72, wrong
    assert breast_cancer.calibration_error(p, y) == pytest.approx((4 * 0.2 + 0 + 0.72) / 6)


def test_the_folds_tests_are_good_and_the_engines_agree(cancer):
    results, text, _ = cancer
    by_hand, autodiff = (results["variants"][f"network, {engine}"] for engine in ("by hand", "autodiff"))
    assert len(by_hand["each"]) == 10 and results["confusion"].sum() == 2 * 569
    assert by_hand["folds"]["accuracy"].mean() > 0.92
    assert np.trace(results["confusion"]) / (2 * 569) == pytest.approx(by_hand["seeds"]["accuracy"].mean())
    for (p, _), (q, _) in zip(by_hand["each"], autodiff["each"], strict=True):
        np.testing.assert_allclose(p, q, atol=1e-4)  # 120 updates in float32
    assert "expected at least 0.96" in text
    assert {path.name for path in results["folder"].iterdir()} == {
        "config.json",
        "roc_calibration.png",
        "confusion.png",
    }


# --- recommendation --------------------------------------------------------------------------------------------------

SMALL = {"users": 30, "items": 20, "rank": 2, "seen": 0.9, "noise": 0.2, "ranks": (0, 2, 3), "batch_size": 48}


@pytest.fixture(scope="module")
def ratings(tmp_path_factory):
    return run_quietly(recommender, tmp_path_factory, epochs=100, seeds=(0, 1), **SMALL)


def test_no_entry_is_both_trained_on_and_held_out():
    data = recommender.make_ratings(recommender.Config(), 1)
    cells = [set(map(tuple, part.inputs.tolist())) for part in (data.training, data.test)]
    assert not cells[0] & cells[1] and (len(cells[0]), len(cells[1])) == (14_400, 3_600)
    assert np.linalg.matrix_rank(data.truth) <= 4 + 2  # the factors, and a bias each
    noise = data.test.targets - data.truth[tuple(data.test.inputs.T)]
    assert noise.std() == pytest.approx(0.5, rel=0.05)  # 3,600 values: 1.2% of standard error
    assert abs(data.training.targets.mean()) < 1e-5


def test_the_layers_backward_is_the_gradient_of_numpys_loss(key, x64):
    config = recommender.Config(users=3, items=4)
    layer, pairs = recommender.factorisation(config, 2), jnp.array([[0, 1], [0, 1], [2, 1], [0, 3]])  # rows repeat
    params = {"users": jax.random.normal(key, (3, 3)), "items": jax.random.normal(key, (4, 3))}
    y = jnp.array([0.5, -1.0, 2.0, 0.0])
    grads, _, _ = fnet.backprop(layer, squared_error)(params, (), fnet.Batch(pairs, y), key)

    def loss(users, items):
        b = [users[u, 0] + items[i, 0] + users[u, 1:] @ items[i, 1:] for u, i in np.asarray(pairs)]
        return np.mean((np.array(b) - np.asarray(y)) ** 2)

    users, items = (np.asarray(params[name]) for name in ("users", "items"))
    expected = {
        "users": numerical_gradient(lambda users: loss(users, items), users),
        "items": numerical_gradient(lambda items: loss(users, items), items),
    }
    assert_leaves_close(grads, expected, 1e-8)
    plain, _, _ = fnet.from_loss(recommender.plain_loss)(params, (), fnet.Batch(pairs, y), key)
    assert_leaves_close(grads, plain, 1e-13)
    assert fnet.check_layer(layer, pairs, key=key, precisions=(), cost=False).ok


def test_factors_that_start_at_0_stay_there(ratings):
    results, _, _ = ratings
    for table in results["tables"]["plain loss"].values():  # (ranks, seeds, rows, 1 + K)
        for i, rank in enumerate((0, 2, 3)):
            assert (table[i, :, :, 1 + rank :] == 0).all() and (table[i, :, :, : 1 + rank] != 0).any((1, 2)).all()


def test_rank_0_is_the_least_squares_of_biases(ratings):
    results, _, config = ratings
    data = recommender.make_ratings(config, 1)
    b, c = recommender.least_squares_biases(config, data.training)
    (user, item), y = data.training.inputs.T, data.training.targets
    residual = y - b[user] - c[item]
    for index, count in ((user, 30), (item, 20)):  # normal equations: the residuals of each row and column add up to 0
        np.testing.assert_allclose(np.bincount(index, residual, count), 0, atol=1e-4)
    reached = results["curves"]["rank 0"]
    assert reached["training"][1, -1] == pytest.approx(np.sqrt((residual**2).mean()), rel=2e-3)
    np.testing.assert_allclose(reached["held out"][:, -1], results["baselines"]["biases, least squares"], rtol=0.02)


def test_the_true_rank_comes_near_the_noise_and_the_baselines_do_not(ratings):
    results, text, config = ratings
    floor, held = results["baselines"]["the true matrix: the noise"], results["curves"]["rank 2"]["held out"][:, -1]
    assert (held < 1.4 * floor).all() and (results["baselines"]["biases, least squares"] > 3 * floor).all()
    assert "within 3%" in text
    assert {path.name for path in results["folder"].iterdir()} == {"config.json", "ranks.png"}
    free = 30 + 20 - 1 + 2 * (30 + 20 - 2)
    assert recommender.attainable(config, 432) == pytest.approx(0.2 * (1 + free / 432) ** 0.5)


def test_the_layer_trains_as_the_plain_loss_does(ratings):
    curves = ratings[0]["curves"]
    plain, layer = curves["rank 2"]["training"], curves["rank 2, by hand"]["training"]
    np.testing.assert_allclose(layer[:, :2], plain[:, :2], rtol=1e-4)  # 18 updates in float32
    np.testing.assert_allclose(layer[:, -1], plain[:, -1], rtol=0.05)


# --- control ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flights(tmp_path_factory):
    settings = {"hidden": (8,), "horizon": 15, "test_horizon": 50, "starts": 64, "epochs": 100, "seeds": (0, 1)}
    return run_quietly(control, tmp_path_factory, **settings)


@pytest.fixture(scope="module")
def lqr():
    a, b = control.linearised(0.04)
    return a, b, *control.riccati(a, b, control.Q, np.array([[control.R]]))


def numpy_step(x, u, dt):
    """The cart and pole by the two equations of motion, solved as a system, and a semi-implicit Euler step."""
    s, c, length = np.sin(x[1]), np.cos(x[1]), 0.5
    # (M + m) p″ + m l θ″ cos θ = u + m l θ′² sin θ   and   p″ cos θ + 4/3 l θ″ = g sin θ
    system = np.array([[1.1, 0.1 * length * c], [c, 4 / 3 * length]])
    v = x[2:] + dt * np.linalg.solve(system, [u + 0.1 * length * x[3] ** 2 * s, 9.8 * s])
    return np.concatenate([x[:2] + dt * v, v])


def test_the_gain_solves_the_riccati_equation(lqr):
    a, b, k, p = lqr
    np.testing.assert_allclose(k, np.linalg.inv(control.R + b.T @ p @ b) @ b.T @ p @ a, rtol=1e-9)
    right = control.Q + a.T @ p @ a - a.T @ p @ b @ np.linalg.inv(control.R + b.T @ p @ b) @ b.T @ p @ a
    np.testing.assert_allclose(p, right, rtol=0, atol=1e-10 * np.abs(p).max())
    assert np.abs(np.linalg.eigvals(a - b @ k)).max() < 1 < np.abs(np.linalg.eigvals(a)).max()
    assert (np.linalg.eigvalsh((p + p.T) / 2) > 0).all()


def test_the_linearisation_is_numpys(lqr):
    a, b, _, _ = lqr
    h = 1e-6
    for i, e in enumerate(h * np.eye(4)):
        np.testing.assert_allclose((numpy_step(e, 0, 0.04) - numpy_step(-e, 0, 0.04)) / (2 * h), a[:, i], atol=1e-8)
    slope = (numpy_step(np.zeros(4), h, 0.04) - numpy_step(np.zeros(4), -h, 0.04)) / (2 * h)
    np.testing.assert_allclose(slope, b[:, 0], atol=1e-8)


def test_on_the_linear_system_the_regulator_pays_x0_p_x0_and_any_other_gain_more(lqr):
    a, b, k, p = lqr

    def cost(gain, x=np.array([1.0, -0.1, 0.3, 0.2]), steps=60):
        total = 0.0
        for _ in range(steps):
            u = -gain @ x
            total, x = total + x @ control.Q @ x + control.R * u @ u, a @ x + b @ u
        return total + x @ p @ x

    x = np.array([1.0, -0.1, 0.3, 0.2])
    assert cost(k) == pytest.approx(x @ p @ x, rel=1e-9)
    for i in range(4):
        assert min(cost(k + d * np.abs(k) * np.eye(4)[i]) for d in (-0.05, 0.05)) > cost(k)


def test_a_flight_is_numpys(lqr, x64):
    _, _, k, p = lqr
    config, start = control.Config(force=6.0), np.array([[2.0, 0.1, 0.0, -0.2], [0.3, -0.3, 0.4, 0.0]])
    total, states, forces = control.fly(control.regulator(config, k[0]), jnp.array(start), 30, 0.04, p)
    for i, x in enumerate(start):
        cost = 0.0
        for t in range(30):
            u = np.clip(-(k[0] @ x), -6, 6)
            assert forces[t, i] == pytest.approx(u, rel=1e-9, abs=1e-9)
            cost, x = cost + x @ control.Q @ x + control.R * u**2, numpy_step(x, u, 0.04)
        np.testing.assert_allclose(states[-1, i], x, rtol=1e-9)
        assert total[i] == pytest.approx(cost + x @ p @ x, rel=1e-9)
    assert np.abs(forces).max() == 6.0  # the bound was met


def test_near_upright_the_regulator_pays_its_linear_cost(lqr, x64):
    _, _, k, p = lqr
    start = 1e-3 * jnp.array([[1.0, 0.5, -0.5, 0.3], [-0.2, 1.0, 0.0, 0.0]])
    test = control.judge(control.regulator(control.Config(), k[0]), control.Config(), start, p)
    np.testing.assert_allclose(test["ratio"], 1, atol=1e-5)  # the rest is of second order in 1e-3
    assert not test["fell"].any()


def test_the_gradient_through_the_simulation_passes_the_audit(flights):
    results, text, _ = flights
    assert results["audit"].ok and [leaf.verdict for leaf in results["audit"].leaves] == ["ok"] * 4
    assert "dense_0/w ok" in text


def test_a_policy_learns_through_the_simulation(flights):
    results, text, _ = flights
    losses = results["losses"].mean(2)  # (seeds, E), of log J / x0 P x0
    assert (losses[:, -1] < 0.5 * losses[:, 0]).all()
    assert results["results"]["LQR", "near"]["cost"] == pytest.approx([1, 1], abs=5e-3)
    assert "dropped the pole" in text
    assert {path.name for path in results["folder"].iterdir()} == {"config.json", "flights.png"}


# --- the network as a graph ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    return run_quietly(network_graph, tmp_path_factory)


def test_the_formulas_are_numpys_slopes(graph):
    results, _, config = graph
    params, columns = results["numbers"][1, "start"]
    n, x = columns["formulas"], np.array(config.inputs)
    hidden, output = params["dense_0"], params["dense_1"]
    start = [np.asarray(a, np.float64) for a in (hidden["w"].T, hidden["b"], output["w"].T, output["b"])]

    def loss(arrays):
        w, b, w_o, b_o = arrays
        return 0.5 * ((w_o @ (1 / (1 + np.exp(-(w @ x + b)))) + b_o - config.target) ** 2).item()

    assert n["L"].item() == pytest.approx(loss(start), rel=1e-14)
    for i, name in enumerate(("∂L/∂W", "∂L/∂b", "∂L/∂W_o", "∂L/∂b_o")):
        slope = numerical_gradient(lambda p, i=i: loss([*start[:i], p, *start[i + 1 :]]), start[i])
        np.testing.assert_allclose(n[name], slope, atol=1e-8)
    slope = numerical_gradient(lambda a: 0.5 * ((start[2] @ a + start[3] - config.target) ** 2).item(), n["a"])
    np.testing.assert_allclose(n["∂L/∂a"], slope, atol=1e-8)


def test_the_three_computations_are_equal_and_a_fault_would_show(graph):
    results, text, _ = graph
    assert results["worst"] < 1e-14 and "expected below 1e-14" in text
    for _, columns in results["numbers"].values():
        assert list(columns) == ["formulas", "backprop", "autodiff"]
        for name in network_graph.NAMES:
            for way in ("backprop", "autodiff"):
                assert columns[way][name].shape == columns["formulas"][name].shape, (way, name)
                np.testing.assert_allclose(columns[way][name], columns["formulas"][name], rtol=0, atol=1e-14)
        faulty = {**columns["backprop"], "∂L/∂z": columns["backprop"]["∂L/∂a"]}  # σ′ forgotten
        assert network_graph.furthest({"formulas": columns["formulas"], "faulty": faulty}) > 1e-3


def test_descent_is_numpys(graph):
    results, _, config = graph
    for i, seed in enumerate(config.seeds):
        params, losses = results["numbers"][seed, "start"][0], []
        for _ in range(config.updates):
            n = network_graph.by_formulas(params, np.array(config.inputs), config.target)
            losses.append(n["L"].item())
            steps = {"dense_0": ("∂L/∂W", "∂L/∂b"), "dense_1": ("∂L/∂W_o", "∂L/∂b_o")}
            params = {
                layer: {k: params[layer][k] - config.learning_rate * n[g].T for k, g in zip("wb", names, strict=True)}
                for layer, names in steps.items()
            }
        np.testing.assert_allclose(results["curves"][i], losses, rtol=1e-12)
        assert losses[-1] < 0.5 * losses[0]


def test_every_number_stands_on_the_picture(graph, monkeypatch):
    results, _, config = graph
    from matplotlib.axes import Axes

    written = []
    monkeypatch.setattr(Axes, "text", lambda self, x, y, text, **options: written.append(text))
    params, columns = results["numbers"][0, "start"]
    n, path = columns["formulas"], results["folder"].parent / "again.png"
    network_graph.draw(params, np.array(config.inputs), config.target, n, "seed 0", path)
    text = "\n".join(written)
    for weights, grads in ((params["dense_0"]["w"].T, n["∂L/∂W"]), (params["dense_1"]["w"].T, n["∂L/∂W_o"])):
        for w, g in zip(weights.ravel(), grads.ravel(), strict=True):
            assert f"w {w:+.3f}   ∂ {g:+.4f}" in text
    for b, z, a in zip(params["dense_0"]["b"], n["z"], n["a"], strict=True):
        assert f"sigmoid, threshold {-b:+.3f}\nz = Σ w x + b = {z:+.4f}\nstate {a:.4f}" in text
    assert f"linear, threshold {-params['dense_1']['b'][0]:+.3f}\nstate {n['ŷ'][0]:+.4f}" in text
    assert len(written) == 9 + 2 + 3 + 2  # edges, inputs, hidden units, output and target
    assert {path.name for path in results["folder"].iterdir()} == {"config.json", "start.png", "end.png"}
