"""Everything that computes, on the device chosen with --device: the part of the suite that CUDA needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import MultiStepLR
from toys import TENTH, batches_of, game_of, streamed, trained

from dau_fast import prune, unlearn
from dau_fast.config import DauConfig
from dau_fast.data.images import Augmentation, Images
from dau_fast.data.sets import join_sets
from dau_fast.data.streaming import StreamedImages
from dau_fast.engine.batches import Batch, index_stream
from dau_fast.engine.chance import generator_for, seeded
from dau_fast.engine.evaluation import predict
from dau_fast.engine.optimizers import sgd
from dau_fast.engine.runtime import Runtime
from dau_fast.engine.training import recompute_batchnorm, train
from dau_fast.models import Classifier, SmallResNet
from dau_fast.ops import apply_masks_, attack_features, barlow_twins_loss, pack_mask


def some_images(device: torch.device) -> Images:
    pixels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    augmentation = Augmentation(pad=2, flip=True)
    images = Images(pixels, torch.randint(0, 4, (40,)), tuple("abcd"), None, mean, std, augmentation)
    return images.to(device)


@pytest.mark.parametrize("c", [2, 10, 1000])
def test_attack_features_agree_with_float64_on_the_cpu(device: torch.device, c: int) -> None:
    logits = torch.randn(33, c, device=device, requires_grad=True)
    features = torch.randn(33, 7, device=device, requires_grad=True)
    weights = torch.randn(33, c + 1, device=device)
    u = attack_features(logits, features, None)
    (u * weights).sum().backward()
    exact_logits, exact_features = (t.detach().double().cpu().requires_grad_() for t in (logits, features))
    exact = attack_features(exact_logits, exact_features, None)
    (exact * weights.double().cpu()).sum().backward()
    pairs = [(u, exact), (logits.grad, exact_logits.grad), (features.grad, exact_features.grad)]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=1e-4, atol=1e-5)


def test_barlow_twins_loss_agrees_with_float64_on_the_cpu(device: torch.device) -> None:
    z_a, z_b = (torch.randn(32, 48, device=device, requires_grad=True) for _ in range(2))
    loss = barlow_twins_loss(z_a, z_b)
    loss.backward()
    e_a, e_b = (z.detach().double().cpu().requires_grad_() for z in (z_a, z_b))
    exact = barlow_twins_loss(e_a, e_b)
    exact.backward()
    for ours, theirs in [(loss, exact), (z_a.grad, e_a.grad), (z_b.grad, e_b.grad)]:
        # A CUDA matrix product in TF32 would miss this by far.
        torch.testing.assert_close(ours.double().cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_masks_zero_what_they_do_not_keep(device: torch.device) -> None:
    weights, keep = torch.randn(1001, device=device), torch.rand(1001, device=device) < 0.3
    expected = torch.where(keep, weights, 0.0)
    apply_masks_([weights], [pack_mask(keep)])
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_plain_batches_are_the_normalised_pixels(device: torch.device) -> None:
    images = some_images(device)
    index = torch.tensor([3, 0, 39], device=device)
    expected = images.pixels[index].double() / 255
    expected = (expected - images.mean.view(-1, 1, 1)) / images.std.view(-1, 1, 1)
    torch.testing.assert_close(images.batch(index).double(), expected, rtol=1e-5, atol=1e-5)


def test_augmented_batches_stay_on_the_device_and_follow_their_generator(device: torch.device) -> None:
    images = some_images(device)
    index = next(index_stream(torch.arange(40, device=device), 16, generator_for(0, "order", device)))
    batches = [images.batch(index, generator_for(1, "augmentation", device)) for _ in range(2)]
    assert batches[0].device.type == device.type
    torch.testing.assert_close(*batches, rtol=0, atol=0)


def test_batches_do_not_wait_for_the_device(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    images, generator = some_images(device), generator_for(1, "augmentation", device)
    index = torch.arange(16, device=device)
    images.batch(index, generator)  # builds the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        images.batch(index, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recomputed_batchnorm_statistics_are_those_of_the_set(device: torch.device) -> None:
    images = some_images(device)
    model = Classifier(SmallResNet(3, 4)).to(device)
    index = torch.arange(40, device=device)
    recompute_batchnorm(model, images.batch, index, batch_size=40)
    first = model.network.stem[0](images.batch(index))
    torch.testing.assert_close(
        model.network.stem[1].running_mean, first.mean((0, 2, 3)), rtol=1e-3, atol=1e-4
    )


def test_bf16_autocast_gives_float32_outputs_near_the_exact_ones(device: torch.device) -> None:
    images, index = some_images(device), torch.arange(40, device=device)
    network = SmallResNet(3, 4).to(device)
    exact = predict(Classifier(network), images.batch, index)
    rounded = predict(Classifier(network, precision=torch.bfloat16), images.batch, index)
    assert rounded.logits.dtype == rounded.features.dtype == torch.float32
    error = (rounded.logits - exact.logits).norm() / exact.logits.norm()
    assert 0 < error < 0.05


def trained_by(engine: str, images: Images, pruned: bool) -> Classifier:
    """Twelve steps with a learning rate that falls on the way."""
    torch.manual_seed(0)
    model = Classifier(SmallResNet(3, 4)).to(images.device)
    masks = prune.random(model.network, 0.5, seed=0) if pruned else None
    optimizer = sgd(model.network, masks, lr=0.1, momentum=0.9, weight_decay=1e-3)
    order = generator_for(0, "order", images.device)
    train(
        model,
        batches_of(images, index_stream(torch.arange(40, device=images.device), 16, order)),
        steps=12,
        optimizer=optimizer,
        scheduler=MultiStepLR(optimizer, [4, 8]),
        runtime=Runtime(images.device, engine=engine),
    )
    return model


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("engine", ["compiled", "captured"])
def test_engines_train_alike(device: torch.device, engine: str, pruned: bool) -> None:
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs CUDA; tests/engine compiles for the CPU")
    images = some_images(device)
    expected, found = (trained_by(name, images, pruned).state_dict() for name in ("eager", engine))
    # Single weights move apart step by step from roundings on.
    for name, value in expected.items():
        difference = (found[name] - value).double().norm() / value.double().norm().clamp_min(1e-12)
        assert difference < 5e-3, name
    if pruned:
        weights = torch.cat([t.flatten() for t in found.values() if t.ndim == 4])
        assert (weights == 0).float().mean().item() == pytest.approx(0.5, abs=1e-3)


def test_a_captured_game_is_the_eager_one_and_never_waits(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a CUDA graph needs CUDA; tests/engine compiles for the CPU")
    config = DauConfig(label_conditioned=True, alpha=0.5, turns=10, batch_size=32)
    task = trained(TENTH, device=device)
    found = []
    for engine in ("eager", "captured"):
        turns: list[int] = []

        def after_turn(turns: list[int] = turns) -> None:
            """The rehearsal waits, and so may what comes after the last turn."""
            turns.append(1)
            torch.cuda.set_sync_debug_mode("error" if len(turns) < 10 else "default")

        runtime = Runtime(device, engine=engine)
        with game_of(replace(task, runtime=runtime), config, turns=10) as players:
            players.warm_up()
            try:
                players.play(after_turn)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len(turns) == 10
        found.append(players.defender.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("engine", ["eager", "captured"])
def test_streamed_images_train_as_those_in_memory(device: torch.device, engine: str) -> None:
    """While steps are captured and replayed, too: batches are then read on a stream of their own."""
    if engine == "captured" and device.type != "cuda":
        pytest.skip("a CUDA graph needs CUDA")
    held = some_images(device)
    seen = []
    for images in (held, streamed(held)):
        task = replace(trained(TENTH, device=device), images=images, runtime=Runtime(device, engine=engine))
        with seeded(0, device):
            model = Classifier(SmallResNet(3, 4)).to(device)
        optimizer = sgd(model.network, None, lr=0.0, momentum=0.9, weight_decay=0.0)
        batches: list[Batch] = []

        def noted(feed: Iterator[Batch], batches: list[Batch] = batches) -> Iterator[Batch]:
            for batch in feed:
                batches.append(Batch(*(tensor.clone() for tensor in batch)))
                yield batch

        train(
            model,
            noted(task.feed("streaming", 16, torch.arange(40, device=device))),
            steps=30,
            optimizer=optimizer,
            scheduler=MultiStepLR(optimizer, []),
            runtime=task.runtime,
        )
        seen.append((batches, predict(model, images, torch.arange(40, device=device), batch_size=7)))
    for one, other in zip(*(batches for batches, _ in seen), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for one, other in zip(*(outputs for _, outputs in seen), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_streamed_images_in_floating_point_are_those_in_memory(device: torch.device) -> None:
    pixels, labels = torch.randn(40, 3, 8, 8), torch.arange(40) % 4
    for images in (pixels, pixels.to(memory_format=torch.channels_last)):
        sets = {"forget": (images[:7], labels[:7]), "retain": (images[7:], labels[7:])}
        held, read = (join_sets(sets, stream, device)[0] for stream in (False, True))
        assert isinstance(read, StreamedImages)
        indices = torch.arange(40, device=device).flip(0).split(6)
        for one, other in zip(held.batches(indices), read.batches(indices), strict=True):
            assert torch.equal(one, other)
            assert (one.stride(), one.device) == (other.stride(), other.device)


@pytest.mark.parametrize("forget", ["random:0.1", "class:3"])
def test_the_main_job_runs(device: torch.device, forget: str, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    arguments = ["--epochs", "10", "--methods", "dau,retrain,ft,ga", "--forget", forget]
    arguments += ["--retrain-recipe", "literature"]
    arguments += ["--device", device.type, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["unlearn", *arguments])
    unlearn.main()
    report = json.loads((out / "report.json").read_text())
    assert report["run"]["device"] == device.type
    assert set(report["methods"]) == {"original", "retrain", "dau", "ft", "ga"}
    if forget == "class:3":
        assert report["methods"]["dau"]["ua"] > 90
    assert report["methods"]["dau"]["ra"] > 90
