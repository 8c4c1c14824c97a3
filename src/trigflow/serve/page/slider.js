// A slider with its name and its value.

import { make, write } from "./dom.js"

let count = 0

/**
 * A range input over `values`, a list of numbers in order, that calls `changed(value)` while it moves.
 *
 * name: what it is called. show: the value as text. extra: an element at the end of its head.
 */
export class Slider {
  #values
  #show
  #input
  #output

  constructor({ name, values, value, show = String, changed, extra = null }) {
    const id = `slider-${++count}`
    this.#values = values
    this.#show = show
    this.#output = make("output", { htmlFor: id })
    this.#input = make("input", { id, type: "range", min: 0, max: values.length - 1, step: 1 })
    const head = make("div", { className: "head" }, make("label", { htmlFor: id }, name), this.#output, ...(extra ? [extra] : []))
    this.element = make("div", { className: "slider" }, head, this.#input)
    this.#input.addEventListener("input", () => {
      this.#write()
      changed(this.value)
    })
    this.value = value
  }

  get value() {
    return this.#values[this.#input.value]
  }

  /** Set to the nearest value; nobody is told. */
  set value(value) {
    const distance = this.#values.map((other) => Math.abs(other - value))
    this.#input.value = distance.indexOf(Math.min(...distance))
    this.#write()
  }

  /** Change how the value is shown. */
  set show(show) {
    this.#show = show
    this.#write()
  }

  #write() {
    const text = this.#show(this.value)
    write(this.#output, text)
    this.#input.setAttribute("aria-valuetext", text)
    this.#input.style.setProperty("--part", this.#input.value / Math.max(1, this.#values.length - 1))
  }
}

/** Numbers from low to high, both included, in equal steps of about `step`. */
export function evenly(low, high, step) {
  const parts = Math.max(1, Math.round((high - low) / step))
  return Array.from({ length: parts + 1 }, (_, i) => Number((low + ((high - low) * i) / parts).toFixed(6)))
}

/** Numbers of steps from low to high: every one at first, then ever larger jumps; `also` is among them. */
export function stepsBetween(low, high, also) {
  const found = new Set([low, also, high])
  for (let steps = low; steps < high; steps += Math.max(1, Math.floor(steps / 8))) found.add(steps)
  return [...found].sort((a, b) => a - b)
}
