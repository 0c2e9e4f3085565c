"""The platform that a program is traced for: the one at hand, or one that is not here."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar

import jax

_platform: ContextVar[str | None] = ContextVar("platform", default=None)


def platform() -> str:
    """That for which is traced, by which a layer chooses its form: "cpu", "cuda", "tpu" …; usually jax' own backend."""
    return _platform.get() or jax.default_backend()


@contextmanager
def traced_for(name: str):
    """What is traced within takes the forms of that platform."""
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)
