"""How a command ends that was called wrongly: one line on stderr and exit code 2.

The line says what was given, what is allowed and what to do. Every script ends with

    if __name__ == "__main__":
        command.run(main)

`python -X dev -m scripts.base_train ...` shows the traceback of such a mistake too.
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
OTHER_RANKS_WAIT = 5.0  # seconds; torchrun ends them sooner if rank 0 left for the same reason


def run(main: Callable[[], object]) -> None:
    """Run the main() of a command; a mistake of the user ends it with one line and status 2.

    Such a mistake is what this project's own code raises as ValueError, and every OSError (no such
    file, no permission, no space, no network). Any other exception, a ValueError of a library
    included, is a fault of ours and keeps its traceback.
    """
    try:
        main()
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
    """Print one line on stderr and leave with status 2.

    Of several ranks only the first speaks: a mistake in the settings is everyone's. The others
    wait to be ended; one that is not has met something of its own, and says it.
    """
    rank = int(os.environ.get("RANK", "0"))
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(OTHER_RANKS_WAIT)
    place = f"rank {rank}: " if rank else ""
    print(f"error: {place}{message}" + " (see --help)" * see_help, file=sys.stderr, flush=True)
    sys.exit(USAGE)
