"""A clipped mean of gradients, 256 examples: by hand, by vmap of autodiff, and by Opacus.

    make bench MODULE=benchmarks.per_example
    make bench MODULE=benchmarks.per_example ARGS="--repeats 5"

784-128-64-10 and LeNet-5, float32. All give ``Σ min(1, C / ‖gᵢ‖) gᵢ / B``, without noise, from the same parameters and
examples; how far they are apart is printed. Memory is what XLA says of scratch; Opacus' is not known to it. ``parts``
goes through the batch in eight parts. Opacus by its hooks ("hooks") and by its norms without gradients ("ghost").
Times are medians of rounds, all in turn, compiling left out.

On two idle cores, jax 0.10.2, torch 2.14.1, opacus 1.6.0, in times of fnet by vmap (medians of 9 rounds; scratch): the
mlp by hand 0.02 (0.3 MB, vmap 112.3), Opacus 0.93 and 0.05; LeNet-5 by hand 0.64 (106.2 MB, vmap 93.7), in 8 parts
0.31 (14.1 MB), Opacus 0.69 and 0.28. Of LeNet-5 fnet is within 5e-7 of a loop over examples in torch; Opacus is not, by
0.32 of the largest entry by its hooks and 0.016 by its norms.
"""

from __future__ import annotations

import numpy as np

from benchmarks.measuring import arguments, interleaved, record, scaled, show

B, LIMIT = 256, 1.0


def fnet_forms(name: str, x: np.ndarray, y: np.ndarray):
    """The compiled programs by name, the parameters, and what each is run with."""
    import jax
    import jax.numpy as jnp

    import fnet

    model = fnet.mlp(128, 64, 10) if name == "mlp" else fnet.models.lenet5()
    batch = fnet.Batch(jnp.asarray(x), jnp.asarray(y))
    params, state = fnet.init(model, jax.random.key(0), batch.inputs)
    by_hand, autodiff = (make(model, fnet.softmax_cross_entropy) for make in (fnet.backprop, fnet.autodiff))
    key, clip = jax.random.key(1), fnet.clip_per_example
    engines = {
        "fnet, the mean unclipped": by_hand,
        "fnet by hand": clip(by_hand, LIMIT),
        "fnet by hand, 8 parts": clip(by_hand, LIMIT, parts=8),
        "fnet by vmap": clip(autodiff, LIMIT),
    }
    programs = {
        name: jax.jit(lambda *at, engine=engine: engine(*at)[0]).lower(params, state, batch, key).compile()
        for name, engine in engines.items()
    }
    return programs, params, (params, state, batch, key)


def torch_forms(name: str, params, x: np.ndarray, y: np.ndarray) -> dict:
    """Functions that give Opacus' clipped mean as NumPy arrays, by name; none where it is not installed."""
    try:
        import torch
        from opacus import GradSampleModule
        from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost
        from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
    except ImportError:
        return {}
    from torch import nn

    import fnet
    from fnet.export.pytorch import Flattened

    if name == "mlp":
        make = lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))  # noqa: E731
        modules = {"dense_0": "0.*", "dense_1": "2.*", "dense_2": "4.*"}
        given = torch.from_numpy(x)
    else:
        make = lambda: nn.Sequential(  # noqa: E731
            *(
                nn.Conv2d(1, 6, 5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 16, 5),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ),
            *(nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
        )
        flat = Flattened("7.*", 16)
        modules = {"conv_0": "0.*", "conv_1": "3.*", "dense_0": flat, "dense_1": "9.*", "dense_2": "11.*"}
        given = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    names = fnet.export.torch_names(params, modules)
    weights = {path: torch.from_numpy(a) for path, a in fnet.export.to_tensors(params, names).items()}
    targets = torch.from_numpy(y)

    def prepared(kind):
        plain = make()
        plain.load_state_dict(weights)
        sgd = torch.optim.SGD(plain.parameters(), lr=0.0)
        options = {"noise_multiplier": 0.0, "max_grad_norm": LIMIT, "expected_batch_size": B}
        if kind == "hooks":
            module, loss = GradSampleModule(plain), nn.CrossEntropyLoss()
            optimizer = DPOptimizer(sgd, **options)
        else:
            module = Ghost(plain, max_grad_norm=LIMIT, use_ghost_clipping=True)
            optimizer = DPOptimizerFastGradientClipping(sgd, **options)
            loss = DPLossFastGradientClipping(module, optimizer, nn.CrossEntropyLoss(reduction="mean"))

        def run():
            optimizer.zero_grad()
            loss(module(given), targets).backward()
            optimizer.pre_step()
            return {path: p.grad.numpy() for path, p in plain.named_parameters()}

        return run

    return {f"Opacus, {kind}": (prepared(kind), names) for kind in ("hooks", "ghost")}


def main() -> None:
    import jax

    import fnet

    parser = arguments("clipped means of gradients")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    rng, tables, opacus = np.random.default_rng(0), [], False
    for name, shape in (("mlp", (B, 784)), ("lenet5", (B, 28, 28, 1))):
        x, y = rng.standard_normal(shape).astype(np.float32), rng.integers(0, 10, B)
        programs, params, at = fnet_forms(name, x, y)
        expected = programs["fnet by hand"](*at)
        runs = {
            form: (lambda program=program, at=at: jax.block_until_ready(program(*at)))
            for form, program in programs.items()
        }
        found = {form: run() for form, run in runs.items() if form != "fnet, the mean unclipped"}
        for form, (run, names) in torch_forms(name, params, x, y).items():
            runs[form], opacus = run, True
            found[form] = fnet.export.from_tensors(run(), params, names)
        for form, grads in found.items():
            pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True)
            away = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
            print(f"{name}, {form}: within {away:.1e} of fnet by hand")
            assert away < 1e-4 or form.startswith("Opacus")
        times = scaled(interleaved(runs, options.repeats), 1e3)
        tables.append(show(f"{name}: a clipped mean of {B} gradients", times, ("fnet by vmap",), "ms"))
        scratch = {}
        for form, program in programs.items():
            memory = program.memory_analysis()
            assert memory is not None
            scratch[form] = [memory.temp_size_in_bytes / 1e6]
        tables.append(show(f"{name}: scratch memory", scratch, unit="MB"))
    record(options.json, "per_example", tables, also=("torch", "opacus") if opacus else ())


if __name__ == "__main__":
    main()
