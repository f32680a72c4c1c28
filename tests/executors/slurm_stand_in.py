"""Stand-ins for the four commands of SLURM that submitit calls: jobs are process groups of this machine.

They start in a folder of their own, as on a node of another machine. No scheduler and no nodes: what is tested with them is what we and submitit say to SLURM, not SLURM.
"""

from __future__ import annotations

import sys
from pathlib import Path

COMMON = """#!{python}
import os, re, signal, subprocess, sys
from pathlib import Path
STATE = Path({state!r})

def alive(pid):
    try:
        return Path(f"/proc/{{pid}}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
"""
COMMANDS = {
    "sbatch": """
script = Path(sys.argv[1])
number = len(list(STATE.glob("*.sh"))) + 1
text = script.read_text()
(STATE / f"{number}.sh").write_text(text)
array = re.search(r"^#SBATCH --array=0-(\\d+)", text, re.M)
for task in range(int(array[1]) + 1) if array else [None]:
    env = os.environ | {"SLURM_JOB_ID": str(number), "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1",
                        "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "CUDA_VISIBLE_DEVICES": "6"}
    if task is not None:
        env |= {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}
    job = subprocess.Popen(["bash", str(script)], env=env, start_new_session=True, cwd=STATE,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (STATE / (f"{number}.pid" if task is None else f"{number}_{task}.pid")).write_text(str(job.pid))
print(f"Submitted batch job {number}")
""",
    "srun": """
args = sys.argv[1:]
while args[0].startswith("--"):
    args = args[1 if args[0] == "--unbuffered" or "=" in args[0] else 2:]
os.execvp(args[0], args)
""",
    "sacct": """
print("JobID|State|NodeList")
for file in STATE.glob("*.pid"):
    print(f"{file.stem}|{'RUNNING' if alive(int(file.read_text())) else 'FAILED'}|here")
""",
    "scancel": """
os.killpg(int((STATE / f"{sys.argv[1]}.pid").read_text()), signal.SIGTERM)
""",
}


def install(folder: Path) -> Path:
    """Write the commands into `folder/bin`; returns the folder that holds the scripts and processes of jobs."""
    state = folder / "state"
    for part in (state, folder / "bin"):
        part.mkdir()
    for name, body in COMMANDS.items():
        path = folder / "bin" / name
        path.write_text(COMMON.format(python=sys.executable, state=str(state)) + body)
        path.chmod(0o755)
    return state
