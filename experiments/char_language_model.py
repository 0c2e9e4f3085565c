"""A language model of characters: an LSTM, a small GPT or a small Llama learns the text that every CPython ships.

    python -m experiments.char_language_model
    python -m experiments.char_language_model --model gpt        or llama
    python -m experiments.char_language_model --text FILE --prompt "Once upon"
    python -m experiments.char_language_model --engine autodiff --seeds 0 1 2

The text is `pydoc_data.topics`, what `help("for")` prints, joined in the order of its keys; it differs a little between
Python versions, so its hash is printed. The last tenth is the validation part, and nothing is chosen on it: the last
parameters are the ones that count. The rest is cut into windows of T + 1 characters, one beginning where the other
ends, so that each character but the first is a target once an epoch; the windows are the data set and are shuffled.

Bits per character is the mean of −log2 p(character | those before it) over all validation characters, each counted
once. The LSTM reads the validation part in one go, its carry passed along. The GPT sees T characters at most: its
windows overlap by half, and only the targets of the second half count (of the first window, all). Beside them stand the
same bits for the frequencies of single characters and of pairs, counted on the training part.

Legend: B batch, T characters of a window, S stride of windows, N characters, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import fnet
from experiments.common import length, main, new_run_folder, open_console, say_written, train, write_results
from experiments.options import ENGINES, AmountOrNone, ByEngine, Count, CountOrNone, Positive, Resumable, Seeds, Whole
from experiments.pictures.parts import grid_and_legend, mean_and_spread
from fnet.core.files import first_line
from fnet.core.numerics import stream
from fnet.layers import lstm
from fnet.layers.models import gpt, llama, recurrent_lm
from fnet.optimizers.schedules import warmup_cosine
from fnet.optimizers.transforms import clip_by_global_norm
from fnet.report import engine_table
from fnet.report.plots import new_figure, save_figure

TARGET = 2.3  # bits per character on CPython's text


@dataclasses.dataclass(frozen=True)
class Config(Resumable, ByEngine):
    """Train a language model of characters and let it write."""

    model: Literal["lstm", "gpt", "llama"] = "lstm"
    engine: Literal["backprop", "autodiff"] = "backprop"
    text: Path | None = None  # a file in UTF-8; None takes the text of Python's own help
    length: Count = 64  # T, characters of a window
    batch_size: Count = 32
    epochs: CountOrNone = None  # None takes 8 (lstm) or 3 (gpt, llama)
    features: Count = 128  # of the embedding; the LSTM's units
    layers: Count = 2  # of the GPT and the Llama
    heads: Count = 4  # of the GPT; of the Llama, half as many of keys and values
    learning_rate: AmountOrNone = None  # Adam's highest; None takes 5e-3 (lstm) or 3e-3 (gpt, llama)
    warmup_steps: Whole = 100  # then half a cosine down to 0
    limit: Positive = 1.0  # of the gradient's global norm
    seeds: Seeds = (0,)  # of the parameters and the order of the windows; one run each
    sample: Count = 400  # characters to write
    prompt: str | None = None  # what the sample begins with; None takes the first 40 characters of the validation part
    temperature: Positive = 0.7
    top_k: Count = 20


DEFAULTS = {
    "lstm": {"epochs": 8, "learning_rate": 5e-3},
    "gpt": {"epochs": 3, "learning_rate": 3e-3},
    "llama": {"epochs": 3, "learning_rate": 3e-3},
}


def load(path: Path | None) -> str:
    """The text to learn; SystemExit where the file cannot be read."""
    if path is None:
        return "".join(topics[key] for key in sorted(topics))
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"--text {path} cannot be read ({first_line(error)}); expected a file in UTF-8") from None


def encode(text: str, vocabulary: str) -> np.ndarray:
    """Ids ``(N,)`` of the characters; SystemExit for one that is not in the vocabulary."""
    ids = {character: i for i, character in enumerate(vocabulary)}
    if unknown := set(text) - set(ids):
        raise SystemExit(f"{min(unknown)!r} does not occur in the text, so the model has no id for it")
    return np.array([ids[character] for character in text], np.int32)


def windows(ids: np.ndarray, length: int, stride: int) -> fnet.Batch:
    """Windows of ``length`` inputs, each ``stride`` after the one before, with the character after each as its target.

    Weights are 1 where a target counts: of the N − 1 targets each counts in one window, the last in which it is seen
    with the most before it; beyond the end, where ids are 0, none does. Inputs, targets, weights ``(windows, T)``.
    """
    targets = len(ids) - 1
    starts = np.arange(0, max(targets - length, 0) + stride, stride)
    at = starts[:, None] + np.arange(length)  # (windows, T), the input's place in the text
    new = (np.arange(length) >= length - stride) | (starts == 0)[:, None]
    ids = np.concatenate([ids, np.zeros(length + stride, np.int32)])
    weights = (new & (at < targets)).astype(np.float32)
    return fnet.Batch(jnp.array(ids[at]), jnp.array(ids[at + 1]), jnp.array(weights))


def counted_bits(train: np.ndarray, ids: np.ndarray, vocabulary: int) -> dict[str, float]:
    """Bits per character of ``ids[1:]``, each after the one before, by counts of characters and of pairs, plus one."""
    single = np.bincount(train, minlength=vocabulary) + 1.0
    pairs = np.ones((vocabulary, vocabulary))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    p_single, p_pair = single / single.sum(), pairs / pairs.sum(1, keepdims=True)
    bits = {"unigram": -np.log2(p_single[ids[1:]]), "bigram": -np.log2(p_pair[ids[:-1], ids[1:]])}
    return {name: float(values.mean()) for name, values in bits.items()}


def make_model(config: Config, vocabulary: int) -> fnet.Layer:
    if config.model == "lstm":
        return recurrent_lm(vocabulary, lstm(config.features), features=config.features)
    layers, features, heads = config.layers, config.features, config.heads
    if config.model == "gpt":
        return gpt(vocabulary, length=config.length, layers=layers, features=features, heads=heads)
    hidden, kv_heads = 8 * features // 3, max(1, heads // 2)  # three matrices, together as large as the GPT's two
    return llama(vocabulary, layers=layers, features=features, heads=heads, kv_heads=kv_heads, hidden=hidden, tied=True)


def validation_bits(config: Config, model: fnet.Layer, params, state, ids: np.ndarray) -> float:
    """Bits per character of ``ids[1:]``, each counted once."""
    loss = fnet.softmax_cross_entropy
    if config.model == "lstm":  # the whole text as one sequence: the carry goes from its beginning to its end
        whole = fnet.Batch(jnp.array(ids[None, :-1]), jnp.array(ids[None, 1:]))
        result = jax.jit(fnet.make_evaluate(model, loss))(params, state, whole)
    else:
        halves = windows(ids, config.length, config.length // 2)
        result = jax.jit(fnet.make_evaluate(model, loss, batch_size=64))(params, state, halves)
    assert float(result["loss"].count) == len(ids) - 1
    return float(result["loss"].value) / math.log(2)


def train_one(config: Config, seed: int, data: fnet.Batch, model: fnet.Layer, console: Console, folder: Path):
    """One run from its seed; returns its last state and its history."""
    key, loss = jax.random.key(seed), fnet.softmax_cross_entropy
    assert config.epochs and config.learning_rate
    steps = config.epochs * -(-len(data.targets) // config.batch_size)
    if steps <= config.warmup_steps:
        raise SystemExit(f"warmup_steps = {config.warmup_steps}; expected less than {steps}, the steps of the run")
    rate = warmup_cosine(config.learning_rate, config.warmup_steps, steps)
    optimizer = fnet.chain(clip_by_global_norm(config.limit), fnet.adam(rate, b2=0.99))
    params, state = fnet.init(model, stream(key, "model"), data.inputs[:1])
    step = fnet.make_step(ENGINES[config.engine](model, loss), optimizer)
    start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
    own, title = dataclasses.replace(config, seeds=(seed,)), f"{config.model}, seed {seed}"
    return train(own, title, folder, step, start, data, console)


def write(config: Config, model: fnet.Layer, ts: fnet.TrainState, vocabulary: str, prompt: str, key) -> str:
    """The prompt and ``config.sample`` characters after it."""
    options = {"temperature": config.temperature, "top_k": min(config.top_k, len(vocabulary)), "key": key}
    context = None if config.model == "lstm" else config.length

    def generate(ts, ids):
        return fnet.generate(model, ts.params, ts.state, ids, config.sample, context=context, **options)

    ids = jax.jit(generate)(ts, jnp.array(encode(prompt, vocabulary))[None])  # (1, P + sample)
    return "".join(vocabulary[i] for i in np.asarray(ids[0]))


def run(config: Config, console: Console | None = None) -> dict:
    """Train, measure, let it write; returns what was measured, by seed where it depends on it."""
    console, begin = open_console(config, console), time.perf_counter()
    given = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    config = dataclasses.replace(config, **{**DEFAULTS[config.model], **given})
    text = load(config.text)
    vocabulary = "".join(sorted(set(text)))
    ids = encode(text, vocabulary)
    end = len(ids) * 9 // 10
    train_ids, validation_ids = ids[:end], ids[end - 1 :]  # the first validation character follows the last before
    if len(train_ids) <= config.length:
        raise SystemExit(f"{len(train_ids)} characters to train on; expected more than length = {config.length}")
    prompt = text[end : end + 40] if config.prompt is None else config.prompt
    encode(prompt, vocabulary)  # before anything is trained
    digest = hashlib.sha256(text.encode()).hexdigest()
    console.print(f"{len(text)} characters, {len(vocabulary)} different ones, sha256 {digest}", soft_wrap=True)

    model, data = make_model(config, len(vocabulary)), windows(train_ids, config.length, config.length)
    length(config, data)  # an option that cannot be leaves no folder
    folder = new_run_folder(config, "char_language_model")
    bits, runs, sample = counted_bits(train_ids, validation_ids, len(vocabulary)), {}, ""
    for seed in config.seeds:
        ts, history = train_one(config, seed, data, model, console, folder / f"seed_{seed}")
        runs[seed] = {
            "bits": validation_bits(config, model, ts.params, ts.state, validation_ids),
            "training bits": history.epochs["loss"] / math.log(2),
            "characters a second": len(history.epochs["loss"]) * (end - 1) / max(history.run_seconds, 1e-9),
            "compile seconds": history.compile_seconds,
        }
        sample = sample or write(config, model, ts, vocabulary, prompt, stream(jax.random.key(seed), "sample"))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(ts.params))

    reached = np.array([r["bits"] for r in runs.values()])
    rows = {f"{name}, counted": {"validation": f"{value:.3f}"} for name, value in bits.items()}
    for seed, r in runs.items():
        rows[f"{config.model}, seed {seed}"] = {
            "validation": f"{r['bits']:.3f}",
            "last epoch": f"{r['training bits'][-1]:.3f}",
            "characters/s": f"{r['characters a second']:.0f}",
            "compiling": f"{r['compile seconds']:.1f} s",
        }
    console.print(
        engine_table(f"bits per character: {config.model} of {parameters} parameters by {config.engine}", rows)
    )
    console.print(sample, markup=False, highlight=False)
    goal = "" if config.text else f"; to reach: at most {TARGET}: {'reached' if reached.mean() <= TARGET else 'missed'}"
    seconds = time.perf_counter() - begin
    mean = mean_and_spread(reached, ddof=1)
    console.print(f"{len(validation_ids) - 1} validation characters: {mean} bits each{goal}")
    console.print(f"{seconds:.0f} s in all")
    draw(bits, runs, config, folder / "bits.png")
    (folder / "sample.txt").write_text(sample, encoding="utf-8")
    results = {
        "sha256": digest,
        "parameters": parameters,
        "counted_bits": bits,
        "bits": {str(seed): r["bits"] for seed, r in runs.items()},
        "characters_per_second": {str(seed): r["characters a second"] for seed, r in runs.items()},
        "seconds": seconds,
    }
    write_results(folder, results)
    say_written(console, folder)
    return {**results, "runs": runs, "sample": sample, "prompt": prompt, "folder": folder}


def draw(bits: dict, runs: dict, config: Config, path: Path) -> None:
    """Training bits over the epochs, the last parameters' validation bits, and what counting gives."""
    figure, ax = new_figure(width=6)
    for i, (seed, r) in enumerate(runs.items()):
        epochs = np.arange(1, len(r["training bits"]) + 1)
        ax.plot(epochs, r["training bits"], "o-", markersize=4, color=f"C{i}", label=f"seed {seed}: training")
        ax.plot(epochs[-1:], [r["bits"]], "D", color=f"C{i}", markeredgecolor="black", label=f"seed {seed}: validation")
    for (name, value), style in zip(bits.items(), ("--", "-."), strict=True):
        ax.axhline(value, color="gray", linestyle=style, linewidth=1, label=f"{name}, counted")
    if config.text is None:
        ax.axhline(TARGET, color="black", linestyle=":", linewidth=1, label="to reach")
    ax.set(xlabel="epoch", ylabel="bits per character", title=f"{config.model}, {config.engine}")
    grid_and_legend(ax)
    save_figure(figure, path)


if __name__ == "__main__":
    main(run, Config)
