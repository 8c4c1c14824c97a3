// Values that a browser keeps for the page, where it is allowed to keep any.

/** `sessionStorage` or `localStorage` with a fallback that forgets: some browsers refuse both. */
function keeper(name) {
  const memory = new Map()
  return {
    get(key) {
      try {
        return window[name].getItem(key) ?? memory.get(key) ?? null
      } catch {
        return memory.get(key) ?? null
      }
    },
    set(key, value) {
      memory.set(key, value)
      try {
        window[name].setItem(key, value)
      } catch {
        // kept in memory alone
      }
    },
  }
}

/** Until the tab is closed. */
export const session = keeper("sessionStorage")

/** Until the user clears it. */
export const lasting = keeper("localStorage")
