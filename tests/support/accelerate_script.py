"""Run under torchrun, or alone, by test_accelerate.py: writes what each process saw as JSON.

Nothing is judged here. ``python accelerate_script.py OUT`` writes OUT/<rank>.json.
"""

from __future__ import annotations

import faulthandler
import functools
import json
import math
import sys
import traceback
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from gpusampler import PatchBatchSampler, PatchTensorLoader

IDS = np.repeat([3, 1, 2, 9], [9, 14, 7, 5])
SEED = 4
EPOCH = 2
"""The epoch that runs are broken off in: one that a new loader would not begin with."""

warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)
# Each process makes the sampler before there is a group: nothing tells it of other ranks.
SAMPLER_BEFORE_GROUP = PatchBatchSampler(IDS, 4, seed=SEED)
ACCELERATOR = Accelerator(cpu=True)
WORLD, RANK = ACCELERATOR.num_processes, ACCELERATOR.process_index
OUT = Path(sys.argv[1])


class Rows(Dataset):
    """Rows that say who they are."""

    def __len__(self):
        return IDS.size

    def __getitem__(self, i):
        x = torch.tensor([1.0, math.sin(i), math.cos(3 * i)])
        return {"row": i, "patch": int(IDS[i]), "x": x}


class Blocks(Rows):
    def __getitems__(self, rows):
        return [self[int(row)] for row in rows]


def accelerator_of(**settings) -> Accelerator:
    return Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**settings))


def unsharded(batch_size=4, partial="keep", **settings) -> PatchBatchSampler:
    """A sampler that leaves the sharding to Accelerate."""
    return PatchBatchSampler(
        IDS, batch_size, seed=SEED, partial=partial, num_replicas=1, rank=0, **settings
    )


def sharded(batch_size=4, partial="keep", **settings) -> PatchBatchSampler:
    """A sampler that takes its ranks from the process group."""
    sampler = PatchBatchSampler(IDS, batch_size, seed=SEED, partial=partial, **settings)
    assert (sampler.num_replicas, sampler.rank) == (WORLD, RANK)
    return sampler


def loader_of(sampler, dataset=None, **settings) -> DataLoader:
    return DataLoader(dataset or Rows(), batch_sampler=sampler, **settings)


def rows_of(loader) -> list[list[int]]:
    return [batch["row"].tolist() for batch in loader]


def outcome_of(run) -> dict:
    """What a run came to, or the error it ended with; every process ends alike."""
    try:
        return {"found": run()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def sharded_by_accelerate():
    results = {}
    cases = [
        *product([4], ["keep", "drop", "pad"], [False, True], [True, False], [None, True]),
        *product([3], ["pad"], [False, True], [True], [None, True]),
    ]
    for batch_size, partial, split, even, dispatch in cases:
        settings = {"split_batches": split, "even_batches": even, "dispatch_batches": dispatch}
        sampler = unsharded(batch_size, partial)
        case = f"{batch_size} {partial} split={split} even={even} dispatch={dispatch}"
        results[case] = outcome_of(functools.partial(prepared_rows, sampler, settings))
    return results


def prepared_rows(sampler, settings):
    loader = accelerator_of(**settings).prepare(loader_of(sampler))
    return {"len": len(loader), "batches": rows_of(loader)}


def arrays_under_even_batches():
    """The truth of an array, which Accelerate asks for at the end of an odd epoch."""
    return {
        output: outcome_of(
            lambda output=output: rows_of(
                accelerator_of().prepare(loader_of(unsharded(output=output), Blocks()))
            )
        )
        for output in ("list", "numpy", "tensor")
    }


def made_before_the_group():
    return rows_of(accelerator_of().prepare(loader_of(SAMPLER_BEFORE_GROUP)))


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.1, -0.2, 0.3]]))
            self.linear.bias.zero_()

    def forward(self, x):
        return self.linear(x)


def training(accelerator):
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return accelerator.prepare(model, optimizer)


def train_batch(accelerator, model, optimizer, batch) -> tuple[list[int], float]:
    loss = (model(batch["x"]).squeeze(1) - batch["row"] / 10).square().mean()
    optimizer.zero_grad()
    accelerator.backward(loss)
    optimizer.step()
    return batch["row"].tolist(), loss.item()


def weights_of(accelerator, model) -> list[float]:
    return [
        value
        for parameter in accelerator.unwrap_model(model).parameters()
        for value in parameter.flatten().tolist()
    ]


def sharded_natively():
    results = {}
    for partial in ("keep", "drop", "pad"):
        accelerator = accelerator_of()
        sampler = sharded(partial=partial)
        loader = loader_of(sampler)
        model, optimizer = training(accelerator)
        epochs, steps = [], 0
        for epoch in range(2):
            sampler.set_epoch(epoch)
            outcomes = [train_batch(accelerator, model, optimizer, batch) for batch in loader]
            epochs.append([rows for rows, _ in outcomes])
            steps += len(outcomes)
        results[partial] = {
            "len": len(loader),
            "epochs": epochs,
            "weights": weights_of(accelerator, model),
        }
    return results


class Limit:
    """A batch sampler of one's own around ours."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __iter__(self):
        yield from self.sampler

    def __len__(self):
        return 3


def sharded_twice():
    def prepared(partial="keep", wrap=lambda loader: loader, around=None, **settings):
        sampler = sharded(partial=partial)
        loader = wrap(loader_of(around(sampler) if around else sampler))
        return accelerator_of(**settings).prepare(loader)

    def skip(loader):
        return ACCELERATOR.skip_first_batches(loader, 1)

    cases = {
        "as it comes": prepared,
        "batches of one size": lambda: prepared("pad"),
        "split": lambda: prepared("pad", split_batches=True),
        "uneven": lambda: prepared(even_batches=False),
        "dispatched": lambda: prepared("pad", dispatch_batches=True),
        "dispatched and split": lambda: prepared("pad", dispatch_batches=True, split_batches=True),
        "stateful": lambda: prepared(use_stateful_dataloader=True),
        "skipped after": lambda: skip(prepared()),
        "skipped before": lambda: prepared(wrap=skip),
        "wrapped": lambda: prepared(around=Limit),
    }
    calls = {"iter": rows_of, "len": len}
    results = {
        f"{case}, {call_name}": outcome_of(lambda make=make, ask=ask: ask(make()))
        for (case, make), (call_name, ask) in product(cases.items(), calls.items())
    }
    # Here only the first process draws, and the others would wait for it for ever.
    results["skipped after, dispatched, len"] = outcome_of(
        lambda: len(skip(prepared("pad", dispatch_batches=True)))
    )
    return results


class Asks(Rows):
    """Its rows iterate over a sampler of their own, in the middle of whoever asks for them."""

    def __getitem__(self, i):
        sampler = PatchBatchSampler(IDS, 4, seed=SEED, num_replicas=2, rank=0)
        return {**super().__getitem__(i), "other": sum(map(len, sampler)) + len(sampler)}


def not_sharded_twice():
    def own(partial="keep"):
        sampler = sharded(partial=partial)
        sampler.set_epoch(EPOCH)
        return loader_of(sampler)

    def one_process():
        # Somebody else's two ranks, through the same classes.
        sampler = PatchBatchSampler(IDS, 4, seed=SEED, num_replicas=2, rank=RANK)
        sampler.set_epoch(EPOCH)
        return prepare_data_loader(loader_of(sampler), num_processes=1, process_index=0)

    def of_one(loader, **settings):
        loader = accelerator_of(**settings).prepare(loader)
        loader.set_epoch(EPOCH)
        return loader

    cases = {
        "not prepared": own,
        "not prepared, skipped": lambda: ACCELERATOR.skip_first_batches(own(), 2),
        "one process": one_process,
        "prepared": lambda: of_one(loader_of(unsharded())),
        "prepared, skipped": lambda: ACCELERATOR.skip_first_batches(
            of_one(loader_of(unsharded())), 2
        ),
        "dispatched": lambda: of_one(loader_of(unsharded(partial="pad")), dispatch_batches=True),
        "stateful": lambda: of_one(loader_of(unsharded()), use_stateful_dataloader=True),
        "asked within": lambda: of_one(loader_of(unsharded(partial="pad"), Asks())),
        "asked within, dispatched": lambda: of_one(
            loader_of(unsharded(partial="pad"), Asks()), dispatch_batches=True
        ),
    }

    def asked(make):
        # A length only after the run, which binds the epoch.
        loader = make()
        return {"batches": rows_of(loader), "len": len(loader)}

    return {case: outcome_of(lambda make=make: asked(make)) for case, make in cases.items()}


def epochs_reach_the_sampler():
    results = {}
    for loader_kind, settings in {
        "plain": {},
        "stateful": {"use_stateful_dataloader": True},
        "dispatched": {"dispatch_batches": True},
    }.items():
        sampler = unsharded(partial="pad")
        loader = accelerator_of(**settings).prepare(loader_of(sampler))
        loader.set_epoch(7)
        told_seven = sampler.epoch
        first = [rows_of(loader), rows_of(loader)]
        loader.set_epoch(0)
        results[loader_kind] = {"epoch": told_seven, "seven": first, "zero": rows_of(loader)}
    loader = accelerator_of().prepare(loader_of(unsharded()))
    loader.set_epoch(EPOCH)
    rows_of(ACCELERATOR.skip_first_batches(loader, 1))
    results["not told after a skip"] = rows_of(loader)
    # A new loader begins with epoch 0, whatever the sampler was told.
    sampler = unsharded()
    sampler.set_epoch(7)
    results["told past the loader"] = rows_of(accelerator_of().prepare(loader_of(sampler)))
    return results


class Counted(Rows):
    """Counts what is read."""

    read = 0

    def __getitem__(self, i):
        self.read += 1
        return super().__getitem__(i)


def read_by_a_skip():
    results = {}
    for loader_kind in ("prepared", "native"):
        dataset = Counted()
        if loader_kind == "native":
            loader = loader_of(sharded(), dataset)
        else:
            loader = accelerator_of().prepare(loader_of(unsharded(), dataset))
        remaining_rows = rows_of(ACCELERATOR.skip_first_batches(loader, 3))
        results[loader_kind] = {"read": dataset.read, "handed out": sum(map(len, remaining_rows))}
    return results


def middle_state() -> dict:
    sampler = unsharded()
    sampler.set_epoch(EPOCH)
    return sampler.state_dict(step=WORLD)


def loaded_states():
    """A state that was loaded, and a loader that begins with epoch 0 or is told the epoch."""
    results = {}
    for epoch in (None, EPOCH, 0):
        sampler = unsharded()
        sampler.load_state_dict(middle_state())
        loader = accelerator_of().prepare(loader_of(sampler))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if epoch is not None:
                loader.set_epoch(epoch)
            rows = rows_of(loader)
        messages = [
            str(warning.message) for warning in caught if "drops the loaded" in str(warning.message)
        ]
        results[str(epoch)] = {"rows": rows, "warned": messages}
    return results


class Position:
    """What a run that skips batches must remember."""

    def __init__(self):
        self.epoch = self.step = 0

    def state_dict(self):
        return {"epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state):
        self.epoch, self.step = state["epoch"], state["step"]


def skipping_run(source, stop, folder):
    """A script that skips batches.

    ``source``: the folder that it goes on from; ``stop``: the step of `EPOCH` that it ends with.
    """
    accelerator = accelerator_of()
    sampler = unsharded()
    model, optimizer = training(accelerator)
    loader = accelerator.prepare(loader_of(sampler))
    progress = Position()
    accelerator.register_for_checkpointing(progress)
    if source:
        accelerator.load_state(source)
    outcomes = []
    for epoch in range(progress.epoch, EPOCH + 2):
        loader.set_epoch(epoch)
        remaining_loader = (
            accelerator.skip_first_batches(loader, progress.step) if progress.step else loader
        )
        for batch in remaining_loader:
            outcomes.append(train_batch(accelerator, model, optimizer, batch))
            progress.step += 1
            if epoch == EPOCH and progress.step == stop:
                accelerator.save_state(folder)
                return outcomes, None
        progress.epoch, progress.step = epoch + 1, 0
    return outcomes, weights_of(accelerator, model)


class Drawn:
    """The sampler's position after the batches that were trained on."""

    def __init__(self, sampler):
        self.sampler, self.step = sampler, 0

    def state_dict(self):
        return self.sampler.state_dict(step=self.step)

    def load_state_dict(self, state):
        self.sampler.load_state_dict(state)


def native_run(source, stop, folder):
    """A script that shards natively, with workers ahead of it; it counts the steps of a pass."""
    accelerator = accelerator_of()
    sampler = sharded()
    loader = loader_of(sampler, num_workers=1, multiprocessing_context="fork")
    model, optimizer = training(accelerator)
    drawn = Drawn(sampler)
    accelerator.register_for_checkpointing(drawn)
    if source:
        accelerator.load_state(source)
    outcomes = []
    for epoch in range(sampler.epoch, EPOCH + 2):
        sampler.set_epoch(epoch)
        drawn.step = 0
        for batch in loader:
            outcomes.append(train_batch(accelerator, model, optimizer, batch))
            drawn.step += 1
            if epoch == EPOCH and drawn.step == stop:
                accelerator.save_state(folder)
                return outcomes, None
    return outcomes, weights_of(accelerator, model)


def stateful_native_run(source, stop, folder):
    """The same with torchdata's loader, which is a thing to register itself."""
    accelerator = accelerator_of()
    sampler = sharded()
    loader = StatefulDataLoader(
        Rows(), batch_sampler=sampler, num_workers=1, multiprocessing_context="fork"
    )
    model, optimizer = training(accelerator)
    accelerator.register_for_checkpointing(loader)
    if source:
        accelerator.load_state(source)
    outcomes = []
    # A pass that was broken off after its last batch goes on with no batch.
    for epoch in range(EPOCH if source else 0, EPOCH + 2):
        sampler.set_epoch(epoch)
        for step, batch in enumerate(loader, 1):
            outcomes.append(train_batch(accelerator, model, optimizer, batch))
            if epoch == EPOCH and step == stop:
                accelerator.save_state(folder)
                return outcomes, None
    return outcomes, weights_of(accelerator, model)


def stateful_run(source, stop, folder, tell_epoch=True):
    """Accelerate's own way: use_stateful_dataloader."""
    accelerator = accelerator_of(use_stateful_dataloader=True)
    model, optimizer = training(accelerator)
    loader = accelerator.prepare(loader_of(unsharded()))
    begin = 0
    if source:
        accelerator.load_state(source)
        # Only the script knows: a loader that had handed out its last batch begins a new epoch.
        begin = EPOCH + source.endswith(f" {len(loader)}")
    outcomes = []
    for epoch in range(begin, EPOCH + 2):
        if tell_epoch or epoch > begin:
            loader.set_epoch(epoch)
        for step, batch in enumerate(loader, 1):
            outcomes.append(train_batch(accelerator, model, optimizer, batch))
            if epoch == EPOCH and step == stop:
                accelerator.save_state(folder)
                return outcomes, None
    return outcomes, weights_of(accelerator, model)


RUNS = {
    "skipping": skipping_run,
    "native": native_run,
    "stateful, native": stateful_native_run,
    "stateful, prepared": stateful_run,
}


def saved(run, source, stop, folder) -> list:
    outcomes, _ = run(source, stop, folder)
    # What one process writes is there before any other reads it.
    ACCELERATOR.wait_for_everyone()
    return outcomes


def resumed():
    steps = -(-unsharded().plan.num_batches // WORLD)
    results = {}
    for name, run in RUNS.items():
        results[name] = {"straight": run(None, None, ""), "stopped": {}}
        for stop in (1, steps // 2, steps - 1, steps):
            folder = str(OUT / f"{name} {stop}")
            before = saved(run, None, stop, folder)
            results[name]["stopped"][stop] = [before, run(folder, None, "")]
    return results


def resumed_twice():
    """Two more steps of a pass that goes on after its first; steps are counted as each run does."""
    results = {}
    for name, more in {"skipping": 3, "native": 2}.items():
        run, folder = RUNS[name], str(OUT / f"{name} twice")
        between = saved(run, str(OUT / f"{name} 1"), more, folder)
        results[name] = [between, run(folder, None, "")]
    return results


def not_told_the_epoch():
    return stateful_run(str(OUT / "stateful, prepared 1"), None, "", tell_epoch=False)[0]


def looked_ahead():
    """The sampler's own state in the middle of a prepared loader, and by counting."""
    sampler = unsharded()
    loader = accelerator_of().prepare(loader_of(sampler))
    batches = iter(loader)
    for _ in range(2):
        next(batches)
    return {
        "drawn": sampler.state_dict()["slot"],
        "trained": sampler.state_dict(step=2 * WORLD)["slot"],
    }


def gathered():
    results = {}
    for loader_kind, partial in product(("prepared", "native"), ("pad", "keep")):
        accelerator = accelerator_of()
        if loader_kind == "native":
            loader = loader_of(sharded(partial=partial))
        else:
            loader = accelerator.prepare(loader_of(unsharded(partial=partial)))
        metrics, objects, losses = [], [], torch.full((IDS.size,), -1.0)
        for batch in loader:
            rows = batch["row"]
            if partial == "pad":
                metrics += accelerator.gather_for_metrics(rows).tolist()
            else:
                objects += accelerator.gather_for_metrics(rows.tolist(), use_gather_object=True)
                rows = accelerator.pad_across_processes(rows, pad_index=-1)
            rows = accelerator.gather(rows)
            rows = rows[rows >= 0]
            losses[rows] = rows * 2.0
        results[f"{loader_kind} {partial}"] = {
            "metrics": metrics,
            "objects": objects,
            "table": losses.tolist(),
        }
    return results


def accumulated():
    """On which steps of two epochs gradients are let through, four to be accumulated."""
    results = {}
    for loader_kind in ("prepared", "native"):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        model, optimizer = training(accelerator)
        if loader_kind == "native":
            sampler = sharded()
            loader = loader_of(sampler)
        else:
            sampler = unsharded()
            loader = accelerator.prepare(loader_of(sampler))
        synced = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            for batch in loader:
                with accelerator.accumulate(model):
                    train_batch(accelerator, model, optimizer, batch)
                    synced.append(accelerator.sync_gradients)
        results[loader_kind] = [step for step, sync in enumerate(synced, 1) if sync]
    return results


def tensor_loaders_pass_through():
    x = torch.arange(IDS.size)
    sampler = sharded()
    loader = PatchTensorLoader(sampler, x=x)
    prepared = accelerator_of().prepare(loader)
    return {"same": prepared is loader, "rows": [batch["x"].tolist() for batch in prepared]}


SCENARIOS = [
    sharded_by_accelerate,
    arrays_under_even_batches,
    made_before_the_group,
    sharded_natively,
    sharded_twice,
    not_sharded_twice,
    epochs_reach_the_sampler,
    read_by_a_skip,
    loaded_states,
    resumed,
    resumed_twice,
    not_told_the_epoch,
    looked_ahead,
    gathered,
    accumulated,
    tensor_loaders_pass_through,
]

if __name__ == "__main__":
    # Where each process waits, should one of them wait for ever.
    faulthandler.dump_traceback_later(240, exit=True)
    torch.set_num_threads(1)
    results = {"world": WORLD, "rank": RANK, "ids": IDS.tolist(), "seed": SEED, "epoch": EPOCH}
    for scenario in SCENARIOS:
        try:
            results[scenario.__name__] = scenario()
        except BaseException:
            print(f"rank {RANK}, {scenario.__name__}\n{traceback.format_exc()}", flush=True)
            raise
    (OUT / f"{RANK}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.barrier()
    ACCELERATOR.end_training()
