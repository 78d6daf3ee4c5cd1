"""How a request tells our server more than the user's id: the names and the encoding of its headers.

`persona.serving` reads them; here they are without its imports, since none of these tools needs PyTorch.
"""

from __future__ import annotations

from urllib.parse import quote

from persona.errors import PersonaError

INSTRUCTION_HEADER, COUNT_HEADER = "x-persona-instruction", "x-persona-tokens"
"""The instruction (percent-encoded UTF-8) and the number of user tokens."""
USER_TOKEN_HEADER = "x-persona-user-token"
"""A signed user token (a JWT), where the server asks for one."""


def request_headers(instruction: str | None = None, tokens: int | None = None) -> dict[str, str]:
    """The headers that say this. Raises `PersonaError` for an instruction or a number that cannot be one."""
    headers = {}
    if instruction is not None:
        if not isinstance(instruction, str) or not instruction.strip():
            raise PersonaError(f"the instruction must be a text, not {instruction!r}; leave it out for none")
        try:
            headers[INSTRUCTION_HEADER] = quote(instruction)
        except UnicodeEncodeError:
            raise PersonaError("the instruction is not valid Unicode") from None
    if tokens is not None:
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
            raise PersonaError(f"the number of user tokens must be 1 or more, not {tokens!r}")
        headers[COUNT_HEADER] = str(tokens)
    return headers
