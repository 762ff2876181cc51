"""How fast training is, compared with the report's loop as its author wrote it.

    python -m benchmarks.speed --data DIR --lite0 FILE.safetensors [--rounds 5] [--only PART]

`throughput`: trial-images per second of SE-ResNeXt50 at 224 with batch 128: the baseline, one trial, and
packs, without and with the trunk's output kept. Also the share that they reach of the bare kernels'
bound: the trunk once and K tails, or the tails alone.
`augmentation`: images per second on one core, compared with the report's PIL pipeline.
`memory`: a worker's peak with batch 256.
`trials`: trials per hour of studies/fashion-cpu.toml with the weights --lite0, drawn to --figure.
All sides take turns in every round. A ratio compares two sides of one round. The median of the rounds is
shown, with the lowest and the highest.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

import trainer.workspace
from search.slurm.granted import take_granted
from search.toml_file import load_study_file
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.dataset import read_dataset
from trainer.device import prepare_process
from trainer.feature_places import Places, places
from trainer.images import load_image
from trainer.loop import train_epoch
from trainer.loss import AttributeLoss, class_weights
from trainer.run import Run
from trainer.saving import Snapshot, Snapshots
from trainer.workspace import Workspace

PARTS = ("throughput", "augmentation", "memory", "trials")
IMAGES, BATCH = 256, 128
CPU = torch.device("cpu")
PACKS = (1, 4, 8)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ReportsImages(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The training images after the report's transform, from JPEG to normalised tensor."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.split = read_dataset(folder).split("train")
        self.transform = transforms.Compose(
            [
                transforms.Resize([224, 224]),
                transforms.CenterCrop([200, 160]),
                transforms.Resize([224, 224]),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.3),
                transforms.RandomAffine(degrees=15, translate=(0.1, 0.1), scale=(0.5, 1.5), shear=15),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = load_image(self.folder / self.split.paths[index])
        return self.transform(image), torch.from_numpy(self.split.labels[index])


class Baseline:
    """The report's loop. Only `requires_grad` says what is frozen.

    A good loop is the same with channels_last, bf16, fused Adam and cuDNN's choice of kernels.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device = CPU,
        processes: int = 2,
        is_good: bool = False,
    ) -> None:
        self.device, self.is_good = device, is_good
        torch.backends.cudnn.benchmark = is_good
        dataset = ReportsImages(config.data)
        labels = torch.from_numpy(dataset.split.labels)
        sizes = read_dataset(config.data).sizes
        net: Any = timm.create_model(config.backbone, pretrained=False, num_classes=0)
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name.startswith("layer4"))
        layout = torch.channels_last if is_good else torch.contiguous_format
        head = nn.Sequential(
            nn.Linear(net.num_features, 512),
            nn.Dropout(config.dropout),
            nn.Linear(512, 128),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(128, sum(sizes)),
        )
        self.model = nn.Sequential(net, head).train().to(device, memory_format=layout)
        self.loss = AttributeLoss(sizes, class_weights(labels, sizes).to(device), config.epsilon)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(
            trained, lr=config.lr, weight_decay=config.weight_decay, fused=is_good or None
        )
        pinned = device.type == "cuda"
        # It has no end, so its processes are as busy in every round as in the middle of an epoch.
        sampler = RandomSampler(dataset, replacement=True, num_samples=10**7)
        self.batches = iter(
            DataLoader(dataset, BATCH, sampler=sampler, num_workers=processes, pin_memory=pinned)
        )

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = next(self.batches)
        layout = torch.channels_last if self.is_good else torch.contiguous_format
        images = images.to(self.device, non_blocking=True, memory_format=layout)
        return images, targets.to(self.device, non_blocking=True)

    def step(self) -> None:
        self.train(*self.next_batch())

    def train(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_good):
            logits = self.model(images)
        loss = self.loss(logits.float(), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def spread(values: list[float], unit: str = "") -> str:
    return f"{statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})"


def throughput(data: str, rounds: int) -> None:
    take_granted()
    threads = prepare_process()
    trainer.workspace.COMPILED_PIXELS = 0  # compiled, as in an epoch of all images
    config = TrainConfig(
        data=data,
        backbone="seresnext50_32x4d",
        weights="none",
        batch_size=BATCH,
        train_images=IMAGES,
        train_on="train+val",  # so that no side validates
        epochs=1000,
    )
    with tempfile.TemporaryDirectory() as cache, ExitStack() as stack:

        def workspace(kept: Places) -> Workspace:
            made = Workspace(config, Path(cache), places=lambda _: kept)
            stack.callback(made.close)
            return made

        def rate(runs: list[Run]) -> float:
            return len(runs) * IMAGES / seconds(lambda: list(train_epoch(runs)))

        off, kept = workspace(Places(0, 0)), workspace(Places(0, 4e9))
        on_disk = workspace(Places(0, 0, 4e9, Path(cache, "features")))
        packs = {size: [Run(config, off) for _ in range(size)] for size in PACKS}
        # All of their epochs are the stream's first one, which is kept.
        first = {"stream_epochs": [0] * 1000}
        warm = {size: [Run(config, kept, **first) for _ in range(size)] for size in PACKS}
        read = [Run(config, on_disk, **first)]
        single, baseline = Run(config, off), Baseline(config)
        images = torch.randn(IMAGES, 3, 224, 224).to(memory_format=torch.channels_last)
        features = off.runtime.features(off.frozen, torch.zeros(BATCH, 3, 224, 224).byte())
        targets = off.train_targets[:BATCH]

        def trunk() -> None:
            with torch.no_grad():
                for part in torch.split(images, 16):
                    off.frozen(part)

        def tail() -> None:
            single.train_step(features, targets)

        for runs in (packs[1], warm[1], read):
            list(train_epoch(runs))  # compiles
        tail()
        measured: dict[str, list[float]] = {}
        for number in range(rounds):
            baseline.step()
            sides = {"baseline": IMAGES / seconds(lambda: [baseline.step() for _ in range(2)])}
            kernels = seconds(trunk), seconds(lambda: [tail() for _ in range(2)])
            sides |= {"trunk": IMAGES / kernels[0], "tail": IMAGES / kernels[1]}
            for size in PACKS:
                sides[f"pack {size}"] = rate(packs[size])
                sides[f"bound {size}"] = size * IMAGES / (kernels[0] + size * kernels[1])
                sides[f"warm {size}"] = rate(warm[size])
            sides["disk"] = rate(read)
            kept.store.close()  # forgets all
            sides["cold"] = rate(warm[1])
            for name, value in sides.items():
                measured.setdefault(name, []).append(value)
            print(f"round {number + 1}: " + ", ".join(f"{k} {v:.1f}" for k, v in sides.items()))
    print(f"SE-ResNeXt50 at 224, batch {BATCH}, {threads} threads, trial-images/s:")
    show_throughput(measured)


def show_throughput(measured: dict[str, list[float]]) -> None:
    def ratio(side: str, other: str, unit: str = "x") -> str:
        factor = 100 if unit == " %" else 1
        pairs = zip(measured[side], measured[other], strict=True)
        return spread([factor * a / b for a, b in pairs], unit)

    print(f"  baseline {spread(measured['baseline'])}")
    for size in PACKS:
        side, bound = f"pack {size}", f"bound {size}"
        print(f"  --pack {size}: {spread(measured[side])}, {ratio(side, 'baseline')} the baseline,")
        print(f"    {ratio(side, bound, ' %')} of the bare kernels")
    for size in PACKS:
        side = f"warm {size}"
        print(f"  --pack {size}, trunk output kept: {spread(measured[side])},")
        print(f"    {ratio(side, 'baseline')} the baseline, {ratio(side, 'pack 1')} one trial without,")
        print(f"    {ratio(side, 'tail', ' %')} of the bare tail")
    print(
        f"  one trial from the disk: {ratio('disk', 'pack 1')}; as it is made: {ratio('cold', 'pack 1')}"
    )


def augmentation(data: str, rounds: int) -> None:
    take_granted()
    prepare_process()
    reports_images = ReportsImages(data)
    config = TrainConfig(data=data, backbone="resnet10t", weights="none", trainable="head")
    with tempfile.TemporaryDirectory() as cache:
        workspace = Workspace(config, Path(cache))
        stream, indices = workspace.stream, workspace.division(config).train
        blocks = (stream.images(0, 0, part) for part in stream.parts(indices, 0, 0, 256))
        workspace.runtime.normalise(next(blocks))  # compiles

        def ours() -> None:
            workspace.runtime.normalise(next(blocks))

        rates = [
            (
                128 / seconds(lambda k=k: [reports_images[128 * k + i] for i in range(128)]),
                256 / seconds(ours),
            )
            for k in range(rounds)
        ]
    pil, batched = zip(*rates, strict=True)
    print(f"images/s on {torch.get_num_threads()} thread: PIL {spread(pil)}, ours {spread(batched)}")
    print(f"  {spread([b / a for a, b in rates], 'x')}")


def memory(data: str, pack: int) -> None:
    take_granted()
    prepare_process()
    config = TrainConfig(
        data=data, backbone="seresnext50_32x4d", weights="none", batch_size=256, train_images=512
    )
    with tempfile.TemporaryDirectory() as cache:
        workspace = Workspace(config, Path(cache), places=places)  # as a worker does
        runs = [Run(config, workspace) for _ in range(pack)]
        snapshots, checkpoints = Snapshots(), Checkpoints(Path(cache, "checkpoints"))

        def save(snapshot: Snapshot) -> None:
            snapshot.save(checkpoints)
            snapshots.free(snapshot)

        with ThreadPoolExecutor(1) as writer:
            for _ in range(3):  # from the second on, all that stays from epoch to epoch is there
                for run, _ in train_epoch(runs):
                    writer.submit(save, snapshots.take(run))
        workspace.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    print(f"a worker's peak at --pack {pack}, batch 256: {peak:.2f} GiB")


def trials(data: str, weights: str, rounds: int, figure: Path | None) -> None:
    take_granted()
    prepare_process()
    settings = [f"train.data={json.dumps(data)}", f"train.weights={json.dumps(weights)}"]
    config = load_study_file(Path("studies/fashion-cpu.toml"), settings).shared
    packs = (1, 2, 4, 8)
    rates: dict[int, list[float]] = {size: [] for size in packs}
    with tempfile.TemporaryDirectory() as cache:
        workspace = Workspace(config, Path(cache))
        first = Run(config, workspace)
        list(train_epoch([first]))  # compiles, and makes the validation features
        for _ in range(rounds):
            for size in packs:
                runs = [Run(config, workspace) for _ in range(size)]
                hours = config.epochs * seconds(lambda runs=runs: list(train_epoch(runs))) / 3600
                rates[size].append(size / hours)
                print(f"pack {size}: {rates[size][-1]:.1f} trials/h", flush=True)
    print(f"{config.backbone} at {config.image_size}, {config.epochs} epochs, none pruned, trials/h:")
    for size in packs:
        times = [a / b for a, b in zip(rates[size], rates[1], strict=True)]
        print(f"  --pack {size}: {spread(rates[size])}, {spread(times, 'x')}")
    if figure:
        draw(rates, figure)


def draw(rates: dict[int, list[float]], path: Path) -> None:
    medians = [statistics.median(values) for values in rates.values()]
    ends = np.abs(np.array([[min(v), max(v)] for v in rates.values()]).T - medians)
    _, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    axes.errorbar(list(rates), medians, ends, marker="o", capsize=3, label="measured")
    axes.plot(
        list(rates), [medians[0] * size for size in rates], "--", c="grey", label="K times as many"
    )
    axes.set(xlabel="--pack", ylabel="trials per hour", xticks=list(rates), ylim=(0, None))
    axes.legend()
    plt.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--lite0", help="weights of tf_efficientnet_lite0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--pack", type=int, help=argparse.SUPPRESS)  # for the processes of `memory`
    options = parser.parse_args()
    if options.pack:
        memory(options.data, options.pack)
        return
    if options.only in (None, "trials") and not options.lite0:
        parser.error("--lite0 is missing: the weights file of tf_efficientnet_lite0")
    for part in [options.only] if options.only else PARTS:
        print(f"== {part}", flush=True)
        if part == "memory":
            for pack in (1, 4):
                again("--only", "memory", "--data", options.data, "--pack", str(pack))
        elif part == "augmentation" and os.environ.get("OMP_NUM_THREADS") != "1":
            again("--only", part, "--data", options.data, "--rounds", str(options.rounds), threads="1")
        elif part == "trials":
            trials(options.data, options.lite0, options.rounds, options.figure)
        else:
            {"throughput": throughput, "augmentation": augmentation}[part](options.data, options.rounds)


def again(*words: str, threads: str | None = None) -> None:
    """Measure one part in another process, with its own memory and threads."""
    environment = os.environ | ({"OMP_NUM_THREADS": threads} if threads else {})
    subprocess.run([sys.executable, "-m", "benchmarks.speed", *words], env=environment, check=True)


if __name__ == "__main__":
    main()
