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
  #context
  #image = null
  #grid = { columns: 1, rows: 1 }
  #shape = [1, 1, 1]
  #count = 0

  constructor(canvas) {
    this.#canvas = canvas
    this.#context = canvas.getContext("2d")
    new ResizeObserver(() => fit(canvas)).observe(canvas.parentElement)
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
      this.#canvas.classList.toggle("crisp", isCrisp(h, w))
    }
    this.#grid = grid
    this.#shape = shape
    this.#count = count
    for (let k = 0; k < count; k++) {
      place(this.#image, pixels, k, shape, (k % grid.columns) * (w + gap), Math.floor(k / grid.columns) * (h + gap))
    }
    this.#context.putImageData(this.#image, 0, 0)
    fit(this.#canvas)
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

  /** Picture number 0 as ImageData, null before the first frame. */
  first() {
    const [, h, w] = this.#shape
    return this.#count ? this.#context.getImageData(0, 0, w, h) : null
  }
}

/** Whether pictures of this height and width show their pixels. */
export const isCrisp = (h, w) => Math.max(h, w) <= CRISP

/**
 * Make a canvas as large as the box around it allows; a crisp one by a whole number of the display's pixels, so that all are
 * equally large.
 */
export function fit(canvas) {
  const { width, height } = canvas
  const box = canvas.parentElement
  const most = Math.min(box.clientWidth / width, box.clientHeight / height)
  const dots = window.devicePixelRatio || 1
  const scale = canvas.classList.contains("crisp") && most * dots >= 2 ? Math.floor(most * dots) / dots : most
  const [wide, high] = [`${scale * width}px`, `${scale * height}px`]
  if (canvas.style.width === wide && canvas.style.height === high) return
  canvas.style.width = wide
  canvas.style.height = high
}
