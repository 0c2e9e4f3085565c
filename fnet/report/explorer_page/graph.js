// Networks of few units as a graph: a box for each unit, with the weights that reach it, and lines to where they come from.

const MOST_UNITS = 8;

// the panel that explains a number stays while something in it is pointed at
const inPanel = event => event.currentTarget.closest("aside") !== null;

// a number that can be opened: pointer and focus explain it, a click pins it
function number(program, id, ix, { negative = false, text = null } = {}) {
  const x = entry(values()[program], id, ix),
    name = programs[program].nameOf(id);
  const here = sel => sel && sel.program === program && sel.id === id && String(sel.ix) === String(ix);
  const words = `${label(name, ix)}${program === nameOfMain ? "" : ` ${ENGINE[program]}`} is ${show(x)}`;
  const point = event => {
    if (!inPanel(event)) hover({ program, id, ix });
  };
  return html`<button class="num ${tone(name)} ${here(state.chosen) ? "on" : ""}" aria-label=${words} title=${words}
    @click=${() => choose(program, id, ix)} @pointerenter=${point} @pointerleave=${() => hover(null)} @focus=${point} @blur=${() => hover(null)}>${text ?? (negative && x < 0 ? `(${show(x)})` : show(x))}</button>`;
}

// by its name in the main program, "·" as long as the pass has not come to it
function numberOf(name, ix) {
  const id = idOf(main, name);
  if (id === undefined) return nothing;
  return isKnown(id) ? number(nameOfMain, id, ix) : html`<span class="soft" aria-label="not yet known">·</span>`;
}

// the columns of a graph: each dense layer with what acts on its units one by one; null where the model is no such thing
const columns = (() => {
  const input = main.inputs.input;
  if (input === undefined || main.shapes[input].length !== 2 || main.shapes[input][1] > MOST_UNITS) return null;
  const found = [];
  let width = main.shapes[input][1];
  for (const node of nodes) {
    const id = main.marks[`forward:${node.name}`],
      [w] = node.parameters.filter(path => path.split("/").at(-1) === "w");
    if (id === undefined || main.shapes[id].length !== 2 || main.shapes[id][1] > MOST_UNITS) return null;
    if (node.kind === "dense")
      found.push({
        dense: node,
        weights: w,
        bias: node.parameters.find(path => path.split("/").at(-1) === "b"),
        then: [],
        from: width,
        units: (width = main.shapes[id][1]),
      });
    else if (node.parameters.length || main.shapes[id][1] !== width || !found.length) return null;
    else found.at(-1).then.push(node);
  }
  return found.length ? found : null;
})();

// the gradient that stands beside a value, undefined where there is none
function gradientOf(name) {
  if (name.startsWith("param")) return "grads" + name.slice(5);
  if (/^input(\/|$)/.test(name)) return "inputs" + name.slice(5);
  if (name.startsWith("inner:")) return "dy:" + name;
  return name.startsWith("forward:") ? "dy:" + name.slice(8) : undefined;
}
const isWrong = (mark, ix) => {
  const off = compared().offs?.[mark];
  if (!off?.wrong) return false;
  const [a, b] = ["hand", "auto"].map(p => entry(values()[p], idOf(programs[p], mark), ix));
  return !(Math.abs(a - b) <= TIGHT * greatest(values().auto[idOf(programs.auto, mark)].data));
};

function row(name, ix, { port = null, text = null, first = false } = {}) {
  const back = gradientOf(name),
    id = back && idOf(main, back),
    bad = id !== undefined && isKnown(id) && isWrong(back, ix);
  return html`<tr data-port=${port ?? nothing} class=${first ? "first" : ""}><th scope="row">${text ?? label(name, ix)}</th>
    <td>${numberOf(name, ix)}</td>
      <td class=${bad ? "wrong" : ""}>${id === undefined ? nothing : numberOf(back, ix)}${bad ? html`<span class="bad" title="not autodiff's"> ≠</span>` : nothing}</td></tr>`;
}

function unit(key, name, rows, on) {
  return html`<div class="unit ${on}" data-unit=${key} role="group" aria-label=${name}><table><caption>${name}</caption>
    <tbody>${rows}</tbody></table></div>`;
}

function graph() {
  const e = state.example,
    now = steps[state.step];
  const on = nodes_ => (nodes_.includes(now.node) && now.node ? `on ${now.phase}` : "");
  const before = c =>
    c === 0
      ? j => label("input", [e, j])
      : j => label(`forward:${(columns[c - 1].then.at(-1) ?? columns[c - 1].dense).name}`, [e, j]);
  const input = html`<div class="column"><h3>inputs</h3><div class="units">${[...Array(columns[0].from).keys()].map(j =>
    unit(`0,${j}`, label("input", [e, j]), row("input", [e, j]), now.phase === "start" ? "on forward" : ""),
  )}</div></div>`;
  const layers = columns.map(
    (
      column,
      c,
    ) => html`<div class="column"><h3>${[column.dense, ...column.then].map(title).map(nice).join(", ")}</h3><div class="units">
    ${[...Array(column.units).keys()].map(j =>
      unit(
        `${c + 1},${j}`,
        label(`forward:${(column.then.at(-1) ?? column.dense).name}`, [e, j]),
        [
          ...[...Array(column.from).keys()].map(i =>
            row(`param/${column.weights}`, [i, j], {
              port: `${c},${i},${j}`,
              text: html`${label(`param/${column.weights}`, [i, j])} <span class="soft partner">· ${before(c)(i)}</span>`,
            }),
          ),
          ...(column.bias ? [row(`param/${column.bias}`, [j])] : []),
          ...[column.dense, ...column.then].map((node, k) => row(`forward:${node.name}`, [e, j], { first: k === 0 })),
        ],
        on([column.dense, ...column.then]),
      ),
    )}</div></div>`,
  );
  const targets = main.inputs.target,
    wide = targets === undefined ? 0 : main.shapes[targets].length > 1 ? main.shapes[targets][1] : 1;
  const loss = html`<div class="column"><h3>loss</h3><div class="units">${unit(
    "loss",
    LOSS,
    [
      ...[...Array(wide).keys()].map(j => row("target", main.shapes[targets].length > 1 ? [e, j] : [e])),
      html`<tr class="first"><th scope="row">${LOSS}</th><td>${numberOf("loss", [])}</td><td></td></tr>`,
    ],
    now.node === null && now.phase !== "start" ? `on ${now.phase}` : "",
  )}</div></div>`;
  return html`<div class="graph"><svg class="edges" aria-hidden="true"></svg>${input}${layers}${loss}</div>`;
}

// the lines, where the boxes have come to stand
function drawEdges() {
  const box = document.querySelector(".graph");
  if (!box) return;
  const needed =
    [...box.querySelectorAll(".column")].reduce(
      (sum, column) =>
        sum + Math.max(...[...column.querySelectorAll(".unit")].map(unit => unit.firstElementChild.offsetWidth + 18)),
      0,
    ) +
    64 * columns.length +
    64;
  const room = box.parentElement.clientWidth;
  box.classList.toggle("down", needed > room);
  const down = box.classList.contains("down"),
    frame = box.getBoundingClientRect(),
    v = values()[nameOfMain],
    e = state.example;
  const at = element => {
    const r = element.getBoundingClientRect();
    return { x: r.left - frame.left, y: r.top - frame.top, w: r.width, h: r.height };
  };
  const curve = (a, b) =>
    down
      ? `M${a.x} ${a.y}C${a.x} ${a.y + 24} ${b.x} ${b.y - 24} ${b.x} ${b.y}`
      : `M${a.x} ${a.y}C${a.x + 30} ${a.y} ${b.x - 30} ${b.y} ${b.x} ${b.y}`;
  const lines = [],
    now = steps[state.step];
  columns.forEach((column, c) => {
    const w = idOf(main, `param/${column.weights}`),
      g = idOf(main, `grads/${column.weights}`),
      back = isKnown(g) && now.phase !== "forward";
    const data = v[back ? g : w].data,
      most = greatest(data) || 1,
      active = now.node && [column.dense, ...column.then].includes(now.node);
    for (let j = 0; j < column.units; j++)
      for (let i = 0; i < column.from; i++) {
        const from = at(box.querySelector(`[data-unit="${c},${i}"]`)),
          to = at(box.querySelector(`[data-unit="${c + 1},${j}"]`));
        const port = at(box.querySelector(`[data-port="${c},${i},${j}"]`)),
          size = Math.abs(entry(v, back ? g : w, [i, j])) / most;
        const a = down
          ? { x: from.x + from.w / 2, y: from.y + from.h }
          : { x: from.x + from.w, y: from.y + from.h / 2 };
        const b = down ? { x: to.x + to.w / 2, y: to.y } : { x: to.x, y: port.y + port.h / 2 };
        lines.push(
          svg`<path class="${back ? "bwd" : "fwd"} ${active ? "active" : ""}" d=${curve(a, b)} stroke-width=${(0.75 + 3.5 * size).toFixed(2)}/>`,
        );
      }
  });
  const lossBox = at(box.querySelector('[data-unit="loss"]'));
  for (let j = 0; j < columns.at(-1).units; j++) {
    const from = at(box.querySelector(`[data-unit="${columns.length},${j}"]`));
    const a = down ? { x: from.x + from.w / 2, y: from.y + from.h } : { x: from.x + from.w, y: from.y + from.h / 2 };
    const b = down ? { x: lossBox.x + lossBox.w / 2, y: lossBox.y } : { x: lossBox.x, y: lossBox.y + lossBox.h / 2 };
    lines.push(svg`<path class="plain" d=${curve(a, b)} stroke-width="1"/>`);
  }
  const edges = box.querySelector(".edges");
  edges.setAttribute("viewBox", `0 0 ${frame.width} ${frame.height}`);
  render(svg`${lines}`, edges);
}
