// Saving and copying what is seen as PNG.

import { gapOf } from "./canvas.js"
import { inWords, promptOf } from "./scene.js"

/** What these pictures show, side by side, as a promise of a PNG file. */
function drawn(pictures) {
  const canvases = pictures.map((shown) => shown.copy())
  const gap = canvases.length > 1 ? gapOf(canvases[0].height, canvases[0].width) : 0
  const width = canvases.reduce((sum, canvas) => sum + canvas.width + gap, -gap)
  const sheet = Object.assign(document.createElement("canvas"), { width, height: canvases[0].height })
  const context = sheet.getContext("2d")
  let left = 0
  for (const canvas of canvases) {
    context.drawImage(canvas, left, 0)
    left += canvas.width + gap
  }
  return new Promise((resolve) => sheet.toBlob(resolve, "image/png"))
}

/** Save them as a file with a name of its own. */
export async function save(pictures, values) {
  const { seed, picture, view } = values
  const url = URL.createObjectURL(await drawn(pictures))
  const words = inWords(promptOf(values) ?? "").replace(/[^\p{L}\p{M}\p{N}\p{Extended_Pictographic}]+/gu, "-").replace(/^-|-$/g, "")
  const download = `trigflow-${words || view}-${seed}-${picture}.png`
  Object.assign(document.createElement("a"), { href: url, download }).click()
  setTimeout(() => URL.revokeObjectURL(url), 10_000)
}

/** Whether this browser lets a page copy pictures; on most it has to come from this machine, or by TLS. */
export const canCopy = () => Boolean(window.ClipboardItem && navigator.clipboard?.write)

/** Copy them, to be pasted elsewhere; whether the browser has let us. */
export function copy(pictures) {
  return navigator.clipboard.write([new ClipboardItem({ "image/png": drawn(pictures) })]).then(() => true, () => false)
}
