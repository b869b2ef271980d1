"""A model's folder: its JSON files and the small files that travel with the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

MARK, MANIFEST = "jaxpaged.json", "manifest.json"  # of an Orbax checkpoint: see `orbax_checkpoint`
SMALL = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "additional_chat_templates/*.jinja")
TERMS = ("LICENSE*", "NOTICE*", "*TERMS*")
OF_THE_WEIGHTS = ("*.safetensors.index.json", "*.bin.index.json", MARK, MANIFEST)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError says what else it is."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, not an object.")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_small_files(source: Path, target: Path, patterns: tuple[str, ...] = SMALL + TERMS) -> None:
    """Configuration, tokenizer, chat templates, terms: as they are, all that is not about the weights' files."""
    for file in sorted(file for pattern in patterns for file in source.glob(pattern)):
        if file.is_file() and not any(file.match(pattern) for pattern in OF_THE_WEIGHTS):
            place = target / file.relative_to(source)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, place)
