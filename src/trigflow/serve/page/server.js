// The server: what it serves, edits of a picture, and a socket to its stream.

import { session } from "./storage.js"

const TOKEN = "trigflow-token"

/** The server wants a token; `wrong` if one was shown. */
export class TokenNeeded extends Error {
  constructor(wrong) {
    super(wrong ? "The server does not know this token." : "The server asks for a token.")
    this.wrong = wrong
  }
}

/** Keep a token until the tab is closed. */
export const keepToken = (token) => session.set(TOKEN, token)

/** The server has answered that it cannot; `final` if it would again, otherwise one may try `after` so many ms, null for any. */
export class Refused extends Error {
  constructor(message, final, after = null) {
    super(message)
    this.final = final
    this.after = after
  }
}

/** The answer to a request, with the token. Throws `TokenNeeded`, or an error whose message can be shown. */
async function ask(path, { headers = {}, ...options }) {
  const token = session.get(TOKEN)
  const shown = token ? { ...headers, Authorization: `Bearer ${token}` } : headers
  let answer
  try {
    answer = await fetch(new URL(path, document.baseURI), { ...options, headers: shown, cache: "no-store" })
  } catch {
    throw new Error("The server does not answer.")
  }
  if (answer.status === 401) throw new TokenNeeded(Boolean(token))
  return answer
}

const status = ({ status }) => `The server answers with status ${status}.`

/** The answer of `GET /v1/model`. Throws as `ask` does. */
export async function describe() {
  const answer = await ask("v1/model", {})
  if (!answer.ok) throw new Error(status(answer))
  return answer.json()
}

/** The answer of `POST /v1/edit` to an order in the format npy: `{ buffer, ms }`. Throws as `ask` does, and `Refused`. */
export async function edit(order, signal) {
  const headers = { "Content-Type": "application/json" }
  const answer = await ask("v1/edit", { method: "POST", headers, body: JSON.stringify(order), signal })
  if (!answer.ok) {
    const { detail } = await answer.json().catch(() => ({}))
    const seconds = parseFloat(answer.headers.get("Retry-After"))
    const final = answer.status < 500 && ![408, 429].includes(answer.status)
    throw new Refused(detail ?? status(answer), final, seconds > 0 ? 1000 * seconds : null)
  }
  const parts = (answer.headers.get("Server-Timing") ?? "").matchAll(/(\w+);dur=([\d.]+)/g)
  const ms = { queue: 0, network: 0, encode: 0, ...Object.fromEntries([...parts].map(([, part, value]) => [part, +value])) }
  return { buffer: await answer.arrayBuffer(), ms }
}

/** A new socket to `/v1/stream`. Browsers can send a token only as the name of a subprotocol. */
export function openStream() {
  const url = new URL("v1/stream", document.baseURI)
  url.protocol = url.protocol.replace("http", "ws")
  url.hash = ""
  const token = session.get(TOKEN)
  const socket = new WebSocket(url, token ? ["trigflow.v1", `bearer.${token}`] : [])
  socket.binaryType = "arraybuffer"
  return socket
}
