"""A second port of a vLLM server that our middleware does not stand in front of: there it is a plain vLLM."""

import asyncio
import os

import uvicorn


class PlainDoor:
    """Middleware for vLLM's --middleware, inside ours, that serves vLLM's own application on the port PLAIN_PORT too.

    A plain vLLM has the same code behind its port; the engine, which takes a minute to start, is there once for both.
    """

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            outer = scope["app"]

            async def plain(scope, receive, send):
                await self.app({**scope, "app": outer}, receive, send)

            config = uvicorn.Config(plain, port=int(os.environ["PLAIN_PORT"]), lifespan="off", log_config=None)
            self._serving = asyncio.ensure_future(uvicorn.Server(config).serve())
        await self.app(scope, receive, send)
