"""Objects in JSON files that others wrote."""

import json
from pathlib import Path
from typing import Any

from xlathe.errors import CheckpointError

LARGEST = 100_000_000  # bytes

def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises CheckpointError for anything else."""
    try:
        if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST):
            raise CheckpointError(f"{path}: expected a regular file of at most {LARGEST:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found
