// The live connection to one order: opens, listens, and opens again when it breaks.

const FIRST_WAIT = 0.5; // seconds; doubles with every failed attempt
const LONGEST_WAIT = 5;
const SILENT_OPENING = 5; // seconds after which an attempt that neither opened nor failed is given up

export class Live {
  #socket = null;
  #attempts = 0;
  #timer = null;
  #over = false;

  /**
   * @param {string} id the order's
   * @param {(order: object) => void} onOrder receives every state of the order
   * @param {(state: {name: "connecting" | "reconnecting" | "live" | "waiting" | "unknown", seconds?: number}) => void} onState
   */
  constructor(id, onOrder, onState) {
    this.id = id;
    this.onOrder = onOrder;
    this.onState = onState;
    this.retry = this.retry.bind(this);
    addEventListener("online", this.retry);
    this.#open();
  }

  /** Try at once, instead of waiting any longer. */
  retry() {
    if (this.#timer && !this.#over) this.#open();
  }

  close() {
    this.#over = true;
    clearTimeout(this.#timer);
    removeEventListener("online", this.retry);
    this.#socket?.close();
  }

  #open() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.onState({ name: this.#attempts ? "reconnecting" : "connecting" });
    const url = new URL(`/ws/orders/${encodeURIComponent(this.id)}`, location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = (this.#socket = new WebSocket(url));
    const patience = setTimeout(() => socket.close(), SILENT_OPENING * 1000);
    socket.addEventListener("open", () => clearTimeout(patience));
    socket.addEventListener("message", (event) => {
      if (this.#over) return;
      const message = JSON.parse(event.data);
      if (message.type !== "status_update") return;
      this.#attempts = 0;
      this.onOrder(message.order);
      this.onState({ name: "live" });
    });
    socket.addEventListener("close", (event) => {
      clearTimeout(patience);
      if (this.#over) return;
      if (event.code === 4404) {
        this.close();
        this.onState({ name: "unknown" });
        return;
      }
      const wait = Math.min(LONGEST_WAIT, FIRST_WAIT * 2 ** this.#attempts++) * (0.8 + 0.4 * Math.random());
      this.#countDown(Date.now() + wait * 1000);
    });
  }

  #countDown(until) {
    const left = until - Date.now();
    if (left <= 0) return this.#open();
    this.onState({ name: "waiting", seconds: Math.ceil(left / 1000) });
    this.#timer = setTimeout(() => this.#countDown(until), Math.min(left, left % 1000 || 1000));
  }
}
