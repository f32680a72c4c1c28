"""docs/python.md: its commands, then its blocks of Python in one process, as they stand."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.test_documented_commands import ROOT, blocks, environment, run_line

PAGE = ROOT / "docs" / "python.md"


def test_the_blocks_run_in_the_folder_that_its_commands_left(tmp_path):
    for line in (line for block in blocks(PAGE) for line in block):
        run_line(line, tmp_path)
    parts = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(parts) == 8
    script = tmp_path / "page.py"
    script.write_text("\n".join(parts))
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=environment(tmp_path, "apply") | {"PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    fvu = float(said[[line.startswith("strongest") for line in said].index(True)].split()[-1])
    assert 0 < fvu < 1
    heads = [line for line in said if " off: log-probability " in line]
    effects = [abs(float(line.split()[3])) for line in heads]
    assert len(heads) == 5
    assert effects == sorted(effects, reverse=True)
    assert effects[-1] > 1e-3
    assert len([line for line in said if re.fullmatch(r"latent \d+ without it: log-probability \S+", line)]) == 5
    moved = [line for line in said if line.startswith("half of MLP ")]
    assert len(moved) == 6
    assert all(abs(float(line.split()[-1])) > 1e-3 for line in moved)
    (restored,) = [line for line in said if line.startswith("most is restored")]
    assert re.search(r"\(.*\d+.*, .*\d+.*\)", restored)
