// Draws the figures that a page carries as JSON, and keeps the page fresh: it fetches its own address
// again, replaces what has changed, and redraws. Without it the page is readable, but has no plots.
"use strict";

const SECONDS = 4;
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

const drawn = new Map(); // id of a place: the text of what is drawn there

function draw(root, force) {
  for (const script of root.querySelectorAll("script[data-plot]")) {
    const place = document.getElementById(script.dataset.plot);
    if (!place || (!force && drawn.get(place.id) === script.textContent)) continue;
    const { data, layout } = JSON.parse(script.textContent);
    drawn.set(place.id, script.textContent);
    Plotly.react(place, data, themed(layout), { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

function plots(root) {
  return [...root.querySelectorAll(".plot")].map((place) => place.id).join();
}

function trouble(text) {
  const line = document.getElementById("trouble");
  line.textContent = text;
  line.hidden = !text;
}

let last = "";

async function refresh() {
  if (document.hidden) return;
  let response;
  try {
    response = await fetch(location.href, { cache: "no-cache", headers: { Accept: "text/html" } });
  } catch {
    return trouble("The dashboard does not answer. It is asked again every few seconds.");
  }
  if (response.redirected) return trouble("The session has ended. Reload this page to log in again.");
  const text = await response.text();
  const page = new DOMParser().parseFromString(text, "text/html");
  if (!response.ok) return trouble(page.querySelector("main p:not(#trouble)")?.textContent ?? response.statusText);
  trouble("");
  if (text === last) return;
  last = text;
  if (plots(page) !== plots(document)) return location.reload(); // other panels than before
  for (const fresh of page.querySelectorAll("[data-live]")) {
    const old = document.querySelector(`[data-live="${CSS.escape(fresh.dataset.live)}"]`);
    if (!old || old.innerHTML === fresh.innerHTML) continue;
    const open = [...old.querySelectorAll("details")].map((details) => details.open);
    old.innerHTML = fresh.innerHTML;
    old.querySelectorAll("details").forEach((details, index) => (details.open = Boolean(open[index])));
  }
  draw(page, false);
}

draw(document, true);
dark.addEventListener("change", () => draw(document, true));
if (document.querySelector("[data-live]")) setInterval(refresh, SECONDS * 1000);
