// What is to be seen, as plain values, and how it reads as requests and as the address of the page.

import { mostBytes, plain, problem } from "./prompt.js"
import { canRace } from "./race.js"

/**
 * The values of a scene:
 *
 *     view      walk, wall, race or draw
 *     model     who draws, but in a race
 *     seed      of all noise
 *     picture   number of the first picture
 *     count     pictures at once, but on the wall
 *     walk      two angles
 *     prompt    a text, as short as it is read; null where none is
 *     toward    a second text, that it is mixed with; null for none
 *     share     of the second text, from 0 to 100
 *     mix       { class: weight }, weights from 0 to 100; empty for all classes in turn
 *     guidance  guidance scale
 *     steps     sampling steps by model
 *     strength  of the noise on a painting, from 0.05 to 1; null for what suits what is kept of it
 *     keep      of a painting: "gray", or a whole number for the side of blocks; null for nothing
 */
export class Scene {
  #listeners = []

  constructor(values) {
    this.values = values
  }

  /** Change some values, and tell those who watch. */
  set(changes) {
    this.values = { ...this.values, ...changes }
    for (const listener of this.#listeners) listener(this.values, changes)
  }

  /** Call `listener(values, changes)` after every change. */
  watch(listener) {
    this.#listeners.push(listener)
  }
}

/** The scene of a server that nobody has touched. */
export function firstScene(info) {
  const steps = Object.fromEntries(Object.entries(info.models).map(([name, model]) => [name, model.default_steps]))
  const classes = info.models[info.default].classes
  const mix = classes ? { [Math.min(3, classes - 1)]: 100 } : {}
  const words = mostBytes(info) > 0
  const [prompt, guidance] = words ? ["", 2] : [null, 1]
  const said = { prompt, toward: null, share: 50, mix }
  const edit = { strength: null, keep: null }
  return { view: "walk", model: info.default, seed: 0, picture: 0, count: 1, walk: [0, 0], ...said, guidance, steps, ...edit }
}

/** The scales of guidance that can be chosen: what everybody who draws in this view takes. */
export function guidanceRange(info, { view, model }) {
  const ranges = (view === "race" ? Object.values(info.models) : [info.models[model]]).map(({ guidance }) => guidance)
  return [Math.max(...ranges.map(([low]) => low)), Math.min(...ranges.map(([, high]) => high))]
}

/** The request for `count` pictures of a scene, drawn by the model of this name. */
export function orderOf(values, info, name, count) {
  const { classes, class_names: names } = info.models[name]
  const [low, high] = guidanceRange(info, values)
  const order = {
    model: name,
    count,
    seed: values.seed,
    first: values.picture,
    walk: values.walk,
    guidance: Math.min(high, Math.max(low, values.guidance)),
    steps: values.steps[name],
  }
  const prompt = promptOf(values)
  if (prompt) order.prompt = prompt
  const labels = classes ? labelsOf(values.mix, names) : null
  return labels === null ? order : { ...order, labels }
}

/** The text, or weights of two by text, which are above 0 and add up to 1; nothing for a second text that is not there yet. */
export function promptOf({ prompt, toward, share }) {
  if (!toward || share === 0 || toward === prompt) return prompt
  if (share === 100) return toward
  return { [prompt]: (100 - share) / 100, [toward]: share / 100 }
}

/** A prompt as one reads it. */
export function inWords(prompt) {
  if (typeof prompt === "string") return prompt
  return Object.entries(prompt).map(([text, part]) => `${text || "anything"} ${Math.round(100 * part)} %`).join(", ")
}

/** Weights above 0 by name; of one class alone, or where all are 0, its number; null for all classes in turn. */
function labelsOf(mix, names) {
  const chosen = Object.keys(mix)
  const weighed = chosen.filter((label) => mix[label] > 0)
  if (chosen.length === 0) return null
  if (weighed.length < 2) return Number(weighed[0] ?? chosen[0])
  return Object.fromEntries(weighed.map((label) => [names?.[label] ?? label, mix[label]]))
}

// The address of the page ---------------------------------------------------------------------------------------------

/** A scene as the fragment of an address, so that a place can be kept and shared. */
export function toFragment({ view, model, seed, picture, count, walk, prompt, toward, share, mix, guidance, steps, strength, keep }) {
  const pairs = (record) => Object.entries(record).map(([key, value]) => `${key}:${value}`).join(",")
  const parts = { view, model, seed, picture, count, walk: walk.map((angle) => angle.toFixed(4)).join(",") }
  const words = prompt === null ? {} : { prompt: encodeURIComponent(prompt) }
  if (toward !== null) Object.assign(words, { toward: encodeURIComponent(toward), share })
  const edit = { ...(strength === null ? {} : { strength }), ...(keep === null ? {} : { keep }) }
  return Object.entries({ ...parts, ...words, mix: pairs(mix), guidance, steps: pairs(steps), ...edit })
    .map(([key, value]) => `${key}=${value}`)
    .join("&")
}

/** The scene of a fragment, as far as this server can draw it; what it cannot is left as in `scene`. */
export function fromFragment(fragment, scene, info) {
  const given = new URLSearchParams(fragment.replace(/^#/, ""))
  const models = Object.keys(info.models)
  const { classes } = info.models[info.default]
  const limits = info.limits
  const found = { ...scene }
  const whole = (text, low, high) => (/^\d{1,16}$/.test(text) && +text >= low && +text <= high ? +text : null)
  const pairs = (text) => (text ?? "").split(",").filter(Boolean).map((pair) => pair.split(":"))

  if (viewsOf(info).includes(given.get("view"))) found.view = given.get("view")
  if (models.includes(given.get("model"))) found.model = given.get("model")
  found.seed = whole(given.get("seed"), 0, Number.MAX_SAFE_INTEGER) ?? scene.seed
  found.picture = whole(given.get("picture"), 0, LAST_PICTURE) ?? scene.picture
  found.count = whole(given.get("count"), 1, limits.frame_images) ?? scene.count
  const walk = (given.get("walk") ?? "").split(",").map(parseFloat)
  if (walk.length === 2 && walk.every(Number.isFinite)) found.walk = walk
  const most = mostBytes(info)
  for (const name of canBlend(info) ? ["prompt", "toward"] : ["prompt"]) {
    if (most && given.has(name) && !problem(given.get(name), most)) found[name] = plain(given.get(name))
  }
  found.share = whole(given.get("share"), 0, 100) ?? scene.share
  if (given.has("mix")) {
    const mix = pairs(given.get("mix")).filter(
      ([label, weight]) => whole(label, 0, classes - 1) !== null && whole(weight, 0, 100) !== null,
    )
    found.mix = Object.fromEntries(mix.slice(0, limits.mixed_labels).map(([label, weight]) => [label, +weight]))
  }
  const scale = parseFloat(given.get("guidance"))
  if (Number.isFinite(scale)) found.guidance = scale
  for (const [name, steps] of pairs(given.get("steps"))) {
    const [low, high] = info.models[name]?.steps ?? [1, 0]
    if (whole(steps, low, high) !== null) found.steps = { ...found.steps, [name]: +steps }
  }
  const strength = parseFloat(given.get("strength"))
  if (strength >= WEAKEST && strength <= 1) found.strength = strength
  const keep = keepsOf(info.models[found.model]).find((kind) => String(kind) === given.get("keep"))
  if (keep !== undefined) found.keep = keep
  return found
}

/** The least noise on a painting. */
export const WEAKEST = 0.05

/** What can be kept of paintings of a model beside its pixels; see `Scene`. */
export const keepsOf = ({ shape: [c, h, w], pixels }) => [
  null,
  ...(pixels && c === 3 ? ["gray"] : []),
  ...[2, 4].filter((side) => pixels && h % side === 0 && w % side === 0),
]

/** Whether all models draw pictures of one shape, in grays or colours. */
export function canDraw(info) {
  const shapes = Object.values(info.models).map(({ shape }) => shape)
  return shapes.every((shape) => shape.length === 3 && [1, 3].includes(shape[0]) && shape.join() === shapes[0].join())
}

/** Whether two texts can be mixed. */
export const canBlend = (info) => mostBytes(info) > 0 && info.limits.mixed_labels > 1

/** The views of this server. */
export const viewsOf = (info) => ["walk", "wall", ...(canRace(info) ? ["race"] : []), ...(canDraw(info) ? ["draw"] : [])]

/** The largest picture number that the page offers. */
export const LAST_PICTURE = 9999
