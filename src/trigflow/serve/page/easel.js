// The canvas that is painted on: by mouse, finger, pen or keys.

import { fit, isCrisp } from "./canvas.js"
import { find, write } from "./dom.js"

const MARK = [255, 32, 144] // what is to be drawn anew is seen through stripes of this
const STRIPES = [0.3, 0.75]
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
const FAST = 8 // parts of the shorter side for a step with Shift

/** Shows a painting on `canvas` and paints on it with what `brush()` gives; `changed()` is called after every movement. */
export class Easel {
  #painting
  #brush
  #changed
  #canvas
  #context
  #shown
  #ring
  #pointer = null
  #cursor // of the keys, a whole pixel
  #typing = false // a stroke by keys

  constructor(canvas, painting, { brush, changed }) {
    const { width, height } = painting.image
    this.#painting = painting
    this.#brush = brush
    this.#changed = changed
    this.#canvas = Object.assign(canvas, { width, height })
    this.#context = canvas.getContext("2d", { alpha: false, willReadFrequently: true })
    this.#shown = new ImageData(width, height)
    this.#ring = canvas.parentElement.querySelector(".ring")
    this.#cursor = [Math.floor(width / 2), Math.floor(height / 2)]
    canvas.classList.toggle("crisp", isCrisp(height, width))
    new ResizeObserver(() => fit(canvas)).observe(canvas.parentElement)
    this.#listen()
    this.show()
  }

  #listen() {
    const listeners = {
      pointerdown: (event) => this.#press(event),
      pointermove: (event) => this.#move(event),
      pointerup: (event) => this.#release(event),
      pointercancel: (event) => this.#release(event),
      pointerleave: () => (this.#ring.hidden = true),
      contextmenu: (event) => this.#pointer !== null && event.preventDefault(),
      keydown: (event) => this.#keyDown(event),
      keyup: (event) => event.key === " " && this.#lift(),
      focus: () => this.#canvas.matches(":focus-visible") && this.#point(...this.#middle()),
      blur: () => {
        this.#lift()
        this.#ring.hidden = true
      },
    }
    for (const [kind, listener] of Object.entries(listeners)) this.#canvas.addEventListener(kind, listener)
  }

  /** Show the painting as it is, and what of it is marked. */
  show() {
    const { image, mask } = this.#painting
    const { data, width } = this.#shown
    data.set(image.data)
    for (let i = 0; i < mask.length; i++) {
      if (mask[i] === 0) continue
      const share = STRIPES[((i % width) + Math.floor(i / width)) % 4 < 2 ? 0 : 1]
      for (let k = 0; k < 3; k++) data[4 * i + k] += share * (MARK[k] - data[4 * i + k])
    }
    this.#context.putImageData(this.#shown, 0, 0)
  }

  #go(points) {
    for (const point of points) this.#painting.to(...point)
    this.show()
    this.#changed()
  }

  // Hand --------------------------------------------------------------------------------------------------------------

  /** Where on the painting an event is, in its pixels. */
  #place({ clientX, clientY }) {
    const box = this.#canvas.getBoundingClientRect()
    const { width, height } = this.#canvas
    return [((clientX - box.left) / box.width) * width, ((clientY - box.top) / box.height) * height]
  }

  #press(event) {
    if (this.#pointer !== null || event.button !== 0) return
    this.#lift()
    this.#canvas.setPointerCapture(event.pointerId)
    this.#pointer = event.pointerId
    this.#painting.begin(this.#brush())
    this.#go([this.#place(event)])
  }

  #move(event) {
    if (event.pointerType !== "touch") this.#point(...this.#place(event))
    if (this.#pointer !== event.pointerId) return
    const between = event.getCoalescedEvents?.() ?? []
    this.#go((between.length ? between : [event]).map((one) => this.#place(one)))
  }

  #release(event) {
    if (this.#pointer !== event.pointerId) return
    this.#pointer = null
    this.#painting.end()
  }

  /** Show how large the brush is, around this point. */
  #point(x, y) {
    const scale = this.#canvas.clientWidth / this.#canvas.width
    const { size } = this.#brush()
    const { style } = this.#ring
    style.width = style.height = `${Math.max(4, size * scale)}px`
    style.left = `${this.#canvas.offsetLeft + x * scale}px`
    style.top = `${this.#canvas.offsetTop + y * scale}px`
    this.#ring.hidden = false
  }

  // Keys --------------------------------------------------------------------------------------------------------------

  #middle() {
    return this.#cursor.map((part) => part + 0.5)
  }

  #keyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS || event.key === " ")) return
    event.preventDefault()
    if (this.#pointer !== null) return
    if (event.key !== " ") this.#step(KEYS[event.key], event.shiftKey)
    else if (!event.repeat) {
      this.#painting.begin(this.#brush())
      this.#typing = true
    }
    this.#point(...this.#middle())
    if (this.#typing) this.#go([this.#middle()])
  }

  #step(way, fast) {
    const sizes = [this.#canvas.width, this.#canvas.height]
    const far = fast ? Math.max(2, Math.round(Math.min(...sizes) / FAST)) : 1
    this.#cursor = this.#cursor.map((part, i) => Math.min(sizes[i] - 1, Math.max(0, part + far * way[i])))
    const [x, y] = this.#cursor
    write(find("spot"), `Column ${x + 1}, row ${y + 1}`)
  }

  #lift() {
    if (!this.#typing) return
    this.#typing = false
    this.#painting.end()
  }
}
