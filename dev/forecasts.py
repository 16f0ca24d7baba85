"""The forecasts that docs/plan.md and the configs for two GPUs carry, each below its command.

python -m dev.forecasts            names the files whose forecasts are not the planner's
python -m dev.forecasts --write    renews them
"""

import argparse
import importlib
import re
import shlex
from pathlib import Path

from nanochat import configurator

ROOT = Path(__file__).resolve().parent.parent
FILES = ("docs/plan.md", "config_dual_gpu.py", "configs/dual_gpu/*.py")
# the command, perhaps on several lines, and the line that it prints
CARRIED = re.compile(r"(python -m scripts\.plan (?:.*\\\n)*.*)\nforecast: .*")


def forecast(command: str) -> str:
    """The line of a command of scripts.plan."""
    script = importlib.import_module("scripts.plan")
    words = shlex.split(command.replace("\\\n", " "))[3:]
    settings = configurator.load(script.Settings, words)
    return script.summary(settings, script.plan_on(settings, script.find_gpu(settings.gpu)))


def renewed(text: str) -> str:
    """The text with every forecast as the planner gives it now."""
    return CARRIED.sub(lambda found: f"{found[1]}\n{forecast(found[1])}", text)


def carriers() -> list[Path]:
    """The files that carry forecasts."""
    return sorted(path for pattern in FILES for path in ROOT.glob(pattern))


def main() -> None:
    parser = argparse.ArgumentParser(prog="dev.forecasts", description="Forecasts in documents.")
    parser.add_argument("--write", action="store_true", help="renew them")
    write = parser.parse_args().write
    for path in carriers():
        text = path.read_text(encoding="utf-8")
        if text != renewed(text):
            print(path.relative_to(ROOT))
            if write:
                path.write_text(renewed(text), encoding="utf-8")


if __name__ == "__main__":
    main()
