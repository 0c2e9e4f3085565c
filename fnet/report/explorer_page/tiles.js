// Networks of many numbers: a card for each layer, its values and their gradients as pictures whose cells can be opened.

const FEW = 16; // so many numbers of one axis are written as numbers

// a picture of one value for one example: {id, program, h, w, ix(r, c), find(ix), title}; several where there are maps
function pictures(name, program = nameOfMain) {
  const id = idOf(programs[program], name);
  if (id === undefined) return [];
  const whole = programs[program].shapes[id],
    batched = isByExample(name, whole);
  const lead = batched ? [state.example] : [],
    shape = whole.slice(lead.length);
  const base = {
    program,
    id,
    name,
    span: batched ? [state.example * size(shape), (state.example + 1) * size(shape)] : null,
  };
  const image = scene.images[name] ?? scene.images[valueOfName(name)];
  const [kind, path] = partsOf(name);
  if (image && size(shape) === size(image))
    return [
      { ...base, h: image[0], w: image[1], ix: (r, c) => [...lead, ...unflat(r * image[1] + c, shape)], title: "" },
    ];
  if (shape.length === 0) return [{ ...base, h: 1, w: 1, ix: () => lead, title: "" }];
  if (shape.length === 1) {
    const w = shape[0] <= 32 ? shape[0] : squarish(shape[0]);
    return [
      {
        ...base,
        h: Math.ceil(shape[0] / w),
        w,
        ix: (r, c) => (r * w + c < shape[0] ? [...lead, r * w + c] : null),
        title: "",
      },
    ];
  }
  if (shape.length === 2) {
    const time = batched; // steps along the columns, features down
    const [a, b] = shape;
    return [
      time
        ? { ...base, h: b, w: a, ix: (r, c) => [...lead, c, r], title: "", steps: true }
        : { ...base, h: a, w: b, ix: (r, c) => [...lead, r, c], title: "" },
    ];
  }
  const first = kind === "inner" || name.startsWith("dy:inner:") || !batched; // heads stand first, channels last
  const maps = first ? shape[0] : shape.at(-1),
    [a, b] = first ? [size(shape.slice(1, -1)), shape.at(-1)] : [shape[0], size(shape.slice(1, -1))];
  const inner = first ? shape.slice(1) : shape.slice(0, -1);
  const square = Math.min(maps, 64);
  return [...Array(square).keys()].map(m => ({
    ...base,
    h: a,
    w: b,
    title: `${m}`,
    ix: (r, c) => {
      const at = unflat(r * b + c, inner);
      return [...lead, ...(first ? [m, ...at] : [...at, m])];
    },
  }));
}
const squarish = n => {
  let w = Math.ceil(Math.sqrt(n * 2));
  for (let k = w; k >= Math.sqrt(n); k--) if (n % k === 0) return k;
  return w;
};

function tile(picture, { cell = null } = {}) {
  const known = picture.program !== nameOfMain || isKnown(picture.id);
  const side =
    cell ??
    Math.max(
      3,
      Math.min(22, Math.floor((Math.max(picture.h, picture.w) > 40 ? 300 : 180) / Math.max(picture.h, picture.w))),
    );
  const name = programs[picture.program].nameOf(picture.id) ?? picture.name;
  const words = `${fullName(picture.name, [])}${picture.title ? ` ${picture.title}` : ""}: ${picture.h} by ${picture.w} numbers${known ? "" : ", not yet known"}; the arrow keys go from one to the next`;
  const pointed = event => {
    const box = event.currentTarget.getBoundingClientRect();
    const r = Math.floor(((event.clientY - box.top) / box.height) * picture.h),
      c = Math.floor(((event.clientX - box.left) / box.width) * picture.w);
    return picture.ix(Math.max(0, Math.min(picture.h - 1, r)), Math.max(0, Math.min(picture.w - 1, c)));
  };
  const spot = ix => (ix && known ? { program: picture.program, id: picture.id, ix } : null);
  const over =
    picture.steps || partsOf(name)[1].endsWith("attention") || name.startsWith("dy:inner:") ? tokens(picture.w) : null;
  return html`<div style="width:${picture.w * side}px" class="framed">${over ? html`<div class="tokens" aria-hidden="true" style="grid-template-columns:repeat(${picture.w},1fr)">${over.map(word => html`<span>${word}</span>`)}</div>` : nothing}<div class="box">
    <canvas class="tile" tabindex="0" role="application" aria-roledescription="picture of numbers" aria-label=${words}
    width=${picture.w} height=${picture.h} style="aspect-ratio:${picture.w}/${picture.h}" .picture=${picture} .known=${known}
    @pointermove=${event => inPanel(event) || hover(spot(pointed(event)))} @pointerleave=${() => hover(null)}
    @click=${event => {
      const ix = pointed(event);
      if (spot(ix)) choose(picture.program, picture.id, ix);
    }}
    @keydown=${event => walkTile(event, picture, known)} @focus=${event => known && !inPanel(event) && !isIn(picture, state.chosen) && choose(picture.program, picture.id, picture.ix(0, 0))}></canvas>
    <svg class="marks" viewBox="0 0 ${picture.w} ${picture.h}" preserveAspectRatio="none" aria-hidden="true"></svg></div></div>`;
}
// what the steps of the inputs are called, if each has a name
function tokens(count) {
  const known = Array.isArray(scene.labels.input)
    ? scene.labels.input[Math.min(state.example, scene.labels.input.length - 1)]
    : null;
  return Array.isArray(known) && known.length === count && known.every(word => typeof word === "string") ? known : null;
}
const isIn = (picture, chosen) =>
  chosen && chosen.program === picture.program && chosen.id === picture.id && cellOf(picture, chosen.ix) !== null;
function cellOf(picture, ix) {
  for (let r = 0; r < picture.h; r++)
    for (let c = 0; c < picture.w; c++) {
      const at = picture.ix(r, c);
      if (at && at.length === ix.length && at.every((k, i) => k === ix[i])) return [r, c];
    }
  return null;
}
function walkTile(event, picture, known) {
  const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
  if (!move || !known) return;
  event.preventDefault();
  event.stopPropagation();
  const [r, c] = isIn(picture, state.chosen) ? cellOf(picture, state.chosen.ix) : [0, 0];
  const to = picture.ix(
    Math.max(0, Math.min(picture.h - 1, r + move[0])),
    Math.max(0, Math.min(picture.w - 1, c + move[1])),
  );
  if (to) choose(picture.program, picture.id, to);
}

// negative orange, positive blue, by the greatest of the whole value, or of the example's part of it
const INK = {
  light: { zero: [255, 255, 255], plus: [11, 92, 173], minus: [179, 77, 0] },
  dark: { zero: [20, 22, 26], plus: [125, 184, 245], minus: [255, 164, 92] },
};
function paintTiles() {
  const ink = INK[matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"],
    from = originsOfChosen();
  for (const canvas of document.querySelectorAll("canvas.tile")) {
    const { picture, known } = canvas,
      { h, w } = picture,
      image = new ImageData(w, h),
      v = values()[picture.program][picture.id];
    const most = greatest(picture.span ? v.data.subarray(...picture.span) : v.data) || 1;
    for (let r = 0; r < h; r++)
      for (let c = 0; c < w; c++) {
        const ix = picture.ix(r, c),
          x = ix && known ? v.data[flat(ix, v.shape)] : 0,
          s = Math.min(1, Math.abs(x) / most),
          k = 4 * (r * w + c);
        const to = x < 0 ? ink.minus : ink.plus;
        for (let q = 0; q < 3; q++)
          image.data[k + q] = Number.isFinite(x) ? ink.zero[q] + (to[q] - ink.zero[q]) * s : [220, 0, 220][q];
        image.data[k + 3] = ix ? 255 : 0;
      }
    canvas.getContext("2d").putImageData(image, 0, 0);
    mark(canvas, picture, from);
  }
}
// a frame around the chosen cell, and one around those that it was computed from
function mark(canvas, picture, from) {
  const sel = state.hovered ?? state.chosen,
    { shape } = values()[picture.program][picture.id],
    { h, w } = picture;
  const own = sel?.program === picture.program && sel.id === picture.id ? flat(sel.ix, shape) : null;
  const wanted = sel?.program === picture.program ? from.get(picture.id) : undefined;
  const places = [...Array(h * w).keys()].map(cell => {
    const ix = own !== null || wanted ? picture.ix(Math.floor(cell / w), cell % w) : null;
    return ix ? flat(ix, shape) : null;
  });
  const outline = inside => {
    if (places.every(inside)) return "";
    const at = (r, c) => r >= 0 && r < h && c >= 0 && c < w && inside(places[r * w + c]);
    let d = "";
    for (let r = 0; r < h; r++)
      for (let c = 0; c < w; c++)
        if (at(r, c)) {
          if (!at(r - 1, c)) d += `M${c} ${r}h1`;
          if (!at(r + 1, c)) d += `M${c} ${r + 1}h1`;
          if (!at(r, c - 1)) d += `M${c} ${r}v1`;
          if (!at(r, c + 1)) d += `M${c + 1} ${r}v1`;
        }
    return d;
  };
  const line = (kind, d) => (d ? svg`<path class=${kind} d=${d} vector-effect="non-scaling-stroke"/>` : nothing);
  render(
    svg`${line("from", wanted ? outline(k => k !== null && wanted.has(k)) : "")}${line("here", own === null ? "" : outline(k => k === own))}`,
    canvas.nextElementSibling,
  );
}
let origins_ = { key: null };
function originsOfChosen() {
  const sel = state.hovered ?? state.chosen;
  if (!sel) return new Map();
  const now = values(),
    key = `${sel.program} ${sel.id} ${sel.ix}`;
  if (origins_.key !== key || origins_.of !== now) {
    const found = new Map();
    for (const [id, ix] of programs[sel.program].origins(now[sel.program], sel.id, sel.ix)) {
      if (!found.has(id)) found.set(id, new Set());
      found.get(id).add(flat(ix, programs[sel.program].shapes[id]));
    }
    origins_ = { key, of: now, found };
  }
  return origins_.found;
}

// a value as numbers where it has few, else as pictures
function shown(name, program = nameOfMain) {
  const id = idOf(programs[program], name);
  if (id === undefined) return nothing;
  const found = pictures(name, program),
    [first] = found;
  if (
    found.length === 1 &&
    first.h * first.w <= FEW &&
    !scene.images[name] &&
    (first.h === 1 || first.h * first.w <= 8)
  ) {
    const known = program !== nameOfMain || isKnown(id);
    const cells = [];
    for (let r = 0; r < first.h; r++) for (let c = 0; c < first.w; c++) cells.push(first.ix(r, c));
    const words = main.kinds[id] === "i" && program === nameOfMain && name in scene.labels;
    return html`<div class="numbers">${cells.filter(Boolean).map(ix => html`<span>${words ? html`<span class="word">${label(name, ix)}</span> ` : nothing}${known ? number(program, id, ix) : html`<span class="soft">·</span>`}</span>`)}</div>`;
  }
  const cell =
    found.length > 1
      ? Math.max(3, Math.min(14, Math.floor((found.length > 16 ? 70 : 120) / Math.max(first.h, first.w))))
      : null;
  return html`<div class="maps">${found.map(p => html`<div class="map">${tile(p, { cell })}</div>`)}</div>`;
}

function valueAndGradient(name, heading) {
  const back = gradientOf(name),
    id = idOf(main, name),
    there = back !== undefined && idOf(main, back) !== undefined;
  if (id === undefined) return nothing;
  const bad = there && isKnown(idOf(main, back)) && compared().offs?.[back]?.wrong;
  return html`<div class="pair"><div>
    <h4>${heading}</h4>${shown(name)}</div>${there ? html`<div class=${bad ? "wrong" : ""}>
    <h4 class="bwd">gradient${bad ? html` <span class="bad">≠ autodiff’s</span>` : nothing}</h4>${shown(back)}</div>` : nothing}</div>`;
}

// what a layer shows of itself: {h: {0: mark, 1: …}, attention: {"": mark}}
function innerOf(node) {
  const found = {};
  for (const mark of Object.keys(main.marks)) {
    const [, inner] = mark.match(/^inner:(.*)$/s) ?? [];
    if (!inner?.startsWith(node.name ? node.name + "/" : "")) continue;
    const [name, at = ""] = inner.slice(node.name ? node.name.length + 1 : 0).split("@");
    if (!name.includes("/")) (found[name] ??= {})[at] = mark;
  }
  return found;
}

// values of the steps of a loop as one picture, steps along the columns
function timeTile(marks, program = nameOfMain) {
  const at = Object.keys(marks).sort((a, b) => a - b),
    ids = at.map(t => idOf(programs[program], marks[t]));
  if (ids.some(id => id === undefined)) return null;
  const shape = programs[program].shapes[ids[0]];
  return html`<div class="maps times">${ids.map((id, t) => html`<div class="map">
    <div class="soft">${t}</div>${tile({ program, id, name: marks[at[t]], h: size(shape.slice(1)), w: 1, ix: r => [state.example, ...unflat(r, shape.slice(1))], title: `step ${t}` }, { cell: 16 })}</div>`)}</div>`;
}
function norms(marks, program) {
  return Object.keys(marks)
    .sort((a, b) => a - b)
    .map(t => {
      const id = idOf(programs[program], marks[t]);
      if (id === undefined || (program === nameOfMain && !isKnown(id))) return undefined;
      const { data, shape } = values()[program][id],
        width = size(shape.slice(1));
      return Math.hypot(...data.slice(state.example * width, (state.example + 1) * width));
    });
}
function inner(node) {
  const found = innerOf(node);
  return html`<div class="inner">${Object.entries(found).map(([name, marks]) => {
    const back = Object.fromEntries(Object.entries(marks).map(([t, mark]) => [t, gradientOf(mark)])),
      timed = !("" in marks);
    if (!timed) {
      const byHeads = main.shapes[idOf(main, marks[""])].length > 3;
      const words = byHeads ? "each head’s; rows ask, columns are asked" : "what it shows of itself";
      return valueAndGradient(marks[""], `${name}: ${words}`);
    }
    const gradient = Object.values(back).every(mark => idOf(main, mark) !== undefined) ? timeTile(back) : null;
    const lengths = gradient ? norms(back, nameOfMain) : [],
      most = Math.max(1e-300, ...lengths.filter(Boolean));
    return html`<div class="pair"><div><h4>${name}<sub>t</sub></h4>${timeTile(marks)}</div>${
      gradient
        ? html`<div><h4 class="bwd">∂${LOSS}/∂${name}<sub>t</sub></h4>${gradient}</div>
      <div><h4 class="bwd">‖∂${LOSS}/∂${name}<sub>t</sub>‖ by step</h4><table class="norms">
        <tbody>${lengths.map((x, t) => html`<tr><th scope="row">${t}</th><td>${show(x)}</td>
        <td class="bar" aria-hidden="true"><span style="width:${x === undefined ? 0 : (100 * x) / most}%"></span></td></tr>`)}</tbody></table></div>`
        : nothing
    }</div>`;
  })}</div>`;
}
function cards() {
  const now = steps[state.step];
  const card = (heading, kind, body, on) =>
    html`<section class="node ${on}"><h3>${heading} <span class="soft">${kind}</span></h3>${body}</section>`;
  const inputs = Object.keys(main.inputs).filter(path => /^(input|arg)(\/|$)/.test(path));
  const targets = Object.keys(main.inputs).filter(path => /^(target|weight)(\/|$)/.test(path));
  return html`<div class="cards">
    ${
      inputs.length
        ? card(
            "inputs",
            "",
            inputs.map(path => valueAndGradient(path, path === "input" ? "value" : path)),
            now.phase === "start" ? "on forward" : "",
          )
        : nothing
    }
    ${nodes.map(node =>
      card(
        title(node),
        `${isLayer(node) ? node.kind : ""} ${marksOf(main, `forward:${node.name}`)
          .map(mark => main.shapes[main.marks[mark]].join("×"))
          .join(", ")}`,
        html`
      ${marksOf(main, `forward:${node.name}`).map(mark => valueAndGradient(mark, "value"))}${inner(node)}
      ${node.parameters.length ? html`<details><summary>${node.parameters.length === 1 ? "its parameter" : `its ${node.parameters.length} parameters`}</summary>${node.parameters.filter(path => "param/" + path in main.inputs || path === "").map(path => valueAndGradient(path ? `param/${path}` : "param", path))}</details>` : nothing}`,
        now.node === node ? `on ${now.phase}` : "",
      ),
    )}
    ${nodes.some(isLayer) ? card("loss", "", html`${targets.map(path => valueAndGradient(path, path))}<div class="pair">
      <div><h4>${LOSS}</h4>
      <div class="numbers">${numberOf("loss", [])}</div></div></div>`, now.node === null && now.phase !== "start" ? `on ${now.phase}` : "") : nothing}
    ${nodes.some(isLayer) ? nothing : html`<section class="node">
      <h3>parameters</h3>${parameters.map(path => valueAndGradient(path, path.slice(6)))}</section>`}
  </div>`;
}
