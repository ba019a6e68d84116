"""ensure_models.py DIR [--create]: gives an empty models folder a tiny model to show with."""

import argparse
from pathlib import Path

from make_demo_model import write_demo_model

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", type=Path)
parser.add_argument("--create", action="store_true", help="make the folder if it is missing")
arguments = parser.parse_args()
if arguments.create:
    arguments.folder.mkdir(parents=True, exist_ok=True)
# A missing folder that was asked for by name is an error, and llama-gpu serve says so.
if arguments.folder.is_dir() and not any(arguments.folder.rglob("*.gguf")):
    path = write_demo_model(arguments.folder)
    print(f"No models in {arguments.folder}/: wrote {path}, a tiny demo model that talks nonsense.")
