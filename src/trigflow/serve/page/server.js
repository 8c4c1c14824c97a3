// The server: what it serves, and a socket to its stream.

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

/** The answer of `GET /v1/model`. Throws `TokenNeeded`, or an error whose message can be shown. */
export async function describe() {
  const token = session.get(TOKEN)
  const headers = token ? { Authorization: `Bearer ${token}` } : {}
  let answer
  try {
    answer = await fetch(new URL("v1/model", document.baseURI), { headers, cache: "no-store" })
  } catch {
    throw new Error("The server does not answer.")
  }
  if (answer.status === 401) throw new TokenNeeded(Boolean(token))
  if (!answer.ok) throw new Error(`The server answers with status ${answer.status}.`)
  return answer.json()
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
