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
const PRESETS = [["soft tissue", 40, 400], ["lung", -600, 1500], ["bone", 400, 1800], ["brain", 40, 80]];
const LONGEST = 390; // pixels of the longest side of all planes

let scan = null; // the scan shown, unpacked
const state = { scan: 0, at: [0, 0, 0], plane: 0, centre: 0, width: 1, overlay: "", before: "none", opacity: 0.55, token: null };

async function unpack(text, Type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Type(await new Response(stream).arrayBuffer());
}

async function open(number) {
  const packed = data.scans[number];
  const next = { ...packed };
  next.voxels = await unpack(packed.voxels, Int16Array);
  next.colours = await unpack(packed.colours, Uint8Array);
  next.tokens = await unpack(packed.tokens, Int8Array);
  next.heads = await Promise.all(packed.heads.map(async (h) => ({ ...h, values: await unpack(h.values, Uint8Array) })));
  scan = next;
  Object.assign(state, { scan: number, at: scan.shape.map((n) => n >> 1), token: null, plane: 0 });
  [state.centre, state.width] = scan.window;
  const keep = overlays().some(([key]) => key === state.overlay && key !== "similarity");
  if (!keep) state.overlay = scan.heads.length ? "head" + (scan.heads.length - 1) : "pca";
  build();
  draw();
}

function overlays() {
  const heads = scan.heads.map((h, i) => ["head" + i, "attention, " + h.title]);
  return [["none", "nothing"], ...heads.reverse(), ["pca", "patch colours (PCA)"], ["similarity", "similarity to a token"]];
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

const canvases = [];
function build() {
  $("planes").replaceChildren();
  canvases.length = 0;
  const mm = scan.shape.map((n, a) => n * scan.spacing[a]);
  const perMm = (scan.flat ? 1.6 : 1) * LONGEST / Math.max(...mm.slice(scan.flat ? 1 : 0));
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
  const value = scan.voxels[index] * scan.slope + scan.middle, token = tokenAt(state.at);
  let text = `voxel ${state.at.join(", ")} (zyx): ${number(value)} ${scan.units}; token ${token.join(", ")} of ${scan.grid.join(" x ")}`;
  if (state.token && state.overlay === "similarity" && painter())
    text += `; similarity to token ${state.token.join(", ")}: ${state.similar[flat(token)].toFixed(3)}`;
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
  $("hint").textContent = state.overlay !== "similarity" ? ""
    : !state.token ? "Click a place in the scan."
    : `Cosine of the tokens, from ${scan.rank} dimensions (${(100 * scan.share).toFixed(1)}% of their length), within ${scan.error.toFixed(3)}.`;
}

const number = (v) => (Number.isInteger(v) ? String(v) : Math.abs(v) >= 100 ? v.toFixed(0) : v.toPrecision(4));

// ---- the side -----------------------------------------------------------------------------------------------------

function element(kind, text, into) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (into) into.append(made);
  return made;
}

function fill() {
  $("overlay").replaceChildren(...overlays().map(([key, title]) => new Option(title, key)));
  $("scans").replaceChildren(...data.scans.map((s, i) => new Option(s.name, i, false, i === state.scan)));
  $("scans").hidden = data.scans.length < 2;
  $("name").textContent = scan.name;
  $("units").textContent = scan.units;
  $("presets").replaceChildren();
  if (scan.units === "HU")
    for (const [title, centre, width] of PRESETS) {
      const button = element("button", title, $("presets"));
      button.onclick = () => { Object.assign(state, { centre, width }); draw(); };
    }
  const [title, bars] = $("answers").children;
  $("answers").hidden = !scan.answer;
  bars.replaceChildren();
  if (scan.answer) {
    title.textContent = "Answer: " + scan.answer.task;
    for (const [name, share] of scan.answer.classes) {
      const bar = element("div", undefined, bars), label = element("span", name, bar), fillIn = element("i", undefined, bar);
      bar.className = "bar";
      label.title = name;
      fillIn.style.width = 100 * share + "%";
      element("b", (100 * share).toFixed(1) + "%", bar);
    }
    const top = scan.answer.kind === "classes" ? "Shares of one linear probe, uncalibrated; no diagnosis." : "Each label for itself, uncalibrated; no diagnosis.";
    element("p", top, bars).className = "soft";
  }
  $("near").hidden = !scan.nearest.length;
  $("nearest").replaceChildren();
  for (const near of scan.nearest) {
    const figure = element("figure", undefined, $("nearest")), image = element("img", undefined, figure);
    image.src = near.picture;
    image.alt = near.name;
    element("figcaption", `${near.similarity.toFixed(3)} ${near.name}`, figure);
  }
  $("about").replaceChildren();
  const rows = [
    ["size", `${scan.full.join(" x ")} voxels (zyx)` + (String(scan.full) === String(scan.shape) ? "" : `, shown as ${scan.shape.join(" x ")}`)],
    ["spacing", scan.spacing.map((v) => number(v)).join(" x ") + " mm"],
    ["tokens", `${scan.grid.join(" x ")} of ${scan.kernel.join(" x ")} voxels, every ${scan.stride.join(" x ")}`],
    ...(scan.modality && scan.modality !== "unknown" ? [["modality", scan.modality]] : []),
    ...scan.notes.map((note) => ["note", note]), ...data.facts.map((fact) => ["", fact]),
  ];
  for (const [name, text] of rows) {
    element("dt", name, $("about"));
    element("dd", text, $("about"));
  }
}

function curve() {
  const points = data.curves[$("series").value] || [], canvas = $("curve"), context = canvas.getContext("2d");
  const { width: w, height: h } = canvas, left = 70, bottom = 34, top = 14;
  context.clearRect(0, 0, w, h);
  if (!points.length) return;
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const x = (v) => left + ((v - x0) / Math.max(x1 - x0, 1e-9)) * (w - left - 12);
  const y = (v) => h - bottom - ((v - y0) / Math.max(y1 - y0, 1e-12)) * (h - bottom - top);
  context.font = "20px system-ui, sans-serif";
  context.fillStyle = "#a3adba";
  context.strokeStyle = "#333b47";
  context.textAlign = "right";
  for (const v of [y0, (y0 + y1) / 2, y1]) {
    context.fillText(v === 0 || Math.abs(v) >= 0.01 ? v.toPrecision(3) : v.toExponential(0), left - 8, y(v) + 6);
    context.beginPath();
    context.moveTo(left, y(v));
    context.lineTo(w - 12, y(v));
    context.stroke();
  }
  context.fillText("step " + x1, w - 12, h - 8);
  context.textAlign = "left";
  context.fillText(String(x0), left, h - 8);
  context.strokeStyle = "#7cc4ff";
  context.lineWidth = 2.5;
  context.beginPath();
  points.forEach((p, i) => (i ? context.lineTo(x(p[0]), y(p[1])) : context.moveTo(x(p[0]), y(p[1]))));
  context.stroke();
}

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
    state.width = Math.max(scan.slope, from.width * Math.exp(dx / 200));
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
    n: () => open((state.scan + 1) % data.scans.length),
    Enter: ask, Escape: () => { state.token = null; select(state.before); },
    1: () => canvases[0].canvas.focus(), 2: () => canvases[1]?.canvas.focus(), 3: () => canvases[2]?.canvas.focus(),
  };
  if (!moves[e.key]) return;
  e.preventDefault();
  moves[e.key]();
});

$("overlay").onchange = (e) => select(e.target.value);
$("opacity").oninput = (e) => { state.opacity = e.target.value / 100; draw(); };
$("centre").onchange = (e) => { if (e.target.value !== "") state.centre = +e.target.value; draw(); };
$("width").onchange = (e) => { if (+e.target.value > 0) state.width = +e.target.value; draw(); };
$("scans").onchange = (e) => open(+e.target.value);
$("series").onchange = curve;

// ---- a page that takes scans (--serve) ------------------------------------------------------------------------------

async function send(file) {
  $("problem").textContent = `reading ${file.name} ...`;
  try {
    if (file.size > data.limit) throw new Error(`${file.name}: ${file.size} bytes, at most ${data.limit} are taken`);
    const headers = { "X-Medformer": data.serve, "X-Name": encodeURIComponent(file.name) };
    const answer = await fetch("/scan", { method: "POST", body: file, headers });
    if (!answer.ok) throw new Error((await answer.text()).slice(0, 500));
    data.scans.push(await answer.json());
    $("problem").textContent = "";
    await open(data.scans.length - 1);
  } catch (error) {
    $("problem").textContent = error.message;
  }
}

if (data.serve) {
  $("drop").hidden = false;
  $("file").onchange = (e) => e.target.files.length && send(e.target.files[0]);
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, (e) => {
      e.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop" && e.dataTransfer.files.length) send(e.dataTransfer.files[0]);
    });
}

$("model").textContent = `${data.checkpoint}: ${data.model}`;
$("training").hidden = !Object.keys(data.curves).length;
$("series").replaceChildren(...Object.keys(data.curves).map((name) => new Option(name.replaceAll("_", " "), name)));
curve();
if (data.scans.length) open(0);
else for (const card of ["answers", "near"]) $(card).hidden = true;
window.medformer = { state, data, open, get scan() { return scan; }, tokenAt, similarities };
