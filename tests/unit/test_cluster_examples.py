"""The examples for Slurm and SkyPilot say what their tools and this project understand; no cluster has run them."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from mllm_keeplora.config import RunConfig
from mllm_keeplora.data.stream import load_stream

ROOT = Path(__file__).resolve().parents[2]
SBATCH = sorted(ROOT.glob("scripts/slurm/*.sbatch"))
SKY = sorted(ROOT.glob("scripts/skypilot/*.yaml"))
# https://docs.skypilot.co/en/latest/reference/yaml-spec.html
SKY_KEYS = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "volumes", "setup", "run"}
SKY_RESOURCES = {"infra", "accelerators", "cpus", "memory", "instance_type", "use_spot", "disk_size", "disk_tier"}
# .../running-jobs/environment-variables.html, and the output environment of sbatch(1) and srun(1)
SKY_VARIABLES = {"SKYPILOT_NUM_GPUS_PER_NODE", "SKYPILOT_NODE_RANK", "SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES"}
SLURM_VARIABLES = {"SUBMIT_DIR", "JOB_NODELIST", "JOB_ID", "NNODES", "NODEID", "GPUS_ON_NODE", "CPUS_PER_TASK"}
SBATCH_OPTIONS = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output"}


def check_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def check_launch(script: str) -> str:
    """The launcher's arguments by its own parser, files that are there; the recipe that it starts."""
    [command] = re.findall(r"-m accelerate\.commands\.launch (.*?\.py)", script.replace("\\\n", " "), re.DOTALL)
    words = [re.sub(r'"\$\w+"', "1", word) for word in command.split()]
    arguments = launch_command_parser().parse_args(words)
    settings = yaml.safe_load((ROOT / arguments.config_file).read_text())
    assert settings["distributed_type"] == "MULTI_GPU"
    assert (ROOT / arguments.training_script).is_file()
    return str(arguments.training_script)


def test_both_recipes_have_a_job() -> None:
    assert {check_launch(path.read_text()) for path in SBATCH} == {"recipes/vqa.py", "recipes/video.py"}
    assert len(SBATCH) == 2 and len(SKY) == 1


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.stem)
def test_a_slurm_job_can_be_read(path: Path) -> None:
    script = path.read_text()
    check_bash(script)
    assert "Not yet run on a cluster" in script and f"sbatch {path.relative_to(ROOT)} --config" in script
    assert set(re.findall(r"^#SBATCH --([\w-]+)=\S+$", script, re.MULTILINE)) == SBATCH_OPTIONS
    assert script.count("#SBATCH") == len(SBATCH_OPTIONS)
    assert script.index("set -euo") > script.rindex("#SBATCH"), "Slurm reads options before the first command alone"
    assert set(re.findall(r"SLURM_(\w+)", script)) == SLURM_VARIABLES


def sky(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", SKY, ids=lambda path: path.stem)
def test_a_skypilot_task_has_documented_keys_and_files_that_are_there(path: Path) -> None:
    task, text = sky(path), path.read_text()
    assert "Not yet run on a cloud" in text and f"scripts/skypilot/{path.name}" in text
    assert task.keys() <= SKY_KEYS and task["resources"].keys() <= SKY_RESOURCES
    name, number = task["resources"]["accelerators"].split(":")
    for script in (task["setup"], task["run"]):
        check_bash(script)
        known = {*task["envs"], *task["secrets"], *SKY_VARIABLES, "PYTHON"}
        assert set(re.findall(r"\$\{?(\w+)", script)) <= known
        [setup] = re.findall(r"source (\S+)", script)
        assert (ROOT / setup).is_file()
    assert check_launch(task["run"]) == "recipes/vqa.py"
    envs = task["envs"]
    config = RunConfig.read(ROOT / envs["CONFIG"], ROOT / envs["HARDWARE"])
    assert config.stream == envs["STREAM"] and load_stream(ROOT / envs["STREAM"], check_files=False).hub is not None
    assert f"_{number}x80gb" in envs["HARDWARE"] and name.endswith("80GB")
