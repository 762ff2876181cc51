"""A trained network for programs without Atelier: under timm's own names, and in ONNX."""

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from trainer.model import HEAD, ModelError
from trainer.model_file import SavedModel
from trainer.stream import deterministic_transform

ONNX_PACKAGES = ("onnx", "onnxscript")  # which torch's exporter needs


class PortableModel:
    """A network from a file of `ModelFiles`. Raises ModelError."""

    def __init__(self, path: Path) -> None:
        self.saved = SavedModel(path, torch.device("cpu"))
        self._model: Any = self.saved.as_timm()

    def config(self) -> dict[str, Any]:
        """What a config.json of timm's says, with the head, the categories and the preprocessing.

        The preprocessing has torchvision's transforms by name, with their arguments, in their order.
        `logits` are a category's first output, and the one behind its last.
        """
        description, size = self.saved.description, self.saved.config.image_size
        given, outputs = self._model.pretrained_cfg, len(description.attributes)
        normal = {"mean": list(given["mean"]), "std": list(given["std"])}
        steps = deterministic_transform(size).transforms
        cuts = itertools.pairwise(itertools.accumulate(description.sizes, initial=0))
        architecture, _, tag = self.saved.config.backbone.partition(".")
        return {
            "architecture": architecture,
            "num_classes": outputs,
            "num_features": self._model.num_features,
            "label_names": description.attributes,
            "categories": [
                {"name": name, "logits": [start, end], "labels": description.attributes[start:end]}
                for name, (start, end) in zip(description.categories, cuts, strict=True)
            ],
            "head": [self._model.num_features, *HEAD, outputs],
            "preprocessing": [
                *([type(step).__name__, {"size": list(step.size)}] for step in steps),
                ["ToTensor", {}],
                ["Normalize", normal],
            ],
            "pretrained_cfg": {
                "tag": tag,
                "input_size": [3, size, size],
                "interpolation": steps[0].interpolation.value,
                **normal,
                "num_classes": outputs,
                "classifier": given["classifier"],
                "first_conv": given["first_conv"],
            },
        }

    def weights(self, source: str) -> bytes:
        """A .safetensors file of all tensors by timm's names. Its metadata names the source."""
        tensors = {name: one.contiguous() for name, one in self._model.state_dict().items()}
        return safetensors.torch.save(tensors, {"source": source})

    def onnx(self, source: str) -> bytes:
        """An ONNX file. Its metadata names the source.

        Input: `images`, prepared, uint8 [n, 3, size, size]. Output: `logits`, float [n, attributes].
        Raises ModelError if the packages that torch's exporter needs are absent.
        """
        if missing := [name for name in ONNX_PACKAGES if find_spec(name) is None]:
            raise ModelError(
                f"no package {' or '.join(missing)} is installed, and a model in ONNX needs "
                f"{' and '.join(ONNX_PACKAGES)}; get them with: pip install {' '.join(ONNX_PACKAGES)}"
            )
        given, size = self._model.pretrained_cfg, self.saved.config.image_size
        program = torch.onnx.export(
            nn.Sequential(_Normalise(given["mean"], given["std"]), self._model).eval(),
            (torch.zeros(2, 3, size, size, dtype=torch.uint8),),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # they tell paths of this machine
        program.model.metadata_props["source"] = source
        data: bytes = program.model_proto.SerializeToString()
        return data


class _Normalise(nn.Module):
    """Converts uint8 [n, 3, size, size] to float, as the backbone's weights expect it."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        scale = 255 * torch.tensor([mean, std]).view(2, 1, 3, 1, 1)
        self.register_buffer("mean", scale[0])
        self.register_buffer("std", scale[1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.std
