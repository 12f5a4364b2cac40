"""Stands in for a cluster: sbatch, srun, sacct and scontrol as one program, called by those names.

A job is a process of this machine; `$FAKE_SLURM` holds the script, and for each job its process id
and its state.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ID = 77


def start(script: str, task: int) -> None:
    """One task of the array in the background; its state is kept when it ends."""
    home = Path(os.environ["FAKE_SLURM"])
    (home / f"{task}.state").write_text("RUNNING")
    done = f"bash {script}; [ -e {home}/{task}.again ] || echo COMPLETED > {home}/{task}.state"
    named = {"SLURM_ARRAY_JOB_ID": str(ID), "SLURM_ARRAY_TASK_ID": str(task)}
    with (home / f"{task}.out").open("a") as out:
        subprocess.Popen(
            ["bash", "-c", f"{done}; rm -f {home}/{task}.again"],
            env={**os.environ, **named, "SLURM_JOB_ID": str(ID + 1 + task), "SLURM_PROCID": "0"},
            stdout=out, stderr=out, start_new_session=True,
        )  # fmt: skip


def sbatch(script: str) -> None:
    home = Path(os.environ["FAKE_SLURM"])
    kept = home / "script.sh"
    kept.write_text(Path(script).read_text())
    array = re.search(r"--array=0-(\d+)", kept.read_text())
    print(f"Submitted batch job {ID}")
    assert array is not None
    for task in range(int(array[1]) + 1):
        start(str(kept), task)


def srun(*arguments: str) -> None:
    """What follows the options, in the place of this process, whose id is kept."""
    command = arguments[arguments.index("-u") - 1 :]
    home, task = Path(os.environ["FAKE_SLURM"]), os.environ["SLURM_ARRAY_TASK_ID"]
    (home / f"{task}.pid").write_text(str(os.getpid()))
    os.execv(command[0], command)


def sacct(*_: str) -> None:
    print("JobID|State|NodeList")
    for state in sorted(Path(os.environ["FAKE_SLURM"]).glob("*.state")):
        print(f"{ID}_{state.stem}|{state.read_text().strip()}|here")


def scontrol(verb: str, job: str) -> None:
    assert verb == "requeue"
    home, task = Path(os.environ["FAKE_SLURM"]), int(job.partition("_")[2])
    (home / f"{task}.requeued").touch()
    (home / f"{task}.again").touch()
    start(str(home / "script.sh"), task)


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scontrol": scontrol}[sys.argv[1]](
        *sys.argv[2:]
    )
