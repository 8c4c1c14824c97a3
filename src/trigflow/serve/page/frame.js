// Frames as bytes, and their pixels as the browser wants them.

/** Header and pixels of a binary message: 4 bytes length of the header, the header as JSON, the pixels. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true)
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)))
  return { header, pixels: new Uint8Array(buffer, 4 + length) }
}

/**
 * Picture number k of `pixels`, uint8 (n, c, h, w), written into `image`, an ImageData as wide as a whole sheet, at (left, top).
 * One channel is grey, three are RGB, four RGBA.
 */
export function place(image, pixels, k, [c, h, w], left, top) {
  const plane = h * w
  const [red, green, blue] = c >= 3 ? [0, plane, 2 * plane] : [0, 0, 0]
  const out = image.data
  for (let y = 0; y < h; y++) {
    let from = k * c * plane + y * w
    let to = 4 * ((top + y) * image.width + left)
    for (let x = 0; x < w; x++, from++, to += 4) {
      out[to] = pixels[from + red]
      out[to + 1] = pixels[from + green]
      out[to + 2] = pixels[from + blue]
      out[to + 3] = c === 4 ? pixels[from + 3 * plane] : 255
    }
  }
}

/** Shape and pixels of a NumPy file of uint8. */
export function unpackNpy(buffer) {
  const view = new DataView(buffer)
  const [begin, length] = view.getUint8(6) === 1 ? [10, view.getUint16(8, true)] : [12, view.getUint32(8, true)]
  const header = new TextDecoder().decode(new Uint8Array(buffer, begin, length))
  const shape = header.match(/'shape': \(([\d, ]+)\)/)[1].split(",").filter((size) => size.trim()).map(Number)
  return { shape, pixels: new Uint8Array(buffer, begin + length) }
}
