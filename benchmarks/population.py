"""Many small networks at once: 64-32-10 on 1,440 of the 8x8 digits, batch 32, Adam, float32, per member and epoch.

    make bench MODULE=benchmarks.population
    make bench MODULE=benchmarks.population ARGS="--repeats 15 --devices 2"

`fnet.population.train_population` of 64 and 256 seeds, and of 256 members that are 32 rates with 8 seeds, beside one
network after another: by fnet in one compiled program each, and by torch in an eager loop with its fused Adam, as it
comes and held to one thread; and beside `torch.func.vmap` of 64, with the fused Adam on the stacked parameters. All run
in turn; ratios are taken round by round, between neighbours in time. Compiling is not in these times: a population's
are what it says that it ran.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np

from benchmarks.measuring import arguments, record, show

EXAMPLES, BATCH, RATE, EPOCHS = 1440, 32, 1e-3, 4


def timed(function, members: int):
    """A function that gives milliseconds per member and epoch, and the loss of the last epoch."""

    def run():
        begin = time.perf_counter()
        loss = function()
        return 1e3 * (time.perf_counter() - begin) / members / EPOCHS, loss

    return run


# --- fnet ------------------------------------------------------------------------------------------------------------


def whole_run():
    import fnet
    from fnet.core.numerics import stream

    def run(hyper, key, data):
        model, loss, optimizer = fnet.mlp(32, 10), fnet.softmax_cross_entropy, fnet.adam(**hyper)
        params, state = fnet.init(model, stream(key, "model"), data.inputs[:1])
        start = fnet.init_train_state(params, optimizer, stream(key, "run"), state)
        step = fnet.make_step(fnet.backprop(model, loss), optimizer)
        return fnet.train(step, start, data, epochs=EPOCHS, batch_size=BATCH)[1]["loss"].value[-1].mean()

    return run


def fnet_alone(data):
    import jax
    import jax.numpy as jnp

    program, key = jax.jit(whole_run()), jax.random.key(0)
    return timed(lambda: program({"learning_rate": jnp.float32(RATE)}, key, data).item(), 1)


def fnet_population(data, rates: int, seeds: int):
    import jax

    from fnet.training.population import crossed, train_population

    run, keys = whole_run(), jax.random.split(jax.random.key(0), seeds)
    settings = {"learning_rate": np.geomspace(RATE, 10 * RATE, rates) if rates > 1 else [RATE]}
    hyper, keys = crossed(settings, keys)

    def measured():
        population = train_population(run, hyper, keys, data)
        first = population.results[:seeds].mean()  # at the rate that all peers have
        return 1e3 * population.run_seconds / len(keys) / EPOCHS, float(first)

    return measured


# --- torch -----------------------------------------------------------------------------------------------------------


def torch_network():
    from torch import nn

    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def torch_eager(inputs, labels, threads: int):
    import torch

    loss_fn, as_it_comes = torch.nn.CrossEntropyLoss(), torch.get_num_threads()

    def train():
        torch.set_num_threads(threads)
        model = torch_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
        losses = []
        for _ in range(EPOCHS):
            losses = []
            for rows in torch.randperm(EXAMPLES).split(BATCH):
                optimizer.zero_grad()
                loss = loss_fn(model(inputs[rows]), labels[rows])
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        torch.set_num_threads(as_it_comes)
        return torch.stack(losses).mean().item()

    return timed(train, 1)


def torch_vmap(inputs, labels, members: int = 64):
    import torch
    from torch.func import functional_call, grad_and_value, stack_module_state, vmap

    skeleton = torch_network()

    def loss_fn(params, x, y):
        return torch.nn.functional.cross_entropy(functional_call(skeleton, params, (x,)), y)

    gradients = vmap(grad_and_value(loss_fn))

    def train():
        params, _ = stack_module_state([torch_network() for _ in range(members)])
        optimizer = torch.optim.Adam(params.values(), lr=RATE, fused=True)
        losses = []
        for _ in range(EPOCHS):
            order = torch.stack([torch.randperm(EXAMPLES) for _ in range(members)])
            losses = []
            for rows in order.split(BATCH, dim=1):
                grads, loss = gradients({k: v.detach() for k, v in params.items()}, inputs[rows], labels[rows])
                for name, leaf in params.items():
                    leaf.grad = grads[name]
                optimizer.step()
                losses.append(loss)
        return torch.stack(losses).mean().item()

    return timed(train, members)


def main() -> None:
    parser = arguments("Many small networks at once: fnet and PyTorch")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices that fnet's members are spread over")
    options = parser.parse_args()

    import jax
    import torch

    jax.config.update("jax_num_cpu_devices", options.devices)

    import fnet
    from fnet.runs.compilation import cached_in

    # a population is compiled anew in each round
    with tempfile.TemporaryDirectory() as cache, cached_in(cache):
        digits = fnet.data.sklearn_digits()
        data = jax.tree.map(lambda a: a[:EXAMPLES], digits)
        torch.manual_seed(0)
        tensors = torch.from_numpy(np.array(data.inputs)), torch.from_numpy(np.array(data.targets, np.int64))
        runs = {
            "torch": torch_eager(*tensors, torch.get_num_threads()),
            "torch, one thread": torch_eager(*tensors, 1),
            "torch.func.vmap of 64": torch_vmap(*tensors),
            "fnet alone": fnet_alone(data),
            "fnet, 64 seeds": fnet_population(data, 1, 64),
            "fnet, 256 seeds": fnet_population(data, 1, 256),
            "fnet, 32 rates × 8 seeds": fnet_population(data, 32, 8),
        }
        for name, run in runs.items():
            print(f"{name}: loss in the last epoch {run()[1]:.4f}", flush=True)
        times = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                time.sleep(0.3)  # torch's threads spin on for a while, which the next run would pay for
                times[name].append(run()[0])
        made = show("64-32-10 on 1,440 digits: a member's epoch", times, ("torch", "fnet alone"), unit="ms")
    record(options.json, "population", [made], also=("torch", "scikit-learn"))


if __name__ == "__main__":
    main()
