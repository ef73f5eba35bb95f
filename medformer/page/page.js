"use strict";
// The viewer of page.py. Axes are z, y, x; voxels of a patient run to the right, front and head (RAS+).

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const PLANES = [
  { title: "axial", across: 2, up: 1, sides: ["R", "L", "A", "P"] },
  { title: "coronal", across: 2, up: 0, sides: ["R", "L", "S", "I"] },
  { title: "sagittal", across: 1, up: 0, sides: ["A", "P", "S", "I"] },
];
const HEAT = [[0, 0, 4], [60, 9, 101], [136, 34, 106], [203, 65, 73], [246, 125, 21], [251, 190, 35], [252, 255, 164]];
const COOL = [[38, 20, 84], [49, 82, 139], [33, 130, 141], [40, 168, 126], [122, 209, 81], [253, 231, 37]];
const LABELS = [[239, 83, 80], [66, 165, 245], [102, 187, 106], [255, 202, 40], [171, 71, 188], [38, 198, 218], [255, 112, 67], [141, 110, 99]];
const PRESETS = [["soft tissue", 40, 400], ["lung", -600, 1500], ["bone", 400, 1800], ["brain", 40, 80]];
const FRAME = [26, 56]; // pixels around a plane, across and up, with its slider

let scan = null; // the scan shown, unpacked
const state = { scan: 0, at: [0, 0, 0], plane: 0, centre: 0, width: 1, overlay: "", before: "none", opacity: 0.55, token: null };

async function unpack(text, Type) {
  if (ArrayBuffer.isView(text)) return text; // made in this page
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Type(await new Response(stream).arrayBuffer());
}

async function open(number) {
  const packed = data.scans[number];
  const next = { ...packed };
  next.voxels = await unpack(packed.voxels, Int16Array);
  if (packed.tokens) next.colours = await unpack(packed.colours, Uint8Array), next.tokens = await unpack(packed.tokens, Int8Array);
  next.sequences = packed.sequences || [];
  next.mask = packed.mask ? await unpack(packed.mask, Uint8Array) : null;
  next.heads = await Promise.all(packed.heads.map(async (h) => ({ ...h, values: await unpack(h.values, Uint8Array) })));
  scan = next;
  document.body.classList.remove("empty");
  Object.assign(state, { scan: number, at: middle(), token: null, plane: 0 });
  [state.centre, state.width] = scan.window;
  const keep = overlays().some(([key]) => key === state.overlay && key !== "similarity");
  if (scan.mask) state.overlay = "mask";
  else if (!keep) state.overlay = scan.heads.length ? "head" + (scan.heads.length - 1) : scan.tokens ? "pca" : "none";
  sequences();
  build();
  draw();
  tabulate();
}

// Where the mask is largest along each axis; the scan's own middle where there is none.
function middle() {
  const count = scan.shape.map((n) => new Uint32Array(n)), [, rows, columns] = scan.shape;
  (scan.mask || []).forEach((label, i) => {
    if (label) [Math.floor(i / rows / columns), Math.floor(i / columns) % rows, i % columns].forEach((v, a) => count[a][v]++);
  });
  return count.map((c) => { const best = c.indexOf(Math.max(...c)); return c[best] ? best : c.length >> 1; });
}

function overlays() {
  const heads = scan.heads.map((h, i) => ["head" + i, "attention, " + h.title]);
  return [["none", "nothing"], ...(scan.mask ? [["mask", "answer: mask"]] : []), ...heads.reverse(),
    ...(scan.tokens ? [["pca", "patch colours (PCA)"], ["similarity", "similarity to a token"]] : [])];
}

function lut(colours, t) {
  const s = Math.min(Math.max(t, 0), 1) * (colours.length - 1);
  const i = Math.min(Math.floor(s), colours.length - 2);
  return colours[i].map((c, k) => c + (s - i) * (colours[i + 1][k] - c));
}

// ---- tokens -------------------------------------------------------------------------------------------------------

const first = (axis) => (scan.kernel[axis] - 1) / 2 - scan.padding[axis]; // voxel at the middle of token 0

function tokenAt(at) {
  return at.map((v, a) => Math.min(Math.max(Math.round((v - first(a)) / scan.stride[a]), 0), scan.grid[a] - 1));
}

const flat = (t) => (t[0] * scan.grid[1] + t[1]) * scan.grid[2] + t[2];

function similarities(token) {
  const r = scan.rank, codes = scan.tokens, n = codes.length / r, out = new Float32Array(n), base = flat(token) * r;
  for (let i = 0; i < n; i++) {
    let sum = 0;
    for (let k = 0; k < r; k++) sum += codes[base + k] * codes[i * r + k];
    out[i] = sum * scan.scale;
  }
  return out;
}

// Of a case of several channels another one is shown; all went into the network.
async function sequence(name) {
  const found = scan.sequences.find((s) => s.name === name);
  Object.assign(scan, found, { name: scan.name, sequence: name, voxels: await unpack(found.voxels, Int16Array) });
  [state.centre, state.width] = scan.window;
  build();
  draw();
}

function sequences() {
  $("sequence").parentElement.hidden = scan.sequences.length < 2;
  $("sequence").replaceChildren(...scan.sequences.map((s) => new Option(s.name, s.name)));
}

let cached = { key: "", paint: null };
function painter() { // token number to [r, g, b, a], or null
  const key = state.scan + state.overlay + (state.token || "");
  if (cached.key === key) return cached.paint;
  let paint = null;
  if (state.overlay.startsWith("head")) {
    const values = scan.heads[+state.overlay.slice(4)].values;
    paint = (i) => [...lut(HEAT, values[i] / 255), 255 * Math.min(1, 0.15 + values[i] / 140)];
  } else if (state.overlay === "pca") {
    paint = (i) => [scan.colours[3 * i], scan.colours[3 * i + 1], scan.colours[3 * i + 2], 255];
  } else if (state.overlay === "similarity" && state.token) {
    const values = similarities(state.token), low = values.reduce((a, b) => Math.min(a, b), 1);
    state.low = low;
    state.similar = values;
    paint = (i) => [...lut(COOL, (values[i] - low) / Math.max(1 - low, 1e-6)), 255];
  }
  cached = { key, paint };
  return paint;
}

// ---- drawing ------------------------------------------------------------------------------------------------------

// Pixels a millimetre with which the planes fill what the window has: in a row, or as two over one.
function arrange([z, y, x]) {
  const table = $("table").hidden ? 0 : Math.min($("table").offsetHeight, 0.35 * window.innerHeight) + 12, top = $("planes").getBoundingClientRect().top + window.scrollY;
  const wide = Math.max(280, $("planes").clientWidth), high = Math.max(280, window.innerHeight - top - 40 - table);
  const fits = (columns, rows, across, up) => Math.min((wide - columns * FRAME[0]) / across, (high - rows * FRAME[1]) / up);
  if (scan.flat) return fits(1, 0.5, x, y);
  const row = fits(3, 1, 2 * x + y, Math.max(y, z)), four = fits(2, 2, x + y, y + z), one = fits(1, 1, Math.max(x, y), Math.max(y, z));
  $("planes").classList.toggle("four", wide > 700 && four > row);
  return wide > 700 ? Math.max(row, four) : one;
}

const canvases = [];
function build() {
  $("planes").replaceChildren();
  canvases.length = 0;
  const mm = scan.shape.map((n, a) => n * scan.spacing[a]), perMm = arrange(mm);
  PLANES.forEach((plane, p) => {
    if (scan.flat && p) return;
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    const caption = document.createElement("figcaption"), slider = document.createElement("input"), text = document.createElement("output");
    figure.className = "plane";
    canvas.width = Math.max(8, Math.round(mm[plane.across] * perMm));
    canvas.height = Math.max(8, Math.round(mm[plane.up] * perMm));
    canvas.tabIndex = 0;
    canvas.id = plane.title;
    canvas.setAttribute("role", "img");
    slider.type = "range";
    slider.min = 0;
    slider.max = scan.shape[p] - 1;
    slider.setAttribute("aria-label", plane.title + " slice");
    slider.oninput = () => { state.at[p] = +slider.value; draw(); };
    caption.append(plane.title, slider, text);
    figure.append(canvas, caption);
    if (scan.flat) caption.hidden = true;
    $("planes").append(figure);
    canvases[p] = { canvas, slider, text };
    listen(canvas, p);
  });
  fill();
}

function gray(p) {
  const { across, up } = PLANES[p], step = [scan.shape[1] * scan.shape[2], scan.shape[2], 1];
  const w = scan.shape[across], h = scan.shape[up], image = new ImageData(w, h), out = image.data;
  const low = state.centre - state.width / 2, gain = 255 / state.width, start = state.at[p] * step[p], turned = !scan.flat;
  for (let row = 0, o = 0; row < h; row++) {
    const line = start + (turned ? h - 1 - row : row) * step[up];
    for (let col = 0; col < w; col++, o += 4) {
      const value = scan.voxels[line + (turned ? w - 1 - col : col) * step[across]] * scan.slope + scan.middle;
      out[o] = out[o + 1] = out[o + 2] = (value - low) * gain; // clamped by the array
      out[o + 3] = 255;
    }
  }
  return image;
}

// The label map's plane, one pixel a voxel; background is clear.
function maskOf(p) {
  const { across, up } = PLANES[p], step = [scan.shape[1] * scan.shape[2], scan.shape[2], 1];
  const w = scan.shape[across], h = scan.shape[up], image = new ImageData(w, h), start = state.at[p] * step[p];
  for (let row = 0, o = 0; row < h; row++) {
    const line = start + (scan.flat ? row : h - 1 - row) * step[up];
    for (let col = 0; col < w; col++, o += 4) {
      const label = scan.mask[line + (scan.flat ? col : w - 1 - col) * step[across]];
      if (label) image.data.set([...LABELS[(label - 1) % LABELS.length], 255], o);
    }
  }
  return image;
}

const scratch = document.createElement("canvas");
function paste(context, image, x, y, w, h) {
  scratch.width = image.width;
  scratch.height = image.height;
  scratch.getContext("2d").putImageData(image, 0, 0);
  context.drawImage(scratch, x, y, w, h);
}

// The plane's tokens, and around them a border of the same again: a voxel beyond the last middle has no nearer token.
function overlay(p, paint) {
  const { across, up } = PLANES[p], w = scan.grid[across], h = scan.grid[up], image = new ImageData(w + 2, h + 2);
  const token = tokenAt(state.at), inside = (i, n) => Math.min(Math.max(i, 0), n - 1);
  for (let row = -1, o = 0; row <= h; row++)
    for (let col = -1; col <= w; col++, o += 4) {
      token[up] = inside(scan.flat ? row : h - 1 - row, h);
      token[across] = inside(scan.flat ? col : w - 1 - col, w);
      const [r, g, b, a] = paint(flat(token));
      image.data.set([r, g, b, a], o);
    }
  return image;
}

// Pixels from one edge of the canvas to token t's near and far side, along one axis of the volume.
function span(axis, pixels, t, count) {
  const edge = first(axis) + 0.5 + (t - 0.5) * scan.stride[axis], size = count * scan.stride[axis], per = pixels / scan.shape[axis];
  return [(scan.flat ? edge : scan.shape[axis] - edge - size) * per, size * per];
}

function drawPlane(p) {
  const { canvas, slider, text } = canvases[p], { across, up, title, sides } = PLANES[p], context = canvas.getContext("2d");
  const w = canvas.width, h = canvas.height, paint = painter();
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = true;
  paste(context, gray(p), 0, 0, w, h);
  if (paint && state.opacity > 0) {
    context.globalAlpha = state.opacity;
    context.imageSmoothingEnabled = state.overlay !== "similarity";
    const [x, wide] = span(across, w, -1, scan.grid[across] + 2), [y, high] = span(up, h, -1, scan.grid[up] + 2);
    paste(context, overlay(p, paint), x, y, wide, high);
    context.globalAlpha = 1;
  }
  if (state.overlay === "mask" && scan.mask && state.opacity > 0) {
    context.globalAlpha = state.opacity;
    context.imageSmoothingEnabled = false;
    paste(context, maskOf(p), 0, 0, w, h);
    context.globalAlpha = 1;
  }
  const place = (axis, size) => ((scan.flat ? state.at[axis] : scan.shape[axis] - 1 - state.at[axis]) + 0.5) * size / scan.shape[axis];
  context.strokeStyle = "rgba(124, 196, 255, 0.55)";
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(place(across, w), 0);
  context.lineTo(place(across, w), h);
  context.moveTo(0, place(up, h));
  context.lineTo(w, place(up, h));
  context.stroke();
  if (state.token && tokenAt(state.at)[p] === state.token[p]) {
    const [x, wide] = span(across, w, state.token[across], 1), [y, high] = span(up, h, state.token[up], 1);
    context.strokeStyle = "#fff";
    context.lineWidth = 2;
    context.strokeRect(x, y, wide, high);
  }
  if (!scan.flat) {
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "center";
    context.lineWidth = 3;
    context.strokeStyle = "#000";
    context.fillStyle = "#8ecbff";
    [[9, h / 2], [w - 9, h / 2], [w / 2, 9], [w / 2, h - 8]].forEach(([x, y], i) => {
      context.strokeText(sides[i], x, y);
      context.fillText(sides[i], x, y);
    });
  }
  slider.value = state.at[p];
  text.textContent = state.at[p] + 1 + "/" + scan.shape[p];
  canvas.setAttribute("aria-label", `${title}, slice ${state.at[p] + 1} of ${scan.shape[p]}`);
}

function draw() {
  canvases.forEach((_, p) => drawPlane(p));
  const index = (state.at[0] * scan.shape[1] + state.at[1]) * scan.shape[2] + state.at[2];
  const value = scan.voxels[index] * scan.slope + scan.middle, token = scan.tokens && tokenAt(state.at);
  let text = `${scan.flat ? "pixel" : "voxel"} ${axes(state.at).join(", ")} (${scan.flat ? "yx" : "zyx"}): ${number(value)}${scan.units && " " + scan.units}`;
  if (token) text += `; token ${axes(token).join(", ")} of ${axes(scan.grid).join(" x ")}`;
  if (state.token && state.overlay === "similarity" && painter())
    text += `; similarity to token ${axes(state.token).join(", ")}: ${state.similar[flat(token)].toFixed(3)}`;
  $("place").textContent = text;
  $("overlay").value = state.overlay;
  $("opacity").value = 100 * state.opacity;
  $("centre").value = number(state.centre);
  $("width").value = number(state.width);
  legend();
}

function legend() {
  const head = state.overlay.startsWith("head") ? scan.heads[+state.overlay.slice(4)] : null;
  const colours = head ? HEAT : state.overlay === "similarity" && state.token ? COOL : null;
  $("scale").hidden = $("ends").hidden = !colours;
  const ends = head ? head.range.map((v) => v.toFixed(2) + " x mean") : colours ? [state.low.toFixed(2), "1.00"] : ["", ""];
  if (colours) $("scale").style.background = `linear-gradient(to right, ${colours.map((c) => `rgb(${c})`).join(",")})`;
  ends.forEach((text, i) => ($("ends").children[i].textContent = text));
  $("hint").textContent = state.overlay === "pca" ? "Like colours are like tokens: their first three principal components."
    : head ? "How much the class token of the last block looks at each token, against the mean."
    : state.overlay !== "similarity" ? ""
    : !state.token ? "Click a place in the scan."
    : `Cosine of the tokens, from ${scan.rank} dimensions (${(100 * scan.share).toFixed(1)}% of their length), within ${scan.error.toFixed(3)}.`;
}

const axes = (list) => (scan.flat ? list.slice(1) : list);
const number = (v) => (Number.isInteger(v) ? String(v) : Math.abs(v) >= 100 ? v.toFixed(0) : v.toPrecision(4));

// ---- hands --------------------------------------------------------------------------------------------------------

function scroll(p, by) {
  state.at[p] = Math.min(Math.max(state.at[p] + by, 0), scan.shape[p] - 1);
  draw();
}

function select(key) {
  if (key !== "similarity") state.before = key;
  state.overlay = key;
  if (key === "similarity" && !state.token) state.token = tokenAt(state.at);
  draw();
}

function ask() {
  if (!scan.tokens) return draw();
  state.token = tokenAt(state.at);
  select("similarity");
}

function listen(canvas, p) {
  let from = null;
  canvas.onfocus = () => (state.plane = p);
  canvas.onwheel = (e) => { e.preventDefault(); scroll(p, e.deltaY > 0 ? -1 : 1); };
  canvas.onpointerdown = (e) => {
    canvas.setPointerCapture(e.pointerId);
    from = { x: e.clientX, y: e.clientY, centre: state.centre, width: state.width, moved: false };
  };
  canvas.onpointermove = (e) => {
    if (!from) return;
    const dx = e.clientX - from.x, dy = e.clientY - from.y;
    if (!from.moved && Math.hypot(dx, dy) < 4) return;
    from.moved = true;
    state.width = Math.max(scan.least ?? scan.slope, from.width * Math.exp(dx / 200));
    state.centre = from.centre - (dy / 300) * from.width;
    draw();
  };
  canvas.onpointerup = (e) => {
    if (from && !from.moved) {
      const box = canvas.getBoundingClientRect(), { across, up } = PLANES[p];
      for (const [axis, share] of [[across, (e.clientX - box.left) / box.width], [up, (e.clientY - box.top) / box.height]]) {
        const n = scan.shape[axis], v = Math.min(Math.max(Math.floor(share * n), 0), n - 1);
        state.at[axis] = scan.flat ? v : n - 1 - v;
      }
      ask();
    }
    from = null;
  };
}

document.addEventListener("keydown", (e) => {
  if (!scan || e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT|BUTTON)$/.test(e.target.tagName)) return;
  const keys = overlays().map(([key]) => key), now = keys.indexOf(state.overlay), near = 0.05;
  const moves = {
    ArrowUp: () => scroll(state.plane, 1), ArrowDown: () => scroll(state.plane, -1),
    PageUp: () => scroll(state.plane, 10), PageDown: () => scroll(state.plane, -10),
    Home: () => scroll(state.plane, -1e9), End: () => scroll(state.plane, 1e9),
    w: () => { state.width /= 1.1; draw(); }, W: () => { state.width *= 1.1; draw(); },
    l: () => { state.centre -= near * state.width; draw(); }, L: () => { state.centre += near * state.width; draw(); },
    r: () => { [state.centre, state.width] = scan.window; draw(); },
    o: () => select(keys[(now + 1) % keys.length]), O: () => select(keys[(now + keys.length - 1) % keys.length]),
    "[": () => { state.opacity = Math.max(0, state.opacity - near); draw(); },
    "]": () => { state.opacity = Math.min(1, state.opacity + near); draw(); },
    n: () => { const next = data.scans.findIndex((s, i) => s && i > state.scan); open(next < 0 ? data.scans.findIndex((s) => s) : next); },
    Enter: ask, Escape: () => { state.token = null; select(state.before); },
    1: () => canvases[0].canvas.focus(), 2: () => canvases[1]?.canvas.focus(), 3: () => canvases[2]?.canvas.focus(),
  };
  if (!moves[e.key]) return;
  e.preventDefault();
  moves[e.key]();
});

$("overlay").onchange = (e) => select(e.target.value);
$("sequence").onchange = (e) => sequence(e.target.value);
$("opacity").oninput = (e) => { state.opacity = e.target.value / 100; draw(); };
$("centre").onchange = (e) => { if (e.target.value !== "") state.centre = +e.target.value; draw(); };
$("width").onchange = (e) => { if (+e.target.value > 0) state.width = +e.target.value; draw(); };
let resizing = 0;
window.addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => scan && (build(), draw()), 150); });
$("scans").onchange = (e) => open(+e.target.value);
$("series").onchange = curve;
