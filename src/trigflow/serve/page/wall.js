// A wall of samples: how many fit, side by side.

const SMALLEST = 40 // pixels of the window for the shorter side of a picture
const MOST_BYTES = 2 ** 22 // of a frame

/**
 * Columns and rows of a wall of `width` by `height` pixels: many pictures, of which none is tiny, and little room left empty.
 *
 * shape: (c, h, w) of a picture. most: pictures that the server draws at once.
 */
export function wallGrid(width, height, shape, most) {
  const [c, h, w] = shape
  const room = Math.max(1, Math.min(most, Math.floor(MOST_BYTES / (c * h * w))))
  let best = { columns: 1, rows: 1, score: 0 }
  for (let columns = 1; columns <= room; columns++) {
    for (let rows = 1; columns * rows <= room; rows++) {
      const scale = Math.min(width / (columns * w), height / (rows * h))
      if (scale * Math.min(h, w) < SMALLEST && columns * rows > 1) continue
      const covered = (columns * w * scale * rows * h * scale) / (width * height)
      const score = columns * rows * covered ** 2
      if (score > best.score) best = { columns, rows, score }
    }
  }
  return { columns: best.columns, rows: best.rows }
}
