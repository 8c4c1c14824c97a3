// The text that says what to draw: its field, what is wrong with it, and those of before.

import { find, make, write } from "./dom.js"
import { lasting } from "./storage.js"

const KEPT = 12
const REST = 2000 // ms without a key after which a text counts as one of those of before
const KEY = "trigflow-prompts"

const bytes = (text) => new TextEncoder().encode(text).length

/** A text as the server reads it: composed (NFC), no space around it, and single spaces within. */
export const plain = (text) => text.normalize("NFC").trim().split(/\s+/u).join(" ")

/** Bytes of the longest prompt that all models read, 0 where one reads none. */
export const mostBytes = (info) => Math.min(...Object.values(info.models).map(({ prompt_bytes }) => prompt_bytes ?? 0))

/** Why a text cannot be drawn, in words; empty if it can. */
export function problem(text, most) {
  if (text.length > 16 * most + 4096) return `Too long: ${text.length} letters, and at most ${most} bytes are read.` // not worth counting
  const found = bytes(plain(text))
  if (found > most) return `Too long: ${found} bytes, and at most ${most} are read.`
  return /[\p{Cc}\p{Cs}]/u.test(plain(text)) ? "There is a character in it that cannot be printed." : ""
}

/** The field of a scene whose models read `most` bytes; what cannot be drawn leaves the scene as it is. */
export class Prompt {
  #scene
  #most
  #input = find("prompt")
  #past
  #timer = 0

  constructor(scene, most) {
    this.#scene = scene
    this.#most = most
    this.#past = read().filter((text) => text && !problem(text, most)).slice(0, KEPT)
    this.#input.value = scene.values.prompt
    this.#input.addEventListener("input", () => this.#typed())
    this.#input.addEventListener("keydown", ({ key }) => key === "Enter" && this.#keep())
    find("forget").addEventListener("click", () => {
      this.#past = []
      this.#list()
      this.#input.focus()
    })
    scene.watch(({ prompt }, changes) => {
      if (!("prompt" in changes) || prompt === plain(this.#input.value)) return
      this.#input.value = prompt
      this.#say()
    })
    this.#list()
    find("words").hidden = false
    if (matchMedia("(pointer: fine)").matches) this.#input.focus() // where no keyboard comes up with it
  }

  #typed() {
    clearTimeout(this.#timer)
    this.#timer = setTimeout(() => this.#keep(), REST)
    if (!this.#say()) return
    const prompt = plain(this.#input.value)
    if (prompt !== this.#scene.values.prompt) this.#scene.set({ prompt })
  }

  /** Say what is wrong, if anything; whether the text can be drawn. */
  #say() {
    const { value } = this.#input
    const wrong = problem(value, this.#most)
    const hint = this.#past.length ? "" : "The picture follows every letter. What you have drawn is kept here."
    write(find("said"), wrong ? `${wrong} The picture stays.` : hint)
    find("before").hidden = find("said").textContent !== ""
    this.#input.setAttribute("aria-invalid", wrong !== "")
    return wrong === ""
  }

  /** Keep the text among those of before; one that only goes on from the newest takes its place. */
  #keep() {
    clearTimeout(this.#timer)
    const { prompt } = this.#scene.values
    if (!prompt || prompt === this.#past[0]) return
    const others = this.#past.filter((past, i) => past !== prompt && !(i === 0 && prompt.startsWith(past)))
    this.#past = [prompt, ...others].slice(0, KEPT)
    this.#list()
  }

  #list() {
    lasting.set(KEY, JSON.stringify(this.#past))
    const chips = this.#past.map((text) => {
      const chip = make("button", { type: "button", className: "chip", dir: "auto", title: text }, text)
      chip.addEventListener("click", () => {
        this.#keep()
        this.#scene.set({ prompt: text })
      })
      return chip
    })
    const focused = find("past").contains(document.activeElement) ? document.activeElement.title : null
    find("past").replaceChildren(...chips)
    chips.find(({ title }) => title === focused)?.focus()
    this.#say()
  }
}

/** The texts that this browser has kept, if any. */
function read() {
  try {
    const found = JSON.parse(lasting.get(KEY))
    return Array.isArray(found) ? found.filter((text) => typeof text === "string") : []
  } catch {
    return []
  }
}
