// Several scans as a table, and a page that takes them (--serve).

const KEPT = 20; // scans whose voxels stay in memory

// What a scan's answer says, as columns and cells.
function cells(answer) {
  if (!answer) return [];
  const digits = (v) => (v == null ? "" : +v.toPrecision(4));
  if (answer.value !== undefined) return [[answer.name, digits(answer.value)], ["expected error", digits(answer.error)]];
  if (answer.structures) return answer.structures.map((s) => (s.ml == null ? [`${s.name}, voxels`, s.voxels] : [`${s.name}, ml`, digits(s.ml)]));
  const shares = answer.classes.map(([name, share]) => [`${name}, %`, +(100 * share).toFixed(1)]);
  return answer.kind === "classes" ? [["prediction", answer.classes[0][0]], ...shares.sort()] : shares.sort();
}

const rows = data.scans.map((s, i) => ({ name: s.name, scan: i, cells: cells(s.answer), warnings: s.answer ? s.answer.warnings : [] }));

function tabulate() {
  const shown = rows.length > 1, table = $("table"), columns = [...new Set(rows.flatMap((row) => row.cells.map(([name]) => name)))];
  const before = table.offsetHeight;
  table.hidden = !shown;
  if (!shown) return;
  const head = $("rows").tHead, body = $("rows").tBodies[0], warned = rows.some((row) => row.problem || row.warnings.length);
  head.replaceChildren();
  body.replaceChildren();
  const top = element("tr", undefined, head);
  for (const title of ["scan", ...columns, ...(warned ? ["unlike training, or why not"] : [])]) element("th", title, top);
  for (const row of rows) {
    const line = element("tr", undefined, body), name = element("td", undefined, line), held = new Map(row.cells);
    if (row.scan !== undefined && data.scans[row.scan]) {
      const link = element("button", row.name, name);
      link.onclick = () => open(row.scan);
      line.className = row.scan === state.scan ? "now" : "";
    } else name.textContent = row.name;
    for (const column of columns) element("td", held.has(column) ? held.get(column) : row.waits || "", line).className = "number";
    if (warned) element("td", row.problem || row.warnings.join("; "), line).className = row.problem ? "problem" : "warning";
  }
  const done = rows.filter((row) => row.scan !== undefined).length, failed = rows.filter((row) => row.problem).length;
  const held = scan && scan.answer && scan.answer.scores ? `; on ${scan.answer.cases} held-out cases: ${scan.answer.scores}` : "";
  $("count").textContent = `${done} of ${rows.length} scans answered${failed ? `, ${failed} cannot be` : ""}${held}`;
  if (scan && table.offsetHeight !== before) { build(); draw(); }
}

$("save").onclick = () => {
  const columns = [...new Set(rows.flatMap((row) => row.cells.map(([name]) => name)))];
  const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  const lines = [["scan", ...columns, "warnings", "problem"], ...rows.map((row) => {
    const held = new Map(row.cells);
    return [row.name, ...columns.map((c) => held.get(c)), row.warnings.join("; "), row.problem];
  })];
  download(new Blob([lines.map((line) => line.map(quoted).join(",") + "\n").join("")], { type: "text/csv" }), "answers.csv");
};

function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// What the server, or with medformer export --format web the browser itself, says of a file.
async function asked(file) {
  if (data.demo) return answerOf(file);
  if (file.size > data.limit) throw new Error(`${file.name}: ${file.size} bytes, at most ${data.limit} are taken`);
  const headers = { "X-Medformer": data.serve, "X-Name": encodeURIComponent(file.name) };
  const answer = await fetch("/scan", { method: "POST", body: file, headers });
  if (!answer.ok) throw new Error((await answer.text()).slice(0, 500));
  return answer.json();
}

async function send(file, row) {
  try {
    const found = await asked(file);
    Object.assign(row, { scan: data.scans.push(found) - 1, name: found.name, cells: cells(found.answer), warnings: found.answer ? found.answer.warnings : [] });
    const spare = data.scans.length - 1 - KEPT;
    if (spare >= 0 && spare !== state.scan) data.scans[spare] = null;
  } catch (error) {
    row.problem = error.message;
  }
  delete row.waits;
}

let sending = Promise.resolve();
function take(files) { // one after the other, in the order given
  const fresh = [...files].map((file) => ({ file, row: { name: file.name, cells: [], warnings: [], waits: "\u2026" } }));
  rows.push(...fresh.map(({ row }) => row));
  tabulate();
  sending = sending.then(async () => {
    for (const { file, row } of fresh) {
      $("problem").textContent = `reading ${file.name} ...`;
      await send(file, row);
      if (row.scan !== undefined) await open(row.scan);
      tabulate();
    }
    const bad = fresh.filter(({ row }) => row.problem);
    $("problem").textContent = bad.length ? bad[0].row.problem + (bad.length > 1 ? `, and ${bad.length - 1} more` : "") : "";
  });
}

if (data.serve || data.demo) {
  $("drop").hidden = false;
  $("what").textContent = data.what;
  $("asks").hidden = !!data.demo;
  if (data.demo) $("stays").textContent = "The network runs in this page: nothing leaves this machine.";
  if (data.demo) $("kinds").textContent = data.flat ? "Drop pictures here: .png or .jpg." : "Drop scans here: .nii or .nii.gz.";
  else if (data.flat) $("kinds").textContent = "Drop pictures here: .png, .jpg, .tif, .bmp or a scan of one slice.";
  $("file").onchange = (e) => { take(e.target.files); e.target.value = ""; };
  for (const kind of ["dragover", "dragleave", "drop"])
    document.addEventListener(kind, (e) => {
      e.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(e.dataTransfer.files);
    });
}

$("model").textContent = `${data.checkpoint}: ${data.model}`;
$("training").hidden = !Object.keys(data.curves).length;
$("series").replaceChildren(...Object.keys(data.curves).map((name) => new Option(name.replaceAll("_", " "), name)));
curve();
tabulate();
if (data.scans.length) open(0);
else for (const card of ["answers", "near"]) $(card).hidden = true;
window.medformer = { state, data, open, get scan() { return scan; }, tokenAt, similarities };
