"""`atelier export-model`: a run's model as a folder of files, for use without Atelier."""

import json
from pathlib import Path

from dashboards.outputs import check_folder
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
        check_folder(folder, source, "an export of this run")
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
