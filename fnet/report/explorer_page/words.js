// Numbers, names and formulas as a person reads them.

const below = number => [...String(number)].map(d => "₀₁₂₃₄₅₆₇₈₉"[d] ?? d).join("");
const above = number => [...String(number)].map(d => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d] ?? d).join("");
const LOSS = typeof scene.labels.loss === "string" ? scene.labels.loss : "L";

function show(x, digits = state.digits) {
  if (x === undefined) return "·";
  if (Number.isNaN(x)) return "NaN";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text =
    size < 1e-4 || size >= 1e6
      ? x.toExponential(Math.min(digits, 17) - 1)
      : Number.isInteger(x)
        ? String(x)
        : digits > 15
          ? String(x)
          : x.toPrecision(digits);
  return text.replaceAll("-", "−");
}

// dense_0 -> dense₀
const nice = name => name.replace(/_(\d+)$/, (_, d) => below(d));
const last = path => nice(path.split("/").at(-1) || scene.title_of_model);
const GRADIENT = /^(dy:|dx:|grads(\/|$)|inputs(\/|$))/;
const isGradient = name => GRADIENT.test(name ?? "");
const tone = name => (isGradient(name) ? "bwd" : "fwd");

// what a gradient is the gradient by: a named value of the main program
function valueOfGradient(name) {
  if (name.startsWith("grads")) return "param" + name.slice(5);
  if (name === "inputs" || name.startsWith("inputs/")) return "input" + name.slice(6);
  const of = name.startsWith("dx:")
    ? "inputs:" + name.slice(3)
    : name.startsWith("dy:inner:")
      ? name.slice(3)
      : "forward:" + name.slice(3);
  const id = main.marks[of];
  return id === undefined ? of : (main.nameOf(id) ?? of);
}

// dx:a is only a part of the gradient where others read a's input too
function throughWhich(name) {
  if (!name.startsWith("dx:")) return "";
  const of = valueOfGradient(name);
  const whole = of.startsWith("forward:")
    ? main.marks["dy:" + of.slice(8)]
    : of.startsWith("input") && !of.startsWith("inputs:")
      ? main.outs["inputs" + of.slice(5)]
      : undefined;
  return whole === undefined || whole === main.marks[name] ? "" : ` through ${last(name.slice(3).split("#")[0])}`;
}

// an entry's name, that of scene.labels if it has one; of several examples it says of which if asked
function label(name, ix, ofWhich = false) {
  if (name === undefined) return "…";
  if (name === "loss") return LOSS;
  if (isGradient(name)) return `∂${LOSS}/∂${label(valueOfGradient(name), ix, ofWhich)}${throughWhich(name)}`;
  const of = ofWhich ? ofExample(name, ix) : "";
  const known = scene.labels[name];
  if (known !== undefined) {
    const one = ix.reduce((a, k) => (Array.isArray(a) ? a[Math.min(k, a.length - 1)] : a), known);
    if (Array.isArray(known) || !ix.length) return one + of;
    return one + place(name, ix) + of;
  }
  const [kind, path, at] = partsOf(name);
  if (kind === "param") {
    const parts = path.split("/"),
      leaf = parts.pop(),
      owner = parts.pop();
    const number = owner?.match(/_(\d+)$/)?.[1];
    const short = !leaf
      ? "w"
      : owner === undefined || number !== undefined
        ? leaf + (number ? below(number) : "")
        : `${owner}.${leaf}`;
    return short + place(name, ix);
  }
  if (kind === "inner") return last(path) + (at === "" ? "" : below(at)) + place(name, ix) + of;
  if (kind === "inputs") return `${last(path)}’s input${place(name, ix)}${of}`;
  const short = { input: "x", target: "t", weight: "weight", state: "state", arg: "arg" }[kind];
  return (short === undefined ? last(path) : short + (path ? `.${last(path)}` : "")) + place(name, ix) + of;
}

// "forward:cell#0" -> ["forward", "cell#0", ""];  "param/dense_0/w" -> ["param", "dense_0/w", ""];  "inner:lstm/h@3"
function partsOf(name) {
  const [, kind, rest = ""] = name.match(/^([a-z]+)[:/]?(.*)$/s) ?? [name, name, ""];
  const [path, at = ""] = kind === "inner" ? rest.split("@") : [rest];
  return [kind, path, at];
}
const hasExamples = (name, ix) => ix.length > 0 && isByExample(name, main.shapes[idOf(main, name)] ?? []);
const place = (name, ix) => {
  const own = hasExamples(name, ix) ? ix.slice(1) : ix;
  return own.length ? `[${own.join(",")}]` : "";
};
const ofExample = (name, ix) => (scene.examples > 1 && hasExamples(name, ix) ? `⁽${above(ix[0] + 1)}⁾` : "");

// the name in full, as fnet.record has it
function fullName(name, ix) {
  return name === undefined ? "" : name + (ix.length ? `[${ix.join(", ")}]` : "");
}

// ---- formulas: a tree of `explain` as a line, with names or with numbers that can be opened
const STRENGTH = { sum: 1, sub: 1, neg: 1.5, mul: 2, div: 8, pow: 7, fn: 9, pick: 9, ref: 9, num: 9 };
const COMPARISONS = { eq: "=", ne: "≠", lt: "<", le: "≤", gt: ">", ge: "≥" };
const FUNCTIONS = { logistic: "σ", log: "ln", rem: "mod", rsqrt: "1/√", integer_pow: "pow", erf_inv: "erf⁻¹" };

// whether entries of several examples meet in it
function mixes(e, found = new Set()) {
  if (e.t === "ref" && e.name !== undefined && hasExamples(valueOfName(e.name), e.ix)) found.add(e.ix[0]);
  for (const x of [e.a, e.b, ...(e.terms ?? []), ...(e.args ?? [])]) if (x) mixes(x, found);
  return found.size > 1;
}
const valueOfName = name => (isGradient(name) ? valueOfGradient(name) : name);

const isPlain = e => e.t === "ref" || e.t === "num" || (e.t === "neg" && isPlain(e.a));
function formula(e, program, numeric, ofWhich = mixes(e), outer = 0) {
  const within = (x, strength) => formula(x, program, numeric, ofWhich, strength);
  const parts = {
    num: () => show(e.value),
    ref: () =>
      numeric || e.name === undefined
        ? number(program, e.id, e.ix, { negative: outer > 1 })
        : html`<span class=${tone(e.name)}>${label(e.name, e.ix, ofWhich)}</span>`,
    sum: () =>
      html`${e.terms.map((x, k) =>
        x.t === "neg" && k ? html` − ${within(x.a, 2)}` : html`${k ? " + " : ""}${within(x, k ? 1.2 : 1)}`,
      )}${
        e.more
          ? html` <span class="soft">+ ${e.more.toLocaleString("en")} more, which sum to ${show(e.rest)}</span>`
          : nothing
      }`,
    sub: () => html`${within(e.a, 1)} − ${within(e.b, 2)}`,
    neg: () => html`−${within(e.a, 2)}`,
    mul: () => html`${within(e.a, 2)} · ${within(e.b, 2.5)}`,
    div: () =>
      html`<span class="frac"><span>${within(e.a, 0)}</span><span class="unseen"> / </span><span>${within(e.b, 0)}</span></span>`,
    pow: () => html`${within(e.a, 8)}<sup>${show(e.y)}</sup>`,
    pick: () => html`${within(e.a, 9)}<sup class="soft" title=${`chosen among ${e.of}`}>of ${e.of}</sup>`,
    fn: () =>
      e.f === "sqrt"
        ? html`√(${within(e.args[0], 0)})`
        : e.f === "abs"
          ? html`|${within(e.args[0], 0)}|`
          : e.f === "exp" && isPlain(e.args[0])
            ? html`e<sup>${within(e.args[0], 0)}</sup>`
            : e.f in COMPARISONS
              ? html`[${within(e.args[0], 1)} ${COMPARISONS[e.f]} ${within(e.args[1], 1)}]`
              : html`${FUNCTIONS[e.f] ?? e.f}(${e.args.map((x, k) => html`${k ? ", " : ""}${within(x, 0)}`)})`,
  };
  const made = parts[e.t]();
  const negative = e.t === "num" && e.value < 0 && outer > 1;
  return STRENGTH[e.t] < outer || negative ? html`(${made})` : made;
}
