"""How a network runs on its device: memory layout, precision, compiled or not, and the images' scale."""

import copy
import logging
import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils import deterministic

from trainer.config import TrainConfig
from trainer.device import is_out_of_memory, pick_device
from trainer.model import Backbone, fold_batchnorm, load_backbone
from trainer.stream import BLOCK
from trainer.torch_file import said

log = logging.getLogger(__name__)

# On a CPU the trunk takes so many pixels at once, so that the large output of its first layers stays in
# the cache.
CACHED_PIXELS = 1 << 20


class Runtime:
    """Runs trunks and tails of one configuration, in training and in prediction.

    Raises ModelError. Without a given device it also raises the errors of `pick_device`.
    """

    def __init__(self, config: TrainConfig, device: torch.device | None = None) -> None:
        self.config = config
        self.device = device or pick_device()
        _set_precision(config, self.device)
        self.backbone: Backbone = load_backbone(config)
        scale = 255 * torch.tensor([self.backbone.mean, self.backbone.std], device=self.device)
        self._mean, self._std = scale.view(2, 1, 3, 1, 1)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a module to the device, in the layout that is fastest there."""
        module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module

    def freeze(self, trunk: nn.Module) -> nn.Module:
        """Freeze a placed trunk. Returns a faster module to run instead of it."""
        trunk.requires_grad_(False).eval()
        if self.config.frozen_batchnorm == "train" or not len(list(trunk.parameters())):
            return trunk
        return self.place(fold_batchnorm(trunk, self.config.image_size)).requires_grad_(False)

    def compiled(self, frozen: nn.Module) -> nn.Module:
        """A compiled form of what `freeze` returned; that itself, where nothing is compiled.

        A machine that cannot compile says so in one line of the log.
        """
        if not self._compiles or not len(list(frozen.parameters())):
            return frozen
        compiled = copy.copy(frozen)  # shares the weights
        compiled.compile(dynamic=False)
        size = self.config.image_size
        try:
            self.features(compiled, torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except Exception as error:  # no compiler, a full disk, a killed compiler, and more
            if is_out_of_memory(error):
                raise
            log.warning("the trunk is not compiled: %s", said(error))
            return frozen
        return compiled

    @property
    def _compiles(self) -> bool:
        # With batch statistics each run has a trunk of its own, which the workspace's is not.
        is_shared = self.config.frozen_batchnorm != "train"
        return self.config.compile == "auto" and self.device.type == "cuda" and is_shared

    def features(self, trunk: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """The trunk's output for uint8 images [n, 3, size, size].

        In training mode the images are one batch. Otherwise the trunk gets parts of one shape, the last
        of them padded. So an image's output does not depend on how many others there are.
        """
        at_once = len(images) if trunk.training else self.images_at_once
        with torch.no_grad(), self._autocast():
            outputs = (
                trunk(self.normalise(_padded(part, at_once)))[: len(part)]
                for part in torch.split(images, at_once)
            )
            return concatenate(outputs, len(images))

    @property
    def images_at_once(self) -> int:
        """How many images go through the trunk together."""
        if self.device.type == "cuda":
            return BLOCK
        in_cache = max(CACHED_PIXELS // self.config.image_size**2, 1)
        return min(1 << int(math.log2(in_cache)), BLOCK)

    def logits(self, tail: nn.Sequential, features: torch.Tensor) -> torch.Tensor:
        """The tail's output for trunk output: float [n, attributes].

        The small head runs in fp32, so that rounding does not decide the class.
        """
        stages, head = tail
        with self._autocast():
            features = stages(features)
        logits: torch.Tensor = head(features.float())
        return logits

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Convert uint8 [n, 3, s, s] to float on the device, as the backbone's weights expect it."""
        images = images.to(self.device, non_blocking=True)
        scaled = images.float().sub_(self._mean).div_(self._std)
        # The layout changes last, which is three times as fast.
        return scaled.contiguous(memory_format=torch.channels_last)

    @property
    def rounds(self) -> bool:
        """Whether the network computes in bf16 where that is precise enough."""
        precision = self.config.precision
        return precision == "bf16" or (precision == "auto" and self.device.type == "cuda")

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.rounds else nullcontext()


def _padded(images: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - len(images)
    return images if missing == 0 else torch.cat([images, images.new_zeros(missing, *images.shape[1:])])


def concatenate(parts: Iterable[torch.Tensor], rows: int) -> torch.Tensor:
    """Concatenate parts with `rows` rows in all. The result is allocated first, to save memory."""
    whole, start = torch.empty(0), 0
    for part in parts:
        if start == 0:
            layout = torch.channels_last if part.dim() == 4 else torch.contiguous_format
            whole = torch.empty(
                (rows, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=layout
            )
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def _set_precision(config: TrainConfig, device: torch.device) -> None:
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        torch.backends.cudnn.allow_tf32 = config.allow_tf32
        # The same config must give the same curve. If CUDA has no deterministic kernel, torch warns.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # we read none
        torch.backends.cudnn.benchmark = False
