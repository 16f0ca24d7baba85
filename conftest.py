"""Options and fixtures shared by the tests of the product and of the experiments."""

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--chromium", help="debugging address of a running Chromium")
    parser.addoption("--real-data", type=Path, help="folder with base_data/ of real text shards")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # A worker of dev/test.sh takes the next whole file. The files with long tests come first, so
    # that no worker begins one of them when the others are about to finish. sort() is stable.
    long_files = {item.path for item in items if "long" in item.keywords}
    items.sort(key=lambda item: item.path not in long_files)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes many minutes: run with --slow"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture
def real_data(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("needs real text: run with --real-data DIR")
    return folder


@pytest.fixture(autouse=True)
def base_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a base directory of its own."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder
