// Draws a page's figures from their JSON, and keeps the page fresh: it fetches the page's address again and
// updates what has changed. Without it the page is readable, but has no plots.
//
// An update keeps the reader's work: focus, scroll position and selection, and what is typed, ticked or
// unfolded. Elements are matched by their ids.
"use strict";

const SECONDS = 4;
const PATIENCE = 20; // seconds to wait for an answer
const PAPER = 640; // pixels: the widest plot that fits on A4
const dark = matchMedia("(prefers-color-scheme: dark)");

function themed(layout) {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), linecolor: color("--line"), tickcolor: color("--line") };
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: color("--soft") },
    hoverlabel: { bgcolor: color("--card"), bordercolor: color("--line"), font: { color: color("--ink") } },
    xaxis: { ...axis, ...layout.xaxis },
    yaxis: { ...axis, ...layout.yaxis },
  };
}

const drawn = new Map(); // from a place to the JSON text of its figure

function draw() {
  for (const place of drawn.keys()) {
    if (place.isConnected) continue;
    Plotly.purge(place);
    drawn.delete(place);
  }
  for (const script of document.querySelectorAll("script[data-plot]")) {
    if (!window.Plotly) return trouble("The script that draws the figures did not arrive. Reload this page.");
    const place = document.getElementById(script.dataset.plot);
    if (drawn.get(place) === script.textContent) continue;
    const { data, layout } = JSON.parse(script.textContent);
    drawn.set(place, script.textContent);
    Plotly.react(place, data, themed(layout), { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

function trouble(text) {
  const line = document.getElementById("trouble");
  if (line.textContent !== text) line.textContent = text;
}

// Makes an element or a text equal to a fresh one, with as few changes as possible.
function mend(old, fresh) {
  if (old.isEqualNode(fresh)) return;
  if (old.nodeType === Node.TEXT_NODE) return retype(old, fresh.data);
  if (old.matches(".plot, noscript")) return; // the second is text here, but elements in a parsed page
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === "open" && old.matches("details"))) old.removeAttribute(name);
  }
  for (const { name, value } of fresh.attributes) {
    if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  }
  const matches = partners(old, fresh);
  const kept = new Set(matches.values());
  for (const child of [...old.childNodes]) if (!kept.has(child)) child.remove();
  let next = old.firstChild;
  for (const child of fresh.childNodes) {
    const match = matches.get(child);
    if (!match) old.insertBefore(document.importNode(child, true), next);
    else {
      mend(match, child);
      if (match === next) next = next.nextSibling;
      else move(match, next);
    }
  }
}

// For each fresh child the old child that becomes it: the one with its id, else the next of its kind.
function partners(old, fresh) {
  const kind = (node) => (node.id ? `#${node.id}` : `${node.nodeName}.${node.className ?? ""}`);
  const left = new Map();
  for (const child of old.childNodes) {
    if (!left.has(kind(child))) left.set(kind(child), []);
    left.get(kind(child)).push(child);
  }
  for (const some of left.values()) some.reverse();
  const matches = new Map();
  for (const child of fresh.childNodes) {
    const match = left.get(kind(child))?.pop();
    if (match) matches.set(child, match);
  }
  return matches;
}

// Moves an element without losing focus and selection.
function move(node, next) {
  const active = document.activeElement;
  const selection = getSelection();
  const { anchorNode, anchorOffset, focusNode, focusOffset } = selection;
  next.before(node);
  if (node.contains(active)) active.focus({ preventScroll: true });
  if (anchorNode && (node.contains(anchorNode) || node.contains(focusNode))) {
    selection.setBaseAndExtent(anchorNode, anchorOffset, focusNode, focusOffset);
  }
}

// Changes a text so that a selection stays on the same characters. A log loses lines at its beginning and
// gains some at its end. In other texts the beginning and the end stay.
function retype(node, text) {
  const old = node.data;
  for (let line = 0; line < old.length; line = old.indexOf("\n", line) + 1 || old.length) {
    if (!text.startsWith(old.slice(line))) continue;
    node.appendData(text.slice(old.length - line));
    return node.deleteData(0, line);
  }
  const most = Math.min(old.length, text.length);
  let head = 0;
  while (head < most && old[head] === text[head]) head++;
  let tail = 0;
  while (tail < most - head && old.at(-1 - tail) === text.at(-1 - tail)) tail++;
  node.replaceData(head, old.length - head - tail, text.slice(head, text.length - tail));
}

let last = "";

async function refresh() {
  let response, text;
  try {
    response = await fetch(location.href, {
      cache: "no-cache",
      headers: { Accept: "text/html" },
      signal: AbortSignal.timeout(1000 * PATIENCE),
    });
    text = await response.text();
  } catch {
    return trouble("The dashboard does not answer. It is asked again every few seconds.");
  }
  if (response.redirected) return trouble("The session has ended. Reload this page to log in again.");
  const page = new DOMParser().parseFromString(text, "text/html");
  if (!response.ok && document.body.dataset.status === "200") {
    return trouble(page.querySelector("main p:not(#trouble)")?.textContent ?? response.statusText);
  }
  trouble("");
  if (text !== last) {
    last = text;
    document.title = page.title;
    document.body.dataset.status = page.body.dataset.status;
    for (const part of ["header", "main"]) mend(document.querySelector(part), page.querySelector(part));
  }
  draw();
}

let pressed = false; // while the reader selects text, or a part of a plot
let busy = false;

async function follow() {
  if (document.hidden || pressed || busy) return;
  busy = true;
  try {
    await refresh();
  } finally {
    busy = false;
  }
}

draw();
dark.addEventListener("change", () => {
  drawn.clear();
  draw();
});
setInterval(follow, SECONDS * 1000);
document.addEventListener("visibilitychange", follow);
addEventListener("pointerdown", () => (pressed = true));
for (const end of ["pointerup", "pointercancel", "blur"]) addEventListener(end, () => (pressed = false));
// A page from the browser's cache may be old, and may have a filter that was changed after it was loaded.
addEventListener("pageshow", ({ persisted }) => {
  if (!persisted) return;
  for (const form of document.querySelectorAll("form.filters")) form.reset();
  follow();
});
// A plot is as wide as its place on the screen, which may be too wide for paper.
const wide = new Set();
addEventListener("beforeprint", () => {
  for (const place of drawn.keys()) {
    if (place.clientWidth <= PAPER) continue;
    wide.add(place);
    Plotly.relayout(place, { width: PAPER });
  }
});
addEventListener("afterprint", () => {
  for (const place of wide) Plotly.relayout(place, { width: null, autosize: true });
  wide.clear();
});
