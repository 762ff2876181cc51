"""`atelier export-model`: a run's model as a folder of files, for use without Atelier."""

import json
from pathlib import Path

from dashboards.outputs import check_overwritable
from search.errors import InputError
from search.model_card import model_card, read_facts
from search.predict import reader_notes, source_of
from search.run_folder import model_path
from trainer.files import write_atomically
from trainer.portable import PortableModel

ONNX = "model.onnx"
FILES = ("model.safetensors", "config.json", "README.md", ONNX)


class ModelFolder:
    """The files of a run's model, before they are written to a folder.

    Raises InputError, ModelError, OutputError and OSError.
    """

    def __init__(self, run: Path, folder: Path, onnx: bool) -> None:
        path = model_path(run)
        model = PortableModel(path)
        self._folder, source = folder, source_of(model.saved)
        _check_folder(folder, source)
        self.notes = reader_notes(model.saved)
        facts = read_facts(path, model.saved.description.facts)
        config = model.config() | {"source": source}
        self.files = {
            "model.safetensors": model.weights(source),
            "config.json": json.dumps(config, indent=2).encode() + b"\n",
        }
        if onnx:
            self.files[ONNX] = model.onnx(source)
        card = model_card(model.saved, facts, config, path.stem == "best", list(self.files))
        self.files["README.md"] = card.encode()

    def write(self) -> None:
        """Write the files, in place of those of an earlier export. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            write_atomically(self._folder / name, data)
        for name in FILES:
            if name not in self.files:  # of another epoch, maybe
                (self._folder / name).unlink(missing_ok=True)


def _check_folder(folder: Path, source: str) -> None:
    """Check that the folder is new, empty or of this run. Raises InputError, OutputError, OSError."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder}: is a file; give a folder")
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        if path.name not in FILES or not path.is_file():
            raise InputError(
                f"--output {folder}: has {path.name}, which is not of an exported model; give another "
                "folder"
            )
        check_overwritable(path, source, "an export of this run")
