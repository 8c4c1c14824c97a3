// Edits of a painting as a source of frames: one request under way, the newest is next, what fails is said and tried again.

import { unpackNpy } from "./frame.js"
import { Refused, TokenNeeded } from "./server.js"

const FIRST_DELAY = 250
const LONGEST_DELAY = 15_000
const PAUSE = 1000 // ms from a refusal to the next try, however fast the hand is

/**
 * Takes the place of a `Stream`, and tells the same states; `live` with the first answer.
 *
 * post: `post(order, signal)` sends an order together with the painting as it is in that moment, and gives the answer,
 * `{ buffer, ms }`. paint, measure, tell: as of a `Stream`.
 */
export class Edits {
  #post
  #paint
  #measure
  #tell
  #newest = null // the order that was not sent yet, with the time of its asking
  #last = null // the newest of all
  #request = null // the one under way, until its picture is painted
  #refused = -Infinity
  #tries = 0
  #timer = 0

  constructor({ post, paint, measure, tell }) {
    this.#post = post
    this.#paint = paint
    this.#measure = measure
    this.#tell = tell
    this.state = "asleep"
  }

  /** Ask for pictures of the painting; this replaces what was asked before and is not sent yet. */
  ask(order) {
    this.#last = this.#newest = { order, asked: performance.now() }
    if (this.state === "waiting" || this.state === "locked" || this.#request !== null) return
    const pause = this.#refused + PAUSE - performance.now()
    if (pause <= 0) this.#send()
    else this.#timer ||= setTimeout(() => this.#send(), pause)
  }

  /** When the request under way was sent, in ms of performance.now(); null for none. */
  get since() {
    return this.#request?.sent ?? null
  }

  /** Try again now instead of later. */
  retry() {
    if (this.state === "waiting" || this.state === "locked") this.#send()
  }

  /** Ask for nothing, until somebody does again. */
  rest() {
    this.#stopTimer()
    this.#request?.control.abort()
    this.#request = this.#newest = null
    this.#become("asleep")
  }

  #become(state, detail = {}) {
    this.state = state
    this.#tell(state, detail)
  }

  #stopTimer() {
    clearTimeout(this.#timer)
    this.#timer = 0
  }

  async #send() {
    this.#stopTimer()
    const { order, asked } = this.#newest ?? this.#last
    const request = { asked, sent: performance.now(), control: new AbortController() }
    this.#newest = null
    this.#request = request
    try {
      const { buffer, ms } = await this.#post(order, request.control.signal)
      const received = performance.now()
      const { shape, pixels } = unpackNpy(buffer)
      const times = { asked, ready: request.sent, received, unpacked: performance.now() }
      if (request === this.#request) requestAnimationFrame(() => this.#show(request, { header: { shape, ms }, pixels, times }))
    } catch (error) {
      if (request === this.#request) this.#fail(error)
    }
  }

  #show(request, frame) {
    if (request !== this.#request) return
    frame.times.begun = performance.now()
    this.#paint(frame)
    frame.times.painted = performance.now()
    this.#request = null
    this.#tries = 0
    if (this.state !== "live") this.#become("live")
    if (this.#newest !== null) this.#send()
    this.#measure(frame)
  }

  #fail(error) {
    this.#request = null
    const reason = error.message
    if (error instanceof TokenNeeded) {
      this.#become("locked", { reason })
    } else if (error instanceof Refused && error.final) {
      this.#refused = performance.now()
      this.#become("refused", { reason })
      if (this.#newest !== null) this.ask(this.#newest.order) // it may be better
    } else {
      const delay = error.after ?? Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** this.#tries) * (0.8 + 0.4 * Math.random())
      this.#tries += 1
      this.#timer = setTimeout(() => this.#send(), delay)
      this.#become("waiting", { until: performance.now() + delay, reason })
    }
  }
}
