// A second text, and how far the picture is on the way from the first to it.

import { find } from "./dom.js"
import { plain, problem } from "./prompt.js"
import { evenly, Slider } from "./slider.js"

const HALF = 50

/** The button beside the text, the field it opens, and its slider, for models that read `most` bytes. */
export class Blend {
  #scene
  #most
  #button = find("blend")
  #box = find("blending")
  #input = find("toward")
  #share

  constructor(scene, most) {
    this.#scene = scene
    this.#most = most
    this.#share = new Slider({
      name: "Toward it",
      values: evenly(0, 100, 1),
      value: HALF,
      show: (part) => `${part} %`,
      changed: (share) => scene.set({ share }),
    })
    this.#box.append(this.#share.element)
    this.#button.hidden = false
    this.#button.addEventListener("click", () => this.#turn())
    this.#input.addEventListener("input", () => this.#typed())
    scene.watch((values, changes) => ("toward" in changes || "share" in changes) && this.#follow(values))
    this.#follow(scene.values)
  }

  /** Open it with what was there before, or close it. */
  #turn() {
    const open = this.#scene.values.toward === null
    this.#scene.set({ toward: open ? plain(this.#input.value) : null })
    if (open) this.#input.focus()
  }

  #typed() {
    const wrong = problem(this.#input.value, this.#most)
    this.#input.setAttribute("aria-invalid", wrong !== "")
    this.#input.setCustomValidity(wrong)
    find("unfit").textContent = wrong && `${wrong} The picture stays.`
    const toward = plain(this.#input.value)
    if (!wrong && toward !== this.#scene.values.toward) this.#scene.set({ toward })
  }

  #follow({ toward, share }) {
    this.#box.hidden = toward === null
    this.#button.setAttribute("aria-expanded", toward !== null)
    this.#share.value = share
    if (toward === null || toward === plain(this.#input.value)) return
    this.#input.value = toward
    this.#typed()
  }
}
