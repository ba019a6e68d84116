"""Prints what the named extras of pyproject.toml require, for pip."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
print(*(requirement for extra in sys.argv[1:] for requirement in project["optional-dependencies"][extra]))
