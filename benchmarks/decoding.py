"""Ids a second of `fnet.generate` with its cache, beside a plain loop in jax that runs the model on all ids for each.

    make bench MODULE=benchmarks.decoding
    make bench MODULE=benchmarks.decoding ARGS="--counts 64 --repeats 3"

gpt of 4 blocks of 128 features and 4 heads, float32; 4 prompts of 16 ids out of 100, and as many more as ``--counts``
says. The loop gives the model the prompt and all ids to come, zeros where they are not drawn yet, and takes the
likeliest of the logits at the last; one compiled program each. Times are medians of rounds, compiling left out; the
ratio is taken round by round. With a cache the time of an id does not depend on how many are before it, but for the
attention to a cache of the whole length.

With ``--repeats 3`` on two cores, jax 0.10.2: the loop took 18.6 times as long (16.3 to 24.4) for 64 ids, 47.8 times
(46.1 to 54.7) for 256; 11,145 and 9,806 ids a second with the cache, 522 and 205 without.
"""

from __future__ import annotations

import numpy as np

from benchmarks.measuring import arguments, interleaved, record, show

VOCABULARY, BATCH, PROMPT = 100, 4, 16


def runs(count: int, layers: int, features: int) -> dict:
    """A function for each form, which draws ``count`` ids and waits for them."""
    import jax
    import jax.numpy as jnp

    import fnet
    from fnet.layers.children import apply

    length = PROMPT + count
    model = fnet.models.gpt(VOCABULARY, length=length, layers=layers, features=features, heads=4)
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, (BATCH, PROMPT)), jnp.int32)
    params, state = fnet.init(model, jax.random.key(0), prompt)
    key = jax.random.key(1)

    @jax.jit
    def cached(params, prompt):
        return fnet.generate(model, params, state, prompt, count, key=key, top_k=1, context=length, cache=True)

    @jax.jit
    def loop(params, prompt):
        def one(n, ids):
            logits = apply(model, params, state, ids)
            likeliest = jnp.argmax(jax.lax.dynamic_index_in_dim(logits, n - 1, 1, keepdims=False), -1)
            return jax.lax.dynamic_update_index_in_dim(ids, likeliest.astype(ids.dtype), n, 1)

        ids = jnp.zeros((BATCH, length), prompt.dtype).at[:, :PROMPT].set(prompt)
        return jax.lax.fori_loop(PROMPT, length, one, ids)

    forms = {
        "fnet.generate": lambda: jax.block_until_ready(cached(params, prompt)),
        "loop without a cache": lambda: jax.block_until_ready(loop(params, prompt)),
    }
    first, same = (np.asarray(run())[:, PROMPT] for run in forms.values())  # compiled by this
    np.testing.assert_array_equal(first, same)  # later ones may part where two are as likely but for rounding
    return forms


def main() -> None:
    parser = arguments("decoding with a cache and without")
    parser.add_argument("--counts", type=int, nargs="*", default=[64, 256], help="ids to draw")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    options, tables = parser.parse_args(), []
    for count in options.counts:
        times = interleaved(runs(count, options.layers, options.features), options.repeats, rest=0.02)
        title = f"{count} ids after {PROMPT}, {BATCH} at a time"
        tables.append(show(title, times, ("fnet.generate",)))
        rates = {name: [BATCH * count / each for each in seconds] for name, seconds in times.items()}
        tables.append(show(title, rates, unit="ids a second"))
    record(options.json, "decoding", tables)


if __name__ == "__main__":
    main()
