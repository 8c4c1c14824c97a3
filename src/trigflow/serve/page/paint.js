// A painting of the model's own size: its pixels, what of it is to be drawn anew, strokes, and the way back.

const LEVELS = 50 // that can be undone
const MEMORY = 2 ** 25 // bytes for them, but for the last few
const FEWEST = 5
const FINE = 3 // pixels; a thinner brush keeps to whole pixels
const WHITE = 255

/** What a gray picture has of a colour, as the server takes it. */
export const luminance = ([r, g, b]) => (19595 * r + 38470 * g + 7471 * b + 32768) >> 16

/**
 * Pictures of one channel hold grays alone. A stroke is `begin(brush)`, `to(x, y)` for every point, in pixels from the upper
 * left corner, and `end()`. A brush is `{ kind, colour, size }`: `paint` takes the colour [r, g, b], `redraw` marks what is to be
 * drawn anew, and `unmark` takes such marks away. `image` is what is painted, opaque; `mask` is 255 where it is to be drawn anew.
 */
export class Painting {
  #gray
  #stroke = null
  #past = []

  constructor([c, h, w]) {
    this.#gray = c === 1
    this.image = new ImageData(w, h)
    this.image.data.fill(WHITE)
    this.mask = new Uint8Array(w * h)
  }

  /** Whether anything is marked to be drawn anew. */
  get masked() {
    return this.mask.includes(255)
  }

  /** Whether nothing is painted or marked. */
  get blank() {
    return !this.masked && this.image.data.every((level) => level === WHITE)
  }

  get undoable() {
    return this.#past.length > 0
  }

  // Strokes -----------------------------------------------------------------------------------------------------------

  begin({ kind, colour, size }) {
    this.end()
    const before = this.#keep()
    this.#stroke = { kind, colour: this.#seen(colour), size, before, cover: new Float32Array(this.mask.length), last: null }
  }

  /** Go on to this point. */
  to(x, y) {
    const { size, last } = this.#stroke
    const here = snapped(x, y, size)
    this.#sweep(last ?? here, here)
    this.#stroke.last = here
  }

  end() {
    this.#stroke = null
  }

  /**
   * Everything within half the size of the brush of the way from a to b. A stroke covers a pixel as far as it ever came, so
   * that its edge is as soft where it goes twice as where it goes once.
   */
  #sweep([ax, ay], [bx, by]) {
    const { kind, colour, size, before, cover } = this.#stroke
    const { width, height, data } = this.image
    const reach = size / 2 + 0.5
    const [left, right] = span(ax, bx, reach, width)
    const [top, bottom] = span(ay, by, reach, height)
    const length = (bx - ax) ** 2 + (by - ay) ** 2
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const [dx, dy] = [x + 0.5 - ax, y + 0.5 - ay]
        const part = length ? Math.min(1, Math.max(0, (dx * (bx - ax) + dy * (by - ay)) / length)) : 0
        const share = Math.min(1, reach - Math.hypot(dx - part * (bx - ax), dy - part * (by - ay)))
        const i = y * width + x
        if (share <= cover[i]) continue
        cover[i] = share
        if (kind !== "paint") {
          if (share >= 0.5) this.mask[i] = kind === "redraw" ? 255 : 0
          continue
        }
        for (let k = 0; k < 3; k++) {
          const under = before.pixels[4 * i + k]
          data[4 * i + k] = Math.round(under + share * (colour[k] - under))
        }
      }
    }
  }

  // All of it ---------------------------------------------------------------------------------------------------------

  /** White, with nothing marked. */
  clear() {
    this.#keep()
    this.image.data.fill(WHITE)
    this.mask.fill(0)
  }

  /** Nothing is marked any more. */
  unmark() {
    this.#keep()
    this.mask.fill(0)
  }

  /** Take an opaque picture of the same size in place of what is painted, and the marks of another that is white there. */
  load({ data }, marks = null) {
    this.#keep()
    this.image.data.set(data)
    if (this.#gray) for (let i = 0; i < data.length; i += 4) this.image.data.fill(luminance(data.subarray(i, i + 3)), i, i + 3)
    for (let i = 0; i < this.mask.length; i++) this.mask[i] = marks?.data[4 * i] >= 128 ? 255 : 0
  }

  /** Go back to before the last stroke, or whatever else was done. */
  undo() {
    if (this.#stroke !== null || !this.undoable) return
    const { pixels, mask } = this.#past.pop()
    this.image.data.set(pixels)
    this.mask.set(mask)
  }

  /** Keep what there is, to come back to. */
  #keep() {
    const before = { pixels: this.image.data.slice(), mask: this.mask.slice() }
    const most = Math.max(FEWEST, Math.min(LEVELS, Math.floor(MEMORY / (5 * this.mask.length))))
    this.#past = [...this.#past, before].slice(-most)
    return before
  }

  #seen(colour) {
    return this.#gray ? Array(3).fill(luminance(colour)) : colour
  }
}

/** The middle of a pixel, or the corner of four, for a fine brush; the point itself for others. */
function snapped(x, y, size) {
  if (size >= FINE) return [x, y]
  return [x, y].map((part) => (size % 2 ? Math.floor(part) + 0.5 : Math.round(part)))
}

/** From the first pixel within reach of the way from a to b to the one after the last. */
function span(a, b, reach, most) {
  const first = Math.max(0, Math.floor(Math.min(a, b) - reach))
  return [first, Math.min(most, Math.ceil(Math.max(a, b) + reach))]
}
