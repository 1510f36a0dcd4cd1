"""NVIDIA's Multi-Process Service, by which an engine and the daemon's workers run on a GPU at once, not in turns.

    python -m benchmark.efficiency.mps COMMAND...

runs a command under a server of its own, or plainly where MPS is not installed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

CONTROL = "nvidia-cuda-mps-control"


def there() -> bool:
    """Tells whether it is installed."""
    return shutil.which(CONTROL) is not None


def under() -> bool:
    """Tells whether this process will find a server."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()  # noqa: S108 - MPS's own


@contextlib.contextmanager
def mps() -> Iterator[dict[str, str]]:
    """The environment of an MPS server of its own, or the plain one where it is not installed.

    Processes of that environment must have ended at the end: the server waits for them.
    """
    if not there():
        yield dict(os.environ)
        return
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        subprocess.run([CONTROL, "-d"], env=env, check=True)
        try:
            yield env
        finally:
            subprocess.run([CONTROL], input=b"quit\n", env=env, check=True, stdout=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    with mps() as env:
        status = subprocess.run(sys.argv[1:], env=env, check=False).returncode
    sys.exit(status)
