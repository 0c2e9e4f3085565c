"""Which leaves a mask takes: patterns, trees of booleans, functions; all else is refused by name."""

from __future__ import annotations

import re
from collections import OrderedDict, namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fnet.core.trees import Copies
from fnet.optimizers import adafactor, adam, adamw, chain, groups, lamb, lion, momentum, muon, sgd, transforms
from fnet.optimizers.which import decaying

Pair = namedtuple("Pair", "w b")
NESTED = {"dense_0": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, "head": [jnp.ones(2), (jnp.ones(2), jnp.ones(3))]}

# an optimizer of 0 gradients with a decay that takes a share of 0.05, of a mask
DECAYING = {
    "adamw": lambda mask: adamw(0.1, weight_decay=0.5, mask=mask),
    "sgd": lambda mask: sgd(0.1, weight_decay=0.5, mask=mask),
    "momentum": lambda mask: momentum(0.1, weight_decay=0.5, mask=mask),
    "lion": lambda mask: lion(0.1, weight_decay=0.5, mask=mask),
    "l2_decay": lambda mask: chain(transforms.l2_decay(0.5, mask), sgd(0.1)),
    "adafactor": lambda mask: adafactor(0.1, weight_decay=0.5, mask=mask),
}

MASKS = {
    "of leaves": (
        {"dense_0": {"w": True, "b": False}, "head": [False, (True, False)]},
        ["dense_0/w", "head/1/0"],
    ),
    "of NumPy's booleans": (
        {"dense_0": {"w": np.True_, "b": np.False_}, "head": [np.False_, (np.True_, np.False_)]},
        ["dense_0/w", "head/1/0"],
    ),
    "of branches": ({"dense_0": True, "head": [False, True]}, ["dense_0/b", "dense_0/w", "head/1/0", "head/1/1"]),
    "one for all": (True, ["dense_0/b", "dense_0/w", "head/0", "head/1/0", "head/1/1"]),
    "none": (False, []),
    "patterns": (["dense_0/*", "*/1/0"], ["dense_0/b", "dense_0/w", "head/1/0"]),
    "a set of patterns": ({"*/w"}, ["dense_0/w"]),
    "made of the parameters": (jax.tree.map(lambda p: p.ndim > 1, NESTED), ["dense_0/w"]),
    "a function": (lambda path, leaf: leaf.ndim > 1, ["dense_0/w"]),
    "a function of NumPy": (lambda path, leaf: np.array([leaf.ndim > 1])[0], ["dense_0/w"]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("optimizer", DECAYING)
def test_a_mask_decays_the_leaves_that_it_takes_and_no_other(optimizer, name):
    mask, expected = MASKS[name]
    built = DECAYING[optimizer](mask)
    zeros = jax.tree.map(jnp.zeros_like, NESTED)
    new, _ = jax.jit(built.update)(zeros, built.init(NESTED), NESTED)
    moved = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_leaves_with_path(new)
        if (leaf != 1).any()
    ]
    assert moved == expected
    for leaf in jax.tree.leaves(new):
        assert ((leaf == 1) | (jnp.abs(leaf - 0.95) < 1e-6)).all()


def test_the_rows_of_the_bug_report():
    optimizer = adamw(0.1, weight_decay=0.5, mask={"w": True, "b": False})
    params = {"w": jnp.ones(1), "b": jnp.ones(1)}
    new, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert new["b"] == 1 and abs(new["w"] - 0.95) < 1e-6


def test_trees_of_every_container_fit_their_parameters():
    w, b = jnp.ones(2), jnp.ones(3)
    for params, mask in (
        ([w, b], [True, False]),
        ((w, b), (True, False)),
        (Pair(w, b), Pair(True, False)),
        (OrderedDict(w=w, b=b), OrderedDict(w=True, b=False)),
        ({"blocks": Copies({"w": w, "b": b}, 2)}, {"blocks": {"w": True, "b": False}}),
        ({"blocks": Copies({"w": w, "b": b}, 2)}, {"blocks": Copies({"w": True, "b": False}, 2)}),
        ({"w": w, "none": None, "b": b}, {"w": True, "none": None, "b": False}),
    ):
        taken = decaying("sgd", mask, params)
        assert [leaf.size for leaf, on in zip(jax.tree.leaves(params), taken, strict=True) if on] == [2]


BAD = {
    "a number": (3, TypeError, "mask is 3; expected None, path patterns such as"),
    "numbers": ({"w": 1, "b": 0}, TypeError, "mask at b is 0; expected None, path patterns"),
    "an array": (jnp.array([True, False]), TypeError, r"mask is Array\(.*; expected None"),
    "a list of numbers": ([1, 2], TypeError, "mask at 0 is 1; expected None"),
    "text among booleans": ({"w": True, "b": "no"}, TypeError, "mask at b is 'no'; expected None"),
    "patterns among booleans": (["*/w", True], TypeError, r"mask at 0 is '\*/w'; expected None"),
    "nothing": ([], TypeError, r"mask = \[\] holds nothing; expected None"),
    "a function of the parameters": (
        lambda params: params,
        TypeError,
        r"mask is a function that does not take \(path, leaf\); expected .*: of a function of the parameters give what",
    ),
}
BAD_FOR_PARAMS = {
    "None for a leaf": ({"w": True, "b": None}, ValueError, "the mask is a tree of w, and the parameters of b, w"),
    "another tree": (
        {"kernel": True, "b": False},
        ValueError,
        "the mask is a tree of b, kernel, and the parameters of b, w",
    ),
    "a part of the tree": (
        {"w": True},
        ValueError,
        "the mask is a tree of w, and the parameters of b, w; expected one",
    ),
    "too deep": (
        {"w": {"x": True}, "b": False},
        ValueError,
        "the mask is a tree of b, w/x, and the parameters of b, w",
    ),
    "an unknown pattern": ("*/w", ValueError, r"the pattern '\*/w' matches no parameter; there are b, w"),
    "a function that answers None": (lambda path, leaf: None, TypeError, "the mask returned None of b; expected True"),
    "a function that answers a number": (lambda path, leaf: 1, TypeError, "the mask returned 1 of b; expected True"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("optimizer", DECAYING)
def test_what_is_no_mask_is_refused_where_it_is_given(optimizer, name):
    mask, kind, message = BAD[name]
    with pytest.raises(kind, match=rf"^{optimizer}: {message}"):
        DECAYING[optimizer](mask)


@pytest.mark.parametrize("name", BAD_FOR_PARAMS)
@pytest.mark.parametrize("optimizer", DECAYING)
def test_a_mask_that_does_not_fit_the_parameters_is_refused_by_init(optimizer, name):
    mask, kind, message = BAD_FOR_PARAMS[name]
    with pytest.raises(kind, match=rf"^{optimizer}: {message}"):
        DECAYING[optimizer](mask).init({"w": jnp.ones(2), "b": jnp.ones(3)})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: groups(["*/w", "*/b"], sgd(0.1)), r"groups: got ['*/w', '*/b']; expected a dict of path patterns"),
        (
            lambda: groups({("*/w", "*/b"): sgd(0.1)}),
            "groups: the pattern ('*/w', '*/b') is no text; expected one such",
        ),
        (lambda: groups({True: sgd(0.1)}), "groups: the pattern True is no text"),
        (lambda: groups({"*/w": 0.1}), "groups: what belongs to '*/w' is 0.1; expected an Optimizer"),
        (lambda: lamb(0.1, weight_decay=0.1, mask=1.5), "lamb: mask is 1.5; expected None"),
        (lambda: muon(0.1, weight_decay=0.1, mask=object), "muon: mask is a function that does not take (path, leaf)"),
    ],
)
def test_other_iterables_taken_for_patterns_are_refused(build, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        build()


def test_a_mask_without_a_decay_is_refused_whatever_it_is():
    for mask in ("*/w", {"w": True}, lambda path, leaf: True):
        with pytest.raises(ValueError, match="without weight_decay"):
            sgd(0.1, mask=mask)
    assert adam(0.1).init({"w": jnp.ones(2)}).step == 0
