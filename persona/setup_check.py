"""The last step of the set-up: imports what everything stands on and says in one line what is wrong, if anything."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys

MODULES = ("torch", "transformers", "vllm", "persona")
NUMA = "libnuma.so.1"
"""Loaded by vLLM's CPU engine when it starts, not when it is imported."""


def main() -> int:
    """Prints the versions found; returns 1 and one line if something is missing."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found = []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # whatever makes an import fail is what this looks for
            print(f"set-up failed: cannot import {name}: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        found.append(f"{name} {getattr(module, '__version__', '')}".strip())
    import torch

    if sys.platform == "linux" and not torch.cuda.is_available():
        try:
            ctypes.CDLL(NUMA)
        except OSError:
            print(f"set-up failed: vLLM needs {NUMA}: apt-get install libnuma1, then again", file=sys.stderr)
            return 1
    print("set-up is complete: " + ", ".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
