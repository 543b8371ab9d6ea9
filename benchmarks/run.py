"""All benchmarks, one process after the other; one table at the end.

    python benchmarks/run.py                    a CPU: mid-size shapes, about 40 minutes on one core
    python benchmarks/run.py --only bases       these scripts
    python benchmarks/run.py --quick            tiny sizes, to see that everything runs

On a GPU the same command takes the shapes of LLaVA-1.5-7B. Rows, date and hardware are kept in
docs/benchmarks/results.json, the table in docs/benchmarks/table.md; a script that is run again replaces its
own rows. Nothing else should compute meanwhile.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from measure import PICTURES, ROOT, Row, table

from mllm_keeplora.runs.files import read_json, write_json
from mllm_keeplora.studies.results import environment

SCRIPTS = ("bases", "gradient_pass", "training", "switches", "stage", "evaluation", "growth")


def main() -> None:
    """Runs the scripts and keeps their rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--quick", action="store_true")
    arguments, passed_on = parser.parse_known_args()
    kept = PICTURES / "results.json"
    results = read_json(kept) if kept.exists() and not arguments.quick else {}
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            found = Path(folder, "rows.json")
            script = str(ROOT / "benchmarks" / f"{name}.py")
            quick = ["--quick"] if arguments.quick else []
            done = subprocess.run(
                [sys.executable, script, "--json", str(found), *quick, *passed_on], check=False
            )
            if done.returncode != 0:
                sys.exit(f"benchmarks/{name}.py failed; its own message says why")
            rows = json.loads(found.read_text())
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        results[name] = {"date": date, "environment": environment(), "arguments": passed_on, "rows": rows}
        if not arguments.quick:
            PICTURES.mkdir(parents=True, exist_ok=True)
            write_json(kept, results)
    rows = [Row(**row) for name in SCRIPTS if name in results for row in results[name]["rows"]]
    text = table(sorted(rows, key=lambda row: row.number))
    if not arguments.quick:
        (PICTURES / "table.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main()
