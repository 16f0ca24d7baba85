"""The stages of training, each registered once.

    python -m nanochat.stages    prints the table for shells

A stage leaves a model. Its row says everything by which others know it: folders of checkpoints,
headings and columns of the report, `--source` of the chat scripts, the order in dev/stages.sh. To
add a stage, add a row here and the script it names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nanochat.settings import require_known


@dataclass(frozen=True)
class Stage:
    """One stage.

    name         in checkpoints, records and folders
    source       what the chat scripts call it (--source)
    script       scripts/<script>.py; a run's config file has the same name
    title        its heading in the report
    chat_title   the heading of its model's evaluation on chat tasks
    parents      stages whose model it may start from, the usual one first
    parent_flag  the script's flag for that model's checkpoint
    evaluations  further scripts that score its model: script -> heading
    """

    name: str
    source: str
    script: str
    title: str
    chat_title: str
    parents: tuple[str, ...] = ()
    parent_flag: str = ""
    evaluations: tuple[tuple[str, str], ...] = ()

    @property
    def folder(self) -> str:
        """The folder of its checkpoints in the base directory."""
        return f"{self.name}_checkpoints"

    @property
    def chat_evaluation(self) -> str:
        """What its model's evaluation on chat tasks is called in records."""
        return f"chat_eval_{self.source}"

    @property
    def column(self) -> str:
        """The heading of its column in the report's summary."""
        return self.source.upper()


STAGES = [
    Stage(
        "base",
        source="base",
        script="base_train",
        title="Base training",
        chat_title="Chat evaluation of the base model",
        evaluations=(("base_loss", "Base loss"), ("base_eval", "Base evaluation")),
    ),
    Stage(
        "mid",
        source="mid",
        script="mid_train",
        title="Midtraining",
        chat_title="Chat evaluation after midtraining",
        parents=("base",),
        parent_flag="base_checkpoint",
    ),
    Stage(
        "chatsft",
        source="sft",
        script="chat_sft",
        title="Supervised finetuning",
        chat_title="Chat evaluation after supervised finetuning",
        parents=("mid", "base"),
        parent_flag="mid_checkpoint",
    ),
    Stage(
        "chatrl",
        source="rl",
        script="chat_rl",
        title="Reinforcement learning",
        chat_title="Chat evaluation after reinforcement learning",
        parents=("chatsft", "mid", "base"),
        parent_flag="sft_checkpoint",
    ),
]
# what comes before any model, in the report
TOKENIZER_TITLES = {
    "tok_train": "Tokenizer training",
    "tok_eval": "Tokenizer evaluation",
}
# what belongs to no stage, in the report
OTHER_TITLES = {"profile_train": "Profile of training steps"}


def names() -> list[str]:
    """Every stage, in the order of the pipeline."""
    return [stage.name for stage in STAGES]


def sources() -> list[str]:
    """What the chat scripts call the stages."""
    return [stage.source for stage in STAGES]


def parents_of(name: str) -> Callable[[], tuple[str, ...]]:
    """What gives the stages that `name` may start from; for the choices of a script's --source."""
    return lambda: get(name).parents


def get(name: str) -> Stage:
    """The stage called `name`. Raises ValueError for an unknown one."""
    require_known("stage", name, names())
    return STAGES[names().index(name)]


def of_checkpoint(source: str, checkpoint: str) -> Stage:
    """The stage that the path of `checkpoint` names, otherwise the one called `source`.

    Raises  ValueError for an unknown source.
    """
    folders = {stage.folder: stage for stage in STAGES}
    named = [folders[part] for part in Path(checkpoint).parts if part in folders]
    if named:
        return named[-1]
    require_known("source", source, sources())
    return STAGES[sources().index(source)]


def titles() -> dict[str, str]:
    """Name of a stage or evaluation in the records -> its heading, in the order of the pipeline."""
    found = dict(TOKENIZER_TITLES)
    for stage in STAGES:
        found[stage.name] = stage.title
        found |= dict(stage.evaluations)
        found[stage.chat_evaluation] = stage.chat_title
    return found


def title_of(name: str) -> str:
    """The heading of a name in the records, the name itself where it has none."""
    return (titles() | OTHER_TITLES).get(name, name)


def shell_rows() -> list[str]:
    """A line for each stage, "-" where there is nothing:

    name, script, folder, flag of the parent's checkpoint, "source" if the script has a --source
    that names the parent, chat evaluation, further evaluations between commas.
    """
    rows = []
    for stage in STAGES:
        scripts = ",".join(script for script, _ in stage.evaluations) or "-"
        choosable = "source" if len(stage.parents) > 1 else "-"
        words = (stage.name, stage.script, stage.folder, stage.parent_flag or "-", choosable)
        rows.append(" ".join((*words, stage.chat_evaluation, scripts)))
    return rows


if __name__ == "__main__":
    print("\n".join(shell_rows()))
