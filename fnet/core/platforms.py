"""The platform that a program is traced for: the one at hand, or one that is not here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from contextvars import ContextVar

import jax

from fnet.core.contexts import holding

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")  # of jax; a plugin may have one more, which is the one at hand then
_platform: ContextVar[str | None] = ContextVar("platform", default=None)


def platform() -> str:
    """That for which is traced, by which a layer chooses its form: "cpu", "cuda", "tpu" …; usually jax' own backend."""
    return _platform.get() or jax.default_backend()


def traced_for(name: str) -> AbstractContextManager[None]:
    """What is traced within takes the forms of that platform."""
    return holding(_platform, name)
