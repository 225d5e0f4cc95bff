// The order form: its lines, the running total, and what the server says about each field.

import { cents, money } from "./text.js";

const $ = (id) => document.getElementById(id);
const lines = $("lines");
let products = new Map();
let key = newKey();

/** Offer the products, and call place(order, key) when the customer orders; it resolves to an answer of the server. */
export function start(catalogue, place) {
  products = new Map(catalogue.map((product) => [product.product_id, product]));
  addLine();
  $("add-line").addEventListener("click", () => addLine().querySelector("select").focus());
  lines.addEventListener("click", onClick);
  $("form").addEventListener("input", (event) => {
    key = newKey(); // another order than before
    clearError(event.target);
    showTotal();
  });
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    submit(place);
  });
}

function addLine() {
  const line = $("line-template").content.firstElementChild.cloneNode(true);
  const select = line.querySelector("select");
  for (const product of products.values()) {
    select.append(new Option(`${product.name} · ${money(cents(product.price))}`, product.product_id));
  }
  const taken = new Set([...lines.querySelectorAll("select")].map((other) => other.value));
  select.value = [...products.keys()].find((id) => !taken.has(id)) ?? products.keys().next().value;
  lines.append(line);
  key = newKey();
  showTotal();
  return line;
}

function onClick(event) {
  const button = event.target.closest("button");
  if (!button) return;
  const line = button.closest("li");
  if (button.dataset.step) {
    const input = line.querySelector("input");
    input.value = Math.min(10000, Math.max(1, Math.trunc(Number(input.value) || 0) + Number(button.dataset.step)));
    input.dispatchEvent(new Event("input", { bubbles: true }));
  } else {
    const next = line.nextElementSibling ?? line.previousElementSibling;
    line.remove();
    next.querySelector("select").focus();
    key = newKey();
    showTotal();
  }
}

/** The lines as they stand; sum is in cents, NaN where the quantity is none. */
function read() {
  return [...lines.children].map((line) => {
    const product = products.get(line.querySelector("select").value);
    const text = line.querySelector("input").value;
    const quantity = text === "" ? null : Number(text);
    const sum = Number.isInteger(quantity) && quantity > 0 ? cents(product.price) * quantity : NaN;
    return { line, product, quantity, sum };
  });
}

function showTotal() {
  let total = 0;
  for (const { line, product, sum } of read()) {
    line.querySelector(".sum").value = Number.isNaN(sum) ? "–" : money(sum);
    line.querySelector(".remove").setAttribute("aria-label", `Remove ${product.name}`);
    total += sum;
  }
  $("total").value = Number.isNaN(total) ? "–" : money(total);
}

async function submit(place) {
  clearErrors();
  const read_ = read();
  const total = read_.reduce((sum, line) => sum + line.sum, 0);
  const order = {
    customer_email: $("email").value,
    items: read_.map(({ product, quantity }) => ({
      product_id: product.product_id, name: product.name, quantity, price: product.price,
    })),
    ...(Number.isNaN(total) ? {} : { total_amount: (total / 100).toFixed(2) }),
  };
  const button = $("submit");
  button.disabled = true;
  button.textContent = "Placing the order…";
  try {
    const answer = await place(order, key);
    if (answer.ok) {
      key = newKey();
      lines.replaceChildren();
      addLine();
    } else if (answer.status === 422) {
      showErrors((await answer.json()).detail);
    } else {
      const said = await answer.json().catch(() => ({}));
      showFormError(typeof said.detail === "string" ? said.detail : `The shop answered with error ${answer.status}. Try again in a moment.`);
    }
  } catch {
    showFormError("The shop does not answer. Press the button again in a moment: the order is placed only once.");
  } finally {
    button.disabled = false;
    button.textContent = "Place order";
  }
}

/** Put each error of the server (FastAPI's form: loc and msg) beside its field, and go to the first one. */
function showErrors(problems) {
  for (const { loc, msg } of problems) {
    const [, field, index, part] = loc;
    if (field === "customer_email") {
      showError($("email"), $("email-error"), msg);
    } else if (field === "items" && lines.children[index]) {
      const line = lines.children[index];
      showError(line.querySelector(part === "quantity" ? "input" : "select"), line.querySelector(".error"), msg);
    } else if (field === "items") {
      $("items-error").hidden = false;
      $("items-error").textContent = msg;
    } else {
      showFormError(msg);
    }
  }
  ($("form").querySelector("[aria-invalid]") ?? $("submit")).focus();
}

function showError(field, place, text) {
  place.id ||= `error-${Math.random().toString(36).slice(2)}`;
  place.textContent = text;
  place.hidden = false;
  field.setAttribute("aria-invalid", "true");
  field.setAttribute("aria-describedby", place.id);
}

function showFormError(text) {
  $("form-error").textContent = text;
  $("form-error").hidden = false;
}

function clearError(field) {
  field.removeAttribute("aria-invalid");
  const place = field.closest("li, .field")?.querySelector(".error");
  if (place) place.hidden = true;
  $("form-error").hidden = true;
}

function clearErrors() {
  for (const field of $("form").querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
  for (const place of $("form").querySelectorAll(".error")) place.hidden = true;
}

/** Lets the server tell a repeated order from a second one. */
function newKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
