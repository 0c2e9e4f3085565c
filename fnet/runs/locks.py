"""A folder that one process at a time may write to, on any file system: a file that says who holds it.

The file is made whole or not at all, and touched every few seconds. Its holder has ended if its process is gone, or,
on another machine, if the file has not been touched for long: then it is taken over. A forked child holds nothing.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BEAT = 5.0  # seconds from one touch to the next
STALE = 60.0  # seconds without one, after which a holder on another machine has ended


class Held(Exception):
    """Somebody holds it; the argument says who."""


@contextmanager
def held(path: Path) -> Iterator[str | None]:
    """Hold the lock ``path``; gives whose it was if it was taken over. Raises `Held`, and OSError as files do."""
    pid, token = os.getpid(), uuid.uuid4().hex
    own = {"host": socket.gethostname(), "space": _space(), "pid": pid, "started": _started(pid), "token": token}
    _mine.add(token)
    try:
        taken = _acquire(path, {**own, "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    except BaseException:
        _mine.discard(token)
        raise
    ended = threading.Event()

    def beat():
        while not ended.wait(BEAT):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="fnet-lock", daemon=True)
    thread.start()
    try:
        yield taken
    finally:
        if os.getpid() == pid:
            ended.set()
            thread.join()
            _mine.discard(token)
            if (_read(path) or {}).get("token") == token:
                path.unlink(missing_ok=True)


_mine: set[str] = set()  # tokens of the locks that this process holds


def _acquire(path: Path, own: dict[str, Any]) -> str | None:
    """Make the file; returns whose it was if it was left over."""
    taken, part = None, path.with_name(f"{path.name}.{own['token']}")
    part.write_text(json.dumps(own))
    try:
        while True:
            try:
                _link(part, path)
                return taken
            except FileExistsError:
                other = _read(path)
                if other is None:
                    continue  # it is gone, or is being written
                if _lives(other, path, part):
                    raise Held(_said(other)) from None
                taken = _said(other)
                _remove(path, other)
    finally:
        part.unlink(missing_ok=True)


def _link(part: Path, path: Path) -> None:
    """``path`` with what ``part`` holds, at once; FileExistsError where there is one."""
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: made empty first, then written
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(part, path)
        part.touch()


def _remove(path: Path, other: dict[str, Any]) -> None:
    """Remove a lock that was left over, if it still is that one; one at a time, so that no new one is removed."""
    guard = path.with_name(f"{path.name}.removing")
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        with suppress(FileNotFoundError):
            if time.time() - guard.stat().st_mtime > STALE:  # of one that was killed here
                guard.unlink()
        time.sleep(0.01)
        return
    try:
        if (_read(path) or {}).get("token") == other.get("token"):
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; None where it is not there. One that is empty or damaged says nothing."""
    try:
        said = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        said = {}
    return said if isinstance(said, dict) else {}


def _lives(other: dict[str, Any], path: Path, part: Path) -> bool:
    """Whether the holder of a lock has not ended."""
    pid, here = other.get("pid"), (other.get("host"), other.get("space")) == (socket.gethostname(), _space())
    if here and pid == os.getpid():
        return other.get("token") in _mine
    if here and isinstance(pid, int):
        return _started(pid) == other.get("started") and _started(pid) is not None
    os.utime(part)  # now, by the clock of the file system
    with suppress(FileNotFoundError):
        return part.stat().st_mtime - path.stat().st_mtime < STALE
    return False


def _space() -> str:
    """Among which processes a number is one: containers may share the host's name, and each counts from 1."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str | None:
    """When a process of this machine started, so that another with its number is told apart; None where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # it is another user's
        pass
    return "unknown"


def _said(other: dict[str, Any]) -> str:
    pid, host, since = (other.get(name, "unknown") for name in ("pid", "host", "since"))
    return f"process {pid} on {host}, since {since}"
