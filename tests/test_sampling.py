"""Samples on grids and affine grids: outputs and gradients against loops in NumPy, autodiff and torch; errors."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.gradcheck import check_layer
from fnet.layers.children import apply
from fnet.layers.sampling import affine_grid, grid_sample
from fnet.types import LayerError
from tests.oracles import assert_leaves_close, keys_kernel, numerical_gradient

METHODS, PADDINGS, CORNERS = ("nearest", "linear", "cubic"), ("zeros", "border", "reflection"), ("half_pixel", "align")
EVERY = [(2, *kind) for kind in itertools.product(METHODS, PADDINGS, CORNERS)] + [
    (1, "cubic", "reflection", "align"),
    (3, "linear", "reflection", "align"),
    (3, "nearest", "border", "half_pixel"),
]
SIZES = {1: (4,), 2: (4, 3), 3: (1, 3, 4)}
# entries, ties between two, borders and reflections of n = 3 and 4, all exact
KINKS = [-3.0, -2.0, -1.5, -1.25, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0]


def numpy_weights(g, n, method, padding, corners):
    """What a coordinate reads of the n entries of its axis; mirrors are walked one after another."""
    low, high = (-0.5, n - 0.5) if corners == "half_pixel" else (0, n - 1)

    def moved(p):
        if padding == "zeros" or n == 1:
            return p if padding == "zeros" else 0
        while padding == "reflection" and not low <= p <= high:
            p = 2 * low - p if p < low else 2 * high - p
        return min(max(p, 0), n - 1)

    p = ((g + 1) * n - 1) / 2 if corners == "half_pixel" else (g + 1) * (n - 1) / 2
    if method != "cubic":
        p = moved(p)
    w = np.zeros(n)
    for j in range(math.floor(p) - 1, math.floor(p) + 3):
        at = moved(j) if method == "cubic" else j
        if 0 <= at < n:
            if method == "nearest":
                w[int(at)] += round(p) == j  # Python rounds halves to even
            else:
                w[int(at)] += keys_kernel(p - j) if method == "cubic" else max(0.0, 1 - abs(p - j))
    return w


def numpy_matrix(grid, sizes, *kind):
    """``W (B, P, S)`` of a grid (B, P, D): ``y_b = W_b x_b``."""
    matrix = np.zeros((*grid.shape[:2], math.prod(sizes)))
    for b, p in np.ndindex(grid.shape[:2]):
        w = np.ones(1)
        for g, n in zip(grid[b, p, ::-1], sizes, strict=True):
            w = np.multiply.outer(w, numpy_weights(g, n, *kind)).ravel()
        matrix[b, p] = w
    return matrix


def draw(axes, places, seed=3):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, *SIZES[axes], 2)), rng.normal(size=(2, places, 2))
    return x, rng.uniform(-2.5, 2.5, (2, places, axes)), dy


def with_kinks(axes):
    """Inputs whose grid goes on, past the third place, at numbers where slopes jump."""
    x, grid, dy = draw(axes, 3 + len(KINKS))
    for a in range(axes):
        grid[:, 3:, a] = np.roll(KINKS, 5 * a)
    return x, grid, dy


def by_both(layer, given, dy):
    """Outputs and the inputs' gradients, by hand and by autodiff."""
    given, dy = jax.tree.map(jnp.asarray, given), jnp.asarray(dy)
    y, _, residuals = layer.forward((), (), given, train=True)
    z, pull = jax.vjp(lambda given: apply(layer, (), (), given), given)
    return (y, layer.backward((), residuals, dy)[1]), (z, pull(dy)[0])


# --- grid_sample -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axes", "method", "padding", "corners"), EVERY)
def test_outputs_and_gradients_equal_numpy_slopes_and_autodiff(axes, method, padding, corners, x64):
    x, grid, dy = with_kinks(axes)
    kind, sizes = (method, padding, corners), SIZES[axes]
    by_hand, autodiff = by_both(grid_sample(method, padding=padding, corners=corners), (x, grid), dy)
    w = numpy_matrix(grid, sizes, *kind)
    expected = w @ x.reshape(2, -1, 2), (w.swapaxes(1, 2) @ dy).reshape(x.shape)
    assert_leaves_close((by_hand[0], by_hand[1][0]), expected, 1e-14 * 4**axes)
    assert_leaves_close(by_hand, autodiff, 1e-13)

    def loss(some):  # of the places that are on no kink
        return (dy[:, :3] * (numpy_matrix(some, sizes, *kind) @ x.reshape(2, -1, 2))).sum()

    slopes = numerical_gradient(loss, grid[:, :3])
    # differences of h = 1e-6 are right to 1e-16 / h and, where the third derivative is no more than some tens, h²
    np.testing.assert_allclose(by_hand[1][1][:, :3], slopes, rtol=0, atol=1e-8 * 4**axes)
    assert (np.asarray(by_hand[1][1]) == 0).all() == (method == "nearest")


def test_an_axis_of_one_entry_is_that_entry_four_times_to_the_cubic(x64):
    x, grid = (
        np.array([2.0, 3.0]).reshape(2, 1, 1),
        np.tile(np.array([-3.0, -0.5, 0.25, 7.0])[None, :, None], (2, 1, 1)),
    )
    for padding, corners in itertools.product(PADDINGS, CORNERS):
        layer = grid_sample("cubic", padding=padding, corners=corners)
        y = apply(layer, (), (), (jnp.asarray(x), jnp.asarray(grid)))
        assert_leaves_close(y, numpy_matrix(grid, (1,), "cubic", padding, corners) @ x, 1e-14)


def test_what_is_not_finite_gives_nan_there_and_a_nan_that_is_not_read_stays_out(x64):
    x, grid, dy = with_kinks(2)
    x[:, 0, 0] = np.nan
    grid[:, :4] = [[np.nan, 9.0], [9.0, np.nan], [np.inf, 0.0], [0.0, -np.inf]]
    grid[:, 4:] = 0.5  # reads the last rows alone
    for method, padding in itertools.product(METHODS, PADDINGS):
        (y, (dx, _)), (_, (by_autodiff, _)) = by_both(grid_sample(method, padding=padding), (x, grid), dy)
        assert np.isfinite(dx).all() and np.isfinite(by_autodiff).all(), (method, padding)
        assert np.isnan(y[:, :4]).all() and np.isfinite(y[:, 4:]).all(), (method, padding)
        if padding == "zeros":
            y = apply(grid_sample(method), (), (), (jnp.asarray(x), jnp.full(grid.shape, -5.0)))
            assert (y == 0).all(), method


def transformer(grid_of, sample):
    """Images at a whole grid, and at a few of its places along three axes."""

    def run(theta, x):
        grid = apply(grid_of, (), (), theta)
        return tuple(apply(sample, (), (), (x, g)) for g in (grid, grid[:, 1:3, 0, None, None]))

    return run


def test_the_identity_reads_the_image_as_it_is_and_a_grid_may_have_any_axes(key):
    x = jax.random.normal(key, (2, 4, 3, 2))
    theta = jnp.tile(jnp.eye(2, 3)[None], (2, 1, 1))
    for corners in CORNERS:
        run = transformer(affine_grid((4, 3), corners=corners), grid_sample(corners=corners))
        whole, some = jax.jit(run)(theta, x)
        assert_leaves_close((whole, some), (x, x[:, 1:3, 0, None, None]), 1e-6)


def test_sixteen_bits_are_rounded_once_and_the_grid_may_be_wider(x64):
    x, grid, dy = draw(2, 5)
    x, grid, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(grid, jnp.float32), jnp.asarray(dy, jnp.bfloat16)
    layer = grid_sample(padding="reflection")
    run = jax.jit(lambda given, dy: by_both(layer, given, dy))
    rounded, by_autodiff = run((x, grid), dy)
    assert jax.tree.map(lambda a: a.dtype, rounded) == (x.dtype, (x.dtype, grid.dtype))
    exact, _ = run((x.astype(float), grid.astype(float)), dy.astype(float))
    for actual in (rounded, by_autodiff):
        assert_leaves_close(actual[1][1], exact[1][1], 2**-20)
        assert_leaves_close((actual[0], actual[1][0]), (exact[0], exact[1][0]), 2**-8)


def test_layers_run_under_jit_and_vmap(x64):
    x, grid, dy = (jnp.asarray(np.stack([a, 2 * a])) for a in draw(2, 3))
    layer = grid_sample(padding="border")

    @jax.jit
    def run(x, grid, dy):
        y, _, residuals = layer.forward((), (), (x, grid))
        return y, layer.backward((), residuals, dy)[1]

    mapped = jax.jit(jax.vmap(run))(x, grid, dy)
    for i in range(2):
        assert_leaves_close(jax.tree.map(lambda a, i=i: a[i], mapped), run(x[i], grid[i], dy[i]), 1e-13)


def test_the_audit_finds_nothing(key):
    x, grid, _ = draw(2, 3)
    report = check_layer(grid_sample(), (np.float32(x), np.float32(grid / 3)), key=key, precisions=(), cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"ok"}, report


# --- affine_grid -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corners", CORNERS)
@pytest.mark.parametrize("sizes", [(3,), (1, 4), (2, 3, 2)])
def test_an_affine_grid_and_its_gradient_equal_numpy_and_autodiff(sizes, corners, x64):
    axes, rng = len(sizes), np.random.default_rng(3)
    theta, dgrid = rng.normal(size=(2, axes, axes + 1)), rng.normal(size=(2, *sizes, axes))
    grid, dtheta = np.zeros(dgrid.shape), np.zeros(theta.shape)
    for at in np.ndindex(*sizes):
        c = [
            (2 * i + 1) / n - 1 if corners == "half_pixel" else 2 * i / (n - 1) - 1 if n > 1 else 0.0
            for i, n in zip(at, sizes, strict=True)
        ]
        place = np.array([*c[::-1], 1])
        for b in range(2):
            grid[b, *at] = theta[b] @ place
            dtheta[b] += np.outer(dgrid[b, *at], place)
    by_hand, autodiff = by_both(affine_grid(sizes, corners=corners), theta, dgrid)
    assert_leaves_close(by_hand, (grid, dtheta), 1e-14)
    assert_leaves_close(by_hand, autodiff, 1e-14)


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [2, 3])
def test_torch_samples_the_same(axes, x64):
    torch = pytest.importorskip("torch")
    x, grid, dy = with_kinks(axes)
    modes = {"nearest": "nearest", "linear": "bilinear"} | ({"cubic": "bicubic"} if axes == 2 else {})
    for method, padding, corners in itertools.product(modes, PADDINGS, CORNERS):
        leaf = torch.tensor(np.moveaxis(x, -1, 1).copy(), requires_grad=True)
        places = torch.tensor(grid.reshape(2, *(1,) * (axes - 1), -1, axes), requires_grad=True)
        out = torch.nn.functional.grid_sample(
            leaf, places, mode=modes[method], padding_mode=padding, align_corners=corners == "align"
        )
        out.backward(torch.tensor(np.moveaxis(dy, -1, 1).reshape(out.shape).copy()))
        y = np.moveaxis(out.detach().numpy().reshape(2, 2, -1), 1, -1)
        expected = y, (np.moveaxis(leaf.grad.numpy(), 1, -1), places.grad.numpy().reshape(grid.shape))
        by_hand, _ = by_both(grid_sample(method, padding=padding, corners=corners), (x, grid), dy)
        for found, wanted in zip(jax.tree.leaves(by_hand), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12, err_msg=f"{method}, {padding}, {corners}")


@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid:UserWarning")  # axes of one entry
@pytest.mark.parametrize("sizes", [(3, 4), (1, 2), (2, 3, 1)])
def test_torch_makes_the_same_affine_grids(sizes, x64):
    torch = pytest.importorskip("torch")
    axes, rng = len(sizes), np.random.default_rng(3)
    theta, dgrid = rng.normal(size=(2, axes, axes + 1)), rng.normal(size=(2, *sizes, axes))
    for corners in CORNERS:
        leaf = torch.tensor(theta, requires_grad=True)
        out = torch.nn.functional.affine_grid(leaf, [2, 1, *sizes], align_corners=corners == "align")
        out.backward(torch.tensor(dgrid))
        by_hand, _ = by_both(affine_grid(sizes, corners=corners), theta, dgrid)
        assert_leaves_close(by_hand, (out.detach().numpy(), leaf.grad.numpy()), 1e-13)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit_are_refused():
    for make, message in [
        (lambda: grid_sample("bilinear"), "grid_sample: method = 'bilinear'; expected 'nearest'"),
        (lambda: grid_sample(padding="reflect"), "grid_sample: padding = 'reflect'; expected 'zeros'"),
        (lambda: grid_sample(corners="asymmetric"), "grid_sample: corners = 'asymmetric'; expected 'half_pixel' or"),
        (lambda: affine_grid((2, 2), corners=True), "affine_grid: corners = True; expected 'half_pixel'"),
        (lambda: affine_grid(4), "affine_grid: sizes = 4; expected a tuple"),
        (lambda: affine_grid((1, 2, 3, 4)), r"affine_grid: sizes = \(1, 2, 3, 4\); expected a tuple"),
        (lambda: affine_grid((2, 0)), r"affine_grid: sizes\[1\] = 0; expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


def test_inputs_that_do_not_fit_are_refused():
    x, grid = jnp.ones((2, 4, 3, 1)), jnp.ones((2, 5, 2))
    for layer, given, message in [
        (grid_sample(), x, r"expected two arrays, \(x \(B, \*S, C\), grid \(B, \*M, D\)\), got float32\[2, 4, 3, 1\]"),
        (grid_sample(), (x, grid, grid), "expected two arrays"),
        (grid_sample(), (x, None), "expected two arrays"),
        (grid_sample(), (x[0, 0], grid), r"one to three spatial axes, got shape \(3, 1\)"),
        (grid_sample(), (x, grid[:1]), r"expected a grid \(2, \*M, 2\) for x \(2, 4, 3, 1\), got shape \(1, 5, 2\)"),
        (grid_sample(), (x, jnp.ones((2, 5, 3))), r"got shape \(2, 5, 3\)"),
        (grid_sample(), (x[:, :0], grid), r"cannot sample \(0, 3\): expected sizes of at least 1"),
        (grid_sample(), (x.astype(int), grid), "expected a floating x, got int32"),
        (grid_sample(), (x, grid.astype(int)), "expected a floating grid, got int32"),
        (affine_grid((2, 2)), jnp.ones((2, 2, 2)), r"expected theta \(B, 2, 3\), got shape \(2, 2, 2\)"),
        (affine_grid((2, 2)), jnp.ones((2, 3)), r"expected theta \(B, 2, 3\), got shape \(2, 3\)"),
        (affine_grid((2,)), jnp.ones((2, 1, 2), int), "expected a floating theta, got int32"),
    ]:
        for act in (lambda a, layer=layer: layer.init(None, a), lambda a, layer=layer: apply(layer, (), (), a)):
            with pytest.raises(LayerError, match=message):
                act(given)
