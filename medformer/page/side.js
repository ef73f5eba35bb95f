// What stands beside the planes: the answer, the cases, the scan's facts, the training.

function element(kind, text, into) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (into) into.append(made);
  return made;
}

function fill() {
  $("overlay").closest("section").hidden = overlays().length < 2;
  $("overlay").replaceChildren(...overlays().map(([key, title]) => new Option(title, key)));
  const kept = data.scans.map((s, i) => [s, i]).filter(([s]) => s);
  $("scans").replaceChildren(...kept.map(([s, i]) => new Option(s.name, i, false, i === state.scan)));
  $("scans").hidden = kept.length < 2;
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
    if (scan.answer.value !== undefined) {
      const error = scan.answer.error == null ? "" : ` \u00b1 ${scan.answer.error.toPrecision(2)}`;
      element("p", `${scan.answer.name}: ${number(scan.answer.value)}${error}`, bars).className = "value";
      if (error) element("p", "\u00b1: mean error on held-out cases, the expected one.", bars).className = "soft";
      if (scan.answer.worse) element("p", "R2 is not above 0: always saying the mean of training would do as well.", bars).className = "warning";
    }
    (scan.answer.structures || []).forEach((part, i) => {
      const row = element("div", undefined, bars), chip = element("i", undefined, row);
      row.className = "structure";
      chip.style.background = `rgb(${LABELS[i % LABELS.length]})`;
      element("span", part.name, row);
      element("b", part.ml == null ? `${part.voxels} ${scan.flat ? "pixels" : "voxels"}` : `${number(part.ml)} ml`, row);
      element("span", part.dice == null ? "" : `Dice ${part.dice.toFixed(2)}`, row).className = "soft";
    });
    if (scan.save) element("button", "save the mask (.nii)", bars).onclick = scan.save;
    for (const [name, share, score] of scan.answer.classes) {
      const bar = element("div", undefined, bars);
      bar.className = "bar";
      element("span", name, bar);
      element("b", (100 * share).toFixed(1) + "%", bar);
      element("em", score == null ? "" : `${scan.answer.metric} ${score.toFixed(2)}`, bar).className = "soft";
      const track = element("div", undefined, bar);
      track.className = "track";
      element("i", undefined, track).style.width = 100 * share + "%";
    }
    for (const warning of scan.answer.warnings) element("p", "Unlike training: " + warning, bars).className = "warning";
    const held = scan.answer.scores ? `On ${scan.answer.cases} held-out cases: ${scan.answer.scores}. ` : "";
    const what = scan.answer.classes.length ? (scan.answer.kind === "classes" ? "Shares, uncalibrated" : "Each label for itself, uncalibrated") : "Research only";
    element("p", `${held}${what}; no diagnosis.`, bars).className = "soft";
  }
  $("near").hidden = !scan.nearest.length;
  $("near").firstElementChild.textContent = data.near;
  $("nearest").replaceChildren();
  for (const near of scan.nearest) {
    const figure = element("figure", undefined, $("nearest")), image = element("img", undefined, figure);
    image.src = near.picture;
    image.alt = near.name;
    const caption = element("figcaption", `${near.similarity.toFixed(3)} ${near.name.replaceAll("_", "_\u200b")}`, figure);
    if (near.label) element("b", near.label, caption);
  }
  $("about").replaceChildren();
  const rows = [
    ["size", (scan.flat ? `${axes(scan.full).join(" x ")} pixels (yx)` : `${scan.full.join(" x ")} voxels (zyx)`) + (String(scan.full) === String(scan.shape) ? "" : `, shown as ${axes(scan.shape).join(" x ")}`)],
    ...(scan.measured ? [["spacing", axes(scan.spacing).map((v) => number(v)).join(" x ") + " mm"]] : []),
    ...(!scan.tokens ? [] : [["tokens", `${axes(scan.grid).join(" x ")} of ${axes(scan.kernel).join(" x ")} ${scan.flat ? "pixels" : "voxels"}, every ${axes(scan.stride).join(" x ")}`]]),
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
  const { width: w, height: h } = canvas, left = 84, bottom = 34, top = 14;
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

