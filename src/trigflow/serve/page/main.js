// The page: one scene, one or two streams, and what belongs together.

import { squareGrid } from "./canvas.js"
import { about, Controls, followTheme } from "./controls.js"
import { calm, eachFrame, find, write } from "./dom.js"
import { Drawing } from "./draw.js"
import { inMs, Table } from "./latency.js"
import { TorusMap } from "./map.js"
import { askForToken, Notice } from "./notice.js"
import { lanesOf, verdict } from "./race.js"
import { canCopy, copy, save } from "./save.js"
import { canDraw, firstScene, fromFragment, orderOf, Scene, toFragment } from "./scene.js"
import { Seat } from "./seat.js"
import { describe, TokenNeeded } from "./server.js"
import { Walk } from "./walk.js"
import { wallGrid } from "./wall.js"

const SEEDS = 2 ** 31 // new noise has a short number
const RETRY = 2000

/** What the server serves; asks for a token, and again and again where nobody answers, or as soon as `impatient` resolves. */
async function whatIsServed(notice, impatient) {
  for (;;) {
    try {
      const info = await describe()
      notice.show("live")
      return info
    } catch (error) {
      if (error instanceof TokenNeeded) await askForToken(error.message)
      else {
        notice.show("waiting", { reason: error.message, until: performance.now() + RETRY })
        await Promise.race([impatient(), new Promise((resolve) => setTimeout(resolve, RETRY))])
      }
    }
  }
}

async function start() {
  followTheme()
  let seats = []
  const retry = () => seats.forEach(({ stream }) => stream.retry())
  let again = retry
  const notice = new Notice(() => again())
  const info = await whatIsServed(notice, () => new Promise((resolve) => (again = resolve)))
  again = retry
  about(info)
  const scene = new Scene(fromFragment(location.hash, firstScene(info), info))
  new Controls(scene, info)

  // Streams -----------------------------------------------------------------------------------------------------------

  async function unlock(why) {
    await askForToken(why)
    retry()
  }

  /** A server that comes back may serve another model. */
  async function compare() {
    const now = await describe().catch(() => info)
    if (JSON.stringify(now) === JSON.stringify(info)) return
    history.replaceState(null, "", `#${toFragment(scene.values)}`)
    location.reload()
  }

  function tell(seat, state, detail) {
    if (seat.figure.hidden) return
    if (state === "live") run() // a frame is awaited from now on
    if (state === "locked") unlock(detail.reason)
    if (state === "live" && seat.lost) compare()
    seat.lost = state === "waiting" || (seat.lost && state !== "live")
    const worst = seats.find(({ stream, figure }) => !figure.hidden && stream.state === "waiting")
    if (worst === undefined || worst === seat) notice.show(state, detail)
    document.body.dataset.connection = state
  }

  const racers = lanesOf(info, { ...scene.values, view: "race" })
  const figures = racers.map((_, i) => (i === 0 ? find("first") : find("first").cloneNode(true)))
  figures.slice(1).forEach((figure, i) => {
    figure.id = ["second", "third"][i]
    figures[i].after(figure)
  })
  seats = figures.map((figure) => new Seat(figure, tell))
  const [first] = seats
  const hands = {
    changed: () => scene.values.view === "draw" && ask(scene.values),
    say: (reason) => notice.show(reason ? "refused" : "live", { reason }),
  }
  const drawing = canDraw(info) ? new Drawing(scene, info, first, hands) : null

  function gridOf({ view, count, model }) {
    if (view !== "wall") return squareGrid(count)
    const { clientWidth, clientHeight } = first.figure.querySelector(".frame")
    return wallGrid(clientWidth, clientHeight, info.models[model].shape, info.limits.frame_images)
  }

  function ask(values) {
    const grid = gridOf(values)
    const count = values.view === "wall" ? grid.columns * grid.rows : values.count
    lanesOf(info, values).forEach(({ model, steps, name }, i) => {
      seats[i].ask({ ...orderOf(values, info, model, count), steps }, grid, name)
    })
    run()
  }

  // Figures and clocks ------------------------------------------------------------------------------------------------

  const table = new Table(find("times").querySelector("tbody"))
  let told = 0

  function tellFigures(now) {
    told = now
    write(find("rate"), String(first.figures.rate(now)))
    write(find("delay"), inMs(first.figures.percentile("total", 0.5)))
    for (const { figure, figures } of seats) write(figure.querySelector(".speed"), `${figures.rate(now)} /s`)
    if (find("times").open) table.update(first.figures)
    if (scene.values.view !== "race") return
    const walls = seats.map(({ figures }) => figures.percentile("wall", 0.5))
    write(find("verdict"), verdict(...walls.slice(-2), racers.slice(-2).map(({ who }) => who)))
  }

  function clocks(now) {
    const times = seats.map(({ clock, stream }) => clock.at(now, stream.since))
    const whole = Math.max(1, ...times, ...seats.map(({ clock }) => clock.wall ?? 0))
    seats.forEach(({ clock }, i) => clock.show(times[i], whole))
  }

  /** Clocks run as long as a picture is awaited, and figures until the last second is over. */
  const run = eachFrame((now) => {
    const busy = seats.some(({ stream, figures }) => stream.since !== null || figures.rate(now) > 0)
    if (scene.values.view === "race") clocks(now)
    if (!busy || now - told > 400) tellFigures(now)
    return busy
  })
  find("times").addEventListener("toggle", run)

  // Walk, and what else is done to the pictures -----------------------------------------------------------------------

  const stage = find("stage")
  const map = new TorusMap(find("map"))

  const walk = new Walk(stage, {
    move: (at) => scene.set({ walk: at }),
    tap: (x, y) => {
      const { view, count, picture } = scene.values
      const k = view === "wall" || (view === "draw" && count > 1) ? first.picture.at(x, y) : null
      if (k !== null) scene.set({ view: view === "draw" ? view : "walk", count: 1, picture: picture + k })
    },
    drifting: (on) => {
      find("drift").setAttribute("aria-pressed", on)
      find("drift").querySelector("use").setAttribute("href", on ? "#icon-pause" : "#icon-play")
    },
  })

  const actions = {
    drift: () => (walk.drift = !walk.drift),
    new: () => scene.set({ seed: Math.floor(SEEDS * Math.random()), picture: 0 }),
    home: () => {
      walk.drift = false
      scene.set({ walk: [0, 0] })
    },
    paint: () => {
      drawing.use(first.picture.first())
      scene.set({ view: "draw" })
    },
    save: () => save(shown(), scene.values),
    copy: async () => {
      tellCopied((await copy(shown())) ? "Copied" : "Not allowed")
      setTimeout(tellCopied, 2000, "")
    },
  }
  const tellCopied = (said) => {
    write(find("copied"), said)
    write(find("copy").querySelector("span"), said || "Copy")
  }
  const shown = () => seats.filter(({ figure }) => !figure.hidden).map(({ picture }) => picture)
  find("copy").hidden = !canCopy()
  for (const [id, act] of Object.entries(actions)) find(id).addEventListener("click", act)
  const keys = { " ": "drift", n: "new", Home: "home", s: "save", c: "copy" }
  stage.addEventListener("keydown", (event) => {
    if (event.target !== stage || event.ctrlKey || event.metaKey || event.altKey || !(event.key in keys)) return
    event.preventDefault()
    actions[keys[event.key]]()
  })
  find("prompt").addEventListener("input", () => stage.classList.add("touched"))
  for (const kind of ["pointerdown", "keydown"]) stage.addEventListener(kind, () => stage.classList.add("touched"))
  addEventListener("pointerdown", () => walk.touch())
  addEventListener("keydown", () => walk.touch())
  addEventListener("online", retry)

  // The scene decides what is seen ------------------------------------------------------------------------------------

  let kept = 0

  function keep() {
    kept ||= setTimeout(() => {
      kept = 0
      history.replaceState(null, "", `#${toFragment(scene.values)}`)
    }, 1000)
  }

  function arrange({ view }) {
    const draws = view === "draw"
    document.body.dataset.view = view
    for (const id of ["easel", "tools", "deeds", "editing"]) find(id).hidden = !draws
    find("paint").hidden = view !== "walk" || drawing === null
    if (first.take(draws ? drawing.edits : first.frames)) notice.show("live") // nothing is known of it yet
    if (draws) walk.drift = false
    find("verdict").hidden = view !== "race"
    write(find("hint"), view === "wall" ? "Drag to walk, touch a picture to go in" : "Drag to walk through noise space")
    for (const { figure, stream } of seats.slice(1)) {
      figure.hidden = view !== "race"
      if (view !== "race") stream.rest()
    }
  }

  function follow(values, changes) {
    if ("view" in changes) arrange(values)
    if ("walk" in changes) {
      walk.at = values.walk
      map.show(values.walk)
    }
    ask(values)
    keep()
  }

  scene.watch(follow)
  follow(scene.values, scene.values)
  new ResizeObserver(() => scene.values.view === "wall" && ask(scene.values)).observe(stage)
  // The walk may have written its next place into the address before this event comes.
  addEventListener("hashchange", ({ newURL }) => scene.set(fromFragment(new URL(newURL).hash, scene.values, info)))
  const { view, prompt } = scene.values
  if (!calm() && prompt === null && view !== "draw") walk.drift = true // the pictures of words move with them
}

start()
