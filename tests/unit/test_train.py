"""The loop: what learns, what does not, and that a resumed run equals an unbroken one."""

import itertools
import math
import shutil
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import recall_score

from trainer.checkpoint import CheckpointError, Checkpoints
from trainer.config import Lengthening
from trainer.dataset import read_dataset
from trainer.feature_places import Places
from trainer.loop import finish, train, train_epoch
from trainer.model import ModelError, fold_batchnorm, load_backbone, stage_table
from trainer.model_file import ModelFiles, SavedModel
from trainer.predictions import Predictions
from trainer.run import Run, learning_rate
from trainer.workspace import Init, Workspace


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Prepared images, for all workspaces."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def workspace(tiny, cache):
    return Workspace(tiny, cache)


def curve(results):
    """All that must be equal: everything but the time and the memory."""
    return [replace(result, seconds=0.0, peak_memory=0) for result in results]


@pytest.fixture(scope="module")
def unbroken_curves(cache):
    """Gives the curve of a configuration, trained once, in one go and in a workspace of its own."""
    known = {}

    def unbroken(config):
        key = config.model_dump_json()
        known[key] = known.get(key) or curve(train(config, Workspace(config, cache)))
        return known[key]

    return unbroken


@pytest.fixture
def unbroken(unbroken_curves, tiny):
    """The curve of `tiny`."""
    return unbroken_curves(tiny)


@pytest.fixture
def interrupted(interrupted_runs, tiny, tmp_path):
    """Makes a folder with the checkpoints of a run of `tiny` that was left after so many epochs."""

    def copy(epochs):
        shutil.copytree(interrupted_runs(tiny, epochs), tmp_path / "run")
        return Checkpoints(tmp_path / "run")

    return copy


@pytest.fixture(scope="module")
def interrupted_runs(cache, tmp_path_factory):
    known = {}

    def run(config, epochs):
        if epochs not in known:
            known[epochs] = tmp_path_factory.mktemp("interrupted")
            places = Workspace(config, cache), Checkpoints(known[epochs])
            with closing(train(config, *places, checkpoint_seconds=0)) as results:
                assert len(list(itertools.islice(results, epochs))) == epochs
        return known[epochs]

    return run


def test_the_reports_model_trains_17242394_parameters(tiny):
    config = tiny.model_copy(update={"backbone": "seresnext50_32x4d.gluon_in1k", "image_size": 224})
    rows = stage_table(config, 26)
    assert sum(row.parameters for row in rows if row.trained) == 17_242_394
    assert [row.name for row in rows if row.trained] == ["layer4", "head"]
    frozen = sum(row.multiply_adds for row in rows if not row.trained)
    assert frozen == pytest.approx(3.364e9, rel=1e-3)


@pytest.mark.parametrize(
    ("backbone", "trainable"),
    [("resnet18", "layer3"), ("tf_efficientnet_lite0", "blocks.6"), ("efficientnet_b0", "head")],
)
def test_trunk_and_tail_together_are_the_whole_network(tiny, backbone, trainable):
    import timm

    config = tiny.model_copy(update={"backbone": backbone, "trainable": trainable})
    trunk, tail = load_backbone(config).split(trainable)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        whole = timm.create_model(backbone, pretrained=False, num_classes=1000)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.eval().forward_head(whole.forward_features(images), pre_logits=True)
        assert torch.equal(tail.eval()(trunk.eval()(images)), expected)


def test_only_the_tail_changes(tiny, workspace):
    before = {k: v.clone() for k, v in workspace.trunk.state_dict().items()}
    run = Run(tiny, workspace)
    tail = {k: v.clone() for k, v in run.tail.state_dict().items()}
    [(_, result)] = train_epoch([run])
    assert result is run.history[0]
    assert all(torch.equal(v, before[k]) for k, v in workspace.trunk.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in workspace.trunk.parameters())
    changed = [k for k, v in run.tail.state_dict().items() if not torch.equal(v, tail[k])]
    assert {k for k in tail if k.endswith("weight")} <= set(changed)


def test_training_batchnorm_updates_the_runs_own_trunk(tiny, cache):
    config = tiny.model_copy(update={"frozen_batchnorm": "train"})
    workspace = Workspace(config, cache)
    run = Run(config, workspace)
    list(train_epoch([run]))
    mine, shared = run.trunk.state_dict(), workspace.trunk.state_dict()
    differing = [name for name in mine if not torch.equal(mine[name], shared[name])]
    assert differing
    assert all("running" in name or "num_batches" in name for name in differing)


def test_same_config_same_curve_other_seed_other_curve(tiny, workspace, unbroken, unbroken_curves):
    assert curve(train(tiny, workspace)) == unbroken
    assert unbroken_curves(tiny.model_copy(update={"seed": 7})) != unbroken


@pytest.mark.parametrize("frozen_batchnorm", ["eval", "train"])
def test_a_run_resumed_after_every_epoch_equals_the_unbroken_one(
    tiny, cache, unbroken_curves, tmp_path, frozen_batchnorm
):
    config = tiny.model_copy(update={"frozen_batchnorm": frozen_batchnorm})
    unbroken = unbroken_curves(config)
    checkpoints = Checkpoints(tmp_path / "run")
    for epoch in range(config.epochs):
        results = []
        for result in train(config, Workspace(config, cache), checkpoints):
            results.append(result)
            if result.epoch == epoch:
                break
        assert curve(results) == unbroken[: epoch + 1]


def after(steps):
    """An interrupt that comes after so many steps of this process."""
    counter = itertools.count(1)
    return lambda *_: next(counter) == steps


@pytest.mark.parametrize("change", [{}, {"augment": "none"}, {"frozen_batchnorm": "train"}])
def test_a_run_interrupted_inside_its_epochs_equals_the_unbroken_one(
    tiny, cache, unbroken_curves, tmp_path, change
):
    # 10 steps an epoch, 8 a block: interrupted inside a block, at its end, and before an evaluation.
    config = tiny.model_copy(update={"batch_size": 32, "epochs": 2, **change})
    checkpoints = Checkpoints(tmp_path / "run")
    lengths, names = [], []
    for steps in (3, 5, 1, 1, 4):
        workspace = Workspace(config, cache)
        lengths.append(len(list(train(config, workspace, checkpoints, after(steps)))))
        names.append(max(path.name for path in (tmp_path / "run").glob("*.pt")))
    assert lengths == [0, 0, 0, 0, 1]
    steps = (3, 8, 9, 10, 14)
    assert names == [f"attempt-0001-epoch-{step // 11:04d}-step-{step:08d}.pt" for step in steps]
    assert curve(train(config, Workspace(config, cache), checkpoints)) == unbroken_curves(config)


def test_a_checkpoint_that_forgets_half_an_epochs_losses_gives_another_curve(
    tiny, workspace, unbroken, tmp_path
):
    checkpoints = Checkpoints(tmp_path / "run")
    assert list(train(tiny, workspace, checkpoints, after(3))) == []
    state = checkpoints.latest()
    state["partial"]["losses"] = state["partial"]["losses"][1:]
    checkpoints.save(0, 3, state)
    assert curve(train(tiny, workspace, checkpoints)) != unbroken


def test_an_interrupt_is_told_how_long_the_epoch_still_takes(tiny, workspace):
    asked = []
    run = Run(tiny, workspace)
    run.evaluate()  # the features of the validation images
    started = time.monotonic()
    list(train_epoch([run], lambda _, left: bool(asked.append((time.monotonic(), left)))))
    ended = time.monotonic()
    assert len(asked) == run.steps_per_epoch == 5
    # The guess at half time is of the right order; the last one is the evaluation alone.
    moment, left = asked[2]
    assert (ended - moment) / 10 < left < (ended - started) * 10
    assert asked[-1][1] < asked[0][1] * 5


def forget_generator(state, fresh):
    state["generator"] = fresh["generator"]


def forget_optimizer(state, fresh):
    state["optimizer"] = fresh["optimizer"]


def forget_schedule(state, fresh):
    state["step"] = fresh["step"]


def forget_weights(state, fresh):
    state["tail"] = fresh["tail"]


@pytest.mark.parametrize("forget", [forget_generator, forget_optimizer, forget_schedule, forget_weights])
def test_a_checkpoint_that_forgets_anything_gives_another_curve(
    tiny, workspace, unbroken, interrupted, forget
):
    checkpoints = interrupted(1)
    state = checkpoints.latest()
    forget(state, Run(tiny, workspace).state())
    checkpoints.save(1, 5, state)
    try:
        broken = curve(train(tiny, workspace, checkpoints))
    except (RuntimeError, IndexError):  # the position also says which images come next
        assert forget is forget_schedule
    else:
        assert broken != unbroken


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no digest", "digest"])
def test_a_damaged_checkpoint_does_not_count(interrupted, tmp_path, damage):
    checkpoints = interrupted(2)
    before, path = sorted((tmp_path / "run").glob("*.pt"))
    data = path.read_bytes()
    if damage == "no digest":
        path.with_name(path.name + ".sha256").unlink()
    elif damage == "digest":
        digest = path.with_name(path.name + ".sha256")
        digest.write_bytes(bytes([digest.read_bytes()[0] ^ 0x80]) + digest.read_bytes()[1:])
    else:
        flipped = data[:50] + bytes([data[50] ^ 1]) + data[51:]
        path.write_bytes({"truncated": data[:-10], "flipped": flipped, "empty": b""}[damage])
    assert len(checkpoints.latest()["history"]) == 1
    assert path.with_name(path.name + ".damaged").exists() == (damage != "no digest")
    before.write_bytes(b"")
    assert checkpoints.latest() is None


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_run_with_damaged_checkpoints_goes_on_where_it_can(
    tiny, workspace, unbroken, interrupted, tmp_path, damaged
):
    """From the one before, or anew if no checkpoint is whole."""
    checkpoints = interrupted(2)
    for path in sorted((tmp_path / "run").glob("*.pt"))[-damaged:]:
        path.write_bytes(b"")
    assert curve(train(tiny, workspace, checkpoints)) == unbroken


def test_a_checkpoint_of_another_configuration_is_refused(tiny, workspace, interrupted):
    checkpoints = interrupted(1)
    other = tiny.model_copy(update={"lr": 0.5})
    with pytest.raises(CheckpointError, match=r"lr = 0.001, this run has 0.5"):
        next(iter(train(other, workspace, checkpoints)))


def test_unaugmented_training_uses_its_features_again(tiny, cache):
    config = tiny.model_copy(update={"augment": "none"})
    workspace = Workspace(config, cache)
    first = curve(train(config, workspace))
    assert workspace.store.reads["the trunk"] == 2 + 1  # blocks of training and validation
    assert curve(train(config, workspace)) == first
    assert workspace.store.reads["the trunk"] == 2 + 1


@pytest.mark.parametrize("augment", ["none", "report"])
def test_features_that_do_not_fit_are_made_again_with_the_same_result(
    tiny, cache, unbroken_curves, augment
):
    config = tiny.model_copy(update={"augment": augment, "train_images": 70})
    workspace = Workspace(config, cache, places=lambda _: Places(device=1000, memory=1000))
    assert curve(train(config, workspace)) == unbroken_curves(config)
    assert set(workspace.store.reads) == {"the trunk"}


def test_a_stage_that_does_not_exist_is_refused(tiny):
    with pytest.raises(ModelError, match="allowed is one of stem, layer1"):
        load_backbone(tiny).split("layer9")


def first_images(data, folder, **counts):
    """A dataset of the first images of each split; the images themselves are not copied."""
    (folder / "split").mkdir(parents=True)
    (folder / "img").symlink_to(data / "img")
    shutil.copy(data / "split" / "list_attr_cloth.txt", folder / "split")
    for split, count in counts.items():
        for name in (f"{split}.txt", f"{split}_attr.txt"):
            lines = (data / "split" / name).read_text().splitlines(keepends=True)
            (folder / "split" / name).write_text("".join(lines[:count]))
    return str(folder)


def test_real_weights_learn_on_the_real_data(real_data, real_weights, tiny, tmp_path):
    config = tiny.model_copy(
        update={
            "data": first_images(real_data, tmp_path / "data", train=1500, val=400),
            "backbone": "tf_efficientnet_lite0",
            "weights": str(real_weights),
            "trainable": "head",
            "image_size": 64,
            "augment": "none",
            "epochs": 6,
            "weight_decay": 1e-5,
            "dropout": 0.2,
        }
    )
    results = list(train(config, Workspace(config, tmp_path)))
    assert results[-1].val_accuracy > 0.36  # chance is 0.231
    assert results[-1].images == 1500


def test_predictions_are_those_of_every_epoch_also_after_a_resume(
    tiny, workspace, unbroken, interrupted, tmp_path
):
    sizes = workspace.sizes
    whole = [result.predictions for result in unbroken]
    checkpoints = interrupted(2)
    results = list(train(tiny, workspace, checkpoints))
    joined = Predictions.join([result.predictions for result in results])
    for epoch, (result, expected) in enumerate(zip(results, whole, strict=True)):
        classes, log_probs = joined.classes[epoch], joined.log_probs[epoch]
        assert np.array_equal(classes, expected.classes[0])
        assert np.array_equal(log_probs, expected.log_probs[0])
        # The epoch's numbers follow from them.
        recalls = [
            recall_score(joined.labels[:, k], classes[:, k], average=None, zero_division=np.nan)
            for k in range(len(sizes))
        ]
        assert np.nanmean(np.concatenate(recalls)) == pytest.approx(result.val_accuracy)
        losses = [
            -log_probs[joined.labels[:, k] == value, k].astype(float).mean()
            for k, size in enumerate(sizes)
            for value in range(size)
            if (joined.labels[:, k] == value).any()
        ]
        assert np.mean(losses) == pytest.approx(result.val_log_loss, abs=2e-3)  # kept as float16
    joined.save(tmp_path / "kept" / "p.npz")
    loaded = Predictions.load(tmp_path / "kept" / "p.npz")
    assert all(np.array_equal(vars(loaded)[name], vars(joined)[name]) for name in vars(joined))


def test_two_seeds_in_one_workspace_are_as_each_in_its_own(tiny, workspace, unbroken, unbroken_curves):
    other = tiny.model_copy(update={"seed": 7})
    assert curve(train(tiny, workspace)) == unbroken
    assert curve(train(other, workspace)) == unbroken_curves(other) != unbroken


def test_training_on_both_splits_validates_nothing(tiny, demo, cache, tmp_path):
    config = tiny.model_copy(update={"train_on": "train+val", "epochs": 2})
    workspace = Workspace(config, cache)
    checkpoints = Checkpoints(tmp_path / "run")
    results = list(train(config, workspace, checkpoints))
    assert [result.images for result in results] == [380, 380]  # 300 and 80
    assert not any(result.validated for result in results)
    assert all(result.finite and math.isnan(result.val_accuracy) for result in results)
    train_part, val_part = (read_dataset(demo).splits[name].labels for name in ("train", "val"))
    assert np.array_equal(workspace.train_targets.cpu().numpy(), np.concatenate([train_part, val_part]))
    # From the checkpoint, the same again.
    again = list(train(config, workspace, checkpoints))
    assert [r.train_loss for r in again] == [r.train_loss for r in results]


@pytest.mark.parametrize("columns", [[5], [0, 1, 2, 3, 4, 5]])
def test_validation_images_of_attributes_that_no_training_image_has(demo, tiny, tmp_path, columns):
    """They are judged by accuracy; the loss has no weight for them, which is no divergence."""
    data = first_images(demo, tmp_path / "data", train=64, val=9)
    for split, value in (("train", "0"), ("val", "2")):
        path = tmp_path / "data" / "split" / f"{split}_attr.txt"
        rows = [line.split() for line in path.read_text().splitlines()]
        rows = [[value if n in columns else old for n, old in enumerate(row)] for row in rows]
        path.write_text("".join(" ".join(row) + "\n" for row in rows))
    config = tiny.model_copy(update={"data": data, "epochs": 1, "warmup_epochs": 0})
    [result] = train(config, Workspace(config, tmp_path / "cache"))
    assert result.finite
    assert (result.val_loss == 0) == (len(columns) == 6)
    assert result.val_accuracy < 0.5


def test_a_mirror_image_has_its_say(tiny, cache, tmp_path):
    config = tiny.model_copy(update={"precision": "fp32"})  # in bf16 more classes are equal
    workspace = Workspace(config, cache)
    files = ModelFiles(tmp_path / "run", workspace.dataset)
    list(train(config, workspace, keep=files.keep))
    model, dataset = SavedModel(tmp_path / "run" / "last.safetensors"), workspace.dataset
    one, both = (model.predict(dataset, dataset.split("train"), cache, flip) for flip in (False, True))
    assert 0.5 < (one == both).mean() < 1


@pytest.mark.parametrize("frozen_batchnorm", ["eval", "train"])
def test_a_model_file_predicts_what_the_run_predicted(tiny, cache, tmp_path, frozen_batchnorm):
    config = tiny.model_copy(update={"frozen_batchnorm": frozen_batchnorm})
    workspace = Workspace(config, cache)
    files = ModelFiles(tmp_path / "run", workspace.dataset)
    results = list(train(config, workspace, keep=files.keep))
    accuracies = [result.val_accuracy for result in results]
    for name, epoch in (("last", len(results) - 1), ("best", accuracies.index(max(accuracies)))):
        model = SavedModel(tmp_path / "run" / f"{name}.safetensors")
        assert model.config == config
        assert (model.description.epoch, model.description.val_accuracy) == (epoch, accuracies[epoch])
        dataset = workspace.dataset
        classes = model.predict(dataset, dataset.split("val"), cache)
        assert np.array_equal(classes, results[epoch].predictions.classes[0])


def test_a_file_that_is_no_model(tmp_path, demo):
    path = tmp_path / "x.safetensors"
    for content, expected in ((b"", "is an empty file"), (b"\x00" * 90, "cannot be read")):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=expected):
            SavedModel(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="no configuration inside"):
        SavedModel(path)
    save_file({"a": torch.zeros(1)}, path, {"atelier": '{"format": 99}'})
    with pytest.raises(ModelError, match="has format 99, this version reads 1"):
        SavedModel(path)


def test_a_checkpoint_of_another_version(tiny, workspace):
    run = Run(tiny, workspace)
    with pytest.raises(CheckpointError, match="has format 2, this version reads 4"):
        run.load(run.state() | {"format": 2})
    with pytest.raises(CheckpointError, match="with version 1 of the reader of images, this is 2"):
        run.load({key: value for key, value in run.state().items() if key != "reader"})
    with pytest.raises(CheckpointError, match="with version 1 of the training's arithmetic, this is 2"):
        run.load({key: value for key, value in run.state().items() if key != "arithmetic"})


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-40], lambda data: b"no zip"])
def test_damaged_predictions_are_told(tmp_path, damage):
    labels = np.zeros((9, 2), dtype=np.uint8)
    path = tmp_path / "p.npz"
    classes = labels[np.newaxis]
    order = np.arange(9, dtype=np.int32)
    Predictions(labels, classes, classes.astype(np.float16), np.zeros(1, np.int32), order).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"predictions|pickle"):
        Predictions.load(path)


@pytest.mark.parametrize(
    ("backbone", "trainable"),
    [
        ("resnet18", "layer4"),
        ("seresnext50_32x4d", "layer4"),
        ("tf_efficientnet_lite0", "head"),
        ("efficientnet_b0", "blocks.5"),
    ],
)
def test_the_trunk_that_runs_has_no_batchnorm_left_and_says_the_same(tiny, backbone, trainable):
    config = tiny.model_copy(update={"backbone": backbone, "trainable": trainable})
    trunk, _ = load_backbone(config).split(trainable)
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in trunk.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:  # drawn weights have trivial ones
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 1.5, generator=generator)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.uniform_(-0.5, 0.5, generator=generator)
    folded = fold_batchnorm(trunk.eval(), 32)
    assert len(norms) > 5
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    images = torch.randn(4, 3, 96, 96, generator=generator)
    with torch.no_grad():
        expected = trunk(images)
        assert (folded(images) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_steps_as_graphs_change_no_number(tiny, unbroken_curves, tmp_path):
    """On a GPU; on a CPU there are no graphs."""
    config = tiny.model_copy(update={"graphs": "none"})
    assert curve(train(config, Workspace(config, tmp_path))) == curve(unbroken_curves(tiny))


def lengthened(config, workspace, checkpoints, epochs):
    """The folder's run of `config`, with a longer schedule, from its checkpoint on."""
    run = Run(config, workspace, checkpoints)
    run.lengthen(epochs)
    return run


@pytest.mark.parametrize("steps", [16, 15, 8])  # of 15: finished, before the last evaluation, and inside
def test_a_lengthened_run_is_one_whose_rate_jumps_to_the_longer_schedule(
    tiny, cache, tmp_path, monkeypatch, steps
):
    """An unbroken run of 5 epochs whose schedule is another function is the reference."""
    longer, done = tiny.model_copy(update={"epochs": 5}), min(steps, 15) / 5

    def both(position, config):
        return learning_rate(position, tiny if position < done else longer)

    with monkeypatch.context() as patch:
        patch.setattr("trainer.run.learning_rate", both)
        reference = curve(train(longer, Workspace(longer, cache)))
    checkpoints = Checkpoints(tmp_path / "run")
    with closing(train(tiny, Workspace(tiny, cache), checkpoints, after(steps))) as results:
        list(results)
    run = lengthened(tiny, Workspace(tiny, cache), checkpoints, 5)
    # Interrupted again, in the first step of its longer schedule; then it is an ordinary run.
    list(finish(run, checkpoints, after(1)))
    resumed = Run(longer, Workspace(longer, cache), checkpoints)
    assert curve(finish(resumed, checkpoints)) == reference
    assert resumed.lengthened == [Lengthening(before=3, epochs=5, position=done)]
    assert reference != curve(train(longer, Workspace(longer, cache)))


def test_a_run_that_is_lengthened_in_its_warmup_equals_an_unbroken_one(
    tiny, cache, unbroken_curves, tmp_path
):
    longer = tiny.model_copy(update={"epochs": 4})
    checkpoints = Checkpoints(tmp_path / "run")
    assert list(train(tiny, Workspace(tiny, cache), checkpoints, after(4))) == []
    run = lengthened(tiny, Workspace(tiny, cache), checkpoints, 4)
    assert curve(finish(run, checkpoints)) == unbroken_curves(longer)


@pytest.fixture(scope="module")
def parent(cache, tmp_path_factory, demo):
    """Trains a run to its end. Returns the logits of its last epoch, and how others begin with it."""

    def train_to_end(config):
        folder, workspace = tmp_path_factory.mktemp("parent"), Workspace(config, cache)
        run = Run(config, workspace)
        list(finish(run, None, keep=ModelFiles(folder, workspace.dataset).keep))
        model = SavedModel(folder / "last.safetensors")
        attributes = tuple(model.description.attributes)
        return run.evaluate(), Init(folder / "last.safetensors", "its digest", attributes, model.head)

    return train_to_end


@pytest.mark.parametrize("frozen_batchnorm", ["eval", "train"])
def test_a_run_that_begins_with_another_first_predicts_what_that_one_did(
    tiny, cache, parent, frozen_batchnorm
):
    logits, init = parent(tiny.model_copy(update={"frozen_batchnorm": frozen_batchnorm}))
    changes = {"seed": 5, "lr": 0.01, "batch_size": 32, "dropout": 0.1}
    other = tiny.model_copy(update=changes | {"frozen_batchnorm": frozen_batchnorm})
    begun = Run(other, Workspace(other, cache, init=init))
    assert torch.equal(begun.evaluate(), logits)
    assert not begun.optimizer.state_dict()["state"]
    assert (begun.step, begun.history) == (0, [])
    for trainable in ("stem", "layer2", "head"):  # folded elsewhere, which rounds otherwise
        other = tiny.model_copy(update={"trainable": trainable})
        begun = Run(other, Workspace(other, cache, init=init))
        assert torch.allclose(begun.evaluate(), logits, atol=1e-4 * float(logits.abs().max()))
    assert not torch.allclose(Run(tiny, Workspace(tiny, cache)).evaluate(), logits, atol=0.01)


def test_a_run_that_begins_with_another_has_a_new_head_for_other_attributes(
    tiny, demo, cache, parent, tmp_path
):
    _, init = parent(tiny)
    config = tiny.model_copy(update={"data": first_images(demo, tmp_path / "data", train=64, val=9)})
    listing = tmp_path / "data" / "split" / "list_attr_cloth.txt"
    listing.write_text(listing.read_text().replace("floral", "flowery"))
    begun = Run(config, Workspace(config, cache, init=init))
    fresh = Run(config, Workspace(config, cache))
    (stages, head), (drawn, fresh_head) = begun.tail, fresh.tail
    assert equal_states(head, fresh_head)
    assert not equal_states(stages, drawn)


def equal_states(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_of_a_run_that_began_with_another_is_refused_elsewhere(
    tiny, cache, parent, tmp_path
):
    _, init = parent(tiny)
    checkpoints = Checkpoints(tmp_path / "run")
    list(train(tiny, Workspace(tiny, cache, init=init), checkpoints))
    for other in (None, init._replace(digest="another")):
        with pytest.raises(CheckpointError, match="made with init = 'its digest', this run has"):
            Run(tiny, Workspace(tiny, cache, init=other), checkpoints)
