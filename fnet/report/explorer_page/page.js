// The page: the bar of steps, the pass, where a number comes from, the parameters, the training.

const checks = Object.fromEntries(
  Object.entries(programs).map(([name, program]) => [name, program.check(values()[name])]),
);
const unknown = [...new Set(Object.values(programs).flatMap(program => program.unknown))];

// ---- going through the pass

function choose(program, id, ix) {
  state.chosen = { program, id, ix };
  state.hovered = null;
  state.frame = null;
  draw();
}
let waiting = false;
function hover(what) {
  if (
    String(what?.ix) === String(state.hovered?.ix) &&
    what?.id === state.hovered?.id &&
    what?.program === state.hovered?.program
  )
    return;
  state.hovered = what;
  if (!waiting)
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  waiting = true;
}
function chooseMark(mark, ix = null) {
  const id = idOf(main, mark);
  if (id === undefined) return false;
  const shape = main.shapes[id],
    first = shape.map(() => 0);
  if (isByExample(mark, shape)) first[0] = state.example;
  choose(nameOfMain, id, ix ?? first);
  return true;
}

// the number that a step is about
function follow() {
  const { phase, node } = steps[state.step],
    marks = mark => marksOf(main, mark)[0];
  if (phase === "start")
    return chooseMark(Object.keys(main.inputs).find(path => path.startsWith("input")) ?? Object.keys(main.inputs)[0]);
  if (phase === "update") return chooseGradient(parameters.map(path => path.slice(6))) || chooseMark("loss");
  if (node === null) return chooseMark(phase === "forward" ? "loss" : marks("dy:"));
  if (phase === "forward") return chooseMark(marks(`forward:${node.name}`));
  return (
    chooseGradient(node.parameters) ||
    chooseMark(marks(`dx:${node.name}`) ?? marks(`dy:${node.name}`)) ||
    chooseMark("loss")
  );
}
// the gradient by the first weights among some parameters: the first entry of few, the greatest of many
function chooseGradient(paths) {
  const shapeOf = path => main.shapes[main.inputs[path ? `param/${path}` : "param"]];
  const path = paths.find(p => shapeOf(p)?.length > 1) ?? paths[0];
  if (path === undefined) return false;
  const mark = path ? `grads/${path}` : "grads",
    { shape, data } = values()[nameOfMain][idOf(main, mark)],
    most = greatest(data);
  return chooseMark(
    mark,
    unflat(
      columns
        ? 0
        : Math.max(
            0,
            data.findIndex(x => Math.abs(x) === most),
          ),
      shape,
    ),
  );
}
function go(step) {
  state.step = Math.max(0, Math.min(LAST, step));
  if (!follow()) draw();
  document.querySelector(".node.on, .unit.on")?.scrollIntoView({ block: "nearest" });
}
function goToFirstWrong() {
  const { first, offs } = compared(),
    name = Object.keys(offs).filter(n => isLeafOf(n, first.mark) && offs[n].wrong)[0];
  const id = idOf(main, name),
    step = steps.findIndex((s, k) => s.phase !== "forward" && s.phase !== "start" && isKnown(id, k));
  state.step = Math.max(0, step);
  chooseMark(name, unflat(offs[name].at, main.shapes[id]));
}

// ---- where a number comes from

// the lines of code that an operation comes from, each in its function, the innermost first
function framesOf(line) {
  const { stacks, lines } = programsOf(),
    frames = (line === undefined ? [] : (stacks[line] ?? [])).map(k => lines[k]);
  return frames
    .map(([file, at]) => ({
      file,
      at,
      code: scene.code.filter(c => c.file === file && c.first <= at && at < c.first + c.lines.length).at(-1),
    }))
    .filter(f => f.code);
}
// what the author of a layer or of a loss wrote, and no helper of theirs
const HELPERS =
  /^(product|wide_product|product_with_rows|tensordot|einsum|plus|with_bias|rows|widened|_rows|_steps|full_.*)$/;
const isAuthors = ({ file, code }) => /^fnet\/(layers\/|losses)|^(?!fnet\/)/.test(file) && !HELPERS.test(code.name);
// the operation of an entry that tells most: its last, or the one before it that an author's line stands for
function lineOf(id, line) {
  const program = programsOf(),
    todo = [id],
    seen = new Set();
  if (framesOf(line).some(isAuthors)) return line;
  for (let n = 0; todo.length && n < 60; n++) {
    const eqn = program.eqns[program.made.get(todo.shift())];
    if (!eqn || seen.has(eqn.n)) continue;
    seen.add(eqn.n);
    if (framesOf(eqn.line).some(isAuthors)) return eqn.line;
    todo.push(...eqn.ins.filter(i => program.nameOf(i) === undefined));
  }
  return line;
}

function codeOf(line) {
  const within = framesOf(line);
  if (!within.length) return nothing;
  const shown = within[Math.min(state.frame ?? Math.max(0, within.findIndex(isAuthors)), within.length - 1)];
  return html`<div class="code"><p class="soft">${shown.file}, line ${shown.at}, in <code>${shown.code.name}</code></p>
    <pre tabindex="0" aria-label="code">${shown.code.lines.map((text, k) => html`<span class=${shown.code.first + k === shown.at ? `here ${tone(programs[chosenOrHovered().program].nameOf(chosenOrHovered().id))}` : ""}>${text + "\n"}</span>`)}</pre>
    ${
      within.length > 1
        ? html`<p class="soft">${within.map(
            (f, k) =>
              html`<button class="small" aria-pressed=${f === shown} @click=${() => {
                state.frame = k;
                draw();
              }}>${f.code.name}:${f.at}</button> `,
          )}</p>`
        : nothing
    }</div>`;
}
const chosenOrHovered = () => state.hovered ?? state.chosen;
const programsOf = () => programs[chosenOrHovered().program];

function pictureOfWeights(sel, name) {
  const weightsOf = node => node.parameters.find(p => p.split("/").at(-1) === "w");
  const node = nodes.find(
    n => n.kind === "dense" && [`forward:${n.name}`, `param/${weightsOf(n)}`, `grads/${weightsOf(n)}`].includes(name),
  );
  const path = node && weightsOf(node),
    id = path && main.inputs[`param/${path}`];
  if (!id || columns || main.shapes[id].length !== 2) return nothing;
  const [from, to] = main.shapes[id],
    j = sel.ix.at(-1),
    image = Object.entries(scene.images).find(([, s]) => size(s) === from)?.[1];
  const w = image ? image[1] : squarish(from),
    h = image ? image[0] : Math.ceil(from / w);
  const picture = (mark, of) =>
    html`<div class="map">
      <h3 class=${tone(mark)}>${of}</h3>${tile({ program: nameOfMain, id: idOf(main, mark), name: mark, h, w, ix: (r, c) => (r * w + c < from ? [r * w + c, j] : null), title: `of unit ${j}` }, { cell: Math.max(3, Math.floor(130 / Math.max(h, w))) })}</div>`;
  return html`<div class="maps weights">${picture(`param/${path}`, `the ${from} weights of unit ${j}`)}${isKnown(idOf(main, `grads/${path}`)) ? picture(`grads/${path}`, "their gradient") : nothing}</div>`;
}

function editor(sel, name) {
  if (!(name in main.inputs) || programs[sel.program].kinds[sel.id] !== "f" || !/^(param|input|arg|target)/.test(name))
    return nothing;
  if (frozen) return html`<p class="soft">It cannot be changed here: the page does not know ${unknown.join(", ")}.</p>`;
  const k = flat(sel.ix, main.shapes[main.inputs[name]]),
    x = entry(values()[sel.program], sel.id, sel.ix);
  const put = value => {
    if (Number.isFinite(value)) edit(name, k, value);
  };
  return html`<p class="edit">
    <label>change it <input type="number" step="any" .value=${String(x)} @change=${event => put(event.target.valueAsNumber)}></label>
    <button aria-label="less by 0.05" @click=${() => put(x - 0.05)}>−</button> <button aria-label="more by 0.05" @click=${() => put(x + 0.05)}>+</button></p>`;
}

function from() {
  const sel = chosenOrHovered();
  if (!sel) return html`<p class="soft">Choose a number.</p>`;
  const program = programs[sel.program],
    now = values(),
    name = program.nameOf(sel.id),
    x = entry(now[sel.program], sel.id, sel.ix);
  const e = program.explain(now[sel.program], sel.id, sel.ix, { budget: 20 }),
    isGiven = name in program.inputs,
    other = sel.program === "hand" ? "auto" : "hand";
  const twin = name !== undefined && programs[other] ? idOf(programs[other], name) : undefined;
  const there = twin === undefined ? undefined : entry(now[other], twin, sel.ix),
    off = there === undefined ? 0 : Math.abs(there - x);
  const wrong = isGradient(name) && name in (compared().offs ?? {}) && isWrong(name, sel.ix);
  const sloped = isGradient(name) && !name.startsWith("dx:") ? idOf(main, valueOfGradient(name)) : undefined;
  const long = Math.max(9, state.digits);
  return html`<p class="of"><strong class=${tone(name)}>${name === undefined ? (e.prim ?? "a value without a name") : label(name, sel.ix, scene.examples > 1)}</strong>
      <span class="soft">${name === undefined ? `[${sel.ix.join(", ")}]` : fullName(name, sel.ix)}${sel.program === nameOfMain ? "" : `, ${ENGINE[sel.program]}`}</span></p>
    <div class="formula">${isGiven ? nothing : html`<div>= ${formula(e, sel.program, false)}</div>
      <div>= ${formula(e, sel.program, true)}</div>`}<div>= <strong>${show(x, long)}</strong></div></div>
    ${editor(sel, name ?? "")}
    ${
      there === undefined || isGiven || !programs.hand
        ? nothing
        : html`<dl><dt>${ENGINE[other]}</dt><dd>${number(other, twin, sel.ix, { text: show(there, long) })}</dd>
      <dt>difference</dt>
        <dd class=${wrong ? "bad" : "ok"}>${off === 0 ? "none, to the bit" : show(off, 2)}${wrong ? " ≠" : ""}</dd>
      ${sloped !== undefined && !frozen && main.kinds[sloped] === "f" ? html`<dt>by differences</dt>
        <dd>${show(slope(sloped, sel.ix), 7)} <span class="soft">(${LOSS}(v + h) − ${LOSS}(v − h)) / 2h at h = 10⁻⁵</span></dd>` : nothing}</dl>`
    }
    ${pictureOfWeights(sel, name ?? "")}${isGiven ? nothing : codeOf(lineOf(sel.id, e.line))}`;
}

// ---- the rest

function table() {
  const count = parameters.reduce((sum, path) => sum + given[path].data.length, 0);
  if (count > 60) return nothing;
  const now = values(),
    done = state.step === LAST,
    rate = scene.rate;
  const rows = parameters.flatMap(path =>
    [...given[path].data.keys()].map(k => {
      const ix = unflat(k, given[path].shape),
        mark = "grads" + path.slice(5),
        id = idOf(main, mark),
        known = isKnown(id);
      const a = entry(now.auto, idOf(programs.auto, mark), ix),
        h = entry(now[nameOfMain], id, ix),
        off = Math.abs(h - a),
        bad = programs.hand && isWrong(mark, ix);
      const kept = scene.kept.some(name => path.endsWith("/" + name));
      return html`<tr>
        <th scope="row">${label(path, ix)} <span class="soft">${path.slice(6)}[${ix.join(",")}]</span></th>
        <td>${numberOf(path, ix)}</td><td class=${bad && known ? "wrong" : ""}>${numberOf(mark, ix)}</td>
      ${programs.hand ? html`<td>${known ? number("auto", idOf(programs.auto, mark), ix) : "·"}</td>
        <td class=${known ? (bad ? "bad" : "ok") : ""}>${known ? (off ? show(off, 2) : "0") : "·"}</td>` : nothing}
      ${rate === null ? nothing : html`<td>${done ? show(entry(now[nameOfMain], main.inputs[path], ix) - (kept ? 0 : rate * h)) : "·"}</td>`}</tr>`;
    }),
  );
  return html`<section class="card"><h2>Parameters</h2>
    <div class="scroll" tabindex="0" role="region" aria-label="parameters"><table><thead><tr>
    <th scope="col">parameter</th><th scope="col">value</th>
    <th scope="col">∂ ${programs.hand ? "by hand" : "by autodiff"}</th>
    ${programs.hand ? html`<th scope="col">∂ by autodiff</th>
      <th scope="col">difference</th>` : nothing}${rate === null ? nothing : html`<th scope="col">w − ${rate} · ∂</th>`}</tr></thead>
      <tbody>${rows}</tbody></table></div>
    ${rate === null || frozen ? nothing : html`<p>
      <button ?disabled=${!done} @click=${takeStep}>take this step</button> <span class="soft">${done ? "the parameters become those of the last column, and all numbers follow" : "at the last step of the pass"}</span></p>`}</section>`;
}
function takeStep() {
  const now = values()[nameOfMain],
    moved = {};
  for (const path of parameters)
    if (!scene.kept.some(name => path.endsWith("/" + name)))
      moved[path] = now[main.inputs[path]].data.map(
        (x, k) => x - scene.rate * now[idOf(main, "grads" + path.slice(5))].data[k],
      );
  change(moved);
}

let curve_ = null;
function curve() {
  return (curve_ ??= scene.training.steps.map((_, k) => lossAt(snapshotParams(k))));
}
function training() {
  if (!scene.training) return nothing;
  const s = scene.training.steps,
    y = curve(),
    W = 560,
    H = 150,
    left = 74,
    low = 24;
  const positive = y.every(v => v > 0),
    f = positive ? Math.log10 : v => v,
    lo = f(Math.min(...y)),
    hi = f(Math.max(...y));
  const X = k => left + (Math.log1p(s[k]) / Math.log1p(s.at(-1) || 1)) * (W - left - 10),
    Y = v => 8 + ((hi - f(v)) / (hi - lo || 1)) * (H - low - 14);
  const ticks = s.length > 1 ? [0, Math.floor(s.length / 2), s.length - 1] : [0];
  const at = state.snapshot;
  return html`<section class="card"><h2>Training</h2><div class="train">
    <svg class="plot" viewBox="0 0 ${W} ${H}" role="img" aria-label=${`${LOSS} over ${s.at(-1)} steps, ${positive ? "both axes logarithmic" : "steps logarithmic"}, from ${show(y[0])} to ${show(y.at(-1))}`}>
    ${[Math.max(...y), Math.min(...y)].map(v => svg`<text x=${left - 6} y=${Y(v) + 4} text-anchor="end">${show(v, 3)}</text>
      <line class="axis" x1=${left} x2=${W} y1=${Y(v)} y2=${Y(v)}/>`)}
    ${ticks.map(k => svg`<text x=${X(k)} y=${H - 6} text-anchor=${k === 0 ? "start" : k === s.length - 1 ? "end" : "middle"}>${s[k].toLocaleString("en")}</text>`)}
    <path d=${s.map((_, k) => `${k ? "L" : "M"}${X(k).toFixed(1)} ${Y(y[k]).toFixed(1)}`).join("")} class="line"/>
      <line class="now" x1=${X(at)} x2=${X(at)} y1="4" y2=${H - low}/><circle cx=${X(at)} cy=${Y(y[at])} r="4"/></svg>
    <label>step <input type="range" min="0" max=${s.length - 1} .value=${String(at)} aria-valuetext=${`step ${s[at]}`} @input=${event => {
      state.snapshot = +event.target.value;
      draw();
    }}></label>
    <p><strong>step ${s[at].toLocaleString("en")}</strong> <span class="soft">of ${s.at(-1).toLocaleString("en")}; ${LOSS} there ${show(y[at], 6)}</span></p></div></section>`;
}

function plane() {
  if (!scene.plane || frozen) return nothing;
  const x = main.inputs.input,
    out = forwardOfLast(),
    n = main.shapes[x][0];
  return html`<section class="card"><h2>What it says of every input</h2><div class="planes">
    <canvas class="plane" width="41" height="41" role="img" aria-label=${`the network's output over the plane of its inputs, from ${scene.plane[0]} to ${scene.plane[1]}; blue above the middle, orange below`}></canvas>
    <table><thead><tr><th scope="col">example</th><th scope="col">output</th><th scope="col">target</th></tr></thead><tbody>${[
      ...Array(n).keys(),
    ].map(
      e =>
        html`<tr><td><button aria-pressed=${e === state.example} @click=${() => {
          state.example = e;
          go(state.step);
        }}>${[0, 1].map(j => show(entry(values()[nameOfMain], x, [e, j]))).join(", ")}</button></td>
          <td>${number(nameOfMain, out, [e, 0])}</td>
          <td>${number(nameOfMain, main.inputs.target, main.shapes[main.inputs.target].length > 1 ? [e, 0] : [e])}</td></tr>`,
    )}</tbody></table></div></section>`;
}
const forwardOfLast = () => main.marks["forward:"] ?? main.marks[`forward:${nodes.at(-1).name}`];
function paintPlane() {
  const canvas = document.querySelector("canvas.plane");
  if (!canvas) return;
  const n = 41,
    [lo, hi] = scene.plane,
    at = k => lo + ((hi - lo) * k) / (n - 1),
    out = forwardOfLast(),
    only = main.needed([out]),
    image = new ImageData(n, n);
  const x = main.inputs.input,
    m = main.shapes[x][0],
    ink = INK[matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"];
  const middle = scene.middle ?? 0,
    results = [];
  for (let k = 0; k < n * n; k += m) {
    const points = new Float64Array(2 * m);
    for (let e = 0; e < m; e++) {
      const p = Math.min(k + e, n * n - 1);
      points[2 * e] = at(p % n);
      points[2 * e + 1] = at(n - 1 - Math.floor(p / n));
    }
    const found = main.run({ ...values().changed, input: points }, only)[out].data;
    for (let e = 0; e < m && k + e < n * n; e++) results[k + e] = found[e] - middle;
  }
  const most = greatest(results) || 1;
  results.forEach((value, k) => {
    const to = value > 0 ? ink.plus : ink.minus,
      s = Math.min(1, Math.abs(value) / most);
    for (let q = 0; q < 3; q++) image.data[4 * k + q] = ink.zero[q] + (to[q] - ink.zero[q]) * s;
    image.data[4 * k + 3] = 255;
  });
  const context = canvas.getContext("2d"),
    data = values()[nameOfMain][x].data;
  context.putImageData(image, 0, 0);
  context.fillStyle = "#000";
  for (let e = 0; e < m; e++)
    context.fillRect(
      Math.round(((data[2 * e] - lo) / (hi - lo)) * (n - 1)),
      Math.round(((hi - data[2 * e + 1]) / (hi - lo)) * (n - 1)),
      1,
      1,
    );
}

function examples() {
  if (!(scene.examples > 1)) return nothing;
  return html`<label>example <select @change=${event => {
    state.example = +event.target.value;
    go(state.step);
  }}>${[...Array(scene.examples).keys()].map(k => html`<option value=${k} ?selected=${k === state.example}>${k + 1}</option>`)}</select></label>`;
}

function pills() {
  const { first, relative } = compared(),
    all = Object.values(checks),
    mine = Math.max(...all.map(c => c.worst)),
    count = all.reduce((sum, c) => sum + c.count, 0);
  return html`<p class="pills">${
    !programs.hand
      ? html`<span class="pill">by autodiff; there is no backward by hand</span>`
      : first
        ? html`<span class="pill bad" id="engines">by hand ≠ by autodiff: first wrong at ${first.name} <button class="small" @click=${goToFirstWrong}>go there</button></span>`
        : html`<span class="pill ok" id="engines">by hand = by autodiff to ${relative ? relative.toExponential(0).replace("-", "−") : "the bit"}</span>`
  }
    <span class="pill ${mine < 1e-12 ? "ok" : "bad"}" id="agreement" data-worst=${mine} data-count=${count}>${mine < 1e-12 ? "this page = fnet to" : "this page ≠ fnet:"} ${mine ? mine.toExponential(0).replace("-", "−") : "the bit"} in ${count.toLocaleString("en")} numbers</span>
    ${unknown.length ? html`<span class="pill ${frozen ? "bad" : ""}" id="unknown">${frozen ? "as fnet recorded it, for the page does not know" : "drawn by fnet and kept as recorded:"} ${unknown.join(", ")}</span>` : nothing}
    ${
      isEdited()
        ? html`<span class="pill bwd" id="edited">changed here: these numbers are this page’s own <button class="small" @click=${() => {
            state.edits = {};
            draw();
          }}>undo</button></span>`
        : isRecorded()
          ? nothing
          : html`<span class="pill bwd" id="edited">step ${scene.training.steps[state.snapshot].toLocaleString("en")} of the training: fnet’s parameters, this page’s numbers</span>`
    }</p>`;
}

function view() {
  const step = steps[state.step];
  return html`<header><h1>${scene.title}</h1>${scene.note ? html`<p class="soft">${scene.note}</p>` : nothing}${pills()}</header>
    <nav class="bar" aria-label="steps of the pass">
      <button aria-label="first step" @click=${() => go(0)} ?disabled=${state.step === 0}>|◀</button>
        <button aria-label="step back" @click=${() => go(state.step - 1)} ?disabled=${state.step === 0}>◀</button>
      <button aria-label="step forward" @click=${() => go(state.step + 1)} ?disabled=${state.step === LAST}>▶</button>
        <button aria-label="last step" @click=${() => go(LAST)} ?disabled=${state.step === LAST}>▶|</button>
      <span class="what" aria-live="polite"><strong class=${step.phase === "forward" || step.phase === "start" ? "fwd" : "bwd"}>${step.text}</strong> <span class="soft">step ${state.step} of ${LAST}; also by ← and →</span></span>
      ${examples()}<label>digits <select @change=${event => {
        state.digits = +event.target.value;
        draw();
      }}>${[4, 6, 9, 17].map(d => html`<option value=${d} ?selected=${d === state.digits}>${d}</option>`)}</select></label></nav>
    <div class="whole"><main>
      <section class="card pass"><h2>The pass, <span class="fwd">forward</span> and <span class="bwd">backward</span></h2>${columns ? graph() : cards()}</section>
      ${training()}${plane()}${table()}</main>
    <aside class="card" aria-label="where it comes from"><h2>Where it comes from</h2>${from()}</aside></div>`;
}
function draw() {
  render(view(), document.getElementById("app"));
  if (columns) drawEdges();
  paintTiles();
  paintPlane();
  const here = document.querySelector("pre .here");
  if (here)
    here.parentElement.scrollTop = here.offsetTop - here.parentElement.offsetTop - here.parentElement.clientHeight / 2;
}

addEventListener("keydown", event => {
  if (
    event.defaultPrevented ||
    event.ctrlKey ||
    event.metaKey ||
    event.altKey ||
    event.target.matches?.("input, select, textarea")
  )
    return;
  if (event.key === "ArrowRight") go(state.step + 1);
  else if (event.key === "ArrowLeft") go(state.step - 1);
  else if (event.key === "Escape") {
    state.hovered = null;
    draw();
  }
});
addEventListener("resize", () => columns && drawEdges());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
if (compared().first) goToFirstWrong();
else go(LAST);
globalThis.explorer = {
  scene,
  programs,
  main,
  state,
  values,
  compared,
  given,
  steps,
  go,
  draw,
  edit,
  lossAt,
  snapshotParams,
  formula,
  label,
};
