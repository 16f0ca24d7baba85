"""How a command ends that cannot continue: one line on stderr, and an exit code that says why.

    2  called wrongly: the line says what was given, what is allowed and what to do
    1  called rightly, but the run failed: the line says what happened, what is safe and what to do

Every script ends with

    if __name__ == "__main__":
        command.run(main)

`python -X dev -m scripts.base_train ...` shows the traceback too.
"""

import dis
import os
import signal
import sys
import time
import typing
from collections.abc import Callable
from pathlib import Path

SOURCES = Path(__file__).resolve().parent.parent
USAGE = 2  # exit code of a command that was called wrongly
FAILED = 1  # of one that began and could not continue
OTHER_RANKS_WAIT = 5.0  # seconds; torchrun ends them sooner if rank 0 left for the same reason


class RunFailedError(Exception):
    """A run that was started rightly cannot continue: diverged, out of memory, a rank lost."""


def run(main: Callable[[], object]) -> None:
    """Run the main() of a command; a mistake of the user ends it with one line and status 2.

    Such a mistake is what this project's own code raises as ValueError, and every OSError (no such
    file, no permission, no space, no network). A RunFailedError ends it with one line and status 1.
    Any other exception, a ValueError of a library included, is a fault of ours and keeps its
    traceback.
    """
    try:
        main()
    except RunFailedError as error:
        if sys.flags.dev_mode:
            raise
        leave(" ".join(str(error).split()), FAILED)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode or not (isinstance(error, OSError) or raised_here(error)):
            raise
        usage_error(" ".join(str(error).split()), see_help=False)


def raised_here(error: BaseException) -> bool:
    """Whether a `raise` in this repository, not one in a library, made the error."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    assert last is not None
    code = last.tb_frame.f_code
    path = Path(code.co_filename).resolve()
    if not path.is_relative_to(SOURCES):
        return False
    folders = path.relative_to(SOURCES).parts
    if any(name == "site-packages" or name.startswith(".") for name in folders):
        return False
    return code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def usage_error(message: str, see_help: bool = True) -> typing.NoReturn:
    """Print one line on stderr and leave with status 2."""
    leave(message + " (see --help)" * see_help, USAGE)


def leave(message: str, status: int) -> typing.NoReturn:
    """Print one line on stderr and leave.

    Of several ranks only the first speaks: what all ranks know is said once. The others wait to be
    ended; one that is not has met something of its own, and says it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(OTHER_RANKS_WAIT)
    place = f"rank {rank}: " if rank else ""
    print(f"error: {place}{message}", file=sys.stderr, flush=True)
    sys.exit(status)
