// The page of a report. Its data is JSON in the element `data`: a list of one run or two. A run has
//
//   name, verdict (the worst of all steps), last_verdict, steps (how many), first, last (their numbers), healthy, warning,
//   critical, clipped, skipped, nonfinite (how many of them),
//   curves: [{name, scalar, steps, values, nonfinite, first_value, last_value}]: of up to 1000 buckets of steps the smallest
//     number, the largest, and the first that is NaN or infinite, each with its step; `scalar` says that it is the trainer's,
//   verdicts: {first, last, worst}: the worst of each of up to 1000 buckets; 0 healthy, 1 warning, 2 critical,
//   tensors: [{name, verdict, unhealthy_since, last}]: `last` is the object that the last step with details has,
//   columns: {first, last}: the first and the last step of each column of the heat map,
//   measures: {l2_norm, ratio, …}: a number a cell, column after column: the largest of the column's steps; NaN is larger than
//     all others. A cell without a number is a NaN with the bits 0x7fc00001,
//   histogram: {first, last, tensors: [[start, exponent, octaves]], shares}: of each tensor, from `start` on, column after column:
//     the shares of |x| from 2^exponent to 2^(exponent + 1) and so on, then of 0, Inf and NaN, in units of 1/65535,
//   findings: [{severity, kind, rule, tensor, others, since, last, steps, spans, found, message, value, threshold, advice}]:
//     one for all steps that have it; `spans` are from when to when, `message` is that of step `found`.
//
// Lists of numbers are in base64, little-endian: steps and values f64, worst u8, measures f32, shares u16. A number that JSON
// cannot hold is the string "nan", "inf" or "-inf".
"use strict";
(() => {
const typed = (text, Type) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Type(bytes.buffer);
};
const runs = JSON.parse(document.getElementById("data").textContent);
runs.forEach((run, place) => {
  run.key = "AB"[place];
  run.of = new Map(run.tensors.map((tensor, index) => [tensor.name, index]));
  for (const curve of run.curves) {
    curve.steps = typed(curve.steps, Float64Array);
    curve.values = typed(curve.values, Float64Array);
  }
  for (const list of [run.verdicts, run.columns, run.histogram]) {
    list.first = typed(list.first, Float64Array);
    list.last = typed(list.last, Float64Array);
  }
  run.verdicts.worst = typed(run.verdicts.worst, Uint8Array);
  for (const [name, cells] of Object.entries(run.measures)) run.measures[name] = typed(cells, Float32Array);
  run.histogram.shares = typed(run.histogram.shares, Uint16Array);
});
const first = Math.min(...runs.map((run) => run.first));
const last = Math.max(...runs.map((run) => run.last));
// All tensors, those of the first run before those that only the second has.
const names = [...new Set(runs.flatMap((run) => run.tensors.map((tensor) => tensor.name)))];
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

// ---- Words and elements

const SHAPES = { healthy: "●", warning: "◆", critical: "▲" };
const MEASURES = {
  l2_norm: "L2 norm", ratio: "gradient / weight", update_ratio: "update / weight", dead_share: "dead share",
  gsnr: "signal to noise (GSNR)", nan_count: "NaN elements", inf_count: "infinite elements",
};
const WORDS = { total_norm: "total norm", clip_coefficient: "clip coefficient", noise_scale: "noise scale" };
const number = (value) => (typeof value === "string" ? { nan: NaN, inf: Infinity, "-inf": -Infinity }[value] : value);
function shown(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "Inf" : "-Inf";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return String(value);
  const size = Math.abs(value);
  return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(5))) : Number(value.toPrecision(5)).toExponential();
}
const counted = (count) => `${count} ${count === 1 ? "step" : "steps"}`;
const stepsOf = (from, to) => (from === to ? `step ${from}` : `steps ${from}–${to}`);
const printable = (name) => (name === "" ? "(no name)" : name.replace(/[\x00-\x1f\x7f]/g, " "));
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") made.className = value;
    else if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}
const verdictOf = (verdict, large) =>
  element("span", { class: `verdict ${verdict ?? ""}${large ? " large" : ""}`, "data-verdict": verdict ?? "none" },
    verdict ? `${SHAPES[verdict]} ${verdict}` : "not diagnosed");
// With one run there is nothing to tell apart.
const keyOf = (run) => (runs.length > 1 ? [element("span", { class: `key ${run.key.toLowerCase()}` }, run.key), " "] : []);
const ends = () => [`step ${first}`, Math.round((first + last) / 2), last].map((text) => element("span", {}, String(text)));
const percent = (step) => `${(100 * (step - first)) / (last - first + 1)}%`;

// ---- Verdict

function card(run) {
  const facts = [["steps", `${run.steps}, from ${run.first} to ${run.last}`, run.steps]];
  for (const curve of run.curves.filter((curve) => curve.scalar || curve.name === "total_norm")) {
    const [from, to] = [number(curve.first_value), number(curve.last_value)];
    facts.push([WORDS[curve.name] ?? curve.name, `${shown(from)} at first, ${shown(to)} at last`, to]);
  }
  facts.push(["clipped", counted(run.clipped), run.clipped], ["skipped", counted(run.skipped), run.skipped]);
  facts.push(["not finite", counted(run.nonfinite), run.nonfinite]);
  const elements = run.tensors.reduce((sum, tensor) => sum + tensor.last.count, 0);
  facts.push(["tensors", `${run.tensors.length}, of ${elements} elements`, run.tensors.length]);
  const counts = ["critical", "warning", "healthy"].filter((verdict) => run[verdict] > 0);
  const told = counts.map((verdict) => `${run[verdict]} ${verdict}`).join(", ");
  return element("article", { class: "card" },
    element("h2", { class: "name" }, ...keyOf(run), printable(run.name)),
    verdictOf(run.verdict, true),
    element("p", { class: "hint" }, told ? `Steps: ${told}. The last one is ${run.last_verdict ?? "not diagnosed"}.` : ""),
    element("dl", {}, ...facts.flatMap(([name, text, value]) =>
      [element("dt", {}, name), element("dd", { "data-fact": name, "data-value": String(value) }, text)])));
}

// ---- Findings

// Low, half and full height, so that the colour is not all that tells.
function strip(run) {
  const canvas = element("canvas", { class: "strip", role: "img",
    "aria-label": `Verdicts over steps: ${run.critical} critical, ${run.warning} warning, ${run.healthy} healthy` });
  drawings.push(() => {
    const [width, height] = sized(canvas, canvas.parentElement.clientWidth, 22);
    const context = canvas.getContext("2d");
    const colors = ["healthy", "warning", "critical"].map(color);
    // The worst last, over the others.
    for (const worst of [0, 1, 2]) {
      context.fillStyle = colors[worst];
      const size = [0.2, 0.55, 1][worst] * height;
      run.verdicts.worst.forEach((verdict, bucket) => {
        if (verdict !== worst) return;
        const from = Math.floor(((run.verdicts.first[bucket] - first) / (last - first + 1)) * width);
        const next = bucket + 1 < run.verdicts.first.length ? run.verdicts.first[bucket + 1] : run.last + 1;
        const to = Math.ceil(((next - first) / (last - first + 1)) * width);
        context.fillRect(from, height - size, Math.max(to - from, 1), size);
      });
    }
  });
  return canvas;
}
function finding(found) {
  const others = found.others.length;
  const tensor = found.tensor === null ? "all tensors"
    : element("button", { type: "button", onclick: () => chooseAndKeep(found.tensor, true) }, printable(found.tensor));
  const track = element("div", { class: `track ${found.severity}`, "aria-hidden": "true" });
  for (const [from, to] of found.spans) {
    const bar = element("i");
    bar.style.left = percent(from);
    bar.style.width = `calc(${percent(to + 1)} - ${percent(from)})`;
    track.append(bar);
  }
  const item = element("li", { "data-rule": found.rule },
    verdictOf(found.severity), ` ${found.kind} in `, tensor, others > 0 ? ` and ${others} more` : "", track,
    element("p", {}, found.steps === 1 ? `In step ${found.last}` : `In ${found.steps} steps up to step ${found.last}`,
      found.since === found.last ? "." : `; began in step ${found.since}.`),
    element("p", {}, runs.length > 1 || found.steps > 1 ? `Step ${found.found}: ` : "", found.message));
  if (found.advice.length + others > 0) {
    const more = element("details", {}, element("summary", {}, "Remedies"),
      element("ul", {}, ...found.advice.map((advice) => element("li", {}, advice))));
    if (others > 0) more.append(element("p", {}, `Also in: ${found.others.map(printable).join(", ")}`));
    item.append(more);
  }
  return item;
}
const AT_ONCE = 50;
function findings(run) {
  const list = element("ol", { class: "findings" }, ...run.findings.slice(0, AT_ONCE).map(finding));
  const all = element("div", {}, element("h3", { class: "name" }, ...keyOf(run), runs.length > 1 ? printable(run.name) : ""),
    strip(run), element("div", { class: "ends", "aria-hidden": "true" }, ...ends()));
  if (run.verdict === null) all.append(element("p", {}, "No step was diagnosed."));
  else if (run.findings.length === 0) all.append(element("p", {}, run.verdict === "healthy" ? "Nothing stands out." : "The run does not say why."));
  all.append(list);
  const rest = run.findings.length - AT_ONCE;
  if (rest > 0) {
    const more = element("button", { type: "button", onclick: () => {
      list.append(...run.findings.slice(AT_ONCE).map(finding));
      more.remove();
    } }, `Show ${rest} more`);
    all.append(more);
  }
  return all;
}

// ---- Curves

// `parts` are {run, steps, values}, one a run that has them. Those of a curve have `ends`, its first and last number; those of the
// heat map have `until`, the last step of each column.
function chart(title, parts) {
  const numbers = parts.map(({ values }) => Array.from(values));
  const finite = numbers.flat().filter(Number.isFinite);
  const low = finite.reduce((a, b) => Math.min(a, b), Infinity);
  const high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
  const logarithmic = low > 0 && high > 30 * low;
  const bad = parts.map(({ steps }, part) =>
    numbers[part].flatMap((value, at) => (Number.isFinite(value) ? [] : [[steps[at], value]])));
  const gaps = numbers.map((list) => list.map((value) => (Number.isFinite(value) ? value : null)));
  const data = uPlot.join(parts.map(({ steps }, part) => [Array.from(steps), gaps[part]]));
  const told = parts.map(({ run, steps }, part) => {
    const { ends, until, values } = parts[part];
    const at = numbers[part].findIndex((value) => !Number.isFinite(value));
    const marks = at < 0 ? "" : `, ${shown(values[at])} first in ${stepsOf(steps[at], until ? until[at] : steps[at])}`;
    const largest = numbers[part].filter(Number.isFinite).reduce((a, b) => Math.max(a, b), -Infinity);
    const words = ends ? `${shown(ends[0])} at first, ${shown(ends[1])} at last` : largest > -Infinity ? `${shown(largest)} at most` : "nothing finite";
    return `${runs.length > 1 ? `${run.key}: ` : ""}${words}${marks}`;
  });
  const host = element("div", { tabIndex: 0, role: "img", "aria-label": `${title} over steps. ${told.join(". ")}` });
  const figure = element("figure", { class: "chart" }, element("h3", { class: "name" }, title),
    element("div", { class: "facts", "data-curve": title }, told.join(". "), logarithmic ? ". Logarithmic." : ""), host);
  let plot;
  const drawing = () => {
    drawing.end();
    const [text, grid] = [color("faint"), color("grid")];
    const axis = { stroke: text, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, font: "12px system-ui, sans-serif" };
    // A step can be moved to that is NaN, and is told as such.
    const value = (part) => (_, finite, __, at) => {
      if (at === null) return "–";
      const found = bad[part].find(([step]) => step === plot.data[0][at]);
      return found ? shown(found[1]) : shown(finite);
    };
    plot = new uPlot({
      width: host.clientWidth, height: 190, padding: [14, 24, 0, 0],
      cursor: { sync: { key: "steps" }, y: false, points: { size: 7 } },
      legend: { live: true },
      scales: {
        x: { time: false, range: (plot, from, to) => {
          // All of the run, until it is zoomed into.
          const all = plot.data[0];
          return from === all[0] && to === all.at(-1) ? [first, Math.max(last, first + 1)] : [from, to];
        } },
        y: { distr: logarithmic ? 3 : 1, ...(low === 0 && high === 0 ? { range: [0, 1] } : {}) },
      },
      axes: [{ ...axis, size: 32, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? tick : "")) },
        { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : shown(Number(tick.toPrecision(6))))) }],
      series: [{ label: "step", value: (_, step) => (step === null ? "–" : String(step)) },
        ...parts.map(({ run }, part) => ({
          label: runs.length > 1 ? run.key : title, stroke: color(run.key.toLowerCase()), width: 1.5,
          dash: run.key === "B" ? [6, 3] : undefined, value: value(part), points: { size: 4 },
        }))],
      hooks: { draw: [(plot) => {
        const { ctx: context, bbox } = plot;
        context.save();
        context.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
        parts.forEach(({ run }, part) => {
          context.fillStyle = color(run.key.toLowerCase());
          let named = false;
          for (const [step, value] of bad[part]) {
            const x = plot.valToPos(step, "x", true);
            if (x < bbox.left - 1 || x > bbox.left + bbox.width + 1) continue;
            const size = 4 * devicePixelRatio;
            context.beginPath();
            context.moveTo(x - size, bbox.top - 2 * size);
            context.lineTo(x + size, bbox.top - 2 * size);
            context.lineTo(x, bbox.top);
            context.fill();
            if (!named) {
              const right = x > bbox.left + bbox.width / 2;
              context.textAlign = right ? "right" : "left";
              context.fillText(shown(value), right ? x - 1.5 * size : x + 1.5 * size, bbox.top - size / 2);
              named = true;
            }
          }
        });
        context.restore();
      }] },
    }, data, host);
  };
  host.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -Infinity, End: Infinity }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    const at = Math.max(0, Math.min(data[0].length - 1, (plot.cursor.idx ?? (by > 0 ? -1 : data[0].length)) + by));
    plot.setCursor({ left: plot.valToPos(data[0][at], "x"), top: plot.over.clientHeight / 2 });
  });
  // Else the other curves would go on moving its cursor.
  drawing.end = () => plot?.destroy();
  drawings.push(drawing);
  return figure;
}

// ---- Grids: the heat map and the histograms

const VIRIDIS = ["440154", "482475", "414487", "355f8d", "2a788e", "21918c", "22a884", "44bf70", "7ad151", "bddf26", "fde725"]
  .map((stop) => [0, 2, 4].map((at) => parseInt(stop.slice(at, at + 2), 16)));
const packed = (r, g, b) => (0xff000000 | (b << 16) | (g << 8) | r) >>> 0;
const PALETTE = Uint32Array.from({ length: 256 }, (_, level) => {
  const at = (level / 255) * (VIRIDIS.length - 1);
  const [from, to] = [VIRIDIS[Math.floor(at)], VIRIDIS[Math.ceil(at)]];
  return packed(...from.map((part, channel) => Math.round(part + (to[channel] - part) * (at % 1))));
});
const [BLACK, WHITE, GREY] = [packed(0, 0, 0), packed(255, 255, 255), packed(128, 128, 128)];
// Patterns rather than colours, two pixels of the page wide: NaN a chequerboard, Inf stripes, 0 grey.
const marked = (value, x, y, size) =>
  Number.isNaN(value) ? ((((x / size) | 0) + ((y / size) | 0)) % 2 ? BLACK : WHITE)
    : value === 0 ? GREY : ((x / size) | 0) % 2 ? BLACK : WHITE;
const needsMark = (value) => value === 0 || !Number.isFinite(value);

// Gives the canvas so many pixels of the page, and says how many of the screen that is.
function sized(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  [canvas.width, canvas.height] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  return [canvas.width, canvas.height];
}

// Cells over steps, with a cursor that mouse and arrow keys move. `content()` gives {rows, height, label(row), value(column, row),
// level(value), describe(column, row)}; a value that is undefined is not there. Columns are {first, last} of `run`.
function grid(run, columns, title, content, picked) {
  const canvas = element("canvas", { tabIndex: 0, role: "application", "aria-label": title, "aria-roledescription": "grid of cells, moved through with the arrow keys" });
  const at = element("div", { class: "at", hidden: true });
  const box = element("div", { class: "grid-box" }, canvas, at);
  const readout = element("output", { class: "readout", "aria-live": "polite" }, "No cell is chosen.");
  const axis = element("div", { class: "ends", "aria-hidden": "true" });
  const host = element("div", {}, box, axis, readout);
  let [now, gutter, width, cursor, starts] = [null, 0, 0, null, []];
  const drawing = () => {
    now = content();
    const all = Math.max(box.clientWidth, 1);
    gutter = now.height >= 11 ? Math.min(Math.round(all * 0.4), 190) : 0;
    width = all - gutter;
    const ratio = devicePixelRatio || 1;
    sized(canvas, all, Math.max(now.rows * now.height, 12));
    const context = canvas.getContext("2d");
    const [x0, pixels] = [Math.round(gutter * ratio), canvas.width - Math.round(gutter * ratio)];
    const scale = pixels / (last - first + 1);
    starts = Array.from(columns.first, (step) => (step - first) * scale);
    // Several columns that share a pixel: the largest of them is drawn. One reaches to where the next begins.
    const [from, to] = [new Int32Array(pixels).fill(-1), new Int32Array(pixels)];
    const end = Math.min(pixels, Math.ceil((run.last + 1 - first) * scale));
    for (let x = 0, column = -1; x < end; x++) {
      const before = column;
      while (column + 1 < starts.length && starts[column + 1] < x + 1) column++;
      from[x] = column > before && before >= 0 && starts[before + 1] < x + 1 ? before + 1 : column;
      to[x] = column;
    }
    const lines = canvas.height;
    const image = context.createImageData(pixels, lines);
    const screen = new Uint32Array(image.data.buffer);
    const row = new Float64Array(pixels);
    const size = Math.max(1, Math.round(2 * ratio));
    for (let r = 0; r < now.rows; r++) {
      const [y0, y1] = [Math.round(r * now.height * ratio), Math.round((r + 1) * now.height * ratio)];
      const there = new Uint8Array(pixels);
      for (let x = 0; x < pixels; x++) {
        if (x > 0 && from[x] === from[x - 1] && to[x] === to[x - 1]) {
          [there[x], row[x]] = [there[x - 1], row[x - 1]];
          continue;
        }
        for (let column = from[x]; column >= 0 && column <= to[x]; column++) {
          const value = now.value(column, r);
          if (value === undefined) continue;
          if (!there[x] || Number.isNaN(value) || value > row[x]) row[x] = value;
          there[x] = 1;
        }
      }
      for (let y = y0; y < y1; y++) {
        for (let x = 0; x < pixels; x++) {
          if (!there[x]) continue;
          screen[y * pixels + x] = needsMark(row[x]) ? marked(row[x], x, y, size) : PALETTE[now.level(row[x])];
        }
      }
    }
    context.putImageData(image, x0, 0);
    if (gutter > 0) {
      context.scale(ratio, ratio);
      context.font = "11px system-ui, sans-serif";
      context.fillStyle = color("text");
      context.textBaseline = "middle";
      for (let r = 0; r < now.rows; r++) context.fillText(fitted(context, now.label(r), gutter - 8), 3, (r + 0.5) * now.height);
    }
    axis.style.paddingLeft = `${gutter}px`;
    axis.replaceChildren(...ends());
    if (cursor) show(Math.min(cursor[0], starts.length - 1), Math.min(cursor[1], now.rows - 1), false);
  };
  const show = (column, r, follow) => {
    if (column < 0 || r < 0) {
      [cursor, at.hidden, readout.textContent] = [null, true, "No cell is chosen."];
      return;
    }
    cursor = [column, r];
    const ratio = devicePixelRatio || 1;
    const left = starts[column] / ratio;
    const right = (starts[column + 1] ?? ((run.last + 1 - first) / (last - first + 1)) * width * ratio) / ratio;
    const [w, h] = [Math.max(right - left, 5), Math.max(now.height, 5)];
    Object.assign(at.style, { left: `${gutter + Math.min(left, width - w)}px`, top: `${r * now.height + (now.height - h) / 2}px`, width: `${w}px`, height: `${h}px` });
    at.hidden = false;
    if (follow) {
      const top = r * now.height;
      if (top < box.scrollTop + 8) box.scrollTop = top - 24;
      else if (top + now.height > box.scrollTop + box.clientHeight - 8) box.scrollTop = top + 24 - box.clientHeight;
    }
    readout.textContent = `${stepsOf(columns.first[column], columns.last[column])}: ${now.describe(column, r)}`;
  };
  const under = (event) => {
    const bounds = canvas.getBoundingClientRect();
    const x = (event.clientX - bounds.left - gutter) * (devicePixelRatio || 1);
    let column = 0;
    while (column + 1 < starts.length && starts[column + 1] <= x) column++;
    return [starts.length > 0 ? column : -1, Math.min(now.rows - 1, Math.floor((event.clientY - bounds.top) / now.height))];
  };
  canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && show(...under(event), false));
  canvas.addEventListener("click", (event) => {
    show(...under(event), false);
    if (cursor) picked?.(cursor[1]);
  });
  canvas.addEventListener("focus", () => cursor ?? show(starts.length - 1, now.rows > 0 ? 0 : -1, false));
  canvas.addEventListener("keydown", (event) => {
    const [columnBy, rowBy] = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], PageUp: [0, -20], PageDown: [0, 20],
      Home: [-Infinity, 0], End: [Infinity, 0],
    }[event.key] ?? [0, 0];
    if (event.key === "Enter" && cursor) picked?.(cursor[1]);
    if ((columnBy === 0 && rowBy === 0) || !cursor) return;
    event.preventDefault();
    const clamped = (value, count) => Math.max(0, Math.min(count - 1, value));
    show(clamped(cursor[0] + columnBy, starts.length), clamped(cursor[1] + rowBy, now.rows), true);
  });
  drawings.push(drawing);
  return { host, drawing };
}
// The end of a name tells more than its beginning.
function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (context.measureText(`…${text.slice(middle)}`).width <= width) high = middle;
    else low = middle + 1;
  }
  return `…${text.slice(low)}`;
}
const cellsOf = new Map();
// The number of a cell; undefined where there is none.
function cell(run, measure, column, tensor) {
  const cells = run.measures[measure];
  if (!cells || tensor === undefined) return undefined;
  const at = column * run.tensors.length + tensor;
  const value = cells[at];
  if (!Number.isNaN(value)) return value;
  if (!cellsOf.has(cells)) cellsOf.set(cells, new Uint32Array(cells.buffer));
  return cellsOf.get(cells)[at] === 0x7fc00001 ? undefined : value;
}

// ---- Heat map

// A share has its own ends. All else is over decades, which lie far apart.
const extents = {};
function extent(measure) {
  if (measure === "dead_share") return [0, 1];
  if (!extents[measure]) {
    let [low, high] = [Infinity, 0];
    for (const run of runs) {
      for (const value of run.measures[measure] ?? []) {
        if (value > 0 && value < Infinity) [low, high] = [Math.min(low, value), Math.max(high, value)];
      }
    }
    extents[measure] = [low, high];
  }
  return extents[measure];
}
function leveled(measure) {
  const [low, high] = extent(measure);
  if (measure === "dead_share") return (value) => Math.round(255 * value);
  if (high <= low) return () => 128;
  const [from, by] = [Math.log(low), 255 / (Math.log(high) - Math.log(low))];
  return (value) => Math.max(0, Math.min(255, Math.round((Math.log(value) - from) * by)));
}
const chosen = { measure: null, filter: "", tensor: null };
const rowsOf = () => {
  const filter = chosen.filter.toLowerCase();
  return names.filter((name) => name.toLowerCase().includes(filter));
};
function heatMap(run) {
  let rows = [];
  const content = () => {
    // A canvas is at most 32767 pixels high.
    rows = rowsOf().slice(0, Math.floor(32000 / (devicePixelRatio || 1)));
    const places = rows.map((name) => run.of.get(name));
    const value = (column, row) => cell(run, chosen.measure, column, places[row]);
    return {
      rows: rows.length, height: Math.max(1, Math.min(18, Math.floor(560 / Math.max(rows.length, 1)))), value,
      label: (row) => printable(rows[row]), level: leveled(chosen.measure),
      describe: (column, row) => {
        const found = value(column, row);
        return `${printable(rows[row])}, ${MEASURES[chosen.measure]} ${found === undefined ? "not measured" : shown(found)}`;
      },
    };
  };
  const { host, drawing } = grid(run, run.columns, `Tensors over steps of ${run.name}`, content, (row) => chooseAndKeep(rows[row], false));
  return { host: element("div", {}, element("h3", { class: "name" }, ...keyOf(run), runs.length > 1 ? printable(run.name) : ""), host), drawing };
}
function legend() {
  const swatch = (value) => {
    const canvas = element("canvas");
    const [width, height] = sized(canvas, 22, 14);
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const size = Math.max(1, Math.round(2 * (devicePixelRatio || 1)));
    new Uint32Array(image.data.buffer).forEach((_, at, screen) => (screen[at] = marked(value, at % width, Math.floor(at / width), size)));
    context.putImageData(image, 0, 0);
    return canvas;
  };
  const bar = element("canvas");
  const [width, height] = sized(bar, 130, 14);
  const context = bar.getContext("2d");
  const image = context.createImageData(width, height);
  new Uint32Array(image.data.buffer).forEach((_, at, screen) => (screen[at] = PALETTE[Math.round((255 * (at % width)) / (width - 1))]));
  context.putImageData(image, 0, 0);
  const [low, high] = extent(chosen.measure);
  const parts = low <= high ? [element("span", {}, shown(low), bar, shown(high))] : [];
  for (const [value, word] of [[0, "0"], [NaN, "NaN"], [Infinity, "Inf"]]) parts.push(element("span", {}, swatch(value), word));
  document.getElementById("legend").replaceChildren(...parts, element("span", {}, "blank: not measured"));
}

// ---- One tensor

const EXPONENTS = (exponent) => shown(Number((2 ** exponent).toPrecision(2)));
function histogram(run, name) {
  const [start, exponent, octaves] = run.histogram.tensors[run.of.get(name)];
  const kinds = octaves + 3;
  // From the top: NaN, Inf, the largest octave to the smallest, 0.
  const labels = ["NaN", "Inf", ...Array.from({ length: octaves }, (_, at) => `≥ ${EXPONENTS(exponent + octaves - 1 - at)}`), "0"];
  const place = (row) => (row === 0 ? octaves + 2 : row === 1 ? octaves + 1 : row === kinds - 1 ? octaves : octaves + 1 - row);
  const share = (column, row) => run.histogram.shares[start + column * kinds + place(row)] / 65535;
  const range = (row) => {
    if (row < 2 || row === kinds - 1) return labels[row];
    const low = exponent + octaves + 1 - row;
    return `|x| from ${EXPONENTS(low)} to ${EXPONENTS(low + 1)}`;
  };
  const content = () => ({
    rows: kinds, height: 13, label: (row) => labels[row],
    // NaN and Inf are drawn as such, and a share of 0 not at all.
    value: (column, row) => {
      const found = share(column, row);
      return found === 0 ? undefined : row === 0 ? NaN : row === 1 ? Infinity : found;
    },
    // By the root, so that small shares are seen.
    level: (value) => Math.round(255 * Math.sqrt(Math.min(value, 1))),
    describe: (column, row) => `${shown(Number((100 * share(column, row)).toFixed(3)))} % of the elements: ${range(row)}`,
  });
  return grid(run, run.histogram, `Histogram of ${printable(name)} over steps`, content);
}
function numbersOf(name, having) {
  const objects = having.map((run) => run.tensors[run.of.get(name)].last);
  const keys = [...new Set(objects.flatMap(Object.keys))].filter((key) => key !== "name");
  const text = (value) => (value === undefined || value === null ? "–" : typeof value === "string" ? value : String(value));
  const head = having.length > 1 ? [element("tr", {}, element("th", {}, ""), ...having.map((run) => element("th", { scope: "col" }, ...keyOf(run))))] : [];
  return element("div", { class: "scroll" }, element("table", { class: "numbers" }, ...head, ...keys.map((key) =>
    element("tr", {}, element("th", { scope: "row" }, key),
      ...objects.map((object) => element("td", { "data-number": key }, text(object[key])))))));
}
// Of the user's choice, with an address that leads back to it.
function chooseAndKeep(name, go) {
  history.replaceState(null, "", `#${new URLSearchParams({ tensor: name })}`);
  choose(name);
  if (go) {
    document.getElementById("tensor").scrollIntoView();
    document.querySelector("#tensor h2").focus({ preventScroll: true });
  }
}
// Called again when the window or the theme changes. The first `general` stay; the others are of the tensor that is shown.
const drawings = [];
let general = 0;
function choose(name) {
  chosen.tensor = name;
  const choice = document.getElementById("choice");
  choice.value = String(names.indexOf(name));
  drawings.slice(general).forEach((drawing) => drawing.end?.());
  drawings.length = general;
  const having = runs.filter((run) => run.of.has(name));
  const words = having.map((run) => {
    const tensor = run.tensors[run.of.get(name)];
    const since = tensor.unhealthy_since === null ? "" : ` first in step ${tensor.unhealthy_since}`;
    return element("p", {}, ...keyOf(run), verdictOf(tensor.verdict), since);
  });
  const charts = Object.keys(MEASURES).flatMap((measure) => {
    const parts = having.filter((run) => run.measures[measure]).map((run) => {
      const tensor = run.of.get(name);
      const there = Array.from(run.columns.first.keys()).filter((column) => cell(run, measure, column, tensor) !== undefined);
      const of = (list) => there.map((column) => list[column]);
      const values = there.map((column) => cell(run, measure, column, tensor));
      return { run, steps: of(run.columns.first), until: of(run.columns.last), values };
    }).filter(({ steps }) => steps.length > 0);
    // Counts that are always 0 tell nothing.
    const tells = parts.some(({ values }) => !measure.endsWith("count") || values.some((value) => value !== 0));
    return tells ? [chart(MEASURES[measure], parts)] : [];
  });
  const histograms = having.filter((run) => run.histogram.first.length > 0).map((run) =>
    element("div", {}, element("h3", {}, ...keyOf(run), "How large its elements are"), histogram(run, name).host));
  document.getElementById("detail").replaceChildren(element("h3", { class: "name", "data-tensor": name }, printable(name)), ...words,
    element("div", { class: "charts" }, ...charts),
    element("div", { class: "beside wide" }, ...histograms),
    element("div", {}, element("h3", {}, "Numbers of the last step with details"), numbersOf(name, having)));
  drawings.slice(general).forEach((drawing) => drawing());
}

// ---- The page

document.title = `${runs.map((run) => printable(run.name)).join(" and ")} – gradprobe report`;
document.getElementById("runs").append(...runs.map(card));
document.querySelector("#findings > div").append(...runs.map(findings));
const keys = new Map(runs.flatMap((run) => run.curves).map((curve) => [`${curve.scalar} ${curve.name}`, curve]));
document.querySelector("#curves .charts").append(...Array.from(keys.values(), (curve) => {
  const parts = runs.flatMap((run) => run.curves.filter((other) => other.name === curve.name && other.scalar === curve.scalar)
    .map(({ steps, values, first_value, last_value }) => ({ run, steps, values, ends: [number(first_value), number(last_value)] })));
  return chart(curve.scalar ? curve.name : WORDS[curve.name], parts);
}));
document.getElementById("curves").hidden = keys.size === 0;
const measures = Object.keys(MEASURES).filter((measure) => runs.some((run) => run.measures[measure]));
if (names.length > 0 && measures.length > 0) {
  chosen.measure = measures[0];
  const maps = runs.map(heatMap);
  document.querySelector("#tensors > div").append(...maps.map(({ host }) => host));
  const alone = names.filter((name) => !runs.every((run) => run.of.has(name)));
  if (alone.length > 0) {
    document.getElementById("legend").before(element("p", {}, `${names.length - alone.length} of ${names.length} tensors are in both runs; not, for one: ${printable(alone[0])}.`));
  }
  const again = () => {
    legend();
    maps.forEach(({ drawing }) => drawing());
  };
  const measure = document.getElementById("measure");
  measure.append(...measures.map((name) => element("option", { value: name }, MEASURES[name])));
  measure.addEventListener("change", () => {
    chosen.measure = measure.value;
    again();
  });
  document.getElementById("filter").addEventListener("input", (event) => {
    chosen.filter = event.target.value;
    again();
  });
  drawings.push(legend);
  const choice = document.getElementById("choice");
  choice.append(...names.map((name, place) => element("option", { value: String(place) }, printable(name))));
  choice.addEventListener("change", () => chooseAndKeep(names[Number(choice.value)], false));
  document.querySelectorAll("form").forEach((form) => form.addEventListener("submit", (event) => event.preventDefault()));
} else {
  document.getElementById("tensors").hidden = document.getElementById("tensor").hidden = true;
}
general = drawings.length;
drawings.forEach((drawing) => drawing());
if (chosen.measure) {
  // As `chooseAndKeep` leaves it in the address.
  const asked = new URLSearchParams(location.hash.slice(1)).get("tensor");
  const found = runs.flatMap((run) => run.findings).find((finding) => finding.tensor !== null);
  choose(names.includes(asked) ? asked : found && names.includes(found.tensor) ? found.tensor : names[0]);
}
const redraw = () => drawings.forEach((drawing) => drawing());
let width = innerWidth;
addEventListener("resize", () => {
  // A phone's address bar changes the height alone.
  if (innerWidth !== width) requestAnimationFrame(redraw);
  width = innerWidth;
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
document.documentElement.dataset.drawn = String(Math.round(performance.now()));
})();
