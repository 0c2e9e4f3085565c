"""The audit of everything in fnet is complete and fails where it must; the page on it runs and prints what it says."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import pathlib
import re
from typing import get_args, get_type_hints

import jax
import numpy as np
import pytest
from rich.console import Console

import fnet
from experiments import gradient_audit as audit
from experiments.pictures.gradient_audit import verdict_and_cause
from fnet.core.trees import split_floating
from fnet.gradcheck.report import VERDICTS
from fnet.types import Layer

pytestmark = pytest.mark.long

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "how-to" / "gradient-audit.md").read_text(encoding="utf-8")


def printed(tmp_path, **options):
    """What the experiment returns, and what it prints."""
    text = io.StringIO()
    config = audit.Config(run_dir=tmp_path, name="test", **options)
    return audit.run(config, Console(file=text, width=200)), text.getvalue()


# --- nothing is forgotten --------------------------------------------------------------------------------------------


def heads(names) -> set[str]:
    """The public names that the rows' names begin with."""
    return {name.split(",")[0] for name in names}


def public(module, kind) -> set[str]:
    """The public names of a module that are of a kind, or functions written there that return it."""

    def made(value):
        here = inspect.isfunction(value) and value.__module__.startswith(module.__name__)
        return isinstance(value, kind) or (here and get_type_hints(value).get("return") is kind)

    return {name for name, value in vars(module).items() if not name.startswith("_") and made(value)}


@pytest.fixture(scope="module")
def cases():
    make, rng = audit.constructors(None), np.random.default_rng(0)
    layers, losses = audit.layer_cases(make, rng), audit.loss_cases(rng)
    return layers, losses, audit.model_cases(make, rng, audit.Config())


# no layers, or layers under their own names in another guise (of which freeze and mixed_precision change the gradient)
OTHERS = {
    "Copies",
    "Policy",
    "alibi",  # without a parameter or an input that has a gradient; within attention it is audited
    "dot_product_attention",
    "fold_spectral_norm",
    "fold_weight_norm",
    "freeze",
    "llama3_frequencies",
    "mixed_precision",
    "remat",
    "rotary_frequencies",
    "rotate",
    "rotate_by",
    "spectral_norm",
    "weight_norm",
    "with_hand_backward",
    "yarn_frequencies",
    "yarn_scale",
}
OTHERS |= {"by_position", "stateless", "zero_carry"}
BLOCKS = {
    "basic_block",
    "bottleneck_block",
    "imagenet_stem",
    "inverted_residual",
    "llama_block",
    "patch_merging",
    "swin_block",
    "t5_block",
    "transformer_block",
    "wavenet_block",
}  # of models
FIXED = {"mobilenet_v3_small"}  # models of fixed widths, too wide to be audited whole: their blocks are


def test_every_layer_loss_and_model_is_audited(cases):
    layers, losses, models = cases
    assert heads(layers) == set(fnet.layers.__all__) - OTHERS | BLOCKS
    assert heads(losses) == set(fnet.losses.__all__) - {"CTCTargets", "per_output"}
    assert heads(models) == public(fnet.models, Layer) - BLOCKS - FIXED >= {"mlp", "gpt"}
    assert set(audit.audits(audit.Config())) == {*layers, *losses, *models}


def test_each_row_is_of_what_it_is_named_after(cases):
    layers, losses, models = cases
    for name, (model, *_) in (layers | models).items():
        assert model.name == name.split(",")[0]
    for name, (loss, outputs, targets) in losses.items():
        with pytest.raises(ValueError, match=f"^{name.split(',')[0]}: outputs are int"):  # messages begin with the name
            loss.value(outputs.astype(int), targets)


def test_losses_meet_every_kind_of_target(cases):
    kinds = {name: set() for name in heads(cases[1])}
    for name, (_, _, targets) in cases[1].items():
        kinds[name.split(",")[0]].add(targets.dtype.kind)
    labelled = ("softmax_cross_entropy", "smoothed_cross_entropy", "cross_entropy", "focal_cross_entropy")
    for name in (*labelled, "negative_log_likelihood"):
        assert kinds.pop(name) == {"i", "f"}
    assert kinds.pop("binary_cross_entropy") == {"b", "i", "f"}
    assert {name for name, found in kinds.items() if found == {"f"}} == {
        *("squared_error", "half_squared_error", "absolute_error", "huber", "pinball", "cosine_distance"),
        *("kl_divergence", "kl_divergence_from_logits"),
    }


def test_only_one_row_lies_on_a_kink(cases):
    zeros = {
        name: sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(x) if leaf.dtype.kind == "f")
        for name, (_, x) in cases[0].items()
    }
    assert zeros.pop("relu, one input is 0") == 1 and not any(zeros.values())
    assert all((z != y).all() for _, z, y in cases[1].values() if z.shape == y.shape)


def test_every_backward_is_traced_with_differentiation_switched_off(cases, no_autodiff, key):
    for name, (layer, x) in cases[0].items():
        shapes = jax.eval_shape(lambda x: x, x)
        params, state = jax.eval_shape(layer.init, key, shapes)

        def by_hand(params, state, x, key, layer=layer):
            y, _, residuals = layer.forward(params, state, x, key=key, train=True)
            return layer.backward(params, residuals, split_floating(y)[0])

        dparams, dx = jax.eval_shape(by_hand, params, state, shapes, key)
        assert jax.tree.structure(dparams) == jax.tree.structure(params), name
        assert all(d.dtype == p.dtype for d, p in zip(*map(jax.tree.leaves, (dparams, params)), strict=True)), name
        floating = jax.tree.structure(split_floating(shapes)[0])
        assert jax.tree.structure(dx) == floating, (name, dx)


# --- what a run says -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    only = ("relu", "step", "huber", "mlp, 784")
    return printed(tmp_path_factory.mktemp("right"), only=only, batch_size=4)


def test_right_gradients_pass_kinks_are_named_and_the_step_is_explained(right):
    result, text = right
    rows = {name: verdict_and_cause(report) for name, report in result["reports"].items()}
    assert result["failed"] == [] and "6 audits" in text and "0 audits failed" in text
    kink = rows.pop("relu, one input is 0")
    assert kink[0] == "kink" and "x = 0" in kink[1] and "[1, 2]" in kink[1]
    assert {verdict for verdict, _ in rows.values()} == {"ok"}
    assert "zero everywhere" in rows["step"][1]
    assert not any(leaf.claimed or leaf.expected for leaf in result["reports"]["step"].leaves)


def test_the_digits_model_gets_the_full_report(right):
    report = right[0]["reports"]["mlp, 784-128-64-10 on digits"]
    leaves = {leaf.path: leaf for leaf in report.leaves}
    assert leaves["dense_0/w"].shape == (784, 128) and leaves["dense_2/b"].shape == (10,)
    assert leaves["loss/outputs"].shape == (4, 10)
    assert [rung.dtype for rung in leaves["dense_0/w"].ladder] == ["float32", "bfloat16", "float16"]
    assert [cost.name for cost in report.costs] == ["claimed", "autodiff"]


def test_the_pages_stand_alone(right):
    folder = right[0]["folder"]
    pages = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.html")}
    assert len(pages) == 2 and str(folder / "index.html") in right[1]
    for text in pages.values():
        links = re.findall(r'(?:src|href)="([^"]*)"', text)
        assert all(link.startswith(("data:", "#")) or link in pages for link in links)
        assert "http" not in text and "<script" not in text
    index = pages["index.html"]
    assert index.count("<details id=") == 6 and index.count("with pictures") == 1
    assert all(f"{name}: " in index for name in right[0]["reports"])


@pytest.mark.parametrize("fault", audit.FAULTS)
def test_every_fault_is_an_option_and_is_caught(fault, key):
    assert fault in str(get_type_hints(audit.Config)["fault"])
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    layer = getattr(audit.constructors(fault), fault)()
    report = fnet.check_layer(layer, x, key=key, precisions=(), cost=False)
    assert {leaf.verdict for leaf in report.leaves} == {"wrong"}


def test_the_options_are_the_faults():
    options = itertools.chain.from_iterable(map(get_args, get_args(get_type_hints(audit.Config)["fault"])))
    assert set(options) == audit.FAULTS.keys()


def test_a_fault_fails_the_command_and_no_other_layer_is_blamed(tmp_path, capsys):
    config = audit.Config(only=("mlp, 6-5-3 with", "identity"), fault="tanh", run_dir=tmp_path, name="test")
    with pytest.raises(SystemExit, match=r"^wrong or not verified: mlp, 6-5-3 with tanh and sigmoid$") as raised:
        audit.run_or_fail(config)
    assert raised.value.code  # a text: exit status 1
    text = capsys.readouterr().out
    assert "tanh_0/inputs" in text and "1 audits failed" in text
    page = (tmp_path / "gradient_audit" / "test" / "index.html").read_text(encoding="utf-8")
    assert page.count('">1 wrong</span>') == 1 and page.count('">8 ok</span>') == 1


def test_a_right_run_does_not_fail_the_command(tmp_path):
    audit.run_or_fail(audit.Config(only=("identity",), run_dir=tmp_path))


def test_a_name_that_no_audit_has_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(SystemExit, match="no audit begins so; there are dense, "):
        printed(tmp_path, only=("convolution",))
    assert not list(tmp_path.iterdir())


def test_a_line_for_each_audit_is_kept_beside_those_that_did_not_run(tmp_path):
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"tanh": {"verdict": "ok"}, "gone": {"verdict": "ok"}}))
    printed(tmp_path, only=("relu", "attention, rotary"), json=kept)
    lines = json.loads(kept.read_text())
    assert [*lines] == ["relu", "relu, one input is 0", "tanh", "attention, rotary"]  # in the order of the audits
    assert lines["tanh"] == {"verdict": "ok"} and lines["relu, one input is 0"]["verdict"] == "kink"
    found = lines["attention, rotary"]
    assert found["jax"] == jax.__version__ and found["leaves"] == 9 and found["zero"] == 0 < found["error"] < 1e-13
    assert kept.read_text().count("\n") == len(lines) + 2
    with pytest.raises(SystemExit, match=r"kept.json with --fault tanh: a fault is not kept$"):
        printed(tmp_path, fault="tanh", json=kept)


# --- the page ------------------------------------------------------------------------------------------------------


def comparable(text: str) -> list[str]:
    """Lines without what differs from machine to machine: errors at the level of rounding, costs, widths of columns."""
    text = re.sub(r"^(claimed|autodiff) .*", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"\d(\.\d)?e[+-]\d\d", "#", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def test_the_pages_code_runs_and_prints_what_stands_beneath_it(capsys):
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE, re.DOTALL)
    assert len(re.findall("^```", PAGE, re.MULTILINE)) == 2 * len(blocks)
    names: dict = {}
    shown = ""
    for language, block in blocks:
        if language == "python":
            assert not shown.strip(), f"printed, and not on the page: {shown}"
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                exec(compile(block, "mine.py", "exec"), names)
            shown = capsys.readouterr().out
        else:
            assert comparable(shown) == comparable(block)
            shown = ""
    assert not shown


def test_the_page_has_an_example_of_every_verdict():
    outputs = "\n".join(re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL))
    for verdict in VERDICTS:
        assert f"| `{verdict}` |" in PAGE and re.search(rf"^{verdict}\b", outputs, re.MULTILINE)
        assert f'verdict == "{verdict}"' in PAGE


def test_the_audit_takes_five_lines():
    start = PAGE.index("import numpy as np, fnet")
    lines = PAGE[start : PAGE.index("```", start)].splitlines()
    assert len([line for line in lines if line.strip()]) == 5
