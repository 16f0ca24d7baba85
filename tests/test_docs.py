"""The documents are true: their commands, paths, links, tables and settings. Each check lists every
offender."""

import contextlib
import doctest
import importlib
import io
import re
import shlex
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import pytest

from dev import scripts_reference
from nanochat import configurator, scaling
from nanochat.kernels.registry import operations
from tests.support.runs import ROOT, run_here

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", ".github/**/*.md", "experiments/*/README.md")
    for path in ROOT.glob(pattern)
)
RECORDS = ("CHANGELOG.md", "docs/log.md")  # these name what was there at their date
OURS = ("scripts.", "nanochat.", "dev.", "bench.", "experiments.", "tests.")
FOLDERS = "nanochat|scripts|tasks|bench|experiments|dev|tests|docs|configs|rustbpe"
# Programs of others, whose flags are not ours to check; the files they are given are.
OTHERS = ("git", "cd", "tail", "watch", "cargo", "ruff", "pyright", "pytest", "cp", "playwright",
          "pre-commit", "source", "export")  # fmt: skip


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def commands(name: str) -> list[str]:
    """Commands of a document's bash blocks and, but for records, of its inline code; one line
    each, without comments and leading `NAME=value` words."""
    text = read(name)
    lines = [
        line for block in fenced(text, "bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    if name not in RECORDS:
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        lines += re.findall(r"`((?:python|torchrun|bash|uv|pytest) [^`]+)`", prose)
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words:
            found.append(shlex.join(words))
    return found


def module_call(words: list[str]) -> tuple[str, list[str]] | None:
    """("scripts.base_train", its arguments), however the module is started."""
    for i, word in enumerate(words):
        if words[i - 1] == "-m" and word.startswith(OURS):
            return word, words[i + 1 :]
        if match := re.fullmatch(r"((?:scripts|nanochat)/\w+)\.py", word):
            return match[1].replace("/", "."), words[i + 1 :]
    return None


@lru_cache
def help_text(module: str) -> str:
    return run_here(ROOT / "build", f"python -m {module} --help")


def problem_of(command: str) -> str:
    """Why a command of a document cannot be meant as it stands, or the empty string."""
    program, *words = shlex.split(command)
    if program == "uv":
        return uv_problem(words)
    if program in ("bash", "pytest", "cp", "source"):
        given = words[:1] if program == "cp" else words
        paths = [
            w.partition("::")[0] for w in given if re.match(rf"({FOLDERS}|\.venv)/|.*\.sh$", w)
        ]
        missing = [p for p in paths if not (ROOT / p).exists() and "results/" not in p]
        return f"{missing[0]} does not exist" if missing else ""
    if program in OTHERS:
        return ""
    called = module_call([program, *words]) if program in ("python", "torchrun") else None
    if called is None:
        return "this test does not know how to check it"
    module, arguments = called
    if not (ROOT / (module.replace(".", "/") + ".py")).is_file():
        return f"{module} does not exist"
    if module.startswith("scripts."):
        return settings_problem(module, arguments)
    for word in arguments:
        flag = word.partition("=")[0]
        if flag.startswith("-") and not re.search(rf"(?<![\w-]){flag}\b", help_text(module)):
            return f"{module} has no {flag}"
    return ""


def uv_problem(words: list[str]) -> str:
    _, _, table = read("pyproject.toml").partition("[project.optional-dependencies]\n")
    extras = re.findall(r"^([\w-]+) = ", table.partition("\n[")[0], flags=re.M)
    named = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--extra"]
    unknown = [name for name in named if name not in extras]
    return f"pyproject.toml has no extra {unknown[0]}" if unknown else ""


def settings_problem(module: str, arguments: list[str]) -> str:
    """What a script says against its arguments, short of running it."""
    said = io.StringIO()
    settings = __import__(module, fromlist=["Settings"]).Settings
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            loaded = configurator.load(settings, arguments)
            if module == "scripts.base_train":
                for processes in (1, 2) if any("dual_gpu" in word for word in arguments) else (1,):
                    batch = max(1, loaded.device_batch_size)  # auto is chosen when it runs
                    sizes = loaded.total_batch_size, batch, loaded.max_seq_len
                    scaling.accumulation_steps(*sizes, processes)
    except (SystemExit, ValueError, OSError) as error:
        return f"{error} {said.getvalue()}"
    return ""


def test_documented_commands() -> None:
    known = {command: name for name in DOCUMENTS for command in commands(name)}
    assert len(known) > 60, "the commands are not found any more"
    offenders = [f"{name}: {c!r}: {why}" for c, name in known.items() if (why := problem_of(c))]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("python -m scripts.base_train --dpeth=4", "dpeth"),
        ("torchrun --nproc_per_node=2 scripts/base_train.py configs/none.py", "configs/none.py"),
        ("python -m scripts.base_train --depth=4 --total_batch_size=1000", "not a multiple"),
        ("python -m scripts.nothing", "does not exist"),
        ("python -m nanochat.dataset --nothing", "has no --nothing"),
        ("python -m dev.house --nothing", "has no --nothing"),
        ("python train.py", "does not know"),
        ("bash dev/nothing.sh", "does not exist"),
        ("pytest tests/test_nothing.py", "does not exist"),
        ("uv sync --extra nothing", "no extra"),
        ("make all", "does not know"),
    ],
)
def test_a_wrong_command_is_seen(command: str, part: str) -> None:
    assert part in problem_of(command)


def test_shipped_configs() -> None:
    offenders = []
    for path in ["config_dual_gpu.py", *ROOT.glob("configs/**/*.py")]:
        name = (ROOT / path).relative_to(ROOT).as_posix()
        # in the folder of a whole run each file is for the script of its name; the others pretrain
        stem = Path(name).stem
        script = stem if (ROOT / "scripts" / f"{stem}.py").exists() else "base_train"
        if why := settings_problem(f"scripts.{script}", [name]):
            offenders.append(f"{name}: {why}")
    assert not offenders, "\n".join(offenders)


def targets(name: str) -> Iterable[str]:
    """Files of the repository that a document links to, shows, or names in `code`."""
    text = read(name)
    here = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if "://" not in target:
            yield (here / target).resolve().relative_to(ROOT).as_posix()
    if name not in RECORDS:
        found = re.findall(rf"`((?:{FOLDERS})/[\w./-]*\.(?:py|sh|md|json|toml|rs|html))`", text)
        # NAME stands for any name, and the file of the walk through a kernel is the reader's
        yield from (f for f in found if "NAME" not in f and f != "nanochat/kernels/squared_relu.py")


def test_linked_and_named_files_exist() -> None:
    offenders = [
        f"{name} names {target}"
        for name in DOCUMENTS
        for target in targets(name)
        if not (ROOT / target).exists()
    ]
    assert not offenders, "\n".join(offenders)


def test_every_page_can_be_found_from_the_front_page() -> None:
    reached, left = {"README.zh-CN.md"}, ["README.md"]
    while left:
        name = left.pop()
        if name not in reached and name.endswith(".md"):
            reached.add(name)
            left += targets(name)
    unreached = {n for n in DOCUMENTS if n.startswith("docs/")} - reached
    assert not unreached, f"no link leads to {sorted(unreached)}"


def shape(name: str) -> dict[str, list]:
    """What a translation keeps: headings, code, tables, links, pictures."""
    text = read(name)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    rows = re.findall(r"^\|.*\|$", prose, flags=re.M)
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, flags=re.M)],
        # comments are translated
        "code": [(kind, re.sub(r" +# .*", "", body)) for kind, body in blocks],
        "columns of tables": [row.count("|") for row in rows],
        "code in tables": [sorted(re.findall(r"`[^`]+`", row)) for row in rows],
        "numbers in tables": [sorted(re.findall(r"\d[\d.,]*", row)) for row in rows],
        "links": [t for t in re.findall(r"\]\(([^)]+)\)", prose) if not t.startswith("README")],
    }


def test_the_chinese_readme_has_the_same_parts() -> None:
    english, chinese = shape("README.md"), shape("README.zh-CN.md")
    for part in english:
        assert chinese[part] == english[part], f"README.zh-CN.md differs in its {part}"


def test_generated_parts_are_fresh() -> None:
    modules = [importlib.import_module(f"dev.{path.stem}") for path in (ROOT / "dev").glob("*.py")]
    parts = [part for module in modules for part in getattr(module, "PARTS", ())]
    assert len(parts) >= 5, "the generated parts are not found any more"
    offenders = []
    for part in parts:
        text = part.document.read_text(encoding="utf-8")
        if text != part.renewed(text):
            offenders.append(f"{part.document.name}: run python -m {part.command} --write")
    assert not offenders, "\n".join(offenders)


def test_python_sessions_print_what_they_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with `>>>`: those of a document run one after the other in one namespace."""
    monkeypatch.chdir(ROOT)
    offenders = []
    for name in DOCUMENTS:
        session = "\n".join(block for block in fenced(read(name), "python") if ">>>" in block)
        said: list[str] = []
        test = doctest.DocTestParser().get_doctest(session, {}, name, name, 0)
        if doctest.DocTestRunner().run(test, out=said.append).failed:
            offenders.append("".join(said))
    assert not offenders, "\n".join(offenders)


def test_every_setting_has_a_comment() -> None:
    offenders = [
        f"{module.__name__}: {field}"
        for module in scripts_reference.stage_modules()
        for field in scripts_reference.uncommented_fields(module)
    ]
    assert not offenders, "\n".join(offenders)


def test_the_kernel_table_of_the_front_page_is_complete() -> None:
    rows = [re.findall(r"`(\w+)`", line) for line in read("README.md").splitlines() if "|" in line]
    assert len(operations()) > 5
    offenders = []
    for op in operations().values():
        row = next((row for row in rows if op.name in row), [])
        wanted = {op.name, *op.implementations} - {"reference"}
        offenders += [f"README.md lacks {name} of {op.name}" for name in sorted(wanted - {*row})]
    assert not offenders, "\n".join(offenders)


def test_tests_that_documents_name_are_there() -> None:
    named = {
        (name, *found)
        for name in DOCUMENTS
        for found in re.findall(r"`((?:tests|experiments)/[\w/]+\.py)::(\w+)`", read(name))
    }
    assert len(named) > 40, "they are not found any more"
    missing = [
        f"{name}: {path}::{test}"
        for name, path, test in sorted(named)
        if not (ROOT / path).is_file() or not re.search(rf"(?:def|class) {test}\b", read(path))
    ]
    assert not missing, "\n".join(missing)
