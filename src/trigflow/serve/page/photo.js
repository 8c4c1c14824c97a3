// Pictures as files: from one of any size to the pixels of a painting, and from pixels to PNG in base64.

/** A canvas of this size, opaque and white, that is read often. */
function sheet(width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height })
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true })
  context.fillStyle = "white"
  context.fillRect(0, 0, width, height)
  return [canvas, context]
}

/**
 * The middle of a picture as ImageData of this size, transparent parts over white. It is halved until it fits, so that every pixel
 * has its part; a picture that has the size keeps its pixels.
 *
 * file: a Blob. Throws an error whose message can be shown.
 */
export async function readPhoto(file, width, height) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error("This is no picture that this browser can open.")
  })
  const scale = Math.min(bitmap.width / width, bitmap.height / height)
  const [w, h] = [scale * width, scale * height]
  const doublings = Math.max(0, Math.floor(Math.log2(scale)))
  const [first, context] = sheet(width * 2 ** doublings, height * 2 ** doublings)
  context.imageSmoothingQuality = "high"
  context.drawImage(bitmap, (bitmap.width - w) / 2, (bitmap.height - h) / 2, w, h, 0, 0, first.width, first.height)
  bitmap.close()
  let canvas = first
  while (canvas.width > width) {
    const [half, smaller] = sheet(canvas.width / 2, canvas.height / 2)
    smaller.drawImage(canvas, 0, 0, half.width, half.height)
    canvas = half
  }
  return canvas.getContext("2d").getImageData(0, 0, width, height)
}

/** The means of blocks of `side` by `side` pixels, as a smaller ImageData. */
export function means({ data, width, height }, side) {
  const small = new ImageData(width / side, height / side)
  const sums = new Float64Array(small.data.length)
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const to = 4 * (Math.floor(y / side) * small.width + Math.floor(x / side))
      for (let k = 0; k < 4; k++) sums[to + k] += data[4 * (y * width + x) + k]
    }
  }
  small.data.set(sums.map((sum) => Math.round(sum / side ** 2)))
  return small
}

/** An opaque ImageData as a PNG file in base64. */
export function toPng(image) {
  const [canvas, context] = sheet(image.width, image.height)
  context.putImageData(image, 0, 0)
  return canvas.toDataURL("image/png").split(",")[1]
}

/** A mask of bytes as such a file, white where it is 255. */
export function maskToPng(mask, width, height) {
  const image = new ImageData(width, height)
  for (let i = 0; i < mask.length; i++) image.data.set([mask[i], mask[i], mask[i], 255], 4 * i)
  return toPng(image)
}

/** A PNG file in base64 as a Blob. */
export const fromBase64 = (text) => new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))])
