// One stream of frames: the newest request wins, a frame is taken once it is painted, lost connections come back.

import { unpack } from "./frame.js"
import { TokenNeeded } from "./server.js"

const FINAL = [1003, 1007, 1009] // the same message would be refused again
const POLICY = 1008
const FIRST_DELAY = 250
const LONGEST_DELAY = 15_000
const PAUSE = 1000 // ms from a refusal to the next try, however fast the hand is

/**
 * A stream that is open while it is needed.
 *
 *     new Stream({ open, probe, paint, measure, tell }).ask({ seed: 3, walk: [0, 1] })
 *
 * open: makes a socket. probe: asks the server how it is, and throws what is wrong. paint: called with each frame,
 * `{ header, pixels, times }`, right before the display shows its next picture. measure: called with it afterwards, `times`
 * being moments of performance.now(): asked, ready (the server could begin), received, unpacked, begun, painted.
 * tell: called with the state of the connection:
 *
 *     connecting, live
 *     waiting      lost; tries again at `until`, in ms of performance.now()
 *     asleep       closed because nothing happened for long; the next request opens it
 *     refused      the request was wrong; the next one opens it
 *     locked       the server wants a token
 */
export class Stream {
  #socket = null
  #open
  #probe
  #paint
  #measure
  #tell
  #newest = null // the request that was not sent yet, with the time of its asking
  #sent = new Map() // requests without a frame, by id
  #lastId = -1
  #arrived = null // the frame that waits for the display
  #taken = null // id of the last painted frame
  #takenAt = 0
  #turn = 0 // of the display, 0 for none
  #last = null // the newest request of all, for after a reconnection
  #tries = 0
  #timer = 0

  constructor({ open, probe, paint, measure, tell }) {
    this.#open = open
    this.#probe = probe
    this.#paint = paint
    this.#measure = measure
    this.#tell = tell
    this.state = "asleep"
  }

  /** Ask for a frame; it replaces what was asked before and is not drawn yet. */
  ask(order) {
    this.#last = order
    this.#newest = { order, asked: performance.now() }
    if (this.state === "live") {
      if (this.#sent.size === 0 && this.#arrived === null) this.#send()
      else this.#plan() // what is under way goes first; at most one message for each picture of the display
    } else if (this.state === "asleep") {
      this.#connect()
    } else if (this.state === "refused") {
      this.#timer ||= setTimeout(() => this.#connect(), PAUSE)
    }
  }

  /**
   * When the frame that is awaited could be begun, in ms of performance.now(); null if none is awaited. A frame is awaited
   * until it is painted: one that has arrived still waits for the display.
   */
  get since() {
    let since = this.#arrived?.times.ready ?? null
    for (const { sent } of this.#sent.values()) since = Math.min(since ?? Infinity, Math.max(sent, this.#takenAt))
    return since
  }

  /** Try again now instead of later. */
  retry() {
    if (this.state === "waiting" || this.state === "locked") this.#connect()
  }

  /** Close the stream; the next request opens it again. */
  rest() {
    this.#stopTimer()
    const socket = this.#socket
    this.#reset()
    socket?.close(1000)
    this.#newest = null
    this.#become("asleep")
  }

  #become(state, detail = {}) {
    this.state = state
    this.#tell(state, detail)
  }

  #reset() {
    this.#socket = null
    this.#sent.clear()
    this.#arrived = null
    this.#taken = null
    this.#takenAt = 0
  }

  // The socket --------------------------------------------------------------------------------------------------------

  #stopTimer() {
    clearTimeout(this.#timer)
    this.#timer = 0
  }

  #connect() {
    this.#stopTimer()
    this.#reset()
    this.#become("connecting")
    const socket = this.#open()
    let opened = false
    this.#socket = socket
    socket.onopen = () => {
      opened = true
      this.#become("live")
      this.#newest ??= { order: this.#last, asked: performance.now() }
      this.#send()
    }
    socket.onmessage = ({ data }) => this.#receive(data)
    socket.onclose = ({ code, reason }) => {
      if (socket === this.#socket) this.#lost(opened, code, reason)
    }
  }

  async #lost(opened, code, reason) {
    this.#reset()
    if (FINAL.includes(code)) {
      this.#newest = null
      this.#become("refused", { reason })
      return
    }
    if (code === POLICY && reason.startsWith("idle")) {
      this.#become("asleep")
      return
    }
    const delay = Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** this.#tries) * (0.8 + 0.4 * Math.random())
    this.#tries += 1
    const until = performance.now() + delay
    this.#timer = setTimeout(() => this.#connect(), delay)
    this.#become("waiting", { until, reason: reason || "The connection is lost." })
    if (opened) return
    try {
      await this.#probe() // a handshake that failed does not say why
      if (this.state === "waiting") this.#tell("waiting", { until, reason: "The server takes no further stream." })
    } catch (error) {
      if (this.state !== "waiting") return
      if (error instanceof TokenNeeded) {
        this.#stopTimer()
        this.#become("locked", { reason: error.message })
      } else {
        this.#tell("waiting", { until, reason: error.message })
      }
    }
  }

  // Requests and frames -----------------------------------------------------------------------------------------------

  #send() {
    if (this.#newest === null || this.#socket?.readyState !== WebSocket.OPEN) return
    const { order, asked } = this.#newest
    const id = ++this.#lastId
    this.#newest = null
    this.#sent.set(id, { asked, sent: performance.now() })
    this.#socket.send(JSON.stringify({ id, ...order, format: "raw", taken: this.#taken }))
  }

  #receive(data) {
    const received = performance.now()
    const { header, pixels } = unpack(data)
    const request = this.#sent.get(header.id)
    for (const id of this.#sent.keys()) if (id <= header.id) this.#sent.delete(id)
    if (request === undefined) return
    this.#tries = 0
    const ready = Math.max(request.sent, this.#takenAt)
    this.#arrived = { header, pixels, times: { asked: request.asked, ready, received, unpacked: performance.now() } }
    this.#plan()
  }

  #plan() {
    if (this.#turn === 0) this.#turn = requestAnimationFrame(() => this.#display())
  }

  #display() {
    this.#turn = 0
    const frame = this.#arrived
    this.#arrived = null
    if (frame !== null) {
      frame.times.begun = performance.now()
      this.#paint(frame)
      frame.times.painted = this.#takenAt = performance.now()
      this.#taken = frame.header.id
    }
    if (this.#newest !== null && this.#socket?.bufferedAmount === 0) this.#send()
    else if (frame !== null && this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(`{"taken":${this.#taken}}`)
    if (this.#newest !== null) this.#plan()
    if (frame !== null) this.#measure(frame)
  }
}
