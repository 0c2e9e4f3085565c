"""Curvature of an objective: products with its matrices of second derivatives, and what follows from products alone.

    hessian(gradient), gauss_newton(model, loss), fisher(model, loss)         matrices, as products
    block(matrix, leaves), in_parts(matrix, parts)                            of some parameters, of many examples
    top_eigenvalues(matrix, params, state, batch, key, count=1)               Lanczos
    trace, diagonal, spectrum                                                 by random vectors
    sharpness(matrix)                                                         the largest eigenvalue, for `make_step`
    kronecker_factors(model, loss)                                            K-FAC's, of each layer

A matrix is a function ``(params, state, batch, key, v) -> A v`` with ``v`` a tree like ``params``; where one is asked
for, a gradient engine stands for its Hessian. The objective is the engine's, ``Σ w ℓ / Σ w`` over the batch in
training: layers that look at their whole batch do so, and noise is that of the key. No matrix is ever made.

Legend: B batch, P entries of all parameters, K steps of Lanczos.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from fnet import losses
from fnet.core.checks import require_counts
from fnet.core.numerics import stream, wide
from fnet.gradients.engines import Gradient, accumulate, check_engine, checked, loss_gradient, measure
from fnet.gradients.examples import along, require_engine, shares
from fnet.layers.children import Back, backward_of, forward_of, is_rewritten, watch
from fnet.optimizers.which import Mask, decaying
from fnet.types import Batch, Layer, Loss, Mean, PyTree


class Matrix(NamedTuple):
    """A symmetric matrix of P × P as its products, ``matrix(params, state, batch, key, v) -> A v``."""

    product: Callable[..., tuple[PyTree, Mean]]  # A v, and the loss, which knows what its batch counts
    leaves: Mask = None  # those that it acts on, if not all

    def __call__(self, params: PyTree, state: PyTree, batch: Any, key: jax.Array | None, v: PyTree) -> PyTree:
        return self.product(params, state, batch, key, v)[0]


# --- matrices --------------------------------------------------------------------------------------------------------


def hessian(gradient: Gradient) -> Matrix:
    """``H = ∂²L / ∂θ²`` of an engine: the derivative of its gradient along ``v``, forward over reverse.

    Of any engine, by hand or not. Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.

    >>> import fnet
    >>> model, x, y = fnet.dense(1, bias=None), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros((2, 1))
    >>> matrix = hessian(fnet.backprop(model, fnet.losses.half_squared_error))  # xᵀx / B = [[5, 7], [7, 10]]
    >>> params = {"w": jnp.zeros((2, 1))}
    >>> matrix(params, (), fnet.Batch(x, y), None, {"w": jnp.array([[1.0], [0.0]])})["w"].ravel().tolist()
    [5.0, 7.0]
    """
    require_engine("hessian", gradient)

    def product(params, state, batch, key, v):
        def grads(params):
            grads, _, metrics = gradient(params, state, batch, key)
            return grads, metrics["loss"]

        _, along_v, loss = jax.jvp(grads, (params,), (v,), has_aux=True)
        return along_v, loss

    return Matrix(product)


def gauss_newton(model: Layer, loss: Loss) -> Matrix:
    """``Jᵀ (∂²L / ∂y²) J`` with ``J = ∂y/∂θ``, y the model's outputs: the Hessian of a model made linear.

    ``J v`` is the forward's derivative along ``v``, and ``Jᵀ`` the model's backward by hand. It has no negative
    eigenvalue where the loss is convex in y. Source: Schraudolph, "Fast curvature matrix-vector products for
    second-order gradient descent", 2002.
    """
    check_engine("gauss_newton", model, loss, None, by_hand=True)

    def product(params, state, batch, key, v):
        batch = checked("gauss_newton", batch, key)
        y, along_v, residuals = moved(model, params, state, batch, key, v)
        measured = measure(loss, None, y, batch)["loss"]
        _, curved = jax.jvp(lambda y: loss_gradient(loss, y, batch, measured.count), (y,), (along_v,))
        return backward_of(model, params, residuals, curved)[0], measured

    return Matrix(product)


CANONICAL = {  # negative log-likelihoods of the natural parameters, and how a target is drawn as outputs say
    losses.softmax_cross_entropy: lambda key, y: jax.random.categorical(key, y),
    losses.binary_cross_entropy: lambda key, y: jax.random.bernoulli(key, jax.nn.sigmoid(y)).astype(y.dtype),
    losses.half_squared_error: lambda key, y: y + jax.random.normal(key, y.shape, y.dtype),
    losses.poisson: lambda key, y: jax.random.poisson(key, jnp.exp(y)).astype(y.dtype),
}


def require_canonical(who: str, loss: Loss, otherwise: str) -> None:
    """Raise ValueError for a loss of which it is not known what its outputs say of targets."""
    if loss not in CANONICAL:
        raise ValueError(
            f"{who}: the loss is none of softmax_cross_entropy, binary_cross_entropy, half_squared_error and poisson, "
            f"so it is not known which targets the outputs stand for; expected one of these, or {otherwise}"
        )


def fisher(model: Layer, loss: Loss, *, empirical: bool = False) -> Matrix:
    """``Σ w E[gᵢ gᵢᵀ] / Σ w`` with targets drawn as the model's outputs say; or with ``empirical`` those of the batch.

    Of a loss that is the negative log-likelihood of an exponential family by its natural parameters the expectation is
    `gauss_newton`, so that nothing is drawn: `softmax_cross_entropy` (classes), `binary_cross_entropy` (Bernoulli),
    `half_squared_error` (a normal distribution of variance 1), `poisson`. ValueError for others, which have an
    empirical one alone. The empirical one is no approximation of the true one away from a fitted optimum.
    Source: Martens, arXiv:1412.1193; Kunstner et al., arXiv:1905.12558.
    """
    check_engine("fisher", model, loss, None, by_hand=True)
    if not empirical:
        require_canonical("fisher", loss, "empirical=True")
        return gauss_newton(model, loss)
    if loss.backward is not None:
        raise ValueError("fisher: the loss mixes examples, so none has a gradient of its own to be squared")

    def product(params, state, batch, key, v):
        batch = checked("fisher", batch, key)
        y, along_v, residuals = moved(model, params, state, batch, key, v)
        measured = measure(loss, None, y, batch)["loss"]
        dy = loss_gradient(loss, y, batch, measured.count)
        # dy is (wᵢ / W) ∂ℓᵢ/∂y: its product with J v is (wᵢ / W) (gᵢ · v), of which one share is taken away again
        slopes = sum(
            jnp.sum(d * u, tuple(range(1, d.ndim)))
            for d, u in zip(jax.tree.leaves(dy), jax.tree.leaves(along_v), strict=True)
        )
        share = shares(loss, y, batch)
        slopes = jnp.where(share == 0, 0, slopes / jnp.where(share == 0, 1, share))
        return backward_of(model, params, residuals, jax.tree.map(lambda d: d * along(slopes, d), dy))[0], measured

    return Matrix(product)


def moved(model: Layer, params, state, batch: Batch, key, v) -> tuple[PyTree, PyTree, PyTree]:
    """``y``, ``J v`` and the residuals of a forward."""

    def forward(params):
        y, _, residuals = forward_of(model, params, state, batch.inputs, key=key, train=True)
        return y, residuals

    return jax.jvp(forward, (params,), (v,), has_aux=True)


def block(matrix: Matrix | Gradient, leaves: Mask) -> Matrix:
    """The matrix with 0 in the rows and columns of all parameters but the ``leaves``: a group's own curvature.

    ``leaves`` are path patterns, such as ``"dense_0/*"``, a tree of True and False or a function of path and leaf.
    """
    matrix = as_matrix("block", matrix)

    def product(params, state, batch, key, v):
        kept = jax.tree.unflatten(jax.tree.structure(params), decaying("block", leaves, params))
        only = lambda tree: jax.tree.map(lambda a, keep: a if keep else jnp.zeros_like(a), tree, kept)  # noqa: E731
        inner, loss = matrix.product(params, state, batch, key, only(v))
        return only(inner), loss

    return Matrix(product, leaves)


def in_parts(matrix: Matrix | Gradient, parts: int) -> Matrix:
    """The same matrix of a batch that is gone through in ``parts``, as large as a data set: see `fnet.accumulate`.

    The matrix of the whole is the mean of those of its parts, by what they count, but for layers that look at their
    whole batch.
    """
    matrix = as_matrix("in_parts", matrix)
    require_counts("in_parts", parts=parts)

    def product(params, state, batch, key, v):
        def engine(params, state, batch, key, *, scale=None):
            along_v, loss = matrix.product(params, state, batch, key, v)
            return along_v, state, {"loss": loss}

        along_v, _, metrics = accumulate(engine, parts)(params, state, batch, key)
        return along_v, metrics["loss"]

    return Matrix(product, matrix.leaves)


def as_matrix(who: str, matrix: Matrix | Gradient) -> Matrix:
    """The matrix, or an engine's Hessian; TypeError for what is neither."""
    if isinstance(matrix, Matrix):
        return matrix
    require_engine(who, matrix)
    return hessian(matrix)


# --- eigenvalues -----------------------------------------------------------------------------------------------------


class Flat(NamedTuple):
    """A matrix at a point, over vectors ``(P,)`` of the entries that it acts on."""

    product: Callable[[jax.Array], jax.Array]
    unravel: Callable[[jax.Array], PyTree]
    entries: jax.Array  # 1 at those, 0 elsewhere
    size: int  # how many they are
    key: jax.Array


def flat(who: str, matrix: Matrix | Gradient, params, state, batch, key) -> Flat:
    """``matrix`` at ``params``, over vectors."""
    matrix = as_matrix(who, matrix)
    vector, unravel = ravel_pytree(params)

    def product(v):
        return ravel_pytree(matrix(params, state, batch, key, unravel(v)))[0]

    entries, size = jnp.ones_like(vector), vector.size
    if matrix.leaves is not None:
        kept = decaying(who, matrix.leaves, params)
        leaves, tree = jax.tree.flatten(params)
        size = sum(leaf.size for leaf, keep in zip(leaves, kept, strict=True) if keep)
        entries = ravel_pytree(
            jax.tree.unflatten(tree, [jnp.full(a.shape, keep, a.dtype) for a, keep in zip(leaves, kept, strict=True)])
        )[0]
    return Flat(product, unravel, entries, size, stream(jax.random.key(0) if key is None else key, who))


def lanczos(matrix: Flat, start: jax.Array, steps: int) -> tuple[jax.Array, jax.Array]:
    """``T (K, K)``, tridiagonal, and an orthonormal basis ``V (K, P)`` with ``V A Vᵀ = T``, from a first vector.

    Every vector is made orthogonal to all before it, twice. Where they span all that the matrix reaches, a new
    direction is drawn, and T falls into blocks. Source: Lanczos, 1950; Golub and Van Loan, "Matrix computations", 10.1.
    """
    tiny = 1e3 * jnp.finfo(start.dtype).eps

    def orthogonal(w, basis):
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        return w

    def step(carry, i):
        basis, v, largest = carry
        basis = basis.at[i].set(v)
        w = matrix.product(v)
        alpha = v @ w
        w = orthogonal(w, basis)
        beta = jnp.linalg.norm(w)
        largest = jnp.maximum(largest, jnp.maximum(jnp.abs(alpha), beta))
        ended = beta <= tiny * largest

        def drawn(_):
            fresh = jax.random.normal(jax.random.fold_in(matrix.key, i), w.shape, w.dtype) * matrix.entries
            return orthogonal(fresh / jnp.linalg.norm(fresh), basis)

        w = jax.lax.cond(ended, drawn, lambda w: w, w)
        norm = jnp.linalg.norm(w)  # 0 where no direction is left
        return (basis, w / jnp.where(norm == 0, 1, norm), largest), (alpha, jnp.where(ended, 0, beta))

    v = start / jnp.linalg.norm(start)
    empty = jnp.zeros((steps, start.size), start.dtype), v, jnp.zeros((), start.dtype)
    (basis, _, _), (alphas, betas) = jax.lax.scan(step, empty, jnp.arange(steps))
    return jnp.diag(alphas) + jnp.diag(betas[:-1], 1) + jnp.diag(betas[:-1], -1), basis


def top_eigenvalues(
    matrix: Matrix | Gradient,
    params: PyTree,
    state: PyTree,
    batch: Any,
    key,
    count: int = 1,
    *,
    steps: int | None = None,
) -> tuple[jax.Array, PyTree]:
    """The ``count`` largest eigenvalues, largest first, ``(count,)``, and their vectors, a tree with an axis before it.

    By ``steps`` products (by default ``2 count + 30``, at most P) of Lanczos from a random vector. The largest come
    first to rounding; how near they are is what ``‖A v − λ v‖`` says. ``count`` and ``steps`` are static; compile it
    where it is called often. Memory is that of ``steps`` vectors. Raises ValueError for more than there are.

    >>> import fnet
    >>> model, x, y = fnet.dense(1, bias=None), jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros((2, 1))
    >>> gradient, params = fnet.backprop(model, fnet.losses.half_squared_error), {"w": jnp.zeros((2, 1))}
    >>> values, vectors = top_eigenvalues(gradient, params, (), fnet.Batch(x, y), None, 2)
    >>> [f"{value:.3f}" for value in values], vectors["w"].shape
    (['14.933', '0.067'], (2, 2, 1))
    """
    require_counts("top_eigenvalues", count=count, steps=steps)
    at = flat("top_eigenvalues", matrix, params, state, batch, key)
    steps = min(at.size, 2 * count + 30) if steps is None else steps
    if not count <= steps <= at.size:
        raise ValueError(
            f"top_eigenvalues: count = {count}, steps = {steps}; expected count <= steps <= {at.size}, the entries"
        )
    start = jax.random.normal(at.key, at.entries.shape, at.entries.dtype) * at.entries
    tridiagonal, basis = lanczos(at, start, steps)
    values, inner = jnp.linalg.eigh(tridiagonal)
    return values[::-1][:count], jax.vmap(at.unravel)(inner.T[::-1][:count] @ basis)


def sharpness(matrix: Matrix | Gradient, *, steps: int = 20) -> Callable[..., jax.Array]:
    """``(params, state, batch, key) -> λ``, the largest eigenvalue of the Hessian by ``steps`` products.

    A monitor of `fnet.make_step`: ``{"sharpness": fnet.curvature.sharpness(gradient)}`` of each step's batch.
    """
    require_counts("sharpness", steps=steps)
    as_matrix("sharpness", matrix)

    def largest(params, state, batch, key):
        return top_eigenvalues(matrix, params, state, batch, key, steps=steps)[0][0]

    return largest


# --- by random vectors -----------------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean over draws, and its standard error."""

    value: jax.Array
    error: jax.Array


def signs(key: jax.Array, like: jax.Array) -> jax.Array:
    """A vector of ±1."""
    return jax.random.rademacher(key, like.shape, like.dtype)


def trace(
    matrix: Matrix | Gradient, params: PyTree, state: PyTree, batch: Any, key, *, draws: int = 32, sketch: int = 0
) -> Estimate:
    """``tr A`` as the mean of ``zᵀ A z`` over draws of signs z (Hutchinson); with a ``sketch`` S > 0 Hutch++.

    Hutch++ takes the trace over the span Q of S products ``A z`` as it is, ``tr Qᵀ A Q`` by S more, and estimates what
    is left: its error falls faster where few eigenvalues are large. Source: Hutchinson, 1990; Meyer et al.,
    arXiv:2010.09649. Raises ValueError for fewer than two draws, of which there is no error.
    """
    require_counts("trace", draws=draws)
    if draws < 2 or not isinstance(sketch, int) or sketch < 0:
        raise ValueError(f"trace: draws = {draws}, sketch = {sketch}; expected at least 2, and at least 0")
    at = flat("trace", matrix, params, state, batch, key)
    keys = jax.random.split(at.key, draws + sketch)
    exact, basis = jnp.zeros((), at.entries.dtype), None
    if sketch:
        seen = jax.lax.map(lambda key: at.product(signs(key, at.entries)), keys[draws:])
        basis = jnp.linalg.qr(seen.T)[0].T  # (S, P)
        exact = jnp.sum(basis * jax.lax.map(at.product, basis))

    def one(key):
        z = signs(key, at.entries) * at.entries
        if basis is not None:
            z = z - basis.T @ (basis @ z)
        return z @ at.product(z)

    found = jax.lax.map(one, keys[:draws])
    return Estimate(exact + found.mean(), found.std(ddof=1) / jnp.sqrt(jnp.asarray(draws, found.dtype)))


def diagonal(matrix: Matrix | Gradient, params: PyTree, state: PyTree, batch: Any, key, *, draws: int = 32) -> PyTree:
    """The diagonal of A, a tree like ``params``: the mean of ``z ⊙ A z`` over draws of signs z.

    Exact where A is diagonal. Source: Bekas et al., "An estimator for the diagonal of a matrix", 2007.
    """
    require_counts("diagonal", draws=draws)
    at = flat("diagonal", matrix, params, state, batch, key)

    def add(total, key):
        z = signs(key, at.entries)
        return total + z * at.product(z), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(at.entries), jax.random.split(at.key, draws))
    return at.unravel(total / draws)


class Spectrum(NamedTuple):
    """Eigenvalues and how much of all P each stands for, by draw: ``values`` and ``weights (draws, K)``, rows sum to 1.

    `fnet.report.plot_spectrum` draws it.
    """

    values: jax.Array
    weights: jax.Array

    def density(self, points, width) -> jax.Array:
        """How many of all eigenvalues lie about each of the ``points``, a share per unit, as normal curves."""
        away = (jnp.asarray(points)[:, None, None] - self.values[None]) / width
        heights = jnp.exp(-0.5 * jnp.square(away)) / (width * jnp.sqrt(2 * jnp.pi))
        return (heights * self.weights[None]).sum(2).mean(1)


def spectrum(
    matrix: Matrix | Gradient, params: PyTree, state: PyTree, batch: Any, key, *, steps: int = 64, draws: int = 4
) -> Spectrum:
    """The density of all eigenvalues, by stochastic Lanczos quadrature: ``steps`` products for each of the draws.

    Gauss' quadrature of ``zᵀ f(A) z / P`` has the eigenvalues of T for its nodes and the squares of the first entries
    of their vectors for weights. Source: Ubaru et al., "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature",
    2017; Ghorbani et al., arXiv:1901.10159. ``steps`` are P at most.
    """
    require_counts("spectrum", steps=steps, draws=draws)
    at = flat("spectrum", matrix, params, state, batch, key)
    steps = min(steps, at.size)

    def one(key):
        values, inner = jnp.linalg.eigh(lanczos(at, signs(key, at.entries) * at.entries, steps)[0])
        return values, jnp.square(inner[0])

    return Spectrum(*jax.lax.map(one, jax.random.split(at.key, draws)))


# --- Kronecker factors -----------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """Of a parameter ``(I, O)``: its block of the Fisher matrix is nearly ``inputs ⊗ outputs``."""

    inputs: jax.Array  # (I, I)
    outputs: jax.Array  # (O, O)


def kronecker_factors(model: Layer, loss: Loss, *, empirical: bool = False) -> Callable[..., dict[str, Factors]]:
    """``(params, state, batch, key) -> {path: Factors}`` of dense layers and convolutions: K-FAC's.

    With ``dw = Σ_n x_n d_nᵀ`` of an example and N positions, ``inputs = E[Σ_n x_n x_nᵀ]`` and ``outputs = E[Σ_n d_n
    d_nᵀ] / N``, means by the examples' weights; kernels are seen as ``(K I, O)``, and a bias has the inputs 1. Targets
    are drawn as the outputs say, by the key, as in `fisher`, or with ``empirical`` they are the batch's. Layers in
    `repeat` are told apart by their number. Of one example and N = 1 the block is exactly ``inputs ⊗ outputs``.
    Source: Martens and Grosse, arXiv:1503.05671; Grosse and Martens, arXiv:1602.01407.
    """
    check_engine("kronecker_factors", model, loss, None, by_hand=True)
    if not empirical:
        require_canonical("kronecker_factors", loss, "empirical=True")

    def factors(params, state, batch, key) -> dict[str, Factors]:
        batch = checked("kronecker_factors", batch, key)
        found: dict[str, Factors] = {}

        def keep(back: Back, dparams=None, dx=None):
            if back.layer.outer is None or is_rewritten():
                return dparams, dx
            for name, (x, d) in back.layer.outer(back.params, back.residuals, back.dy).items():
                if x.ndim == 3:  # of an embedding the inputs are one-hot rows
                    found["/".join((*back.path, name))] = of_leaf(x.astype(wide(x.dtype)), d.astype(wide(d.dtype)))
            return dparams, dx

        def of_leaf(x, d):  # d holds each example's share of the mean, which is divided out
            over = jnp.where(share == 0, 0, 1 / jnp.where(share == 0, 1, share))[:, None, None]
            own = share[:, None, None]
            inputs = jnp.einsum("bni,bnj->ij", x * own, x)
            return Factors(inputs, jnp.einsum("bno,bnp->op", d * over, d) / x.shape[1])

        with watch(lambda call, y: y, keep):
            y, _, residuals = forward_of(model, params, state, batch.inputs, key=key, train=True)
            if not empirical:
                own = stream(jax.random.key(0) if key is None else key, "kronecker_factors")
                batch = batch._replace(targets=CANONICAL[loss](own, jax.lax.stop_gradient(y)))
            share = shares(loss, y, batch)
            dy = loss_gradient(loss, y, batch, measure(loss, None, y, batch)["loss"].count)
            backward_of(model, params, residuals, dy)
            keep(Back((), model, params, residuals, dy))
        return found

    return factors
