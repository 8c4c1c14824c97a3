// Where the time from a movement to its picture goes, over the last seconds.

import { make, write } from "./dom.js"

const WINDOW = 5000 // ms that count
const PARTS = [
  ["held", "Held back", "until the last picture was on the screen"],
  ["transport", "Transport", "both ways, and the browser"],
  ["queue", "Queue", "behind the requests of others"],
  ["network", "Neural network", "all steps"],
  ["encode", "Encoding", "on the server"],
  ["paint", "Decode, paint", "in this page"],
  ["display", "Display", "until it shows its next picture"],
]

/** The parts of a frame's time in milliseconds; they add up to `total`. Of the server's figures the frame's header tells. */
export function partsOf({ header, times }) {
  const { asked, ready, received, unpacked, begun, painted } = times
  const answered = received - ready
  const network = Math.min(header.ms.network, answered)
  const encode = Math.min(header.ms.encode, answered - network)
  const queue = Math.min(header.ms.queue, answered - network - encode) // a request may take over the place of an older one
  return {
    held: ready - asked,
    transport: answered - network - encode - queue,
    queue,
    network,
    encode,
    paint: unpacked - received + painted - begun,
    display: begun - unpacked,
    total: painted - asked,
    wall: painted - ready,
  }
}

/** Figures of the frames of the last seconds. */
export class Figures {
  #frames = []

  add(frame) {
    const at = frame.times.painted
    this.#frames.push({ at, ...partsOf(frame) })
    this.#forget(at)
  }

  /** Frames that count now. */
  count(now) {
    this.#forget(now)
    return this.#frames.length
  }

  /** Frames a second, over the last second. */
  rate(now) {
    return this.#frames.filter(({ at }) => at > now - 1000).length
  }

  /** Percentile q of a part; null without frames. */
  percentile(part, q) {
    const sorted = this.#frames.map((frame) => frame[part]).sort((a, b) => a - b)
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : null
  }

  #forget(now) {
    while (this.#frames.length > 1 && this.#frames[0].at < now - WINDOW) this.#frames.shift()
  }
}

/** Milliseconds for people: a tenth matters below ten. */
export const inMs = (value) => (value === null ? "–" : value < 9.95 ? value.toFixed(1) : value.toFixed(0))

/** The table of all parts, in `body`, and the line below it. */
export class Table {
  #rows

  constructor(body) {
    this.#rows = [...PARTS, ["total", "All", "from the movement to the picture"]].map(([part, name, note]) => {
      const bar = make("i", { className: "bar" })
      const cells = [make("td"), make("td")]
      const head = make("th", { scope: "row" }, name, make("small", {}, note), bar)
      body.append(make("tr", { className: part }, head, ...cells))
      return { part, bar, cells }
    })
  }

  update(figures) {
    const whole = figures.percentile("total", 0.5) || 1
    for (const { part, bar, cells } of this.#rows) {
      const median = figures.percentile(part, 0.5)
      write(cells[0], inMs(median))
      write(cells[1], inMs(figures.percentile(part, 0.95)))
      bar.style.transform = `scaleX(${Math.min(1, (median ?? 0) / whole)})`
    }
  }
}
