"use strict";
// What the curves and the tokens share: numbers as text, new elements, the box beside the pointer.
const tip = document.getElementById("tip"), said = document.getElementById("said");
const read = name => JSON.parse(document.getElementById("data-" + name).textContent);
const number = v => v === null || v === undefined ? "–" : typeof v === "string" ? v : v === 0 ? "0" :
  Math.abs(v) < 1e-4 || Math.abs(v) >= 1e7 ? v.toExponential(2) :
  v.toLocaleString("en", {maximumSignificantDigits: 4}).replace("-", "−");
const count = v => v.toLocaleString("en");

// Everything that a model wrote reaches the page as a text node, never as markup.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes = {}, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const row = (...cells) => element("div", {class: "row"}, ...cells.map(cell =>
  typeof cell === "string" ? element("span", {}, cell) : cell));

function showTip(x, y, parts) {
  tip.replaceChildren(...parts);
  tip.style.display = "block";
  const wide = tip.offsetWidth, high = tip.offsetHeight;
  const left = x + 18 + wide > innerWidth ? x - 18 - wide : x + 18;
  const top = y + 16 + high > innerHeight ? y - 16 - high : y + 16;
  tip.style.left = Math.max(8, Math.min(left, innerWidth - wide - 8)) + "px";
  tip.style.top = Math.max(8, top) + "px";
}

// What the keyboard has reached is also said to a screen reader; the pointer would make it talk without end.
const sayTip = () => { said.textContent = tip.innerText.replace(/\s*\n\s*/g, ", "); };

const hideTip = () => { tip.style.display = "none"; };
document.addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });
