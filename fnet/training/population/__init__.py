"""Populations: many runs at once in one compiled program, over seeds and over any hyperparameter.

    run(hyper, key, *data) -> results                                a whole run as a pure function
    hyper, keys = crossed(grid(learning_rate=rates, b1=[0.5, 0.9]), jax.random.split(key, 8))
    population = train_population(run, hyper, keys, *data)           `jax.vmap` of it, compiled once

``run`` builds model, loss and optimizer from ``hyper``, a dict of numbers that are traced, and usually trains by
`fnet.train`; ``data`` are arguments of the compiled program. On the host ``hyper`` is a dict of arrays ``(M,)`` and
``keys`` is ``(M,)``: member i is ``run({name: values[i]}, keys[i], *data)``, with the same keys, masks and order of the
examples as that run alone, and the same numbers up to the rounding of sums that are taken in another order.

What a run computes from its key alone stands outside of whatever depends on the member's position: a condition on a
number that differs between members becomes a selection, which computes both of its branches at every step.

Legend: M members, K keys (seeds), S settings, D devices, n values that are averaged.

`members`: which ones; `train`: all of them in one program; `comparing`: what came of them; `halving`: the better half
goes on.
"""

from fnet.training.population.comparing import (
    Band,
    Member,
    Ranking,
    band,
    best,
    per_member,
    ranking,
    settings_of,
    student,
)
from fnet.training.population.halving import Halving, successive_halving
from fnet.training.population.members import check_members, check_range, crossed, draw, grid, log_uniform, uniform
from fnet.training.population.train import Cost, Population, join, run_members, train_population

__all__ = [
    "Band",
    "Cost",
    "Halving",
    "Member",
    "Population",
    "Ranking",
    "band",
    "best",
    "check_members",
    "check_range",
    "crossed",
    "draw",
    "grid",
    "join",
    "log_uniform",
    "per_member",
    "ranking",
    "run_members",
    "settings_of",
    "student",
    "successive_halving",
    "train_population",
    "uniform",
]
