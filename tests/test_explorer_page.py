"""The explorer's page as a person has it: in a browser, by keyboard and pointer, on screens of all sizes."""

from __future__ import annotations

import math
from importlib.resources import files
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import digamma, gammaln

import fnet
from experiments import backprop_by_hand, explorer
from experiments.explorer import Config
from experiments.mazur import PRINTED, RATE, agrees, fixed_biases
from fnet import layers, losses
from fnet.core.trees import named_leaves
from fnet.layers import dense, lstm, relu, serial, sigmoid, stateless, tanh
from fnet.layers.models import recurrent_lm
from fnet.report import explorer as writer
from fnet.report import write_explorer
from fnet.types import Batch

long = pytest.mark.long
SMALL = ("mazur", "faulty")  # in the quick tests
ALL = [*SMALL, *(pytest.param(name, marks=long) for name in explorer.SCENES if name not in SMALL)]
MODELS = {  # model and loss of each scene, for the losses of its training
    "mazur": (fnet.mlp(2, 2, activation=sigmoid(), output=sigmoid()), losses.half_squared_error),
    "xor": (fnet.mlp(3, 1, activation=tanh()), losses.binary_cross_entropy),
    "digits": (fnet.mlp(128, 64, 10), losses.softmax_cross_entropy),
    "lstm": (serial(lstm(8), explorer.last(), dense(1)), losses.squared_error),
    "gpt": (
        fnet.models.gpt(len({*explorer.TEXT}), length=8, layers=2, features=16, heads=2),
        losses.softmax_cross_entropy,
    ),
}
AXE = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The pages of `experiments.explorer` by name, each made when it is asked for first; trainings end early."""
    found: dict[str, Any] = {}
    trained = explorer.trained

    def early(model, loss, data, rate, steps, config):
        return trained(model, loss, data, rate, [*range(len(steps))], config)

    def make(name):
        if name not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(explorer, "trained", early)
                recording, options = explorer.SCENES[name](Config(name))
            path = write_explorer(recording, tmp_path_factory.mktemp("pages") / f"{name}.html", **options)
            found[name] = SimpleNamespace(path=path, recording=recording, options=options)
        return found[name]

    return make


@pytest.fixture
def opened(browser):
    """Open a file; in the end there was no request but for it, and nothing on the console."""
    contexts, told = [], []

    def start(path, width=1400, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: request.url == path.as_uri() or told.append(request.url))
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("#agreement")
        return page

    yield start
    for context in contexts:
        context.close()
    assert told == []


def write(path, model, loss, batch, **options):
    """The page of a model with drawn parameters."""
    params, state = fnet.init(model, jax.random.key(0), batch.inputs)
    recording = fnet.record(model, loss, batch, params=params, state=state, key=options.pop("key", None))
    return write_explorer(recording, path / "page.html", **options)


def is_near(a: float, b: float, rounding: float = 1e-15) -> bool:
    return abs(a - b) <= rounding * abs(b)


def formula_lines(page) -> list[str]:
    """The formula in the panel: with names, with numbers, and the value."""
    return [" ".join(text.split()) for text in page.locator("aside .formula > div").all_text_contents()]


BITS = """() => JSON.stringify(Object.values(explorer.programs).map((program, n) => {
  const values = explorer.values()[Object.keys(explorer.programs)[n]];
  return values.map(v => [...new Uint32Array(Float64Array.from(v.data).buffer)]);
}))"""
LOSS = "() => explorer.values().hand[explorer.programs.hand.outs.loss].data[0]"
PARAMS = """() => Object.fromEntries(Object.entries(explorer.programs.hand.inputs)
  .filter(([path]) => path.startsWith('param')).map(([path, id]) => [path, [...explorer.values().hand[id].data]]))"""
FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
HTML = "() => document.getElementById('app').innerHTML"


def params_of(page, like) -> Any:
    """The parameters that the page has, as a tree like fnet's."""
    flat = page.evaluate(PARAMS)
    leaves = [np.reshape(flat[f"param/{name}"], np.shape(leaf)) for name, leaf in named_leaves(like)]
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(leaf, jnp.float64) for leaf in leaves])


def batch_of(recording) -> Batch:
    """The recorded inputs and targets."""
    return Batch(*(recording.by_hand.value(name) for name in ("input", "target")))


def loss_by_fnet(name, params, batch) -> float:
    """fnet's loss for these parameters, in float64."""
    model, loss = MODELS[name]
    state = fnet.init(model, jax.random.key(0), batch.inputs)[1]
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        batch = jax.tree.map(jnp.asarray, batch)
        _, _, metrics = jax.jit(fnet.backprop(model, loss))(params, state, batch, None)
        return float(metrics["loss"].value)


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_page_says_that_it_agrees_with_fnet_and_what_is_wrong_first(made, opened, name):
    page, recording = opened(made(name).path), made(name).recording
    first = recording.first_wrong
    assert first == ("sigmoid_0/inputs" if name == "faulty" else None)
    assert (
        page.evaluate("() => explorer.compared().first?.name ?? null")
        == first
        == page.evaluate("explorer.scene.first_wrong")
    )
    engines, agreement = page.locator("#engines"), page.locator("#agreement")
    expected = "by hand = by autodiff to" if first is None else f"by hand ≠ by autodiff: first wrong at {first}"
    assert engines.inner_text().startswith(expected)
    assert "ok" in agreement.get_attribute("class") and agreement.inner_text().startswith("this page = fnet to")
    assert float(agreement.get_attribute("data-worst")) < 1e-12
    counted = {id for p in (recording.by_hand, recording.autodiff) for eqn in p.equations for id in eqn.outputs}
    assert int(agreement.get_attribute("data-count")) > len(counted)
    assert page.locator("#unknown").count() == page.locator("#edited").count() == 0


RUN = """given => Object.fromEntries(Object.entries(explorer.programs).map(([name, program]) => {
  const changed = Object.fromEntries(Object.entries(given).map(([path, data]) => [path, Float64Array.from(data)]));
  const values = program.run(changed);
  return [name, Object.fromEntries(Object.entries(program.outs).map(([path, id]) => [path, [...values[id].data]]))];
}))"""


@pytest.mark.parametrize("name", ["mazur", pytest.param("xor", marks=long)])
def test_the_page_has_fnets_gradients_at_any_numbers(made, opened, name, x64):
    model, loss = MODELS[name]
    page, recording = opened(made(name).path), made(name).recording
    engines = {"hand": jax.jit(fnet.backprop(model, loss)), "auto": jax.jit(fnet.autodiff(model, loss))}
    rng, batch = np.random.default_rng(1), batch_of(recording)
    params, state = fnet.init(model, jax.random.key(0), batch.inputs)
    for _ in range(50):
        x, t = rng.standard_normal(batch.inputs.shape), rng.uniform(0, 1, batch.targets.shape)
        params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) * 3 ** rng.uniform(-1, 1)), params)
        given = {"input": x, "target": t, **{f"param/{n}": np.asarray(p) for n, p in named_leaves(params)}}
        found = page.evaluate(RUN, {path: a.ravel().tolist() for path, a in given.items()})
        for engine, gradient in engines.items():
            grads, _, metrics = gradient(params, state, Batch(jnp.asarray(x), jnp.asarray(t)), None)
            assert is_near(found[engine]["loss"][0], float(metrics["loss"].value), 1e-13)
            for leaf, expected in named_leaves(grads):
                a, e = np.array(found[engine][f"grads/{leaf}"]), np.asarray(expected).ravel()
                assert np.abs(a - e).max() <= 1e-13 * np.abs(e).max(), (engine, leaf)


# --- mazur, by the keyboard ------------------------------------------------------------------------------------------

STEPS = [  # what a step is called, the number that it is about, its formula with names and with numbers, its value
    ("the inputs and the parameters", "i₁", "0.0500000000"),
    (
        "forward: dense_0",
        "net h₁",
        "i₁ · w₁ + i₂ · w₂ + b₁",
        "0.05000 · 0.1500 + 0.1000 · 0.2000 + 0.3500",
        "0.377500000",
    ),
    ("forward: sigmoid_0", "h₁", "σ(net h₁)", "σ(0.3775)", "0.593269992"),
    (
        "forward: dense_1",
        "net o₁",
        "h₁ · w₅ + h₂ · w₆ + b₂",
        "0.5933 · 0.4000 + 0.5969 · 0.4500 + 0.6000",
        "1.10590597",
    ),
    ("forward: sigmoid_1", "o₁", "σ(net o₁)", "σ(1.106)", "0.751365070"),
    (
        "forward: the loss",
        "E",
        "(o₁ − t₁)2 / 2 + (o₂ − t₂)2 / 2",
        "(0.7514 − 0.01000)2 / 2 + (0.7729 − 0.9900)2 / 2",
        "0.298371109",
    ),
    ("backward: the loss", "∂E/∂o₁", "o₁ − t₁", "0.7514 − 0.01000", "0.741365070"),
    (
        "backward: sigmoid_1",
        "∂E/∂net o₁",
        "∂E/∂o₁ · o₁ · σ(−net o₁)",
        "0.7414 · 0.7514 · σ(−1.106)",
        "0.138498562",
    ),
    ("backward: dense_1", "∂E/∂w₅", "h₁ · ∂E/∂net o₁", "0.5933 · 0.1385", "0.0821670406"),
    (
        "backward: sigmoid_0",
        "∂E/∂net h₁",
        "∂E/∂h₁ · h₁ · σ(−net h₁)",
        "0.03635 · 0.5933 · σ(−0.3775)",
        "0.00877135469",
    ),
    ("backward: dense_0", "∂E/∂w₁", "i₁ · ∂E/∂net h₁", "0.05000 · 0.008771", "0.000438567734"),
    (
        "all gradients, and the update",
        "∂E/∂w₁",
        "i₁ · ∂E/∂net h₁",
        "0.05000 · 0.008771",
        "0.000438567734",
    ),
]
# the chosen entry's formula, its names replaced by the values of what they name, computed by other code than the page's
COMPUTED = """() => {
  const { program, id, ix } = explorer.state.chosen;
  const own = explorer.programs[program], values = explorer.values()[program];
  const place = (ix, shape) => ix.reduce((k, i, axis) => k * shape[axis] + i, 0);
  const entry = (id, ix) => values[id].data[place(ix, values[id].shape)];
  const FUNCTIONS = { logistic: x => 1 / (1 + Math.exp(-x)) };
  const of = e => {
    if (e.t === "num") return e.value;
    if (e.t === "ref") return entry(e.id, e.ix);
    if (e.t === "sum") return e.terms.map(of).reduce((a, b) => a + b) + (e.more ? e.rest : 0);
    if (e.t === "sub") return of(e.a) - of(e.b);
    if (e.t === "neg") return -of(e.a);
    if (e.t === "mul") return of(e.a) * of(e.b);
    if (e.t === "div") return of(e.a) / of(e.b);
    if (e.t === "pow") return of(e.a) ** e.y;
    return FUNCTIONS[e.f](...e.args.map(of));
  };
  return [of(own.explain(values, id, ix, { budget: 20 })), entry(id, ix)];
}"""


def test_the_arrow_keys_go_through_mazurs_pass_and_each_number_has_its_formula(made, opened):
    page = opened(made("mazur").path)
    page.evaluate("() => explorer.go(0)")
    seen = []
    for k, (step, name, *lines) in enumerate(STEPS):
        assert page.locator(".bar .what strong").inner_text() == step
        assert page.locator("aside .of strong").inner_text() == name
        assert formula_lines(page) == [f"= {line}" for line in lines]
        computed, value = page.evaluate(COMPUTED)
        assert is_near(computed, value)
        seen.append(page.evaluate(HTML))
        if k + 1 < len(STEPS):
            page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate(HTML) == seen[-1]  # that was the last
    for html in reversed(seen):
        assert page.evaluate(HTML) == html
        page.keyboard.press("ArrowLeft")
    assert page.evaluate(HTML) == seen[0]


def test_each_step_shows_what_the_pass_has_come_to_and_no_more(made, opened):
    page = opened(made("mazur").path)
    page.evaluate("() => explorer.go(2)")  # forward: sigmoid_0
    text = page.locator(".graph").inner_text()
    assert "0.3775" in text and "0.5933" in text
    for later in ("1.106", "0.7514", "0.2984", "0.008771"):
        assert later not in text
    assert page.locator(".graph button.num", has_text="0.5933").count() == 1
    known = [
        page.evaluate(f"() => (explorer.go({k}), document.querySelectorAll('.graph button.num').length)")
        for k in range(12)
    ]
    # inputs, targets and parameters; each unit's z and activation, E; their gradients, none of E and the targets
    assert known == sorted(known) and known[0] == 2 + 2 + 12
    assert known[5] == known[0] + 8 + 1 and known[-1] == known[5] + 8 + 12 + 2


def test_the_table_ends_with_the_weights_of_the_post(made, opened):
    page = opened(made("mazur").path)
    page.locator("label", has_text="digits").locator("select").select_option("17")
    rows = {
        row.split("\t")[0].split()[0]: row.split("\t")
        for row in page.locator("section table").last.inner_text().splitlines()[1:]
    }
    for i, w in enumerate("₁₂₃₄₅₆₇₈", 1):
        assert agrees(float(rows[f"w{w}"][-1]), PRINTED[f"w{i}+"])
    for bias in ("b₁", "b₁′", "b₂", "b₂′"):
        assert rows[bias][1] == rows[bias][-1]  # they stay
    for i, w in ((5, "₅"), (1, "₁")):
        assert agrees(float(rows[f"w{w}"][2]), PRINTED[f"∂E/∂w{i}"])
        assert agrees(float(rows[f"w{w}"][3]), PRINTED[f"∂E/∂w{i}"])
    page.evaluate("() => explorer.go(5)")  # forward: the loss
    assert agrees(float(formula_lines(page)[-1].removeprefix("= ")), PRINTED["E0"])


# --- what follows from a change --------------------------------------------------------------------------------------


def test_a_weight_that_is_typed_in_has_fnets_loss_and_undo_restores_every_bit(made, opened, x64):
    page = opened(made("mazur").path)
    before = page.evaluate(BITS)
    page.locator('button.num[aria-label^="w₅ is"]').first.click()
    field = page.locator('aside input[type="number"]')
    assert float(field.input_value()) == 0.4
    field.fill("-1.2345678901234567")
    field.press("Enter")
    assert page.locator("#edited").inner_text().startswith("changed here")
    _, params, _, data = explorer.example()
    params["dense_1"]["w"] = params["dense_1"]["w"].at[0, 0].set(-1.2345678901234567)
    assert is_near(page.evaluate(LOSS), loss_by_fnet("mazur", params, data))
    assert page.locator("#engines").inner_text().startswith("by hand = by autodiff")
    assert "−1.235" in page.locator('button.num[aria-label^="w₅ is"]').first.inner_text()
    assert page.evaluate(BITS) != before
    page.locator("#edited button").click()
    assert page.evaluate(BITS) == before and page.locator("#edited").count() == 0


def test_an_input_can_be_changed_and_what_is_no_number_changes_nothing(made, opened, x64):
    page = opened(made("mazur").path)
    before = page.evaluate(BITS)
    page.locator('button.num[aria-label^="i₁ is"]').first.click()
    page.locator('aside button[aria-label^="more"]').click()
    _, params, _, data = explorer.example()
    data = data._replace(inputs=data.inputs.at[0, 0].set(0.05 + 0.05))
    assert is_near(page.evaluate(LOSS), loss_by_fnet("mazur", params, data))
    page.locator('aside button[aria-label^="less"]').click()
    assert page.evaluate(BITS) == before
    field = page.locator('aside input[type="number"]')
    field.fill("")
    field.press("Enter")
    assert page.evaluate(BITS) == before


def test_taking_the_step_is_fnets_step(made, opened, x64):
    page = opened(made("mazur").path)
    model, params, state, data = explorer.example()
    optimizer = fnet.sgd(RATE)
    step = fnet.make_step(fixed_biases(fnet.backprop(model, losses.half_squared_error)), optimizer)
    ts = fnet.init_train_state(params, optimizer, jax.random.key(0), state)
    for _ in range(3):
        page.locator("button", has_text="take this step").click()
        ts, _ = jax.jit(step)(ts, data)
        for (name, leaf), found in zip(named_leaves(ts.params), jax.tree.leaves(params_of(page, params)), strict=True):
            np.testing.assert_allclose(found, leaf, rtol=1e-15, err_msg=name)
        assert is_near(page.evaluate(LOSS), loss_by_fnet("mazur", ts.params, data), 2e-15)


@pytest.mark.parametrize("name", ["mazur", *(pytest.param(n, marks=long) for n in ("xor", "digits", "lstm", "gpt"))])
def test_the_slider_goes_through_the_training_with_fnets_losses(made, opened, name):
    scene = made(name)
    page, training = opened(scene.path), scene.options["training"]
    batch = batch_of(scene.recording)
    slider = page.locator('input[type="range"]')
    assert slider.get_attribute("max") == str(len(training) - 1)
    recorded = int(slider.input_value())
    before = page.evaluate(BITS) if name == "mazur" else None
    for k in sorted({0, 1, len(training) // 2, len(training) - 1}):
        slider.fill(str(k))
        step, params = training[k]
        assert is_near(page.evaluate(LOSS), loss_by_fnet(name, params, batch), 1e-13)
        assert f"step {step:,}" in page.locator(".train p").inner_text()
        assert page.locator("#edited").count() == (k != recorded)
        if k != recorded:
            assert f"step {step:,} of the training" in page.locator("#edited").inner_text()
    slider.fill(str(recorded))
    assert before is None or page.evaluate(BITS) == before


# --- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def derivation():
    """The parameters and the batch of `experiments.backprop_by_hand`, smaller."""
    with jax.enable_x64(True):
        words = backprop_by_hand.read_words()
        alphabet = "." + "".join(sorted(set("".join(words))))
        data = backprop_by_hand.contexts(words, alphabet)
        config = backprop_by_hand.Config(embedding=3, hidden=5)
        return backprop_by_hand.draw(config, len(alphabet)), fnet.data.take(data, np.arange(12))


@long
@pytest.mark.parametrize("fault", [None, *backprop_by_hand.FAULTS])
def test_the_page_names_the_line_of_a_derivation_that_is_wrong_first(derivation, opened, tmp_path, fault, x64):
    p, batch = derivation
    recording = fnet.record_function(
        backprop_by_hand.f,
        p,
        batch.inputs,
        batch.targets,
        gradient=lambda *args: backprop_by_hand.by_hand(*args, fault=fault)[0],
        intermediates=lambda *args: backprop_by_hand.by_hand(*args, fault=fault)[1],
    )
    page = opened(write_explorer(recording, tmp_path / "page.html"))
    first = backprop_by_hand.audit(p, batch, fault=fault).first_wrong
    assert page.evaluate("() => explorer.compared().first?.name ?? ''") == first
    if fault is None:
        assert page.locator("#engines").inner_text().startswith("by hand = by autodiff")
        return
    assert first == backprop_by_hand.FAULTS[fault][0]
    assert f"first wrong at {first}" in page.locator("#engines").inner_text()
    if first == "table":  # a parameter
        assert page.locator("aside .of .soft").inner_text().startswith("grads/table")
    else:
        assert page.locator("aside .of .soft").inner_text().startswith(f"dy:{first}")
    assert "≠" in page.locator("aside dl").inner_text()


def test_the_page_goes_to_what_is_wrong_and_shows_both_numbers(made, opened):
    page, recording = opened(made("faulty").path), made("faulty").recording
    assert page.locator("aside .of .soft").inner_text().startswith("dy:dense_0[")
    assert "≠" in page.locator("aside dl").inner_text()
    ix = page.evaluate("() => explorer.state.chosen.ix")
    hand, auto = (program.value("dy:dense_0")[*ix] for program in (recording.by_hand, recording.autodiff))
    assert formula_lines(page)[-1] == f"= {hand:.9g}"
    assert f"{auto:.9g}" in page.locator("aside dl").inner_text()
    assert page.locator("td.wrong").count() == 2  # both units'
    page.evaluate("() => explorer.go(99)")
    assert page.locator(".graph td.wrong").count() == 2 + 4 + 2 + 2  # what follows: by weights, biases and inputs
    assert page.locator("td.wrong").count() == 2 + 4 + 2 + 2 + 4 + 2  # and in the table
    page.locator("#engines button", has_text="go there").click()
    assert page.evaluate("() => explorer.state.chosen.ix") == ix


@pytest.mark.parametrize("where", ["inputs", "serial_0/inputs"])
def test_a_composition_that_is_wrong_is_named_by_the_page_too(opened, tmp_path, where):
    inner = serial(dense(2), tanh())
    inner = inner._replace(backward=lambda p, r, dy, back=inner.backward: back(p, r, 2 * dy))
    batch = Batch(jnp.array([[0.3, -0.2]]), jnp.array([[0.1, 0.4]]))
    path = write(tmp_path, inner if where == "inputs" else serial(inner, dense(2)), losses.squared_error, batch)
    page = opened(path)
    assert (
        page.evaluate("() => explorer.compared().first.name")
        == page.evaluate("() => explorer.scene.first_wrong")
        == where
    )


# --- for everyone ----------------------------------------------------------------------------------------------------


def violations(page) -> list:
    """What axe-core finds, by all its rules that are on by default."""
    if page.evaluate("() => !globalThis.axe"):
        page.evaluate(AXE)
    found = page.evaluate("() => axe.run({ resultTypes: ['violations'] })")["violations"]
    return [(v["id"], [node["html"][:150] for node in v["nodes"][:3]]) for v in found]


@pytest.mark.parametrize("name", ALL)
def test_the_page_can_be_used_by_everyone_on_any_screen(made, opened, name):
    page = opened(made(name).path)
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
    for step in (None, 1) if name in SMALL else (None,):
        for width in (1400, 360):
            page.set_viewport_size({"width": width, "height": 900})
            page.evaluate("k => k === null ? explorer.draw() : explorer.go(k)", step)
            assert page.evaluate("() => document.documentElement.scrollWidth") == width
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                assert violations(page) == [], (step, width, scheme)
    numbers = "() => [...document.querySelectorAll('button.num, canvas.tile')]"
    assert page.evaluate(f"{numbers}.filter(e => e.tabIndex !== 0 || e.disabled).length") == 0


def test_tab_comes_to_every_number(made, opened):
    page = opened(made("mazur").path)
    count = page.evaluate(
        """() => {
          const been = new Set();
          addEventListener("focusin", event => been.add(event.target));
          globalThis.missed = () => [...document.querySelectorAll("button.num")].filter(e => !been.has(e)).length;
          return document.querySelectorAll("button, input, select, [tabindex]").length;
        }"""
    )
    for _ in range(count + 5):  # the panel may have more for others than for the chosen one
        page.keyboard.press("Tab")
        page.evaluate(FRAMES)
    assert page.evaluate("missed()") == 0 and page.locator("button.num").count() > 80


@long
def test_the_arrow_keys_go_from_cell_to_cell_in_a_picture_and_not_through_the_pass(made, opened):
    page = opened(made("lstm").path)
    step = page.evaluate("() => explorer.state.step")
    tile = page.locator("canvas.tile").first
    tile.focus()
    h, w = page.evaluate("() => [document.activeElement.picture.h, document.activeElement.picture.w]")
    cell = """() => {
      const p = document.activeElement.picture, ix = String(explorer.state.chosen.ix);
      for (let r = 0; r < p.h; r++) for (let c = 0; c < p.w; c++) if (String(p.ix(r, c)) === ix) return [r, c];
    }"""
    assert page.evaluate(cell) == [0, 0] and w > 2
    r = c = 0
    for key in ["Right", "Right", "Down", "Left", "Up", "Up", *["Right"] * w]:
        dr, dc = {"Right": (0, 1), "Left": (0, -1), "Down": (1, 0), "Up": (-1, 0)}[key]
        r, c = min(max(r + dr, 0), h - 1), min(max(c + dc, 0), w - 1)
        page.keyboard.press(f"Arrow{key}")
        assert page.evaluate(cell) == [r, c]
        assert page.evaluate("() => explorer.state.step") == step
    assert page.locator("aside .of .soft").inner_text() != ""


SIZES = {
    "mazur": 150,
    "xor": 150,
    "faulty": 150,
    "digits": 2 * 1024,
    "lenet": 3 * 1024,
    "lstm": 3 * 1024,
    "gpt": 3 * 1024,
}


@pytest.mark.parametrize("name", ALL)
def test_a_page_is_no_larger_than_it_may_be(made, name):
    assert made(name).path.stat().st_size <= SIZES[name] * 1024


# --- what is written -------------------------------------------------------------------------------------------------

HOSTILE = (
    "</title>&amp;</script><script>console.log('ran')</script><b>bold</b> \"quotes\" 'too' & \u2028 <!-- \\u003c ${x}"
)


@pytest.fixture(scope="module")
def small():
    batch = Batch(jnp.array([[0.5, -1.0]]), jnp.array([[1.0]]))
    params, state = fnet.init(fnet.mlp(1), jax.random.key(0), batch.inputs)
    return fnet.record(fnet.mlp(1), losses.squared_error, batch, params=params, state=state)


def test_titles_notes_and_labels_stay_text(small, opened, tmp_path):
    labels = {"input": [[HOSTILE, HOSTILE + "2"]], "loss": HOSTILE, "param/dense_0/b": [HOSTILE]}
    page = opened(write_explorer(small, tmp_path / "a.html", title=HOSTILE, note=HOSTILE, labels=labels))
    assert page.evaluate("() => document.querySelector('title').textContent") == HOSTILE
    assert page.locator("h1").text_content() == HOSTILE
    assert page.locator("header > p").first.text_content() == HOSTILE
    assert page.locator("b").count() == 0 and page.locator("script").count() == 2
    assert page.evaluate("() => explorer.scene.labels.input[0][1]") == HOSTILE + "2"
    page.evaluate("() => explorer.go(2)")  # forward: the loss
    assert page.locator("aside .of strong").text_content() == HOSTILE
    page.locator("button.num").first.click()
    assert page.locator("aside .of strong").text_content() == HOSTILE


def test_a_page_that_would_be_too_large_is_refused_with_its_size(small, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "MOST_BYTES", 2**16)
    with pytest.raises(
        ValueError, match=r"page of Recording of 1 .* would have 0\.1 MiB; expected at most .*: record fewer"
    ):
        write_explorer(small, tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


@long
def test_a_recording_of_too_many_numbers_is_refused_with_the_size_of_its_page(tmp_path):
    batch = Batch(jnp.ones((1, 1200)), jnp.ones((1, 600)))
    with pytest.raises(ValueError, match=r"would have [3-9]\.\d MiB; expected at most 3"):
        write(tmp_path, dense(600), losses.squared_error, batch)


@pytest.mark.parametrize("what", ["labels", "images"])
def test_names_that_the_recording_does_not_have_are_refused(small, tmp_path, what):
    with pytest.raises(ValueError, match=f"{what} for 'dense_7', which the recording does not have; .*forward:"):
        write_explorer(small, tmp_path / "a.html", **{what: {"dense_7": (1, 2)}})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["my notes", "<!doctype html><html><body>mine</body></html>", "\xff\x00"])
def test_a_file_that_is_no_page_of_fnets_is_left_alone(small, tmp_path, text):
    path = tmp_path / "a.html"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(
        FileExistsError, match=r"a\.html is not a page of fnet's and is left as it is; name another file"
    ):
        write_explorer(small, path)
    assert path.read_text(encoding="latin-1") == text
    with pytest.raises(FileExistsError):
        write_explorer(small, tmp_path)


def test_a_page_of_fnets_is_written_anew_and_folders_are_made(small, tmp_path):
    path = write_explorer(small, tmp_path / "new" / "a.html", title="one")
    assert write_explorer(small, path, title="two") == path
    assert "<title>two</title>" in path.read_text() and [p.name for p in path.parent.iterdir()] == ["a.html"]


def test_a_training_without_the_recorded_parameters_or_of_other_shapes_is_refused(small, tmp_path):
    other = {"dense_0": {"w": np.ones((2, 1)), "b": np.ones(1)}}
    with pytest.raises(ValueError, match="none of the training's"):
        write_explorer(small, tmp_path / "a.html", training=[(0, other)])
    with pytest.raises(ValueError, match=r"training step 3 has parameters .*\(3, 1\).*expected .*\(2, 1\)"):
        write_explorer(small, tmp_path / "a.html", training=[(3, {"dense_0": {"w": np.ones((3, 1)), "b": np.ones(1)}})])


# --- what the page does not know -------------------------------------------------------------------------------------


def log_gamma():
    """ln Γ(1 + x²), of operations that the page does not know."""
    return stateless(
        "log_gamma",
        lambda key, x: (),
        lambda params, x: (gammaln(1 + x**2), x),
        lambda params, x, dy: ((), dy * 2 * x * digamma(1 + x**2)),
    )


CHOOSE = """name => {
  explorer.state.chosen = { program: "hand", id: explorer.main.inputs[name], ix: [0, 0] };
  explorer.draw();
}"""


def test_an_operation_that_the_page_does_not_know_is_named_and_nothing_can_be_changed(opened, tmp_path):
    batch = Batch(jnp.array([[0.3, -0.2]]), jnp.array([[0.1]]))
    path = write(tmp_path, serial(dense(2), log_gamma(), dense(1)), losses.squared_error, batch, rate=0.1)
    page = opened(path)
    said = page.locator("#unknown").inner_text()
    assert "lgamma" in said and "does not know" in said
    assert page.locator("#agreement").inner_text().startswith("this page = fnet")
    assert page.locator("#engines").inner_text().startswith("by hand = by autodiff")
    assert page.locator("button", has_text="take this step").count() == 0
    w = np.asarray(
        fnet.init(serial(dense(2), log_gamma(), dense(1)), jax.random.key(0), batch.inputs)[0]["dense_0"]["w"]
    )
    z = np.array([0.3, -0.2], np.float32).astype(np.float64) @ w.astype(np.float64)
    expected = [math.lgamma(1 + x**2) for x in z]
    found = page.evaluate("() => [...explorer.values().hand[explorer.main.marks['forward:log_gamma_0']].data]")
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    for name in ("param/dense_0/w", "param/dense_1/w", "input"):
        page.evaluate(CHOOSE, name)
        assert page.locator('aside input[type="number"]').count() == 0
        assert "cannot be changed here" in page.locator("aside").inner_text()


# --- the pointer -----------------------------------------------------------------------------------------------------


def test_pointing_at_a_number_explains_it_and_leaving_it_brings_the_chosen_one_back(made, opened):
    page = opened(made("mazur").path)
    page.locator('button.num[aria-label^="net o₂ is"]').first.click()
    chosen = page.locator("aside").inner_html()
    assert page.locator("aside .of strong").inner_text() == "net o₂"
    page.locator('button.num[aria-label^="∂E/∂w₁ is"]').first.hover()
    page.wait_for_function("() => document.querySelector('aside .of strong').textContent === '∂E/∂w₁'")
    assert formula_lines(page)[0] == "= i₁ · ∂E/∂net h₁"
    page.locator("h1").hover()
    page.wait_for_function("() => document.querySelector('aside .of strong').textContent === 'net o₂'")
    assert page.locator("aside").inner_html() == chosen


def test_a_number_in_a_formula_opens_its_own(made, opened):
    page = opened(made("mazur").path)
    page.evaluate("() => explorer.go(4)")  # forward: sigmoid_1
    page.locator("aside .formula button.num").first.click()
    assert page.locator("aside .of strong").inner_text() == "net o₁"
    first, second = (page.locator("aside .formula button.num").nth(k) for k in (0, 2))
    assert [x.get_attribute("aria-label").split()[0] for x in (first, second)] == ["h₁", "h₂"]
    first.hover()  # what is explained stays, so that the others can be come to
    page.evaluate(FRAMES)
    assert page.locator("aside .of strong").inner_text() == "net o₁"
    second.focus()
    page.evaluate(FRAMES)
    page.keyboard.press("Enter")
    assert page.locator("aside .of strong").inner_text() == "h₂"


def test_a_number_that_has_the_focus_is_explained(made, opened):
    page = opened(made("mazur").path)
    page.locator('button.num[aria-label^="net h₂ is"]').first.focus()
    page.wait_for_function("() => document.querySelector('aside .of strong').textContent === 'net h₂'")
    page.locator("nav button").first.focus()
    page.wait_for_function("() => document.querySelector('aside .of strong').textContent === '∂E/∂w₁'")


# --- models of all kinds ---------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)


def floats(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


KINDS = {
    "one layer": (dense(2), losses.squared_error, Batch(floats(3, 2), floats(3, 2)), {}),
    "no parameters": (serial(tanh()), losses.squared_error, Batch(floats(3, 2), floats(3, 2)), {}),
    "no backward by hand": (
        fnet.mlp(3, 1),
        lambda y, t: ((y - t) ** 2).mean(-1),
        Batch(floats(3, 2), floats(3, 1)),
        {"rate": 0.1},
    ),
    "weights": (
        fnet.mlp(3, 2),
        losses.softmax_cross_entropy,
        Batch(floats(3, 2), jnp.array([0, 1, 1]), jnp.array([0.5, 0.0, 2.0])),
        {"rate": 0.1},
    ),
    "dropout": (
        serial(dense(6), layers.dropout(0.5), dense(2)),
        losses.squared_error,
        Batch(floats(2, 3), floats(2, 2)),
        {"key": jax.random.key(1)},
    ),
    "batch norm": (
        serial(dense(3), layers.batch_norm(), relu(), dense(2)),
        losses.squared_error,
        Batch(floats(4, 2), floats(4, 2)),
        {},
    ),
    "parallel": (
        serial(layers.parallel(dense(2), dense(3)), layers.concatenate(), dense(1)),
        losses.squared_error,
        Batch(floats(2, 2), floats(2, 1)),
        {},
    ),
    "residual": (
        serial(layers.residual(dense(4), relu(), dense(3), shortcut=dense(3)), tanh()),
        losses.squared_error,
        Batch(floats(2, 2), floats(2, 3)),
        {},
    ),
    "gru, reversed": (
        serial(layers.gru(3, reverse=True), dense(1)),
        losses.squared_error,
        Batch(floats(2, 4, 2), floats(2, 4, 1)),
        {},
    ),
    "tied": (
        recurrent_lm(5, lstm(3), features=3),
        losses.softmax_cross_entropy,
        Batch(jnp.array([[0, 3, 1]]), jnp.array([[3, 1, 4]])),
        {},
    ),
    "convolution": (
        serial(layers.conv(2, (3, 3)), layers.batch_norm(), layers.max_pool((2, 2)), layers.flatten(), dense(2)),
        losses.squared_error,
        Batch(floats(2, 6, 6, 1), floats(2, 2)),
        {},
    ),
    "hundreds of units": (fnet.mlp(200, 1), losses.squared_error, Batch(floats(1, 70), floats(1, 1)), {"rate": 0.1}),
}


CLICK = "share => { const all = document.querySelectorAll('button.num'); all[Math.floor(share * all.length)].click(); }"


@long
@pytest.mark.parametrize("name", KINDS)
def test_models_of_all_kinds_have_a_page_that_agrees_and_can_be_gone_through(opened, tmp_path, name):
    model, loss, batch, options = KINDS[name]
    page = opened(write(tmp_path, model, loss, batch, **options), 360)
    assert page.locator("#agreement").inner_text().startswith("this page = fnet to")
    assert page.locator(".pill.bad:not(#unknown)").count() == 0
    for _ in range(page.evaluate("() => explorer.steps.length")):
        assert page.locator("aside .of strong").inner_text() != ""
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
        page.keyboard.press("ArrowLeft")
    assert page.evaluate("() => explorer.state.step") == 0
    page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
    for share in range(10):
        page.evaluate(CLICK, share / 10)
        assert "NaN" not in page.locator("aside .formula").inner_text()
    assert violations(page) == []
