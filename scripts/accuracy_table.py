"""Writes what `llama-gpu accuracy` shows of the carried ground truth: said against taken, per case.

    scripts/accuracy_table.py

To be run after every change of the estimates or of the ground truth; a test says when it was forgotten.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "python" / "llama_gpu" / "data" / "accuracy.json"
LLAMA_CPP = "0c1e57098"
sys.path.insert(0, str(ROOT / "tests"))

from support import accuracy, ground_truth  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterable


def all_rows() -> list[accuracy.Row]:
    """Every device of every case that the project carries."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in ground_truth.model_names():
            path = ground_truth.write_model(model, Path(folder))
            rows += accuracy.rows_of(path, ground_truth.cases(model))
            path.unlink()
    return rows


def table(rows: Iterable[accuracy.Row]) -> dict[str, Any]:
    """The document that ships: a list per case of architecture, backend, devices, and bytes said and taken.

    Bytes are over all devices, on the CPU of the host; said is in llama.cpp's own terms, without what a
    driver adds. The last entry is how far off the worst device's compute buffer is, in bytes.
    """
    by_case: dict[ground_truth.Case, list[accuracy.Row]] = defaultdict(list)
    for row in rows:
        by_case[row.case].append(row)
    cases = []
    for case, its_rows in by_case.items():
        counted = [row for row in its_rows if row.place != "host"] or its_rows
        said = sum(
            row.said.weights_bytes + row.said.context_bytes + row.said.compute_bytes for row in counted
        )
        taken = sum(row.taken_bytes for row in counted)
        exact = all(
            row.said.weights_bytes == row.taken.weights and row.said.context_bytes == row.taken.context
            for row in its_rows
        )
        worst = max((row.compute_error for row in its_rows), key=abs)
        cases.append([its_rows[0].architecture, case.backend, case.devices, said, taken, exact, worst])
    columns = ["architecture", "backend", "devices", "said", "taken", "weights_and_context_exact"]
    return {"llama_cpp": LLAMA_CPP, "columns": [*columns, "worst_compute_error"], "cases": sorted(cases)}


def as_text(document: dict[str, Any]) -> str:
    """A case a line, so that a change can be read."""
    head = "".join(f"{json.dumps(key)}: {json.dumps(document[key])},\n" for key in ("llama_cpp", "columns"))
    lines = ",\n".join(json.dumps(case) for case in document["cases"])
    return f'{{\n{head}"cases": [\n{lines}\n]}}\n'


def main() -> int:
    """Compute and write."""
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(as_text(table(all_rows())), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
