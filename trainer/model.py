"""The network, cut in two: a frozen trunk and a trained tail.

The trunk is all below the first trained stage. Nothing learns there, so it runs in eval mode and without
gradient. Its output for the validation images is computed once. It has four fifths of the multiply-adds.
"""

import copy
import difflib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from trainer.config import TrainConfig
from trainer.torch_file import reason
from trainer.weights import Tensors, WeightsError, load_weights, not_finite

HEAD = (512, 128)  # hidden widths of the report's prediction head


class ModelError(ValueError):
    """The backbone, its stage or its weights cannot be used. The message is one line."""


class Dropout(nn.Module):
    """Dropout with its own generator, so that no other trial changes a trial's masks."""

    def __init__(self, p: float, generator: torch.Generator) -> None:
        super().__init__()
        self.p, self.generator = p, generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x may have any shape. In eval mode it is returned as it is."""
        if not self.training or self.p == 0:
            return x
        keep = torch.empty_like(x).bernoulli_(1 - self.p, generator=self.generator)
        return x * keep / (1 - self.p)


def make_head(features: int, outputs: int, dropout: float, generator: torch.Generator) -> nn.Module:
    """The report's head: features-512-128-outputs."""
    return nn.Sequential(
        nn.Linear(features, HEAD[0]),
        Dropout(dropout, generator),
        nn.Linear(HEAD[0], HEAD[1]),
        nn.ReLU(),
        Dropout(dropout, generator),
        nn.Linear(HEAD[1], outputs),
    )


@dataclass
class Backbone:
    """The stages below the head, by name and in order, and how images are normalised for them."""

    stages: "OrderedDict[str, nn.Module]"
    features: int  # width of the last stage
    mean: tuple[float, ...]
    std: tuple[float, ...]
    whole: nn.Module  # timm's model, of which the stages are parts

    @property
    def cuts(self) -> list[str]:
        """The allowed values of `trainable`: the first trained stage, or the head alone."""
        return [*(name for name in self.stages if name != "pool"), "head"]

    def split(self, trainable: str) -> tuple[nn.Sequential, nn.Sequential]:
        """The trunk and the trained stages. The head is in neither. Raises ModelError."""
        if trainable not in self.cuts:
            raise ModelError(f"trainable = {trainable!r}: allowed is one of {', '.join(self.cuts)}")
        # a module's name holds no dot
        stages = [(name.replace(".", "_"), stage) for name, stage in self.stages.items()]
        cut = len(stages) if trainable == "head" else list(self.stages).index(trainable)
        return (
            nn.Sequential(OrderedDict(stages[:cut])),
            nn.Sequential(OrderedDict(stages[cut:])),
        )

    def problem(self, config: TrainConfig, images: int) -> str | None:
        """Why the network cannot take so many training images of the config's size. None if it can.

        Only shapes go through the network. Nothing is computed.
        """
        stages = nn.ModuleList(self.split(config.trainable))
        tensors = [*stages.parameters(), *stages.buffers()]  # replaced, not copied: a network has 100 MB
        trunk, tail = copy.deepcopy(stages, {id(tensor): tensor.to("meta") for tensor in tensors})
        trunk.train(config.frozen_batchnorm == "train")
        tail.train()
        try:
            tail(trunk(torch.empty(images, 3, config.image_size, config.image_size, device="meta")))
        except (RuntimeError, ValueError) as error:
            return reason(error)
        return None


def saved_names(trunk: nn.Module, tail: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of both, by their names in a run's files. They are not copied."""
    return as_saved(trunk.state_dict(keep_vars=True), tail.state_dict(keep_vars=True))


def as_saved(trunk: Tensors, tail: Tensors) -> dict[str, torch.Tensor]:
    """The tensors of two state dicts, by their names in a run's files."""
    parts = (("trunk", trunk), ("tail", tail))
    return {f"{part}.{name}": tensor for part, state in parts for name, tensor in state.items()}


def fold_batchnorm(trunk: nn.Module, size: int) -> nn.Module:
    """A copy for inference, in which each convolution does the work of the BatchNorm behind it.

    `size` is the images' width and height in pixels. The outputs differ only by rounding.
    """
    folded = copy.deepcopy(trunk).eval()
    outputs: list[tuple[torch.Tensor, nn.Conv2d]] = []
    behind: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            outputs.append((output, module))
        elif isinstance(module, nn.BatchNorm2d):
            behind.extend((conv, module) for made, conv in outputs if made is inputs[0])

    handles = [module.register_forward_hook(watch) for module in folded.modules()]
    with torch.no_grad():
        folded(torch.zeros(1, 3, size, size, device=next(trunk.parameters()).device))
    for handle in handles:
        handle.remove()
    for conv, norm in behind:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    # A BatchNorm of timm has its activation inside, which remains.
    activations = {norm: getattr(norm, "act", nn.Identity()) for _, norm in behind}
    for parent in list(folded.modules()):
        for name, child in parent.named_children():
            if child in activations:
                setattr(parent, name, activations[child])
    return folded


def load_backbone(config: TrainConfig) -> Backbone:
    """Build the backbone with its weights. Raises ModelError."""
    model: Any = _create(config)
    stages: OrderedDict[str, nn.Module] = OrderedDict()
    if isinstance(model, ResNet):
        stages["stem"] = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            stages[name] = getattr(model, name)
    elif isinstance(model, EfficientNet):
        stages["stem"] = nn.Sequential(model.conv_stem, model.bn1)
        for index, block in enumerate(model.blocks):
            stages[f"blocks.{index}"] = block
        stages["conv_head"] = nn.Sequential(model.conv_head, model.bn2)
    else:
        raise ModelError(
            f"backbone = {config.backbone!r} is a {type(model).__name__}; "
            "allowed are timm's ResNet and EfficientNet families"
        )
    stages["pool"] = model.global_pool
    cfg = model.pretrained_cfg
    backbone = Backbone(stages, model.num_features, tuple(cfg["mean"]), tuple(cfg["std"]), model)
    if config.weights != "none":
        _fill(backbone, model, config)
    return backbone


def _fill(backbone: Backbone, model: nn.Module, config: TrainConfig) -> None:
    """Load the weights if they come from a file, and check the values. Raises ModelError."""
    named: Tensors = model.state_dict(keep_vars=True)  # by timm's names, the classifier too
    cuts = [backbone.split(cut) for cut in backbone.cuts]
    saved = [saved_names(trunk, nn.Sequential(stages)) for trunk, stages in cuts]
    of_backbone = {id(tensor) for tensor in saved[0].values()}
    needed = {name: tensor for name, tensor in named.items() if id(tensor) in of_backbone}
    try:
        if config.weights != "timm":
            load_weights(Path(config.weights), config.backbone, [needed, *saved], named.keys())
        if wrong := not_finite(needed):
            raise WeightsError(f"{wrong}; get the file again, or one of a training that did not diverge")
    except WeightsError as error:
        raise ModelError(f"weights = {config.weights!r}: {error}") from error


def check_size(config: TrainConfig, backbone: Backbone) -> None:
    """Check that the network takes images of the configuration's size. Raises ModelError."""
    if problem := backbone.problem(config, 2):
        raise ModelError(
            f"image_size = {config.image_size}: {config.backbone} takes no images of that size "
            f"({problem}); give another, such as a multiple of 32"
        )


def check_batches(config: TrainConfig, backbone: Backbone, images: int, sizes: Iterable[int]) -> None:
    """Check that these batch sizes cut so many images into batches that the network can learn from.

    Raises ModelError if the last batch has one image and a BatchNorm gets one value per channel from it.
    """
    wrong = [str(size) for size in sorted(set(sizes)) if images % size == 1 % size]
    if not wrong or backbone.problem(config, 1) is None:
        return
    images_by = "number of folds" if config.folds else "train_images"
    changes = {"image_size": 2 * config.image_size, "frozen_batchnorm": "eval", "trainable": "head"}
    other_ways = [
        f", or {key} = {value!r}"
        for key, value in changes.items()
        if backbone.problem(config.model_copy(update={key: value}), 1) is None
    ]
    raise ModelError(
        f"batch_size = {' or '.join(wrong)}: the last batch of {images} training images has 1 image, of "
        f"which a BatchNorm of {config.backbone} gets 1 value per channel, at image_size = "
        f"{config.image_size}; allowed is another batch_size or {images_by}{''.join(other_ways)}"
    )


def _create(config: TrainConfig) -> nn.Module:
    check_backbone(config.backbone)
    # Random weights depend neither on the run's seed nor on what the process drew before, as a file's
    # weights would not.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if config.weights != "timm":
            model: nn.Module = timm.create_model(config.backbone, pretrained=False)
        else:
            model = _create_pretrained(config.backbone)
    return model


def check_backbone(name: str) -> None:
    """Check that timm has a model of this name. Raises ModelError."""
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise ModelError(f"backbone = {name!r} is not known to timm {timm.__version__}; {hint}")
    if tag and name not in timm.list_pretrained(base + "*"):
        raise ModelError(
            f"backbone = {name!r}: timm {timm.__version__} has no weights {tag!r} for {base}; "
            f"it has {', '.join(n.partition('.')[2] for n in timm.list_pretrained(base + '.*'))}"
        )


def _create_pretrained(name: str) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except Exception as error:  # offline, the hub client raises errors of many kinds
        raise ModelError(
            f"weights = 'timm': cannot get {name} ({type(error).__name__}); on a machine without "
            "internet give a file as weights, or fill the cache beforehand"
        ) from error
    return model


@dataclass(frozen=True)
class StageRow:
    """One line of `atelier model`. Multiply-adds are per image."""

    name: str
    trained: bool
    parameters: int
    multiply_adds: int


def stage_table(config: TrainConfig, outputs: int) -> list[StageRow]:
    """Parameters and multiply-adds of every stage, for an image of the config's size."""
    backbone = load_backbone(config.model_copy(update={"weights": "none"}))
    check_size(config, backbone)
    stages = OrderedDict(backbone.stages)
    stages["head"] = make_head(backbone.features, outputs, config.dropout, torch.Generator())
    rows, trained = [], False
    x = torch.zeros(1, 3, config.image_size, config.image_size)
    for name, stage in stages.items():
        trained = trained or name == config.trainable
        x, multiply_adds = _count(stage.eval(), x)
        parameters = sum(p.numel() for p in stage.parameters())
        if parameters:
            rows.append(StageRow(name, trained, parameters, multiply_adds))
    return rows


def _count(stage: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    total = 0

    def add(module: nn.Module, _: object, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    handles = [module.register_forward_hook(add) for module in stage.modules()]
    with torch.no_grad():
        output = stage(x)
    for handle in handles:
        handle.remove()
    return output, total
