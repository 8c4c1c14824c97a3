// Pictures on a canvas: one pixel of the canvas for each of the model, as large as there is room.

import { place } from "./frame.js"

const CRISP = 64 // pictures up to this size show their pixels, larger ones are smoothed
const SAVED = 512 // pixels of the shorter side of a saved picture, at least, if it is crisp

/** Columns and rows for `count` pictures, as square as can be. */
export function squareGrid(count) {
  const columns = Math.ceil(Math.sqrt(count))
  return { columns, rows: Math.ceil(count / columns) }
}

/** Pixels between pictures of this height and width. */
export const gapOf = (h, w) => Math.max(1, Math.round(Math.min(h, w) / 16))

/** A canvas that shows frames and fills the box around it as far as their shape allows. */
export class Picture {
  #canvas
  #box
  #context
  #image = null
  #grid = { columns: 1, rows: 1 }
  #shape = [1, 1, 1]
  #count = 0

  constructor(canvas) {
    this.#canvas = canvas
    this.#box = canvas.parentElement
    this.#context = canvas.getContext("2d")
    new ResizeObserver(() => this.#fit()).observe(this.#box)
  }

  /** Show the pictures of a frame in these columns and rows. */
  show({ header, pixels }, grid) {
    const [count, ...shape] = header.shape
    const [, h, w] = shape
    const gap = grid.columns * grid.rows > 1 ? gapOf(h, w) : 0
    const [width, height] = [grid.columns * (w + gap) - gap, grid.rows * (h + gap) - gap]
    if (this.#image?.width !== width || this.#image.height !== height || this.#count !== count) {
      this.#canvas.width = width
      this.#canvas.height = height
      this.#image = new ImageData(width, height)
      this.#canvas.classList.toggle("crisp", Math.max(h, w) <= CRISP)
    }
    this.#grid = grid
    this.#shape = shape
    this.#count = count
    for (let k = 0; k < count; k++) {
      place(this.#image, pixels, k, shape, (k % grid.columns) * (w + gap), Math.floor(k / grid.columns) * (h + gap))
    }
    this.#context.putImageData(this.#image, 0, 0)
    this.#fit()
  }

  /** The number of the picture at a point of the window; null between and beside them. */
  at(x, y) {
    const box = this.#canvas.getBoundingClientRect()
    if (x < box.left || x >= box.right || y < box.top || y >= box.bottom) return null
    const column = Math.floor(((x - box.left) / box.width) * this.#grid.columns)
    const row = Math.floor(((y - box.top) / box.height) * this.#grid.rows)
    const k = row * this.#grid.columns + column
    return k < this.#count ? k : null
  }

  /** What is seen, as a new canvas: crisp pictures are enlarged by a whole number, so that viewers do not blur them. */
  copy() {
    const { width, height } = this.#canvas
    const crisp = this.#canvas.classList.contains("crisp")
    const scale = crisp ? Math.max(1, Math.ceil(SAVED / Math.min(width, height))) : 1
    const copy = Object.assign(document.createElement("canvas"), { width: scale * width, height: scale * height })
    const context = copy.getContext("2d")
    context.imageSmoothingEnabled = false
    context.drawImage(this.#canvas, 0, 0, copy.width, copy.height)
    return copy
  }

  /** As large as the box allows; crisp pictures by a whole number of the display's pixels, so that all are equally large. */
  #fit() {
    const { width, height } = this.#canvas
    const most = Math.min(this.#box.clientWidth / width, this.#box.clientHeight / height)
    const dots = window.devicePixelRatio || 1
    const scale = this.#canvas.classList.contains("crisp") && most * dots >= 2 ? Math.floor(most * dots) / dots : most
    const [wide, high] = [`${scale * width}px`, `${scale * height}px`]
    if (this.#canvas.style.width === wide && this.#canvas.style.height === high) return
    this.#canvas.style.width = wide
    this.#canvas.style.height = high
  }
}
