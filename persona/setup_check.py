"""The last step of the set-up: imports what everything stands on and says in one line what is wrong, if anything."""

from __future__ import annotations

import importlib
import os
import sys

MODULES = ("torch", "transformers", "vllm", "persona")


def main() -> int:
    """Prints the versions found; 1 if a module cannot be imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found = []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # any failure of an import is what this looks for
            print(f"set-up failed: cannot import {name}: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
        found.append(f"{name} {getattr(module, '__version__', '')}".strip())
    print("set-up is complete: " + ", ".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
