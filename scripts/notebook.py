"""Run the notebooks of docs/notebooks from top to bottom and keep what they show, but for paths.

python scripts/notebook.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from evatune.loading.assets import asset

_FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
_SECONDS = 180  # for a whole notebook on a CPU


def main() -> None:
    for path in sorted(_FOLDER.glob("*.ipynb")):
        begun = time.monotonic()
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as work:
            client = NotebookClient(
                notebook, timeout=_SECONDS, resources={"metadata": {"path": work}}
            )
            client.execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which differ from run to run
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if _is_shown(output)]
        text = nbformat.writes(notebook).replace(f"{asset('llama-small').parent}/", "")
        path.write_text(text + "\n")
        print(f"{path.name}: {time.monotonic() - begun:.0f} s")


def _is_shown(output: nbformat.NotebookNode) -> bool:
    """Return whether an output is the notebook's own, and no library's word about its versions."""
    if output.output_type != "stream":
        return True
    return output.name == "stdout" and "get_accelerator" not in output.text  # of DeepSpeed


if __name__ == "__main__":
    main()
