// Everything that can be set beside the pictures. What a model does not take has no control.

import { Blend } from "./blend.js"
import { find, make, titled, write } from "./dom.js"
import { Mix } from "./mix.js"
import { mostBytes, Prompt } from "./prompt.js"
import { lanesOf } from "./race.js"
import { canBlend, guidanceRange, LAST_PICTURE, viewsOf } from "./scene.js"
import { evenly, Slider, stepsBetween } from "./slider.js"
import { lasting } from "./storage.js"

const COUNTS = [1, 4, 9, 16, 25, 36, 49, 64]

/** Controls of a scene; they follow it when it is changed elsewhere. */
export class Controls {
  #scene
  #info
  #sliders = {}
  #variation = null
  #mix = null

  constructor(scene, info) {
    this.#scene = scene
    this.#info = info
    this.#makeViews()
    this.#makeModels()
    this.#makeMix()
    this.#makeSliders()
    if (mostBytes(info) > 0) this.#makeWords()
    this.#makeNumber("seed", Number.MAX_SAFE_INTEGER)
    this.#makeNumber("picture", LAST_PICTURE)
    find("controls").addEventListener("submit", (event) => event.preventDefault())
    scene.watch((values, changes) => this.#follow(values, changes))
    this.#follow(scene.values, scene.values)
    find("controls").hidden = false
  }

  #makeViews() {
    const views = find("views")
    for (const input of views.querySelectorAll("input")) input.parentElement.hidden = !viewsOf(this.#info).includes(input.value)
    views.disabled = false
    views.addEventListener("change", (event) => this.#scene.set({ view: event.target.value }))
  }

  #makeModels() {
    const names = Object.keys(this.#info.models)
    const choice = find("who").querySelector("fieldset")
    for (const name of names) {
      const input = make("input", { type: "radio", name: "model", value: name })
      choice.append(make("label", {}, input, make("span", {}, titled(name))))
    }
    choice.addEventListener("change", (event) => this.#scene.set({ model: event.target.value }))
  }

  #makeMix() {
    const { class_names: names, classes } = this.#info.models[this.#info.default]
    if (classes === 0) return
    find("classes").hidden = false
    const changed = (mix) => this.#scene.set({ mix })
    const known = Array.from({ length: classes }, (_, label) => names[label] ?? String(label))
    this.#mix = new Mix(find("classes"), { names: known, most: this.#info.limits.mixed_labels, changed })
  }

  #makeSliders() {
    const { values } = this.#scene
    const several = Object.keys(this.#info.models).length > 1
    for (const [name, { steps, default_steps: normal }] of Object.entries(this.#info.models)) {
      if (steps[0] === steps[1]) continue
      this.#add(`steps-${name}`, {
        name: several ? `Steps of the ${name}` : "Steps",
        values: stepsBetween(...steps, normal),
        value: values.steps[name],
        changed: (chosen) => this.#scene.set({ steps: { ...this.#scene.values.steps, [name]: chosen } }),
      })
    }
    for (const view of ["walk", "race"]) {
      for (const model of Object.keys(this.#info.models)) {
        const [low, high] = guidanceRange(this.#info, { view, model })
        const id = guidanceId({ view, model })
        if (low >= high || this.#sliders[id]) continue
        this.#add(id, {
          name: "Guidance",
          values: evenly(low, high, 0.05),
          value: values.guidance,
          show: (scale) => scale.toFixed(2),
          changed: (guidance) => this.#scene.set({ guidance }),
        })
      }
    }
    const counts = COUNTS.filter((count) => count <= this.#info.limits.frame_images)
    if (counts.length > 1) {
      this.#add("count", {
        name: "Pictures at once",
        values: counts,
        value: values.count,
        changed: (count) => this.#scene.set({ count }),
      })
    }
  }

  #add(id, options) {
    this.#sliders[id] = new Slider(options)
    this.#sliders[id].element.dataset.for = id
    find("sampling").append(this.#sliders[id].element)
  }

  /** The field of the prompt, and one way of the walk as a slider: how far the noise is from that of the seed. */
  #makeWords() {
    new Prompt(this.#scene, mostBytes(this.#info))
    if (canBlend(this.#info)) new Blend(this.#scene, mostBytes(this.#info))
    this.#variation = new Slider({
      name: "Variation",
      values: evenly(-100, 100, 1),
      value: 0,
      show: (part) => `${part} %`,
      changed: (part) => this.#scene.set({ walk: [(part * Math.PI) / 100, this.#scene.values.walk[1]] }),
    })
    find("noise").querySelector("h2").after(this.#variation.element)
  }

  #makeNumber(name, most) {
    const input = find(name)
    input.max = most
    input.addEventListener("input", () => {
      if (input.validity.valid && input.value !== "") this.#scene.set({ [name]: input.valueAsNumber })
    })
    input.addEventListener("change", () => (input.value = this.#scene.values[name]))
  }

  /** Show these values, and what can be set in their view. */
  #follow(values, changes) {
    if ("walk" in changes && this.#variation) this.#variation.value = (100 * values.walk[0]) / Math.PI
    if (Object.keys(changes).join() === "walk") return // nothing else shows it, and it changes with every picture
    for (const input of document.querySelectorAll("input[name=view]")) input.checked = input.value === values.view
    for (const input of document.querySelectorAll("input[name=model]")) input.checked = input.value === values.model
    for (const name of ["seed", "picture"]) {
      if (name in changes && document.activeElement !== find(name)) find(name).value = values[name]
    }
    if ("mix" in changes && this.#mix) this.#mix.value = values.mix
    for (const [id, slider] of Object.entries(this.#sliders)) {
      const [what, model] = id.split("-")
      if (what === "steps") slider.value = values.steps[model]
      else slider.value = values[what]
    }
    if ("view" in changes || "model" in changes) this.#show(values)
  }

  #show(values) {
    const race = values.view === "race"
    const free = (model) => lanesOf(this.#info, values).some((lane) => lane.model === model && lane.name === titled(model))
    find("who").hidden = race || Object.keys(this.#info.models).length < 2
    for (const [id, slider] of Object.entries(this.#sliders)) {
      const [what, model] = id.split("-")
      if (what === "steps") slider.element.hidden = !free(model)
      else if (what === "guidance") slider.element.hidden = id !== guidanceId(values)
      else slider.element.hidden = values.view === "wall"
    }
    find("sampling").hidden = Object.values(this.#sliders).every(({ element }) => element.hidden)
  }
}

const guidanceId = ({ view, model }) => `guidance-${view === "race" ? "race" : model}`

/** The switch between dark and light; until it is used the system decides. */
export function followTheme() {
  const button = find("theme")
  const system = matchMedia("(prefers-color-scheme: dark)")
  const root = document.documentElement
  const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches)
  const show = () => button.setAttribute("aria-pressed", dark())
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark"
    lasting.set("trigflow-theme", root.dataset.theme)
    show()
  })
  system.addEventListener("change", show)
  show()
}

/** What is served, in a few words. */
export function about(info) {
  const { shape, classes } = info.models[info.default]
  const [, h, w] = shape
  const who = Object.keys(info.models).join(" and ")
  write(find("about"), `${titled(who)} · ${w} × ${h} pixels${classes ? ` · ${classes} classes` : ""}${mostBytes(info) ? " · follows your words" : ""}`)
  write(find("version"), info.version)
}
