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

function draw() {
  for (const script of document.querySelectorAll("script[data-plot]")) {
    const place = document.getElementById(script.dataset.plot);
    if (drawn.get(place.id) === script.textContent) continue;
    const { data, layout } = JSON.parse(script.textContent);
    drawn.set(place.id, script.textContent);
    Plotly.react(place, data, themed(layout), { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

// What a page is made of: if that changes, it is loaded again instead of mended.
function parts(page) {
  return [...page.querySelectorAll("[data-live], .plot")].map((part) => part.dataset.live ?? part.id).join();
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
  const shown = document.body.dataset.status;
  if (!response.ok && shown === "200") return trouble(page.querySelector("main p:not(#trouble)")?.textContent ?? response.statusText);
  if (page.body.dataset.status !== shown) return location.reload(); // an error page, and now there is another
  trouble("");
  if (text === last) return;
  last = text;
  if (parts(page) !== parts(document)) return location.reload();
  for (const fresh of page.querySelectorAll("[data-live]")) {
    const old = document.querySelector(`[data-live="${CSS.escape(fresh.dataset.live)}"]`);
    if (old.innerHTML === fresh.innerHTML) continue;
    const open = [...old.querySelectorAll("details")].map((details) => details.open);
    old.innerHTML = fresh.innerHTML;
    old.querySelectorAll("details").forEach((details, index) => (details.open = Boolean(open[index])));
  }
  for (const fresh of page.querySelectorAll("script[data-plot]")) {
    document.querySelector(`script[data-plot="${CSS.escape(fresh.dataset.plot)}"]`).textContent = fresh.textContent;
  }
  draw();
}

async function follow() {
  await refresh();
  setTimeout(follow, SECONDS * 1000);
}

draw();
dark.addEventListener("change", () => {
  drawn.clear();
  draw();
});
setTimeout(follow, SECONDS * 1000);
