// Curves: the step nearest to the pointer, or chosen by the arrow keys, and every series' value there.
const curves = read("curves");
document.querySelectorAll("svg[data-chart]").forEach(svg => {
  const chart = curves[svg.dataset.chart];
  if (!svg.dataset.x) return;  // nothing finite to point at
  const [low, high, left, right] = svg.dataset.x.split(" ").map(Number);
  const [, , bottom, top] = svg.dataset.y.split(" ").map(Number);
  const hair = drawing("line", {class: "hair", y1: top, y2: bottom});
  let at = -1;
  const hide = () => { hideTip(); hair.remove(); at = -1; };
  const place = step => left + (step - low) / ((high - low) || 1) * (right - left);

  function show(index, clientX, clientY) {
    at = index;
    const x = place(chart.steps[at]);
    hair.setAttribute("x1", x); hair.setAttribute("x2", x); svg.appendChild(hair);
    const rows = [element("div", {class: "head"}, "step " + count(chart.steps[at]))];
    chart.names.forEach((name, i) => {
      if (chart.values[i][at] === null) return;
      const mark = element("i");
      mark.style.background = `var(--s${i % 8})`;
      rows.push(row(element("span", {}, mark, name), number(chart.values[i][at])));
    });
    const box = svg.getBoundingClientRect();
    showTip(clientX ?? box.left + x / svg.viewBox.baseVal.width * box.width, clientY ?? box.top + 40, rows);
  }

  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    if (x < left - 8 || x > right + 8) return hide();
    const want = low + (x - left) / (right - left) * (high - low);
    let best = 0;
    chart.steps.forEach((step, i) => {
      if (Math.abs(step - want) < Math.abs(chart.steps[best] - want)) best = i; });
    show(best, event.clientX, event.clientY);
  });
  svg.addEventListener("keydown", event => {
    const last = chart.steps.length - 1;
    const to = {ArrowLeft: at < 0 ? last : Math.max(at - 1, 0), ArrowRight: Math.min(at + 1, last),
      Home: 0, End: last}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
    sayTip();
  });
});
