"""The script for a GPU machine runs from end to end where there is none, in tiny."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent / "cuda" / "run.py"


def test_a_dry_run_finds_figures_in_every_section(tmp_path: Path) -> None:
    output = tmp_path / "cuda.json"
    command = [sys.executable, SCRIPT, "--dry-run", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(output.read_text())
    broken = [f for f in result["figures"] if "FAILED" in (f["line"], f["label"])]
    assert not broken, done.stderr
    sections = {figure["section"] for figure in result["figures"] if figure["line"] != "took"}
    assert len(sections) == 10
    correct = [f for f in result["figures"] if f["section"] == "correct" and f["gate"]]
    assert len(correct) > 10 and all(figure["holds"] for figure in correct)
    assert len(done.stdout.splitlines()) < 100
