// The controller's web page. It reads /api/ every 5 s and writes text, never markup.
"use strict";

const PERIOD_MS = 5000;
// Rows of a long table that are added at a time.
const ROWS = 100;

const view = document.getElementById("view");
const live = document.getElementById("live");
// Number of rows of a long table, and the filter of the nodes' table. They are kept while the page is refreshed.
let shown = ROWS;
let filter = "";
let events = [];
let current = "";
// False from a change of the view until its first answer.
let drawn = false;
let timer = 0;
let request = 0;

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  for (const child of children) {
    if (child !== null && child !== undefined) made.append(child);
  }
  return made;
}

function link(href, text) {
  return element("a", { href, "data-key": href }, text);
}

// Columns are {title, kind, cell}: `cell` returns a text or an element, `kind` is a class of the cells.
function table(caption, columns, rows, name) {
  const head = element("tr", {}, ...columns.map((column) =>
    element("th", { scope: "col", class: column.kind }, column.title)));
  const body = rows.map((row) => element("tr", {}, ...columns.map((column, index) => {
    const cell = column.cell(row);
    return index === 0
      ? element("th", { scope: "row" }, cell)
      : element("td", { class: column.kind }, cell);
  })));
  return element("div", { class: "wide", role: "region", tabindex: "0", "aria-label": caption },
    element("table", { class: name },
      element("caption", {}, caption),
      element("thead", {}, head),
      element("tbody", {}, ...body)));
}

function state(word, kind) {
  return element("span", { class: kind }, word);
}

function online(node) {
  return node.online ? state("online", "good") : state("offline", "bad");
}

function count(number, kind) {
  return number > 0 ? state(String(number), kind) : String(number);
}

function known(node, number, kind) {
  return node.reported_seconds === null ? state("-", "quiet") : count(number, kind);
}

function tunnel(word) {
  const kinds = { direct: "good", relay: "warn", connecting: "warn", down: "bad" };
  return state(word, kinds[word] || "quiet");
}

function milliseconds(rtt) {
  return rtt === null ? "-" : (rtt / 1000).toFixed(2) + " ms";
}

function dash(text) {
  return text === null || text === "" ? "-" : String(text);
}

function nodePage(name) {
  return link("#/node/" + name, name);
}

// Returns a button that shows more rows, if a table has more than are shown.
function more(rows, answer) {
  if (rows.length <= shown) return null;
  const button = element("button", { type: "button", "data-key": "more" },
    "Show " + Math.min(ROWS, rows.length - shown) + " more of " + rows.length);
  button.addEventListener("click", () => { shown += ROWS; draw(answer); });
  return button;
}

const nodeColumns = [
  { title: "Node", cell: (node) => nodePage(node.name) },
  { title: "Site", cell: (node) => dash(node.site) },
  { title: "State", cell: online },
  { title: "Up", kind: "number", cell: (node) => known(node, node.peers_up, "") },
  { title: "Relayed", kind: "number", cell: (node) => known(node, node.peers_relayed, "warn") },
  { title: "Down", kind: "number", cell: (node) => known(node, node.peers_down, "bad") },
  { title: "Worst peer", cell: (node) => dash(node.worst) },
];

function sitesView(mesh) {
  const columns = [
    { title: "Site", cell: (site) => site.name === null ? "(no site)" : link("#/nodes/" + site.name, site.name) },
    { title: "Nodes", kind: "number", cell: (site) => String(site.nodes) },
    { title: "Offline", kind: "number", cell: (site) => count(site.offline, "bad") },
    { title: "Tunnels up", kind: "number", cell: (site) => String(site.tunnels_up) },
    { title: "Relayed", kind: "number", cell: (site) => count(site.tunnels_relayed, "warn") },
    { title: "Down", kind: "number", cell: (site) => count(site.tunnels_down, "bad") },
  ];
  const troubled = mesh.nodes.filter((node) => !node.online || node.peers_down > 0);
  const parts = [
    element("h2", {}, "Sites"),
    table("Sites of the mesh: " + mesh.sites.length, columns, mesh.sites.slice(0, shown)),
    more(mesh.sites, mesh),
  ];
  parts.push(element("h2", {}, "Nodes to look at"));
  parts.push(troubled.length === 0
    ? element("p", {}, "Every node is online, and no node reports a peer that is down.")
    : table("Nodes that are offline or report peers that are down", nodeColumns, troubled.slice(0, ROWS)));
  if (troubled.length > ROWS) parts.push(element("p", {}, (troubled.length - ROWS) + " more are among the nodes."));
  return parts;
}

function nodesView(mesh, site) {
  const field = element("input", { id: "filter", type: "search", "data-key": "filter", autocomplete: "off" });
  field.value = filter;
  field.addEventListener("input", () => { filter = field.value; shown = ROWS; draw(mesh); });
  const wanted = filter.trim().toLowerCase();
  const found = mesh.nodes.filter((node) =>
    (site === "" || node.site === site) && (wanted === "" || node.name.includes(wanted)));
  const parts = [
    element("h2", {}, site === "" ? "Nodes" : "Nodes of site " + site),
    element("label", { for: "filter" }, "Name contains"), " ", field,
    table(found.length + " nodes", nodeColumns, found.slice(0, shown)),
    more(found, mesh),
  ];
  if (site !== "") parts.push(element("p", {}, link("#/matrix/" + site, "Matrix of site " + site)));
  return parts;
}

function matrixView(matrix, site) {
  const kind = (text) => /^down/.test(text) ? "bad" : /relay|connecting/.test(text) ? "warn" : "";
  // "-" are the nodes without a site, and "(others)" the sites that share a row: neither has a page.
  const head = (name) => {
    if (!matrix.is_by_site) return nodePage(name);
    if (name === "-") return "(no site)";
    return name.startsWith("(") ? name : link("#/matrix/" + name, name);
  };
  const columns = [{ title: matrix.is_by_site ? "From site" : "From", cell: (row) => head(row.name) }];
  matrix.names.forEach((name, index) => columns.push({
    title: name,
    kind: "number",
    cell: (row) => element("span", { class: kind(row.cells[index]) }, row.cells[index]),
  }));
  const rows = matrix.names.map((name, index) => ({ name, cells: matrix.cells[index] }));
  let leftOut = "";
  if (matrix.left_out > 0) {
    leftOut = matrix.is_by_site
      ? " The " + matrix.left_out + " sites with the fewest nodes share the row (others)."
      : " " + matrix.left_out + " more nodes are not shown: these have the most trouble.";
  }
  const legend = matrix.is_by_site
    ? "Cell: tunnels up / tunnels with traffic, and their median round-trip time."
    : "Cell: round-trip time, with (relay) if the path is not direct.";
  return [
    element("h2", {}, site === "" ? "Matrix" : "Matrix of site " + site),
    element("p", {}, legend + " Each row is what its nodes reported. ?: not reported." + leftOut),
    rows.length === 0 ? element("p", {}, "There is no node.") : table("Who reaches whom", columns, rows, "matrix"),
  ];
}

function nodeView(answer) {
  const node = answer.node;
  const facts = element("dl", {},
    element("dt", {}, "Site"), element("dd", {}, dash(node.site)),
    element("dt", {}, "State"), element("dd", {}, online(node)),
    element("dt", {}, "Last seen"), element("dd", {}, dash(node.last_seen)),
    element("dt", {}, "Last report"), element("dd", {}, node.reported_seconds === null
      ? "none since the controller's start" : node.reported_seconds + " s ago"),
    element("dt", {}, "Peers"), element("dd", {}, node.peers_up + " up (" + node.peers_relayed + " relayed), "
      + node.peers_connecting + " connecting, " + node.peers_down + " down, " + node.peers_idle + " idle"));
  const columns = (title, name) => [
    { title, cell: (row) => nodePage(name(row)) },
    { title: "State", cell: (row) => tunnel(row.state) },
    { title: "Relay", cell: (row) => dash(row.relay) },
    { title: "RTT", kind: "number", cell: (row) => milliseconds(row.rtt_us) },
    { title: "Loss", kind: "number", cell: (row) => row.loss_percent === null ? "-" : row.loss_percent.toFixed(1) + " %" },
    { title: "MTU", kind: "number", cell: (row) => dash(row.mtu) },
    { title: "Reason", cell: (row) => dash(row.reason_code) },
  ];
  return [
    element("h2", {}, node.name), facts,
    table("Peers that this node reported", columns("To", (row) => row.to), answer.reported),
    table("Nodes that reported this one", columns("From", (row) => row.from), answer.reported_by.slice(0, shown)),
    more(answer.reported_by, answer),
  ];
}

function eventsView() {
  const columns = [
    { title: "Time", cell: (event) => dash(event.at) },
    { title: "Node", cell: (event) => event.peer === null ? "-" : nodePage(event.peer) },
    { title: "Event", cell: (event) => event.code },
    { title: "Text", kind: "text", cell: (event) => event.text },
  ];
  const newest = events.slice().reverse();
  return [
    element("h2", {}, "Events"),
    table("Newest first", columns, newest.slice(0, shown)),
    more(newest, null),
  ];
}

// Returns the view that the address names, and its argument.
function place() {
  const [name, ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  return [name, rest.join("/")];
}

function source([name, argument]) {
  switch (name) {
    case "matrix": return "/api/matrix" + (argument === "" ? "" : "?site=" + argument);
    case "node": return "/api/node?name=" + argument;
    case "events": return "/api/events" + (events.length === 0 ? "" : "?after=" + events[events.length - 1].id);
    default: return "/api/mesh";
  }
}

// Replaces the view, and keeps the focus and the positions of what can be scrolled.
function draw(answer) {
  const [name, argument] = place();
  let parts;
  if (name === "matrix") parts = matrixView(answer, argument);
  else if (name === "node") parts = nodeView(answer);
  else if (name === "events") parts = eventsView();
  else if (name === "nodes") parts = nodesView(answer, argument);
  else parts = sitesView(answer);
  const active = document.activeElement;
  const key = active && view.contains(active) ? active.getAttribute("data-key") : null;
  const caret = key === "filter" ? active.selectionStart : null;
  const regions = () => Array.from(view.querySelectorAll(".wide"));
  const focused = regions().indexOf(active);
  const scrolled = regions().map((region) => region.scrollLeft);
  view.replaceChildren(...parts.filter((part) => part !== null));
  regions().forEach((region, index) => { region.scrollLeft = scrolled[index] || 0; });
  const kept = key !== null
    ? Array.from(view.querySelectorAll("[data-key]")).find((one) => one.getAttribute("data-key") === key)
    : regions()[focused];
  if (kept) {
    kept.focus({ preventScroll: true });
    if (caret !== null) kept.setSelectionRange(caret, caret);
  }
}

async function refresh() {
  clearTimeout(timer);
  const mine = ++request;
  const where = place();
  try {
    const response = await fetch(source(where), { cache: "no-store" });
    if (mine !== request) return;
    if (!response.ok) throw new Error((await response.text()).trim());
    const answer = await response.json();
    if (mine !== request) return;
    if (where[0] === "events") {
      const known = new Set(events.map((event) => event.id));
      events = events.concat(answer.events.filter((event) => !known.has(event.id))).slice(-1000);
    }
    draw(answer);
    // A mark of the browser's timeline: `cargo lab page` measures from the navigation to it.
    if (!drawn) performance.mark("drawn");
    drawn = true;
    document.getElementById("about").textContent =
      "Mesh " + answer.mesh_id + ", controller " + answer.version;
    live.classList.remove("lost");
    live.textContent = "Live";
  } catch (error) {
    if (mine !== request) return;
    live.classList.add("lost");
    live.textContent = "Not up to date";
    if (drawn) live.textContent += ": " + error.message;
    else view.replaceChildren(element("p", { class: "bad" }, "Cannot show this: " + error.message));
  }
  if (!document.hidden) timer = setTimeout(refresh, PERIOD_MS);
}

function navigate() {
  shown = ROWS;
  filter = "";
  drawn = false;
  const [name] = place();
  const tab = name === "node" ? "nodes" : name;
  for (const one of document.querySelectorAll("nav a")) {
    if (one.getAttribute("href") === "#/" + tab) one.setAttribute("aria-current", "page");
    else one.removeAttribute("aria-current");
  }
  if (current !== "" && current !== location.hash) {
    view.replaceChildren(element("p", {}, "Loading"));
    view.focus();
    scrollTo(0, 0);
  }
  current = location.hash || "#/";
  refresh();
}

document.querySelector(".skip").addEventListener("click", (event) => {
  // The address names the view, so the jump is made here.
  event.preventDefault();
  view.focus();
});
addEventListener("hashchange", navigate);
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
navigate();
