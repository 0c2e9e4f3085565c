"""A folder is held by one process at a time; who has ended holds nothing, and who lives keeps what is theirs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fnet.runs import locks
from fnet.runs.locks import Held, held

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from fnet.runs.locks import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def written(path, **changes):
    """The lock of another process, which has ended, but for the changes."""
    own = {"host": socket.gethostname(), "space": locks._space(), "pid": 2**22 + 1, "started": "1"}
    own |= {"token": "other", "since": "yesterday"}
    path.write_text(json.dumps({**own, **changes}))


def test_a_lock_is_held_by_one_and_gone_after(tmp_path):
    path = tmp_path / ".lock"
    with held(path) as before:
        assert before is None and json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(Held, match=rf"process {os.getpid()} on {socket.gethostname()}, since \d"), held(path):
            pass
        assert path.exists()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), held(path):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_another_process_keeps_its_lock_while_it_lives(tmp_path):
    path = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(Held, match=f"process {other.pid} on"), held(path):
                pass
        finally:
            other.kill()
    assert path.exists()
    with held(path) as before:
        assert before is not None and before.startswith(f"process {other.pid} on")
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_has_another_ones_number_is_not_that_one(tmp_path):
    written(tmp_path / ".lock", pid=os.getppid(), started="1")
    with held(tmp_path / ".lock") as before:
        assert before == f"process {os.getppid()} on {socket.gethostname()}, since yesterday"


def test_a_lock_of_another_machine_counts_while_it_is_touched(tmp_path, monkeypatch):
    path = tmp_path / ".lock"
    written(path, host="elsewhere", pid=os.getpid())
    with pytest.raises(Held, match=r"process \d+ on elsewhere"), held(path):
        pass
    old = time.time() - locks.STALE - 5
    os.utime(path, (old, old))
    with held(path) as before:
        assert before is not None and "elsewhere" in before


def test_a_lock_is_touched_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    with held(tmp_path / ".lock"):
        os.utime(tmp_path / ".lock", (0, 0))
        end = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime < 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert (tmp_path / ".lock").stat().st_mtime > 1


def test_a_forked_child_holds_nothing_and_lets_go_of_nothing(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from fnet.runs.locks import held
path = Path({str(tmp_path / ".lock")!r})
with held(path):
    if os.fork() == 0:
        sys.exit()  # leaves the block as the parent does
    os.wait()
    assert path.exists()
assert not path.exists()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


def test_of_many_that_want_a_lock_that_was_left_over_one_has_it(tmp_path):
    path = tmp_path / ".lock"
    for _ in range(20):
        written(path)
        have, barrier, leave = [], threading.Barrier(8), threading.Event()

        def want(have=have, barrier=barrier, leave=leave):
            barrier.wait()
            try:
                with held(path):
                    have.append(True)
                    leave.wait(10)
            except Held:
                have.append(False)
            if len(have) == 8:
                leave.set()

        threads = [threading.Thread(target=want) for _ in range(8)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 10
        while len(have) < 8 and time.monotonic() < end:
            time.sleep(0.001)
        leave.set()
        for thread in threads:
            thread.join()
        assert sorted(have) == [False] * 7 + [True]
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("without", ["links", "proc"])
def test_file_systems_without_links_and_machines_without_proc(without, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    if without == "links":
        monkeypatch.setattr(os, "link", refuse)
    else:
        monkeypatch.setattr(locks, "_started", lambda pid: "unknown" if pid == os.getpid() else None)
    written(tmp_path / ".lock")
    with held(tmp_path / ".lock") as before:
        assert before is not None and before.startswith("process 4194305 on")
        with pytest.raises(Held), held(tmp_path / ".lock"):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_container_of_the_same_host_name_is_told_by_its_beat(tmp_path):
    path = tmp_path / ".lock"
    written(path, space="pid:[1]")  # whose processes have numbers of their own
    with pytest.raises(Held), held(path):
        pass
    os.utime(path, (time.time() - 2 * locks.STALE,) * 2)
    with held(path) as before:
        assert "process 4194305" in before
