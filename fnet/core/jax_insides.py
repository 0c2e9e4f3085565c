"""What fnet takes of jax beyond its stable interface, and what differs from release to release: all of it stands here.

Nothing compares version numbers: what a release has is found by trying it. Where none of the known forms is there, the
error says so, and this is the file to mend. Tried with jax 0.10.2, 0.11.2 and 0.12.0.1 (``make test-newest``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax._src.xla_bridge import backends_are_initialized
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun, jaxprs_in_params

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Var",
    "backends_are_initialized",
    "bind",
    "constant",
    "coordination",
    "cuda_tools",
    "jaxpr_as_fun",
    "jaxprs_in_params",
    "part_of",
    "quick_jit",
    "reset_cache",
    "same_bits_options",
    "scan_parts",
    "source_line",
    "transfers_meant",
    "value_of",
    "variables",
]


def transfers_meant(function: Callable) -> Callable:
    """The function, within which numbers go to the device and come back on purpose: jax_transfer_guard lets them."""

    @functools.wraps(function)
    def meant(*args, **kwargs):
        with jax.transfer_guard("allow"):
            return function(*args, **kwargs)

    return meant


def scan_parts(eqn: JaxprEqn) -> tuple[int, int]:
    """How many of a scan's inputs are constants of its body, and how many its carry; the rest has the steps first."""
    params = eqn.params
    if "num_consts" in params and "num_carry" in params:  # jax 0.10
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:  # from 0.11: a tree of (constants, carry, what is gone through)
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    raise NotImplementedError(
        f"jax {jax.__version__} describes a scan by {sorted(params)}; expected num_consts and num_carry, or ft_in: "
        "fnet/core/jax_insides.py does not know this release yet"
    )


def value_of(literal: Literal) -> Any:
    """A literal's value as an array or a NumPy number: it may be a Python number, or jax's own kind of one."""
    return constant(literal.val, literal.aval)


def constant(value: Any, aval: Any) -> Any:
    """A number or an array of a program in the dtype that it has there.

    It may be a Python number, which has none, or an array of NumPy that was closed over with 64 bits and counts as one
    of 32.
    """
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, np.ndarray | np.generic):
        return value if value.dtype == aval.dtype else np.asarray(value, aval.dtype)
    return aval.dtype.type(value) if isinstance(value, bool | int | float | complex) else value


def bind(eqn: JaxprEqn, inputs) -> list:
    """An equation's outputs by its own primitive; where it is traced again, it keeps its place in the user's code."""
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


def variables(atoms: Iterable) -> list:
    """Those of a program's inputs or outputs that are no literals."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def part_of(closed: ClosedJaxpr, eqns: Iterable[int], inputs: Sequence[Var], outputs: Iterable[int]) -> ClosedJaxpr:
    """The program of these equations and outputs, by their numbers, with the constants that it needs."""
    jaxpr = closed.jaxpr
    kept, returned = [jaxpr.eqns[i] for i in sorted(eqns)], [jaxpr.outvars[i] for i in outputs]
    read = set(variables([*returned, *(atom for eqn in kept for atom in eqn.invars)]))
    consts = {var: const for var, const in zip(jaxpr.constvars, closed.consts, strict=True) if var in read}
    about = jaxpr.debug_info.with_unknown_names()
    part = jaxpr.replace(constvars=[*consts], invars=[*inputs], outvars=returned, eqns=kept, debug_info=about)
    return ClosedJaxpr(part, [*consts.values()])


def source_line(eqn: JaxprEqn) -> str:
    """The line of the user's code that an equation comes from, ``file.py:12:4 (function)``."""
    return source_info_util.summarize(eqn.source_info)


def coordination() -> Any:
    """The client of the service by which processes find each other; None where there is one process alone."""
    return distributed.global_state.client


def cuda_tools(folder: str) -> dict[str, Any]:
    """The compiler's option that says where NVIDIA's assembler and library of functions are."""
    return {"xla_gpu_cuda_data_dir": folder}


# --- compiling quickly ------------------------------------------------------------------------------------------------

# for programs that run a few times: without the optimisations that take most of the time to compile on CPU
QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,  # until jax 0.10
    "xla_cpu_parallel_codegen_split_count": 1,  # one piece: several take longer together
}


def quick_jit(f: Callable) -> Callable:
    """`jax.jit` for programs that run a few times: on CPU without the optimisations, most of its compile time."""
    return jax.jit(f, compiler_options=dict(quick_options()) if jax.default_backend() == "cpu" else None)


@functools.cache
def quick_options() -> Mapping[str, Any]:
    """Those of ``QUICK`` that this release's compiler takes; tried once, some milliseconds."""

    def taken(**options) -> bool:
        try:
            jax.jit(lambda: 0, compiler_options=options).lower().compile()
        except jax.errors.JaxRuntimeError:  # no such compile option
            return False
        return True

    return QUICK if taken(**QUICK) else {name: QUICK[name] for name in QUICK if taken(**{name: QUICK[name]})}


def same_bits_options() -> dict[str, Any] | None:
    """`quick_options` for programs that act on each entry by itself: at level 1 they round as they do at the others.

    Level 0 does not make one operation of a product and a sum.
    """
    return {**quick_options(), "xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
