"""Options, the session every measurement shares, and the tables at the end of a run."""

from pathlib import Path

import pytest
import torch

from bench.report import markdown
from bench.rows import RESULTS, auto_losses
from bench.session import SMALL, Session
from nanochat.common import get_base_dir, setup_training
from nanochat.kernels.registry import operations
from nanochat.kernels.workloads import WORKLOADS
from nanochat.settings import near_miss

SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nanochat bench")
    group.addoption("--ops", default="", help="operations to measure, comma-separated; all")
    group.addoption("--workloads", default="", help="sizes: d12,d20,d32; small without a GPU")
    group.addoption("--seconds", type=float, help="of timing for each operation at each size")
    group.addoption("--out", type=Path, help="folder of the rows; bench/results/<gpu> on a GPU")
    group.addoption("--commit", default="", help="commit of this code, where there is no git")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    for flag, known in (("--ops", operations()), ("--workloads", (*WORKLOADS, SMALL))):
        for name in filter(None, config.getoption(flag).split(",")):
            if name not in known:
                raise pytest.UsageError(f"{flag}: {name!r} is unknown{near_miss(name, known)}")
    # a peer's warning is no reason to stop measuring
    for line in ("default", "ignore::DeprecationWarning"):
        config.addinivalue_line("filterwarnings", line)
    if not config.getoption("benchmark_columns", None):
        config.option.benchmark_columns = ["median", "iqr", "rounds"]


@pytest.fixture
def base_dir() -> Path:
    """The user's own base directory, where the tests have one each."""
    return get_base_dir()


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Session:
    """The run: on a GPU if there is one."""
    on_gpu = torch.cuda.is_available()
    runtime = setup_training("cuda" if on_gpu else "cpu")
    out = request.config.getoption("--out")
    if out is None and on_gpu:
        out = RESULTS / torch.cuda.get_device_name(runtime.device).replace(" ", "-").lower()
    seconds = request.config.getoption("--seconds") or (1.5 if on_gpu else 0.2)
    session = Session(runtime, seconds, out, request.config.getoption("--commit"))
    request.config.stash[SESSION] = session
    return session


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    session = config.stash.get(SESSION, None)
    if session is None or not session.rows:
        return
    terminalreporter.write_sep("=", "nanochat bench")
    terminalreporter.write_line(markdown(session.rows))
    for line in auto_losses(session.rows):
        terminalreporter.write_line(f"AUTO IS NOT THE FASTEST: {line}")
    if session.out is not None:
        terminalreporter.write_line(f"rows in {session.out}; plots: python -m bench.report")
