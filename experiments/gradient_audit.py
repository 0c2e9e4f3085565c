"""Every layer, loss and model of fnet under the gradient audit: one table, one page.

    python -m experiments.gradient_audit
    python -m experiments.gradient_audit --only relu mlp      what begins with these names
    python -m experiments.gradient_audit --fault tanh         what a catch looks like; --help lists the faults
    python -m experiments.gradient_audit --json docs/mathematics-audit.json     a line for each audit, kept for the docs

Layers are audited by `fnet.check_layer` (parameters and inputs, in train and in eval mode), losses by
`fnet.check_gradients` with the outputs as the leaf, models by `fnet.check_model`, whole and layer by layer. Each row's
name begins with the public name that it is of. Inputs are Gaussian and lie on no kink, but for the row that says so.

The page is ``index.html`` in the run's folder; each model has a page of its own beside it, with pictures. The command
fails if any gradient is wrong or not verified.

Legend: B examples, T steps in time, F features, K classes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Mapping
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.markup import escape as as_text

import fnet
from experiments.common import main, new_run_folder, open_console, say_written
from experiments.options import Count, InFolder, Seeded
from experiments.pictures.gradient_audit import verdict_and_cause, verdict_table, write_pages
from fnet import losses
from fnet.core.numerics import stream
from fnet.gradcheck import Report
from fnet.layers.cells import LSTMCarry
from fnet.types import PyTree

B, T, F, K = 4, 3, 6, 5
FAULTS = {  # activation: what its backward does wrong, and that backward
    "relu": ("the gradient passes where x < 0, too", lambda y, dy: dy),
    "sigmoid": ("y for y (1 − y)", lambda y, dy: dy * y),
    "softmax": ("the sum over the classes is forgotten", lambda y, dy: dy * y),
    "tanh": ("its derivative is taken at y, not at x", lambda y, dy: dy * (1 - jnp.tanh(y) ** 2)),
}


@dataclasses.dataclass(frozen=True)
class Config(InFolder, Seeded):
    """Audit every layer, loss and model of fnet."""

    only: tuple[str, ...] = ()  # the audits whose names begin with one of these; none given: all
    fault: Literal["relu", "sigmoid", "softmax", "tanh"] | None = None  # the activation whose backward is made wrong
    batch_size: Count = 32  # digits in the audit of 784-128-64-10
    json: Path | None = None  # a file to keep a line for each audit in; those not run now keep theirs


def constructors(fault: str | None) -> SimpleNamespace:
    """The public functions of `fnet.layers`; the layer named by ``fault`` gets the wrong backward."""
    found = SimpleNamespace(**{name: getattr(fnet.layers, name) for name in fnet.layers.__all__})
    if fault is not None:
        right, (_, backward) = getattr(fnet.layers, fault), FAULTS[fault]
        setattr(found, fault, lambda: right()._replace(backward=lambda params, y, dy: ((), backward(y, dy))))
    return found


def drawn(*shape: int) -> np.ndarray:
    """Gaussian numbers of a generator of its own, so that a new row changes no other."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def layer_cases(make: SimpleNamespace, rng) -> dict[str, tuple[fnet.Layer, PyTree]]:
    """Every layer and its inputs."""
    x, sequence, images, pixels = (
        rng.standard_normal(s).astype(np.float32) for s in ((B, F), (B, T, F), (B, T, T, 2), (2, 5, 5, 2))
    )
    volumes = pixels[:, :4, :4].reshape(2, 4, 2, 2, 2)
    on_kink = x.copy()
    on_kink[1, 2] = 0
    ids = rng.integers(0, K, (B, T))
    ragged = np.arange(T)[None] < np.array([T, 1, 2, T])[:, None]
    h, c = (rng.standard_normal((B, K)).astype(np.float32) for _ in "hc")
    memory = rng.standard_normal((B, T + 1, 4)).astype(np.float32)
    seen = np.arange(T + 1)[None] < np.array([1, T, 2, T + 1])[:, None]
    block = make.residual(make.dense(F), make.tanh())
    shared = drawn(1, 2, T, T)
    return {
        "dense": (make.dense(K), x),
        "dense, without bias": (make.dense(K, bias=None), x),
        "dense, along time": (make.dense(K), sequence),
        "dense, masked": (make.dense(K), (sequence, ragged)),
        "dense, its backward as jax's rule": (make.with_hand_backward(make.dense(K)), x),
        "flatten": (make.flatten(), images),
        "reshape": (make.reshape(T, -1), images),
        # activations
        "celu": (make.celu(0.7), x),
        "elu": (make.elu(), x),
        "elu, alpha 0.5": (make.elu(0.5), x),
        "geglu": (make.geglu(K), x),
        "gelu": (make.gelu(), x),
        "gelu, by tanh": (make.gelu(approximate=True), x),
        "gated": (make.gated(K, make.tanh(), bias=None), x),
        "glu": (make.glu(), x),
        "hard_sigmoid": (make.hard_sigmoid(), 3 * x),
        "hard_swish": (make.hard_swish(), 3 * x),
        "hardmax": (make.hardmax(), x),
        "hard_tanh": (make.hard_tanh(-0.5, 1.0), x),
        "identity": (make.identity(), x),
        "leaky_relu": (make.leaky_relu(), x),
        "leaky_relu, slope 0.3": (make.leaky_relu(0.3), x),
        "log_softmax": (make.log_softmax(), x),
        "mish": (make.mish(), x),
        "prelu": (make.prelu(), x),
        "prelu, shared, along time": (make.prelu(shared=True), sequence),
        "reglu": (make.reglu(K), x),
        "relu": (make.relu(), x),
        "relu, one input is 0": (make.relu(), on_kink),
        "selu": (make.selu(), x),
        "shrink": (make.shrink(0.4, 0.2), x),
        "sigmoid": (make.sigmoid(), x),
        "silu": (make.silu(), x),
        "silu, beta 2": (make.silu(2.0), x),
        "softmax": (make.softmax(), x),
        "softmax, along time": (make.softmax(), sequence),
        "softplus": (make.softplus(), x),
        "softplus, beta 3": (make.softplus(3.0), x),
        "softsign": (make.softsign(), x),
        "step": (make.step(), x),
        "squeeze_and_excitation": (make.squeeze_and_excitation(2, 3), pixels),
        "swiglu": (make.swiglu(K), sequence),
        "tanh": (make.tanh(), x),
        "tanh_shrink": (make.tanh_shrink(), x),
        "threshold": (make.threshold(0.3, -2.0), x),
        # images
        "conv": (make.conv(3, (3, 3)), pixels),
        "conv, strided, valid": (make.conv(3, (2, 3), stride=2, padding="VALID"), pixels),
        "conv, depthwise, dilated": (make.conv(4, (2, 2), groups=2, dilation=2), pixels),
        "conv, by XLA": (make.conv(3, (3, 3), form="xla"), pixels),
        "conv, weights by length and direction": (make.weight_norm(make.conv(3, (2, 2))), pixels),
        "conv, weights by their largest gain": (make.spectral_norm(make.conv(3, (2, 2)), iterations=200), pixels),
        "conv, causal along time": (make.conv(3, (2,), padding="CAUSAL"), sequence),
        "conv, over volumes": (make.conv(3, (3, 2, 2), stride=(2, 1, 1)), volumes),
        "conv, over volumes, by XLA": (make.conv(4, (2, 2, 1), groups=2, form="xla"), volumes),
        "conv_transpose": (make.conv_transpose(3, (3, 3), stride=2), pixels),
        "conv_transpose, grouped, larger at its end": (
            make.conv_transpose(4, (2, 3), stride=2, groups=2, padding=((1, 1), (0, 1)), output_padding=(1, 0)),
            pixels,
        ),
        "lp_pool": (make.lp_pool((3, 2), 3.0, stride=2), pixels),
        "max_pool": (make.max_pool((2, 2)), pixels),
        "max_pool, dilated, in ceil mode": (make.max_pool((2, 2), dilation=3, ceil_mode=True), pixels),
        "max_pool, overlapping": (make.max_pool((3, 3), stride=2, padding="SAME"), pixels),
        "avg_pool": (make.avg_pool((2, 2), padding="SAME"), pixels),
        "avg_pool, over volumes, in ceil mode": (make.avg_pool((3, 1, 2), stride=2, ceil_mode=True), volumes),
        "adaptive_avg_pool": (make.adaptive_avg_pool((2, 7)), pixels),
        "adaptive_max_pool": (make.adaptive_max_pool((3, 2)), pixels),
        "adaptive_max_pool, over volumes": (make.adaptive_max_pool((3, 2, 3)), volumes),
        "global_max_pool": (make.global_max_pool(), pixels),
        "global_avg_pool": (make.global_avg_pool(), pixels),
        "global_avg_pool, its axes kept": (make.global_avg_pool(keepdims=True), pixels),
        "global_max_pool, masked": (make.global_max_pool(), (sequence, ragged)),
        "global_avg_pool, masked": (make.global_avg_pool(), (sequence, ragged)),
        "pad": (make.pad(((1, 0), (-2, 3)), value=0.5), pixels),
        "pad, reflected": (make.pad(((4, 1), (0, 2)), mode="reflect"), pixels),
        "pad, replicated": (make.pad(((2, 1), (0, 6)), mode="replicate"), pixels),
        "pad, in circles": (make.pad(((1, 5), (2, 0)), mode="circular"), pixels),
        "resize": (make.resize((8, 3)), pixels),
        "resize, cubic, aligned": (make.resize(scale=1.4, method="cubic", corners="align"), pixels),
        "resize, antialiased": (make.resize((2, 7), antialias=True), pixels),
        "resize, nearest": (make.resize((3, 7), method="nearest"), pixels),
        "resize, nearest, twice": (make.resize(scale=2, method="nearest"), pixels),
        "grid_sample": (make.grid_sample(), (pixels, drawn(2, 3, 4, 2))),
        "affine_grid": (make.affine_grid((3, 4)), drawn(2, 2, 3)),
        "pixel_shuffle": (make.pixel_shuffle(2), rng.standard_normal((2, 2, 3, 8)).astype(np.float32)),
        "pixel_unshuffle": (make.pixel_unshuffle(2, order="DCR"), rng.standard_normal((2, 4, 2, 3)).astype(np.float32)),
        # normalization and noise
        "batch_norm": (make.batch_norm(), images),
        "batch_norm, masked": (make.batch_norm(), (sequence, ragged)),
        "layer_norm": (make.layer_norm(), sequence),
        "rms_norm": (make.rms_norm(), sequence),
        "group_norm": (make.group_norm(2), rng.standard_normal((2, T, T, 4)).astype(np.float32)),
        "group_norm, masked": (make.group_norm(2), (sequence, ragged)),
        "local_response_norm": (make.local_response_norm(3, alpha=0.5), sequence),
        "l2_normalize": (make.l2_normalize(), sequence),
        "dropout": (make.dropout(0.4), x),
        # sequences
        "embedding": (make.embedding(K, F), ids),
        "embedding, a row for padding that no id meets": (make.embedding(K, F, padding_idx=1), ids + (ids == 1)),
        "tied_embedding": (make.tied_embedding(K, F, make.dense(F)), ids),
        "learned_positions": (make.learned_positions(T + 2), sequence),
        "sinusoidal_positions": (make.sinusoidal_positions(), sequence),
        "rotary_positions": (make.rotary_positions(), rng.standard_normal((B, T, 2, 4)).astype(np.float32)),
        "rotary_positions, partial, by neighbours": (
            make.rotary_positions(np.array([1.0, 0.3]), interleaved=True),
            rng.standard_normal((B, T, 2, 5)).astype(np.float32),
        ),
        "rnn": (make.rnn(K), (sequence, h)),
        "rnn, ragged, reversed": (make.rnn(K, reverse=True), (sequence, h, ragged)),
        "gru, ragged": (make.gru(K), (sequence, ragged)),
        "gru": (make.gru(K), (sequence, h)),
        "gru, weights by length and direction": (make.weight_norm(make.gru(2), "recurrent/w"), sequence),
        "gru, reset before": (make.gru(K, reset_after=False), (sequence, h)),
        "lstm": (make.lstm(K), (sequence, LSTMCarry(h, c))),
        "lstm, ragged": (make.lstm(K), (sequence, LSTMCarry(h, c), ragged)),
        "rnn_cell": (make.rnn_cell(K), (x, h)),
        "gru_cell": (make.gru_cell(K), (x, h)),
        "lstm_cell": (make.lstm_cell(K), (x, LSTMCarry(h, c))),
        "bidirectional": (make.bidirectional(make.gru(K)), sequence),
        "stacked": (make.stacked(make.gru(K), make.rnn(3)), sequence),
        "attention": (make.attention(2, causal=True), sequence),
        "attention, cross, padded, grouped": (make.attention(2, kv_heads=1), (sequence, memory, seen)),
        "attention, padded": (make.attention(2), (sequence, ragged)),
        "attention, rotary": (make.attention(1, rotary=10.0), sequence),
        "attention, every option": (
            make.attention(
                4,
                kv_heads=2,
                head_features=2,
                value_features=3,
                causal=True,
                window=2,
                softcap=2.0,
                dropout_rate=0.3,
                relative=make.relative_positions(4, buckets=4, max_distance=3, bidirectional=False),
                block_size=2,
            ),
            sequence,
        ),
        "attention, a score function": (make.attention(2, score=make.softsign(), block_size=2), (sequence, ragged)),
        "attention, a bias of each example": (
            make.attention(2, causal=True, bias=None),
            (sequence, ragged, drawn(B, 2, T, T)),
        ),
        "attention, alibi, a mask for each head": (
            make.attention(2, relative=make.alibi(2), softcap=3.0),
            (sequence, rng.random((B, 2, T, T)) < 0.7),
        ),
        "relative_positions": (
            make.relative_positions(2, buckets=8, max_distance=5),
            (rng.integers(0, 9, (B, T)), rng.integers(0, 9, (B, T + 2))),
        ),
        "biased": (make.biased(make.relative_positions(2), make.attention(2, bias=None)), (sequence, ragged)),
        "relative_positions_2d": (
            make.relative_positions_2d(2, 3),
            (np.arange(4 * B).reshape(B, 4) % 9, np.arange(T * B).reshape(B, T) % 9),
        ),
        "biased, blocks by scan": (
            make.biased(make.relative_positions(2), make.repeat(fnet.models.t5_block(F, 2, hidden=5), 2)),
            sequence,
        ),
        # layers of layers
        "serial": (
            make.serial(make.flatten(), make.dense(K), make.tanh(), ("last", make.dense(3, bias=None)), make.softmax()),
            images,
        ),
        "serial, computed again": (make.remat(make.serial(make.dense(K), make.tanh())), x),
        "residual": (block, x),
        "residual, weights by their largest gain": (
            make.spectral_norm(block, "dense_0/w", iterations=200),
            x,
        ),
        "residual, with a shortcut": (make.residual(make.tanh(), make.dense(K), shortcut=make.dense(K)), x),
        "parallel": (make.parallel(make.dense(K), make.tanh()), x),
        "concatenate": (make.concatenate(), (x, rng.standard_normal((B, K)).astype(np.float32))),
        "add": (make.add(), (sequence, sequence[:, :1], sequence[:, :, :1])),
        "multiply": (make.multiply(), tuple(rng.standard_normal((3, B, K)).astype(np.float32))),
        "multiply, broadcast": (make.multiply(), (pixels, pixels[:, :1, :1], pixels[:, :, :1, :1])),
        "repeat": (make.repeat(block, 2), x),
        "serial, padded, to its mask's end": (
            make.serial(
                make.residual(make.attention(2), make.layer_norm()),
                make.parallel(make.dense(2), make.stacked(make.gru(3), make.rnn(2))),
                make.concatenate(),
                make.repeat(make.bidirectional(make.gru(2)), 2),
                make.drop_mask(),
            ),
            (sequence, ragged),
        ),
        "windowed": (make.windowed(make.attention(1, bias=None), 3), drawn(2, 3, 6, 4)),
        "windowed, shifted": (make.windowed(make.attention(1, bias=None), 2, shift=1), drawn(2, 4, 6, 4)),
        "drop_mask": (make.drop_mask(), (sequence, ragged)),
        # the blocks of models
        "basic_block": (fnet.models.basic_block(3, project=True), pixels),
        "bottleneck_block": (fnet.models.bottleneck_block(2, project=True, expansion=2), pixels),
        "imagenet_stem": (fnet.models.imagenet_stem(2), rng.standard_normal((2, 8, 8, 1)).astype(np.float32)),
        "inverted_residual": (
            fnet.models.inverted_residual(2, 4, 2, squeeze=3, activation=make.hard_swish()),
            pixels,
        ),
        "inverted_residual, strided, not expanded": (fnet.models.inverted_residual(2, 2, 3, stride=2), pixels),
        "llama_block": (fnet.models.llama_block(F, F // 2, kv_heads=1, hidden=5), sequence),
        "patch_merging": (fnet.models.patch_merging(3), drawn(2, 4, 6, 2)),
        "swin_block": (fnet.models.swin_block(8, 2, window=2, expansion=2), drawn(4, 2, 4, 8)),
        "swin_block, shifted, of random depth": (
            fnet.models.swin_block(8, 2, window=2, shift=1, expansion=1, drop_path=0.5),
            drawn(4, 4, 2, 8),
        ),
        "t5_block": (fnet.models.t5_block(F, 2, hidden=5), (sequence, shared)),
        "t5_block, gated, padded": (fnet.models.t5_block(F, 2, hidden=5, gated=True), (sequence, ragged, shared)),
        "transformer_block": (fnet.models.transformer_block(F, 2, causal=True, expansion=2), sequence),
        "wavenet_block": (fnet.models.wavenet_block(F, skip=4, dilation=2), (sequence, drawn(B, T, 4))),
        "wavenet_block, the first and last": (
            fnet.models.wavenet_block(F, skip=4, kernel_size=3, last=True),
            sequence,
        ),
    }


def loss_cases(rng) -> dict[str, tuple[fnet.Loss, np.ndarray, np.ndarray]]:
    """Every loss with outputs and targets, of each kind that it takes."""
    z = 2 * rng.standard_normal((B, K)).astype(np.float32)
    y = rng.standard_normal((B, K)).astype(np.float32)
    labels, classes = rng.integers(0, K, B), rng.dirichlet(np.ones(K), B).astype(np.float32)
    zero_or_one = rng.integers(0, 2, (B, K))
    smoothed = losses.smoothed_cross_entropy(0.1)
    weighted = losses.cross_entropy(np.linspace(0.5, 2, K), ignore_index=-1)
    views = rng.standard_normal((B, 3, F)).astype(np.float32)
    return {
        "softmax_cross_entropy, labels": (losses.softmax_cross_entropy, z, labels),
        "softmax_cross_entropy, probabilities": (losses.softmax_cross_entropy, z, classes),
        "softmax_cross_entropy, labels along time": (
            losses.softmax_cross_entropy,
            rng.standard_normal((B, T, K)).astype(np.float32),
            rng.integers(0, K, (B, T)),
        ),
        "smoothed_cross_entropy, labels": (smoothed, z, labels),
        "smoothed_cross_entropy, probabilities": (smoothed, z, classes),
        "negative_log_likelihood, labels": (losses.negative_log_likelihood, z, labels),
        "negative_log_likelihood, probabilities": (losses.negative_log_likelihood, z, classes),
        "cross_entropy, classes weighted and one label ignored": (weighted, z, np.where(np.arange(B) == 1, -1, labels)),
        "cross_entropy, probabilities": (losses.cross_entropy(np.linspace(0.5, 2, K)), z, classes),
        "focal_cross_entropy, labels": (losses.focal_cross_entropy(), z, labels),
        "focal_cross_entropy, probabilities": (losses.focal_cross_entropy(0.5), z, classes),
        "kl_divergence": (losses.kl_divergence, z, classes),
        "kl_divergence_from_logits": (losses.kl_divergence_from_logits, z, y),
        "multiclass_hinge": (losses.multiclass_hinge, z, labels),
        "binary_cross_entropy, 0 and 1": (losses.binary_cross_entropy, z, zero_or_one),
        "binary_cross_entropy, bool": (losses.binary_cross_entropy, z, zero_or_one.astype(bool)),
        "binary_cross_entropy, probabilities": (losses.binary_cross_entropy, z, classes),
        "weighted_binary_cross_entropy": (losses.weighted_binary_cross_entropy(3.0), z, zero_or_one),
        "binary_focal_cross_entropy": (losses.binary_focal_cross_entropy(2.0, 0.25), z, zero_or_one),
        "hinge": (losses.hinge, z, zero_or_one),
        "squared_hinge": (losses.squared_hinge, z, zero_or_one),
        "dice": (losses.dice(), z, zero_or_one),
        "cosine_distance": (losses.cosine_distance, z, y),
        "info_nce": (losses.info_nce(), views[:, :2], labels),
        "triplet": (losses.triplet(), views, labels),
        "ctc": (losses.ctc(), rng.standard_normal((B, 2 * T, K)).astype(np.float32), rng.integers(0, K, (B, T))),
        "pinball": (losses.pinball(0.3), z, y),
        "poisson": (losses.poisson, z, zero_or_one + labels[:, None]),
        "squared_error": (losses.squared_error, z, y),
        "half_squared_error": (losses.half_squared_error, z, y),
        "half_squared_error, one output": (losses.half_squared_error, z[:, 0], y[:, 0]),
        "absolute_error": (losses.absolute_error, z, y),
        "huber": (losses.huber(), z, y),
        "huber, delta 0.5": (losses.huber(0.5), z, y),
    }


def model_cases(make: SimpleNamespace, rng, config: Config) -> dict[str, tuple[fnet.Layer, fnet.Loss, Callable]]:
    """Every model with its loss, and a function that returns the batch."""
    x = rng.standard_normal((B, F)).astype(np.float32)
    y, labels = rng.standard_normal((B, 3)).astype(np.float32), rng.integers(0, 3, B)
    weights = np.array([1, 0.5, 0, 2], np.float32)
    photos, ids = rng.standard_normal((B, 28, 28, 1)).astype(np.float32), rng.integers(0, K, (B, T))

    def digits():
        data = fnet.data.mnist_5k()
        return fnet.data.take(data, np.random.default_rng(config.seed).permutation(5000)[: config.batch_size])

    return {
        "mlp, 6-5-3": (
            fnet.mlp(5, 3, activation=make.relu()),
            fnet.softmax_cross_entropy,
            lambda: fnet.Batch(x, labels, weights),
        ),
        "mlp, 6-5-3 with tanh and sigmoid": (
            fnet.mlp(5, 3, activation=make.tanh(), output=make.sigmoid(), weights=fnet.initializers.glorot_uniform()),
            losses.squared_error,
            lambda: fnet.Batch(x, y),
        ),
        **{
            name: (model, fnet.softmax_cross_entropy, lambda batch=batch: fnet.Batch(*batch))
            for name, (model, batch) in {
                "lenet5": (fnet.models.lenet5(3), (photos, labels)),
                "resnet": (fnet.models.resnet(3, blocks=(1, 1), width=2), (photos[:, :8, :8], labels)),
                "unet": (fnet.models.unet(3, widths=(2, 3)), (photos[:, :4, :4], rng.integers(0, 3, (B, 4, 4)))),
                "swin": (
                    fnet.models.swin(3, features=4, blocks=(2, 1), heads=(1, 2), window=2, patch=2, drop_path=0.3),
                    (photos[:, :8, :8], labels),
                ),
                "vit": (
                    fnet.models.vit(3, patch=4, layers=1, features=F, heads=2, positions=4),
                    (photos[:, :8, :8], labels),
                ),
                "recurrent_lm": (fnet.models.recurrent_lm(K, make.lstm(F), features=F), (ids, ids[::-1])),
                "gpt": (fnet.models.gpt(K, length=T, layers=2, features=F, heads=2), (ids, ids[::-1])),
                "wavenet": (
                    fnet.models.wavenet(K, channels=4, skip=3, dilations=(1, 2)),
                    (ids, ids[::-1]),
                ),
                "llama": (
                    fnet.models.llama(K, layers=1, features=8, heads=2, kv_heads=1, hidden=6),
                    (ids, ids[::-1]),
                ),
            }.items()
        },
        "t5_encoder": (
            fnet.models.t5_encoder(K, layers=2, features=F, heads=2, hidden=5, buckets=4, max_distance=3),
            losses.squared_error,
            lambda: fnet.Batch(ids, drawn(B, T, F)),
        ),
        "autoencoder": (
            fnet.models.autoencoder(F, 4, 2, activation=make.tanh()),
            losses.squared_error,
            lambda: fnet.Batch(x, x),
        ),
        "mlp, 784-128-64-10 on digits": (
            fnet.mlp(128, 64, 10, activation=make.relu()),
            fnet.softmax_cross_entropy,
            digits,
        ),
    }


def audits(config: Config) -> dict[str, Callable[[], Report]]:
    """Every audit by its name, not yet run."""
    rng, make = np.random.default_rng(config.seed), constructors(config.fault)
    quick = {"precisions": (), "cost": False}
    found: dict[str, Callable[[], Report]] = {}
    for name, (layer, x) in layer_cases(make, rng).items():
        key = stream(jax.random.key(config.seed), name)
        found[name] = partial(fnet.check_layer, layer, x, key=key, **quick)
    for name, (loss, outputs, targets) in loss_cases(rng).items():

        def total(outputs, targets, loss=loss):
            return loss.value(outputs, targets).sum()

        found[name] = partial(fnet.check_gradients, total, outputs, targets, gradient=loss.gradient, **quick)
    for name, (model, loss, batch) in model_cases(make, rng, config).items():
        key, options = stream(jax.random.key(config.seed), name), {} if "digits" in name else quick

        def check(model=model, loss=loss, batch=batch, key=key, options=options):
            return fnet.check_model(model, loss, batch(), key=key, **options)

        found[name] = check
    return found


def keep_lines(reports: Mapping[str, Report], names: Collection[str], path: Path) -> None:
    """The verdict, largest relative error and number of leaves of each report into a file of JSON, a line for each.

    The error is that of leaves that are not zero up to rounding; how many are zero is kept beside it. Lines of other
    audits stay as they are, those that are not among the ``names`` go.
    """
    lines = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, report in reports.items():
        found = [leaf for leaf in report.leaves if leaf.cause != "zero up to rounding"]  # whose rounding is no error
        error = max((leaf.relative for leaf in found if not math.isnan(leaf.relative)), default=0.0)
        lines[name] = {
            "verdict": verdict_and_cause(report)[0],
            "error": float(f"{error:.1e}"),
            "leaves": len(report.leaves),
            "zero": len(report.leaves) - len(found),
            "jax": jax.__version__,
            "date": date.today().isoformat(),
        }
    kept = (f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(lines[name])}" for name in names if name in lines)
    path.write_text("{\n" + ",\n".join(kept) + "\n}\n", encoding="utf-8")


def run(config: Config, console: Console | None = None) -> dict:
    """Run the audits, print the table, write the run folder; returns the reports and the names of those that failed."""
    console = open_console(config, console)
    every = audits(config)
    chosen = {name: audit for name, audit in every.items() if name.startswith(config.only or "")}
    if not chosen:
        raise SystemExit(f"--only {' '.join(config.only)}: no audit begins so; there are {', '.join(every)}")
    if config.json and config.fault:
        raise SystemExit(f"--json {config.json} with --fault {config.fault}: a fault is not kept")
    folder = new_run_folder(config, "gradient_audit")

    reports = {}
    with console.status("") as status:
        for k, (name, audit) in enumerate(chosen.items(), 1):
            status.update(f"{k} of {len(chosen)}: {name}")
            reports[name] = audit()

    console.print(verdict_table(reports))
    if config.fault:
        console.print(f"the fault in {config.fault}: {FAULTS[config.fault][0]}", highlight=False)

    for name in (name for name in reports if name.startswith("mlp") and "digits" in name):
        console.print(f"{name}\n{as_text(str(reports[name]))}", highlight=False, soft_wrap=True)
    write_pages(reports, folder, own=[name for name in reports if name.startswith("mlp")])
    if config.json:
        keep_lines(reports, every, config.json)
    failed = [name for name, report in reports.items() if not report.ok]
    leaves = sum(len(report.leaves) for report in reports.values())
    console.print(
        f"{len(reports)} audits, {leaves} leaves: {len(failed)} audits failed",
        highlight=False,
        soft_wrap=True,
    )
    say_written(console, folder / "index.html")
    return {"reports": reports, "failed": failed, "folder": folder}


def run_or_fail(config: Config) -> None:
    """`run`, and exit with an error if any gradient is wrong or not verified."""
    if failed := run(config)["failed"]:
        raise SystemExit(f"wrong or not verified: {'; '.join(failed)}")


if __name__ == "__main__":
    main(run_or_fail, Config)
