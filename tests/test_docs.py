"""The documents say what is so: the tree, the commands, the settings, the links."""

import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from dev import house, kernel_table, scripts_reference
from nanochat import configurator

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(path.name for path in sorted(ROOT.glob("*.md"))),
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
    "experiments/mxfp4/README.md",
]
PACKAGES = ("scripts.", "nanochat.", "dev.", "bench.", "experiments.")
# Commands of others, and those whose running would install or change something.
UNCHECKED = ("uv", "git", "cd", "tail", "watch", "cargo", "ruff", "pyright", "pytest", "cp")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", read(name), flags=re.M | re.S)


def documented_commands() -> list[str]:
    """Every command in a bash block, on one line, without its comment and `NAME=value` words."""
    commands = set()
    for name in DOCUMENTS:
        for block in fenced(name, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    commands.add(shlex.join(words))
    return sorted(commands)


def script_call(words: list[str]) -> tuple[str, list[str]] | None:
    """("scripts.base_train", its arguments), however the script is started."""
    for i, word in enumerate(words):
        if words[i - 1] == "-m" and word.startswith(PACKAGES):
            return word, words[i + 1 :]
        if match := re.fullmatch(r"((?:scripts|nanochat)/\w+)\.py", word):
            return match[1].replace("/", "."), words[i + 1 :]
    return None


@lru_cache
def help_text(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command", documented_commands())
def test_documented_command(command):
    words = shlex.split(command)
    called = script_call(words) if words[0] in ("python", "torchrun") else None
    if words[0] in UNCHECKED:
        return
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), f"{words[1]} does not exist"
        for word in words[2:]:
            assert not word.endswith(".py") or (ROOT / word).is_file(), f"{word} does not exist"
        return
    assert called, f"this test does not know how to check {command!r}"
    module, arguments = called
    assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{module} does not exist"
    if module.startswith("scripts."):
        settings = __import__(module, fromlist=["Settings"]).Settings
        configurator.load(settings, arguments)  # exits with 2 for a flag that does not exist
    elif module.startswith(("nanochat.", "bench.", "experiments.")):
        for word in arguments:
            if word.startswith("-"):
                flag = word.partition("=")[0]
                assert re.search(rf"(?<![\w-]){flag}\b", help_text(module)), (
                    f"{module} has no {flag}"
                )


def test_project_structure_is_fresh():
    text = read("docs/project_structure.md")
    assert text == house.with_tables(text), "run python -m dev.house --write"


def test_kernel_table_is_fresh():
    text = read("docs/kernels.md")
    assert text == kernel_table.with_table(text), "run python -m dev.kernel_table --write"


def test_scripts_reference_is_fresh():
    assert read("docs/scripts_reference.md") == scripts_reference.reference(), (
        "run python -m dev.scripts_reference --write"
    )


@pytest.mark.parametrize("module", scripts_reference.stage_modules(), ids=lambda m: m.__name__)
def test_every_setting_has_a_comment(module):
    assert scripts_reference.uncommented_fields(module) == []


@pytest.mark.parametrize(
    "path",
    ["config_dual_gpu.py", *(p.relative_to(ROOT).as_posix() for p in ROOT.glob("configs/**/*.py"))],
)
def test_shipped_config(path):
    from nanochat.scaling import accumulation_steps

    name = Path(path).stem
    # of a run's folder each file is for the script of its name; the others pretrain
    script = name if (ROOT / "scripts" / f"{name}.py").exists() else "base_train"
    settings = configurator.load(
        __import__(f"scripts.{script}", fromlist=["Settings"]).Settings, [path]
    )
    if script == "base_train":
        for world_size in (1, 2) if "dual_gpu" in path else (1,):
            sizes = settings.total_batch_size, settings.device_batch_size, settings.max_seq_len
            accumulation_steps(*sizes, world_size)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", read(name)):
        if "://" not in target:
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"
