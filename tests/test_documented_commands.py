"""The command blocks of README.md and docs/*.md are run as they stand, with smaller counts added.

Those of docs/python.md in test_python_page.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.commands import COMMANDS

ROOT = Path(__file__).parents[1]
NOT_RUN = {"network", "gpu", "long"}
SMALL = {
    "extract": ["corpus.max_tokens=20000", "extract.calibration_tokens=1024"],
    "train": ["sae.num_latents=512", "trainer.tokens=90000", "trainer.dead_after_tokens=10000"],
    "evaluate": ["evaluate.tokens=4000", "evaluate.splice_tokens=1024"],
    "drift": ["drift.tokens=500", "drift.splice_tokens=200", "drift.types=[F32,Q4_0]"],
    "apply": ["apply.max_tokens=8"],
    "report": ["report.tokens=4000", "report.top_latents=8"],
}
SMALL_STREAM = ["corpus.max_tokens=12000", "trainer.tokens=24000", "extract.calibration_tokens=1024"]


BLOCKER = """
import sys
package = "torch" if "pipeline.stream.child" in sys.orig_argv else {package!r}
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == package:
            raise ImportError(name + " is blocked by the test")
sys.meta_path.insert(0, Blocked())
"""


def environment(folder: Path, command: str) -> dict[str, str]:
    """torch cannot be imported except by train, and llama_cpp cannot by train: never both in one process.

    The process that captures for `train trainer.source=stream` gets the same environment; there it is torch that cannot.
    """
    package = "llama_cpp" if command == "train" else "torch"
    path = folder / f"without_{package}"
    path.mkdir(exist_ok=True)
    (path / "sitecustomize.py").write_text(BLOCKER.format(package=package))
    paths = [str(path), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"COLUMNS": "200", "PYTHONPATH": os.pathsep.join(paths)}


def blocks(path: Path) -> list[list[str]]:
    """The command lines of every ```sh block that is not marked as not run here."""
    found = []
    for marks, body in re.findall(r"^```sh *([a-z ]*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
        if not set(marks.split()) & NOT_RUN:
            lines = body.replace("\\\n", " ").splitlines()
            found.append([line for line in lines if line.strip() and not line.startswith(("#", "source "))])
    return found


def small(command: str, args: list[str]) -> list[str]:
    return SMALL.get(command, []) + SMALL_STREAM * ("trainer.source=stream" in args)


def run_line(line: str, folder: Path, *more: str) -> None:
    """Run one command line of a document in `folder`; it must end with its three lines."""
    program, command, *args = shlex.split(line, comments=True)
    assert program == "ggscope"
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", command, *args, *small(command, args), *more],
        cwd=folder, capture_output=True, text=True, timeout=300, env=environment(folder, command),
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    ends = [text for text in done.stdout.splitlines() if text.startswith(f"{command} ")]
    assert [text.split()[1] for text in ends[-3:]] == ["input", "result", "output"], done.stdout


def test_the_readme_s_stages_run_one_after_the_other_and_only_train_needs_torch(tmp_path):
    lines = [line for block in blocks(ROOT / "README.md") for line in block]
    assert {shlex.split(line)[1] for line in lines} >= set(COMMANDS) - {"run", "doctor", "completion"}
    for line in lines:
        run_line(line, tmp_path)
    manifests = sorted(path.parts[-3] for path in tmp_path.glob("runs/*/*/manifest.json"))
    assert set(manifests) >= {name for name, one in COMMANDS.items() if one.keeps_run} - {"run", "doctor", "completion"}


DOCS = {path.name: blocks(path) for path in sorted((ROOT / "docs").glob("*.md")) if path.name != "python.md"}


@pytest.mark.parametrize("name", [name for name, found in DOCS.items() if found])
def test_the_commands_of_the_docs_run(name, tmp_path):
    for line in (line for block in DOCS[name] for line in block):
        run_line(line, tmp_path, "corpus.max_tokens=6000", "store.shard_rows=2048")


def test_some_page_of_the_docs_has_a_command():
    assert DOCS["scaling.md"]


def unquoted(line: str) -> str:
    """The line without what stands in quotes."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", "", line)


def test_commands_are_quoted_where_a_shell_would_look_for_files():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "conf").rglob("*.yaml")]
    lines = [line for path in pages for line in path.read_text(encoding="utf-8").splitlines()]
    shown = [line for page in pages if page.suffix == ".md" for body in
             re.findall(r"^```sh[^\n]*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
             for line in body.splitlines()]  # fmt: skip
    shown += [command for line in lines for command in re.findall(r"`(ggscope [^`]* [a-z.]+=[^`]*)`", line)]
    shown += [line for line in lines if line.startswith("# ") and re.search(r" corpus=\w+ ", line)]
    shown += [example for command in COMMANDS.values() for example in command.examples]
    assert len(shown) > 60
    assert [line for line in shown if re.search(r"[\[\]*?]", unquoted(line))] == []


def test_help_s_examples_use_settings_that_exist():
    from pipeline.cli import checked_overrides, flat_defaults, take_texts, take_words

    for name, command in COMMANDS.items():
        for example in command.examples:
            words = shlex.split(example.split("|")[-1].split(">>")[0])
            assert words[:2] == ["ggscope", name]
            if not command.groups:
                continue
            rest = [word for word in take_words(name, words[2:])[2] if word != "-"]
            known = flat_defaults(name)
            for override in checked_overrides(name, take_texts(name, rest)[1]):
                key = override.split("=")[0]
                assert (
                    override == "-m" or key in known or (ROOT / "conf" / key).is_dir() or key in ("resume", "run_dir")
                ), key


def test_the_readme_and_the_help_list_the_same_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"ggscope {name}" in text or f"`{name}`" in text or f"/ `{name}`" in text, name
