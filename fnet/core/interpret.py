"""Programs as data: walk through a traced function, or evaluate it with a hand on every operation.

`jax.make_jaxpr` gives a function's program, a list of equations. What fnet does with one (give an intermediate its
gradient, ignore custom rules, find a kink, measure rounding) are rules for `evaluate`, a few lines each.

A site is an equation's position: its index, preceded by those of the calls, loops and branches that it stands in.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fnet.core.jax_insides import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    bind,
    constant,
    jaxprs_in_params,
    scan_parts,
    value_of,
    variables,
)

Site = tuple[int, ...]
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
CALLS = (*CUSTOM, "jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint")
STEP = "t="  # and its number: the scope of what a step of an unrolled scan does
STRUCTURE = (*CALLS, "scan", "while", "cond")  # what `evaluate` enters: the operations within are seen one by one


class Place(NamedTuple):
    """An equation where it stands."""

    site: Site
    eqn: JaxprEqn
    lengths: tuple[int, ...]  # of the scans around it, the outermost first
    calls: tuple[JaxprEqn, ...]  # around it, the outermost first
    in_while: bool


def body_of_call(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The program that a call runs, None where the equation is no call."""
    if eqn.primitive.name not in CALLS:
        return None
    body = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
    return body if body is None or isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, ())


def name_of_call(eqn: JaxprEqn) -> str:
    """The name of the function that is called, as its author wrote it."""
    if "name" in eqn.params:
        return str(eqn.params["name"])
    body = body_of_call(eqn)
    info = body.jaxpr.debug_info if body is not None else None
    return (info.func_name if info is not None else "") or eqn.primitive.name


def defined_in_jax(eqn: JaxprEqn) -> bool:
    """Whether a custom rule is jax's own, as that of `jax.nn.relu` is."""
    body = body_of_call(eqn)
    info = body.jaxpr.debug_info if body is not None else None
    home = str(Path(jax.__file__).parent) + os.sep
    # of jax's functions only those with a jvp: a custom vjp may be the user's own around jnp.tanh, or custom_gradient
    return eqn.primitive.name == "custom_jvp_call" and info is not None and (info.func_filename or "").startswith(home)


def walk(jaxpr: Jaxpr, site: Site = (), lengths=(), calls=(), in_while: bool = False) -> Iterator[Place]:
    """Every equation of a program and of the programs within it, in order."""
    for i, eqn in enumerate(jaxpr.eqns):
        yield Place((*site, i), eqn, lengths, calls, in_while)
        inner_lengths = (*lengths, eqn.params["length"]) if eqn.primitive.name == "scan" else lengths
        inner_calls = (*calls, eqn) if eqn.primitive.name in CALLS else calls
        for k, inner in enumerate(jaxprs_in_params(eqn.params)):
            inner_site = (*site, i, k) if eqn.primitive.name in ("cond", "while") else (*site, i)
            yield from walk(inner, inner_site, inner_lengths, inner_calls, in_while or eqn.primitive.name == "while")


def evaluate(
    closed: ClosedJaxpr,
    inputs,
    *,
    rule: Callable | None = None,
    observe: Callable | None = None,
    extras: Mapping[Any, Any] | None = None,
    opened: Callable[[Site, JaxprEqn], bool] = lambda site, eqn: True,
    unroll: bool = False,
) -> tuple[list, jax.Array | None]:
    """A program's outputs, and the sum of what ``observe`` returned on the way; None where that was nothing.

    - ``rule(site, eqn, inputs, extras)`` gives the outputs of an equation in the place of its own, or None; at the
      beginning of each step of a scan it is asked with ``eqn=None`` for the carry;
    - ``observe(site, eqn, inputs, outputs, calls)`` gives a uint32 scalar, a mark of what happened, or None;
    - ``extras`` are arrays for the rule, by site; one that belongs in a scan has the steps along its first axis, and
      the rule gets the step's;
    - calls, scans and branches are entered where ``opened(site, eqn)`` holds, else bound as they stand; a custom rule
      that is entered is forgotten. With ``unroll`` loops and branches run in Python: rule and observer see values.
    """
    run = _Run(rule, observe, opened, unroll)
    return run.jaxpr(closed.jaxpr, closed.consts, list(inputs), dict(extras or {}), (), ())


class _Run(NamedTuple):
    """The arguments of one evaluation that stay the same all the way down."""

    rule: Callable | None
    observe: Callable | None
    opened: Callable
    unroll: bool

    @property
    def nothing(self) -> jax.Array | None:
        """The mark of what nothing has happened in, where branches or steps must give one alike."""
        return None if self.observe is None else jnp.uint32(0)

    def jaxpr(self, jaxpr, consts, inputs, extras, site, calls):
        values: dict = {}
        values.update({var: constant(value, var.aval) for var, value in zip(jaxpr.constvars, consts, strict=True)})
        values.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom):
            return value_of(atom) if isinstance(atom, Literal) else values[atom]

        last = {atom: i for i, eqn in enumerate(jaxpr.eqns) for atom in variables(eqn.invars)}
        last.update({atom: len(jaxpr.eqns) for atom in variables(jaxpr.outvars)})
        mark = None
        for i, eqn in enumerate(jaxpr.eqns):
            outputs, inner = self.equation(eqn, [read(atom) for atom in eqn.invars], extras, (*site, i), calls)
            mark = added(mark, inner)
            values.update(zip(eqn.outvars, outputs, strict=True))
            for atom in set(variables([*eqn.invars, *eqn.outvars])):
                if last.get(atom, i) <= i:
                    values.pop(atom, None)  # so that an eager evaluation holds no more than it needs
        return [read(atom) for atom in jaxpr.outvars], mark

    def equation(self, eqn, inputs, extras, site, calls):
        outputs = None if self.rule is None else self.rule(site, eqn, inputs, extras)
        mark = None
        if outputs is None:
            structured = getattr(self, f"_{eqn.primitive.name}", None)
            body = body_of_call(eqn)
            if body is not None and self.opened(site, eqn):
                inner = (*calls, eqn)
                outputs, mark = self.jaxpr(body.jaxpr, body.consts, inputs, extras, site, inner)
            elif structured is not None and self.opened(site, eqn):
                outputs, mark = structured(eqn, inputs, extras, site, calls)
            else:
                outputs = bind(eqn, inputs)
        seen = None if self.observe is None else self.observe(site, eqn, inputs, outputs, calls)
        return outputs, added(mark, seen)

    def _scan(self, eqn, inputs, extras, site, calls):
        body, (n_consts, n_carry) = eqn.params["jaxpr"], scan_parts(eqn)
        length, reverse = eqn.params["length"], eqn.params["reverse"]
        consts, carry, xs = inputs[:n_consts], inputs[n_consts : n_consts + n_carry], inputs[n_consts + n_carry :]
        within = [k for k in extras if k[: len(site)] == site]  # a list, since sites of unlike kinds do not sort
        slices = [extras[k] for k in within]

        def step(carry, x):
            x, extra = x
            here = {**extras, **dict(zip(within, extra, strict=True))}
            begun = None if self.rule is None else self.rule(site, None, carry, here)
            carry = carry if begun is None else begun
            outputs, mark = self.jaxpr(body.jaxpr, body.consts, [*consts, *carry, *x], here, site, calls)
            return outputs[:n_carry], (outputs[n_carry:], mark)

        if not self.unroll:
            carry, (ys, marks) = jax.lax.scan(
                step, carry, (xs, slices), length=length, reverse=reverse, unroll=eqn.params["unroll"]
            )
            return [*carry, *ys], None if marks is None else (marks * weights(length)).sum(dtype=jnp.uint32)
        rows: list = [None] * length
        for t in reversed(range(length)) if reverse else range(length):
            with jax.named_scope(f"{STEP}{t}"):
                carry, (rows[t], _) = step(carry, ([x[t] for x in xs], [v[t] for v in slices]))
        if length == 0:
            ys = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in eqn.outvars[n_carry:]]
        else:
            ys = [jnp.stack([row[k] for row in rows]) for k in range(len(rows[0]))]
        return [*carry, *ys], None

    def _cond(self, eqn, inputs, extras, site, calls):
        index, *operands = inputs

        def branch(k, body):
            def run(operands):
                outputs, mark = self.jaxpr(body.jaxpr, body.consts, operands, extras, (*site, k), calls)
                return outputs, added(self.nothing, mark)

            return run

        branches = [branch(k, body) for k, body in enumerate(eqn.params["branches"])]
        if self.unroll:
            return branches[min(max(int(index), 0), len(branches) - 1)](operands)
        return jax.lax.switch(index, branches, operands)

    def _while(self, eqn, inputs, extras, site, calls):
        n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        test_consts, body_consts, carry = inputs[:n_cond], inputs[n_cond : n_cond + n_body], inputs[n_cond + n_body :]

        def going(carry):
            return self.jaxpr(test.jaxpr, test.consts, [*test_consts, *carry], extras, (*site, 0), calls)[0][0]

        def again(state):
            return going(state[0]).any()

        def step(state):
            before, mark = state
            carry, more = self.jaxpr(body.jaxpr, body.consts, [*body_consts, *before], extras, (*site, 1), calls)
            on = going(before)
            if on.ndim:  # a loop under vmap: those that are done stay as they are
                carry = [
                    jnp.where(on.reshape(on.shape + (1,) * (new.ndim - on.ndim)), new, old)
                    for new, old in zip(carry, before, strict=True)
                ]
                if mark is not None:
                    more = added(more, (on * weights(on.size).reshape(on.shape)).sum(dtype=jnp.uint32))
            return carry, None if mark is None else added(mark * jnp.uint32(31) + jnp.uint32(1), more)

        state = (carry, self.nothing)
        if not self.unroll:
            return jax.lax.while_loop(again, step, state)
        while bool(again(state)):
            state = step(state)
        return state


def added(mark: jax.Array | None, more: jax.Array | None) -> jax.Array | None:
    """The sum of two marks, each of which may be none."""
    return more if mark is None else mark if more is None else mark + more


def weights(n: int) -> jax.Array:
    """Odd numbers, scattered over the uint32s, that make a sum of marks tell which of n places differ."""
    return (jnp.arange(n, dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(40503)) | jnp.uint32(1)


def dependencies(jaxpr: Jaxpr, masks, visit: Callable | None = None, site: Site = ()) -> list[int]:
    """Which inputs each output depends on, as bits of an integer; ``visit(site, eqn, masks)`` sees every equation."""
    known: dict = dict(zip(jaxpr.invars, masks, strict=True))

    def read(atom):
        return 0 if isinstance(atom, Literal) else known.get(atom, 0)

    for i, eqn in enumerate(jaxpr.eqns):
        ins = [read(atom) for atom in eqn.invars]
        here = (*site, i)
        if visit is not None:
            visit(here, eqn, ins)
        name, body = eqn.primitive.name, body_of_call(eqn)
        union = 0
        for mask in ins:
            union |= mask
        if body is not None:
            outs = dependencies(body.jaxpr, ins, visit, here)
        elif name == "scan":
            n_consts, n_carry = scan_parts(eqn)
            inner = eqn.params["jaxpr"].jaxpr
            while True:  # what reaches the carry at one step reaches it at the next
                outs = dependencies(inner, ins, None, here)
                carry = [a | b for a, b in zip(ins[n_consts : n_consts + n_carry], outs, strict=False)]
                if carry == ins[n_consts : n_consts + n_carry]:
                    break
                ins = [*ins[:n_consts], *carry, *ins[n_consts + n_carry :]]
            if visit is not None:
                dependencies(inner, ins, visit, here)
        elif name == "cond":
            outs = [ins[0]] * len(eqn.outvars)
            for k, branch in enumerate(eqn.params["branches"]):
                found = dependencies(branch.jaxpr, ins[1:], visit, (*here, k))
                outs = [a | b for a, b in zip(outs, found, strict=True)]
        else:
            if name == "while" and visit is not None:
                for k, key in enumerate(("cond_jaxpr", "body_jaxpr")):
                    inner = eqn.params[key].jaxpr
                    dependencies(inner, [union] * len(inner.invars), visit, (*here, k))
            outs = [union] * len(eqn.outvars)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


HIDDEN = (
    str(Path(jax.__file__).parent) + os.sep,
    __file__,
    str(Path(__file__).parent / "jax_insides.py"),
    str(Path(__file__).parents[1] / "gradcheck") + os.sep,
    "contextlib.py",
)


def location(eqn: JaxprEqn, calls: tuple[JaxprEqn, ...] = ()) -> str:
    """``file.py:line`` of the user's code that an equation, or the call around it, comes from; empty if unknown."""
    frame = next(filter(None, map(frame_of, (eqn, *reversed(calls)))), None)
    return "" if frame is None else f"{Path(frame.file_name).name}:{frame.line_num}"


def frame_of(eqn: JaxprEqn) -> Any:
    """The innermost call in the user's code, or in a layer's, that an equation comes from; None if unknown."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not any(part in frame.file_name for part in HIDDEN) and not frame.file_name.startswith("<frozen"):
            return frame
    return None


def placed(eqn: JaxprEqn, calls: tuple[JaxprEqn, ...] = ()) -> str:
    """`location` as it stands behind a name, `` (file.py:line)``; empty if unknown."""
    where = location(eqn, calls)
    return f" ({where})" if where else ""


def function_name(eqn: JaxprEqn, calls: tuple[JaxprEqn, ...] = ()) -> str:
    """What a user calls an operation: the name of the innermost function of jax around it, else its own."""
    names = [name_of_call(call).lstrip("_") for call in calls]
    return next((n for n in reversed(names) if not n.startswith("<")), eqn.primitive.name)


def is_float(x) -> bool:
    """Whether an array (or its shape and dtype) holds real floating numbers."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)


def is_array(x) -> bool:
    """Whether a leaf is an array, of numbers or of keys."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)
