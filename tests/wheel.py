"""The wheel, built from the files that git knows, and installed where the checkout cannot be imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tracked(*folders: str) -> list[str]:
    """What git has below these folders, by its path in the repository; all of it without any."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


def build_wheel(folder: Path) -> Path:
    """Builds from a copy: a checkout may hold what an earlier build left."""
    for name in tracked():
        target = folder / "source" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(folder), "."]
    subprocess.run(command, cwd=folder / "source", check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel and the dependencies of this one; returns its folder of commands."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    # A path in a .pth file brings the packages that lie there, not what .pth files there bring: so whatever
    # this environment has, but not the checkout.
    found = [path for path in sys.path if path.endswith("-packages")]
    (packages / "zz_dependencies.pth").write_text("\n".join(found) + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([*pip, "--ignore-installed", str(wheel)], env=environment, check=True)
    return folder / "bin"
