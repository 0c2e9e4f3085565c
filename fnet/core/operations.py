"""How many floating-point operations a program makes, counted as it is written."""

from __future__ import annotations

import math
from typing import Any

from fnet.core.interpret import STRUCTURE, is_float

MOVES = frozenset(  # primitives that move, name or generate numbers and operate on none
    """broadcast_in_dim reshape transpose squeeze slice dynamic_slice dynamic_update_slice concatenate stack pad rev
    gather iota copy convert_element_type bitcast_convert_type stop_gradient name split optimization_barrier scatter
    random_bits random_fold_in random_wrap random_unwrap random_split threefry2x32""".split()  # noqa: SIM905
)


def operations_of(eqn: Any) -> int:
    """Floating-point operations of one operation of a program."""
    name, sizes = eqn.primitive.name, [math.prod(v.aval.shape) for v in eqn.outvars if is_float(v.aval)]
    if name in STRUCTURE or name in MOVES or not sizes:
        return 0
    given = [v.aval for v in eqn.invars]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * sizes[0] * math.prod(given[0].shape[i] for i in contracted)
    if name == "conv_general_dilated":
        features = given[1].shape[eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * sizes[0] * math.prod(given[1].shape) // features
    if name.startswith("reduce_window"):
        return sizes[0] * math.prod(eqn.params["window_dimensions"])
    if name.startswith(("reduce_", "cum", "arg", "sort", "top_k")):
        return math.prod(given[0].shape)
    if name.startswith("scatter"):
        return math.prod(given[2].shape)
    return sizes[0]
