"""The demo model says of itself that it talks nonsense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llama_gpu as lg

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_demo_model.py"


def test_its_name_and_its_words_say_that_it_talks_nonsense(tmp_path: Path) -> None:
    path = tmp_path / "models" / "demo-nonsense.gguf"
    subprocess.run([sys.executable, SCRIPT, path], check=True, stdout=subprocess.DEVNULL)
    header = lg.read_header(path)
    assert "nonsense" in header.metadata["general.name"]
    words = header.metadata["tokenizer.ggml.tokens"][5 + 256 :]
    assert "I talk nonsense" in "".join(words).replace("\u0120", " ")
    assert header.file_bytes < 5_000_000
