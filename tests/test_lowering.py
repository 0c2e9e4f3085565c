"""Steps lowered for chips that are not here: every model, engine and optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import fnet
from fnet import layers, models
from fnet.export import lower
from tests import resumable

IDS, IMAGES, ROWS = jnp.zeros((2, 8), jnp.int32), jnp.zeros((2, 16, 16, 1)), jnp.zeros((2, 6))
SEQUENCES, LABELS = jnp.zeros((2, 5, 3)), jnp.zeros(2, jnp.int32)
MODELS = {
    "mlp": (fnet.mlp(8, 3, activation=layers.relu()), ROWS, LABELS),
    "autoencoder": (models.autoencoder(6, 4, 2, activation=layers.tanh()), ROWS, ROWS),
    "lenet5": (models.lenet5(3), jnp.zeros((2, 28, 28, 1)), LABELS),
    "resnet": (models.resnet(3, blocks=(1, 1), width=4), IMAGES, LABELS),
    "vit": (models.vit(3, patch=4, layers=2, features=8, heads=2, positions=16), IMAGES, LABELS),
    "gpt": (models.gpt(9, length=8, layers=2, features=8, heads=2), IDS, IDS),
    "gpt, repeated, blockwise": (
        models.gpt(9, length=8, layers=2, features=8, heads=2, repeated=True, block_size=4, dropout_rate=0.1),
        *(IDS, IDS),
    ),
    "lstm": (models.recurrent_lm(9, layers.lstm(8), features=8), IDS, IDS),
    "gru": (fnet.serial(layers.gru(4), layers.global_avg_pool(), fnet.dense(3)), SEQUENCES, LABELS),
    "rnn, both ways": (
        fnet.serial(layers.bidirectional(layers.rnn(4)), layers.global_max_pool(), fnet.dense(3)),
        *(SEQUENCES, LABELS),
    ),
    "bfloat16, computed again": (
        layers.mixed_precision(fnet.serial(layers.remat(fnet.dense(8)), layers.gelu(), fnet.dense(3))),
        *(ROWS, LABELS),
    ),
}
OPTIMIZERS = resumable.optimizers()


def lowered(model, x, y, engine, optimizer, platforms):
    loss = fnet.losses.squared_error if y is ROWS else fnet.softmax_cross_entropy
    params, state = jax.eval_shape(lambda key: model.init(key, x), jax.random.key(0))
    opt_state = jax.eval_shape(optimizer.init, params)
    ts = fnet.TrainState(jnp.int32(0), params, state, opt_state, jax.random.key(0))
    return lower(fnet.make_step(engine(model, loss), optimizer), ts, fnet.Batch(x, y), platforms=platforms)


@pytest.mark.parametrize("engine", [fnet.backprop, fnet.autodiff], ids=["backprop", "autodiff"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_lowered_for_chips_that_are_not_here(name, engine):
    found = lowered(*MODELS[name], engine, fnet.sgd(0.1), ("cpu", "cuda", "tpu"))
    convolutions = {platform: program.as_text().count("stablehlo.convolution") for platform, program in found.items()}
    convolves = name in ("lenet5", "resnet", "vit")
    assert convolutions["cpu"] == 0  # there it is a product of matrices
    assert (convolutions["cuda"] > 0) == (convolutions["tpu"] > 0) == convolves


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "silu", "softplus"])
def test_nothing_that_a_convolution_gives_is_copied_for_an_activation_and_pooling(name):
    """A convolution over few channels has its examples side by side, and both layers leave them so, there and back."""
    conv, activation, pool = layers.conv(3, (3, 3)), getattr(layers, name)(), layers.max_pool((2, 2))
    x = jnp.zeros((32, 16, 16, 2))
    params, _ = conv.init(jax.random.key(0), x)

    def there_and_back(params, x, d):
        residuals, y = {}, x
        for layer, p in ((conv, params), (activation, ()), (pool, ())):
            y, _, residuals[layer.name] = layer.forward(p, (), y, key=None, train=True)
        for layer in (pool, activation):
            _, d = layer.backward((), residuals[layer.name], d)
        return y, conv.backward(params, residuals["conv"], d)[0]

    program = jax.jit(there_and_back).lower(params, x, jnp.zeros((32, 8, 8, 3))).compile().as_text()
    of_outputs = [line for line in program.splitlines() if " copy(" in line and "[32,16,16,3]" in line]
    assert "[3,16,16,32]" in program and of_outputs == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_lowered_for_chips_that_are_not_here(name):
    found = lowered(*MODELS["mlp"], fnet.backprop, OPTIMIZERS[name], ("cuda", "tpu"))
    assert all("stablehlo.dot_general" in program.as_text() for program in found.values())


def test_what_is_no_platform_and_no_function_is_refused():
    with pytest.raises(ValueError, match=r"lower: platforms = \('gpu',\); expected some of cpu, cuda, rocm, tpu"):
        lower(jnp.sin, 1.0, platforms=("gpu",))
    with pytest.raises(TypeError, match="lower: function is a float; expected a function, such as a step"):
        lower(1.0)  # pyright: ignore
