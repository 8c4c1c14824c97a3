// The mix of labels: which classes, and how much of each.

import { make } from "./dom.js"
import { evenly, Slider } from "./slider.js"

const CHIPS = 24 // classes that are shown all at once
const SHORT = 3 // letters of names that stand in columns

/**
 * Controls for the classes of a mix in `box`. `changed(mix)` is called with `{ class: weight }`, weights from 0 to 100.
 *
 * names: of the classes. most: classes in a mix.
 */
export class Mix {
  #box
  #names
  #most
  #changed
  #mix = {}
  #sliders = new Map()
  #rows = make("div", { className: "rows" })
  #chips = []
  #choice = null
  #note = make("p", { className: "note" }, "None chosen: all classes in turn.")

  constructor(box, { names, most, changed }) {
    this.#box = box
    this.#names = names
    this.#most = most
    this.#changed = changed
    this.#box.append(names.length <= CHIPS ? this.#makeChips() : this.#makeChoice(), this.#rows, this.#note)
  }

  /** Show this mix; nobody is told. */
  set value(mix) {
    const same = Object.keys(mix).join() === Object.keys(this.#mix).join()
    this.#mix = { ...mix }
    if (same) for (const [label, slider] of this.#sliders) slider.value = mix[label]
    this.#build(same)
  }

  #makeChips() {
    this.#chips = this.#names.map((name, label) => {
      const chip = make("button", { type: "button", className: "chip", title: `class ${name}` }, name)
      chip.addEventListener("click", () => this.#toggle(label))
      return chip
    })
    const className = this.#names.every((name) => name.length <= SHORT) ? "chips short" : "chips"
    return make("div", { className, role: "group", "aria-label": "Classes of the mix" }, ...this.#chips)
  }

  #makeChoice() {
    this.#choice = make("select", { "aria-label": "Add a class to the mix" }, make("option", { value: "" }, "Add a class…"))
    this.#choice.append(...this.#names.map((name, label) => make("option", { value: label }, name)))
    this.#choice.addEventListener("change", () => {
      const label = this.#choice.value
      this.#choice.value = ""
      if (label !== "" && !(label in this.#mix)) this.#toggle(Number(label))
    })
    return this.#choice
  }

  #toggle(label) {
    const mix = { ...this.#mix }
    if (label in mix) delete mix[label]
    else if (Object.keys(mix).length < this.#most) mix[label] = 100
    else return
    this.value = mix
    this.#changed(mix)
  }

  #weigh(label, weight) {
    this.#mix = { ...this.#mix, [label]: weight }
    this.#label()
    this.#changed(this.#mix)
  }

  /** Rows and chips for the classes of the mix; the rows of classes that stay are kept, and with them the focus. */
  #build(same) {
    if (!same) {
      for (const [label, slider] of this.#sliders) {
        if (label in this.#mix) continue
        slider.element.remove()
        this.#sliders.delete(label)
      }
      for (const label of Object.keys(this.#mix)) {
        if (!this.#sliders.has(label)) this.#sliders.set(label, this.#makeSlider(label))
        this.#rows.append(this.#sliders.get(label).element)
      }
    }
    const full = Object.keys(this.#mix).length >= this.#most
    this.#chips.forEach((chip, label) => {
      chip.setAttribute("aria-pressed", label in this.#mix)
      chip.disabled = full && !(label in this.#mix)
    })
    if (this.#choice) this.#choice.disabled = full
    this.#label()
  }

  #makeSlider(label) {
    const remove = make("button", { type: "button", className: "remove", "aria-label": `Remove ${this.#names[label]}` }, "×")
    remove.addEventListener("click", () => {
      this.#toggle(Number(label))
      ;(this.#chips[label] ?? this.#choice).focus()
    })
    const changed = (weight) => this.#weigh(label, weight)
    return new Slider({ name: this.#names[label], values: evenly(0, 100, 1), value: this.#mix[label], changed, extra: remove })
  }

  /** Shares of the whole beside the sliders; where all weights are 0 the first class is drawn. */
  #label() {
    const labels = Object.keys(this.#mix)
    const whole = labels.reduce((sum, label) => sum + this.#mix[label], 0)
    for (const [label, slider] of this.#sliders) {
      const share = whole > 0 ? this.#mix[label] / whole : Number(label === labels[0])
      slider.show = () => `${Math.round(100 * share)} %`
    }
    this.#box.classList.toggle("alone", labels.length < 2)
    this.#note.hidden = labels.length > 0
  }
}
