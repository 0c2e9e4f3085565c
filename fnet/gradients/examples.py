"""Gradients of each example by itself: all of them, their norms without them, their clipped mean, how they scatter.

    per_example(gradient)                   an engine whose gradients have a leading axis of B
    clip_per_example(gradient, max_norm)    an engine whose gradient is the mean of clipped ones, with noise or without
    gradient_moments(gradient)              mean and variance of each entry, and what follows from them
    gradient_noise(gradient)                what follows alone, by norms

Example i has the gradient ``gᵢ`` of its own objective, and counts ``wᵢ`` in the batch's: its weight, times what the
loss says that it counts (`Loss.count`), summed over its positions. An engine's gradient is ``Σ wᵢ gᵢ / Σ wᵢ``.

Legend: B batch, P entries of all parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from fnet.core.checks import described, require_counts, require_key
from fnet.core.numerics import is_key, stream, wide
from fnet.core.trees import Copies, named_leaves
from fnet.data.arrays import as_arrays
from fnet.gradients.engines import Gradient, accumulate, checked, counted, loss_gradient, measure
from fnet.layers.children import Back, Call, backward_of, forward_of, is_rewritten, unwatched, watch
from fnet.types import Batch, Layer, LayerError, Loss, Mean, PyTree

REMEDY = "take group_norm, layer_norm or rms_norm in its place"


def per_example(gradient: Gradient) -> Gradient:
    """The engine whose gradients have a leading axis of B: those of each example, as if it were the batch.

    By `jax.vmap` over batches of one, for any engine. Example i has the key ``fold_in(key, i)``; ``metrics`` and state
    are those of the batch. Memory is that of B gradients; `gradient_moments`, `gradient_noise` and `clip_per_example`
    need less. Raises ValueError where examples have no gradients of their own: for a loss that mixes them, such as
    `fnet.losses.info_nce`, and for a layer that does, such as `batch_norm`, which shows in its state.

    >>> import fnet
    >>> model = fnet.dense(1, bias=None)
    >>> x, y = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros((2, 1))
    >>> params, state = {"w": jnp.array([[1.0], [0.0]])}, ()
    >>> engine = per_example(fnet.backprop(model, fnet.losses.half_squared_error))
    >>> engine(params, state, fnet.Batch(x, y), None)[0]["w"][..., 0]
    Array([[ 1.,  2.],
           [ 9., 12.]], dtype=float32)
    """
    require_engine("per_example", gradient)

    def each(params, state, batch, key, *, scale=None):
        grads, state, metrics = apart(gradient, params, state, batch, key, scale)
        return grads, state, jax.tree.map(lambda a: a.sum(0), metrics)

    return each


def apart(gradient: Gradient, params, state, batch, key, scale=None) -> tuple[PyTree, PyTree, dict[str, Mean]]:
    """Gradients and metrics of batches of one, both with an axis of B, and the state."""
    batch = as_arrays(batch, "per_example: batch")
    refuse_mixing_loss(gradient)
    numbers = jnp.arange(jax.tree.leaves(batch)[0].shape[0])

    def one(example, number):
        alone = jax.tree.map(lambda a: a[None], example)
        own = None if key is None else jax.random.fold_in(key, number)
        return gradient(params, state, alone, own, scale=scale)

    refuse_mixing_layers(one, batch, numbers)
    return jax.vmap(one, out_axes=(0, None, 0))(batch, numbers)


def refuse_mixing_loss(gradient: Gradient) -> None:
    """Raise ValueError for an engine of a loss whose values depend on other examples."""
    made = getattr(gradient, "made_of", None)
    if made is not None and isinstance(made.loss, Loss) and made.loss.backward is not None:
        raise ValueError(
            "the loss mixes examples (its values depend on other examples' outputs), so none has a gradient of its "
            "own; expected one that looks at each by itself, such as fnet.softmax_cross_entropy"
        )


def refuse_mixing_layers(one: Callable, batch: PyTree, numbers: jax.Array) -> None:
    """Raise `LayerError` where the state after a batch of one depends on which example it was."""
    states = jax.eval_shape(jax.vmap(one), batch, numbers)[1]
    for i, (path, _) in enumerate(named_leaves(states)):
        alone = lambda *given, i=i: jax.tree.leaves(one(*given)[1])[i]  # noqa: E731
        try:
            jax.eval_shape(jax.vmap(alone, out_axes=None), batch, numbers)
        except ValueError:
            where = tuple(path.split("/")[:-1])
            raise LayerError(
                f"mixes the examples of a batch, so none has a gradient of its own: {REMEDY}", where
            ) from None


# --- norms, without the gradients ------------------------------------------------------------------------------------


class Norms(NamedTuple):
    """One pass by hand over a batch."""

    squares: dict[str, jax.Array]  # of each parameter: ‖∂(objective)/∂θ‖² of each example's part, (B,)
    share: jax.Array  # what each example counts of the whole, wᵢ / Σ w, (B,)
    grads: PyTree  # of the whole batch; a program that does not read them does not compute them
    residuals: PyTree
    dy: PyTree
    state: PyTree
    metrics: dict[str, Mean]


def is_by_hand(gradient: Gradient) -> bool:
    """Whether this is `fnet.backprop`'s, of layers and a loss that are known."""
    made = getattr(gradient, "made_of", None)
    return made is not None and made.by_hand


def norms_by_hand(who: str, gradient: Gradient, params, state, batch, key) -> Norms:
    """Squared norms of each example's part ``wᵢ gᵢ / Σ w`` of the gradient, by the residuals of one forward.

    Of a layer whose gradient is a sum of outer products (``Layer.outer``) they are had from these; of others the
    backward is run for each example with what the forward kept of it (by `jax.vmap`), so at most one layer's gradients
    are there B times. A layer whose noise is drawn anew in its backward is refused.
    """
    refuse_mixing_loss(gradient)
    if jax.tree.leaves(state):  # by which a layer that mixes examples is known
        jax.eval_shape(lambda *given: apart(gradient, *given), params, state, batch, key)
    model, loss, metrics, _ = gradient.made_of  # pyright: ignore[reportFunctionMemberAccess]
    batch = checked(who, batch, key)
    calls: dict[tuple[str, ...], Call] = {(): Call((), model, params, state, batch.inputs, key, True)}
    squares: dict[tuple[str, ...], dict[str, jax.Array]] = {}  # by layer, what is separate beneath each

    def seen(call: Call, y):
        calls[call.path] = call
        return y

    def separate(back: Back, dparams=None, dx=None):
        if is_rewritten():
            return dparams, dx
        path, n = back.path, share.shape[0]
        inner = [p for p in squares if p[: len(path)] == path and len(p) > len(path)]
        if any(leaf.shape[:1] != (n,) for leaf in jax.tree.leaves(back.dy)):
            for p in inner:  # a gradient that is added up over the examples: the layer around it keeps them apart
                del squares[p]
            return dparams, dx
        children = {p[len(path)] for p in inner if len(p) == len(path) + 1}
        own = back.params
        if isinstance(own, Copies) and children:  # each copy has been seen
            own = ()
        elif isinstance(own, dict):
            own = {name: leaf for name, leaf in own.items() if name not in children}
        squares[path] = of_layer(back, own) if jax.tree.leaves(own) else {}
        return dparams, dx

    def of_layer(back: Back, own) -> dict[str, jax.Array]:
        names = [name for name, _ in named_leaves(own)]
        products = {} if back.layer.outer is None else back.layer.outer(back.params, back.residuals, back.dy)
        found = {
            name: norms_of_sums(*products[name]) for name in names if name in products and is_short(*products[name])
        }
        if not {*names} <= {*found}:
            found = {**dict(named_leaves(by_vmap(back, calls[back.path]))), **found}
        return {name: found[name] for name in names}

    with watch(seen, separate):
        outputs, new_state, residuals = forward_of(model, params, state, batch.inputs, key=key, train=True)
        measured = measure(loss, metrics, outputs, batch)
        share = shares(loss, outputs, batch)
        dy = loss_gradient(loss, outputs, batch, measured["loss"].count)
        grads, _ = backward_of(model, params, residuals, dy)
        separate(Back((), model, params, residuals, dy))
    named = {"/".join((*path, name)): s for path, found in squares.items() for name, s in found.items()}
    return Norms(named, share, grads, residuals, dy, new_state, measured)


def shares(loss: Loss, outputs, batch: Batch) -> jax.Array:
    """``wᵢ / Σ w`` of each example, ``(B,)``; 0 where nothing counts."""
    batch, counts = counted(loss, batch)
    values = jax.eval_shape(loss.value, outputs, batch.targets)
    weights = jnp.ones(values.shape, wide(values.dtype))
    for factor in (batch.weights, counts):
        if factor is not None:
            factor = jnp.asarray(factor, weights.dtype)
            weights = weights * factor.reshape(factor.shape + (1,) * (weights.ndim - factor.ndim))
    own = weights.sum(tuple(range(1, weights.ndim)))
    total = own.sum()
    return own / jnp.where(total == 0, 1, total)


def is_short(x: jax.Array, d: jax.Array) -> bool:
    """Whether products of N positions with each other are fewer numbers than the gradients themselves."""
    return x.shape[1] == 1 or x.ndim == 2 or x.shape[1] * (x.shape[2] + d.shape[2]) < x.shape[2] * d.shape[2]


def norms_of_sums(x: jax.Array, d: jax.Array) -> jax.Array:
    """``‖Σ_n x_n d_nᵀ‖²`` of each example, of ``x (B, N, I)`` or integers ``(B, N)`` and ``d (B, N, O)``, ``(B,)``."""
    # ‖Σ_n x_n d_nᵀ‖² = Σ_(n, m) (x_n · x_m) (d_n · d_m), which for one n is ‖x‖² ‖d‖²
    d = d.astype(wide(d.dtype))
    if x.ndim == 2:
        alike = (x[:, :, None] == x[:, None, :]) & (x >= 0)[:, :, None]
        return jnp.where(alike, jnp.einsum("bno,bmo->bnm", d, d), 0).sum((1, 2))
    x = x.astype(d.dtype)
    if x.shape[1] == 1:
        return jnp.square(x).sum((1, 2)) * jnp.square(d).sum((1, 2))
    return (jnp.einsum("bni,bmi->bnm", x, x) * jnp.einsum("bno,bmo->bnm", d, d)).sum((1, 2))


def shares_of(metrics: dict[str, Mean]) -> jax.Array:
    """The same of what each batch of one has measured."""
    weights = metrics["loss"].count
    return weights / jnp.where(weights.sum() == 0, 1, weights.sum())


def by_vmap(back: Back, call: Call) -> PyTree:
    """``‖dparams‖²`` of each example by the layer's own backward, leaf by leaf, ``(B,)``.

    With what the forward kept of each example, or where that lies otherwise, by a forward of each.
    """
    flat, tree = jax.tree.flatten(back.residuals)
    axes = example_axes(back, call)
    if axes is None:
        return by_forwards(back, call)

    def one(own, dy):
        given = iter(own)
        residuals = [leaf if axis is None else next(given) for leaf, axis in zip(flat, axes, strict=True)]
        return squares_of(back, jax.tree.unflatten(tree, residuals), dy)

    # each keeps the axis, of length 1, where it was
    own = [jnp.expand_dims(leaf, axis + 1) for leaf, axis in zip(flat, axes, strict=True) if axis is not None]
    return jax.vmap(one, ([axis for axis in axes if axis is not None], 0))(own, back.dy)


def by_forwards(back: Back, call: Call) -> PyTree:
    """The same, of a layer that draws no noise: LayerError for one that does."""
    n = jax.tree.leaves(back.dy)[0].shape[0]
    leaves, tree = jax.tree.flatten(call.x)
    apart = [leaf.shape[:1] == (n,) for leaf in leaves]

    def one(own, dy):
        given = iter(own)
        x = jax.tree.unflatten(
            tree, [next(given)[None] if on else leaf for leaf, on in zip(leaves, apart, strict=True)]
        )
        try:
            residuals = call.layer.forward(call.params, call.state, x, key=None, train=call.train)[2]
        except LayerError as error:
            raise LayerError(
                "draws noise, and what it keeps of its forward cannot be taken apart by examples: take fnet.autodiff",
                back.path,
            ) from error
        return squares_of(back, residuals, dy)

    with unwatched():
        return jax.vmap(one)([leaf for leaf, on in zip(leaves, apart, strict=True) if on], back.dy)


def squares_of(back: Back, residuals: PyTree, dy: PyTree) -> PyTree:
    """Of one example, whose residuals are those of a batch of one."""
    with unwatched():
        dparams, _ = back.layer.backward(back.params, residuals, jax.tree.map(lambda d: d[None], dy))
    return jax.tree.map(square, dparams)


def example_axes(back: Back, call: Call) -> list[int | None] | None:
    """Which axis of each residual counts the examples, the one that is longer for a longer batch; None if none does."""
    n = jax.tree.leaves(back.dy)[0].shape[0]

    def shapes(length):
        def longer(a):
            return jax.ShapeDtypeStruct((length, *a.shape[1:]) if a.shape[:1] == (n,) else a.shape, a.dtype)

        def residuals(params, state, x):
            return call.layer.forward(params, state, x, key=call.key, train=call.train)[2]

        with unwatched():
            return jax.tree.leaves(jax.eval_shape(residuals, call.params, call.state, jax.tree.map(longer, call.x)))

    axes = []
    for leaf, more in zip(shapes(n), shapes(n + 1), strict=True):
        longer = [axis for axis, (a, b) in enumerate(zip(leaf.shape, more.shape, strict=True)) if a != b]
        if is_key(leaf) or len(longer) > 1 or any(leaf.shape[axis] != n for axis in longer):
            return None
        axes.append(longer[0] if longer else None)
    return axes


def added(squares: Iterable[jax.Array]) -> jax.Array:
    """Their sum, in the widest of their dtypes."""
    squares = [*squares]
    dtype = wide(*(s.dtype for s in squares))
    return sum((s.astype(dtype) for s in squares), jnp.zeros((), dtype))


def square(a: jax.Array) -> jax.Array:
    """``Σ a²`` in float32 at least."""
    return jnp.sum(jnp.square(a.astype(wide(a.dtype))))


# --- clipped ---------------------------------------------------------------------------------------------------------


def clip_per_example(
    gradient: Gradient, max_norm: ArrayLike, noise: ArrayLike | None = None, *, parts: int = 1
) -> Gradient:
    """The engine of ``Σ wᵢ gᵢ min(1, C / ‖gᵢ‖) / Σ wᵢ``, C the ``max_norm`` and ‖·‖ over all parameters: DP-SGD.

    With ``noise`` σ each entry has ``C σ ε / Σ wᵢ`` added, ε standard normal, drawn from the key. ``parts`` goes
    through the batch in so many parts, as `fnet.accumulate` does, and adds the noise once. ``metrics`` have ``clipped``
    besides, the share of the examples that were.

    Of `fnet.backprop` each norm comes from the residuals of the forward: of dense layers, convolutions and embeddings
    from the outer products that a gradient is the sum of (``Layer.outer``), of others by their backward for each
    example; then one backward adds up what is clipped. Any other engine goes by `per_example`. Errors are those of
    `per_example`, and by hand a layer that draws noise in its backward is refused.

    What of this is private is not ours to say: an accountant such as Google's dp-accounting takes σ, the share of the
    data that a batch is, and the number of steps. Source: Abadi et al., arXiv:1607.00133; norms without gradients,
    Goodfellow, arXiv:1510.01799, and Li et al., arXiv:2110.05679.
    """
    require_engine("clip_per_example", gradient)
    require_counts("clip_per_example", parts=parts)

    def clipped(params, state, batch, key, *, scale=None):
        by_norms = mean_by_hand if is_by_hand(gradient) else mean_of_all
        grads, state, metrics, factors, share = by_norms(params, state, batch, key, 1 if scale is None else scale)
        count = metrics["loss"].count
        metrics["clipped"] = Mean(jnp.where(factors < 1, share, 0).sum() * count, count)
        return grads, state, metrics

    def mean_by_hand(params, state, batch, key, scale):
        found = norms_by_hand("clip_per_example", gradient, params, state, batch, key)
        factors = limits(added(found.squares.values()), found.share)
        dy = jax.tree.map(lambda d: d * along(factors * scale, d), found.dy)
        grads, _ = backward_of(gradient.made_of.model, params, found.residuals, dy)  # pyright: ignore[reportFunctionMemberAccess]
        return grads, found.state, {**found.metrics}, factors, found.share

    def mean_of_all(params, state, batch, key, scale):
        grads, state, metrics = apart(gradient, params, state, batch, key)
        share = shares_of(metrics)
        factors = limits(added(jax.vmap(square)(g) for g in jax.tree.leaves(grads)), jnp.ones_like(share))
        by = factors * share * scale
        total = jax.tree.map(lambda g: (g * along(by, g)).sum(0, dtype=wide(g.dtype)).astype(g.dtype), grads)
        return total, state, jax.tree.map(lambda a: a.sum(0), metrics), factors, share

    def limits(squares, share):
        # share · C / ‖share · g‖ where that is below 1, and a NaN of a gradient; a root of 0 has no slope
        bound = share * max_norm
        above = squares > jnp.square(bound)
        below = jnp.where(jnp.isnan(squares), squares, 1)
        return jnp.where(above, bound / jnp.sqrt(jnp.where(above, squares, 1)), below)

    engine = clipped if parts == 1 else accumulate(clipped, parts)

    def noisy(params, state, batch, key, *, scale=None):
        if noise is not None:
            require_key("clip_per_example", key)
        grads, state, metrics = engine(params, state, batch, key, scale=scale)
        if noise is None:
            return grads, state, metrics
        deviation = jnp.asarray(noise) * max_norm * (1 if scale is None else scale) / metrics["loss"].count
        keys = stream(key, "clip_per_example")
        leaves, tree = jax.tree.flatten(grads)
        noised = [
            (g + deviation * jax.random.normal(jax.random.fold_in(keys, i), g.shape, wide(g.dtype))).astype(g.dtype)
            for i, g in enumerate(leaves)
        ]
        return jax.tree.unflatten(tree, noised), state, metrics

    return noisy


def along(factors: jax.Array, d: jax.Array) -> jax.Array:
    """``(B,)`` as an array to be multiplied with ``d (B, ...)``."""
    return factors.astype(d.dtype).reshape(factors.shape + (1,) * (d.ndim - 1))


# --- how they scatter ------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Of the gradients of a batch's examples; ``mean`` and ``variance`` are trees like the parameters."""

    mean: PyTree
    variance: PyTree  # of each entry, unbiased
    noise: Noise


class Noise(NamedTuple):
    """By leaf and, as ``all``, of the whole gradient; with ``tr Σ`` the sum of the entries' variances.

    - ``scale``: ``tr Σ / |G|²``, the batch size at which noise and signal are equal, the simple noise scale; ``|G|²``
      is the square of the true gradient, ``‖ḡ‖² − tr Σ / B``, so the scale is negative where that is all noise
    - ``signal``: ``‖ḡ‖ / √tr Σ``
    """

    scale: dict[str, jax.Array]
    signal: dict[str, jax.Array]


def gradient_moments(gradient: Gradient, *, parts: int = 1) -> Callable[..., Moments]:
    """``(params, state, batch, key) -> Moments``: mean and variance of the examples' gradients, and their noise scale.

    ``ḡ = Σ wᵢ gᵢ / Σ wᵢ`` and ``Σ wᵢ (gᵢ − ḡ)² / (Σ wᵢ − Σ wᵢ² / Σ wᵢ)``, which for equal weights is the sum over
    ``B − 1``. ``parts``, which must divide B, are gone through one after another, so that B / parts gradients are there
    at once. A monitor of `fnet.make_step` keeps what is returned of every step: take `gradient_noise`.
    Source: McCandlish et al., arXiv:1812.06162; errors are those of `per_example`.
    """
    require_engine("gradient_moments", gradient)
    require_counts("gradient_moments", parts=parts)

    def moments(params, state, batch, key) -> Moments:
        batch = as_arrays(batch, "gradient_moments: batch")
        n = jax.tree.leaves(batch)[0].shape[0]
        if n % parts:
            raise ValueError(f"gradient_moments: parts = {parts}; expected a divisor of the batch's {n} examples")

        def of(batch, index):
            own = key if parts == 1 or key is None else jax.random.fold_in(key, index)
            grads, _, metrics = apart(gradient, params, state, batch, own)
            weights = metrics["loss"].count
            total = weights.sum()
            share = weights / jnp.where(total == 0, 1, total)
            mean = jax.tree.map(lambda g: (g.astype(wide(g.dtype)) * along(share, g)).sum(0), grads)
            scatter = jax.tree.map(lambda g, m: (jnp.square(g - m[None]) * along(weights, g)).sum(0), grads, mean)
            return total, jnp.square(weights).sum(), mean, scatter

        def add(a, b):  # Chan, Golub and LeVeque: the squares about a common mean, without cancellation
            total = a[0] + b[0]
            share = b[0] / jnp.where(total == 0, 1, total)
            away = jax.tree.map(jnp.subtract, b[2], a[2])
            mean = jax.tree.map(lambda m, d: m + share * d, a[2], away)
            scatter = jax.tree.map(lambda s, r, d: s + r + jnp.square(d) * a[0] * share, a[3], b[3], away)
            return total, a[1] + b[1], mean, scatter

        cut = jax.tree.map(lambda a: a.reshape(parts, n // parts, *a.shape[1:]), batch)
        first = of(jax.tree.map(lambda a: a[0], cut), 0)
        rest = jax.tree.map(lambda a: a[1:], cut), jnp.arange(1, parts)
        (total, squares, mean, scatter), _ = jax.lax.scan(lambda a, given: (add(a, of(*given)), None), first, rest)
        effective = squares / jnp.where(total == 0, 1, total)
        variance = jax.tree.map(lambda s: s / (total - effective), scatter)
        traces = {path: v.sum() for path, v in named_leaves(variance)}
        norms = {path: jnp.square(m).sum() for path, m in named_leaves(mean)}
        return Moments(mean, variance, noise_of(traces, norms, effective / jnp.where(total == 0, 1, total)))

    return moments


def gradient_noise(gradient: Gradient) -> Callable[..., Noise]:
    """``(params, state, batch, key) -> Noise``: that of `gradient_moments`, by norms alone; a monitor of `make_step`.

    ``tr Σ = (Σ wᵢ ‖gᵢ‖² − Σ wᵢ ‖ḡ‖²) / (Σ wᵢ − Σ wᵢ² / Σ wᵢ)``. Of `fnet.backprop` no gradient of one example is made
    where a layer has a rule for its norm, as in `clip_per_example`. A layer that `repeat` runs counts as one leaf.
    """
    require_engine("gradient_noise", gradient)

    def noise(params, state, batch, key) -> Noise:
        if is_by_hand(gradient):
            found = norms_by_hand("gradient_noise", gradient, params, state, batch, key)
            share, dparams = found.share, found.grads
            # squares are (share ‖g‖)²: one share is divided out, and an example of no weight has none
            over = jnp.where(share == 0, 1, share)
            each = {path: (s / over).sum() for path, s in by_leaf(found.squares, dparams).items()}
        else:
            grads, _, metrics = apart(gradient, params, state, batch, key)
            share = shares_of(metrics)
            dparams = jax.tree.map(lambda g: (g.astype(wide(g.dtype)) * along(share, g)).sum(0), grads)
            each = {path: (jax.vmap(square)(g) * share).sum() for path, g in named_leaves(grads)}
        norms = {path: square(g) for path, g in named_leaves(dparams)}
        effective = jnp.square(share).sum()  # 1 / B for equal weights
        traces = {path: (each[path] - norms[path]) / (1 - effective) for path in norms}
        return noise_of(traces, norms, effective)

    return noise


def by_leaf(squares: dict[str, jax.Array], params: PyTree) -> dict[str, jax.Array]:
    """Squares by the paths of the parameters: those of the copies that `repeat` runs are added up."""
    found: dict[str, Any] = {path: jnp.zeros(()) for path, _ in named_leaves(params)}
    for path, s in squares.items():
        parts = path.split("/")
        while path not in found:  # less the number of a copy
            at = next(i for i, part in enumerate(parts) if part.isdecimal())
            parts = parts[:at] + parts[at + 1 :]
            path = "/".join(parts)
        found[path] = found[path] + s
    return found


def noise_of(traces: dict[str, jax.Array], norms: dict[str, jax.Array], effective) -> Noise:
    """From ``tr Σ`` and ``‖ḡ‖²`` by leaf, and ``1 / B``."""
    traces, norms = {**traces, "all": added(traces.values())}, {**norms, "all": added(norms.values())}
    signals = {path: norms[path] - traces[path] * effective for path in traces}
    return Noise(
        {path: traces[path] / signals[path] for path in traces},
        {path: jnp.sqrt(norms[path] / traces[path]) for path in traces},
    )


def require_engine(who: str, gradient) -> None:
    """Raise TypeError for what is no engine."""
    if not callable(gradient) or isinstance(gradient, Layer | Loss):
        raise TypeError(
            f"{who}: gradient is {described(gradient)}; expected a gradient engine, such as fnet.backprop(model, loss) "
            "makes one"
        )
