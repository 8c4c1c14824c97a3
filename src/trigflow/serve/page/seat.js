// One of the places for pictures: its canvas, where they come from, its clock and figures.

import { Picture } from "./canvas.js"
import { Stream } from "./connection.js"
import { find, write } from "./dom.js"
import { Figures, partsOf } from "./latency.js"
import { Clock } from "./race.js"
import { inWords } from "./scene.js"
import { describe, openStream } from "./server.js"

/** The place in `figure`. `tell(seat, state, detail)` is called with the states of its stream. */
export class Seat {
  constructor(figure, tell) {
    this.figure = figure
    this.name = ""
    this.picture = new Picture(figure.querySelector("canvas"))
    this.clock = new Clock(figure)
    this.figures = new Figures()
    this.grids = new Map()
    this.ends = {
      paint: (frame) => this.picture.show(frame, this.grids.get(frame.header.shape[0])),
      measure: (frame) => this.#measure(frame),
      tell: (state, detail) => tell(this, state, detail),
    }
    this.frames = new Stream({ open: openStream, probe: describe, ...this.ends })
    this.stream = this.frames
  }

  /** Take pictures from another source, which was made with `ends`; the one before rests. Whether it is another. */
  take(source) {
    if (source === this.stream) return false
    this.stream.rest()
    this.stream = source
    return true
  }

  /** Ask for pictures in this grid, drawn by somebody of this name. */
  ask(order, grid, name) {
    if (this.name !== name) {
      this.name = name
      this.figure.dataset.model = order.model
      this.figures = new Figures()
      this.clock.clear()
      write(this.figure.querySelector(".name"), name)
    }
    const canvas = this.figure.querySelector("canvas")
    const seen = `${inWords(order.prompt ?? "Pictures")}, ${name}`
    if (canvas.ariaLabel !== seen) canvas.ariaLabel = seen
    this.grids.set(order.count, grid)
    this.stream.ask(order)
  }

  #measure(frame) {
    const { classList } = find("stage")
    if (!classList.contains("seen")) performance.mark("first-frame")
    classList.add("seen")
    this.figures.add(frame)
    this.clock.stop(partsOf(frame))
  }
}
