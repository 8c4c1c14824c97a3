// What the user should know of the connection, in one line; and the question for a token.

import { find, write } from "./dom.js"
import { keepToken } from "./server.js"

/** The line below the pictures, empty while all is well. `retry` is called by its button. */
export class Notice {
  #box = find("notice")
  #line = this.#box.querySelector("p")
  #button = this.#box.querySelector("button")
  #timer = 0

  constructor(retry) {
    this.#button.addEventListener("click", retry)
  }

  /** Show the state of a stream, see `Stream`. */
  show(state, { reason = "", until = 0 } = {}) {
    clearInterval(this.#timer)
    this.#button.hidden = state !== "waiting"
    if (state === "waiting") {
      const say = () => {
        const seconds = Math.max(1, Math.ceil((until - performance.now()) / 1000))
        this.#say(`${sentence(reason)} Trying again in ${seconds} s.`)
      }
      say()
      this.#timer = setInterval(say, 1000)
    } else if (state === "asleep") {
      this.#say("Asleep, because nothing happened for a while. Move, and it goes on.")
    } else if (state === "refused") {
      this.#say(sentence(reason))
    } else if (state !== "connecting") {
      this.#say("")
    }
  }

  /** Show a line of text, or none. */
  #say(text) {
    this.#box.hidden = text === ""
    write(this.#line, text)
  }
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`)

/** Ask for a token until one is given, and keep it. */
export function askForToken(why) {
  const dialog = find("locked")
  const [form, input] = [dialog.querySelector("form"), dialog.querySelector("input")]
  write(dialog.querySelector(".why"), why)
  input.value = ""
  if (!dialog.open) dialog.showModal()
  return new Promise((resolve) => {
    dialog.oncancel = (event) => event.preventDefault()
    form.onsubmit = (event) => {
      event.preventDefault()
      keepToken(input.value)
      dialog.close()
      resolve()
    }
  })
}
