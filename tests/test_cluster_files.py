"""The job files in pipelines/cluster name flags that there are, and slices that add up."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

from pseudolabel.cli import app

CLUSTER = REPOSITORY / "pipelines" / "cluster"


def _loaded(name: str) -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    with open(CLUSTER / name) as file:
        found: dict[str, Any] = yaml.safe_load(file)
    return found


def _commands() -> dict[str, list[str]]:
    pod = _loaded("kubernetes.yaml")["spec"]["template"]["spec"]
    script = (CLUSTER / "slurm.sh").read_text().replace("\\\n", " ")
    return {
        "slurm": shlex.split(next(line for line in script.splitlines() if line.startswith("exec srun")))[2:],
        "kubernetes": pod["containers"][0]["command"],
        "kuberay": shlex.split(_loaded("kuberay.yaml")["spec"]["entrypoint"]),
    }


def test_every_flag_is_one_of_annotate() -> None:
    import typer

    annotate = typer.main.get_command(app).commands["annotate"]  # type: ignore[attr-defined]
    known = {name for parameter in annotate.params for name in parameter.opts}
    for command in _commands().values():
        assert command[:2] == ["pseudolabel", "annotate"]
        flags = {word.partition("=")[0] for word in command if word.startswith("--")}
        assert {"--teacher", "--out"} <= flags <= known


def test_the_indexed_job_has_as_many_pods_as_slices() -> None:
    job = _loaded("kubernetes.yaml")["spec"]
    slices = re.search(r"--slice=\$\(JOB_COMPLETION_INDEX\)/(\d+)", " ".join(_commands()["kubernetes"]))
    assert slices is not None
    assert job["completions"] == job["parallelism"] == int(slices[1])


def test_the_slurm_array_counts_its_slices_from_zero(tmp_path: Path) -> None:
    stand_in = tmp_path / "srun"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    task = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_COUNT": "8"}
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", "shards", "a teacher", "store"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **task},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "pseudolabel annotate shards --teacher a teacher --out store --encoding topk:10 --slice 3/8\n"
