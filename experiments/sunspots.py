"""Next year's sunspots, forecast by a recurrent network, by linear autoregression and by this year's number.

    python -m experiments.sunspots
    python -m experiments.sunspots --units 24 --members 10

The yearly series from 1700 to 2008, as statsmodels ships it. The last 80 years are the test part, the 100 before them
the validation part; no choice is made on the test part. Every forecast is of one year from all the years before.

- Persistence: the number of the year before.
- AR(p): least squares on the p numbers before and a constant; p from 1 to 20 by the validation part, and the weights
  again on all years before the test part. On the numbers themselves, and on their square roots, whose spread depends
  less on their height. Beside it, to its advantage, the order that is best on the test part.
- GRU: fnet's own on the scaled square roots, the whole series as one sequence, so that the carry holds all the past. At
  every update Gaussian noise is added to the inputs, and the roots are multiplied by a random factor whose spread is
  that of the cycles' heights, since a bounded state does not go beyond the heights that it has been trained on. The
  validation part chooses the number of updates; then all years before the test part train anew. A forecast is the mean
  of an ensemble, and all ensembles of all seeds train in one vmapped program.

A squared mean of roots lies below the mean of squares; no forecast is corrected for it. Years follow each other, so
the interval of the gain over AR(p) is a bootstrap over blocks of one cycle, 11 years.

The free run begins after the last year before the test part and feeds each forecast back as if it had been observed.

Legend: M members of all seeds, T years, U updates, x numbers, z scaled square roots.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import main, new_run_folder, open_console, say_written, write_results
from experiments.options import Amount, ByEngine, Count, InFolder, Seeds, engine_of
from experiments.pictures.sunspots import draw_forecasts, draw_free_run
from fnet.core.numerics import stream
from fnet.layers import dense, gru, serial
from fnet.layers.initializers import normal
from fnet.losses import squared_error
from fnet.report import engine_table


@dataclasses.dataclass(frozen=True)
class Config(InFolder, ByEngine):
    """Forecast the yearly sunspot numbers."""

    units: Count = 12  # of the GRU
    learning_rate: Amount = 0.01  # Adam's
    noise: Amount = 0.1  # standard deviation of the noise on the inputs, which have one of about 1
    height: Amount = 0.2  # of the logarithm of the factor; 0.21 is that of the roots of the 11 cycle maxima until 1828
    updates: Count = 600  # at most; the validation part chooses among the multiples of `every`
    every: Count = 25
    members: Count = 5  # of an ensemble
    seeds: Seeds = (0, 1, 2)  # one ensemble each: of the parameters and of the noise
    orders: Count = 20  # AR(1) to AR(orders)
    validation_size: Count = 100  # years
    test_size: Count = 80
    resamples: Count = 4000  # of the bootstrap


def load() -> tuple[np.ndarray, np.ndarray]:
    """Years and sunspot numbers ``(309,)``, read from the file inside statsmodels without importing it."""
    spec = importlib.util.find_spec("statsmodels")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("statsmodels is not installed, which ships the sunspot numbers: pip install statsmodels")
    path = Path(spec.submodule_search_locations[0]) / "datasets/sunspots/sunspots.csv"
    years, numbers = np.loadtxt(path, delimiter=",", skiprows=1).T
    return years.astype(int), numbers


def rmse(forecast, observed) -> float:
    return float(np.sqrt(np.mean((forecast - observed) ** 2)))


# --- linear autoregression -------------------------------------------------------------------------------------------


def lags(x: np.ndarray, order: int) -> np.ndarray:
    """A constant and the ``order`` numbers before each of ``x[order:]``: ``(T − order, 1 + order)``."""
    columns = [x[order - k : len(x) - k] for k in range(1, order + 1)]
    return np.stack([np.ones(len(x) - order), *columns], 1)


def autoregression(x: np.ndarray, order: int, end: int) -> np.ndarray:
    """Forecasts ``(T,)`` of every year by weights fitted before ``end``; NaN for the first ``order`` years."""
    weights, *_ = np.linalg.lstsq(lags(x[:end], order), x[order:end])
    return np.concatenate([np.full(order, np.nan), lags(x, order) @ weights])


def free_autoregression(x: np.ndarray, order: int, end: int) -> np.ndarray:
    """Forecasts ``(T − end,)`` from the year ``end`` on, each fed back as if it had been observed."""
    weights, *_ = np.linalg.lstsq(lags(x[:end], order), x[order:end])
    run = x.copy()
    for t in range(end, len(x)):
        run[t] = weights[0] + run[t - order : t][::-1] @ weights[1:]
    return run[end:]


def to_numbers(roots):
    return np.maximum(roots, 0) ** 2


def references(config: Config, x: np.ndarray, begin: int, test: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What the GRU is compared with, by name: forecasts ``(T,)`` fitted before ``begin`` and before ``test``."""
    before = np.concatenate([[np.nan], x[:-1]])
    found = {"persistence": (before, before)}
    for of, series, back in (("", x, np.asarray), (" of roots", np.sqrt(x), to_numbers)):
        fitted = {
            p: (back(autoregression(series, p, begin)), back(autoregression(series, p, test)))
            for p in range(1, config.orders + 1)
        }
        chosen = min(fitted, key=lambda p: rmse(fitted[p][0][begin:test], x[begin:test]))
        hindsight = min(fitted, key=lambda p: rmse(fitted[p][1][test:], x[test:]))
        found[f"AR({chosen}){of}"] = fitted[chosen]
        found[f"AR({hindsight}){of}, best on the test part"] = fitted[hindsight]
    return found


# --- the recurrent network -------------------------------------------------------------------------------------------


def make_model(config: Config) -> fnet.Layer:
    """``(B, T, 1)`` to ``(B, T, 1)``: after each year a forecast of the next."""
    return serial(("gru", gru(config.units)), ("head", dense(1, weights=normal(0.01))))


def sequence(z) -> jax.Array:
    return jnp.asarray(z, jnp.float32)[None, :, None]  # (1, T, 1)


def varied(gradient, config: Config, zero):
    """The engine on a series of another height with noisy inputs, both drawn anew; ``zero`` is z at x = 0."""

    def vary(params, state, batch, key):
        factor = jnp.exp(config.height * jax.random.normal(stream(key, "height"), ()))
        inputs, targets = (zero + factor * (z - zero) for z in (batch.inputs, batch.targets))
        noise = config.noise * jax.random.normal(stream(key, "noise"), inputs.shape)
        return gradient(params, state, fnet.Batch(inputs + noise, targets), key)

    return vary


def train_member(config: Config, updates: int, key, known, z, zero):
    """Train on the years ``known (1, E, 1)``; the model's outputs on all years ``z (1, T, 1)`` along the way.

    Returns the last parameters and ``(U / every, T)``, what it says after each year of the next.
    """
    model, optimizer = make_model(config), fnet.adam(config.learning_rate)
    params, state = model.init(stream(key, "model"), known)
    step = fnet.make_step(varied(engine_of(config)(model, squared_error), config, zero), optimizer)
    data = fnet.Batch(known[:, :-1], known[:, 1:])  # one example, the whole sequence

    def stretch(ts, _):
        ts, _, _ = fnet.train(step, ts, data, epochs=config.every, batch_size=1)
        return ts, fnet.apply(model, ts.params, ts.state, z)[0, :, 0]

    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    ts, said = jax.lax.scan(stretch, start, length=updates // config.every)
    return ts.params, said


def train_ensembles(config: Config, updates: int, known, z, zero):
    """The members' parameters, with an axis M in front, and their forecasts ``(seeds, members, U / every, T − 1)``."""
    keys = jnp.concatenate([jax.random.split(jax.random.key(seed), config.members) for seed in config.seeds])

    def member(key, known, z):
        return train_member(config, updates, key, known, z, zero)

    params, said = jax.jit(jax.vmap(member, in_axes=(0, None, None)))(keys, sequence(known), sequence(z))
    return params, np.asarray(said, np.float64).reshape(len(config.seeds), config.members, -1, len(z))[..., :-1]


def free_run(config: Config, params, z: np.ndarray, test: int) -> np.ndarray:
    """The ensemble's forecasts ``(T − test,)`` when each is given to all members as the next year's number."""
    model = make_model(config)

    def one(z, t):
        said = jax.vmap(lambda params: fnet.apply(model, params, {"gru": (), "head": ()}, z))(params)  # (M, 1, T, 1)
        return z.at[:, t].set(said.mean(0)[:, t - 1]), None

    run = jax.jit(lambda z: jax.lax.scan(one, z, jnp.arange(test, z.shape[1]))[0])(sequence(z))
    return np.asarray(run[0, test:, 0], np.float64)


# --- the comparison --------------------------------------------------------------------------------------------------


def gain_interval(errors_a, errors_b, resamples: int, block: int = 11) -> tuple[float, float]:
    """95 % of the gain, RMSE(a) − RMSE(b), over moving blocks of years drawn with replacement, the same for both.

    ``errors_a`` is ``(T,)``, ``errors_b`` is ``(seeds, T)``, whose RMSE is the mean of the seeds'.
    """
    n, rng = len(errors_a), np.random.default_rng(0)
    block = min(block, n)
    starts = rng.integers(0, n - block + 1, (resamples, -(-n // block)))
    years = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, :n]
    a, b = (np.sqrt((errors[..., years] ** 2).mean(-1)) for errors in (errors_a, errors_b))
    low, high = np.quantile(a - b.mean(0), [0.025, 0.975])
    return float(low), float(high)


def run(config: Config, console: Console | None = None) -> dict:
    """Choose, train, test, draw; returns what was measured."""
    console = open_console(config, console)
    if config.updates % config.every or config.updates < config.every:
        raise SystemExit(f"updates = {config.updates}; expected a multiple of every = {config.every}")
    years, x = load()
    test = len(x) - config.test_size
    begin = test - config.validation_size
    if begin <= 2 * config.orders:
        raise SystemExit(
            f"{begin} years remain to train on; expected more than {2 * config.orders}: make a part smaller"
        )
    folder = new_run_folder(config, "sunspots")

    others = references(config, x, begin, test)
    linear = next(name for name in others if name.startswith("AR"))
    order = int(linear[3:-1])
    roots = np.sqrt(x)
    mean, deviation = roots[:begin].mean(), roots[:begin].std()  # of the training part
    z, zero = (roots - mean) / deviation, -mean / deviation
    with console.status(f"{len(config.seeds)} ensembles of {config.members}, {config.updates} updates"):
        _, said = train_ensembles(config, config.updates, z[:begin], z, zero)
        by_updates = to_numbers(said.mean(1) * deviation + mean)  # (seeds, U / every, T − 1)
        curve = np.array([[rmse(f[begin - 1 : test - 1], x[begin:test]) for f in seed] for seed in by_updates])
        best = int(curve.mean(0).argmin())
        updates = (best + 1) * config.every
        params, said = train_ensembles(config, updates, z[:test], z, zero)
        forecasts = to_numbers(said[:, :, -1].mean(1) * deviation + mean)[:, test - 1 :]  # (seeds, test years)
        first = jax.tree.map(lambda leaf: leaf[: config.members], params)
        gru_run = to_numbers(free_run(config, first, z, test) * deviation + mean)
    linear_run = free_autoregression(x, order, test)

    observed = x[test:]
    scores = np.array([rmse(forecast, observed) for forecast in forecasts])
    validation = {name: rmse(f[begin:test], x[begin:test]) for name, (f, _) in others.items()}
    tested = {name: rmse(f[test:], observed) for name, (_, f) in others.items()}
    goal = min(tested["persistence"], tested[linear])
    validation["GRU"], tested["GRU"] = float(curve[:, best].mean()), float(scores.mean())
    spread = float(scores.std(ddof=1)) if len(scores) > 1 else 0.0
    intervals = {
        name: gain_interval(f[test:] - observed, forecasts - observed, config.resamples)
        for name, (_, f) in others.items()
    }
    rows = {
        name: {
            "validation": f"{validation[name]:.2f}",
            "test": f"{tested[name]:.2f}" + (f" ± {spread:.2f}" if name == "GRU" else ""),
            "GRU's gain, 95 %": "{:.2f} to {:.2f}".format(*intervals[name]) if name in intervals else "",
        }
        for name in tested
    }
    spans = f"validation {years[begin]}–{years[test - 1]}, test {years[test]}–{years[-1]}"
    console.print(engine_table(f"root mean squared error of next year's sunspots: {spans}", rows))
    verdict = "reached" if tested["GRU"] < goal else "missed"
    console.print(
        f"GRU {tested['GRU']:.2f} ± {spread:.2f} after {updates} updates; to reach: below {goal:.2f}: {verdict}"
    )

    draw_forecasts(years[test:], observed, forecasts, others[linear][1][test:], order, folder / "forecasts.png")
    draw_free_run(years, x, test, gru_run, linear_run, order, folder / "free_run.png")
    results = {
        "order": order,
        "updates": updates,
        "validation_rmse": validation,
        "test_rmse": tested,
        "seeds": scores.tolist(),
        "deviation": spread,
        "gain_intervals": intervals,
        "free_run_11_years": {
            "GRU": rmse(gru_run[:11], observed[:11]),
            f"AR({order})": rmse(linear_run[:11], observed[:11]),
        },
    }
    write_results(folder, results)
    say_written(console, folder)
    return {**results, "validation_curve": curve, "forecasts": forecasts, "free_run": gru_run, "folder": folder}


if __name__ == "__main__":
    main(run, Config)
