"""The paths of this repository, and functions that run programs as a user who has installed the package would."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"


def run(*command, cwd, env=None) -> str:
    """The output of a program that must succeed, without this process's PYTHONPATH."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean | (env or {}), capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(code: str, cwd, env=None, interpreter=sys.executable) -> str:
    return run(interpreter, "-c", code, cwd=cwd, env=env)
