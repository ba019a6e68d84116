"""config_reference.py [FILE]: every setting as a Markdown table, from the settings themselves.

With a file, writes it between the lines ``<!-- settings -->`` and ``<!-- /settings -->`` there.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_gpu.config import Config

BETWEEN = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def reference() -> str:
    """The settings by section, each with its default and meaning."""
    schema = Config.model_json_schema(by_alias=False)
    defaults = Config().model_dump(mode="json")
    parts = [
        _table(
            "", {key: field for key, field in schema["properties"].items() if "$ref" not in field}, defaults
        )
    ]
    for key, field in schema["properties"].items():
        if "$ref" in field:
            section = schema["$defs"][field["$ref"].rpartition("/")[2]]
            text = field.get("description") or section["description"]
            parts.append(
                f"**`{key}`**: {_flat(text)}\n\n" + _table(f"{key}.", section["properties"], defaults[key])
            )
    return "\n".join(parts)


def _table(prefix: str, fields: dict[str, Any], defaults: dict[str, Any]) -> str:
    return "".join(["| key | default | meaning |\n|---|---|---|\n", *_rows(prefix, fields, defaults)])


def _rows(prefix: str, fields: dict[str, Any], defaults: dict[str, Any]) -> Iterator[str]:
    for key, field in fields.items():
        default = "unset" if defaults[key] is None else f"`{json.dumps(defaults[key])}`"
        yield f"| `{prefix}{key}` | {default} | {_flat(field['description'])} |\n"


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        file = Path(sys.argv[1])
        text, changed = BETWEEN.subn(lambda _: reference(), file.read_text(encoding="utf-8"))
        if not changed:
            sys.exit(f"{file} has no lines <!-- settings --> and <!-- /settings -->")
        file.write_text(text, encoding="utf-8")
    else:
        print(reference())
