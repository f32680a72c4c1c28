"""Completion as bash calls it: words broken at = and :, and what a Tab leaves on the line of an interactive bash."""

from __future__ import annotations

import functools
import os
import pty
import re
import shlex
import shutil
import subprocess

import pytest

from pipeline.cli import main
from pipeline.commands import COMMANDS
from pipeline.stages.completion import script

SCRIPT = functools.cache(script)
BASH = shutil.which("bash") or pytest.skip("no bash", allow_module_level=True)


@pytest.fixture
def folder(tmp_path):
    for name in ("my.gguf", "notes.md", "a b.gguf"):
        (tmp_path / name).touch()
    (tmp_path / "runs").mkdir()
    return tmp_path


def offered(line: str, cwd, breaks: str = "\"'@><=;|&(:") -> list[str]:
    """What the function answers at the end of `line`, which bash breaks into words itself."""
    words = re.findall(r"[=:]+|'[^']*'?|[^\s=:]+" if "=" in breaks else r"\S+", line)
    if line.endswith(" "):
        words.append("")
    call = (
        f"COMP_WORDBREAKS={shlex.quote(breaks)}; COMP_LINE={shlex.quote(line)}; COMP_POINT={len(line)}\n"
        f"COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; compopt() {{ :; }}; _ggscope\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run([BASH, "-c", SCRIPT("bash") + call], cwd=cwd, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line for line in done.stdout.split("\n") if line]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ggscope st", ["store"]),
        ("ggscope store v", ["verify"]),
        ("ggscope store info store.shard", ["store.shard_rows="]),
        ("ggscope convert ver", ["verify"]),
        ("ggscope convert convert.encoder_t", ["convert.encoder_type="]),
        ("ggscope completion ", ["bash", "zsh", "fish"]),
        ("ggscope train sae.n", ["sae.num_latents="]),
        ("ggscope apply model.path=m", ["my.gguf"]),
        ("ggscope apply model.n_threads=1 model.path=", ["a b.gguf", "my.gguf", "notes.md", "runs"]),
        ("ggscope apply model.flash_attn=", ["auto", "on", "off"]),
        ("ggscope apply intervention=st", ["steer"]),
        ("ggscope apply intervention.kind=c", ["clamp"]),
        ("ggscope apply intervention.coeff", ["intervention.coeff=", "intervention.coeffs="]),
        ("ggscope apply apply.chat=t", ["true"]),
        ("ggscope apply format=", ["text", "jsonl"]),
        ("ggscope lens format=", ["text", "json"]),
        ("ggscope apply --pro", ["--prompt", "--prompt-file"]),
        ("ggscope apply --prompt m", []),
        ("ggscope apply --prompt-file no", ["notes.md"]),
        ("ggscope train sae.k=", []),
        ("ggscope train -m sae.variant=topk,batch", ["topk,batchtopk"]),
        ("ggscope extract corpus=js", ["jsonl"]),
        ("ggscope extract corpus.paths=[no", ["[notes.md"]),
        ("ggscope extract 'corpus.paths=[no", ["corpus.paths=[notes.md"]),
        ("ggscope run logger=w", ["wandb"]),
        ("ggscope run executor=", ["local", "pool", "ray", "submitit"]),
        ("ggscope run experiment=d", ["demo_cpu"]),
        ("ggscope run resume=", ["latest", "a b.gguf", "my.gguf", "notes.md", "runs"]),
        ("ggscope run run_dir=r", ["runs"]),
        ("ggscope inspect model.pa", ["model.path="]),
        ("ggscope inspect my", ["my.gguf"]),
    ],
)
def test_what_is_offered(line, expected, folder):
    assert sorted(offered(line, folder)) == sorted(expected)


def test_a_shell_that_breaks_no_words_gets_whole_ones(folder):
    assert offered("ggscope apply model.path=m", folder, breaks=" ") == ["model.path=my.gguf"]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("ggscope apply model.path=m", "ggscope apply model.path=my.gguf "),
        ("ggscope apply intervention=st", "ggscope apply intervention=steer "),
        ("ggscope train sae.num", "ggscope train sae.num_latents="),
        ("ggscope run run_dir=ru", "ggscope run run_dir=runs/"),
        ("ggscope inspect a", r"ggscope inspect a\ b.gguf "),
        ("ggscope extract 'corpus.paths=[no", "ggscope extract 'corpus.paths=[notes.md'"),
    ],
)
def test_a_tab_leaves_what_was_typed_and_completes_it(typed, line, folder):
    """Readline itself: a bound key prints the line that the Tab left."""
    (folder / "rc").write_text(
        SCRIPT("bash") + "show() { printf '<%s>\\n' \"$READLINE_LINE\"; exit; }\nbind -x '\"\\C-g\": show'\n"
    )
    command = [BASH, "--noprofile", "--rcfile", str(folder / "rc"), "-i"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.execve(BASH, command, os.environ | {"TERM": "dumb", "PS1": "", "HISTFILE": "", "INPUTRC": "/dev/null"})
    os.write(terminal, f"{typed}\t\a".encode())
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:  # how Linux says that the other side is closed
        pass
    os.close(terminal)
    os.waitpid(pid, 0)
    assert f"<{line}>" in said.decode()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_scripts_of_other_shells_know_verbs_choices_and_shells(shell):
    text = script(shell)
    for words in ("info verify merge compact", "bash zsh fish", "model.flash_attn="):
        assert words in text
    assert all(name in text for name in COMMANDS)
    if shell == "fish":
        assert "corpus=jsonl" in text
    if path := shutil.which(shell):
        subprocess.run([path, "-n", "-c", text], check=True, timeout=20)


def test_the_command_prints_the_script(capsys):
    assert main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash")
