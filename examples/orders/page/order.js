// One order on the page: headline, belt, timeline, data and history.

import { cents, isFinal, make, money, rank, timeOf } from "./text.js";

const $ = (id) => document.getElementById(id);

/** The stations: what an order does there, and the event that it leaves with. */
const STATIONS = [
  { status: "pending", event: "order_created", ahead: "Order placed", done: "Order placed",
    now: "Waiting for the first worker" },
  { status: "validating", event: "order_validated", ahead: "Validation", done: "Order checked",
    now: "Checking the order", lead: "Address, items, quantities and total are checked once more." },
  { status: "payment_processing", event: "payment_processed", ahead: "Payment", done: "Paid",
    now: "Taking the payment", lead: "The payment gateway is asked, with a key that lets it charge only once." },
  { status: "inventory_check", event: "inventory_reserved", ahead: "Inventory", done: "Items reserved",
    now: "Reserving the items", lead: "All items are taken from the shelf, or none." },
  { status: "shipping", event: "shipment_created", ahead: "Shipping", done: "Shipped",
    now: "Preparing the shipment", lead: "The parcel is being packed." },
  { status: "completed", event: "order_completed", ahead: "Completed", done: "Completed",
    now: "Completed", lead: "Every worker has done its part." },
];

/** The page before there is an order: the way that one would go. */
export function showNothing() {
  $("order").removeAttribute("data-status");
  $("details").hidden = true;
  $("eyebrow").textContent = "How it works";
  $("headline").textContent = "Place an order and watch it travel";
  $("lead").textContent = "Independent workers carry it from one station to the next. Each hands on a durable event: "
    + "stop any of them, start it again, and the order goes on where it was.";
  showBelt(0, "");
  $("timeline").replaceChildren(...STATIONS.map((station) => entry("ahead", station.ahead)));
  document.title = "Conveyor shop";
}

export function showMissing(id) {
  showNothing();
  $("eyebrow").textContent = `Order ${id.slice(0, 8)}`;
  $("headline").textContent = "There is no such order";
  $("lead").textContent = "The link may be cut off, or the shop's data may have been cleared. Choose one of the recent orders, or place a new one.";
}

/** Show an order with the events that are known so far. */
export function show(order, events) {
  const by = new Map(events.map((event) => [event.event_type, event]));
  const failure = by.get("order_failed");
  const reached = Math.max(0, STATIONS.findIndex((station) => station.status === order.status));
  const stuck = order.status === "failed" ? Math.max(0, STATIONS.findIndex((station) => !by.has(station.event))) : reached;

  $("order").dataset.status = order.status;
  $("details").hidden = false;
  setText($("eyebrow"), `Order ${order.id.slice(0, 8)} · ${money(cents(order.total_amount))}`);
  setText($("headline"), headline(order, failure, reached));
  setText($("lead"), lead(by, order, reached));
  document.title = `${$("headline").textContent} · Conveyor shop`;
  showBelt(stuck, order.status);
  $("timeline").replaceChildren(...timeline(order, by, stuck));
  showData(order, by);
  $("history").replaceChildren(...events.map(record));
}

function headline(order, failure, reached) {
  if (order.status === "failed") return failure?.message ?? "The order failed";
  return order.status === "completed" ? "Your order is on its way" : STATIONS[reached].now;
}

function lead(by, order, reached) {
  if (order.status !== "failed") return STATIONS[reached].lead ?? "It has been written down and will be worked on at once.";
  if (by.has("payment_refunded")) return `The order could not be fulfilled. Your payment of ${money(cents(order.total_amount))} has been refunded.`;
  return by.has("payment_processed") ? "The order could not be fulfilled." : "The order was not fulfilled, and you were not charged.";
}

function timeline(order, by, stuck) {
  const failed = order.status === "failed";
  const entries = STATIONS.map((station, index) => {
    const event = by.get(station.event);
    if (event || rank(order.status) > rank(station.status) && !failed) return entry("done", station.done, event, note(event));
    if (index < stuck) return entry("done", station.done);
    if (failed) return index === stuck ? entry("bad", by.get("order_failed")?.message ?? station.ahead, by.get("order_failed")) : entry("never", station.ahead);
    return index === stuck ? entry("now", station.now) : entry("ahead", station.ahead);
  });
  const refund = by.get("payment_refunded");
  if (refund) entries.splice(stuck + 1, 0, entry("done", "Payment refunded", refund, note(refund)));
  return entries;
}

const note = (event) => event?.metadata.transaction_id ?? event?.metadata.tracking_number ?? "";

const MARKS = { done: ["✓", "done"], bad: ["!", "failed"], now: ["", "in progress"], ahead: ["", "to come"], never: ["", "not reached"] };

function entry(state, text, event = null, said = "") {
  const [mark, words] = MARKS[state];
  const dot = make("span", mark, "dot");
  dot.setAttribute("aria-hidden", "true");
  const item = make("li", "", "", dot, make("span", text, "step", make("span", ` (${words})`, "spoken")));
  item.dataset.state = state;
  if (state === "now") item.setAttribute("aria-current", "step");
  if (event) item.append(timeOf(event.timestamp));
  if (said) item.append(make("p", said, "note"));
  return item;
}

function showBelt(at, status) {
  $("belt").dataset.at = at;
  $("belt").dataset.state = isFinal(status) ? status : "";
  $("belt").querySelectorAll("i").forEach((dot, index) => dot.toggleAttribute("data-passed", index < at));
}

function showData(order, by) {
  const facts = [
    ["Order", order.id],
    ["E-mail", order.customer_email],
    ["Status", order.status.replaceAll("_", " ")],
    ["Transaction", note(by.get("payment_processed"))],
    ["Tracking number", note(by.get("shipment_created"))],
    ["Placed", timeOf(order.created_at, true)],
    ["Last change", timeOf(order.updated_at, true)],
  ];
  $("data").replaceChildren(...facts.filter(([, value]) => value).flatMap(([name, value]) => [make("dt", name), make("dd", "", "", value)]));
  $("items").replaceChildren(...order.items.map((item) => make("tr", "", "",
    make("td", item.name), make("td", String(item.quantity), "number"),
    make("td", money(cents(item.price)), "number"), make("td", money(cents(item.price) * item.quantity), "number"))));
  setText($("order-total"), money(cents(order.total_amount)));
}

function record(event) {
  const facts = Object.entries(event.metadata)
    .map(([name, value]) => `${name.replaceAll("_", " ")} ${name === "amount" ? money(cents(value)) : value}`).join(" · ");
  const told = make("div", "", "", make("p", event.message, "said"), make("code", event.event_type));
  if (facts) told.append(make("p", facts, "facts"));
  return make("li", "", "", timeOf(event.timestamp), told);
}

/** Changes the text only where it differs, so that a screen reader hears what is new and nothing else. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
