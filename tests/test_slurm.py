"""examples/train.slurm, with Slurm's and PyTorch's commands made up."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "train.slurm"
WORDS = ["my recipe.toml", "--out", "run", "--data", "HQ=hq-{res}"]
COMMANDS = {
    "scontrol": 'echo "scontrol $*" >> calls; if [ "$1" = show ]; then printf "one\\ntwo\\n"; fi',
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
    "torchrun": 'printf "%s|" "$@" >> calls; echo >> calls; eval "$TORCHRUN_DOES"',
}


@pytest.fixture
def start(tmp_path):
    """start(what torchrun does): the running script, and what it calls line by line in `calls`."""
    for name, text in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "[one-two]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
    }  # fmt: skip

    def call(does: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", SCRIPT, *WORDS],
            cwd=tmp_path,
            env=environment | {"TORCHRUN_DOES": does},
            start_new_session=True,
        )

    return call


def test_every_node_starts_the_same_run(start, tmp_path):
    assert start("true").wait(30) == 0
    asked, *nodes = (tmp_path / "calls").read_text().splitlines()
    assert asked == "scontrol show hostnames [one-two]"
    for rank, node in enumerate(nodes):
        assert node.split("|")[:-1] == [
            "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "8",
            "--master-addr", "one", "--master-port", "20041",
            "-m", "pixart_rt", "train", *WORDS, "--parallel", "hsdp",
        ]  # fmt: skip
    assert len(nodes) == 2


def test_a_run_that_fails_fails_the_job(start):
    assert start("exit 3").wait(30) == 3


def test_the_end_of_the_time_queues_the_job_again(start, tmp_path):
    process = start("sleep 30")
    try:
        calls = tmp_path / "calls"
        for _ in range(200):
            if calls.exists() and "pixart_rt" in calls.read_text():
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        process.wait(20)
        assert "scontrol requeue 41" in calls.read_text().splitlines()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
