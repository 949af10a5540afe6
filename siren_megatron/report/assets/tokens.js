// What SIREN selects: one recorded step at a time, under the two switches.
const records = read("records"), LEVELS = 10;
const recordBox = document.getElementById("record"), topP = document.getElementById("top-p"),
  peak = document.getElementById("peak"), selection = document.getElementById("selection"),
  positions = document.getElementById("positions"), responses = document.getElementById("responses");
let record, current = null;

const level = h => Math.min(LEVELS, Math.round(LEVELS * (h ?? 0) / records.scale));
const quoted = text => text === "" ? "(no text of its own)" : "“" + text.replaceAll("\n", "⏎") + "”";
const kind = () => topP.checked ? "top_p_entropy" : "entropy";
const percent = (part, whole) => (100 * part / (whole || 1)).toLocaleString("en", {maximumFractionDigits: 1}) + " %";
const sum = list => list.reduce((a, b) => a + b, 0);

function summarise() {
  const where = record.positions, all = sum(where.tokens);
  const chosen = sum(topP.checked ? where.peak : where.full_peak);
  const name = topP.checked ? (peak.checked ? "Both masks, as SIREN" : "Top-p mask alone")
    : peak.checked ? "Peak mask alone" : "No mask, as a naive entropy bonus";
  const tokens = peak.checked ? `${count(chosen)} of ${count(all)} tokens (${percent(chosen, all)})`
    : `all ${count(all)} tokens`;
  const mean = record.regularised[kind() + (peak.checked ? "_peaks" : "")];
  document.getElementById("summary").textContent = `${name}: the ${topP.checked ? "top-p" : "full"} entropy of ` +
    `${tokens} in ${count(where.responses)} responses; its mean is H̄ = ${number(mean)} nats.`;
}

// ---------------------------------------------------------------- entropy by position

function drawPositions() {
  const where = record.positions, bins = where.tokens.length;
  const name = kind(), cells = where.histograms[name + (peak.checked ? "_peaks" : "")];
  const everywhere = where.histograms[name], chosen = topP.checked ? where.peak : where.full_peak;
  let rows = 4, most = 1;
  for (let i = 0; i < everywhere.length; i += 3) rows = Math.max(rows, everywhere[i + 1] + 1);
  for (let i = 0; i < cells.length; i += 3) most = Math.max(most, cells[i + 2]);
  const wide = Math.max(300, positions.clientWidth - 24), left = 52, right = wide - 8;
  const top = 26, bottom = 206, barTop = 240, barBottom = 290, high = 322;
  const x = bin => left + bin / bins * (right - left), y = h => bottom - h / where.entropy_bin / rows * (bottom - top);
  const share = Math.max(0.05, ...chosen.map((n, i) => n / (where.tokens[i] || 1)));
  const svg = drawing("svg", {viewBox: `0 0 ${wide} ${high}`, height: high, role: "img", "aria-label":
    `Histogram of the ${topP.checked ? "top-p " : ""}entropy by position in the response` +
    (peak.checked ? ", of the tokens in the peak mask" : "") + "; the same numbers are in the table below"});
  const label = (text, at, height, anchor = "end", kindOf = "") =>
    svg.append(drawing("text", {x: at, y: height, "text-anchor": anchor, class: kindOf}, text));

  label((topP.checked ? "Top-p entropy" : "Entropy") + " (nats), " +
    (peak.checked ? "peak mask only" : "all tokens"), 4, 14, "start", "name");
  if (wide > 620) label("Shade: number of tokens. Line: mean of all tokens there.", right, 14);
  const span = rows * where.entropy_bin, unit = [0.25, 0.5, 1, 2].find(u => span / u <= 5) ?? 4;
  for (let h = 0; h <= span + 1e-9; h += unit) {
    svg.append(drawing("line", {class: h ? "grid-line" : "axis", x1: left, x2: right, y1: y(h), y2: y(h)}));
    label(number(h), left - 7, y(h) + 4);
  }
  // Counts span decades: the shade is logarithmic.
  for (let i = 0; i < cells.length; i += 3) {
    svg.append(drawing("rect", {class: "cell", x: x(cells[i]).toFixed(1), width: ((right - left) / bins + .3).toFixed(1),
      y: y((cells[i + 1] + 1) * where.entropy_bin).toFixed(1), height: ((bottom - top) / rows + .3).toFixed(1),
      "fill-opacity": (0.12 + 0.88 * Math.log1p(cells[i + 2]) / Math.log1p(most)).toFixed(2)}));
  }
  const line = where[name].map((h, i) => h === null ? "" : `${x(i + .5).toFixed(1)},${y(h).toFixed(1)}`).join(" ");
  svg.append(drawing("polyline", {class: "mean back", points: line}), drawing("polyline", {class: "mean", points: line}));

  label("Share in the peak mask", 4, barTop - 11, "start", "name");
  label(percent(share, 1), left - 7, barTop + 6);
  label("0", left - 7, barBottom + 3);
  chosen.forEach((n, i) => {
    const height = n / (where.tokens[i] || 1) / share * (barBottom - barTop);
    svg.append(drawing("rect", {class: "bar", x: (x(i) + .7).toFixed(1), y: (barBottom - height).toFixed(1),
      width: Math.max(.8, (right - left) / bins - 1.4).toFixed(1), height: height.toFixed(1),
      "fill-opacity": (0.35 + 0.65 * Math.sqrt(where.tokens[i] / Math.max(...where.tokens))).toFixed(2)}));
  });
  svg.append(drawing("line", {class: "axis", x1: left, x2: right, y1: barBottom, y2: barBottom}));
  const each = Math.max(1, Math.ceil(bins / Math.max(2, Math.floor((right - left) / 70))));
  for (let bin = 0; bin < bins; bin += each) label(count(bin * where.width + 1), x(bin + .5), barBottom + 15, "middle");
  label("position in the response (tokens)", right, high - 3);

  const place = bin => where.width === 1 ? "position " + count(bin + 1)
    : `positions ${count(bin * where.width + 1)} to ${count((bin + 1) * where.width)}`;
  svg.addEventListener("pointerleave", hideTip);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const bin = Math.floor(((event.clientX - box.left) * wide / box.width - left) / (right - left) * bins);
    if (bin < 0 || bin >= bins) return hideTip();
    showTip(event.clientX, event.clientY, [element("div", {class: "head"}, place(bin)),
      row("tokens", count(where.tokens[bin])), row("mean entropy", number(where.entropy[bin]) + " nats"),
      row("mean top-p entropy", number(where.top_p_entropy[bin]) + " nats"),
      row("in the peak mask", `${count(chosen[bin])} (${percent(chosen[bin], where.tokens[bin])})`)]);
  });
  positions.replaceChildren(svg);

  const heads = ["Positions", "Tokens", "Mean entropy (nats)", "Mean top-p entropy (nats)", "In the peak mask"];
  const body = element("tbody");
  where.tokens.forEach((tokens, i) => body.append(element("tr", {},
    element("th", {scope: "row"}, place(i).replace(/^positions? /, "")),
    ...[count(tokens), number(where.entropy[i]), number(where.top_p_entropy[i]),
      `${count(chosen[i])} (${percent(chosen[i], tokens)})`].map(text => element("td", {}, text)))));
  document.getElementById("positions-table").replaceChildren(
    element("thead", {}, element("tr", {}, ...heads.map(head => element("th", {scope: "col"}, head)))), body);
}

function listOften() {
  const chips = record.often[kind()].map(([text, chosen, all]) => element("li", {},
    element("code", {}, quoted(text)), element("span", {class: "muted"}, ` ${count(chosen)} of ${count(all)}`)));
  document.getElementById("often").replaceChildren(
    element("h3", {}, "Tokens that stand most often in the peak mask"), element("ul", {class: "often"}, ...chips));
}

// ---------------------------------------------------------------- responses

function tokenElements(response) {
  const inPeak = new Set(response.peak), inFullPeak = new Set(response.full_peak);
  return response.tokens.map((text, i) => {
    const classes = ["t", "e" + level(response.entropy[i]), "p" + level(response.top_p_entropy[i])];
    if (inPeak.has(i)) classes.push("k");
    if (inFullPeak.has(i)) classes.push("f");
    if (text === "") classes.push("part");
    if (text.includes("\n")) classes.push("nl");
    return element("span", {class: classes.join(" ")}, text);
  });
}

const drawn = new WeakMap();  // element of a response -> its record

function responseRow(response, promptNumber, responseNumber) {
  const text = element("div", {class: "response", tabindex: "0", role: "group", "aria-label":
    `Response ${responseNumber} to prompt ${promptNumber}: reward ${number(response.reward)}; ` +
    "the arrow keys go through its tokens"}, ...tokenElements(response));
  drawn.set(text, response);
  const cell = element("td", {role: "cell"}, text), rest = response.length - response.tokens.length;
  if (rest > 0) cell.append(element("p", {class: "muted note"}, `… and ${count(rest)} more tokens`));
  if (response.truncated) cell.append(element("p", {class: "muted note"}, "cut at the token budget"));
  const figures = [["reward", number(response.reward)], ["advantage", number(response.advantage)],
    ["tokens", count(response.length)]];
  return element("tr", {role: "row"}, ...figures.map(([name, value]) =>
    element("td", {role: "cell", class: "number", "data-name": name}, value)), cell);
}

function drawResponses() {
  current = null;
  responses.replaceChildren(...record.prompts.map((prompt, p) => {
    const heads = ["Reward", "Advantage", "Tokens", "Response"];
    const table = element("table", {role: "table", "aria-label": `Responses to prompt ${p + 1}`},
      element("thead", {role: "rowgroup"}, element("tr", {role: "row"}, ...heads.map((head, i) =>
        element("th", {scope: "col", role: "columnheader", class: i < 3 ? "number" : ""}, head)))),
      element("tbody", {role: "rowgroup"}, ...prompt.responses.map((r, i) => responseRow(r, p + 1, i + 1))));
    const asked = element("div", {class: "asked"}, prompt.prompt);
    if (prompt.prompt.length > 600) asked.setAttribute("tabindex", "0");  // it scrolls
    const parts = [element("h4", {}, `Prompt ${p + 1}`), asked];
    if (prompt.answer !== null && prompt.answer !== prompt.prompt) {
      parts.push(element("p", {class: "answer"}, element("span", {class: "muted"}, "Answer: "), prompt.answer));
    }
    return element("article", {class: "card prompt"}, ...parts, table);
  }));
}

function shareBar(share) {
  const bar = element("i");
  bar.style.width = 100 * share + "%";
  return element("span", {class: "share", "aria-hidden": "true"}, bar);
}

function describe(response, i) {
  const yes = (topP.checked ? response.peak : response.full_peak).includes(i);
  const size = response.nucleus[i], likeliest = element("div", {class: "likeliest"});
  const flat = response.likeliest[i];
  for (let j = 0; j < flat.length; j += 2) {
    const out = topP.checked && size !== null && j / 2 >= size;
    likeliest.append(element("div", {class: out ? "row out" : "row"},
      element("code", {}, quoted(record.texts[flat[j]])), element("span", {},
        shareBar(flat[j + 1]), number(flat[j + 1]))));
  }
  const logprob = response.logprob[i];
  return [element("div", {class: "head"}, element("code", {}, quoted(response.tokens[i])), ` at position ${count(i + 1)}`),
    row("entropy", number(response.entropy[i]) + " nats"), row("top-p entropy", number(response.top_p_entropy[i]) + " nats"),
    row("nucleus", size === null ? `more than ${records.top_tokens} tokens` : size === 1 ? "1 token" : size + " tokens"),
    row("in the peak mask", yes ? "yes" : "no"),
    row("log-prob", `${number(logprob)} (p = ${logprob === null ? "–" : number(Number(Math.exp(logprob).toPrecision(3)))})`),
    row("advantage", number(response.advantage)), likeliest];
}

function point(token, x, y) {
  current?.classList.remove("now");
  current = token;
  if (token === null) return hideTip();
  token.classList.add("now");
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
  const response = drawn.get(token.parentElement);
  showTip(x ?? box.left, y ?? box.bottom, describe(response, [...token.parentElement.children].indexOf(token)));
}

responses.addEventListener("pointermove", event => {
  const token = event.target.closest(".t");
  if (token || current) point(token, event.clientX, event.clientY);
});
responses.addEventListener("pointerleave", () => point(null));
responses.addEventListener("click", event => {
  const token = event.target.closest(".t");
  if (token) point(token, event.clientX, event.clientY);
});
responses.addEventListener("focusout", () => point(null));
responses.addEventListener("keydown", event => {
  const group = event.target.closest(".response");
  if (!group) return;
  const tokens = group.children, at = current?.parentElement === group ? [...tokens].indexOf(current) : -1;
  const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1}[event.key];
  if (event.key === "Escape") return point(null);
  if (to === undefined) return;
  event.preventDefault();
  const token = tokens[Math.max(0, Math.min(to, tokens.length - 1))];
  token.scrollIntoView({block: "nearest"});
  point(token);
  sayTip();
});

// ---------------------------------------------------------------- switches

function applySwitches() {
  selection.classList.toggle("top-p", topP.checked);
  selection.classList.toggle("full", !topP.checked);
  selection.classList.toggle("peaks", peak.checked);
  point(null);
  summarise();
  drawPositions();
  listOften();
}

function showRecord(index) {
  record = read("record-" + index);
  document.getElementById("p0").textContent = `p₀ = ${number(record.top_p)}`;
  document.getElementById("quantile").textContent = `quantile ${number(record.peak_quantile)}`;
  drawResponses();
  applySwitches();
}

records.list.forEach((name, i) => recordBox.append(element("option", {value: i}, name)));
recordBox.value = records.first;
recordBox.addEventListener("change", () => showRecord(recordBox.value));
topP.addEventListener("change", applySwitches);
peak.addEventListener("change", applySwitches);
selection.hidden = false;
showRecord(recordBox.value);
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawPositions(); } });
