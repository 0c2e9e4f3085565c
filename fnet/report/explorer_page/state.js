// What the page shows, and what follows from it: the numbers at the chosen parameters, and when in the pass each is known.

const scene = JSON.parse(document.getElementById("data").textContent);
const given = Object.fromEntries(Object.entries(scene.given).map(([path, array]) => [path, decode(array)]));
const programs = { auto: new Program(scene.programs.auto, given) };
if (scene.programs.hand) programs.hand = new Program(scene.programs.hand, given);
const main = programs.hand ?? programs.auto; // whose pass is shown; the other engine stands beside its numbers
const nameOfMain = main === programs.hand ? "hand" : "auto";
const ENGINE = { hand: "by hand", auto: "by autodiff" };
const frozen = Object.values(programs).some(p => p.frozen);

const parameters = Object.keys(main.inputs).filter(
  path => /^param(\/|$)/.test(path) && main.kinds[main.inputs[path]] === "f",
);
const snapshots = scene.training ? decode(scene.training.params) : null;

const state = {
  step: 0,
  snapshot: scene.training?.at ?? 0,
  example: 0,
  edits: {}, // path -> all entries of an input or a parameter that was changed here
  chosen: null, // {program, id, ix}: the number that is explained
  hovered: null, // one that the pointer is on, which is explained as long as it is
  frame: null, // which of the callers' code is shown
  digits: 4,
};
const isEdited = () => Object.keys(state.edits).length > 0;
const isRecorded = () => !isEdited() && state.snapshot === (scene.training?.at ?? 0);

// whether a name is this mark, or that of a leaf of it where its value is a tree
const isLeafOf = (name, mark) => name === mark || name.startsWith(mark + "#");
// whether the first axis of a value of this name is that of the examples
const isByExample = (name, shape) =>
  scene.examples > 0 && shape[0] === scene.examples && !/^(param|grads|state|arg)/.test(name);
const idOf = (program, name) => program.marks[name] ?? program.outs[name] ?? program.inputs[name];
const entry = (values, id, ix) => values[id].data[flat(ix, values[id].shape)];

// ---- the numbers

function snapshotParams(k) {
  if (k === scene.training.at) return Object.fromEntries(scene.training.paths.map(path => [path, given[path].data]));
  const found = {};
  let at = (k - (k > scene.training.at)) * snapshots.shape[1]; // the recorded ones are not there twice
  for (const path of scene.training.paths) {
    const count = given[path].data.length;
    found[path] = snapshots.data.slice(at, at + count);
    at += count;
  }
  return found;
}

function changed() {
  const moved = snapshots && state.snapshot !== scene.training.at ? snapshotParams(state.snapshot) : {};
  return { ...moved, ...state.edits };
}

let last_ = { key: null };
function values() {
  const key = `${state.snapshot} ${Object.keys(state.edits)
    .map(path => `${path} ${state.edits[path].version}`)
    .join(" ")}`;
  if (last_.key !== key) {
    const moved = changed();
    last_ = { key, changed: moved };
    for (const [name, program] of Object.entries(programs)) last_[name] = program.run(moved);
  }
  return last_;
}

let version = 0;
function edit(path, k, value) {
  const data = Float64Array.from(values().changed[path] ?? given[path].data);
  data[k] = value;
  change({ [path]: data });
}
function change(arrays) {
  for (const [path, data] of Object.entries(arrays)) {
    data.version = ++version;
    state.edits[path] = data;
  }
  draw();
}

// the loss alone, with some arrays in others' place or with an entry of a value moved
const lossOnly = main.needed([main.outs.loss]);
function lossAt(moved, overrides = null) {
  return main.run(moved, lossOnly, overrides)[main.outs.loss].data[0];
}

// (L(v + h) − L(v − h)) / 2h for an entry of any value
function slope(id, ix) {
  const base = values()[nameOfMain][id],
    k = flat(ix, base.shape),
    h = 1e-5;
  const path = main.nameOf(id);
  const at = by => {
    const data = Float64Array.from(base.data);
    data[k] += by;
    return path in main.inputs
      ? lossAt({ ...values().changed, [path]: data })
      : lossAt(values().changed, new Map([[id, data]]));
  };
  return (at(h) - at(-h)) / (2 * h);
}

// ---- the steps of the pass, and when a value is known

const nodes = scene.nodes.map((node, at) => ({ ...node, at }));
const nodeOf = Object.fromEntries(nodes.map(node => [node.name, node]));
const isLayer = node => node.kind !== "value";
const title = node => node.name || scene.title_of_model;
const steps = [
  { phase: "start", text: "the inputs and the parameters" },
  ...nodes.map(node => ({ phase: "forward", node, text: `forward: ${title(node)}` })),
  ...(nodes.some(isLayer)
    ? [
        { phase: "forward", node: null, text: "forward: the loss" },
        { phase: "backward", node: null, text: "backward: the loss" },
      ]
    : []),
  ...scene.backward.map(name => ({ phase: "backward", node: nodeOf[name], text: `backward: ${title(nodeOf[name])}` })),
  ...(parameters.length ? [{ phase: "update", text: "all gradients, and the update" }] : []),
];
const LAST = steps.length - 1;

const made = (program, id) => program.made.get(id) ?? -1;
const marksOf = (program, mark) =>
  Object.keys({ ...program.marks, ...program.outs }).filter(name => isLeafOf(name, mark));
function endOf(step) {
  const marks =
    step.phase === "start"
      ? []
      : step.phase === "update"
        ? Object.keys(main.outs)
        : step.node === null
          ? step.phase === "forward"
            ? ["loss"]
            : marksOf(main, "dy:")
          : step.phase === "forward"
            ? marksOf(main, `forward:${step.node.name}`)
            : isLayer(step.node)
              ? [
                  ...marksOf(main, `dx:${step.node.name}`),
                  ...step.node.parameters.map(path => (path ? `grads/${path}` : "grads")),
                ]
              : marksOf(main, `dy:${step.node.name}`);
  return Math.max(
    -1,
    ...marks
      .map(mark => idOf(main, mark))
      .filter(id => id !== undefined)
      .map(id => made(main, id)),
  );
}
const ends = [];
for (const step of steps) ends.push(Math.max(ends.at(-1) ?? -1, endOf(step)));
ends[LAST] = Infinity;
const isKnown = (id, step = state.step) => made(main, id) <= ends[step];

// ---- where the two engines part

const TIGHT = 1e-9,
  ROUNDING = 1e-13; // as fnet.Recording.first_wrong has them
const greatest = data => {
  let most = 0;
  for (const x of data) if (Math.abs(x) > most || Number.isNaN(x)) most = Math.abs(x);
  return most;
};
let compared_ = { of: null };
function compared() {
  const now = values();
  if (compared_.of === now || !programs.hand) return compared_;
  const { hand, auto } = programs,
    most = Math.max(
      0,
      ...Object.values(auto.marks)
        .filter(id => auto.kinds[id] === "f")
        .map(id => greatest(now.auto[id].data)),
    );
  const offs = {};
  for (const name of Object.keys({ ...auto.marks, ...auto.outs })) {
    if (!isGradient(name)) continue;
    const a = now.auto[idOf(auto, name)].data,
      id = idOf(hand, name);
    if (id === undefined) continue;
    const b = now.hand[id].data,
      limit = TIGHT * greatest(a) + ROUNDING * most;
    let worst = 0,
      at = 0;
    for (let k = 0; k < a.length; k++) {
      const off = Object.is(a[k], b[k]) ? 0 : Math.abs(a[k] - b[k]);
      if (!(off <= worst)) [worst, at] = [off, k];
    }
    offs[name] = { worst, at, wrong: !(worst <= limit), relative: worst / (limit / TIGHT || 1) };
  }
  const wrong = mark =>
    Object.keys(offs).some(name => isLeafOf(name, mark) && offs[name].wrong);
  compared_ = {
    of: now,
    offs,
    wrong,
    first: firstWrong(wrong, offs),
    relative: Math.max(0, ...Object.values(offs).map(off => off.relative)),
  };
  return compared_;
}

// {name: as the audit names it, mark: of the value}, or null
function firstWrong(wrong, offs) {
  if (wrong("dy:")) return { name: "loss/outputs", mark: "dy:" };
  for (const node of scene.backward.map(name => nodeOf[name])) {
    if (!isLayer(node)) {
      if (wrong(`dy:${node.name}`)) return { name: node.name, mark: `dy:${node.name}` };
      continue;
    }
    if (wrong(`dy:${node.name}`)) continue;
    for (const path of node.parameters)
      if (wrong(path ? `grads/${path}` : "grads"))
        return { name: path || "params", mark: path ? `grads/${path}` : "grads" };
    if (wrong(`dx:${node.name}`))
      return { name: node.name ? `${node.name}/inputs` : "inputs", mark: `dx:${node.name}` };
  }
  for (const mark of Object.keys(programs.hand.marks)) {
    // those that hand on what the last layer in them gives are no nodes
    const path = mark.startsWith("dx:") ? mark.slice(3).split("#")[0] : null;
    if (path !== null && wrong(`dx:${path}`) && !wrong(`dy:${path}`))
      return { name: path ? `${path}/inputs` : "inputs", mark: `dx:${path}` };
  }
  const rest = Object.keys(programs.auto.outs).find(name => name !== "loss" && offs[name]?.wrong);
  return rest ? { name: rest.replace(/^grads\/?/, "") || "params", mark: rest } : null;
}
