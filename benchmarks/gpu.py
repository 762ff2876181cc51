"""How fast a GPU searches, compared with loops written by hand and with the bare kernels.

    python -m benchmarks.gpu --data DIR                         # about 200 s; --seconds 20 for longer
    python -m benchmarks.gpu --data DIR --search                # a search of 100 trials
    python -m benchmarks.gpu --data DIR --mission --weights FILE

The table, in images per second of SE-ResNeXt50 at 224 with batch 128: the report's loop; a good loop
(channels_last, bf16, fused Adam, cudnn.benchmark, 16 loader processes); the same with the images on the
GPU already; Atelier with 1, 4 and 8 trials at once, as a worker trains them, with database, records,
checkpoints and validation. Cold is as the trunk's output is made, warm is as it is read. Then the bare
kernels: trunk, tails alone and on streams, evaluation; and the share of their bound that a worker
reaches. And the seconds from a worker's command to its first step.

`--search` runs the search of studies/fashion.toml. `--mission` searches, confirms, exports, trains 120
epochs and predicts, with EfficientNet-Lite0 and its weights in FILE. `--small` is for trying all of this
on a CPU: a small network, few images, short times.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import sqlalchemy as sa
import torch

from benchmarks.saving import make_worker
from benchmarks.server import temporary_home
from benchmarks.speed import BATCH, PACKS, Baseline
from dashboards.study_tables import share
from search.study_config import StudyConfig
from search.toml_file import load_study_file
from search.worker import Worker
from storage import database
from storage.paths import image_cache
from storage.tables import EPOCHS
from trainer.demo import write_demo
from trainer.device import prepare_process, wait_for
from trainer.feature_places import places
from trainer.run import Run
from trainer.stream import BLOCK
from trainer.workspace import Workspace

ATELIER = [sys.executable, "-m", "atelier_command"]
# Cold: no epoch of the stream comes twice. Warm: all are alike, so that the first one is kept for all;
# a trial has as many as in studies/fashion.toml, so that trials begin and end.
SIDES = {"cold": ("train.epochs=100000",), "warm": ("train.augment='none'",)}


@dataclass(frozen=True)
class Scale:
    """How large all is."""

    settings: tuple[str, ...]
    seconds: float  # of a side of the comparison
    processes: dict[str, int]  # that load images
    search: tuple[str, ...]
    mission: tuple[str, ...]
    long_run: int  # epochs


LARGE = Scale(
    settings=(),
    seconds=12,
    processes={"report": 7, "good": 16},
    search=("study.max_trials=100",),
    mission=("study.max_trials=40", "train.trainable='blocks.5'", "train.epochs=20"),
    long_run=120,
)
TINY = ("train.backbone='test_resnet'", "train.trainable='layer4'", "train.image_size=32")
SHORT = ("train.train_images=300", "train.epochs=4", "train.warmup_epochs=1", "study.rungs=[1]")
SMALL = Scale(
    settings=(*TINY, "train.train_images=300"),
    seconds=0.5,
    processes={"report": 1, "good": 1},
    search=(*TINY, *SHORT, "study.max_trials=4"),
    mission=(*TINY, *SHORT, "study.max_trials=3", "study.strategy='none'"),
    long_run=6,
)


def rate(step: Callable[[], object], images: int, seconds: float, device: torch.device) -> float:
    """Images per second of a step, after some that are not counted."""
    for _ in range(4):
        step()
    wait_for(device)
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        step()
        steps += 1
        if steps % 4 == 0:
            wait_for(device)  # else the host would run far ahead
    wait_for(device)
    return steps * images / (time.monotonic() - started)


def hand_written(workspace: Workspace, scale: Scale) -> dict[str, float]:
    """Images per second of the loops that people write."""
    rates = {}
    is_exact = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # people do without
    for name, processes in scale.processes.items():
        loop = Baseline(workspace.config, workspace.device, processes, is_good=name == "good")
        sides = {f"the {name} loop": loop.step}
        if name == "good":
            batch = loop.next_batch()
            sides["the same, images on the device"] = lambda loop=loop, batch=batch: loop.train(*batch)
        for side, step in sides.items():
            rates[side] = rate(step, BATCH, scale.seconds / 4, workspace.device)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(is_exact, warn_only=True)
    return rates


def side_of(workspace: Workspace, config: StudyConfig, pack: int, seconds: float) -> dict[str, float]:
    """A worker's trial-images per second, and how busy the device is."""
    workspace.store.close()  # forgets all
    study = config.study.model_copy(update={"name": f"pack {pack}, {config.shared.augment}"})
    worker = make_worker(config.model_copy(update={"study": study}), workspace, pack)
    for _ in range(2):  # in the first, graphs are captured and what is the same in each epoch is kept
        worker.fill()
        worker.train()
    started, images = time.monotonic(), 0
    while (passed := time.monotonic() - started) < seconds:
        images += len(worker.fill()) * len(workspace.train_labels)
        worker.train()
    if worker.pack != pack:
        print(f"  (only {worker.pack} trials fitted at once)")
    busy = workspace.utilization.since(started)
    end(worker)
    return {"rate": images / passed, "busy": math.nan if busy is None else busy}


def end(worker: Worker) -> None:
    """End a worker's threads. Its study is left as it is."""
    for thread in (worker.recorder, worker.writer):
        thread.shutdown(cancel_futures=True)
    gc.collect()  # trials and their workers hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def kernels(workspace: Workspace, scale: Scale) -> dict[str, float]:
    """Images per second of the parts alone, and the seconds of an evaluation."""
    part = workspace.division(workspace.config).train[:BLOCK]
    seconds, device = scale.seconds / 20, workspace.device

    def features() -> torch.Tensor:
        images = workspace.stream.images(0, 0, part)
        return workspace.runtime.features(workspace.frozen, images)

    rates = {"trunk": rate(features, len(part), seconds, device)}
    block, targets = features(), workspace.train_targets[: len(part)]
    for pack in PACKS:
        runs = [Run(workspace.config, workspace) for _ in range(pack)]

        def tails(runs: list[Run] = runs) -> None:
            for start in range(0, len(part), BATCH):
                rows = slice(start, start + BATCH)
                for run in runs:
                    run.train_step(block[rows], targets[rows])

        rates[f"tails {pack}"] = rate(tails, pack * len(part), seconds, device)
    rates["evaluation"] = 1 / rate(runs[0].evaluate, 1, seconds, device)
    return rates


def bound(workspace: Workspace, parts: dict[str, float], pack: int, cold: bool) -> float:
    """Trial-images per second if an epoch had nothing but the bare kernels."""
    images = len(workspace.train_labels)
    seconds = pack * (images / parts[f"tails {pack}"] + parts["evaluation"])
    return pack * images / (seconds + (images / parts["trunk"] if cold else 0))


def seconds_to_first_step(data: str, scale: Scale) -> float:
    """From a worker's command on, with warm caches."""
    settings = (*scale.settings, "study.name='start'", "study.max_trials=1", "train.weights='none'")
    started = time.monotonic()
    words = [*ATELIER, "worker", "studies/fashion.toml", "--data", data, *given(settings)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if "first optimizer step" in line:
                passed = time.monotonic() - started
                process.kill()
                return passed
    sys.exit("".join(lines))


def given(settings: Sequence[str]) -> list[str]:
    """Settings as options."""
    return [word for setting in settings for word in ("--set", setting)]


def compare(data: str, scale: Scale) -> None:
    """Print the table."""
    loops: dict[str, float] = {}
    for name, settings in SIDES.items():
        config = config_of(data, (*scale.settings, *settings))
        # As in a worker, but not on the disk: that is for several workers.
        workspace = Workspace(
            config.largest, image_cache(), None, [BATCH], lambda device: replace(places(device), disk=0)
        )
        if not loops:
            print(f"{workspace.device_name or 'CPU'}, torch {torch.__version__}; images/s:", flush=True)
            loops = hand_written(workspace, scale)
            for loop, value in loops.items():
                print(f"  {loop}: {value:,.0f}", flush=True)
            parts = kernels(workspace, scale)
            print("  bare kernels: " + ", ".join(f"{n} {v:,.4g}" for n, v in parts.items()), flush=True)
        good, on_device = list(loops.values())[1:]
        for pack in PACKS:
            side = side_of(workspace, config, pack, scale.seconds)
            most = bound(workspace, parts, pack, name == "cold")
            print(
                f"  atelier, pack {pack}, {name}: {side['rate']:,.0f}, {side['rate'] / most:.0%} of the "
                f"bound {most:,.0f}, {side['rate'] / good:.2f}x the good loop, "
                f"{side['rate'] / on_device:.2f}x with images on the device; busy {side['busy']:.0%}",
                flush=True,
            )
        workspace.close()
    print(f"a worker's first step: after {seconds_to_first_step(data, scale):.1f} s")


def config_of(data: str, settings: Sequence[str]) -> StudyConfig:
    """The study of a side: its trials go on, whatever their accuracy."""
    fixed = ("study.strategy='none'", "study.sampler='random'", "study.first=[]")
    budget = ("study.max_trials=100000", f"space.batch_size=[{BATCH}]", "train.weights='none'")
    words = [f"train.data={json.dumps(data)}", *fixed, *budget, *settings]
    return load_study_file(Path("studies/fashion.toml"), words)


def search(data: str, scale: Scale) -> None:
    """Print how long a search takes, and how busy the device is in it."""
    words = ["search", "studies/fashion.toml", "--data", data, "--weights", "none", "-o", "best.toml"]
    seconds = run(*words, *given(scale.search))
    with database.connect().connect() as connection:
        first, last, images, busy = connection.execute(
            sa.select(
                sa.func.min(EPOCHS.c.recorded),
                sa.func.max(EPOCHS.c.recorded),
                sa.func.sum(EPOCHS.c.images),
                sa.func.avg(EPOCHS.c.busy),
            )
        ).one()
    between = (last - first).total_seconds()
    print(f"from the command to its end: {seconds:.0f} s")
    pace = f"{images / between:,.0f} trial-images/s, busy {share(busy) or 'unknown'}"
    print(f"between the first and the last epoch: {pace}")


def mission(data: str, weights: str, scale: Scale) -> None:
    """Search, confirm, export, train and predict; prints what they print, and their times."""
    name = "studies/fashion-cpu.toml"
    weights = weights if weights == "none" else str(Path(weights).absolute())
    run("search", name, "--data", data, "--weights", weights, "-o", "best.toml", *given(scale.mission))
    run("confirm", "fashion-cpu", "--top", "2", "--seeds", "2")
    run("export", "fashion-cpu", "-o", "best.toml")
    run("train", "best.toml", "--epochs", str(scale.long_run))
    scores = Path(data, "split", "val_attr.txt")
    run("predict", "best.run", "--split", "val", "--scores", str(scores), "-o", "prediction.zip")


def run(*words: str) -> float:
    """Run a command of atelier in the present home. Returns the seconds that it took."""
    folder = Path(os.environ["ATELIER_HOME"])
    studies = [str(Path(word).absolute()) if word.startswith("studies/") else word for word in words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path[1:]])}
    started = time.monotonic()
    result = subprocess.run([*ATELIER, *studies], cwd=folder, env=environment, check=False)
    if result.returncode:
        sys.exit(f"atelier {' '.join(words)}: ended with {result.returncode}")
    passed = time.monotonic() - started
    print(f"== atelier {words[0]}: {passed:.0f} s", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", help="with --small: the demo's, if it is not given")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--mission", action="store_true")
    parser.add_argument("--weights", default="none", help="of EfficientNet-Lite0, for --mission")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, help="of a worker's side in the table; default: 12")
    options = parser.parse_args()
    if not options.data and not options.small:
        parser.error("--data is missing: the dataset's folder")
    scale = SMALL if options.small else LARGE
    scale = replace(scale, seconds=options.seconds or scale.seconds)
    # Compiled once for all calls: each has a home of its own.
    compiled = Path(tempfile.gettempdir(), f"atelier-benchmark-{os.geteuid()}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
    prepare_process()
    started = time.monotonic()
    with temporary_home() as home:
        if not options.data:
            write_demo(home / "demo", train=300, val=100, test=10)
        data = str(Path(options.data or home / "demo").absolute())
        if options.search:
            search(data, scale)
        elif options.mission:
            mission(data, options.weights, scale)
        else:
            compare(data, scale)
    print(f"all of it: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
