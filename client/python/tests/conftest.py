import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import twilight_client as tw

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The daemon, built of this tree unless TWILIGHTD names one."""
    if "TWILIGHTD" in os.environ:
        return Path(os.environ["TWILIGHTD"])
    path = tmp_path_factory.mktemp("bin") / "twilightd"
    subprocess.run(
        ["go", "build", "-o", path, "./cmd/twilightd"],
        cwd=ROOT,
        env={**os.environ, "CGO_ENABLED": "0"},
        check=True,
    )
    return path


@pytest.fixture(scope="session")
def daemon(program: Path) -> Iterator[tw.Daemon]:
    """A daemon that all tests share that do not kill it."""
    with tw.Daemon("--log-level", "error", program=program) as d:
        yield d


@pytest.fixture
def client(daemon: tw.Daemon) -> Iterator[tw.Client]:
    with tw.dial(daemon.target) as c:
        yield c
