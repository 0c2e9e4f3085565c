"""Windows of images: who sees whom, the bias by offsets, both backwards, Swin's blocks against torchvision."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.export import Rule, from_tensors, torch_names
from fnet.layers import attention, models, relative_positions_2d, stateless, windowed
from fnet.layers.children import apply, watch
from fnet.layers.initializers import normal
from fnet.types import LayerError
from tests.oracles import numerical_gradient


def in_numpy(p, x, heads, window, shift):
    """Attention within shifted windows, pixel by pixel: where it stands in the moved plane, and who is there too."""
    batch, height, width, channels = x.shape
    down, right = (shift if size > window else 0 for size in (height, width))
    y, size = np.zeros_like(x), channels // heads
    q, k, v = (x @ p[name]["w"] + p[name]["b"] for name in ("query", "key", "value"))

    def place(i, j):  # where it stands, its window, and whether it went round the edge
        i, j = (i - down) % height, (j - right) % width
        return (i, j), (i // window, j // window), (i >= height - down, j >= width - right)

    for b, i, j in np.ndindex(batch, height, width):
        (at, *home), seen, offsets = place(i, j), [], []
        for m, n in np.ndindex(height, width):
            (other, *there) = place(m, n)
            if there == home:
                seen.append((m, n))
                offsets.append((at[0] - other[0] + window - 1) * (2 * window - 1) + at[1] - other[1] + window - 1)
        for h in range(heads):
            own = slice(h * size, (h + 1) * size)
            s = np.array([q[b, i, j, own] @ k[b, m, n, own] for m, n in seen]) / np.sqrt(size)
            e = np.exp(s + p["relative"]["table"][offsets, h])
            y[b, i, j, own] = sum(w * v[b, m, n, own] for w, (m, n) in zip(e / e.sum(), seen, strict=True))
    return y @ p["out"]["w"] + p["out"]["b"]


# height, width, window, shift
IMAGES = {"whole": (4, 2, 2, 0), "shifted": (4, 6, 2, 1), "shifted along one axis": (3, 6, 3, 2)}


@pytest.mark.parametrize("name", IMAGES)
def test_attention_in_windows_is_its_formula_and_its_gradients_are_the_slopes(name, x64):
    height, width, window, shift = IMAGES[name]
    layer = windowed(
        attention(2, relative=relative_positions_2d(2, window, weights=normal(1.0)), bias=normal(1.0)),
        window,
        shift=shift,
    )
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 1, height, width, 4))
    params, state = layer.init(jax.random.key(0), jnp.asarray(x))
    params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape)), params)

    @jax.jit
    def run(params, x, dy):
        y, _, residuals = layer.forward(params, state, x)
        return (
            y,
            layer.backward(params, residuals, dy),
            jax.vjp(lambda *a: apply(layer, a[0], state, a[1]), params, x)[1](dy),
        )

    y, by_hand, by_autodiff = run(params, jnp.asarray(x), jnp.asarray(dy))
    formula = functools.partial(in_numpy, heads=2, window=window, shift=shift)
    p = jax.tree.map(np.asarray, params)
    np.testing.assert_allclose(y, formula(p, x), rtol=1e-11, atol=1e-12)
    for hand, auto in zip(jax.tree.leaves(by_hand), jax.tree.leaves(by_autodiff), strict=True):
        np.testing.assert_allclose(hand, auto, rtol=1e-11, atol=1e-12)  # the keys' bias has the gradient 0
    if name == "shifted":

        def total(table):
            return (formula({**p, "relative": {"table": table}}, x) * dy).sum()

        slope = numerical_gradient(total, p["relative"]["table"])
        np.testing.assert_allclose(by_hand[0]["relative"]["table"], slope, rtol=1e-6, atol=1e-7)


def test_windows_are_put_back_where_they_were_cut_from(key):
    x = jax.random.normal(key, (2, 4, 6, 3))
    same = stateless("same", lambda key, x: (), lambda params, x: (x, ()), lambda params, r, dy: ((), dy), several=True)
    for shift in (0, 1):
        layer = windowed(same, 2, shift=shift)
        y, _, residuals = layer.forward((), (), x)
        np.testing.assert_array_equal(y, x)
        np.testing.assert_array_equal(layer.backward((), residuals, x)[1], x)
    first = stateless(
        "first", lambda key, x: (), lambda params, x: (jnp.zeros_like(x).at[0, 0].set(1.0), ()), lambda *a: a
    )
    assert np.argwhere(apply(windowed(first, 2), (), (), x)[..., 0]).tolist() == [[0, 0, 0]]


def test_what_does_not_fit_in_windows_is_refused(key):
    with pytest.raises(ValueError, match="windowed: shift = 2; expected a whole number from 0 to 1, window less 1"):
        windowed(attention(1), 2, shift=2)
    with pytest.raises(ValueError, match="windowed: window = 0; expected at least 1"):
        windowed(attention(1), 0)
    layer = windowed(attention(1), 2)
    for shape in ((1, 4, 5, 2), (1, 4, 2), (1, 0, 2, 2)):
        with pytest.raises(LayerError, match=r"expected images \(B, H, W, C\) with sides that 2 divides, got shape"):
            layer.init(key, jnp.ones(shape))
    with pytest.raises(LayerError, match=r"expected outputs \(2, 4, 'features'\) of pool, got \(2, 2\)"):
        pool = stateless("pool", lambda key, x: (), lambda params, x: (x.mean(1), ()), lambda *a: a)
        windowed(pool, 2).forward((), (), jnp.ones((1, 2, 4, 2)))
    at = jnp.arange(5)[None]
    with pytest.raises(LayerError, match="expected at most 2² positions, got 5"):
        apply(relative_positions_2d(1, 2), {"table": jnp.ones((9, 1))}, (), (at, at))
    with pytest.raises(LayerError, match="expected ids from 0 to 8, got 9"):
        apply(relative_positions_2d(1, 2), {"table": jnp.ones((9, 1))}, (), (at[:, 3:], at[:, :2]))
    with pytest.raises(LayerError, match=r"expected images \(B, H, W, C\) of even sides, got shape \(1, 3, 4, 2\)"):
        models.patch_merging(4).init(key, jnp.ones((1, 3, 4, 2)))
    with pytest.raises(ValueError, match=r"drop_path = 0.1 with one block; expected two or more"):
        models.swin(3, blocks=(1,), heads=(1,), drop_path=0.1)
    with pytest.raises(ValueError, match="expected a number of each for every stage"):
        models.swin(3, blocks=(1, 1), heads=(1,))


def test_merged_patches_stand_by_columns_and_their_gradients_go_back_there(key):
    x = jnp.arange(16.0).reshape(1, 2, 4, 2)
    layer = models.patch_merging(3)
    params, state = layer.init(key, x)
    seen = {}

    def keep(call, y):
        seen["/".join(call.path)] = y
        return y

    with watch(keep):
        y, _, residuals = layer.forward(params, state, x)
    assert seen["merge"].tolist() == [[[[0, 1, 8, 9, 2, 3, 10, 11], [4, 5, 12, 13, 6, 7, 14, 15]]]]
    dy = jnp.arange(6.0).reshape(y.shape)
    by_autodiff = jax.vjp(lambda x: apply(layer, params, state, x), x)[1](dy)[0]
    np.testing.assert_allclose(layer.backward(params, residuals, dy)[1], by_autodiff, rtol=1e-4, atol=1e-5)


def test_depth_is_random_for_each_example_in_training_alone(key):
    x = jax.random.normal(key, (64, 2, 2, 4))
    block = models.swin_block(4, 1, window=2, drop_path=0.5)
    plain = models.swin_block(4, 1, window=2)
    params, state = block.init(key, x)
    without = [
        {name: {k: child for k, child in part.items() if k != "dropout_0"} for name, part in tree.items()}
        for tree in (params, state)
    ]
    np.testing.assert_array_equal(apply(block, params, state, x), apply(plain, without[0], without[1], x))
    y = block.forward(params, state, x, key=key, train=True)[0]
    stayed = int((y == x).all((1, 2, 3)).sum())
    assert abs(stayed - 16) < 5 * (64 * 0.25 * 0.75) ** 0.5  # both branches are dropped with probability 1/4


def test_swin_is_torchvisions_with_its_weights_and_so_are_its_gradients(key, x64):
    torch, torchvision = (pytest.importorskip(name) for name in ("torch", "torchvision"))
    theirs = torchvision.models.swin_transformer.SwinTransformer(
        patch_size=[2, 2], embed_dim=4, depths=[2, 2], num_heads=[1, 2], window_size=[2, 2], mlp_ratio=2.0,
        stochastic_depth_prob=0.0, num_classes=3,
    ).to(torch.float64)  # fmt: skip
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 8, 8, 3)), rng.standard_normal((2, 3))
    model = models.swin(3, features=4, blocks=(2, 2), heads=(1, 2), window=2, patch=2, expansion=2)
    params, state = model.init(key, jnp.asarray(x))

    modules = {
        "patches/project": "features.0.0.*",
        "patches/norm": "features.0.2.*",
        "norm": "norm.*",
        "head": "head.*",
    }
    modules |= {"merge_1/norm": "features.2.norm.*", "merge_1/project": "features.2.reduction.*"}
    for stage, j in np.ndindex(2, 2):
        ours, block = f"stage_{stage}/block_{j}", f"features.{2 * stage + 1}.{j}"
        modules |= {f"{ours}/attend/norm": f"{block}.norm1.*", f"{ours}/mlp/norm": f"{block}.norm2.*"}
        modules |= {f"{ours}/mlp/wide": f"{block}.mlp.0.*", f"{ours}/mlp/narrow": f"{block}.mlp.3.*"}
        at = f"{ours}/attend/attention"
        modules |= {f"{at}/out": f"{block}.attn.proj.*"}
        modules |= {f"{at}/relative": f"{block}.attn.relative_position_bias_table"}
        inward = ("query", "key", "value")
        for leaf, tensor in (("w", "weight"), ("b", "bias")):
            modules[f"{at}/{leaf}"] = Rule(
                tuple(f"{at}/{name}/{leaf}" for name in inward),
                (f"{block}.attn.qkv.{tensor}",),
                lambda *parts: (np.concatenate([part.T for part in parts]),),
                lambda tensor: tuple(part.T for part in np.split(tensor, 3)),
            )
    names = torch_names(params, modules)
    counted = {name: t for name, t in theirs.state_dict().items() if not name.endswith("relative_position_index")}
    like = jax.tree.map(lambda p: p.astype(float), params)
    params = from_tensors({name: t.numpy() for name, t in counted.items()}, like, names)

    y = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    y.backward(torch.tensor(dy))
    gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    expected = from_tensors(gradients, like, names)

    @jax.jit
    def run(params, x, dy):
        y, _, residuals = model.forward(params, state, x)
        return y, model.backward(params, residuals, dy)[0]

    ours, dparams = run(params, jnp.asarray(x), jnp.asarray(dy))
    np.testing.assert_allclose(ours, y.detach().numpy(), rtol=1e-11, atol=1e-12)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, e in zip(jax.tree.leaves(dparams), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-12 * largest)
