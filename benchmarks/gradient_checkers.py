"""Which checker catches which wrong gradient? fnet's audit beside jax's, chex's and a port of torch's, on one suite.

    make bench MODULE=benchmarks.gradient_checkers                       # the whole suite, about half an hour
    make bench MODULE=benchmarks.gradient_checkers ARGS="--every 10"     # every tenth case

Faulty gradients come from hand-derived backwards with one mistake each (`families`) and from right gradients that were
altered (`ALTERED`), at sizes from 3 to 100,000 entries a leaf, in float32 and float64. Right gradients include badly
scaled, saturated, kinked and deep functions and random ones. A peer says of the whole gradient that it passes or fails.

Printed: faults caught and false alarms of each checker; for fnet also whether it named the right leaf, the right layer
of a model, and the likely cause; then every case that it missed.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import fnet
from benchmarks.measuring import arguments, record, table


class Case(NamedTuple):
    """A function, a point, and a gradient of it: right (``fault`` is empty) or wrong at ``leaves``."""

    name: str
    f: Callable
    params: Any
    args: tuple
    gradient: Callable
    fault: str = ""
    leaves: frozenset[str] = frozenset()  # paths; empty: not one leaf but all that the mistake reaches
    cause: str = ""  # a regular expression for the likely cause
    x64: bool = False


# ---- hand-derived backwards, each with its mistakes: name -> (function, gradient(fault), shapes, {fault: cause}) ----


def dense_net(act, derivative):
    """``½ Σ (act(x w + b) v − y)² / B``."""

    def f(p, x, y):
        a = act(x @ p["w"] + p["b"])
        return ((a @ p["v"] - y) ** 2).sum() / (2 * x.shape[0])

    def gradient(fault):
        def g(p, x, y):
            z = x @ p["w"] + p["b"]
            a = act(z)
            dy = (a @ p["v"] - y) / (1 if fault == "missing 1/B" else x.shape[0])
            da = dy @ p["v"].T
            if fault == "missing activation derivative":
                dz = da
            elif fault == "derivative at a":
                dz = da * derivative(a)
            elif fault == "forgotten bias in z":
                dz = da * derivative(x @ p["w"])
            elif fault == "activation for its derivative":
                dz = da * a
            else:
                dz = da * derivative(z)
            db = dz.sum(0)
            if fault == "sum over the wrong axis":
                db = dz.sum(1)[: db.shape[0]]
            if fault == "forgotten bias":
                db = jnp.zeros_like(db)
            dv = (z if fault == "residual z for a" else a).T @ dy
            return {"w": x.T @ dz, "b": db, "v": dv}

        return g

    return f, gradient


DENSE_FAULTS = {
    "missing 1/B": r"missing 1/B",
    "missing activation derivative": r"missing derivative of",
    "derivative at a": r"at its output|wrong residual",
    "forgotten bias in z": r"wrong residual",
    "activation for its derivative": r"itself in the place",
    "sum over the wrong axis": r"wrong axis",
    "forgotten bias": r"zero",
    "residual z for a": r"wrong residual",
}


def normalised(p, x, y):
    mean = x.mean(0)
    centred = x - mean[None]
    inv = jax.lax.rsqrt((centred**2).mean(0) + 1e-5)
    out = p["gamma"][None] * (centred * inv[None]) + p["beta"][None]
    return (out * y).sum() / x.shape[0]


def normalisation(fault):
    """Batch normalisation of ``x w``, with the gradient by ``gamma``, ``beta`` and by ``w`` through the statistics."""

    def f(p, x, y):
        return normalised(p, x @ p["w"], y)

    def g(p, x, y):
        h = x @ p["w"]
        n = h.shape[0]
        mean = h.mean(0)
        centred = h - mean[None]
        eps = 1e-2 if fault == "wrong epsilon" else 1e-5
        inv = 1 / jnp.sqrt((centred**2).mean(0) + eps)
        xhat = centred * inv[None]
        dout = y / n
        dxhat = dout * p["gamma"][None]
        through_mean = dxhat.mean(0)[None] if fault != "dropped mean term" else 0.0
        through_var = xhat * (dxhat * xhat).mean(0)[None] if fault != "dropped variance term" else 0.0
        dh = inv[None] * (dxhat - through_mean - through_var)
        if fault == "variance term of the wrong sign":
            dh = inv[None] * (dxhat - through_mean + through_var)
        return {"w": x.T @ dh, "gamma": (dout * xhat).sum(0), "beta": dout.sum(0)}

    return f, g


NORM_FAULTS = {
    "wrong epsilon": r"epsilon",
    "dropped mean term": r"term through .* (missing|dropped)",
    "dropped variance term": r"term through .* (missing|dropped)",
    "variance term of the wrong sign": r"wrong sign",
}


def softmax_attention(fault):
    """``Σ y · softmax(x q (x k)ᵀ) x`` with the softmax Jacobian by hand."""

    def f(p, x, y):
        s = (x @ p["q"]) @ (x @ p["k"]).T
        e = jnp.exp(s - jax.lax.stop_gradient(s.max(-1, keepdims=True)))
        a = e / e.sum(-1, keepdims=True)
        return (a @ (x @ p["v"]) * y).sum()

    def g(p, x, y):
        q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
        a = jax.nn.softmax(q @ k.T, -1)
        da = y @ v.T
        inner = (da * a).sum(-1, keepdims=True)
        ds = a * (da - (0 if fault == "dropped term of the softmax Jacobian" else inner))
        if fault == "softmax Jacobian forgotten":
            ds = da
        dq = ds @ k
        dk = (ds if fault == "scores not transposed" else ds.T) @ q
        dv = a.T @ y
        grads = {"q": x.T @ dq, "k": x.T @ dk, "v": x.T @ dv}
        if fault == "swapped leaves":
            grads = {"q": grads["k"], "k": grads["q"], "v": grads["v"]}
        return grads

    return f, g


ATTENTION_FAULTS = {
    "dropped term of the softmax Jacobian": r"term through .* (missing|dropped)",
    "softmax Jacobian forgotten": r".",
    "scores not transposed": r".",
    "swapped leaves": r"swapped",
}


def recurrent(fault):
    """``h_t = tanh(x_t u + h_{t-1} w)``, ``Σ h_T · y``, by scan; back-propagation through time by hand."""

    def f(p, xs, y):
        def step(h, x):
            h = jnp.tanh(x @ p["u"] + h @ p["w"])
            return h, None

        h, _ = jax.lax.scan(step, jnp.zeros_like(y), xs)
        return (h * y).sum()

    def g(p, xs, y):
        hs = [jnp.zeros_like(y)]
        for x in xs:
            hs.append(jnp.tanh(x @ p["u"] + hs[-1] @ p["w"]))
        du, dw, dh = jnp.zeros_like(p["u"]), jnp.zeros_like(p["w"]), y
        last = len(xs)
        for t in reversed(range(last)):
            dz = dh * (1 - hs[t + 1] ** 2)
            du += xs[t].T @ dz
            dw += hs[t + 1 if fault == "BPTT off by one step" else t].T @ dz
            dh = dz @ p["w"].T
            if fault == "truncated BPTT" and t == last - 2:
                break
            if fault == "no gradient through time":
                dh = jnp.zeros_like(dh)
        return {"u": du, "w": dw}

    return f, g


RNN_FAULTS = {
    "BPTT off by one step": r".",
    "truncated BPTT": r"truncated",
    "no gradient through time": r"truncated",
}


def convolution(fault):
    """A 1-D convolution, three taps, padding one, then tanh; the weight's and the previous layer's gradients."""

    def pad(x):
        return jnp.pad(x, ((0, 0), (1, 1), (0, 0)))

    def conv(x, k):
        xp, t = pad(x), x.shape[1]
        return sum(xp[:, i : i + t] @ k[i] for i in range(3))

    def f(p, x, y):
        return (jnp.tanh(conv(x * p["scale"][None], p["k"])) * y).sum() / x.shape[0]

    def g(p, x, y):
        s = x * p["scale"][None]
        t = x.shape[1]
        dz = (1 - jnp.tanh(conv(s, p["k"])) ** 2) * y / x.shape[0]
        sp = jnp.pad(s, ((0, 0), (0, 2), (0, 0))) if fault == "padding off by one" else pad(s)
        dk = jnp.stack([jnp.einsum("bti,bto->io", sp[:, i : i + t], dz) for i in range(3)])
        dzp = pad(dz)
        order = range(3) if fault == "kernel not flipped" else range(2, -1, -1)
        ds = sum(dzp[:, i : i + t] @ p["k"][j].T for i, j in enumerate(order))
        return {"k": dk, "scale": (ds * x).sum(0)}

    return f, g


CONV_FAULTS = {"padding off by one": r"shifted", "kernel not flipped": r"."}


def dropped_out(fault):
    """Dropout with a fixed mask between two products."""

    def f(p, x, mask, y):
        h = (x @ p["w"]) * mask / 0.5
        return (h @ p["v"] * y).sum() / x.shape[0]

    def g(p, x, mask, y):
        h = (x @ p["w"]) * mask / 0.5
        dy = y / x.shape[0]
        dh = dy @ p["v"].T
        dw = x.T @ (dh / 0.5 if fault == "forgotten dropout mask" else dh * mask)
        return {
            "w": dw if fault == "forgotten dropout mask" else dw / (1 if fault == "missing 1/keep" else 0.5),
            "v": h.T @ dy,
        }

    return f, g


DROPOUT_FAULTS = {"forgotten dropout mask": r"missing derivative of mul", "missing 1/keep": r"factor 0.5"}


def tied(fault):
    """An embedding whose table is also the output projection, with softmax cross-entropy."""

    def f(p, tokens, labels):
        logits = jnp.tanh(p["table"][tokens] + p["b"][None]) @ p["table"].T
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    def g(p, tokens, labels):
        e = p["table"][tokens] + p["b"][None]
        h = jnp.tanh(e)
        logits = h @ p["table"].T
        n = tokens.shape[0]
        d = jax.nn.softmax(logits)
        d = (d - jax.nn.one_hot(labels, d.shape[1], dtype=d.dtype)) / n
        de = (d @ p["table"]) * (1 - h**2)
        as_output = d.T @ h
        as_input = jnp.zeros_like(p["table"]).at[tokens].add(de)
        if fault == "repeated token overwrites":
            as_input = jnp.zeros_like(p["table"]).at[tokens].set(de)
        table = as_output + as_input
        if fault == "tied weights: output use forgotten":
            table = as_input
        if fault == "tied weights: input use forgotten":
            table = as_output
        if fault == "tied weights: counted twice":
            table = as_input + 2 * as_output
        return {"table": table, "b": de.sum(0)}

    return f, g


TIED_FAULTS = {
    "tied weights: output use forgotten": r"term through .* (missing|dropped)",
    "tied weights: input use forgotten": r"term through .* (missing|dropped)",
    "tied weights: counted twice": r"term through .* factor 2",
    "repeated token overwrites": r".",
}


def draw(rng, *shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float64)


def families(rng, size: str, seed: int):
    """``name, (f, gradient(fault)), params, args, faults``, at a size."""
    small = size == "small"
    b, i, h, o = (5, 3, 4, 2) if small else (8, 300, 333, 3) if size == "large" else (7, 12, 12, 5)
    sigmoid = jax.nn.sigmoid
    acts = {
        "tanh": (jnp.tanh, lambda z: 1 - jnp.tanh(z) ** 2),
        "sigmoid": (sigmoid, lambda z: sigmoid(z) * (1 - sigmoid(z))),
        "softplus": (lambda z: jnp.log1p(jnp.exp(z)), sigmoid),
    }
    name = list(acts)[seed % 3]
    f, g = dense_net(*acts[name])
    params = {"w": draw(rng, i, h, scale=i**-0.5), "b": draw(rng, h, scale=0.5), "v": draw(rng, h, o)}
    yield (
        f"dense {name}",
        f,
        g,
        params,
        (draw(rng, max(b, h) if size != "large" else 333, i), None),
        DENSE_FAULTS,
        None,
    )
    del f, g
    x = draw(rng, b, i)
    f = normalisation("")[0]
    params = {"w": draw(rng, i, h, scale=0.3), "gamma": 1 + draw(rng, h, scale=0.2), "beta": draw(rng, h)}
    yield "batch norm", f, lambda fault: normalisation(fault)[1], params, (x, draw(rng, b, h)), NORM_FAULTS, None
    d = 4 if small else 128 if size == "large" else 8
    f = softmax_attention("")[0]
    params = {k: draw(rng, d, d, scale=d**-0.5) for k in "qkv"}
    args = draw(rng, b, d), draw(rng, b, d)
    yield "attention", f, lambda fault: softmax_attention(fault)[1], params, args, ATTENTION_FAULTS, None
    f = recurrent("")[0]
    params = {"u": draw(rng, i, d, scale=0.4), "w": draw(rng, d, d, scale=d**-0.5)}
    args = draw(rng, 6, b, i), draw(rng, b, d)
    yield "recurrent", f, lambda fault: recurrent(fault)[1], params, args, RNN_FAULTS, None
    f = convolution("")[0]
    t, c = (5, 3) if small else (64, 16) if size == "large" else (9, 5)
    params = {"k": draw(rng, 3, c, o, scale=0.4), "scale": draw(rng, t, c)}
    args = draw(rng, b, t, c), draw(rng, b, t, o)
    yield "convolution", f, lambda fault: convolution(fault)[1], params, args, CONV_FAULTS, None
    f = dropped_out("")[0]
    params = {"w": draw(rng, i, h), "v": draw(rng, h, o)}
    mask = (rng.random((b, h)) < 0.5).astype(np.float64)
    yield "dropout", f, lambda fault: dropped_out(fault)[1], params, (x, mask, draw(rng, b, o)), DROPOUT_FAULTS, None
    f = tied("")[0]
    vocabulary = 6 if small else 2000 if size == "large" else 15
    params = {"table": draw(rng, vocabulary, d, scale=0.5), "b": draw(rng, d)}
    tokens = rng.integers(0, vocabulary, b)
    tokens[1] = tokens[0]
    args = tokens, rng.integers(0, vocabulary, b)
    yield "tied", f, lambda fault: tied(fault)[1], params, args, TIED_FAULTS, None


# ---- right gradients, altered: kind -> (alter(g, rng), cause) ----


def entry(g, rng, value):
    at = tuple(rng.integers(n) for n in g.shape)
    out = g.copy()
    out[at] = value(g[at], np.abs(g).max())
    return out


def slice_zero(g, rng, axis):
    out = g.copy()
    out[(slice(None),) * axis + (rng.integers(g.shape[axis]),)] = 0
    return out


ALTERED: dict[str, tuple[Callable, str, int]] = {
    "zero": (lambda g, rng: 0 * g, r"zero", 0),
    "sign": (lambda g, rng: -g, r"sign", 0),
    "factor 0.5": (lambda g, rng: 0.5 * g, r"factor 0.5", 0),
    "factor 2": (lambda g, rng: 2 * g, r"factor 2", 0),
    "factor 1.05": (lambda g, rng: 1.05 * g, r"factor 1.05", 0),
    "factor 1.01": (lambda g, rng: 1.01 * g, r"factor 1.01", 0),
    "factor 1.001": (lambda g, rng: 1.001 * g, r"factor 1.001", 0),
    "one entry zero": (lambda g, rng: entry(g, rng, lambda v, m: 0.0), r"entry .* zero", 1),
    "one entry off by 1e-5": (lambda g, rng: entry(g, rng, lambda v, m: v + 1e-5 * m), r"entry", 1),
    "one row zero": (lambda g, rng: slice_zero(g, rng, 0), r"row .* zero", 2),
    "one column zero": (lambda g, rng: slice_zero(g, rng, 1), r"column .* zero", 2),
    "transposed": (lambda g, rng: g.T.copy(), r"transposed", 3),
    "rows permuted": (lambda g, rng: np.roll(g[rng.permutation(len(g))], 1, 0), r"permuted|shifted|reversed", 2),
    "columns reversed": (lambda g, rng: g[:, ::-1].copy(), r"reversed|permuted", 2),
    "constant added": (lambda g, rng: g + 0.1 * np.abs(g).max(), r"constant", 1),
    "noise of 1e-4": (lambda g, rng: g * (1 + 1e-4 * rng.standard_normal(g.shape)), r".", 1),
    "not a number": (lambda g, rng: entry(g, rng, lambda v, m: np.nan), r"not finite", 1),
}


def alter(right: Callable, leaf: str, kind: str, seed: int) -> Callable:
    """The right gradient with one leaf altered, as a function that runs in NumPy."""

    def gradient(*arguments):
        grads = dict(right(*arguments))
        g = np.asarray(grads[leaf])
        grads[leaf] = np.asarray(ALTERED[kind][0](g.astype(np.float64), np.random.default_rng(seed)), g.dtype)
        return grads

    return gradient


def changes(f, params, args, wrong: Callable, right: Callable) -> frozenset[str]:
    """The leaves that a mistake changes by a millionth of their largest entry: what a checker has to name."""
    with jax.enable_x64(True):
        a, b = jax.jit(right)(params, *args), wrong(params, *args)
    found = []
    for path in a:
        g, w = np.asarray(a[path], np.float64), np.asarray(b[path], np.float64)
        if not np.abs(w - g).max() < 1e-6 * np.abs(g).max():
            found.append(path)
    return frozenset(found)


def faulty_cases() -> list[Case]:
    """Every family with every mistake, and with alterations of every kind, at three sizes in two precisions."""
    cases, kinds = [], list(ALTERED)
    for k, (size, x64) in enumerate(
        [("small", True), ("small", False), ("middle", True), ("middle", False), ("large", True), ("large", False)]
    ):
        for seed in range(2 if size != "large" else 1):
            rng = np.random.default_rng([k, seed])
            for n, (name, f, g, params, args, mistakes, _) in enumerate(families(rng, size, seed)):
                if args[-1] is None:
                    args = (args[0], draw(rng, len(args[0]), params["v"].shape[1]))
                right = g("")
                at = f"{name}, {size}, {'float64' if x64 else 'float32'}, {seed}"
                cast = to_dtype(np.float64 if x64 else np.float32)
                for mistake, cause in mistakes.items():
                    wrong = g(mistake)
                    leaves = changes(f, params, args, wrong, right)
                    if leaves:
                        cases.append(
                            Case(f"{mistake}: {at}", f, cast(params), cast(args), wrong, mistake, leaves, cause, x64)
                        )
                for j in range(5):
                    kind = kinds[(5 * (len(cases) + n) + 7 * j) % len(kinds)]
                    leaf = list(params)[(j + n) % len(params)]
                    shape, least = params[leaf].shape, ALTERED[kind][2]
                    square = len(shape) == 2 and shape[0] == shape[1]
                    if (least == 3 and not square) or len(shape) < min(least, 2) or min(shape) < 2:
                        continue
                    wrong = alter(jax.jit(right), leaf, kind, j)
                    leaves = changes(f, params, args, wrong, right)
                    if leaves:
                        cases.append(
                            Case(
                                f"{kind} in {leaf}: {at}",
                                f,
                                cast(params),
                                cast(args),
                                wrong,
                                kind,
                                leaves,
                                ALTERED[kind][1],
                                x64,
                            )
                        )
    return cases


def to_dtype(dtype):
    def cast(tree):
        return jax.tree.map(lambda a: a.astype(dtype) if np.issubdtype(a.dtype, np.floating) else a, tree)

    return cast


# ---- right gradients that are hard to judge ----


def hard_functions(rng):
    """``name, f, params, args``: badly scaled, saturated, kinked, deep and flat functions."""
    x = draw(rng, 6, 4)
    yield (
        "badly scaled",
        lambda p, x: ((x @ p["small"]) ** 2).sum() * 1e12 + jnp.sin(p["big"] * 1e-6).sum(),
        {"small": draw(rng, 4, scale=1e-6), "big": draw(rng, 3, scale=1e6)},
        (x,),
    )
    yield (
        "terms of 1e-6 and 1e6",
        lambda p, x: (p["a"] @ x.T).sum() + (p["b"] ** 2).sum(),
        {"a": draw(rng, 4, scale=1e-6), "b": draw(rng, 4, scale=1e6)},
        (x,),
    )
    yield (
        "one tree, logs",
        lambda p, x: jnp.log(p["a"]).sum() + (jnp.log(p["b"]) * x[0]).sum(),
        {"a": np.abs(draw(rng, 4, scale=1e-6)) + 1e-9, "b": np.abs(draw(rng, 4, scale=1e6)) + 1.0},
        (x,),
    )
    yield "saturated tanh", lambda p, x: jnp.tanh(x @ p["w"] * 12).sum(), {"w": 1 + np.abs(draw(rng, 4))}, (np.abs(x),)
    yield "saturated sigmoid", lambda p, x: jax.nn.sigmoid(x @ p["w"] * 9).mean(), {"w": draw(rng, 4)}, (x,)
    yield (
        "saturated softmax",
        lambda p, x: -jax.nn.log_softmax(x @ p["w"] * 30)[:, 0].mean(),
        {"w": draw(rng, 4, 3)},
        (x,),
    )
    yield "relu", lambda p, x: (jax.nn.relu(x @ p["w"]) @ p["v"]).sum(), {"w": draw(rng, 4, 8), "v": draw(rng, 8)}, (x,)
    yield (
        "relu at zero",
        lambda p, x: (jax.nn.relu(x @ p["w"] + p["b"][None]) * 2.0).sum(),
        {"w": np.zeros((4, 3)), "b": np.zeros(3)},
        (x,),
    )
    yield (
        "maximum, tied",
        lambda p, x: jnp.maximum(p["a"], p["b"]).sum() + (p["a"] * x[0]).sum(),
        {"a": np.ones(4), "b": np.array([1.0, 2.0, 0.5, 1.0])},
        (x,),
    )
    yield "abs at zero", lambda p, x: jnp.abs(p["a"] * x[0]).sum(), {"a": np.array([0.0, 1.0, -2.0, 0.0])}, (x,)
    yield (
        "max pooling, ties",
        lambda p, x: (p["a"].reshape(2, 3).max(1) * x[0, :2]).sum(),
        {"a": np.array([1.0, 1.0, 0.0, 2.0, 3.0, 3.0])},
        (x,),
    )

    def deep(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return (x**2).sum()

    yield "deep chain", deep, {"w": draw(rng, 30, 4, 4, scale=0.6)}, (x,)
    yield "deep, vanishing", deep, {"w": draw(rng, 40, 4, 4, scale=0.05)}, (x,)
    yield (
        "bias before normalisation",
        lambda p, x: normalised({"gamma": p["g"], "beta": p["b"]}, x + p["c"][None], x**2),
        {"g": draw(rng, 4), "b": draw(rng, 4), "c": draw(rng, 4)},
        (x,),
    )
    yield "unused leaf", lambda p, x: (x @ p["a"]).sum() ** 2, {"a": draw(rng, 4), "unused": draw(rng, 3)}, (x,)
    yield "at a minimum", lambda p, x: ((p["a"] - 1.0) ** 2).sum(), {"a": np.ones(4)}, (x,)
    yield "large values", lambda p, x: 1e8 + (x @ p["a"]).sum(), {"a": draw(rng, 4)}, (x,)
    yield "log-sum-exp", lambda p, x: jax.nn.logsumexp(x @ p["w"] * 50, axis=1).mean(), {"w": draw(rng, 4, 5)}, (x,)
    yield "norm", lambda p, x: jnp.sqrt(((x @ p["w"]) ** 2).sum()), {"w": draw(rng, 4, 5)}, (x,)
    yield "sort and cumsum", lambda p, x: (jnp.cumsum(jnp.sort(p["a"])) * x[0]).sum(), {"a": draw(rng, 4)}, (x,)
    yield (
        "while loop",
        lambda p, x: jax.lax.fori_loop(0, 3, lambda i, a: jnp.sin(a) * 1.5, p["a"]).sum(),
        {"a": draw(rng, 4)},
        (x,),
    )
    yield (
        "determinant",
        lambda p, x: jnp.linalg.slogdet(p["w"] @ p["w"].T + jnp.eye(4))[1],
        {"w": draw(rng, 4, 4)},
        (x,),
    )


UNARY = [
    jnp.tanh,
    jnp.sin,
    jax.nn.sigmoid,
    jax.nn.softplus,
    jax.nn.gelu,
    jax.nn.relu,
    jnp.exp,
    jnp.abs,
    jax.nn.silu,
    jnp.arctan,
]


def random_function(rng):
    """A random expression of two leaves and data."""
    picks = [UNARY[k] for k in rng.integers(len(UNARY), size=4)]
    ops = rng.integers(4, size=3)

    def f(p, x):
        h = picks[0](x @ p["w"])
        for act, op in zip(picks[1:], ops, strict=True):
            other = act(p["b"] * 0.5)[None]
            h = [h + other, h * other, h / (1.0 + other**2), jnp.maximum(h, other)][op]
        centred = h - h.mean(0, keepdims=True)
        return jnp.sqrt((centred**2).mean() + 1e-3) + h.mean()

    return f, {"w": draw(rng, 4, 5, scale=0.4), "b": draw(rng, 5)}, (draw(rng, 6, 4),)


def right_cases() -> list[Case]:
    """Hand-derived backwards without a mistake, hard functions, random functions."""
    cases = []
    for k, (size, x64) in enumerate(
        [("small", True), ("small", False), ("middle", True), ("middle", False), ("large", True), ("large", False)]
    ):
        for seed in range(6 if size != "large" else 2):
            rng = np.random.default_rng([100 + k, seed])
            for name, f, g, params, args, _, _ in families(rng, size, seed):
                if args[-1] is None:
                    args = (args[0], draw(rng, len(args[0]), params["v"].shape[1]))
                cast = to_dtype(np.float64 if x64 else np.float32)
                cases.append(Case(f"{name}, {size}, {seed}", f, cast(params), cast(args), g(""), x64=x64))
    for seed in range(3):
        for name, f, params, args in hard_functions(np.random.default_rng([200, seed])):
            cases.append(Case(f"{name}, {seed}", f, params, args, jax.grad(f), x64=True))
    for seed in range(60):
        f, params, args = random_function(np.random.default_rng([300, seed]))
        cast = to_dtype(np.float64 if seed % 2 else np.float32)
        cases.append(Case(f"random function {seed}", f, cast(params), cast(args), jax.grad(f), x64=bool(seed % 2)))
    return cases


# ---- the checkers: each says whether it accepts a gradient ----


def with_rule(case: Case) -> Callable:
    """The function of its leaves with the claimed gradient as its custom rule: what the peers are made to check.

    They ask for the gradient at the point only, so that it may be computed beforehand, in NumPy too.
    """
    claimed = like(case.gradient(case.params, *case.args), case.params)

    @jax.custom_jvp  # since chex asks for the forward mode
    def f(*leaves):
        return case.f(dict(zip(case.params, leaves, strict=True)), *case.args)

    @f.defjvp
    def rule(leaves, tangents):
        return f(*leaves), sum((claimed[path] * t).sum() for path, t in zip(case.params, tangents, strict=True))

    return f


def like(grads, params):
    return {k: np.asarray(grads[k], params[k].dtype) for k in params}


def jax_check(case: Case, **options) -> bool:
    """`jax.test_util.check_grads`, reverse mode."""
    from jax.test_util import check_grads

    return accepts(lambda: check_grads(with_rule(case), tuple(case.params.values()), order=1, modes=["rev"], **options))


def chex_check(case: Case, **options) -> bool:
    """`chex.assert_numerical_grads`."""
    import chex

    return accepts(
        lambda: chex.assert_numerical_grads(with_rule(case), tuple(case.params.values()), order=1, **options)
    )


def torch_check(case: Case) -> bool:
    """A port of `torch.autograd.gradcheck`: central differences, |a - n| ≤ 1e-5 + 1e-3 |n|, step 1e-6, in float64.

    Up to 400 entries a leaf, drawn at random where there are more; gradcheck itself would take each.
    """
    with jax.enable_x64(True):
        cast = to_dtype(np.float64)
        params, args = cast(case.params), cast(case.args)
        f, claimed = jax.jit(lambda p: case.f(p, *args)), case.gradient(params, *args)
        rng = np.random.default_rng(0)
        for path, leaf in params.items():
            for k in rng.permutation(leaf.size)[:400]:
                up, down = leaf.copy(), leaf.copy()
                up.flat[k] += 1e-6
                down.flat[k] -= 1e-6
                n = float(f({**params, path: up}) - f({**params, path: down})) / 2e-6
                a = float(np.asarray(claimed[path]).flat[k])
                if not abs(a - n) <= 1e-5 + 1e-3 * abs(n):
                    return False
    return True


def accepts(check: Callable) -> bool:
    try:
        check()
    except AssertionError:
        return False
    return True


CHECKERS: dict[str, Callable[[Case], bool]] = {
    "jax check_grads": jax_check,
    "jax check_grads, eps 1e-4 tol 1e-5 in x64": lambda case: in_x64(jax_check, case, eps=1e-4, atol=1e-5, rtol=1e-5),
    "chex numerical_grads": lambda case: chex_check(case),
    "chex numerical_grads, atol 1e-6 in x64": lambda case: in_x64(chex_check, case, atol=1e-6, rtol=1e-6),
    "torch gradcheck (port)": torch_check,
}


def in_x64(check, case: Case, **options) -> bool:
    with jax.enable_x64(True):
        cast = to_dtype(np.float64)
        return check(case._replace(params=cast(case.params), args=cast(case.args)), **options)


def audit(case: Case):
    with jax.enable_x64(case.x64):
        return fnet.check_gradients(case.f, case.params, *case.args, gradient=case.gradient, precisions=(), cost=False)


# ---- layers inside models ----


def layer_trials(limit: int) -> tuple[int, int, list[str]]:
    """Models with one faulty layer: how often `check_model` names that layer as the first wrong one, and no other."""
    from fnet.layers import dense, gelu, leaky_relu, relu, serial, sigmoid, softplus, tanh

    rng, named, misses = np.random.default_rng(7), 0, []
    mistakes: list[Callable] = [
        lambda grads, dx: (grads, 1.01 * dx),
        lambda grads, dx: (grads, -dx),
        lambda grads, dx: (jax.tree.map(lambda g: 0.5 * g, grads), dx),
        lambda grads, dx: (grads, dx.at[:, jnp.abs(dx).sum(0).argmax()].set(0)),
        lambda grads, dx: (jax.tree.map(lambda g: g.at[0].multiply(1.001), grads), dx),
    ]
    for trial in range(limit):
        acts = [tanh(), sigmoid(), relu(), gelu(), softplus(), leaky_relu()]
        layers = []
        for width in rng.integers(3, 9, size=int(rng.integers(2, 5))):
            layers += [dense(int(width)), acts[rng.integers(len(acts))]]
        layers.append(dense(3))
        at = int(rng.integers(len(layers)))
        has_parameters = at % 2 == 0
        mistake = mistakes[trial % 5 if has_parameters else (0, 1, 3)[trial % 3]]

        def backward(params, residuals, dy, right=layers[at], mistake=mistake):
            return mistake(*right.backward(params, residuals, dy))

        wrong = ("faulty", layers[at]._replace(backward=backward))
        model = serial(*layers[:at], wrong, *layers[at + 1 :])
        batch = fnet.Batch(draw(rng, 6, 4).astype(np.float32), rng.integers(0, 3, 6))
        report = fnet.check_model(
            model, fnet.softmax_cross_entropy, batch, key=jax.random.key(trial), precisions=(), cost=False
        )
        blamed = {leaf.path.split("/")[0] for leaf in report.leaves if leaf.verdict == "wrong"}
        if report.first_wrong.startswith("faulty/") and blamed == {"faulty"}:
            named += 1
        else:
            misses.append(f"model {trial}: layer {at} of {[layer.name for layer in layers]}, blamed {sorted(blamed)}")
    return named, limit, misses


def main() -> None:
    parser = arguments(__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th case")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-peers", action="store_true", help="fnet alone")
    args = parser.parse_args()
    faulty = [case for case in faulty_cases()[:: args.every] if args.only in case.name]
    right = [case for case in right_cases()[:: args.every] if args.only in case.name]
    print(f"{len(faulty)} faulty gradients of {len({case.fault for case in faulty})} kinds, {len(right)} right ones")
    checkers = {} if args.no_peers else dict(CHECKERS)
    counts = {name: [0, 0, 0] for name in checkers}
    caught = leaves = causes = alarms = 0
    complaints, start = [], time.perf_counter()
    for case in faulty:
        report = audit(case)
        wrong = {leaf.path for leaf in report.leaves if leaf.verdict == "wrong"}
        said = "; ".join(leaf.cause for leaf in report.leaves if leaf.verdict == "wrong")
        caught += bool(wrong)
        leaves += wrong == case.leaves
        causes += bool(re.search(case.cause, said)) and "no pattern" not in said
        if wrong != case.leaves:
            verdicts = {leaf.path: leaf.verdict for leaf in report.leaves}
            complaints.append(f"LEAF  {case.name}: expected {sorted(case.leaves)}, got {verdicts}")
        elif not re.search(case.cause, said) or "no pattern" in said:
            complaints.append(f"CAUSE {case.name}: {said}")
        for name, check in checkers.items():
            run(check, case, counts[name], 0)
    for case in right:
        report = audit(case)
        if not report.ok:
            alarms += 1
            complaints.append(f"ALARM {case.name}: {[(leaf.path, leaf.describe()) for leaf in report.leaves]}")
        for name, check in checkers.items():
            run(check, case, counts[name], 1)
    seconds = time.perf_counter() - start
    print(f"\n{'checker':<44}{'caught':>12}{'false alarms':>14}{'did not run':>13}")
    print(f"{'fnet.check_gradients':<44}{f'{caught}/{len(faulty)}':>12}{f'{alarms}/{len(right)}':>14}{0:>13}")
    for name, (hits, false, failed) in counts.items():
        print(f"{name:<44}{f'{hits}/{len(faulty)}':>12}{f'{false}/{len(right)}':>14}{failed:>13}")
    print(f"\nfnet: right leaves named {leaves}/{len(faulty)}, likely cause right {causes}/{len(faulty)}")
    named, trials, misses = layer_trials(max(2, 40 // args.every) if not args.only else 0)
    print(f"fnet.check_model: right layer named, and it alone, in {named}/{trials} models with one faulty layer")
    print(f"{seconds:.0f} s\n")
    print("\n".join(complaints + misses))
    told = {"fnet.check_gradients": (caught, alarms, 0), **counts}
    tables = [
        table(f"{what} of {among}", {name: [float(row[k])] for name, row in told.items()}, unit="cases")
        for k, (what, among) in enumerate(
            (
                ("caught", f"{len(faulty)} faults"),
                ("false alarms", f"{len(right)} right gradients"),
                ("did not run", f"all {len(faulty) + len(right)}"),
            )
        )
    ]
    record(args.json, "gradient_checkers", tables, also=() if args.no_peers else ("chex",))


def run(check: Callable, case: Case, count: list[int], kind: int) -> None:
    """Count a catch (of a fault) or a false alarm (of a right gradient)."""
    try:
        with jax.enable_x64(case.x64):
            count[kind] += not check(case)
    except Exception as error:  # a peer that cannot run a case: counted, and said
        count[2] += 1
        if count[2] == 1:
            print(f"did not run: {case.name}: {type(error).__name__}: {str(error).splitlines()[0][:150]}")


if __name__ == "__main__":
    main()
