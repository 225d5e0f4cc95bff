// The page: chooses the order to show (it is in the address), keeps it live, and lists the recent ones.

import * as form from "./form.js";
import { Live } from "./live.js";
import * as view from "./order.js";
import { cents, isFinal, make, money, rank, STATUS, timeOf } from "./text.js";

const $ = (id) => document.getElementById(id);
const PAGE = 6; // orders in the list, and as many more with each press of the button
let live = null;
let shown = null; // { order, events } on the page
let reading = null; // the read of the history that is under way
let older = 0;

function open(id, { push = false, focus = false } = {}) {
  live?.close();
  live = shown = reading = null;
  if (push) history.pushState(null, "", id ? `/?order=${encodeURIComponent(id)}` : "/");
  markCurrent();
  if (!id) {
    view.showNothing();
    showConnection({ name: "idle" });
    return;
  }
  live = new Live(id, update, (state) => {
    if (state.name === "unknown") view.showMissing(id);
    showConnection(state);
  });
  if (focus) {
    $("order").focus({ preventScroll: true });
    $("order").scrollIntoView({ block: "nearest" });
    if ($("order").getBoundingClientRect().top > innerHeight / 2) $("order").scrollIntoView();
  }
}

/** A new state of the order arrived: show it, then its history. */
function update(order) {
  if (!shown || rank(order.status) >= rank(shown.order.status)) {
    shown = { order, events: shown?.events ?? [] };
    view.show(shown.order, shown.events);
  }
  readHistory(order.id);
  listRecent();
}

async function readHistory(id) {
  if (reading) {
    reading.again = true;
    return;
  }
  const mine = (reading = { again: true });
  while (mine.again && mine === reading) {
    mine.again = false;
    const details = await getJson(`/orders/${encodeURIComponent(id)}`);
    if (mine !== reading || !details || !shown) continue;
    const order = rank(details.order.status) >= rank(shown.order.status) ? details.order : shown.order;
    shown = { order, events: details.events };
    view.show(shown.order, shown.events);
  }
  if (mine === reading) reading = null;
}

function showConnection({ name, seconds }) {
  const words = {
    idle: "",
    connecting: "Connecting…",
    reconnecting: "Connecting again…",
    live: shown && isFinal(shown.order.status) ? "Up to date" : "Live",
    waiting: "Connection lost. Trying again",
    unknown: "",
  };
  $("connection").dataset.state = { reconnecting: "waiting", unknown: "idle" }[name] ?? name;
  if ($("connection-text").textContent !== words[name]) $("connection-text").textContent = words[name];
  $("countdown").textContent = name === "waiting" ? ` in ${seconds} s` : ""; // seen, but not read out every second
  $("connect-now").hidden = name !== "waiting";
}

async function listRecent(more = false) {
  if (more) older += 1;
  const page = await getJson(`/orders?limit=${PAGE * (older + 1)}`);
  if (!page) return;
  $("recent").replaceChildren(...page.orders.map(summary));
  $("recent-empty").hidden = page.orders.length > 0;
  $("older").hidden = !page.next || older >= 9;
  markCurrent();
}

function summary(order) {
  const what = order.items.map((item) => (item.quantity > 1 ? `${item.quantity} × ${item.name}` : item.name)).join(", ");
  const state = make("span", STATUS[order.status], "state");
  state.dataset.status = order.status;
  const link = make("a", "", "",
    make("span", what, "what"), make("span", money(cents(order.total_amount)), "amount"),
    make("span", `${order.id.slice(0, 8)} · `, "meta", timeOf(order.created_at)), state);
  link.href = `/?order=${order.id}`;
  link.dataset.id = order.id;
  return make("li", "", "", link);
}

function markCurrent() {
  for (const link of $("recent").querySelectorAll("a")) {
    if (link.dataset.id === current()) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

/** The JSON behind a path; null where the shop does not answer as it should (the live connection says so in words). */
async function getJson(path) {
  try {
    const answer = await fetch(path);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

async function place(order, key) {
  const answer = await fetch("/orders", {
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": key },
    body: JSON.stringify(order),
  });
  if (answer.ok) {
    const placed = await answer.clone().json();
    open(placed.id, { push: true, focus: true });
  }
  return answer;
}

const current = () => new URLSearchParams(location.search).get("order");

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-id]");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  open(link.dataset.id, { push: true, focus: true });
});
addEventListener("popstate", () => open(current()));
addEventListener("visibilitychange", () => document.visibilityState === "visible" && listRecent());
$("connect-now").addEventListener("click", () => live?.retry());
$("older").addEventListener("click", () => listRecent(true));

view.showNothing();
open(current(), { focus: Boolean(current()) });
listRecent();

let catalogue = null;
while (!(catalogue = await getJson("/products"))) await new Promise((resolve) => setTimeout(resolve, 1000));
form.start(catalogue.products, place);
