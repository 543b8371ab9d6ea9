"""All benchmarks, each in a process of its own; one table at the end.

    python benchmarks/run.py                    a CPU: mid-size shapes, about 40 minutes on one core
    python benchmarks/run.py --only bases       one of them, or several
    python benchmarks/run.py --quick            tiny sizes, to see that everything runs

On a GPU the same command takes the shapes of LLaVA-1.5-7B. Rows, date and hardware are kept in
docs/benchmarks/results.json, the table in docs/benchmarks/table.md; a script that is run again replaces its
own rows. --repeats and --threads are passed on. Nothing else should compute meanwhile.
"""

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from measure import PICTURES, ROOT, Row, table

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.runs.files import read_json, write_json
from mllm_keeplora.studies.results import environment

SCRIPTS = ("bases", "gradient_pass", "training", "switches", "stage", "evaluation", "growth")


def rows_of(name: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Runs a script and reads what it writes.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "rows.json")
        script = str(ROOT / "benchmarks" / f"{name}.py")
        if subprocess.run([sys.executable, script, "--json", str(found), *arguments], check=False).returncode:
            sys.exit(f"benchmarks/{name}.py failed; its own message says why")
        return list(json.loads(found.read_text()))


def main() -> None:
    """Runs the scripts and keeps their rows; those of --quick are printed alone."""
    parser = OptionParser("python benchmarks/run.py", __doc__)
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, default=SCRIPTS)
    parser.add_argument("--quick", action="store_true")
    given, passed_on = parser.parse_known_args()
    kept = PICTURES / "results.json"
    results = read_json(kept) if kept.exists() and not given.quick else {}
    for name in given.only:
        rows = rows_of(name, [*passed_on, *(["--quick"] if given.quick else [])])
        date = f"{datetime.now(UTC):%Y-%m-%d}"
        results[name] = {"date": date, "environment": environment(), "arguments": passed_on, "rows": rows}
        if not given.quick:
            write_json(kept, results)
    every = [Row(**row) for name in SCRIPTS if name in results for row in results[name]["rows"]]
    text = table(sorted(every, key=lambda row: row.number))
    if not given.quick:
        (PICTURES / "table.md").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    with command():
        main()
