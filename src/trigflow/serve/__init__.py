"""Pictures over HTTP and WebSocket: `trigflow serve`.

    limits      what a client may ask of the server
    noise       the noise of a picture, by seed and place on the walk
    drawing     from orders to pixels, with any drawer
    batching    the queue, and the thread that owns a model
    offers      what a run folder has to offer
    requests    what clients send
    wire        pictures as bytes
    app         HTTP
    stream      the WebSocket
    server      the socket
    listen      all of it, from a run folder

`app`, `stream`, `server`, `requests` and `service` need the extra `serve`.
"""

from trigflow.serve.limits import Limits

__all__ = ["Limits"]
