"""fnet on a GPU in one command of six minutes: are the numbers right, and how fast is it beside torch and flax?

    PYTHONPATH=. python -m benchmarks.accelerator --minutes 6 --json accelerator.json
    python -m benchmarks.accelerator --toy                     the same stages at toy size; so on a CPU by itself

jax is needed, and of torch, flax with optax, and orbax what is to be measured; nothing is fetched. In this order:

- report: `python -m fnet`, the device, versions
- correct: S1 and 200 steps of five models, products in full float32: hand against autodiff, the device against the CPU
- audit: the gradient audit of small models, in float64
- mlp, lenet, resnet, lstm, gpt: a training step with Adam by fnet's engines, flax and torch, in a race
- populations: whole runs of many networks in one program, members a second
- fit: `fnet.fit` beside the bare program
- resume: a run that is stopped and resumed ends with the same bits (XLA is told to be deterministic)

Each stage is a process, and in a race each peer is one. That costs an import and a start of the device, some seconds.
For this a stage that crashes or hangs costs itself alone, no stage holds memory in another's way (this process imports
neither jax nor torch, and jax is told to take memory as it needs it), and the peak of a peer's memory is its own. The
peers of a race start together, are prepared (compiled, tuned) one after another, so that nobody's tuning is disturbed,
and then run a round each in turn, so that all see the same machine; while one runs the others wait. All hold their
memory meanwhile: of a small GPU a peer may find too little, which is its failure alone.

A stage that no time is left for is said to be left out. Of each result what is known is written at once, the file as a
whole. Times are medians of rounds; `share_of_peak` is `accelerator_models.products` over the data sheet's figure below,
and None on a device that is not in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import accelerator_models as models

# NVIDIA's data sheets: dense products, a second. H100 and H200 are those of the SXM form
PEAKS = {
    "H200": {"bfloat16": 989e12, "TF32": 494.5e12, "float32": 67e12},
    "H100": {"bfloat16": 989e12, "TF32": 494.5e12, "float32": 67e12},
    "A100": {"bfloat16": 312e12, "TF32": 156e12, "float32": 19.5e12},
}


def peaks_of(kind: str) -> dict[str, float] | None:
    """The figures of a device, by the name that it gives itself; None for those not known, and for other forms."""
    name = next((name for name in PEAKS if name in kind), None)
    if name is None or "NVL" in kind or (name == "H100" and "HBM3" not in kind):
        return None
    return PEAKS[name]


class Stage(NamedTuple):
    """A part of the command; seconds are those of a run of six minutes."""

    name: str
    least: float  # with less it is not begun
    most: float  # and stopped after so much
    peers: tuple[str, ...] = ()  # of a race; none: one process


ROUNDS = 5
STAGES = (
    Stage("report", 5, 30),
    Stage("correct", 20, 90),
    Stage("audit", 15, 60),
    Stage("mlp", 10, 45, tuple(models.PEERS["mlp"])),
    Stage("lenet", 10, 45, tuple(models.PEERS["lenet"])),
    Stage("resnet", 35, 110, tuple(models.PEERS["resnet"])),
    Stage("lstm", 15, 55, tuple(models.PEERS["lstm"])),
    Stage("gpt", 60, 160, tuple(models.PEERS["gpt"])),
    Stage("populations", 20, 50),
    Stage("fit", 15, 40),
    Stage("resume", 10, 40),
)


# --- processes that are told what to do by lines, and answer by lines of JSON ----------------------------------------


class Child(NamedTuple):
    process: subprocess.Popen
    messages: queue.SimpleQueue  # None at the end
    errors: Any  # a file with all else that it printed
    reader: threading.Thread


class Ended(Exception):
    """A process ended before it had answered; says how."""


def start(command: list[str], environment: dict[str, str]) -> Child:
    """A process in a session of its own, so that what it starts is ended with it."""
    errors, messages = tempfile.TemporaryFile(), queue.SimpleQueue()  # noqa: SIM115 (`end` closes it)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors}
    process = subprocess.Popen(command, text=True, env=environment, start_new_session=True, **pipes)

    def read() -> None:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                messages.put(json.loads(line))
        finally:
            messages.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return Child(process, messages, errors, reader)


def hear(child: Child, until: float) -> dict:
    """The next answer; raises TimeoutError at ``until``, and `Ended` where there is none to come."""
    try:
        message = child.messages.get(timeout=max(0.0, until - time.monotonic()))
    except queue.Empty:
        raise TimeoutError from None
    if message is None:
        code = child.process.wait()
        child.errors.seek(0)
        raise Ended(f"ended with {code}\n{child.errors.read().decode(errors='replace')[-4000:]}" if code else "")
    return message


def tell(child: Child, order: str | None) -> None:
    """Give an order; None: there are no more."""
    stdin = child.process.stdin
    assert stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended, which `hear` says
        if order is None:
            stdin.close()
        else:
            stdin.write(f"{order}\n")
            stdin.flush()


def end(child: Child) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.process.pid, signal.SIGKILL)
    child.process.wait()
    child.reader.join(1)
    for file in (child.process.stdin, child.process.stdout, child.errors):
        if file is not None and not (file is child.process.stdout and child.reader.is_alive()):
            with contextlib.suppress(BrokenPipeError):
                file.close()


# --- stages ----------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """What a stage is run by: how its processes are called, who cannot come, and what becomes of results."""

    command: Callable[[str, str | None], list[str]]  # of a stage and a peer
    environment: Callable[[str], dict[str, str]]  # of a stage
    absent: Callable[[str], str | None]  # why a peer is not there
    save: Callable[[], None]


def run_all(stages, found: dict, seconds: float, setting: Setting) -> None:
    """Run the stages within ``seconds``, and write into ``found`` what they say, as it comes."""
    begin, scale = time.monotonic(), seconds / 360
    for i, stage in enumerate(stages):
        reserved = scale * sum(later.least for later in stages[i + 1 :])
        limit = min(scale * stage.most, begin + seconds - reserved - time.monotonic())
        entry = {"name": stage.name, "status": "running", "limit_seconds": round(limit, 1), "rows": [], "failures": []}
        found["stages"].append(entry)
        if limit < scale * stage.least:
            entry["status"] = "left out for time"
        else:
            say(f"--- {stage.name}: up to {limit:.0f} s")
            before = time.monotonic()
            run = run_race if stage.peers else run_alone
            run(stage, entry, time.monotonic() + limit, found, setting)
            entry["seconds"] = round(time.monotonic() - before, 1)
        if entry["status"] != "done":
            say(f"{stage.name}: {entry['status']}")
        setting.save()


def run_alone(stage: Stage, entry: dict, until: float, found: dict, setting: Setting) -> None:
    """A stage of one process, whose answers are its results; those with a device are about the whole."""
    child = start(setting.command(stage.name, None), setting.environment(stage.name))
    try:
        tell(child, None)
        while True:
            message = hear(child, until)
            if "device" in message:
                device = message["device"]
                found.update(message, peaks=peaks_of(device["kind"]), toy=found["toy"] or device["platform"] == "cpu")
            else:
                entry["rows"].append(message)
                say(line_of(message))
            setting.save()
    except Ended as how:
        entry["status"] = "failed" if str(how) else "done"
        fail(entry, None, str(how))
    except TimeoutError:
        entry["status"] = "stopped at its limit"
    finally:
        end(child)


def run_race(stage: Stage, entry: dict, until: float, found: dict, setting: Setting) -> None:
    """A stage of several peers, which are prepared one after another and run a round each in turn."""
    for peer in stage.peers:
        if reason := setting.absent(peer):
            entry["rows"].append({"name": stage.name, "peer": peer, "status": reason})
    peers = [peer for peer in stage.peers if not setting.absent(peer)]
    children, seconds, about = {}, {}, {}
    prepared_by = until - 0.2 * (until - time.monotonic())
    try:
        children = {peer: start(setting.command(stage.name, peer), setting.environment(stage.name)) for peer in peers}

        def ask(peer: str, order: str | None, until: float) -> dict | None:
            """The answer to an order; where there is none, the peer is out."""
            tell(children[peer], order)
            try:
                return hear(children[peer], until)
            except Ended as how:
                fail(entry, peer, str(how) or "ended without an answer")
            except TimeoutError:
                out(peer, "stopped at its limit")
            end(children.pop(peer))
            return None

        def out(peer: str, reason: str) -> None:
            entry["rows"].append({"name": stage.name, "peer": peer, "status": reason})
            say(f"{peer}: {reason}")

        for i, peer in enumerate(peers):
            left = prepared_by - time.monotonic()
            if left <= 0:
                out(peer, "left out for time")
                end(children.pop(peer))
                continue
            # one that hangs leaves half of the time to the others
            made = ask(peer, "prepare", time.monotonic() + (left if i == len(peers) - 1 else left / 2))
            if made is not None:
                about[peer], seconds[peer] = made["prepared"], []
                say(f"{peer}: prepared in {made['prepared']['compile_seconds']:.1f} s")
        for _ in range(ROUNDS):
            for peer in [peer for peer in about if peer in children]:
                if seconds[peer] and time.monotonic() + 2 * about[peer]["steps"] * max(seconds[peer]) > until:
                    break  # this round is not whole, which the counts of rounds say
                measured = ask(peer, "round", until)
                if measured is not None:
                    seconds[peer].append(measured["seconds"])
        for peer in about:
            if not seconds[peer]:
                continue
            held = ask(peer, None, max(until, time.monotonic() + 5)) if peer in children else None
            row = row_of(stage.name, peer, seconds[peer], {**about[peer], **(held or {})}, found.get("peaks"))
            entry["rows"].append(row)
            say(line_of(row))
            setting.save()
        entry["status"] = "done" if not entry["failures"] else "failed in part"
    finally:
        for child in children.values():
            end(child)


def row_of(stage: str, peer: str, seconds: list[float], about: dict, peaks: dict | None) -> dict:
    """A peer's result in a race."""
    about, middle = dict(about), statistics.median(seconds)
    peak = "bfloat16" if stage in models.BFLOAT16 else "TF32"
    return {
        "name": stage,
        "peer": peer,
        **{"median": 1e3 * middle, "least": 1e3 * min(seconds), "most": 1e3 * max(seconds)},
        **{"rounds": len(seconds), "unit": "ms/step", "peak_bytes": None},
        **about,
        "share_of_peak": None if peaks is None else about["operations"] / middle / peaks[peak],
        "peak": None if peaks is None else f"{peaks[peak] / 1e12:g} TFLOP/s, {peak}",
    }


def fail(entry: dict, peer: str | None, words: str) -> None:
    """Note that something failed, if it says so."""
    if words:
        entry["failures"].append({"peer": peer, "error": words})
        say(f"{peer or entry['name']}: failed: {words.strip().splitlines()[-1]}")


# --- what is shown ---------------------------------------------------------------------------------------------------


def say(line: str) -> None:
    print(line, flush=True)


def line_of(row: dict) -> str:
    """A result in one line."""
    if "median" not in row:
        words = row.get("status") or ("right" if row.get("ok") else "WRONG")
        return f"{row['peer']}, {row['name']}: {words}"
    if "tolerance" in row:
        verdict = "right" if row["ok"] else "WRONG"
        return f"{row['name']}: {row['median']:.1e} of at most {row['tolerance']:.1e}, {verdict}"
    words = [f"{row['median']:.4g} {row['unit']}"]
    if row.get("rounds", 1) > 1:
        words[0] += f" ({row['least']:.4g} to {row['most']:.4g}, {row['rounds']} rounds)"
    if row.get("share_of_peak") is not None:
        words.append(f"{100 * row['share_of_peak']:.1f} % of {row['peak']}")
    for name, what in (("peak_bytes", "held"), ("program_bytes", "in the program")):
        if row.get(name) is not None:
            words.append(f"{row[name] / 1e9:.2f} GB {what}")
    if row.get("compile_seconds") is not None:
        words.append(f"prepared in {row['compile_seconds']:.1f} s")
    if row.get("ok") is not None:
        words.append("right" if row["ok"] else f"WRONG: {'; '.join(row.get('bad', ()))}")
    return f"{row['peer']}, {row['name']}: {', '.join(words)}"


def table(found: dict) -> Iterator[str]:
    """All results, a line each, and what there is none of."""
    device = found.get("device") or {"kind": "no device", "count": 0}
    yield f"\n{device['count']} × {device['kind']}, jax {(found.get('versions') or {}).get('jax')}, toy: {found['toy']}"
    if found.get("peaks") is None:
        yield "the device is in no data sheet that is known here: no shares of a peak"
    for entry in found["stages"]:
        title = entry["name"] if found["toy"] else models.TITLES.get(entry["name"], entry["name"])
        yield f"\n{title}: {entry['status']}"
        counts = {row["parameters"] for row in entry["rows"] if "parameters" in row}
        if counts:
            yield f"  parameters: {', '.join(f'{count:,}' for count in sorted(counts))}"
        yield from (f"  {line_of(row)}" for row in entry["rows"])
        for failure in entry["failures"]:
            yield f"  {failure['peer'] or 'the stage'} failed: {failure['error'].strip().splitlines()[-1]}"


def is_right(found: dict) -> bool:
    """Whether nothing failed and nothing was wrong; what was left out is neither."""
    return not any(
        entry["failures"] or any(row.get("ok") is False for row in entry["rows"]) for entry in found["stages"]
    )


def write(path: Path | None, found: dict) -> None:
    """The results as a whole, in place of what was there before."""
    if path is None:
        return
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(found, indent=1))
    os.replace(part, path)


# --- the command -----------------------------------------------------------------------------------------------------


def child_main(stage: str, peer: str | None, toy: bool) -> None:
    """A stage, or a peer of a race, in this process: answers go where the output went, all else to the errors."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**message) -> None:
        print(json.dumps(message), file=answers, flush=True)

    from benchmarks import accelerator_stages

    if peer is None:
        accelerator_stages.STAGES[stage](answer, toy)
    else:
        accelerator_stages.race(stage, peer, toy, answer, iter(sys.stdin))


def absent(peer: str) -> str | None:
    """What is not installed of a peer."""
    package = models.package_of(peer)
    needed = ("flax", "optax") if package == "flax" else (package,)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def environment(stage: str, cache: str) -> dict[str, str]:
    """What the processes of a stage are started with."""
    given = {
        "JAX_COMPILATION_CACHE_DIR": cache,  # of which the peers have the tuning of products in common
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if stage == "resume":
        given["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    return {**os.environ, **given}


def main() -> None:
    parser = argparse.ArgumentParser(description="fnet on an accelerator, beside torch and flax, within minutes")
    parser.add_argument("--minutes", type=float, default=6.0, help="of the whole; stages that do not fit are left out")
    parser.add_argument("--json", type=Path, help="the file of results")
    parser.add_argument("--toy", action="store_true", help="toy sizes; always so where jax finds but a CPU")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", choices=names, nargs="+", default=names, help="these stages; the report always")
    parser.add_argument(
        "--stage", choices=names, help=argparse.SUPPRESS
    )  # in this process, as the command calls itself
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        child_main(options.stage, options.peer, options.toy)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children end with this process
    found: dict[str, Any] = {"minutes": options.minutes, "toy": options.toy, "settings": models.SETTINGS, "stages": []}

    def command(stage: str, peer: str | None) -> list[str]:
        given = ["--stage", stage, *(["--peer", peer] if peer else []), *(["--toy"] if found["toy"] else [])]
        return [sys.executable, "-m", "benchmarks.accelerator", *given]

    stages = [stage for stage in STAGES if stage.name in ("report", *options.only)]
    with tempfile.TemporaryDirectory() as cache:
        save = lambda: write(options.json, found)  # noqa: E731
        setting = Setting(command, lambda stage: environment(stage, cache), absent, save)
        run_all(stages, found, 60 * options.minutes, setting)
    for line in table(found):
        say(line)
    sys.exit(not is_right(found))


if __name__ == "__main__":
    main()
