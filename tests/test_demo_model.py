"""The demo model says of itself that it talks nonsense."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llama_gpu as lg

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_demo_model.py"


def test_its_name_and_its_words_say_that_it_talks_nonsense(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, tmp_path / "models"]
    written = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    header = lg.read_header(written)
    assert "nonsense" in Path(written).name
    assert "nonsense" in header.metadata["general.name"]
    words = header.metadata["tokenizer.ggml.tokens"][5 + 256 :]
    assert "I talk nonsense" in "".join(words).replace("\u0120", " ")
    assert header.file_bytes < 5_000_000
