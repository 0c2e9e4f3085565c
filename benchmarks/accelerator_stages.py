"""What `benchmarks.accelerator` runs in processes of their own: a function for each stage, and one for a racing peer.

``stage(say, toy)`` calls ``say(**row)`` for each result as it comes.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import accelerator_models as models
from benchmarks.s1 import BATCH, EPOCHS, RATE, SIZES, interleaved, random_data

# --- what is there ---------------------------------------------------------------------------------------------------


def report(say, toy: bool) -> None:
    """``python -m fnet``, the device, and what is installed of the peers."""
    import jax

    from fnet.__main__ import report as of_fnet

    print(of_fnet(), file=sys.stderr)
    device = jax.local_devices()[0]
    say(
        device={
            "kind": device.device_kind,
            "platform": device.platform,
            "count": jax.local_device_count(),
            "platforms": sorted({device.platform, *others()}),
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        },
        versions={name: version_of(name) for name in ("jax", "jaxlib", "numpy", "torch", "flax", "optax")},
        report=of_fnet(),
    )
    say(name="python -m fnet", peer="fnet", ok=True)


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def others() -> list[str]:
    """The CPU, where jax has it beside the device."""
    return [] if cpu() is None else ["cpu"]


def cpu():
    import jax

    try:
        return jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves it out
        return None


# --- whether the numbers are right -----------------------------------------------------------------------------------

EPS = 2.0**-24  # of float32, of one rounding
# sizes that a CPU, too, trains within seconds; the longest sum of each, its layers, and a rate at which errors do not
# grow and the way is long beside what a relu moves that rounds to its other side
MIDDLE = {
    "mlp": ({"units": (784, 128, 64, 10), "batch": 32}, 784, 3, 0.05),
    "lenet": ({"batch": 16}, 16 * 28**2, 5, 0.05),
    "resnet": ({"blocks": (1, 1), "width": 8, "classes": 10, "side": 32, "batch": 8}, 8 * 16**2, 14, 0.005),
    "lstm": ({"vocabulary": 50, "features": 32, "units": 32, "length": 16, "batch": 8}, 8 * 16, 2 + 16, 0.05),
    "gpt": ({"vocabulary": 50, "length": 32, "layers": 2, "features": 32, "heads": 4, "batch": 8}, 8 * 32, 20, 0.005),
}


def tolerance(terms: int, layers: int, steps: int = 1) -> float:
    """What roundings come to: ε √n in a sum of n, 8 of them in a layer, added up over layers; over steps by their root.

    The 8 are a layer's products, its function (up to 4 ulps of exp or tanh), and their gradients. Steps of relative
    error δ err by δ times the path's length, which is √steps times the way between its ends for a path at random, and
    less for descent. Nothing here grows as errors in a chaotic run do, for which the rates are small.
    """
    return 8 * EPS * math.sqrt(terms) * layers * math.sqrt(steps)


def correct(say, toy: bool) -> None:
    """Hand against autodiff, and the device against the CPU: S1, and steps of each model; products in full float32."""
    import jax
    import jax.numpy as jnp

    import fnet

    jax.config.update("jax_default_matmul_precision", "highest")
    here, there, steps = jax.local_devices()[0], cpu(), 10 if toy else 200

    def verdict(name, value, limit, **more):
        say(name=name, peer="fnet", median=value, unit="relative", tolerance=limit, ok=bool(value <= limit), **more)

    epochs = 2 if toy else EPOCHS
    hand, auto = s1_losses("backprop", here, epochs), s1_losses("autodiff", here, epochs)
    on_cpu = None if there is None else s1_losses("backprop", there, epochs)
    limit = tolerance(SIZES[0], len(SIZES) - 1, len(hand[0]))
    for name, other in {"hand against autodiff": auto, "device against CPU": on_cpu}.items():
        if other is None:
            say(name=f"S1, {name}", peer="fnet", status="left out: jax has no CPU here")
            continue
        last = {"last_epoch": float(hand[-1].mean()), "last_epoch_other": float(other[-1].mean())}
        verdict(f"S1, losses of the first epoch, {name}", apart(hand[:1], other[:1]), limit, **last)

    for model_name, (size, terms, layers, rate) in MIDDLE.items():
        model = plain_model(model_name, size)
        batch = fnet.Batch(*map(jnp.asarray, models.data_for(model_name, size)))
        params, state = fnet.init(model, jax.random.key(0), batch.inputs)
        optimizer = fnet.sgd(rate)
        start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
        grads, ends = {}, {}
        for engine in ("backprop", "autodiff"):
            gradient = getattr(fnet, engine)(model, fnet.softmax_cross_entropy)

            def run(ts, batch, gradient=gradient, optimizer=optimizer):
                def step(carry, i):
                    ts, first = carry
                    grads, state, _ = gradient(ts.params, ts.state, batch, ts.key)
                    new, opt_state = optimizer.update(grads, ts.opt_state, ts.params)
                    first = jax.tree.map(lambda kept, g: jnp.where(i == 0, g, kept), first, grads)
                    return (ts._replace(params=new, state=state, opt_state=opt_state), first), None

                zeros = jax.tree.map(jnp.zeros_like, ts.params)
                (end, first), _ = jax.lax.scan(step, (ts, zeros), jnp.arange(steps))
                return first, end.params

            program = jax.jit(run)
            grads[engine], ends[engine] = program(start, batch)
            if there is not None and engine == "backprop":
                grads["cpu"], ends["cpu"] = program(*jax.device_put((start, batch), there))
        for name, other in {"hand against autodiff": "autodiff", "device against CPU": "cpu"}.items():
            if other not in grads:
                say(name=f"{model_name}, {name}", peer="fnet", status="left out: jax has no CPU here")
                continue
            off = apart(grads["backprop"], grads[other])
            verdict(f"{model_name}, gradient, {name}", off, tolerance(terms, layers))
            off = apart(ends["backprop"], ends[other], params)
            verdict(f"{model_name}, {steps} steps, {name}", off, tolerance(terms, layers, steps))


def s1_losses(engine: str, device, epochs: int) -> np.ndarray:
    """The losses of S1's steps, ``(epochs, steps)``."""
    import jax

    import fnet

    data = fnet.check_data(random_data())
    model, optimizer = fnet.mlp(*SIZES[1:]), fnet.adam(RATE)
    step = fnet.make_step(getattr(fnet, engine)(model, fnet.softmax_cross_entropy), optimizer)
    params, state = fnet.init(model, jax.random.key(0), data.inputs[:1])
    start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    program = jax.jit(lambda ts, data: fnet.train(step, ts, data, epochs=epochs, batch_size=BATCH)[1]["loss"].value)
    return np.asarray(program(*jax.device_put((start, data), device)), np.float64)


def apart(a, b, start=None) -> float:
    """‖a − b‖ of two trees, relative to ‖a‖, or to the way ‖a − start‖."""
    import jax

    a, b, start = ([np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in (a, b, start))
    between = math.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in zip(a, b, strict=True)))
    start = start or [np.zeros(1)] * len(a)
    return between / math.sqrt(sum(float(((x - y) ** 2).sum()) for x, y in zip(a, start, strict=True)))


def audit(say, toy: bool) -> None:
    """The gradient audit of small models, in float64 on the device."""
    import jax

    import fnet

    small = {
        "mlp": {"units": (6, 5, 3), "batch": 4},
        "lstm": {"vocabulary": 5, "features": 3, "units": 4, "length": 3, "batch": 2},
        "gpt": {"vocabulary": 5, "length": 3, "layers": 1, "features": 6, "heads": 2, "batch": 2},
        "resnet": {"blocks": (1, 1), "width": 2, "classes": 3, "side": 16, "batch": 2},
        "lenet": {"batch": 2},
    }
    for name, size in itertools.islice(small.items(), 1 if toy else None):
        model = plain_model(name, size)
        batch, begin = fnet.Batch(*models.data_for(name, size)), time.perf_counter()
        options = {"key": jax.random.key(0), "precisions": (), "cost": False}
        found = fnet.check_model(model, fnet.softmax_cross_entropy, batch, **options)
        seconds, leaves = time.perf_counter() - begin, found.leaves
        bad = [f"{leaf.path}: {leaf.verdict}, {leaf.cause}" for leaf in leaves if leaf.verdict not in ("ok", "kink")]
        about = {"ok": found.ok, "leaves": len(leaves), "bad": bad}
        say(name=f"audit of {name}", peer="fnet backprop", median=seconds, unit="s", **about)


def plain_model(name: str, size: dict):
    """The model in float32 throughout."""
    import fnet

    if name != "gpt":
        return models.fnet_model(name, size)
    given = {key: size[key] for key in ("length", "layers", "features", "heads")}
    return fnet.models.gpt(size["vocabulary"], **given)


# --- how fast it is --------------------------------------------------------------------------------------------------


def race(name: str, peer: str, toy: bool, say, orders) -> None:
    """One peer in a race of training steps: prepares, then runs a round at each order, then says what it took."""
    warm(models.package_of(peer))
    next(orders)  # to prepare
    size = (models.TOY if toy else models.REAL)[name]
    run, about = models.PEERS[name][peer](name, size, models.data_for(name, size))
    least, wanted = about.pop("least_steps", 1), 0.02 if toy else 0.3
    run(least)
    begin = time.perf_counter()
    loss = run(3 * least)
    each = (time.perf_counter() - begin) / (3 * least)
    steps = least * max(1, min(math.ceil(wanted / each / least), 1000))
    say(prepared={**about, "steps": steps, "loss": loss, "operations": models.products(name, size)})
    for _ in orders:  # until there are no more
        begin = time.perf_counter()
        run(steps)
        say(seconds=(time.perf_counter() - begin) / steps)
    say(peak_bytes=peak_bytes(models.package_of(peer)))


def warm(package: str) -> None:
    """Import what a peer needs and start its device, which peers do at once; the compiling they do in turn."""
    if package == "torch":
        import torch

        if torch.cuda.is_available():
            torch.zeros(1, device="cuda")
        return
    import jax

    import fnet  # noqa: F401

    jax.block_until_ready(jax.numpy.zeros(1))


def peak_bytes(package: str) -> int | None:
    """What this process has held of the device's memory at most, by the package's own account."""
    if package == "torch":
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def populations(say, toy: bool) -> None:
    """Whole runs of many small networks in one program: members a second."""
    import jax

    from benchmarks import population
    from fnet.training.population import train_population

    rng = np.random.default_rng(0)
    examples = population.BATCH * 4 if toy else population.EXAMPLES
    data = rng.standard_normal((examples, 64), np.float32), rng.integers(0, 10, examples)
    run, rate = population.whole_run(), {"learning_rate": population.RATE}
    for members in (1, 8) if toy else (1, 64, 1024, 16384):
        keys = jax.random.split(jax.random.key(0), members)
        hyper = {name: np.full(members, value) for name, value in rate.items()}
        runs = [train_population(run, hyper, keys, batch_of(data)) for _ in range(2 if toy else 4)]
        seconds = [found.run_seconds for found in runs[1:]]  # the first finds its memory
        say(
            **spread([members / s for s in seconds]),
            name=f"population of {members:,}: 64-32-10, {examples:,} examples, {population.EPOCHS} epochs",
            peer="fnet backprop",
            unit="members/s",
            members=members,
            in_program=runs[0].chunk,
            compile_seconds=runs[0].compile_seconds,
            peak_bytes=peak_bytes("fnet"),
        )


def batch_of(data):
    import jax.numpy as jnp

    import fnet

    return fnet.Batch(*map(jnp.asarray, data))


def fit(say, toy: bool) -> None:
    """`fnet.fit` beside the bare program, of the same steps."""
    import jax

    import fnet
    from benchmarks import driver

    step, start, data = driver.parts()
    epochs = 2 if toy else 50
    steps = epochs * (driver.EXAMPLES // driver.BATCH)
    options: dict[str, Any] = {"epochs": epochs, "batch_size": driver.BATCH}
    bare = jax.jit(lambda ts, data: fnet.train(step, ts, data, **options))

    def in_folder():
        with tempfile.TemporaryDirectory() as folder:
            fnet.fit(step, start, data, run=fnet.Run(Path(folder) / "run"), **options)

    runs = {
        "fnet.train in one program": lambda: jax.device_get(bare(start, data)),
        "fit": lambda: fnet.fit(step, start, data, **options),
        "fit, no copies": lambda: fnet.fit(step, start, data, keep=False, **options),
    }
    try:
        import orbax.checkpoint  # noqa: F401

        runs["fit in a folder"] = in_folder
    except ImportError:
        say(name="fit in a folder", peer="fnet", status="left out: orbax-checkpoint is not installed")
    for run in runs.values():
        run()
    times = interleaved(runs, 2 if toy else 5, rest=0)
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["fnet.train in one program"], strict=True)]
        say(
            **spread([1e3 * s / steps for s in seconds]),
            name=f"{name}, {steps:,} steps of 64-32-10",
            peer="fnet backprop",
            unit="ms/step",
            relative_to_bare=spread(ratios),
        )


def resume(say, toy: bool) -> None:
    """A run that is stopped in the middle and resumed from its folder ends with the bits of the straight one."""
    import os

    import jax

    import fnet
    from fnet.core.numerics import words_of
    from fnet.layers import batch_norm, conv, dense, dropout, flatten, relu, serial

    rng = np.random.default_rng(0)
    data = fnet.Batch(rng.standard_normal((96, 8, 8, 3), np.float32), rng.integers(0, 10, 96))
    model = serial(conv(8, (3, 3), form="xla"), batch_norm(), relu(), flatten(), dropout(0.2), dense(10))
    optimizer = fnet.adam(1e-3)
    params, state = fnet.init(model, jax.random.key(0), data.inputs[:1])
    start = fnet.init_train_state(params, optimizer, jax.random.key(1), state)
    step = fnet.make_step(fnet.backprop(model, fnet.softmax_cross_entropy), optimizer)
    options = {"epochs": 4 if toy else 20, "batch_size": 16, "chunk_steps": 5}
    middle = options["epochs"] * 6 // 2

    def leave(event):
        return "stop" if event.step >= middle else None

    straight, _ = fnet.fit(step, start, data, **options)
    again, _ = fnet.fit(step, start, data, **options)
    with tempfile.TemporaryDirectory() as folder:
        run = fnet.Run(Path(folder) / "run", resume="auto")
        stopped, _ = fnet.fit(step, start, data, run=run, observers=[leave], **options)
        resumed, _ = fnet.fit(step, start, data, run=run, **options)

    def bits(ts) -> list[bytes]:
        return [np.asarray(words_of(leaf)).tobytes() for leaf in jax.tree.leaves(ts)]

    flags = {"xla_flags": os.environ.get("XLA_FLAGS", ""), "stopped_at": int(stopped.step), "steps": int(straight.step)}
    say(name="a run again", peer="fnet", ok=bits(again) == bits(straight), unit="same bits", **flags)
    say(name="a run stopped and resumed", peer="fnet", ok=bits(resumed) == bits(straight), unit="same bits", **flags)


def spread(values: list[float]) -> dict:
    """The median of some values and their range."""
    return {"median": float(np.median(values)), "least": min(values), "most": max(values), "rounds": len(values)}


STAGES = {
    "report": report,
    "correct": correct,
    "audit": audit,
    "populations": populations,
    "fit": fit,
    "resume": resume,
}
