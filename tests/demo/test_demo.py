"""The main job: a real, short training on the embedded data, and the parts it is made of."""

from __future__ import annotations

import dataclasses
import json
import random
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from gpusampler import PatchBatchSampler
from gpusampler.demo import speed
from gpusampler.demo.embedded import small_data
from gpusampler.demo.gino import GinoConfig, PatchGino, fast_segment_csr, segment_csr
from gpusampler.demo.head_map import head_map
from gpusampler.demo.job import PICTURE, REPORT, run_demo
from gpusampler.demo.loading import load
from gpusampler.demo.picture import draw
from gpusampler.demo.report import DemoReport, Speed
from gpusampler.demo.stopwatch import Stopwatch, TimedIterable
from gpusampler.demo.train import one_thread
from gpusampler.groundwater import collate_fn
from support.processes import run_python

EPOCHS = 2


@pytest.fixture(scope="module")
def data():
    return load()


def global_state() -> tuple:
    """What a training might leave changed: generators and threads."""
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    torch_state = torch.random.get_rng_state().tolist()
    return numpy_state, torch_state, random.getstate(), torch.get_num_threads()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[DemoReport, Path, tuple, tuple]:
    """The one training of these tests, and the global state before and after it."""
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    before = global_state()
    with pytest.MonkeyPatch.context() as patch:
        # How fast it is matters to one test below, which measures more.
        patch.setattr(speed, "SAMPLES", 16)
        report = run_demo(out=out, epochs=EPOCHS, seed=3, progress=False)
    return report, out, before, global_state()


@pytest.fixture(scope="module")
def demo_run(trained) -> tuple[DemoReport, Path]:
    return trained[:2]


@pytest.fixture
def original():
    return import_module("neuralop.layers.segment_csr").segment_csr


# The job


@pytest.mark.expensive("the one training of the demo")
def test_the_loss_falls(demo_run):
    training = demo_run[0].training
    assert len(training.probe_loss) == EPOCHS + 1
    assert training.probe_loss[0] == training.persistence_loss
    assert training.probe_loss[-1] < 0.95 * training.probe_loss[0]
    assert len(training.batch_loss) == EPOCHS * 54
    assert 0 < training.persistence_loss < 3
    assert 0 < training.head_rmse < 3
    assert 0 < training.head_rmse_persistence < 3


def test_what_was_loaded(demo_run):
    loaded = demo_run[0].loaded
    files = list(small_data().rglob("*.npy"))
    assert loaded.patches == 9 == len(files) // 4
    assert loaded.nbytes == sum(np.load(path).nbytes for path in files)
    assert loaded.points == sum(len(np.load(p)) for p in files if p.name.endswith("coords.npy"))
    assert (loaded.train_samples, loaded.probe_samples, loaded.steps) == (378, 54, 60)


def test_shares_add_up(demo_run):
    shares = demo_run[0].training.shares
    assert set(shares) == {
        "sampler",
        "read",
        "collate",
        "forward",
        "backward",
        "optimizer",
        "other",
    }
    assert sum(shares.values()) == pytest.approx(100, abs=2)
    assert min(shares.values()) >= 0
    assert shares["forward"] + shares["backward"] > 50


@pytest.mark.serial("measures time")
def test_grouped_batches_are_faster(data):
    with one_thread(), fast_segment_csr():
        measured = speed.compare_speed(PatchGino(data), data, progress=False)
    assert measured.samples > 50
    assert measured.repeats == 3
    assert measured.ratio == measured.grouped / measured.single
    assert measured.ratio > 1.5  # 3.5 to 4.2 on a quiet machine


def test_the_batches_are_the_samplers(demo_run, data):
    patches = demo_run[0].training.batch_patches
    ids = data.train.patch_ids
    sampler = PatchBatchSampler(data.train, 8, seed=3)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        assert patches[epoch] == tuple(int(ids[batch[0]]) for batch in sampler)
    assert patches[0] != patches[1]


def test_report_is_json(demo_run):
    report, out = demo_run
    read = json.loads((out / REPORT).read_text())
    assert read == json.loads(json.dumps(dataclasses.asdict(report)))
    assert read["versions"].keys() == {"gpusampler", "torch", "neuraloperator", "numpy", "python"}
    assert read["threads"] == 1


def test_report_as_text(demo_run):
    report, _ = demo_run
    text = report.text()
    for part in (
        "9 patches, 1,266 points",
        "378 to train on, 54 later ones",
        "9 series, known for the forecast step as well",
        f"{report.training.probe_loss[0]:.3f} before",
        f"{report.training.probe_loss[-1]:.3f} after",
        f"persistence {report.training.head_rmse_persistence:.3f} m: ",
        f"{report.speed.ratio:.1f} times as fast",
        "best of 3",
        "forward",
        "index_add",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) < 130


@pytest.mark.parametrize(
    ("rmse", "persistence", "comparison"),
    [(0.1, 0.2, "50% lower"), (0.3, 0.2, "50% higher"), (0.1, 0.0, "exact")],
)
def test_the_text_compares_the_head_error_with_persistence(demo_run, rmse, persistence, comparison):
    report, _ = demo_run
    training = dataclasses.replace(
        report.training, head_rmse=rmse, head_rmse_persistence=persistence
    )
    text = dataclasses.replace(report, training=training).text()
    assert (
        f"{rmse:.3f} m (root mean square, held out), persistence {persistence:.3f} m: {comparison}"
        in text
    )


def test_picture_is_a_real_png(demo_run):
    from matplotlib.image import imread

    path = demo_run[1] / PICTURE
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = imread(path)
    assert image.shape[0] > 500
    assert image.shape[1] > 900
    # Many colours in each quarter: the maps, the curve and the strips were drawn.
    half, middle = image.shape[0] // 2, image.shape[1] // 2
    for rows in (slice(None, half), slice(half, None)):
        for columns in (slice(None, middle), slice(middle, None)):
            colours = np.unique(
                (image[rows, columns, :3] * 255).astype(np.uint8).reshape(-1, 3), axis=0
            )
            assert len(colours) > 50


def test_picture_of_many_patches_without_a_grid(demo_run, data, tmp_path):
    report, _ = demo_run
    training = dataclasses.replace(
        report.training, batch_patches=tuple(tuple(range(e, e + 150)) for e in range(6))
    )
    rng = np.random.default_rng(0)
    heads = head_map(PatchGino(data), data)
    count = len(heads.x)
    heads = dataclasses.replace(heads, x=rng.uniform(0, 9, count), y=rng.uniform(0, 5, count))
    draw(dataclasses.replace(report, training=training), heads, tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 20_000


@pytest.mark.slow("trains three times")
def test_the_same_seed_gives_the_same_training(data):
    from gpusampler.demo.train import one_thread, train

    def losses(seed: int) -> tuple[float, ...]:
        with one_thread(), fast_segment_csr():
            model = PatchGino(data, seed=seed)
            return train(model, data, epochs=1, batch_size=32, seed=seed, progress=False).batch_loss

    first = losses(5)
    assert losses(5) == first
    assert losses(6) != first


def test_global_state_is_left_alone(trained):
    *_, before, after = trained
    assert before == after


def test_bad_arguments(data):
    with pytest.raises(ValueError, match="epochs must be >= 1, got 0"):
        run_demo(data, epochs=0, progress=False)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        run_demo(data, batch_size=0, progress=False)
    with pytest.raises(FileNotFoundError, match="root must be an existing folder"):
        run_demo("nowhere")


def test_divergence_in_training_is_an_error(data, monkeypatch):
    from gpusampler.demo import train as training

    original = training.batch_loss
    monkeypatch.setattr(training, "batch_loss", lambda *args: original(*args) * float("nan"))
    with (
        fast_segment_csr(),
        pytest.raises(FloatingPointError, match="training diverged: the loss is nan at batch"),
    ):
        training.train(PatchGino(data), data, epochs=1, progress=False)


def test_divergence_is_an_error(data):
    from gpusampler.demo.train import train

    model = PatchGino(data)
    with torch.no_grad():
        next(model.net.parameters()).fill_(float("nan"))
        for weight in model.net.projection.fcs[-1].parameters():
            weight.fill_(1.0)
    with (
        fast_segment_csr(),
        pytest.raises(FloatingPointError, match="errors on the probe set"),
    ):
        train(model, data, epochs=1, batch_size=64, progress=False)


# The head map


def test_head_map_shows_the_files_heads(data):
    with fast_segment_csr():
        heads = head_map(PatchGino(data), data)
    largest = max(data.held_out.patches, key=lambda patch: patch.core)
    assert heads.patch_id == largest.patch_id
    assert heads.step == 59
    coords = np.load(largest.path / "core_coords.npy")
    obs = np.load(largest.path / "core_obs.npy")
    head_at = {(x, y): h for x, y, h in zip(heads.x, heads.y, heads.observed, strict=True)}
    assert len(head_at) == len(np.unique(coords[:, :2], axis=0))
    for (x, y), head in head_at.items():
        column = np.flatnonzero((coords[:, 0] == x) & (coords[:, 1] == y))
        top = column[coords[column, 2].argmax()]
        assert head == pytest.approx(obs[59, top, 1], abs=1e-3)


# segment_csr


def runs(seed: int, batched: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (30,), generator=generator)
    counts[[0, 7, 29]] = 0  # empty runs, at both ends too
    splits = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    shape = (3, int(splits[-1]), 4) if batched else (int(splits[-1]), 4)
    rows = torch.randn(shape, generator=generator)
    return rows, splits.expand(3, -1) if batched else splits


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("batched", [False, True])
def test_segment_csr_equals_the_original(original, reduction, batched):
    for seed in range(5):
        rows, splits = runs(seed, batched)
        fast_rows, original_rows = rows.clone().requires_grad_(), rows.clone().requires_grad_()
        out = segment_csr(fast_rows, splits, reduction, use_scatter=False)
        expected = original(original_rows, splits, reduction, use_scatter=False)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
        (out * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(fast_rows.grad, original_rows.grad, rtol=1e-6, atol=1e-6)


def test_segment_csr_refuses_other_reductions():
    rows, splits = runs(0, False)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        segment_csr(rows, splits, "max")


def test_a_whole_gino_step_is_the_same(data):
    batch = collate_fn([data.train[0], data.train[1]])

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        model = PatchGino(data, seed=1)
        for weight in model.net.projection.fcs[-1].parameters():
            torch.nn.init.constant_(weight, 0.1)  # the demo starts at 0, which would hide all
        out = model(batch)
        out.square().mean().backward()
        return out.detach(), [p.grad for p in model.net.parameters() if p.grad is not None]

    out, gradients = step()
    with fast_segment_csr():
        fast_out, fast_gradients = step()
    assert out.abs().max() > 0.01
    torch.testing.assert_close(fast_out, out, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(fast_gradients) > 20
    for slow, fast in zip(gradients, fast_gradients, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


def test_the_original_is_restored(original):
    module = import_module("neuralop.layers.integral_transform")
    assert module.segment_csr is original
    with fast_segment_csr():
        assert module.segment_csr is segment_csr
    assert module.segment_csr is original
    with pytest.raises(RuntimeError, match="stop"), fast_segment_csr():
        raise RuntimeError("stop")
    assert module.segment_csr is original


@pytest.mark.slow("imports neuralop in a process of its own")
def test_importing_neuralop_leaves_warning_filters_alone():
    # On import neuralop has every UserWarning shown once, over the caller's own filters.
    code = (
        "import warnings\n"
        "from gpusampler.demo.gino import PatchGino\n"
        "from gpusampler.demo.loading import load; PatchGino(load())\n"
        "assert all(action != 'once' for action, *_ in warnings.filters), warnings.filters"
    )
    run_python("-c", code)


# The model, the clock, the report


def test_model_shapes(monkeypatch):
    monkeypatch.setattr("gpusampler.demo.loading.OUTPUTS", 2)
    data = load()
    batch = collate_fn([data.train[i] for i in range(3)])
    model = PatchGino(data, config=GinoConfig(hidden=4, grid=4, modes=2))
    with fast_segment_csr():
        assert model(batch).shape == (3, 2, batch["core_coords"].shape[1], 3)


def test_the_untrained_model_forecasts_no_change(data):
    sample = data.held_out[-1]
    with fast_segment_csr():
        forecast = PatchGino(data, seed=2)(collate_fn([sample]))
    assert torch.equal(forecast[0], sample["core_in"][-1:])


def test_the_model_answers_to_the_forcing_of_the_forecast_step(data):
    model = PatchGino(data)
    torch.nn.init.constant_(model.net.projection.fcs[-1].weight, 0.1)
    batch = collate_fn([data.train[0]])
    with fast_segment_csr(), torch.no_grad():
        before = model(batch)
        batch["forcing"][:, 1] += 1.0
        assert (model(batch) - before).abs().max() > 0.01


@pytest.mark.slow("the demo's whole training")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_trained_model_beats_persistence(data, seed):
    from gpusampler.demo.train import one_thread, train

    with one_thread(), fast_segment_csr():
        training = train(PatchGino(data, seed=seed), data, seed=seed, progress=False)
    assert training.head_gain > 1 / 3


# The data


def test_windows_have_the_forcing_and_the_location_of_their_points(data):
    table = np.loadtxt(small_data() / "forcing.csv", delimiter=",", skiprows=1)
    scaled = (table - table[:48].mean(0)) / table[:48].std(0)
    for dataset, row in ((data.train, 5), (data.held_out, 53)):
        samples = dataset.__getitems__([0, 1, -1])
        last = row + dataset.windows.count - 1
        for sample, first in zip(samples, (row, row + 1, last), strict=True):
            np.testing.assert_allclose(sample["forcing"], scaled[first : first + 2], atol=1e-5)
    assert data.num_forcing == 9
    everywhere = [data.train[i]["location"] for i in range(0, len(data.train), 42)]
    points = torch.cat(everywhere)
    torch.testing.assert_close(points.amin(0), torch.full((3,), -1.0))
    torch.testing.assert_close(points.amax(0), torch.ones(3))
    assert everywhere[0].amax(0)[0] < 1  # one patch is not the domain


def test_the_spread_of_changes_is_that_of_the_training_windows(data):
    mean_square, count = torch.zeros(3, dtype=torch.float64), 0
    for patch in data.train.patches:
        obs = torch.from_numpy(np.load(patch.path / "core_obs.npy")).double()
        change = (obs[6:48] - obs[5:47]) / torch.tensor(data.normalize.std)
        mean_square += change.square().sum((0, 1))
        count += change[..., 0].numel()
    expected = (mean_square / count).sqrt().float()
    torch.testing.assert_close(data.change_std, expected, rtol=1e-4, atol=0)


def patch_folder(root: Path, steps: int) -> Path:
    rng = np.random.default_rng(0)
    folder = root / "patch_0"
    folder.mkdir()
    for prefix in ("core", "ghost"):
        np.save(folder / f"{prefix}_coords.npy", rng.uniform(size=(2, 3)))
        np.save(folder / f"{prefix}_obs.npy", rng.normal(size=(steps, 2, 3)))
    return root


@pytest.mark.slow("trains once more")
def test_a_folder_without_forcing_is_trained_on(tmp_path):
    data = load(patch_folder(tmp_path, 60))
    assert data.num_forcing == 0
    assert data.train[0]["forcing"].shape == (2, 0)
    report = run_demo(data, epochs=1, progress=False)
    assert "0 series" in report.text()


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (["1"] * 59, r"forcing\.csv must have one row per time step, 60, got 59"),
        (["1"] * 59 + ["nan"], r"forcing\.csv must hold finite numbers, got NaN or infinity"),
    ],
)
def test_bad_forcing_is_an_error(tmp_path, rows, text):
    (patch_folder(tmp_path, 60) / "forcing.csv").write_text("\n".join(["recharge", *rows]))
    with pytest.raises(ValueError, match=text):
        load(tmp_path)


def test_constant_forcing_is_no_information(tmp_path):
    (patch_folder(tmp_path, 60) / "forcing.csv").write_text("\n".join(["recharge", *["2"] * 60]))
    assert not load(tmp_path).train.forcing.any()


def test_samples_of_a_batch_do_not_mix(data):
    model = PatchGino(data)
    torch.nn.init.constant_(model.net.projection.fcs[-1].weight, 0.1)
    samples = [data.train[i] for i in range(3)]
    with fast_segment_csr(), torch.no_grad():
        together = model(collate_fn(samples))
        alone = torch.cat([model(collate_fn([sample])) for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_stopwatch_counts_inner_phases_once(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0])
    monkeypatch.setattr("gpusampler.demo.stopwatch.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch.phase("outer"), watch.phase("inner"):
        pass
    assert watch.seconds == {"inner": 3.0, "outer": 7.0}
    assert watch.shares() == {"outer": 70.0, "inner": 30.0}


def test_stopwatch_without_phases():
    with pytest.raises(ValueError, match="no phase has been timed"):
        Stopwatch().shares()


def test_timed_iterable_is_the_iterable():
    watch = Stopwatch()
    timed = TimedIterable([[1, 2], [3]], watch, "sampler")
    assert list(timed) == list(timed) == [[1, 2], [3]]
    assert len(timed) == 2
    assert set(watch.seconds) == {"sampler"}
    with pytest.raises(TypeError, match="the iterable must have a length"):
        len(TimedIterable(iter([1]), watch, "x"))


def test_speed_ratio():
    assert Speed(grouped=300.0, single=75.0, samples=9, repeats=3).ratio == 4.0


def test_a_large_probe_is_thinned(tmp_path):
    probe = load(patch_folder(tmp_path, 3000)).probe
    assert len(probe) == 256
    assert probe.indices[0] == 0
    assert probe.indices[-1] == len(probe.dataset) - 1
    assert len(set(probe.indices)) == 256
