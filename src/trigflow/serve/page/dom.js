// Small helpers for elements.

/** The element with this id. */
export const find = (id) => document.getElementById(id)

/** A new element: `make("p", { className: "note", "aria-label": "…" }, "text", child)`. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") element.setAttribute(name, value)
    else element[name] = value
  }
  element.append(...children)
  return element
}

/** Change the text of an element only if it is another one. */
export function write(element, text) {
  if (element.textContent !== text) element.textContent = text
}

/** A name at the beginning of a line. */
export const titled = (name) => name[0].toUpperCase() + name.slice(1)

/** Whether the user asked for less motion. */
export const calm = () => matchMedia("(prefers-reduced-motion: reduce)").matches

/** Call `work(now)` before every picture of the display for as long as it returns true. Gives a function that starts it. */
export function eachFrame(work) {
  let running = false
  const turn = (now) => {
    running = work(now)
    if (running) requestAnimationFrame(turn)
  }
  return () => {
    if (!running) requestAnimationFrame(turn)
    running = true
  }
}
