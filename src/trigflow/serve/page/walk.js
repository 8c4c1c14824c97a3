// Walking through noise space: two angles, moved by a hand, by keys, by what is left of a flick, and by a slow drift.

import { calm, eachFrame } from "./dom.js"

const TURN = 2 * Math.PI
const REACH = 2.4 // radians for a drag across the shorter side of the stage
const KEY_SPEED = 0.9 // radians a second
const KEY_STEP = 0.06 // radians, where motion is to be kept small
const DRIFT_SPEED = 0.22
const SETTLING = 0.55 // seconds in which a flick loses all but a third of its speed
const SLOWEST = 0.01 // radians a second; slower is at rest
const MEMORY = 90 // ms of a drag that count for its flick
const TAP = 6 // pixels a finger may move without it being a drag
const DRIFT_PATIENCE = 120_000 // ms after which a drift that nobody watches ends

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }

/** An angle in (-pi, pi]: the torus has no seam, so that nothing is seen of it. */
export const wrapped = (angle) => angle - TURN * Math.round(angle / TURN)

/**
 * Listens on `stage` and calls `move([a, b])`, `tap(x, y)` for a touch that was no drag, in pixels of the window, and
 * `drifting(on)` when the drift begins or ends. `at` is where the walk is; set it to go elsewhere.
 */
export class Walk {
  #stage
  #move
  #tap
  #drifting
  #speed = [0, 0] // radians a second
  #heading = [Math.SQRT1_2, Math.SQRT1_2]
  #drift = false
  #drag = null
  #keys = new Set()
  #fast = false
  #before = 0
  #touched = 0
  #go

  constructor(stage, { move, tap, drifting }) {
    this.at = [0, 0]
    this.#stage = stage
    this.#move = move
    this.#tap = tap
    this.#drifting = drifting
    this.#go = eachFrame((now) => this.#turn(now))
    stage.addEventListener("pointerdown", (event) => this.#press(event))
    stage.addEventListener("pointermove", (event) => this.#pull(event))
    stage.addEventListener("pointerup", (event) => this.#release(event))
    stage.addEventListener("pointercancel", (event) => this.#release(event))
    stage.addEventListener("keydown", (event) => this.#keyDown(event))
    stage.addEventListener("keyup", (event) => this.#keyUp(event))
    stage.addEventListener("blur", () => this.#keys.clear())
  }

  get drift() {
    return this.#drift
  }

  /** Walk on slowly by itself, or stop. */
  set drift(on) {
    if (on === this.#drift) return
    this.#drift = on
    this.#touched = performance.now()
    this.#drifting(on)
    if (on) this.#start()
    else this.#speed = [0, 0]
  }

  /** Somebody is there: the drift may go on. */
  touch() {
    this.#touched = performance.now()
  }

  #step(a, b) {
    this.at = [wrapped(this.at[0] + a), wrapped(this.at[1] + b)]
    this.#move(this.at)
  }

  // Hand --------------------------------------------------------------------------------------------------------------

  #press(event) {
    if (this.#drag !== null || event.button !== 0 || event.target.closest("button, a, input")) return
    this.#stage.setPointerCapture(event.pointerId)
    this.#drag = { pointer: event.pointerId, from: [event.clientX, event.clientY], trail: [trace(event)], moved: false }
    this.#speed = [0, 0]
    this.touch()
  }

  #pull(event) {
    const drag = this.#drag
    if (drag?.pointer !== event.pointerId) return
    const [x, y] = drag.from
    drag.moved ||= Math.hypot(event.clientX - x, event.clientY - y) > TAP
    if (!drag.moved) return
    this.#stage.classList.add("dragged")
    const last = drag.trail.at(-1)
    const here = trace(event)
    drag.trail = [...drag.trail.filter(({ time }) => here.time - time < MEMORY), here]
    const scale = this.#scale()
    this.#step(scale * (here.x - last.x), scale * (here.y - last.y))
  }

  #release(event) {
    const drag = this.#drag
    if (drag?.pointer !== event.pointerId) return
    this.#drag = null
    this.#stage.classList.remove("dragged")
    this.touch()
    if (!drag.moved) {
      if (event.type === "pointerup") this.#tap(event.clientX, event.clientY)
    } else if (!calm()) {
      this.#speed = this.#flick(drag.trail, event.timeStamp)
      const length = Math.hypot(...this.#speed)
      if (length > 0.1) this.#heading = this.#speed.map((part) => part / length)
    }
    this.#start()
  }

  /** Speed of the hand when it let go, in radians a second. */
  #flick(trail, now) {
    const recent = trail.filter(({ time }) => now - time < MEMORY)
    if (recent.length < 2) return [0, 0]
    const [first, last] = [recent[0], recent.at(-1)]
    const seconds = Math.max(8, last.time - first.time) / 1000
    return [(last.x - first.x) / seconds, (last.y - first.y) / seconds].map((pixels) => this.#scale() * pixels)
  }

  #scale() {
    return REACH / Math.max(1, Math.min(this.#stage.clientWidth, this.#stage.clientHeight))
  }

  // Keys --------------------------------------------------------------------------------------------------------------

  #keyDown(event) {
    if (event.target !== this.#stage || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return
    event.preventDefault()
    this.touch()
    this.#fast = event.shiftKey
    if (calm()) {
      this.#step(...KEYS[event.key].map((part) => part * KEY_STEP * (this.#fast ? 4 : 1)))
      return
    }
    if (!this.#keys.has(event.key)) this.#step(...KEYS[event.key].map((part) => part * KEY_STEP)) // a tap is a step, too
    this.#keys.add(event.key)
    this.#start()
  }

  #keyUp(event) {
    this.#keys.delete(event.key)
    this.#fast = event.shiftKey
  }

  // Time --------------------------------------------------------------------------------------------------------------

  #start() {
    this.#before = performance.now()
    this.#go()
  }

  #turn(now) {
    const seconds = Math.min(0.1, Math.max(0, now - this.#before) / 1000)
    this.#before = now
    if (this.#drift && now - this.#touched > DRIFT_PATIENCE) this.drift = false
    if (this.#drag !== null) return false
    const wanted = this.#wanted()
    const kept = this.#keys.size > 0 ? 0 : Math.exp(-seconds / SETTLING)
    this.#speed = this.#speed.map((part, i) => wanted[i] + kept * (part - wanted[i]))
    const driven = this.#keys.size > 0 || this.#drift
    if (!driven && Math.hypot(...this.#speed) < SLOWEST) {
      this.#speed = [0, 0]
      return false
    }
    this.#step(...this.#speed.map((part) => part * seconds))
    return true
  }

  /** The speed that the walk settles at. */
  #wanted() {
    if (this.#keys.size > 0) {
      const speed = KEY_SPEED * (this.#fast ? 4 : 1)
      return [0, 1].map((i) => [...this.#keys].reduce((sum, key) => sum + KEYS[key][i], 0) * speed)
    }
    return this.#drift ? this.#heading.map((part) => DRIFT_SPEED * part) : [0, 0]
  }
}

const trace = ({ clientX, clientY, timeStamp }) => ({ x: clientX, y: clientY, time: timeStamp })
