"""Processes that were forked after jax had begun: they lack its threads, and what they compile may wait for ever.

The door of fnet imports this module, which needs nothing of jax, so that a fork is seen whatever else was imported.
"""

from __future__ import annotations

import os
import sys

_forked: list[int] = []  # this process, if it was forked after jax had begun


def refuse_fork(who: str) -> None:
    """RuntimeError in a process that was forked after jax had begun."""
    if os.getpid() in _forked:
        raise RuntimeError(
            f"{who}: this process was forked after jax had begun, and lacks its threads; expected one that begins "
            'anew: multiprocessing.get_context("spawn"), or fork before anything of jax is called'
        )


def _in_the_child() -> None:
    if "jax" in sys.modules:
        from fnet.core.jax_insides import backends_are_initialized

        _forked.extend([os.getpid()] * backends_are_initialized())


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_in_the_child)
