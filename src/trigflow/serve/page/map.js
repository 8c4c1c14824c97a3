// Where the walk is on the torus: a square whose opposite edges are one.

const NAMESPACE = "http://www.w3.org/2000/svg"
const TRAIL = 60 // places

/** A dot with a trail in an svg of the view box (-1, -1, 2, 2). */
export class TorusMap {
  #svg
  #trail
  #dot
  #places = []

  constructor(svg) {
    this.#svg = svg
    const part = (tag, attributes) => {
      const element = document.createElementNS(NAMESPACE, tag)
      for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
      svg.append(element)
      return element
    }
    part("path", { class: "cross", d: "M-1 0H1M0 -1V1" })
    this.#trail = part("path", { class: "trail" })
    this.#dot = part("circle", { class: "dot", r: 0.075 })
  }

  /** Show these angles, each in (-pi, pi]. */
  show(walk) {
    const [x, y] = walk.map((angle) => angle / Math.PI)
    this.#places = [...this.#places, [x, y]].slice(-TRAIL)
    this.#dot.setAttribute("cx", x)
    this.#dot.setAttribute("cy", y)
    this.#trail.setAttribute("d", this.#path())
    this.#svg.setAttribute("aria-label", `Place on the walk: ${walk.map((angle) => angle.toFixed(2)).join(", ")}`)
  }

  /** The trail, lifted where it crosses an edge. */
  #path() {
    return this.#places
      .map(([x, y], i) => {
        const [before, above] = this.#places[i - 1] ?? [x, y]
        const far = Math.abs(x - before) > 1 || Math.abs(y - above) > 1
        return `${i === 0 || far ? "M" : "L"}${x.toFixed(3)} ${y.toFixed(3)}`
      })
      .join("")
  }
}
