"""The examples run, and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_finetuning_wins_back_accuracy() -> None:
    pytest.importorskip("torch")
    script = Path(__file__).parents[1] / "examples" / "finetune.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    trained, decoupled, tuned = (float(share) for share in re.findall(r"([\d.]+)%", printed))
    assert trained > decoupled > 40
    assert tuned > decoupled
