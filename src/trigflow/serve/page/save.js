// Saving what is seen as a PNG file.

import { gapOf } from "./canvas.js"

/** Save what these pictures show, side by side. */
export function save(pictures, { seed, picture, view }) {
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
  sheet.toBlob((blob) => {
    const url = URL.createObjectURL(blob)
    const link = Object.assign(document.createElement("a"), { href: url, download: `trigflow-${view}-${seed}-${picture}.png` })
    link.click()
    setTimeout(() => URL.revokeObjectURL(url), 10_000)
  }, "image/png")
}
