// The view in which one paints, and the picture follows: the painting, its tools, and what is asked of the server.

import { find, make, write } from "./dom.js"
import { Easel } from "./easel.js"
import { Edits } from "./edits.js"
import { Painting } from "./paint.js"
import { fromBase64, maskToPng, means, readPhoto, toPng } from "./photo.js"
import { keepsOf, WEAKEST } from "./scene.js"
import { edit } from "./server.js"
import { evenly, Slider } from "./slider.js"
import { session } from "./storage.js"
import { Tools } from "./tools.js"

const USUAL = 0.7 // strength with which a few strokes become a picture
const KEY = "trigflow-painting"

/**
 * `edits` is the source of pictures for the place `seat`. `changed()` is called when the painting is another one, and
 * `say(reason)` with what could not be done; an empty one takes the last back.
 */
export class Drawing {
  #scene
  #painting
  #easel
  #strength
  #kept
  #changed
  #say
  #said = false

  constructor(scene, info, seat, { changed, say }) {
    const { shape } = info.models[info.default]
    this.#scene = scene
    this.#changed = changed
    this.#say = say
    this.#painting = new Painting(shape)
    this.edits = new Edits({ post: (order, signal) => edit({ ...order, ...this.#edit() }, signal), ...seat.ends })
    const tools = new Tools(shape, {
      undo: () => this.#undo(),
      clear: () => this.#do("clear"),
      unmark: () => {
        this.#do("unmark")
        canvas.focus() // its button is gone
      },
      use: () => this.use(seat.picture.first()),
      open: (file) => this.#open(file),
    })
    const canvas = find("easel").querySelector("canvas")
    this.#easel = new Easel(canvas, this.#painting, { brush: () => tools.brush, changed: () => this.#after() })
    this.#makeControls(keepsOf(info.models[info.default]))
    this.#listen()
    scene.watch(() => this.#show())
    this.#show()
    this.#restore()
  }

  /** Take this picture as the painting; nothing where there is none. */
  use(image) {
    if (image !== null) this.#do("load", image)
  }

  #makeControls(keeps) {
    this.#strength = new Slider({
      name: "Strength",
      values: evenly(WEAKEST, 1, 0.05),
      value: USUAL,
      show: (part) => part.toFixed(2),
      changed: (strength) => this.#scene.set({ strength }),
    })
    this.#kept = find("keep")
    this.#kept.parentElement.before(this.#strength.element)
    for (const keep of keeps) {
      const input = make("input", { type: "radio", name: "keep", value: keep ?? "" })
      const name = keep === null ? "Nothing" : keep === "gray" ? "Gray" : `${keep} × ${keep}`
      input.addEventListener("change", () => this.#scene.set({ keep, strength: null }))
      this.#kept.append(make("label", {}, input, make("span", {}, name)))
    }
    this.#kept.parentElement.hidden = keeps.length < 2
  }

  // The painting ------------------------------------------------------------------------------------------------------

  /** The painting as it is now, as a part of a request. What is marked says what is kept, too; means are taken here. */
  #edit() {
    const { image, mask, masked } = this.#painting
    const keep = masked ? null : this.#scene.values.keep
    const picture = toPng(Number.isInteger(keep) ? means(image, keep) : image)
    const kept = masked ? { mask: maskToPng(mask, image.width, image.height) } : keep === null ? {} : { keep }
    return { picture, ...kept, strength: this.#noise, format: "npy" }
  }

  get #noise() {
    const { strength, keep } = this.#scene.values
    return strength ?? (this.#painting.masked || keep !== null ? 1 : USUAL)
  }

  #do(what, ...given) {
    this.#painting[what](...given)
    this.#easel.show()
    this.#after()
  }

  #undo() {
    if (this.#painting.undoable) this.#do("undo")
  }

  #after() {
    find("easel").classList.add("touched")
    if (this.#said) this.#say("")
    this.#said = false
    this.#show()
    this.#changed()
  }

  /** A file as the painting. */
  async #open(file) {
    const { width, height } = this.#painting.image
    try {
      this.use(await readPhoto(file, width, height))
    } catch (error) {
      this.#said = true
      this.#say(error.message)
    }
  }

  /** What is set, and what can be done now. */
  #show() {
    const { masked, undoable } = this.#painting
    const { keep } = this.#scene.values
    this.#strength.value = this.#noise
    find("undo").setAttribute("aria-disabled", !undoable) // one that is disabled would lose the focus
    find("unmark").hidden = !masked
    this.#kept.disabled = masked
    for (const input of this.#kept.querySelectorAll("input")) input.checked = input.value === String(keep ?? "")
    write(find("kept"), meaning(masked, keep))
  }

  // What comes from outside -------------------------------------------------------------------------------------------

  #listen() {
    const seen = () => this.#scene.values.view === "draw"
    addEventListener("keydown", (event) => {
      const undoes = (event.ctrlKey || event.metaKey) && !event.shiftKey && event.key?.toLowerCase() === "z"
      if (!seen() || !undoes || isText(event.target)) return
      event.preventDefault()
      this.#undo()
    })
    addEventListener("paste", (event) => {
      const [file] = event.clipboardData?.files ?? []
      if (!seen() || file === undefined) return
      event.preventDefault()
      this.#open(file)
    })
    for (const kind of ["dragover", "drop"]) {
      addEventListener(kind, (event) => {
        if (!seen() || !event.dataTransfer.types.includes("Files")) return
        event.preventDefault()
        if (event.dataTransfer.files.length) this.#open(event.dataTransfer.files[0])
      })
    }
    addEventListener("pagehide", () => this.#keep())
  }

  /** Keep the painting until the tab is closed: the page may be loaded again. */
  #keep() {
    const { image, mask, blank } = this.#painting
    const files = blank ? [] : [toPng(image), maskToPng(mask, image.width, image.height)]
    if (!blank || session.get(KEY)) session.set(KEY, files.join())
  }

  /** Take what was kept, if nobody has painted yet. */
  async #restore() {
    const { width, height } = this.#painting.image
    const files = (session.get(KEY) ?? "").split(",").filter(Boolean)
    const read = async (file) => readPhoto(fromBase64(file), width, height)
    const images = await Promise.all(files.map(read)).catch(() => []) // what makes no sense is left
    if (images.length === 2 && !this.#painting.undoable) this.#do("load", ...images)
  }
}

const isText = (element) => element.matches("input:not([type=range], [type=radio], [type=color], [type=file])")

/** What the model may change, in words. */
function meaning(masked, keep) {
  if (masked) return "Only what is marked is drawn anew. All the rest stays as you have it, and more steps fit it in better."
  if (keep === null) return "All of it may change: little at a low strength, everything at 1."
  if (keep === "gray") return "Light and dark stay as you have them, colours are free."
  return `The mean of every ${keep} × ${keep} pixels stays as you have it, details are free.`
}
