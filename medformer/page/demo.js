// Reading a file, the network and its answer inside the browser: what medformer.data and medformer.predict do in Python.

const AIR = -2, TAIL = 0.125, LUMA = [19595, 38470, 7471];
const about = data.demo, model = {};
const pause = () => new Promise((done) => setTimeout(done));

async function part(id) {
  return unpack($(id).textContent.trim(), Uint8Array);
}

async function load() {
  if (model.session) return;
  $("problem").textContent = "loading the network ...";
  await pause();
  const script = URL.createObjectURL(new Blob([await part("runtime")], { type: "text/javascript" }));
  model.ort = await import(script);
  URL.revokeObjectURL(script);
  model.ort.env.wasm.wasmBinary = (await part("wasm")).buffer;
  model.ort.env.wasm.numThreads = 1;
  model.session = await model.ort.InferenceSession.create(await part("network"), { executionProviders: ["wasm"] });
}

async function run(values, size) {
  const name = model.session.inputNames[0], tensor = new model.ort.Tensor("float32", values, [1, 1, ...size.slice(3 - about.dims)]);
  return (await model.session.run({ [name]: tensor }))[model.session.outputNames[0]].data;
}

// ---- reading --------------------------------------------------------------------------------------------------------

async function inflated(bytes, how) {
  try {
    return new Uint8Array(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream(how))).arrayBuffer());
  } catch {
    throw new Error("cut off or damaged; copy the file again");
  }
}

async function picture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    throw new Error("no picture that this browser can read; save it as PNG");
  }
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  const pixels = canvas.getContext("2d").getImageData(0, 0, bitmap.width, bitmap.height).data;
  const voxels = new Float32Array(bitmap.width * bitmap.height);
  for (let i = 0, p = 0; i < voxels.length; i++, p += 4) voxels[i] = (LUMA[0] * pixels[p] + LUMA[1] * pixels[p + 1] + LUMA[2] * pixels[p + 2] + 32768) >> 16;
  return { voxels, shape: [1, bitmap.height, bitmap.width], spacing: [1, 1, 1], place: "none", hu: false, notes: ["read by the browser, which cuts pixels to 8 bits"] };
}

const TYPES = { 2: ["Uint8", 1], 4: ["Int16", 2], 8: ["Int32", 4], 16: ["Float32", 4], 64: ["Float64", 8], 256: ["Int8", 1], 512: ["Uint16", 2], 768: ["Uint32", 4] };

async function nifti(file) {
  let bytes = new Uint8Array(await file.arrayBuffer());
  if (bytes[0] === 0x1f && bytes[1] === 0x8b) bytes = await inflated(bytes, "gzip");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const magic = String.fromCharCode(...bytes.subarray(344, 347));
  if (bytes.length < 352 || magic !== "n+1") throw new Error("no NIfTI-1 file (.nii or .nii.gz); others are read by medformer predict");
  const little = view.getInt32(0, true) === 348, i16 = (at) => view.getInt16(at, little), f32 = (at) => view.getFloat32(at, little);
  const dims = [...Array(8).keys()].map((i) => i16(40 + 2 * i)), size = [1, 2, 3].map((i) => (i <= dims[0] ? dims[i] : 1));
  if (dims[0] < 3 || size.some((n) => n < 1) || dims.slice(4, dims[0] + 1).some((n) => n !== 1)) throw new Error(`dimensions ${dims.slice(1, dims[0] + 1)}: one 3D scan is taken`);
  if (!TYPES[i16(70)]) throw new Error(`voxels of type ${i16(70)}, which is not taken here; medformer predict may`);
  const [type, wide] = TYPES[i16(70)], count = size[0] * size[1] * size[2], start = Math.max(352, f32(108)), get = `get${type}`;
  if (start + count * wide > bytes.length) throw new Error("cut off; copy the file again");
  let slope = f32(112), add = f32(116);
  if (!slope || Number.isNaN(slope)) [slope, add] = [1, 0];
  const voxels = new Float32Array(count);
  for (let i = 0, at = start; i < count; i++, at += wide) voxels[i] = view[get](at, little) * slope + add;
  if (voxels.some((v) => !Number.isFinite(v))) throw new Error("voxels are NaN or infinite, all must be finite; replace them first");
  const affine = place(i16, f32), unit = { 1: 1000, 3: 1e-3 }[bytes[123] & 7] || 1;
  const scan = canonical(voxels, size, affine.map((row) => row.map((v) => v * unit)));
  const kept = own(bytes, view, little, start);
  scan.place = kept.geometry || (i16(252) > 0 || i16(254) > 0 ? "patient" : "spacing");
  scan.hu = kept.units ? kept.units === "HU" : inHu(voxels);
  scan.notes = [];
  if (kept.valid) scan.notes.push("its mask of padding is not read here");
  scan.header = bytes.slice(0, 348);
  scan.little = little;
  return scan;
}

// What Volume.save left in the header.
function own(bytes, view, little, start) {
  const mark = "medformer 1 ";
  if (bytes[348] !== 1 || start < 368 || view.getInt32(356, little) !== 6) return {};
  const text = new TextDecoder().decode(bytes.subarray(360, 352 + view.getInt32(352, little))).replace(/\0+$/, "");
  try {
    return text.startsWith(mark) ? JSON.parse(text.slice(mark.length)) : {};
  } catch {
    return {};
  }
}

// Rows of the affine, x y z and origin: sform, else qform, else the sizes alone.
function place(i16, f32) {
  if (i16(254) > 0) return [280, 296, 312].map((at) => [0, 4, 8, 12].map((more) => f32(at + more)));
  const size = [80, 84, 88].map((at) => Math.abs(f32(at)) || 1);
  if (i16(252) <= 0) return [0, 1, 2].map((i) => [...[0, 1, 2].map((j) => (i === j ? size[i] : 0)), 0]);
  const [b, c, d] = [256, 260, 264].map(f32), a = Math.sqrt(Math.max(0, 1 - b * b - c * c - d * d)), flip = f32(76) < 0 ? -1 : 1;
  const turn = [
    [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
    [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
    [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
  ];
  return turn.map((row, i) => [row[0] * size[0], row[1] * size[1], row[2] * size[2] * flip, f32(268 + 4 * i)]);
}

const ORDERS = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

// Axes flipped and swapped to run closest to right, front and head; `from` finds a voxel of the file again.
function canonical(voxels, size, affine) {
  const lengths = [0, 1, 2].map((j) => Math.hypot(affine[0][j], affine[1][j], affine[2][j]));
  if (!lengths.every((mm) => mm > 1e-3 && mm < 1e4)) throw new Error("the header gives voxels no size; fix its sform or qform");
  const cosine = (i, j) => affine[i][j] / lengths[j], fit = (o) => +o.reduce((sum, j, i) => sum + Math.abs(cosine(i, j)), 0).toFixed(9);
  const order = ORDERS.reduce((best, o) => (fit(o) > fit(best) ? o : best)), flips = order.map((j, i) => cosine(i, j) < 0);
  const step = [1, size[0], size[0] * size[1]], [x, y, z] = order.map((j) => size[j]);
  const strides = order.map((j, i) => (flips[i] ? -step[j] : step[j])), first = order.reduce((sum, j, i) => sum + (flips[i] ? (size[j] - 1) * step[j] : 0), 0);
  const from = new Uint32Array(voxels.length), out = new Float32Array(voxels.length);
  for (let k = 0, o = 0; k < z; k++)
    for (let j = 0; j < y; j++)
      for (let i = 0; i < x; i++, o++) out[o] = voxels[(from[o] = first + k * strides[2] + j * strides[1] + i * strides[0])];
  const m = affine, det = m[0][0] * (m[1][1] * m[2][2] - m[1][2] * m[2][1]) - m[0][1] * (m[1][0] * m[2][2] - m[1][2] * m[2][0]) + m[0][2] * (m[1][0] * m[2][1] - m[1][1] * m[2][0]);
  return { voxels: out, shape: [z, y, x], spacing: [order[2], order[1], order[0]].map((j) => lengths[j]), ml: Math.abs(det) / 1000, from };
}

// ---- grey values ----------------------------------------------------------------------------------------------------

function percentile(sorted, share) {
  const at = (share / 100) * (sorted.length - 1), i = Math.floor(at);
  return sorted[i] + (at - i) * (sorted[Math.min(i + 1, sorted.length - 1)] - sorted[i]);
}

const every = (values, most) => { const step = Math.max(1, Math.floor(values.length / most)); return step === 1 ? values : values.filter((_, i) => i % step === 0); };
const share = (values, test) => values.reduce((n, v) => n + (test(v) ? 1 : 0), 0) / values.length;

function inHu(voxels) {
  const sample = every(voxels, 5e5), low = sample.reduce((a, b) => Math.min(a, b)), body = low < -1100 ? sample.filter((v) => v > low) : sample;
  if (body.length < 0.05 * sample.length || body.reduce((a, b) => Math.max(a, b)) > 32767) return false;
  return share(body, (v) => v < -1100) < 0.01 && share(body, (v) => v >= -1100 && v <= -700) > 0.005 && share(body, (v) => v >= -200 && v <= 300) > 0.05 && percentile(Float32Array.from(body).sort(), 99) <= 4000;
}

function scaling(scan) {
  if (scan.hu) return { low: -1000, high: 1000, mean: 0, scale: 500 };
  const sample = every(scan.voxels, 2e6), mean = sample.reduce((a, b) => a + b, 0) / sample.length, front = sample.filter((v) => v > mean).sort();
  if (!front.length) throw new Error("voxels are constant, contrast is needed to scale them");
  const low = percentile(Float32Array.from(sample).sort(), 0.5), high = percentile(front, 99.5);
  const clipped = Float64Array.from(front, (v) => Math.min(Math.max(v, low), high)), middle = clipped.reduce((a, b) => a + b, 0) / clipped.length;
  const spread = Math.sqrt(clipped.reduce((sum, v) => sum + (v - middle) ** 2, 0) / clipped.length);
  return { low, high, mean: middle, scale: Math.max(spread, (middle - low) / 2) };
}

function half(v) { // rounded as float16 is
  if (!v) return v;
  const step = 2 ** (Math.max(Math.floor(Math.log2(Math.abs(v))), -14) - 10);
  return even(v / step) * step;
}

function even(v) { // rounds halves to even, as Python does
  const low = Math.floor(v), rest = v - low;
  return rest > 0.5 || (rest === 0.5 && low % 2) ? low + 1 : low;
}

// Halved by means while twice as large or more, then linear; zyx.
function resized(values, shape, size) {
  if (String(shape) === String(size)) return values;
  for (let turn = 0; turn < 8; turn++) {
    const by = shape.map((n, a) => (n >= 2 * size[a] && n > 1 ? 2 : 1));
    if (!by.includes(2)) break;
    const to = shape.map((n, a) => Math.floor(n / by[a])), out = new Float32Array(to[0] * to[1] * to[2]), all = by[0] * by[1] * by[2];
    for (let z = 0, o = 0; z < to[0]; z++)
      for (let y = 0; y < to[1]; y++)
        for (let x = 0; x < to[2]; x++, o++) {
          let sum = 0;
          for (let c = 0; c < by[0]; c++) for (let b = 0; b < by[1]; b++) for (let a = 0; a < by[2]; a++) sum += values[((z * by[0] + c) * shape[1] + y * by[1] + b) * shape[2] + x * by[2] + a];
          out[o] = sum / all;
        }
    [values, shape] = [out, to];
  }
  for (const axis of [0, 1, 2]) {
    if (shape[axis] === size[axis]) continue;
    const to = shape.with(axis, size[axis]), out = new Float32Array(to[0] * to[1] * to[2]), inner = shape.slice(axis + 1).reduce((a, b) => a * b, 1), outer = shape.slice(0, axis).reduce((a, b) => a * b, 1);
    for (let i = 0; i < size[axis]; i++) {
      const at = Math.max(0, ((i + 0.5) * shape[axis]) / size[axis] - 0.5), a = Math.floor(at), b = Math.min(a + 1, shape[axis] - 1), w = at - a;
      for (let o = 0; o < outer; o++) for (let n = 0; n < inner; n++) out[(o * size[axis] + i) * inner + n] = (1 - w) * values[(o * shape[axis] + a) * inner + n] + w * values[(o * shape[axis] + b) * inner + n];
    }
    [values, shape] = [out, to];
  }
  return values.map(half);
}

// ---- the answer -----------------------------------------------------------------------------------------------------

function startsOf(size, window) {
  const count = Math.ceil((size - window) / Math.max(1, (1 - about.overlap) * window)) + 1;
  return [...Array(count).keys()].map((i) => even((i * (size - window)) / Math.max(1, count - 1)));
}

function weightOf(window) {
  const line = window.map((n) => [...Array(n).keys()].map((i) => Math.exp(-0.5 * ((i - (n - 1) / 2) / (TAIL * n)) ** 2)));
  const out = new Float32Array(window[0] * window[1] * window[2]);
  let o = 0;
  for (const a of line[0]) for (const b of line[1]) for (const c of line[2]) out[o++] = a * b * c;
  const most = out.reduce((a, b) => Math.max(a, b));
  return out.map((v) => Math.max(v / most, 1e-3));
}

// Labels of every voxel: windows blended, planes done as soon as no later window reaches them.
async function segment(scan, by, say) {
  const window = about.size.length === 2 ? [1, ...about.size] : about.size, shape = scan.shape, padded = shape.map((n, a) => Math.max(n, window[a]));
  const starts = padded.map((n, a) => startsOf(n, window[a])), weight = weightOf(window), outputs = about.names.length + 1, [deep, high, wide] = window;
  const plane = padded[1] * padded[2], ring = Array.from({ length: deep }, () => new Float32Array((outputs + 1) * plane)), labels = new Uint8Array(shape[0] * shape[1] * shape[2]);
  const finish = (z) => {
    const sums = ring[z % deep];
    for (let y = 0; y < shape[1]; y++)
      for (let x = 0; x < shape[2]; x++) {
        const at = y * padded[2] + x;
        let best = 0;
        for (let k = 1; k < outputs; k++) if (sums[k * plane + at] > sums[best * plane + at]) best = k;
        labels[(z * shape[1] + y) * shape[2] + x] = best;
      }
    sums.fill(0);
  };
  const all = starts[0].length * starts[1].length * starts[2].length, crop = new Float32Array(weight.length);
  let done = 0, count = 0;
  for (const z0 of starts[0]) {
    while (done < z0) finish(done++);
    for (const y0 of starts[1])
      for (const x0 of starts[2]) {
        crop.fill(AIR);
        for (let z = 0; z < Math.min(deep, shape[0] - z0); z++)
          for (let y = 0; y < Math.min(high, shape[1] - y0); y++)
            for (let x = 0; x < Math.min(wide, shape[2] - x0); x++)
              crop[(z * high + y) * wide + x] = (Math.min(Math.max(scan.voxels[((z0 + z) * shape[1] + y0 + y) * shape[2] + x0 + x], by.low), by.high) - by.mean) / by.scale;
        const found = await run(crop, window);
        for (let z = 0, i = 0; z < deep; z++) {
          const sums = ring[(z0 + z) % deep];
          for (let y = 0; y < high; y++)
            for (let x = 0; x < wide; x++, i++) {
              const at = (y0 + y) * padded[2] + x0 + x;
              for (let k = 0; k < outputs; k++) sums[k * plane + at] += found[k * weight.length + i] * weight[i];
            }
        }
        say(`window ${++count} of ${all}`);
        await pause();
      }
  }
  while (done < shape[0]) finish(done++);
  return labels;
}

function warningsOf(scan) {
  const mm = (list) => list.map((v) => +v.toPrecision(3)).join("x"), found = [], [low, middle, high] = about.spacing_mm;
  if (low && scan.place !== "none" && scan.spacing.some((s, a) => s < low[a] / 1.5 || s > high[a] * 1.5))
    found.push(`spacing ${mm(scan.spacing)} mm, in training ${mm(middle)} (${mm(low)} to ${mm(high)}); resample the scan`);
  const unit = scan.hu ? "HU" : "arbitrary";
  if (about.units.length && !about.units.includes(unit)) found.push(`values in ${unit} units, in training ${about.units.join(", ")}`);
  return found;
}

// What the page shows of one file, as page.py makes it of a scan.
async function answerOf(file) {
  const flatModel = about.dims === 2, isPicture = /\.(png|jpe?g|bmp|webp|gif|avif)$/i.test(file.name);
  if (flatModel !== isPicture) throw new Error(`${file.name}: the network takes ${flatModel ? "pictures, .png or .jpg" : "scans, .nii or .nii.gz"}`);
  try {
    const scan = await (isPicture ? picture(file) : nifti(file));
    if (!flatModel && scan.shape[0] === 1) throw new Error("one slice, but the network takes 3D scans");
    if (!isPicture && about.modalities.length === 1) scan.hu = about.units[0] === "HU" && about.modalities[0] === "CT";
    await load();
    const by = scaling(scan), say = (text) => ($("problem").textContent = `${file.name}: ${text}`);
    const answer = { task: about.task, kind: about.kind, scores: about.shown, cases: about.held_out, warnings: warningsOf(scan), classes: [], metric: "AUROC" };
    const shown = by.high - by.low, out = {
      name: file.name, notes: scan.notes, modality: scan.hu ? "CT" : "", units: scan.hu ? "HU" : "", flat: scan.shape[0] === 1, shape: scan.shape, full: scan.shape,
      spacing: scan.spacing, measured: scan.place !== "none", voxels: scan.voxels, slope: 1, middle: 0, least: shown / 1e4, window: scan.hu ? [40, 400] : [by.low + shown / 2, shown], heads: [], nearest: [], answer, mask: null,
    };
    if (about.kind === "segmentation") {
      out.mask = await segment(scan, by, say);
      const voxels = new Uint32Array(about.names.length + 1);
      for (const label of out.mask) voxels[label]++;
      answer.structures = about.names.map((name, i) => ({ name, voxels: voxels[i + 1], ml: scan.place === "patient" ? voxels[i + 1] * scan.ml : null, dice: about.each[i] ?? null }));
      if (scan.header) out.save = () => saved(scan, out.mask, file.name);
      return out;
    }
    say("computing");
    await pause();
    const normal = scan.voxels.map((v) => half((Math.min(Math.max(v, by.low), by.high) - by.mean) / by.scale));
    const size = flatModel ? [1, ...about.size] : about.size, found = Array.from(await run(resized(normal, scan.shape, size), size));
    if (about.kind === "regression") return Object.assign(answer, { name: about.names[0], value: found[0], error: about.mae, worse: about.worse }) && out;
    const most = Math.max(...found), parts = found.map((v) => (about.kind === "classes" ? Math.exp(v - most) : 1 / (1 + Math.exp(-v)))), sum = about.kind === "classes" ? parts.reduce((a, b) => a + b) : 1;
    answer.classes = about.names.map((name, i) => [name, parts[i] / sum, about.each[i] ?? null]).sort((a, b) => b[1] - a[1]);
    return out;
  } catch (error) {
    throw new Error(error.message.startsWith(file.name) ? error.message : `${file.name}: ${error.message}`);
  }
}

// The label map on the file's own grid, with its header.
function saved(scan, mask, name) {
  const file = new Uint8Array(352 + mask.length), view = new DataView(file.buffer);
  file.set(scan.header);
  view.setInt16(70, 2, scan.little);
  view.setInt16(72, 8, scan.little);
  for (const [at, value] of [[108, 352], [112, 1], [116, 0], [124, about.names.length], [128, 0]]) view.setFloat32(at, value, scan.little);
  mask.forEach((label, i) => (file[352 + scan.from[i]] = label));
  download(new Blob([file]), name.replace(/\.nii(\.gz)?$/, "") + "_labels.nii");
}
