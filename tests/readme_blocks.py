"""Runs the commands of the README that show their output; `make readme` writes the outputs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BLOCK = re.compile(
    r"^```console\n\$ normtune ([^\n]+)\n((?!```|\$ ).*?)^```", re.MULTILINE | re.DOTALL
)


def output_of(command):
    """What the command prints, at the width that the README uses for it."""
    width = "80" if "--help" in command else "100"
    done = subprocess.run(
        [sys.executable, "-m", "normtune", *shlex.split(command)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": width, "NO_COLOR": "1"},
        check=True,
    )
    return done.stdout.rstrip() + "\n"


def refreshed(text):
    """The text with every shown output as it is now."""
    return BLOCK.sub(lambda m: f"```console\n$ normtune {m[1]}\n{output_of(m[1])}```", text)


if __name__ == "__main__":
    README.write_text(refreshed(README.read_text(encoding="utf-8")), encoding="utf-8")
