"""What a run's folder was made from, so that what lies there is never taken for the work of other settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from persona.errors import PersonaError


def claim(file: Path, settings: Mapping[str, Any], what: str) -> None:
    """Notes in `file` what is made from `settings`, JSON data by name.

    Raises `PersonaError`, which tells `what` and the names that differ, where the file notes other settings.
    """
    mine = json.loads(json.dumps(settings))
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else mine
    if other := [name for name in mine if known.get(name) != mine[name]]:
        raise PersonaError(f"{what} with another {' and '.join(other)}; give this one its own --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
