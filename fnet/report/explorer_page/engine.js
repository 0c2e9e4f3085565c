// A recorded program, run again: one function for each of jax's operations, and where a single entry comes from.
//
// fnet/report/explorer_program.py writes the programs. A value is {shape, data}, its entries doubles in jax's order;
// an entry is named by its indices `ix` or by its place `k` in `data`. Numbers of values are called ids.

const size = shape => shape.reduce((a, b) => a * b, 1);

function strides(shape) {
  const found = Array(shape.length);
  for (let i = shape.length - 1, step = 1; i >= 0; step *= shape[i--]) found[i] = step;
  return found;
}

const flat = (ix, shape) => ix.reduce((k, i, axis) => k * shape[axis] + i, 0);

function unflat(k, shape) {
  const ix = Array(shape.length);
  for (let i = shape.length - 1; i >= 0; i--) {
    ix[i] = k % shape[i];
    k = Math.floor(k / shape[i]);
  }
  return ix;
}

const ARRAYS = { f8: Float64Array, f4: Float32Array, i4: Int32Array, u1: Uint8Array };

function bytesOf(text) {
  return Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
}

function decode([code, shape, text]) {
  if (code === "zeros") return { shape, data: new Float64Array(size(shape)) };
  const held = new ARRAYS[code](bytesOf(text));
  return { shape, data: code === "f8" ? held : Float64Array.from(held) };
}

// ---- places of entries

// offset + Σ ix · step over all indices ix, in order
function grid(lengths, steps, offset = 0) {
  let at = Int32Array.of(offset);
  lengths.forEach((n, axis) => {
    const next = new Int32Array(at.length * n), step = steps[axis];
    for (let i = 0, o = 0; i < at.length; i++) for (let j = 0; j < n; j++) next[o++] = at[i] + j * step;
    at = next;
  });
  return at;
}

const pickAll = (list, axes) => axes.map(axis => list[axis]);
const axesBut = (shape, used) => shape.map((_, axis) => axis).filter(axis => !used.includes(axis));
const gridOver = (shape, axes, steps = strides(shape)) => grid(pickAll(shape, axes), pickAll(steps, axes));
const clampTo = (x, low, high) => Math.max(low, Math.min(high, x));

// where an operand, whose axes of size 1 are stretched, holds what each entry of the result needs; null: at its place
function stretched(from, to) {
  if (size(from) === size(to)) return null;
  const steps = strides(from);
  return size(from) === 1 ? noughts(size(to)) : grid(to, from.map((n, axis) => n === 1 ? 0 : steps[axis]));
}

let noughts_ = new Int32Array(1024);
function noughts(n) {
  if (n > noughts_.length) noughts_ = new Int32Array(n);
  return noughts_;
}

// ---- operations
//
// An operation has run(eqn, ins) -> data, or a list of them where it gives several values, and says where an entry k of
// its result comes from, for formulas:
//   source(eqn, ins, k, o) -> [operand, k] that it is taken from unchanged, or null if it is a fill
//   terms(eqn, k) -> [[[operand, k], ...], ...], a sum of products
//   among(eqn, k) -> places in the first operand that it is chosen from or that all go into it
// With none of these it is a function of its operands' entries, elementwise.

const elementwise = { args: true };

function unary(f) {
  return { ...elementwise, run({ total }, [a]) {
    const out = new Float64Array(total);
    for (let k = 0; k < total; k++) out[k] = f(a[k]);
    return out;
  } };
}

// g is what integers do, if that is something else
function binary(f, g = f) {
  return { ...elementwise, run(eqn, [a, b]) {
    const out = new Float64Array(eqn.total), total = eqn.total, h = eqn.whole ? g : f;
    const [p, q] = eqn.stretch;
    if (p === null && q === null) for (let k = 0; k < total; k++) out[k] = h(a[k], b[k]);
    else if (p === null && b.length === 1) for (let k = 0, y = b[0]; k < total; k++) out[k] = h(a[k], y);
    else if (q === null && a.length === 1) for (let k = 0, x = a[0]; k < total; k++) out[k] = h(x, b[k]);
    else for (let k = 0; k < total; k++) out[k] = h(a[p ? p[k] : k], b[q ? q[k] : k]);
    return out;
  } };
}

const same = {
  run: (eqn, [a]) => a,
  source: (eqn, ins, k) => [0, k],
};

// moved entries: places(eqn, ins, o) gives for each entry its place in the operands laid end to end, -1 for a fill
function moving(places, fill = () => NaN) {
  const placesOf = (eqn, ins, o) => {
    const key = eqn.operation.by ? eqn.operation.by(eqn, ins) : "";
    const kept = eqn.places[o];
    if (kept && kept.key === key) return kept.at;
    const at = places(eqn, ins, o);
    eqn.places[o] = { key, at };
    return at;
  };
  return {
    run(eqn, ins) {
      const outs = eqn.outs.map((_, o) => {
        const at = placesOf(eqn, ins, o), out = new Float64Array(at.length);
        let first = 0, next = 0, from = ins[0];  // the operand that the last entry came from
        for (let k = 0; k < at.length; k++) {
          const place = at[k];
          if (place < 0) out[k] = fill(eqn);
          else {
            if (place < first || place >= next) {
              let j = 0;
              for (first = 0; place >= first + ins[j].length; j++) first += ins[j].length;
              from = ins[j];
              next = first + from.length;
            }
            out[k] = from[place - first];
          }
        }
        return out;
      });
      return outs.length === 1 ? outs[0] : outs;
    },
    source(eqn, ins, k, o) {
      let place = placesOf(eqn, ins, o)[k], j = 0;
      if (place < 0) return null;
      for (; place >= ins[j].length; j++) place -= ins[j].length;
      return [j, place];
    },
  };
}

// entries of several operands side by side along an axis, each [shape, its first place there]
function sideBySide(eqn, parts) {
  const steps = strides(eqn.shape), at = new Int32Array(eqn.total);
  let place = 0;
  for (const [shape, start] of parts) {
    const to = grid(shape, steps, start);
    for (let i = 0; i < to.length; i++) at[to[i]] = place++;
  }
  return at;
}

// an operand entry by entry, with others' entries put over it: target[u] is where entry u of those goes, -1 nowhere
function overlaid(eqn, target, first) {
  const at = Int32Array.from({ length: eqn.total }, (_, k) => k);
  for (let u = 0; u < target.length; u++) if (target[u] >= 0) at[target[u]] = first + u;
  return at;
}

// where a window starts on each axis, moved until all of it is inside
const startsIn = (shape, window, starts) => shape.map((n, axis) => clampTo(starts[axis][0], 0, n - window[axis]));

// gather and scatter: for each index vector the place of its window's first entry in the operand, -1 where it is
// outside and dropped; `window` has a length for each of the operand's axes
function windowsAt(eqn, operand, indices, indicesShape, window) {
  const { m, ob, ib, drop } = eqn.p, steps = strides(operand), width = indicesShape.at(-1);
  const batch = indicesShape.slice(0, -1), batchSteps = strides(batch), count = size(batch);
  const at = new Int32Array(count);
  for (let g = 0; g < count; g++) {
    let place = 0;
    for (let i = 0; i < m.length; i++) {
      const most = operand[m[i]] - window[m[i]];
      let start = indices[g * width + i];
      if (drop && (start < 0 || start > most)) place = -Infinity;
      start = clampTo(start, 0, most);
      place += start * steps[m[i]];
    }
    ob.forEach((axis, i) => { place += Math.floor(g / batchSteps[ib[i]]) % batch[ib[i]] * steps[axis]; });
    at[g] = place < 0 ? -1 : place;
  }
  return at;
}

function gatheredPlaces(eqn, ins) {
  const { o, c, ob, s } = eqn.p, [operand, indicesShape] = eqn.shapes;
  const starts = windowsAt(eqn, operand, ins[1], indicesShape, s);
  const kept = axesBut(operand, [...c, ...ob]), steps = strides(operand), outSteps = strides(eqn.shape);
  const within = grid(pickAll(s, kept), pickAll(steps, kept));
  const toWindow = grid(pickAll(s, kept), pickAll(outSteps, o)), rest = axesBut(eqn.shape, o);
  const toBatch = grid(pickAll(eqn.shape, rest), pickAll(outSteps, rest)), at = new Int32Array(eqn.total).fill(-1);
  starts.forEach((start, g) => {
    if (start >= 0) within.forEach((offset, w) => { at[toBatch[g] + toWindow[w]] = start + offset; });
  });
  return at;
}

// where each entry of the updates goes in the operand, -1 nowhere
function scatterTargets(eqn, ins) {
  const kept = eqn.places.targets;
  if (kept && kept.key === ins[1]) return kept.at;
  const { u, c, ob } = eqn.p, [operand, indicesShape, updates] = eqn.shapes;
  const axes = axesBut(operand, [...c, ...ob]), window = operand.map(() => 1), steps = strides(operand);
  axes.forEach((axis, i) => { window[axis] = updates[u[i]]; });
  const starts = windowsAt(eqn, operand, ins[1], indicesShape, window), updateSteps = strides(updates);
  const within = grid(pickAll(window, axes), pickAll(steps, axes));
  const fromWindow = grid(pickAll(window, axes), pickAll(updateSteps, u)), rest = axesBut(updates, u);
  const fromBatch = grid(pickAll(updates, rest), pickAll(updateSteps, rest));
  const at = new Int32Array(size(updates)).fill(-1);
  starts.forEach((start, g) => {
    if (start >= 0) within.forEach((offset, w) => { at[fromBatch[g] + fromWindow[w]] = start + offset; });
  });
  eqn.places.targets = { key: ins[1], at };
  return at;
}

// products: the places of batches, free and contracted axes in both operands
function productPlan(eqn) {
  if (eqn.plan) return eqn.plan;
  const [l, r] = eqn.shapes, [lc, rc] = eqn.p.c, [lb, rb] = eqn.p.b;
  const lf = axesBut(l, [...lc, ...lb]), rf = axesBut(r, [...rc, ...rb]);
  return eqn.plan = {
    lb: gridOver(l, lb), lf: gridOver(l, lf), lc: gridOver(l, lc),
    rb: gridOver(r, rb), rf: gridOver(r, rf), rc: gridOver(r, rc),
  };
}

const isRun = at => at.every((place, i) => place === at[0] + i);

function product(eqn, [a, b]) {
  const { lb, lf, lc, rb, rf, rc } = productPlan(eqn), out = new Float64Array(eqn.total);
  const rows = lf.length, columns = rf.length, inner = lc.length;
  const along = eqn.plan.along ??= isRun(lc) && isRun(rc), across = eqn.plan.across ??= isRun(rf);
  const tile = along || across ? null : new Float64Array(inner * columns);
  for (let g = 0; g < lb.length; g++) {
    const base = g * rows * columns;
    if (along && (!across || columns < 4)) {  // both operands' rows lie along the sum
      for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) {
        let p = lb[g] + lf[i], q = rb[g] + rf[j], t = 0;
        for (const end = p + inner; p < end;) t += a[p++] * b[q++];
        out[base + i * columns + j] = t;
      }
      continue;
    }
    let right = b, from = rb[g];
    if (tile) {  // laid out anew, one row for each place of the sum
      for (let c = 0, t = 0; c < inner; c++) for (let j = 0; j < columns; j++) tile[t++] = b[from + rc[c] + rf[j]];
      right = tile;
    }
    for (let i = 0; i < rows; i++) for (let c = 0; c < inner; c++) {
      const x = a[lb[g] + lf[i] + lc[c]];
      let q = tile ? c * columns : from + rc[c], o = base + i * columns;
      for (const end = o + columns; o < end;) out[o++] += x * right[q++];
    }
  }
  return out;
}

function productTerms(eqn, k) {
  const { lb, lf, lc, rb, rf, rc } = productPlan(eqn), columns = rf.length, rows = lf.length;
  const j = k % columns, i = Math.floor(k / columns) % rows, g = Math.floor(k / columns / rows);
  return Array.from(lc, (c, n) => [[0, lb[g] + lf[i] + c], [1, rb[g] + rf[j] + rc[n]]]);
}

// reductions: the first place of each group in the operand, and the others relative to it
function groups(eqn) {
  if (eqn.plan) return eqn.plan;
  const [shape] = eqn.shapes;
  return eqn.plan = { first: gridOver(shape, axesBut(shape, eqn.p.a)), inner: gridOver(shape, eqn.p.a) };
}
const group = (eqn, k) => Array.from(groups(eqn).inner, place => groups(eqn).first[k] + place);

function folded(start, f) {
  return { all: true, among: group, run(eqn, [a]) {
    const { first, inner } = groups(eqn), out = new Float64Array(eqn.total);
    for (let k = 0; k < out.length; k++) {
      let t = start;
      for (let i = 0, base = first[k]; i < inner.length; i++) t = f(t, a[base + inner[i]]);
      out[k] = t;
    }
    return out;
  } };
}
const chosen = (start, f) => ({ ...folded(start, f), all: false });

const summed = { terms: (eqn, k) => group(eqn, k).map(place => [[0, place]]), run(eqn, [a]) {
  const { first, inner } = groups(eqn), out = new Float64Array(eqn.total);
  for (let k = 0; k < out.length; k++) {
    let t = 0;
    for (let i = 0, base = first[k]; i < inner.length; i++) t += a[base + inner[i]];
    out[k] = t;
  }
  return out;
} };

// the place of the first entry that no other beats, along one axis; NaN beats all
function placeOf(beats) {
  return { among: group, place: true, run(eqn, [a]) {
    const { first, inner } = groups(eqn), out = new Float64Array(eqn.total);
    for (let k = 0; k < out.length; k++) {
      let best = 0;
      for (let i = 1; i < inner.length; i++) {
        const x = a[first[k] + inner[i]], y = a[first[k] + inner[best]];
        if (beats(x, y) || (x !== x && y === y)) best = i;
      }
      out[k] = best;
    }
    return out;
  } };
}

// along an axis, one after another
function lines(eqn) {
  if (eqn.plan) return eqn.plan;
  const shape = eqn.shape, axis = eqn.p.a, step = strides(shape)[axis], n = shape[axis];
  const first = gridOver(shape, axesBut(shape, [axis]));
  return eqn.plan = { first, n, start: eqn.p.r ? (n - 1) * step : 0, step: eqn.p.r ? -step : step, length: step };
}
function before(eqn, k) {  // the entries of the operand that a cumulative one is made of, in their order
  const { n, start, step, length } = lines(eqn), i = Math.floor(k / length) % n, first = k - i * length + start;
  return Array.from({ length: (eqn.p.r ? n - 1 - i : i) + 1 }, (_, j) => first + j * step);
}
function cumulative(f, traits) {
  return { ...traits, run(eqn, [a]) {
    const { first, n, start, step } = lines(eqn), out = new Float64Array(eqn.total);
    for (const line of first) {
      let t = a[line + start];
      for (let i = 0, k = line + start; i < n; i++, k += step) out[k] = t = i ? f(t, a[k]) : a[k];
    }
    return out;
  } };
}

// NaN last, 0 and -0 the same
const ascending = (a, b) => a < b || (b !== b && a === a) ? -1 : a > b || (a !== a && b === b) ? 1 : 0;

function logAddExp(a, b) {
  const top = Math.max(a, b);
  return a === b ? a + Math.LN2 : Number.isFinite(top) ? top + Math.log1p(Math.exp(Math.min(a, b) - top)) : top;
}

// XLA's integers: division towards zero, by zero -1; the remainder of a division by zero is the dividend
const wholeQuotient = (a, b) => b === 0 ? -1 : Math.trunc(a / b) + 0;
const wholeRemainder = (a, b) => b === 0 ? a : a % b + 0;
// C's pow: JavaScript's gives NaN for 1 to a NaN and for ±1 to an infinity
const power = (a, b) => a === 1 || (a === -1 && Math.abs(b) === Infinity) ? 1 : a ** b;
function wholePower(x, y) {  // as jax has it: by squaring
  let found = 1, n = Math.abs(y);
  for (let square = x; n; n = Math.floor(n / 2), square *= square) if (n % 2) found *= square;
  return y < 0 ? 1 / found : found;
}
function roundAway(x) {
  const whole = Math.trunc(x);
  return Math.abs(x - whole) >= 0.5 ? whole + Math.sign(x) : whole;
}
function roundEven(x) {
  const low = Math.floor(x), off = x - low;
  if (off < 0.5 || (off === 0.5 && low % 2 === 0)) return low;
  return low === -1 ? -0 : low + 1;
}

function horner(x, coefficients) {
  return coefficients.reduce((sum, c) => sum * x + c);
}

// W. J. Cody, Rational Chebyshev approximations for the error function, Math. Comp. 23 (1969) 631-637; the coefficients
// are those of his CALERF
const ERF = [
  [0.185777706184603153, 3.16112374387056560, 113.864154151050156, 377.485237685302021, 3209.37758913846947],
  [1, 23.6012909523441209, 244.024637934444173, 1282.61652607737228, 2844.23683343917062],
];
const ERFC = [
  [2.15311535474403846e-8, 0.564188496988670089, 8.88314979438837594, 66.1191906371416295, 298.635138197400131,
    881.952221241769090, 1712.04761263407058, 2051.07837782607147, 1230.33935479799725],
  [1, 15.7449261107098347, 117.693950891312499, 537.181101862009858, 1621.38957456669019, 3290.79923573345963,
    4362.61909014324716, 3439.36767414372164, 1230.33935480374942],
];
const ERFC_FAR = [
  [0.0163153871373020978, 0.305326634961232344, 0.360344899949804439, 0.125781726111229246, 0.0160837851487422766,
    6.58749161529837803e-4],
  [1, 2.56852019228982242, 1.87295284992346047, 0.527905102951428412, 0.0605183413124413191, 2.33520497626869185e-3],
];
const ratio = ([top, bottom], x) => horner(x, top) / horner(x, bottom);

function erfc(x) {
  const y = Math.abs(x);
  if (y <= 0.46875) return 1 - erf(x);
  if (x !== x) return x;
  const near = Math.trunc(y * 16) / 16;  // e^(-y²) in two factors, the first of them of an exact square
  const bell = Math.exp(-near * near) * Math.exp(-(y - near) * (y + near));
  const z = 1 / (y * y);
  const tail = y <= 4 ? bell * ratio(ERFC, y)
    : y > 27 ? 0 : bell * (1 / Math.sqrt(Math.PI) - z * ratio(ERFC_FAR, z)) / y;
  return x < 0 ? 2 - tail : tail;
}
function erf(x) {
  const y = Math.abs(x);
  if (y <= 0.46875) return x * ratio(ERF, y * y);
  return x < 0 ? erfc(-x) - 1 : 1 - erfc(x);
}
function erfInverse(x) {  // Winitzki's approximation, then Halley's steps
  if (!(Math.abs(x) < 1)) return Math.abs(x) === 1 ? x * Infinity : NaN;
  if (x === 0) return x;
  const y = Math.abs(x), l = Math.log1p(-y * y), c = 2 / (Math.PI * 0.147) + l / 2;
  let z = Math.sqrt(Math.sqrt(c * c - l / 0.147) - c);
  for (let i = 0; i < 4; i++) {
    const off = (y > 0.5 ? (1 - y) - erfc(z) : erf(z) - y) / (2 / Math.sqrt(Math.PI) * Math.exp(-z * z));
    z -= off / (1 + z * off);
  }
  return x < 0 ? -z : z;
}

function convert(eqn, [a]) {
  const { to, l, h } = eqn.p, out = new Float64Array(eqn.total);
  if (to === "f4") for (let k = 0; k < out.length; k++) out[k] = Math.fround(a[k]);
  else if (to === "b") for (let k = 0; k < out.length; k++) out[k] = +(a[k] !== 0);
  else if (to === "i") for (let k = 0; k < out.length; k++) out[k] = clampTo(Math.trunc(a[k]) || 0, l, h);
  else return a;
  return out;
}

function bitwise(f) {
  const signed = binary(f), unsigned = binary((a, b) => f(a, b) >>> 0);
  const run = (eqn, ins) => eqn.p.words ? masked(eqn, ins) : (eqn.p.u ? unsigned : signed).run(eqn, ins);
  return { ...elementwise, run };
}

// a double's 64 bits, held as that double, and a mask of two words, the low one first
function masked({ p, total }, [a]) {
  const out = new Float64Array(total), to = new Uint32Array(out.buffer);
  const from = new Uint32Array(a.buffer, a.byteOffset, 2 * total);
  for (let i = 0; i < to.length; i++) to[i] = from[i] & p.words[i % 2];
  return out;
}

const OPERATIONS = {
  // of one operand
  neg: unary(x => -x), exp: unary(Math.exp), exp2: unary(x => 2 ** x), expm1: unary(Math.expm1), log: unary(Math.log),
  log1p: unary(Math.log1p), sin: unary(Math.sin), cos: unary(Math.cos), tan: unary(Math.tan), asin: unary(Math.asin),
  acos: unary(Math.acos), atan: unary(Math.atan), sinh: unary(Math.sinh), cosh: unary(Math.cosh),
  tanh: unary(Math.tanh), asinh: unary(Math.asinh), acosh: unary(Math.acosh), atanh: unary(Math.atanh),
  logistic: unary(x => 1 / (1 + Math.exp(-x))), sqrt: unary(Math.sqrt), rsqrt: unary(x => 1 / Math.sqrt(x)),
  cbrt: unary(Math.cbrt), square: unary(x => x * x), abs: unary(Math.abs), sign: unary(Math.sign),
  floor: unary(Math.floor), ceil: unary(Math.ceil), erf: unary(erf), erfc: unary(erfc), erf_inv: unary(erfInverse),
  is_finite: unary(x => +Number.isFinite(x)),
  round: { ...elementwise, run: (eqn, ins) => unary(eqn.p.e ? roundEven : roundAway).run(eqn, ins) },
  not: { ...elementwise, run: (eqn, ins) =>
    unary(eqn.kind === "b" ? x => +!x : eqn.p.u ? x => ~x >>> 0 : x => ~x).run(eqn, ins) },
  log2: unary(Math.log2), one_minus_square: unary(x => (1 + x) * (1 - x)),  // of jax 0.12
  integer_pow: { ...elementwise, run: (eqn, ins) => unary(x => wholePower(x, eqn.p.y)).run(eqn, ins) },

  // of two
  add: binary((a, b) => a + b), add_any: binary((a, b) => a + b), sub: binary((a, b) => a - b),
  mul: binary((a, b) => a * b), div: binary((a, b) => a / b, wholeQuotient),
  rem: binary((a, b) => a % b, wholeRemainder),
  max: binary(Math.max), min: binary(Math.min), pow: binary(power), atan2: binary(Math.atan2),
  and: bitwise((a, b) => a & b), or: bitwise((a, b) => a | b), xor: bitwise((a, b) => a ^ b),
  eq: binary((a, b) => +(a === b)), ne: binary((a, b) => +(a !== b)), lt: binary((a, b) => +(a < b)),
  le: binary((a, b) => +(a <= b)), gt: binary((a, b) => +(a > b)), ge: binary((a, b) => +(a >= b)),

  // of three and more
  clamp: { ...elementwise, run({ total, stretch: [p, q, r] }, [low, x, high]) {
    const out = new Float64Array(total);
    for (let k = 0; k < total; k++) {
      out[k] = Math.min(Math.max(x[q ? q[k] : k], low[p ? p[k] : k]), high[r ? r[k] : k]);
    }
    return out;
  } },
  polynomial: { ...elementwise, run({ total, stretch }, [x, ...coefficients]) {  // of jax 0.12
    const out = new Float64Array(total), at = (j, k) => stretch[j] ? stretch[j][k] : k;
    for (let k = 0; k < total; k++) {
      for (let j = coefficients.length - 1; j >= 0; j--) out[k] = out[k] * x[at(0, k)] + coefficients[j][at(j + 1, k)];
    }
    return out;
  } },
  select_n: {
    run({ total, stretch }, ins) {
      const out = new Float64Array(total), [which] = ins, [p] = stretch;
      for (let k = 0; k < total; k++) {
        const j = 1 + which[p ? p[k] : k], q = stretch[j];
        out[k] = ins[j][q ? q[k] : k];
      }
      return out;
    },
    source({ stretch }, [which], k) {
      const j = 1 + which[stretch[0] ? stretch[0][k] : k];
      return [j, stretch[j] ? stretch[j][k] : k];
    },
  },

  // sums, products and choices
  dot_general: { run: product, terms: productTerms },
  reduce_sum: summed, reduce_prod: folded(1, (a, b) => a * b), reduce_max: chosen(-Infinity, Math.max),
  reduce_min: chosen(Infinity, Math.min), reduce_and: chosen(1, Math.min), reduce_or: chosen(0, Math.max),
  argmax: placeOf((a, b) => a > b), argmin: placeOf((a, b) => a < b),
  cumsum: cumulative((a, b) => a + b, { terms: (eqn, k) => before(eqn, k).map(place => [[0, place]]) }),
  cumprod: cumulative((a, b) => a * b, { among: before, all: true }),
  cummax: cumulative(Math.max, { among: before }), cummin: cumulative(Math.min, { among: before }),
  cumlogsumexp: cumulative(logAddExp, { among: before, all: true }),
  sort: {
    run(eqn, [a]) {
      const { first, n, step } = lines(eqn), out = new Float64Array(eqn.total), line = new Float64Array(n);
      for (const start of first) {
        for (let i = 0; i < n; i++) line[i] = a[start + i * step];
        line.sort(ascending);
        for (let i = 0; i < n; i++) out[start + i * step] = line[i];
      }
      return out;
    },
    among(eqn, k) {
      const { n, step } = lines(eqn), first = k - Math.floor(k / step) % n * step;
      return Array.from({ length: n }, (_, i) => first + i * step);
    },
  },

  // entries in other places
  bitcast_convert_type: same,  // a double's bits are held as that double
  reshape: same, squeeze: same, expand_dims: same, stop_gradient: same, copy: same, copy_p: same,
  convert_element_type: { run: convert, cast: true }, reduce_precision: { run: convert, cast: true },
  transpose: moving(({ p, shape, shapes: [from] }) => grid(shape, pickAll(strides(from), p.p))),
  broadcast_in_dim: moving(({ p, shape, shapes: [from] }) => {
    const steps = strides(from), to = shape.map(() => 0);
    p.d.forEach((axis, i) => { to[axis] = from[i] === 1 ? 0 : steps[i]; });
    return grid(shape, to);
  }),
  slice: moving(({ p, shape, shapes: [from] }) =>
    grid(shape, strides(from).map((n, axis) => n * p.t[axis]), flat(p.s, from))),
  rev: moving(({ p, shape }) => {
    const steps = strides(shape);
    const offset = p.a.reduce((sum, axis) => sum + (shape[axis] - 1) * steps[axis], 0);
    return grid(shape, steps.map((n, axis) => p.a.includes(axis) ? -n : n), size(shape) ? offset : 0);
  }),
  pad: moving(({ p, shape, total, shapes: [from] }) => {
    const at = new Int32Array(total).fill(size(from)), count = size(from), steps = strides(shape);
    const axes = from.map((n, axis) => Array.from({ length: n }, (_, i) => p.p[axis][0] + i * (p.p[axis][2] + 1)));
    const ix = from.map(() => 0);
    for (let k = 0; k < count; k++) {
      let place = 0, inside = true;
      for (let axis = 0; axis < ix.length; axis++) {
        const i = axes[axis][ix[axis]];
        if (i < 0 || i >= shape[axis]) inside = false;
        place += i * steps[axis];
      }
      if (inside) at[place] = k;
      for (let axis = ix.length - 1; axis >= 0 && ++ix[axis] === from[axis]; axis--) ix[axis] = 0;
    }
    return at;
  }),
  concatenate: moving(eqn => {
    let start = 0;
    return sideBySide(eqn, eqn.shapes.map(shape => {
      const part = [shape, start];
      start += shape[eqn.p.a] * strides(eqn.shape)[eqn.p.a];
      return part;
    }));
  }),
  stack: moving(eqn => {
    const { shape, shapes, p } = eqn, step = strides(shape)[p.a];
    return sideBySide(eqn, shapes.map((from, j) => [shape.map((n, axis) => axis === p.a ? 1 : n), j * step]));
  }),
  unstack: moving(({ p, shapes: [from] }, ins, o) => {
    const steps = strides(from), axes = axesBut(from, [p.a]);
    return grid(pickAll(from, axes), pickAll(steps, axes), o * steps[p.a]);
  }),
  split: moving(({ p, outShapes, shapes: [from] }, ins, o) => {
    const steps = strides(from), start = outShapes.slice(0, o).reduce((sum, shape) => sum + shape[p.a], 0);
    return grid(outShapes[o], steps, start * steps[p.a]);
  }),
  iota: { run({ shape, total, p }) {
    const at = grid(shape, shape.map((_, axis) => axis === p.a ? 1 : 0));
    return Float64Array.from(at);
  } },
  dynamic_slice: {
    ...moving(({ shape, shapes: [from] }, [, ...starts]) =>
      grid(shape, strides(from), flat(startsIn(from, shape, starts), from))),
    by: (eqn, [, ...starts]) => starts.map(start => start[0]).join(),
  },
  dynamic_update_slice: {
    ...moving((eqn, [a, , ...starts]) => {
      const [shape, window] = eqn.shapes;
      return overlaid(eqn, grid(window, strides(shape), flat(startsIn(shape, window, starts), shape)), a.length);
    }),
    by: (eqn, [, , ...starts]) => starts.map(start => start[0]).join(),
  },
  gather: {
    ...moving(gatheredPlaces, eqn => eqn.p.f ?? (eqn.kind === "f" ? NaN : eqn.kind === "b" ? 1 : -(2 ** 31))),
    by: (eqn, [, indices]) => indices,
  },
  scatter: {
    ...moving((eqn, ins) => overlaid(eqn, scatterTargets(eqn, ins), ins[0].length + ins[1].length)),
    by: (eqn, [, indices]) => indices,
  },
  "scatter-add": {
    run(eqn, ins) {
      const out = Float64Array.from(ins[0]), target = scatterTargets(eqn, ins), updates = ins[2];
      for (let u = 0; u < target.length; u++) if (target[u] >= 0) out[target[u]] += updates[u];
      return out;
    },
    terms(eqn, k, ins) {
      const found = [[[0, k]]];
      scatterTargets(eqn, ins).forEach((place, u) => { if (place === k) found.push([[2, u]]); });
      return found;
    },
  },
};

// ---- programs

const DEEP = 8;  // operations on the way to a constant
const CANCELLED = 1000;  // terms so many times what is left of them: what follows is less exact, too
const CHECK_STEP = 2654435761, CHECK_START = 40503;

// the size of what an equation's rounding is relative to: of the terms of a sum, which may cancel, else of the result
function noiseOf({ prim, shapes, p, plan, total }, levels, mean) {
  const noise = levels.map(level => level.noise ?? level.mean), [a, b] = levels;
  const loss = Math.max(1, ...levels.map(level => level.noise ? level.noise / level.mean : 1));
  if (prim === "add" || prim === "add_any" || prim === "sub") return Math.hypot(noise[0], noise[1]);
  if (prim === "dot_general") return Math.sqrt(plan.lc.length) * a.mean * b.mean * Math.min(loss, 1e300);
  if (prim === "reduce_sum") return Math.sqrt(plan.inner.length) * noise[0];
  if (prim === "cumsum") return Math.sqrt(shapes[0][p.a]) * noise[0];
  if (prim === "scatter-add") return Math.hypot(noise[0], noise[2] * Math.max(1, Math.sqrt(size(shapes[2]) / total)));
  if (prim === "log") return loss;  // an error of x relative to x is one of log x
  if (prim === "exp") return mean * Math.max(1, noise[0]);
  if (prim === "sin" || prim === "cos") return noise[0];
  return loss < Infinity ? mean * loss : mean;
}

class Program {
  // json: what explorer_program.program_json wrote; given: {path: {shape, data}}
  constructor(json, given) {
    const { inputs, scopes, stacks, lines, marks, outs, shapes, kinds } = json;
    Object.assign(this, { given, inputs, scopes, stacks, lines, marks, outs, shapes, kinds });
    this.checks = new Float64Array(bytesOf(json.checks));
    this.held = Array(shapes.length);  // id -> what is not computed: constants, and what unknown operations gave
    for (const [id, array] of [...json.consts, ...json.recorded]) this.held[id] = decode(array);
    for (const [path, id] of Object.entries(inputs)) this.held[id] = given[path];
    this.eqns = json.eqns.map((eqn, n) => this.#prepared(eqn, n));
    this.made = new Map();  // id -> the index of its equation
    this.eqns.forEach(eqn => eqn.outs.forEach(id => this.made.set(id, eqn.n)));
    this.names = this.#names();
    this.base = null;  // the last whole run: {values, changed}
    this.follow = new Map();  // path -> what depends on it

    const unknown = this.eqns.filter(eqn => !eqn.operation);
    this.unknown = [...new Set(unknown.map(eqn => eqn.prim))].sort();
    const moved = this.#downstream(Object.values(inputs));
    this.constant = shapes.map((_, id) => !moved.has(id));
    const floating = this.#downstream(Object.values(inputs).filter(id => kinds[id] === "f"));
    this.discrete = shapes.map((_, id) => kinds[id] === "i" || !floating.has(id));  // whole, or of labels and masks
    for (const { ins, outs } of this.eqns) {
      if (ins.every(id => this.discrete[id])) outs.forEach(id => { this.discrete[id] = true; });
    }
    this.frozen = unknown.some(eqn => eqn.ins.some(id => floating.has(id)));
  }

  #prepared([prim, p, ins, outs, scope, line], n) {
    const operation = p === null ? undefined : OPERATIONS[prim];
    const shapes = ins.map(id => this.shapes[id]), outShapes = outs.map(id => this.shapes[id]);
    const [shape] = outShapes, kind = this.kinds[outs[0]];
    const stretches = operation && (operation.args || prim === "select_n");
    return {
      n, prim, p, ins, outs, scope, line, operation, shapes, outShapes, shape, kind, whole: kind === "i",
      total: size(shape), places: {}, stretch: stretches ? shapes.map(from => stretched(from, shape)) : null,
    };
  }

  #downstream(ids) {
    const found = new Set(ids);
    for (const { ins, outs } of this.eqns) if (ins.some(id => found.has(id))) outs.forEach(id => found.add(id));
    return found;
  }

  // the best of its names for each value
  #names() {
    const best = new Map();
    const offer = (id, name, rank, depth = 0) => {
      const had = best.get(id);
      if (!had || rank < had.rank || (rank === had.rank && depth > had.depth)) best.set(id, { name, rank, depth });
    };
    const kinds = ["forward:", "inner:", "dy:", "dx:", "inputs:"];
    for (const [path, id] of Object.entries(this.inputs)) offer(id, path, 0);
    for (const [name, id] of Object.entries(this.marks)) {
      const rank = kinds.findIndex(kind => name.startsWith(kind));  // the innermost layer's, of several of a kind
      const path = rank < 0 ? name : name.slice(kinds[rank].length);
      offer(id, name, rank < 0 ? kinds.length + 1 : rank + 1, path ? path.split("/").length : 0);
    }
    for (const [name, id] of Object.entries(this.outs)) offer(id, name, name === "loss" ? -1 : kinds.length + 1);
    return new Map([...best].map(([id, { name }]) => [id, name]));
  }

  nameOf(id) { return this.names.get(id); }

  // All values with the data of some paths changed. With `only`, a Set of indices of equations, the others' values are
  // those of the last whole run. `overrides`, a Map of id -> data, puts data in the place of what is computed.
  run(changed = {}, only = null, overrides = null) {
    const base = this.base ?? (only || overrides ? (this.run(), this.base) : null);
    const values = base ? base.values.slice() : this.held.slice();
    const moved = new Uint8Array(this.shapes.length);
    for (const path of new Set([...Object.keys(changed), ...Object.keys(base?.changed ?? {})])) {
      const id = this.inputs[path];
      if (id === undefined) continue;
      values[id] = path in changed ? { shape: this.shapes[id], data: changed[path] } : this.given[path];
      moved[id] = 1;
    }
    const override = id => {
      values[id] = { shape: this.shapes[id], data: overrides.get(id) };
      moved[id] = 1;
    };
    if (overrides) for (const id of overrides.keys()) if (!this.made.has(id)) override(id);
    for (const eqn of this.eqns) {
      const put = overrides ? eqn.outs.filter(id => overrides.has(id)) : [];
      if (put.length) put.forEach(override);
      else if (eqn.operation && !(only && !only.has(eqn.n)) && (!base || eqn.ins.some(id => moved[id]))) {
        const given = eqn.operation.run(eqn, eqn.ins.map(id => values[id].data));
        eqn.outs.forEach((id, o) => {
          const data = eqn.outs.length > 1 ? given[o] : given;
          values[id] = { shape: eqn.outShapes[o], data: eqn.p.f4 ? data.map(Math.fround) : data };
          moved[id] = 1;
        });
      }
    }
    if (!only && !overrides) this.base = { values, changed };
    return values;
  }

  // the indices of the equations that lead to some values
  needed(ids) {
    const wanted = new Set(ids), found = new Set();
    for (const { n, ins, outs } of [...this.eqns].reverse()) {
      if (!outs.some(id => wanted.has(id))) continue;
      found.add(n);
      ins.forEach(id => wanted.add(id));
    }
    return found;
  }

  // the ids of what depends on an input, itself among them
  depends(path) {
    if (!this.follow.has(path)) this.follow.set(path, this.#downstream(path in this.inputs ? [this.inputs[path]] : []));
    return this.follow.get(path);
  }

  // How far computed values are from the recorded checksums: the worst, where it is, and how many numbers were
  // compared. Relative to Σ|w x|, or, where terms cancel, to what their rounding is relative to.
  check(values) {
    let worst = 0, count = 0, where;
    const levels = Array(this.shapes.length);  // id -> {mean, noise}: of |x|, and what its rounding is relative to
    const levelOf = id => levels[id] ??= { mean: this.#sums(values[id].data).mean };
    for (const eqn of this.eqns) for (const id of eqn.outs) {
      const { sum, odd, mean } = this.#sums(values[id].data), total = values[id].data.length;
      const noise = Math.max(mean, eqn.operation ? noiseOf(eqn, eqn.ins.map(levelOf), mean) : 0);
      levels[id] = noise > CANCELLED * mean ? { mean, noise } : { mean };
      if (!eqn.operation) continue;
      count += total;
      const gap = Math.abs(sum - this.checks[2 * id]), odds = Math.abs(odd - this.checks[2 * id + 1]);
      const off = odds > 1e-9 * total ? Infinity : gap === 0 ? 0 : gap / (noise * total);
      if (!(off <= worst)) [worst, where] = [off, id];
    }
    return { worst, count, where };
  }

  // Σ w x over finite entries, Σ w n over others, and the mean of |w x|
  #sums(data) {
    let sum = 0, odd = 0, scale = 0;
    for (let k = 0; k < data.length; k++) {
      const x = data[k], weight = ((Math.imul(k, CHECK_STEP) + CHECK_START) >>> 0) / 4294967296 + 0.5;
      if (x - x === 0) {
        sum += weight * x;
        scale += Math.abs(weight * x);
      } else odd += weight * (x > 0 ? 1 : x < 0 ? -1 : 2);
    }
    return { sum, odd, mean: data.length ? scale / data.length : 0 };
  }

  // ---- where an entry comes from

  explain(values, id, ix, { terms = 8, budget = 40 } = {}) {
    return new Explanation(this, values, id, terms, budget).of(flat(ix, this.shapes[id]));
  }

  // the operands' entries that an entry is computed from: [[id, k], ...]
  sources(values, id, k) {
    const eqn = this.eqns[this.made.get(id)], { operation, ins } = eqn, data = ins.map(i => values[i].data);
    const near = (i, j) => [i, eqn.stretch[j] ? eqn.stretch[j][k] : k];
    if (operation.source || operation.cast) {
      const from = operation.cast ? [0, k] : operation.source(eqn, data, k, eqn.outs.indexOf(id));
      return from ? [[ins[from[0]], from[1]]] : [];
    }
    if (operation.terms) {  // what is multiplied by a constant zero does not count
      const products = operation.terms(eqn, k, data).map(term => term.map(([j, at]) => [ins[j], at]));
      return products.filter(term => !term.some(([i, at]) => this.fixed(values, i, at) === 0)).flat();
    }
    if (operation.among) return operation.among(eqn, k).map(at => [ins[0], at]);
    const found = ins.map(near);
    return eqn.prim === "mul" && found.some(([i, at]) => this.fixed(values, i, at) === 0) ? [] : found;
  }

  // An entry that is a constant's, maybe moved or multiplied with zero on the way; else undefined. What labels and
  // masks say is as good as constant: a formula is of the case at hand.
  fixed(values, id, k, depth = DEEP, isRoot = false) {
    if (this.constant[id]) return values[id].data[k];
    if (this.names.has(id) && !isRoot) return undefined;
    if (this.discrete[id] && this.made.has(id) && !isRoot) return values[id].data[k];
    const eqn = this.eqns[this.made.get(id)];
    if (!eqn?.operation || depth === 0) return undefined;
    const { operation, ins } = eqn, data = () => ins.map(i => values[i].data);
    const at = j => this.fixed(values, ins[j], eqn.stretch[j] ? eqn.stretch[j][k] : k, depth - 1);
    if (operation.source) {
      const from = operation.source(eqn, data(), k, eqn.outs.indexOf(id));
      return from ? this.fixed(values, ins[from[0]], from[1], depth - 1) : values[id].data[k];
    }
    if (operation.cast) return this.fixed(values, ins[0], k, depth - 1) === undefined ? undefined : values[id].data[k];
    if (!operation.args) return undefined;
    const found = ins.map((_, j) => at(j)), value = values[id].data[k];
    const isNought = eqn.prim === "mul" && value === 0 && found.includes(0);
    return isNought || found.every(x => x !== undefined) ? value : undefined;
  }

  // the named entries, or inputs, that an entry is computed from directly: [[id, ix], ...]
  origins(values, id, ix, most = 4096) {
    const found = [], seen = new Set(), todo = [[id, flat(ix, this.shapes[id])]];
    let first = true;
    for (let at = 0; at < todo.length && found.length < most && at < 50 * most; at++) {
      const [i, k] = todo[at], eqn = this.eqns[this.made.get(i)], key = i * 2 ** 32 + k;
      if (this.constant[i] || seen.has(key)) continue;
      seen.add(key);
      if ((this.names.has(i) && !first) || !eqn?.operation) found.push([i, unflat(k, this.shapes[i])]);
      else for (const source of this.sources(values, i, k)) todo.push(source);
      first = false;
    }
    return found;
  }
}

// ---- formulas
//
// A formula is made of nodes {t, value, ...}. While it is made, an operand is an entry {id, k}, which `look` opens by
// one operation; then it is decided which of them stay opened.

const MOST_TERMS = 4096;  // of a sum, before the sums in it are not taken apart any more
const ADDING = new Set(["add", "add_any", "sub"]);
const CASTS = { f4: "float32", i: "trunc", b: "bool" };

class Explanation {
  constructor(program, values, root, terms, budget) {
    Object.assign(this, { program, values, root, terms, budget, looked: new Map(), sizes: new Map() });
  }

  of(k) {
    const eqn = this.program.eqns[this.program.made.get(this.root)];
    const found = this.build(this.opened(this.settle({ id: this.root, k }, true)), this.budget);
    return eqn ? { ...found, line: eqn.line, prim: eqn.prim } : found;
  }

  data(eqn) { return eqn.ins.map(id => this.values[id].data); }
  valueOf(x) { return x.value ?? this.values[x.id].data[x.k]; }
  operands({ ins, stretch }, k) { return ins.map((id, j) => ({ id, k: stretch[j] ? stretch[j][k] : k })); }
  isFixed(x, number) { return x.t ? x.t === "num" && x.value === number : this.settle(x).fixed === number; }

  // the entry that an entry is taken from, with the equation that made it unless it is a leaf, or the constant it is
  settle({ id, k }, isRoot = false) {
    const { program, values } = this;
    for (;; isRoot = false) {
      const fixed = program.fixed(values, id, k, DEEP, isRoot), eqn = program.eqns[program.made.get(id)];
      if (fixed !== undefined) return { id, k, fixed };
      if (!eqn?.operation || (program.names.has(id) && !isRoot)) return { id, k };
      const { operation, ins } = eqn;
      if (operation.source) {
        const [j, at] = operation.source(eqn, this.data(eqn), k, eqn.outs.indexOf(id));
        [id, k] = [ins[j], at];
      } else if (operation.cast && Object.is(values[ins[0]].data[k], values[id].data[k])) id = ins[0];
      else return { id, k, eqn };
    }
  }

  // an entry opened by one operation; nodes are open
  look(x) {
    if (x.t) return x;
    const key = x.id * 2 ** 32 + x.k;
    if (!this.looked.has(key)) this.looked.set(key, this.opened(this.settle(x)));
    return this.looked.get(key);
  }

  opened({ id, k, eqn, fixed }) {
    const value = this.values[id].data[k];
    if (fixed !== undefined) return { t: "num", value: fixed };
    if (!eqn) return { t: "ref", id, k, name: this.program.nameOf(id), value };
    const { operation, prim, ins } = eqn;
    if (operation.terms || ADDING.has(prim)) return this.sum(eqn, k, value);
    if (operation.cast) return { t: "fn", f: CASTS[eqn.p.to], args: [{ id: ins[0], k }], value };
    const made = operation.among ? this.chosen(eqn, operation.among(eqn, k), value) : this.applied(eqn, k, value);
    return made.t ? { ...made, id, k } : this.look(made);
  }

  // of several entries one, or something of all
  chosen({ operation, prim, ins: [id] }, places, value) {
    const { data } = this.values[id], wanted = operation.place ? data[places[value]] : value;
    const entries = places.map(k => ({ id, k }));
    if (prim === "cumlogsumexp") return { t: "fn", f: "logsumexp", args: entries, value };
    if (operation.all && places.length <= this.terms) {
      return entries.reduce((a, b) => this.times(a, b, this.valueOf(a) * this.valueOf(b)));
    }
    if (operation.all) {
      return { t: "fn", f: "prod", args: entries.slice(0, this.terms), more: places.length - this.terms, value };
    }
    const a = entries.find(({ k }) => data[k] === wanted || (data[k] !== data[k] && wanted !== wanted)) ?? entries[0];
    const pick = { t: "pick", a, of: places.length, value: this.valueOf(a) };
    return operation.place ? { t: "fn", f: prim, args: [pick], value } : places.length === 1 ? a : pick;
  }

  // an elementwise operation
  applied(eqn, k, value) {
    const { prim, p, whole } = eqn, operands = this.operands(eqn, k), [a, b] = operands;
    const fn = (f, ...args) => ({ t: "fn", f, args, value });
    const over = (a, b) => ({ t: "div", a, b, value: this.valueOf(a) / this.valueOf(b) });
    const power = y => y === 1 ? a : y === -1 ? over({ t: "num", value: 1 }, a) : { t: "pow", a, y, value };
    if (prim === "neg") return this.negative(a);
    if (prim === "mul") return this.times(a, b, value);
    if (prim === "div") return this.isFixed(b, 1) ? a : whole ? fn("trunc", over(a, b)) : over(a, b);
    if (p.words) return fn("truncated", a);
    if (prim === "square") return power(2);
    if (prim === "one_minus_square") {
      return { t: "sub", a: { t: "num", value: 1 }, b: { ...power(2), value: this.valueOf(a) ** 2 }, value };
    }
    if (prim === "integer_pow") return power(p.y);
    if (prim === "pow" && this.settle(b).fixed !== undefined) return power(this.settle(b).fixed);
    if (prim === "rsqrt") return over({ t: "num", value: 1 }, { t: "fn", f: "sqrt", args: [a], value: 1 / value });
    return fn(prim, ...operands);
  }

  times(a, b, value) {
    if (this.isFixed(a, 1)) return b;
    if (this.isFixed(b, 1)) return a;
    if (this.isFixed(a, -1)) return this.negative(b);
    if (this.isFixed(b, -1)) return this.negative(a);
    return { t: "mul", a, b, value };
  }

  negative(a) {
    const { eqn, k } = a.t ? {} : this.settle(a);
    return eqn?.prim === "neg" ? this.operands(eqn, k)[0] : { t: "neg", a, value: -this.valueOf(a) };
  }

  // A sum of all that is added up through values without names. Constant zeros are left out, and of many terms all but
  // the largest.
  sum(eqn, k, value) {
    const all = [];
    this.gather(eqn, k, all);
    const finished = term => term.product ? this.times(...term.product, term.value) : term;
    if (all.length === 0) return { t: "num", value };
    if (all.length === 1) return this.look(finished(all[0]));
    const isLong = all.length > this.terms, terms = isLong ? this.largest(all) : all;
    const isShown = x => !isLong || this.valueOf(x) !== 0;  // of many terms those that are 0 are not shown
    const wanted = Math.max(1, terms.slice(0, this.terms).filter(isShown).length);
    const shown = terms.slice(0, wanted).map(finished);
    if (all.length === 2 && shown[1].t === "neg") return { t: "sub", a: shown[0], b: shown[1].a, value };
    const left = terms.slice(wanted), rest = left.reduce((sum, x) => sum + this.valueOf(x), 0);
    return { t: "sum", terms: shown, more: left.length, rest, value };
  }

  largest(all) {
    const order = all.map((term, i) => ({ term, i, of: Math.abs(this.valueOf(term)) }));
    order.forEach(x => { if (Number.isNaN(x.of)) x.of = Infinity; });
    return order.sort((x, y) => y.of === x.of ? x.i - y.i : y.of - x.of).map(x => x.term);
  }

  // the terms of what an equation gives at k, and of the sums among them
  gather(eqn, k, all) {
    if (!eqn.operation.terms) {
      const [a, b] = this.operands(eqn, k);
      this.add(a, all);
      if (eqn.prim !== "sub") this.add(b, all);
      else if (!this.isFixed(b, 0)) all.push(this.negative(b));
      return;
    }
    for (const factors of eqn.operation.terms(eqn, k, this.data(eqn))) {
      const product = factors.map(([j, at]) => ({ id: eqn.ins[j], k: at })), [a, b] = product;
      if (!b) this.add(a, all);
      else if (!this.isFixed(a, 0) && !this.isFixed(b, 0)) {
        all.push({ product, value: this.valueOf(a) * this.valueOf(b) });
      }
    }
  }

  add(x, all) {
    const { id, k, eqn, fixed } = this.settle(x);
    if (fixed === 0) return;
    const isSum = eqn && (eqn.operation.terms || ADDING.has(eqn.prim));
    if (isSum && all.length < MOST_TERMS) this.gather(eqn, k, all);
    else all.push({ id, k });
  }

  // ---- how much of it is shown

  parts({ t, a, b, args, terms }) {
    return t === "sum" ? terms : t === "fn" ? args : b ? [a, b] : a ? [a] : [];
  }

  withParts({ id, k, ...node }, [a, ...more]) {
    if (node.t === "sum") return { ...node, terms: [a, ...more] };
    if (node.t === "fn") return { ...node, args: [a, ...more] };
    return more.length ? { ...node, a, b: more[0] } : { ...node, a };
  }

  // leaves of a formula opened to its end; Infinity for more than the budget
  leaves(x) {
    const node = this.look(x);
    if (!this.sizes.has(node)) {
      let sum = 0;
      const parts = this.parts(node);
      for (let i = 0; i < parts.length && sum <= this.budget; i++) sum += this.leaves(parts[i]);
      this.sizes.set(node, parts.length === 0 ? 1 : sum <= this.budget ? sum : Infinity);
    }
    return this.sizes.get(node);
  }

  // and with no entry opened
  least(x) {
    const parts = x.t ? this.parts(x) : [];
    return parts.length ? parts.reduce((sum, part) => sum + this.least(part), 0) : 1;
  }

  // A node with at most so many leaves, if its first operation has no more: the largest parts are cut first, to
  // references to values without names.
  build(node, budget) {
    if (node.t === "num") return { t: "num", value: node.value };
    if (node.t === "ref") return this.reference(node);
    const parts = this.parts(node), least = parts.map(part => this.least(part));
    const order = parts.map((_, i) => i).sort((i, j) => this.leaves(parts[i]) - this.leaves(parts[j]) || i - j);
    let left = budget - least.reduce((a, b) => a + b, 0);
    const built = [];
    for (const i of order) {
      const wanted = this.leaves(parts[i]), allowed = Math.min(wanted, least[i] + Math.max(0, left));
      left -= allowed - least[i];
      built[i] = this.part(parts[i], allowed);
    }
    return this.withParts(node, built);
  }

  part(x, budget) {
    const node = this.look(x);
    if (x.t || this.leaves(x) <= budget || this.least(node) <= budget) return this.build(node, budget);
    return this.reference({ ...this.settle(x), value: this.valueOf(x) });
  }

  reference({ id, k, value }) {
    return { t: "ref", id, ix: unflat(k, this.program.shapes[id]), name: this.program.nameOf(id), value };
  }
}
