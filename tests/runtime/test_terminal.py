"""What a terminal shows of ``sd-run``: a bar that moves, and words on lines of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import TinyModel

MAIN = "import sys; from sd_runtime.cli import main; sys.exit(main())"
FAST = ["--num-inference-steps", "2", "--threads", "1", "--seed", "0"]


def shown_lines(*arguments: str) -> list[str]:
    """The lines that a terminal ends up with: what follows a line's last wiping."""
    terminal, side = os.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as reader:
        command = [sys.executable, "-c", MAIN, *arguments]
        process = subprocess.Popen(command, stdin=side, stdout=side, stderr=side)
        os.close(side)
        written = b""
        try:
            while block := reader.read(4096):
                written += block
        except OSError:  # Linux's word for a terminal that nobody holds any more
            pass
        assert process.wait(timeout=60) == 0, written
    lines = written.decode().split("\n")
    return [line.rpartition("\x1b[K")[2].strip("\r") for line in lines]


@pytest.mark.parametrize("jobs", [False, True])
def test_words_do_not_share_a_line_with_the_bar(
    tiny_model: TinyModel, tmp_path: Path, *, jobs: bool
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{'a cat ' * 100}\na dog\n")  # the first is cut, which is said
    output = tmp_path / "pictures"
    source = ["--jobs", str(prompts)] if jobs else ["--prompts-file", str(prompts)]
    if not jobs:
        output.mkdir()
        output /= "{index}.png"
    lines = shown_lines(str(tiny_model.bundle), *source, "--output", str(output), *FAST)
    files = sorted(str(path) for path in (tmp_path / "pictures").iterdir())
    assert [line for line in lines if line in files] == files
    assert any(line.startswith("WARNING: ") for line in lines)
    assert any(re.search(r"\]\s+(\d+)/\1\b", line) for line in lines), "the bar ends full"
