// Money, times and words, as people read them.

const dollars = new Intl.NumberFormat("en-US", { style: "currency", currency: "USD" });
const clock = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const date = new Intl.DateTimeFormat([], { dateStyle: "medium", timeStyle: "medium" });

/** Whole cents of an amount such as 29.99: sums of cents are exact, sums of fractions are not. */
export const cents = (amount) => Math.round(Number(amount) * 100);

/** "$1,029.98" for 102998 cents. */
export const money = (inCents) => dollars.format(inCents / 100);

/** A <time> that shows the time of day, or the whole date. */
export function timeOf(moment, whole = false) {
  const at = new Date(moment);
  const element = make("time", (whole ? date : clock).format(at));
  element.dateTime = moment;
  element.title = date.format(at);
  return element;
}

/** An element with text (never markup) and children. */
export function make(tag, text = "", className = "", ...children) {
  const element = document.createElement(tag);
  if (text) element.textContent = text;
  if (className) element.className = className;
  element.append(...children);
  return element;
}

export const STATUS = {
  pending: "Waiting",
  validating: "Checking",
  payment_processing: "Paying",
  inventory_check: "Reserving",
  shipping: "Shipping",
  completed: "Completed",
  failed: "Failed",
};
const RANK = Object.keys(STATUS);

/** How far along a status is: of two reports about one order the higher one is the newer. */
export const rank = (status) => RANK.indexOf(status);
export const isFinal = (status) => status === "completed" || status === "failed";
