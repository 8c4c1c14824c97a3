// Teacher beside student: a clock for each, running while its picture is in the making.

import { titled, write } from "./dom.js"
import { inMs } from "./latency.js"

/**
 * Who draws in this view: `{ model, steps, name, who }` for each figure. A race is one of the models; where they read words,
 * one step and two are there side by side.
 */
export function lanesOf(info, { view, model, steps }) {
  const alone = (who) => ({ model: who, steps: steps[who], name: titled(who), who })
  if (view !== "race") return [alone(model)]
  return Object.entries(info.models).flatMap(([who, { steps: [low, high], prompt_bytes }]) => {
    if (!prompt_bytes || who !== "student" || low === high) return [alone(who)]
    return ["1 step", "2 steps"].map((name, i) => ({ model: who, steps: i + 1, name, who: `${who} in ${name}` }))
  })
}

/** Whether there is anybody to race with. */
export const canRace = (info) => lanesOf(info, { view: "race", steps: {} }).length > 1

/** The clock below a picture. It stops at the time that its last frame took, from the request to the screen. */
export class Clock {
  #time
  #part
  #bar
  #since = null
  #last = null

  constructor(figure) {
    this.#time = figure.querySelector(".time")
    this.#part = figure.querySelector(".part")
    this.#bar = figure.querySelector(".bar")
  }

  /** Forget the last frame. */
  clear() {
    this.#last = null
  }

  /** A frame is there: its `wall` time and what the neural network had of it. */
  stop({ wall, network }) {
    this.#last = { wall, network }
    this.#since = null
  }

  /** Milliseconds on the clock. `since` is when the frame that is awaited was begun, null for none. */
  at(now, since) {
    this.#since = since
    return since === null ? (this.#last?.wall ?? 0) : Math.max(0, now - since)
  }

  get wall() {
    return this.#last?.wall ?? null
  }

  /** Show these milliseconds, as a number and as a part of `whole`. */
  show(ms, whole) {
    write(this.#time, inMs(ms))
    write(this.#part, `last ${inMs(this.wall)} ms,\nnetwork ${inMs(this.#last?.network ?? null)} ms`)
    this.#bar.style.transform = `scaleX(${Math.min(1, ms / whole).toFixed(4)})`
    this.#bar.parentElement.classList.toggle("running", this.#since !== null)
  }
}

/** How many times as fast the first is, in words; empty while one of them has no picture yet. */
export function verdict(first, second, names) {
  if (!first || !second) return ""
  const ratio = second / first
  const [fast, slow, times] = ratio >= 1 ? [names[0], names[1], ratio] : [names[1], names[0], 1 / ratio]
  return `The ${fast} is ${times < 9.95 ? times.toFixed(1) : times.toFixed(0)}× as fast as the ${slow}.`
}
