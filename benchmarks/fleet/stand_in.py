"""Stands where vLLM would: answers a chat with the first numbers of each row of user tokens that it was sent."""

from __future__ import annotations

import argparse
import base64
import io

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

NUMBERS = 6
"""Of each row."""


async def answer(request: Request) -> JSONResponse:
    """One chat."""
    content = (await request.json())["messages"][-1]["content"]
    parts = [] if isinstance(content, str) else [p for p in content if p["type"] == "prompt_embeds"]
    numbers: list[float] = []
    for part in parts:
        rows = torch.load(io.BytesIO(base64.b64decode(part["data"])), weights_only=True)
        numbers += rows[:, :NUMBERS].flatten().tolist()
    text = " ".join(f"{number:.6g}" for number in numbers)
    return JSONResponse({"choices": [{"message": {"role": "assistant", "content": text}}]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])])
    uvicorn.run(app, host="127.0.0.1", port=parser.parse_args().port, log_level="warning")
