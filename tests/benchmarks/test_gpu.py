"""The benchmark of GPUs, at tiny sizes on a CPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def test_every_path_is_correct_and_a_table_says_what_was_measured(
    gpu, monkeypatch, capsys, tmp_path: Path
) -> None:
    output = tmp_path / "gpu.json"
    arguments = ["--tiny", "--models", "llama-4", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert json.loads(output.read_text()) == found
    assert found["machine"]["card"] == "CPU, tiny sizes"
    one = found["models"]["llama-4"]
    assert set(one["accuracy"]) == set(one["over_forward"]) == set(gpu.PATHS)
    assert one["peft"]["peft_batches"] > 0
