"""The server plug-in: a pure ASGI middleware for stock vLLM, which is also a gateway in front of one."""
