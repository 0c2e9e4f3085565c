"""SIGTERM and SIGINT during a run: the first asks it to save and leave, a second SIGINT leaves at once.

Of several processes a second SIGTERM does too: one that waits for another which is gone can do nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fnet.core.processes import several

CAUGHT = (signal.SIGINT, signal.SIGTERM)
SAME_SECONDS = 0.2  # within which a SIGINT is the one before: it may come to the process and to its group


class Terminated(SystemExit):
    """SIGTERM: the run ended at the end of a chunk, with ``state`` and ``history`` as `fnet.fit` returns them.

    In a folder it is saved too. Nobody catching it, the process ends with the exit code 143, as the shell says of one
    that was so ended.
    """

    def __init__(self, message: str, state: Any, history: Any, number: int = signal.SIGTERM):
        super().__init__(128 + number)
        self.args, self.state, self.history = (message,), state, history


class Interrupted(KeyboardInterrupt, Terminated):
    """SIGINT, Ctrl-C: a KeyboardInterrupt that is `Terminated` too, with the exit code 130.

    In a notebook: ``except fnet.Interrupted as stopped: ts = stopped.state``.
    """

    def __init__(self, message: str, state: Any, history: Any):
        Terminated.__init__(self, message, state, history, signal.SIGINT)


@contextmanager
def interruptions() -> Iterator[Callable[[], int | None]]:
    """A function that gives the first signal caught within, or None. Outside the main thread none is caught.

    Python runs handlers between its own operations, so not while a program compiles. The second SIGINT is therefore
    seen by a thread that waits for the bytes which the interpreter's C handler writes. It ends the process; where
    Python is interactive, and what it holds would be lost, it is a KeyboardInterrupt as soon as Python runs again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    seen: list[int] = []  # by the thread, as soon as they come
    handled: list[int] = []  # by Python, in this thread: at the latest when the caller asks
    again = lambda: time.monotonic() - first >= SAME_SECONDS  # noqa: E731
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    first = 0.0  # when the first of those came that leave at once if they come again
    last = CAUGHT if several() else (signal.SIGINT,)

    def watch():
        nonlocal first
        while (number := reader.recv(1)) not in (b"", b"\0"):
            if number[0] in last and number[0] not in seen:
                first = time.monotonic()
            elif number[0] in last and not interactive and again():
                os.write(2, b"\nleft at once; the last complete checkpoint stands\n")
                os._exit(128 + number[0])
            seen.append(number[0])

    def handle(number, _):
        handled.append(number)
        if number == signal.SIGINT and interactive and handled.count(signal.SIGINT) > 1 and again():
            raise KeyboardInterrupt

    interactive = hasattr(sys, "ps1") or "ipykernel" in sys.modules
    before = {number: signal.signal(number, handle) for number in CAUGHT}
    before_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="fnet-signals", daemon=True)
    thread.start()
    try:
        yield lambda: next(iter(handled), None)
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.send(b"\0")
        thread.join()
        reader.close()
        writer.close()
