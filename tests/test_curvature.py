"""Curvature: products against dense matrices, eigenvalues, traces, spectra and Kronecker factors of known ones."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import fnet
from fnet import curvature
from fnet.layers import conv, dense, flatten, serial, tanh
from tests.oracles import assert_leaves_close
from tests.test_examples import LAYERS, problem

MODEL = serial(dense(4), tanh(), dense(3))
WEIGHTS = np.array([1, 0.5, 0, 2, 1.5, 1])
LOSSES = {
    "softmax_cross_entropy": (fnet.softmax_cross_entropy, lambda rng: rng.integers(0, 3, 6)),
    "half_squared_error": (fnet.losses.half_squared_error, lambda rng: rng.standard_normal((6, 3))),
    "binary_cross_entropy": (fnet.losses.binary_cross_entropy, lambda rng: rng.integers(0, 2, (6, 3)) * 1.0),
}


def point(loss="softmax_cross_entropy"):
    """Parameters, state, a batch with weights and no key; the loss of flat parameters; one of each example's."""
    loss, targets = LOSSES[loss]
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.standard_normal((6, 2))), jnp.asarray(targets(rng))
    params, state = fnet.init(MODEL, jax.random.key(0), x)
    vector, unravel = ravel_pytree(params)

    def outputs(vector):
        return fnet.apply(MODEL, unravel(vector), state, x)

    return loss, (params, state, fnet.Batch(x, y, jnp.asarray(WEIGHTS)), None), vector, outputs


def dense_of(matrix, at) -> np.ndarray:
    """The whole matrix, column by column."""
    vector, unravel = ravel_pytree(at[0])
    product = jax.jit(jax.vmap(lambda v: ravel_pytree(matrix(*at, unravel(v)))[0]))
    return np.asarray(product(jnp.eye(vector.size)))


def shares():
    return WEIGHTS / WEIGHTS.sum()


@pytest.mark.parametrize("make", [fnet.autodiff, fnet.backprop])
def test_products_with_the_hessian_are_those_with_the_dense_matrix(make, x64):
    loss, at, vector, outputs = point()
    hessian = jax.hessian(lambda v: shares() @ loss(outputs(v), at[2].targets))(vector)
    found = dense_of(curvature.hessian(make(MODEL, loss)), at)
    np.testing.assert_allclose(found, hessian, rtol=0, atol=1e-13)


def gauss_newton_of(name):
    """``Σ w Jᵢᵀ Hᵢ Jᵢ`` and the expectation of ``gᵢ gᵢᵀ``, from the formulas of the losses."""
    _, at, vector, outputs = point(name)
    jacobian, y = np.asarray(jax.jacobian(outputs)(vector)), np.asarray(outputs(vector))
    total, expected = 0, 0
    for i, share in enumerate(shares()):
        p = {
            "softmax_cross_entropy": lambda z: np.exp(z) / np.exp(z).sum(),
            "binary_cross_entropy": lambda z: 1 / (1 + np.exp(-z)),
            "half_squared_error": lambda z: z,
        }[name](y[i])
        if name == "softmax_cross_entropy":
            curved = np.diag(p) - np.outer(p, p)
            slopes = [(p[c], p - np.eye(3)[c]) for c in range(3)]
        elif name == "binary_cross_entropy":
            curved = np.diag(p * (1 - p))
            outcomes = [np.array(t) for t in np.ndindex(2, 2, 2)]
            slopes = [(np.prod(np.where(t == 1, p, 1 - p)), p - t) for t in outcomes]
        else:
            curved = np.eye(3)
            slopes = [
                (0.5, s * np.sqrt(3) * e) for e in np.eye(3) for s in (1, -1)
            ]  # E[εεᵀ] = I, from six of weight 1/6
            slopes = [(1 / 6, s) for _, s in slopes]
        total = total + share * jacobian[i].T @ curved @ jacobian[i]
        expected = expected + share * sum(q * np.outer(jacobian[i].T @ s, jacobian[i].T @ s) for q, s in slopes)
    return at, total, expected


@pytest.mark.parametrize("name", LOSSES)
def test_products_with_gauss_newton_and_fisher_are_those_with_the_dense_matrices(name, x64):
    at, total, expected = gauss_newton_of(name)
    loss = LOSSES[name][0]
    np.testing.assert_allclose(dense_of(curvature.gauss_newton(MODEL, loss), at), total, rtol=0, atol=1e-13)
    np.testing.assert_allclose(dense_of(curvature.fisher(MODEL, loss), at), expected, rtol=0, atol=1e-13)


def test_the_empirical_fisher_is_the_mean_of_the_squares_of_gradients(x64):
    loss, at, _, _ = point()
    rows = np.stack(
        [
            ravel_pytree(fnet.autodiff(MODEL, loss)(at[0], at[1], fnet.Batch(x[None], y[None]), None)[0])[0]
            for x, y in zip(at[2].inputs, at[2].targets, strict=True)
        ]
    )
    found = dense_of(curvature.fisher(MODEL, loss, empirical=True), at)
    np.testing.assert_allclose(found, (rows.T * shares()) @ rows, rtol=0, atol=1e-14)


def test_a_matrix_in_parts_is_that_of_the_whole(x64):
    loss, at, _, _ = point()
    matrices = (
        curvature.hessian(fnet.backprop(MODEL, loss)),
        curvature.gauss_newton(MODEL, loss),
        curvature.fisher(MODEL, loss, empirical=True),
        curvature.block(fnet.autodiff(MODEL, loss), "dense_0/*"),
    )
    for matrix in matrices:
        whole, in_parts = (dense_of(m, at) for m in (matrix, curvature.in_parts(matrix, 4)))
        np.testing.assert_allclose(in_parts, whole, rtol=0, atol=1e-14)
        assert np.abs(whole).max() > 1e-2


def test_a_fisher_matrix_of_a_loss_that_says_nothing_of_targets_is_refused():
    with pytest.raises(ValueError, match=r"fisher: the loss is none of softmax_cross_entropy.*or empirical=True"):
        curvature.fisher(MODEL, fnet.losses.huber())
    with pytest.raises(ValueError, match="kronecker_factors: the loss is none of"):
        curvature.kronecker_factors(MODEL, fnet.losses.huber())
    with pytest.raises(ValueError, match="fisher: the loss mixes examples"):
        curvature.fisher(MODEL, fnet.losses.info_nce(), empirical=True)


# --- eigenvalues ------------------------------------------------------------------------------------------------------


def test_the_largest_eigenvalues_and_their_vectors_are_those_of_the_dense_matrix(x64):
    loss, at, vector, _ = point()
    engine = fnet.backprop(MODEL, loss)
    values, vectors = np.linalg.eigh(dense_of(curvature.hessian(engine), at))
    for count in (3, vector.size):
        largest = lambda *at, n=count: curvature.top_eigenvalues(engine, *at, count=n, steps=vector.size)  # noqa: E731
        found, trees = jax.jit(largest)(*at)
        np.testing.assert_allclose(found, values[::-1][:count], rtol=0, atol=1e-12)
        np.testing.assert_allclose(curvature.sharpness(engine, steps=vector.size)(*at), values[-1], rtol=1e-12)
    flat = np.stack([ravel_pytree(jax.tree.map(lambda a, i=i: a[i], trees))[0] for i in range(vector.size)])
    np.testing.assert_allclose(flat @ flat.T, np.eye(vector.size), atol=1e-12)
    for i in range(3):
        np.testing.assert_allclose(abs(flat[i] @ vectors[:, -1 - i]), 1, atol=1e-10)


def quadratic(eigenvalues):
    """An engine whose Hessian is diagonal, of a leaf ``a`` with all but two entries and ``b`` with those."""
    scales = jnp.asarray(eigenvalues)

    def loss(params, batch, key):
        flat = jnp.concatenate([params["a"], params["b"]])
        return 0.5 * (scales * flat**2).sum() + 0 * batch.sum()

    params = {"a": jnp.ones(len(eigenvalues) - 2), "b": jnp.ones(2)}
    return fnet.from_loss(loss), (params, (), jnp.ones((1, 1)), None)


def test_eigenvalues_that_are_many_times_there_are_all_found(x64):
    # Krylov's space ends after three vectors: the rest are drawn
    engine, at = quadratic([3.0, 3, 3, 1, 1, 0, 0, 0])
    values, vectors = curvature.top_eigenvalues(engine, *at, 8, steps=8)
    np.testing.assert_allclose(values, [3, 3, 3, 1, 1, 0, 0, 0], atol=1e-13)
    flat = np.concatenate([vectors["a"], vectors["b"]], 1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(8), atol=1e-13)


def test_a_block_is_the_matrix_of_its_leaves_alone(x64):
    engine, at = quadratic([5.0, -7, 3, 2, 9, 1])
    for leaves, expected in (("a", [5, 3, 2, -7]), (["b"], [9, 1]), (lambda path, leaf: path == "b", [9, 1])):
        found = curvature.block(engine, leaves)
        values, vectors = curvature.top_eigenvalues(found, *at, len(expected), steps=len(expected))
        np.testing.assert_allclose(values, expected, atol=1e-13)
        assert not np.any(vectors["b" if len(expected) == 4 else "a"])
    with pytest.raises(ValueError, match=r"count = 3, steps = 2; expected count <= steps <= 2, the entries"):
        curvature.top_eigenvalues(curvature.block(engine, "b"), *at, 3, steps=2)
    with pytest.raises(ValueError, match="the pattern 'c' matches no parameter"):
        curvature.top_eigenvalues(curvature.block(engine, "c"), *at)


# --- by random vectors ------------------------------------------------------------------------------------------------


def test_traces_and_diagonals_are_those_of_the_dense_matrix(x64):
    loss, at, _, _ = point()
    matrix = curvature.gauss_newton(MODEL, loss)
    dense_matrix = dense_of(matrix, at)
    estimate = curvature.trace(matrix, *at, draws=400)
    assert abs(float(estimate.value) - dense_matrix.trace()) < 5 * float(estimate.error)
    assert float(estimate.error) < 0.1 * dense_matrix.trace()
    # of rank 2 · 5 at most: a sketch of as many leaves nothing over
    sketched = curvature.trace(matrix, *at, draws=2, sketch=12)
    np.testing.assert_allclose(sketched.value, dense_matrix.trace(), rtol=1e-10)
    away = ravel_pytree(curvature.diagonal(matrix, *at, draws=2000))[0] - np.diag(dense_matrix)
    off = np.sqrt(((dense_matrix - np.diag(np.diag(dense_matrix))) ** 2).sum(1) / 2000)  # its standard error
    assert (np.abs(away) <= 5 * off + 1e-12).all()
    engine, diagonal_at = quadratic([5.0, -7, 3, 2])
    found = curvature.diagonal(engine, *diagonal_at, draws=1)
    assert_leaves_close(found, {"a": np.array([5.0, -7]), "b": np.array([3.0, 2])}, 1e-13)
    for wrong in ({"draws": 1}, {"sketch": -1}):
        with pytest.raises(ValueError, match="trace: draws"):
            curvature.trace(engine, *diagonal_at, **wrong)


def test_the_spectrum_has_the_eigenvalues_and_their_shares(x64):
    engine, at = quadratic([10.0] * 2 + [1.0] * 6 + [-2.0] * 2)
    values, weights = curvature.spectrum(engine, *at, steps=3, draws=3)
    # signs have the same square in every direction of a diagonal matrix: the shares are exact
    np.testing.assert_allclose(values, [[-2, 1, 10]] * 3, atol=1e-12)
    np.testing.assert_allclose(weights, [[0.2, 0.6, 0.2]] * 3, atol=1e-12)
    points = np.linspace(-20, 30, 5001)
    density = np.asarray(curvature.Spectrum(values, weights).density(points, 0.5))
    np.testing.assert_allclose(density.sum() * 0.01, 1, atol=1e-9)
    near = np.exp(-0.5 * ((points - 10) / 0.5) ** 2) / (0.5 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(density[points > 6], 0.2 * near[points > 6], atol=1e-12)


# --- Kronecker factors ------------------------------------------------------------------------------------------------


def test_of_one_example_the_factors_of_a_dense_layer_are_its_block_of_the_fisher_matrix(x64):
    loss, at, _, _ = point()
    one = at[2]._replace(inputs=at[2].inputs[:1], targets=at[2].targets[:1], weights=None)
    at = (at[0], at[1], one, None)
    factors = curvature.kronecker_factors(MODEL, loss, empirical=True)(*at)
    assert {*factors} == {"dense_0/w", "dense_0/b", "dense_1/w", "dense_1/b"}
    for path, (inputs, outputs) in factors.items():
        block = dense_of(curvature.block(curvature.fisher(MODEL, loss, empirical=True), path), at)
        kept = np.flatnonzero(np.abs(block).sum(0))
        expected = np.kron(inputs, outputs)
        live = np.flatnonzero(np.abs(expected).sum(0))
        np.testing.assert_allclose(expected[np.ix_(live, live)], block[np.ix_(kept, kept)], atol=1e-14)


def test_factors_are_means_over_examples_and_positions(x64):
    model = serial(conv(2, (2, 2), padding="VALID"), tanh(), flatten(), dense(3))
    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.standard_normal((4, 3, 4, 2))), jnp.asarray(rng.integers(0, 3, 4))
    weights = np.array([1.0, 2, 0, 0.5])
    params, state = fnet.init(model, jax.random.key(0), x)
    batch = fnet.Batch(x, labels, jnp.asarray(weights))
    found = curvature.kronecker_factors(model, fnet.softmax_cross_entropy, empirical=True)(params, state, batch, None)
    share = weights / weights.sum()
    patches = np.stack([x[:, i : i + 2, j : j + 2] for i in range(2) for j in range(3)], 1).reshape(4, 6, 8)
    expected = np.einsum("b,bni,bnj->ij", share, patches, patches)
    np.testing.assert_allclose(found["conv_0/w"].inputs, expected, atol=1e-13)

    def loss_of(offset, i):  # the conv's outputs, moved
        y, _ = conv(2, (2, 2), padding="VALID").forward(params["conv_0"], (), x[i : i + 1])[:2]
        hidden = jnp.tanh(y + offset[None]).reshape(1, -1)
        logits = hidden @ params["dense_0"]["w"] + params["dense_0"]["b"][None]
        return fnet.softmax_cross_entropy(logits, labels[i : i + 1])[0]

    slopes = np.stack([jax.grad(loss_of)(jnp.zeros((2, 3, 2)), i) for i in range(4)]).reshape(4, 6, 2)
    expected = np.einsum("b,bno,bnp->op", share, slopes, slopes) / 6
    np.testing.assert_allclose(found["conv_0/w"].outputs, expected, atol=1e-13)
    np.testing.assert_allclose(found["conv_0/b"].inputs, [[6.0]], atol=1e-13)


def test_factors_with_targets_drawn_are_those_of_the_fisher_matrix_on_average(x64):
    loss, at, _, _ = point()
    factors = jax.jit(jax.vmap(lambda key: curvature.kronecker_factors(MODEL, loss)(*at[:3], key)["dense_1/b"].outputs))
    drawn = np.asarray(factors(jax.random.split(jax.random.key(0), 4000)))
    exact = dense_of(curvature.block(curvature.fisher(MODEL, loss), "dense_1/b"), at)
    kept = np.flatnonzero(np.abs(exact).sum(0))
    error = drawn.std(0) / np.sqrt(4000)
    assert (np.abs(drawn.mean(0) - exact[np.ix_(kept, kept)]) < 5 * error).all()


# --- every layer ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name for name in LAYERS if "as jax's rule" not in name and not name.startswith("t5_block")]
)  # jax has no second derivative of a rule
def test_second_derivatives_by_hand_are_autodiffs_and_symmetric(name, x64):
    model, params, state, batch = problem(name)
    if not jax.tree.leaves(params):
        pytest.skip("no parameters")
    rng = np.random.default_rng(2)
    u, v = (jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params) for _ in "uv")
    key = jax.random.key(2)

    @jax.jit
    def products(params, state, batch, u, v):
        def inner(a, b):
            pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
            return sum(jnp.vdot(x, y).astype(float) for x, y in pairs)

        found = []
        for make in (fnet.autodiff, fnet.backprop):
            matrix = curvature.hessian(make(model, SQUARED))
            found.append(
                (
                    matrix(params, state, batch, key, u),
                    inner(v, matrix(params, state, batch, key, u)),
                    inner(u, matrix(params, state, batch, key, v)),
                )
            )
        return found

    (auto, one, other), (hand, _, _) = products(params, state, batch, u, v)
    wide = all(leaf.dtype == float for leaf in jax.tree.leaves(params))
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(auto))
    for a, h in zip(jax.tree.leaves(auto), jax.tree.leaves(hand), strict=True):
        np.testing.assert_allclose(h, a, rtol=0, atol=(1e-10 if wide else 1e-4) * max(scale, 1e-3))
    np.testing.assert_allclose(one, other, rtol=1e-9 if wide else 1e-3, atol=1e-9)


# half the squared distance of all outputs from fixed numbers: every layer bends it
SQUARED = fnet.Loss(
    lambda y, t: sum(
        0.5 * ((a - b) ** 2).reshape(len(b), -1).sum(1) for a, b in zip(jax.tree.leaves(y), t, strict=True)
    ),
    lambda y, t: jax.tree.unflatten(jax.tree.structure(y), [a - b for a, b in zip(jax.tree.leaves(y), t, strict=True)]),
)


# --- curvlinops -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_curvlinops_computes_the_same_products(x64):
    torch, linops = pytest.importorskip("torch"), pytest.importorskip("curvlinops")
    loss, at, _, _ = point()
    there = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    names = fnet.export.torch_names(at[0], {"dense_0": "0.*", "dense_1": "2.*"})
    there.load_state_dict({k: torch.tensor(a) for k, a in fnet.export.to_tensors(at[0], names).items()})
    x, y = (torch.tensor(np.asarray(a)) for a in at[2][:2])
    params = dict(there.named_parameters())
    batch = at[2]._replace(weights=None)
    v = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(3).standard_normal(p.shape)), at[0])
    tensors = [torch.tensor(a) for a in fnet.export.to_tensors(v, names).values()]
    order = [*fnet.export.to_tensors(v, names)]
    for matrix, operator in (
        (curvature.hessian(fnet.backprop(MODEL, loss)), linops.HessianLinearOperator),
        (curvature.gauss_newton(MODEL, loss), linops.GGNLinearOperator),
        (curvature.fisher(MODEL, loss, empirical=True), linops.EFLinearOperator),
    ):
        made = operator(there, torch.nn.CrossEntropyLoss(), [params[name] for name in order], [(x, y)])
        found = dict(zip(order, (t.detach().numpy() for t in made @ tensors), strict=True))
        expected = fnet.export.to_tensors(matrix(at[0], at[1], batch, None, v), names)
        for name in order:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-12, err_msg=operator.__name__)
