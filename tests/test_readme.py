"""The README says what is so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_lists_the_settings_as_they_are(tmp_path: Path) -> None:
    fresh = tmp_path / "README.md"
    fresh.write_text((ROOT / "README.md").read_text())
    subprocess.run([sys.executable, ROOT / "scripts" / "config_reference.py", fresh], check=True)
    assert fresh.read_text() == (ROOT / "README.md").read_text(), (
        "run scripts/config_reference.py README.md after a change of the settings"
    )
