// What one paints with: kind, colour and size of the brush, and what is done to the whole painting.

import { find, make } from "./dom.js"
import { luminance } from "./paint.js"
import { Slider, stepsBetween } from "./slider.js"

const COLOURS = [
  ["Black", "#000000"],
  ["White", "#ffffff"],
  ["Red", "#e5322d"],
  ["Orange", "#f58220"],
  ["Yellow", "#ffd43b"],
  ["Green", "#3fa64a"],
  ["Blue", "#2f7de1"],
  ["Brown", "#8a5a33"],
]
const GRAYS = 8
const USUAL = 12 // brushes across the shorter side, at first

const parse = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16))

/** As many grays as there are colours, from black to white. */
const grays = () =>
  Array.from({ length: GRAYS }, (_, i) => {
    const part = Math.round((255 * i) / (GRAYS - 1)).toString(16).padStart(2, "0")
    return [i === 0 ? "Black" : i === GRAYS - 1 ? "White" : `Gray ${i}`, `#${part.repeat(3)}`]
  })

/** The tools for paintings of this shape. `actions` are called by the buttons of these ids; `open(file)` with a file. */
export class Tools {
  #kinds = find("kinds")
  #swatches = find("swatches")
  #custom = find("colour")
  #size

  constructor([c, h, w], { open, ...actions }) {
    const least = Math.min(h, w)
    this.#size = new Slider({
      name: "Size",
      values: stepsBetween(1, Math.max(2, Math.floor(least / 2)), Math.max(1, Math.round(least / USUAL))),
      value: Math.max(1, Math.round(least / USUAL)),
      changed: () => {},
    })
    this.#swatches.after(this.#size.element)
    this.#makeSwatches(c === 1)
    for (const [id, act] of Object.entries(actions)) find(id).addEventListener("click", act)
    const file = find("file")
    find("open").addEventListener("click", () => file.click())
    file.addEventListener("change", () => {
      if (file.files.length) open(file.files[0])
      file.value = "" // the same file may be opened again
    })
  }

  /** What is painted with: `{ kind, colour: [r, g, b], size }`. */
  get brush() {
    const kind = this.#kinds.querySelector("input:checked").value
    return { kind, colour: parse(this.#custom.value), size: this.#size.value }
  }

  #makeSwatches(gray) {
    for (const [name, colour] of gray ? grays() : COLOURS) {
      const input = make("input", { type: "radio", name: "swatch", value: colour, "aria-label": name })
      const dot = make("span", {})
      dot.style.background = colour
      this.#custom.parentElement.before(make("label", { title: name }, input, dot))
    }
    const choose = (colour) => {
      this.#custom.value = colour
      this.#custom.nextElementSibling.style.background = gray ? shade(colour) : colour
      for (const input of this.#swatches.querySelectorAll("[type=radio]")) input.checked = input.value === colour
      this.#kinds.querySelector("[value=paint]").checked = true // who takes a colour wants to paint
    }
    this.#swatches.addEventListener("input", ({ target }) => choose(target.value))
    choose("#000000")
  }
}

/** A colour as a model of grays takes it. */
function shade(colour) {
  const level = luminance(parse(colour)).toString(16).padStart(2, "0")
  return `#${level.repeat(3)}`
}
