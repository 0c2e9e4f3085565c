"""SIGTERM and SIGINT during a run: the first asks it to save and leave, a second SIGINT leaves at once."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(SystemExit):
    """The run was asked to end by a signal, and is saved. The process ends with ``code`` = 128 + the signal's number.

    So 130 after SIGINT and 143 after SIGTERM, as the shell reports a process that a signal ended.
    """


@contextmanager
def interruptions() -> Iterator[Callable[[], int | None]]:
    """A function that gives the first signal caught within, or None. Outside the main thread none is caught.

    Python runs handlers between its own operations, so not while a program compiles. The second SIGINT is therefore
    seen by a thread that waits for the bytes which the interpreter's C handler writes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    seen: list[int] = []
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch():
        while (number := reader.recv(1)) not in (b"", b"\0"):
            if number[0] == signal.SIGINT and signal.SIGINT in seen:
                os.write(2, b"\nleft at once; the last complete checkpoint stands\n")
                os._exit(128 + signal.SIGINT)
            seen.append(number[0])

    before = {number: signal.signal(number, lambda *_: None) for number in CAUGHT}
    before_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="fnet-signals", daemon=True)
    thread.start()
    try:
        yield lambda: next((number for number in seen if number in CAUGHT), None)
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.send(b"\0")
        thread.join()
        reader.close()
        writer.close()
