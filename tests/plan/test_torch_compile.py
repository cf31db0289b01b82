"""plan.batch: a batch of tensors alone, in one graph that serves a whole run."""

from __future__ import annotations

import warnings
from collections import Counter
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpusampler import CostBudget, EpochPlan, PatchBatchSampler, PatchGroups
from gpusampler.permutation.reference import MIX_1, MIX_2, SMALL, rounds_for
from support.strategies import epochs, patchy_ids, plan_settings, seeds

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

ZERO = torch.zeros((), dtype=torch.int64)


def number(value: int) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.int64)


def plan_of(ids, seed: int, **settings) -> EpochPlan:
    """A plan on torch's CPU, of ids or of the sizes of patches that lie side by side."""
    made = PatchGroups.from_ids if isinstance(ids, np.ndarray) else PatchGroups.from_counts
    return EpochPlan(made(ids), seed=seed, device="cpu", **settings)


def shuffled_ids(counts) -> np.ndarray:
    """Patch ids in no order, so that samples are looked up: int32 numbers of them."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


def assert_batch_equal(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert result.dtype == torch.int64
    assert result.tolist() == expected.tolist()


# ---------------------------------------------------------------------------------------------
# Without a compiler


@given(data=st.data(), seed=seeds, epoch=epochs)
def test_any_batch_is_that_of_evaluate(data, seed, epoch):
    ids = data.draw(patchy_ids())
    plan = plan_of(ids, seed, **data.draw(plan_settings(ids, steps_of=1)))
    whole = plan.evaluate(epoch, range(plan.num_batches))
    slots = data.draw(st.sets(st.integers(0, plan.num_batches - 1), max_size=4))
    for slot in {0, plan.num_batches - 1, *slots}:
        assert_batch_equal(plan.batch(number(epoch), number(slot)), whole.indices[slot])
        block = plan.evaluator.batch(number(epoch), number(slot))
        assert [part.dim() for part in block] == [1, 0, 0]
        assert [part.tolist() for part in block] == [part[slot].tolist() for part in whole]


@pytest.mark.parametrize("gathered", [False, True])
def test_batches_of_patches_of_every_number_of_rounds(gathered):
    counts = [65_536, 1024, 65_535, 1023, 128, 127, 33, 32, 70_001]
    ids = shuffled_ids(counts) if gathered else counts
    plan = plan_of(ids, 2**64 - 1, batch_size=9_000, partial="pad")
    assert (plan.groups.order is not None) == gathered
    assert not gathered or plan.groups.order.dtype == np.int32
    epoch = 2**63 - 1
    whole = plan.evaluate(epoch, range(plan.num_batches))
    assert set(whole.groups.tolist()) == set(range(len(counts)))
    for slot in range(plan.num_batches):
        result = plan.batch(number(epoch), number(slot))
        assert torch.equal(result, whole.indices[slot])


# ---------------------------------------------------------------------------------------------
# Compiled


class PlanCase(NamedTuple):
    """Patches and settings that lead to a graph of its own."""

    counts: list[int]
    settings: dict[str, Any]
    gathered: bool = False

    def plan(self, seed: int) -> EpochPlan:
        settings = {"batch_size": 7, "partial": "pad", **self.settings}
        return plan_of(
            shuffled_ids(self.counts) if self.gathered else self.counts, seed, **settings
        )


def of_classes(counts: list[int]) -> CostBudget:
    """A budget by which patches are cut into cost bins."""
    return CostBudget(60, sample_costs=np.arange(sum(counts)) % 13 + 1)


SMALL_ONLY, LARGE_ONLY, MIXED = [5, 32, 1, 17], [33, 40, 60], [5, 32, 33, 60]

FORMS = {
    "small": PlanCase(SMALL_ONLY, {}),
    "small, gathered": PlanCase(SMALL_ONLY, {}, gathered=True),
    "large": PlanCase(LARGE_ONLY, {}),
    "large, gathered": PlanCase(LARGE_ONLY, {}, gathered=True),
    "mixed": PlanCase(MIXED, {}),
    "mixed, gathered, kept short": PlanCase(MIXED, {"partial": "keep"}, gathered=True),
    "mixed, left out": PlanCase(MIXED, {"partial": "drop"}),
    "every number of rounds": PlanCase([33, 128, 1024, 65_536], {"batch_size": 8_000}),
    "fewest rounds, gathered": PlanCase([65_536, 70_000], {"batch_size": 9_000}, gathered=True),
    "in a row": PlanCase(MIXED, {"interleave": False}),
    "in a row, small, gathered": PlanCase(
        SMALL_ONLY, {"interleave": False, "partial": "keep"}, gathered=True
    ),
    "in a row and in order": PlanCase(SMALL_ONLY, {"interleave": False, "shuffle_patches": False}),
    "patches in order": PlanCase(LARGE_ONLY, {"shuffle_patches": False}),
    "samples in order": PlanCase(MIXED, {"shuffle_within_batches": False}, gathered=True),
    "nothing shuffled": PlanCase(
        MIXED, {"shuffle_within_batches": False, "shuffle_patches": False}
    ),
    "one batch": PlanCase([5], {}),
    "balanced steps": PlanCase(MIXED, {"steps": "balanced", "step_width": 3, "partial": "keep"}),
    "balanced steps, in order": PlanCase(
        SMALL_ONLY, {"steps": "balanced", "step_width": 2, "shuffle_patches": False}
    ),
    "fewer batches than a balanced step": PlanCase([5], {"steps": "balanced", "step_width": 4}),
    "steps of one patch": PlanCase(MIXED, {"steps": "same_patch", "step_width": 3}),
    "steps of one patch, in a row": PlanCase(
        SMALL_ONLY, {"steps": "same_patch", "step_width": 2, "interleave": False}
    ),
    "sizes by patch": PlanCase(MIXED, {"batch_size": {0: 3, 1: 8, 2: 9, 3: 2}, "partial": "keep"}),
    # More slots than batches, and fewer.
    "weights": PlanCase(MIXED, {"weights": [9, 1, 1, 1], "epoch_batches": 40}, gathered=True),
    "weights, in a row": PlanCase(
        MIXED, {"weights": [1, 9, 1, 1], "epoch_batches": 30, "interleave": False}
    ),
    "cost bins": PlanCase(MIXED, {"batch_size": of_classes(MIXED)}),
    "cost bins, in a row": PlanCase(
        SMALL_ONLY, {"batch_size": of_classes(SMALL_ONLY), "interleave": False}
    ),
    "even": PlanCase(MIXED, {"partial": "even"}, gathered=True),
    "costliest first": PlanCase(
        MIXED, {"costliest_first": True, "step_width": 5, "patch_costs": [1, 3, 2, 1]}
    ),
    "costliest first, balanced, weights, kept short": PlanCase(
        MIXED,
        {
            "costliest_first": True,
            "steps": "balanced",
            "step_width": 3,
            "weights": [0, 1, 1, 2],
            "epoch_batches": 19,
            "partial": "keep",
        },
    ),
    "few visits": PlanCase(MIXED, {"epoch_batches": 3}),
    "few visits, patches in order": PlanCase(
        SMALL_ONLY, {"epoch_batches": 2, "shuffle_patches": False}
    ),
    "weights, steps of one patch": PlanCase(
        SMALL_ONLY, {"weights": [1, 9, 1, 1], "steps": "same_patch", "step_width": 2}
    ),
}


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run_on(compiled, plan: EpochPlan, first_epoch: int, num_epochs: int = 3) -> None:
    """Drive a compiled plan.batch as a loop would, and compare all that comes out."""
    epoch, slot = number(first_epoch), number(0)
    for e in range(first_epoch, first_epoch + num_epochs):
        whole = plan.evaluate(e, range(plan.num_batches)).indices
        for expected in whole:
            assert torch.equal(compiled(epoch, slot), expected)
            slot.add_(1)
        slot.zero_()
        epoch.add_(1)


QUICK = {
    "large",
    "mixed, gathered, kept short",
    "fewest rounds, gathered",
    "in a row and in order",
    "patches in order",
    "samples in order",
    "nothing shuffled",
    "one batch",
    "balanced steps, in order",
    "steps of one patch, in a row",
    "cost bins, in a row",
}
"""Traced in a second or two each; together they take every way through a plan."""
slow_to_trace = pytest.mark.slow("a graph of a thousand operations takes seconds to trace")
every_form = pytest.mark.parametrize(
    "form",
    [
        pytest.param(FORMS[name], id=name, marks=[slow_to_trace] * (name not in QUICK))
        for name in FORMS
    ],
)


@every_form
def test_one_graph_serves_a_whole_run(form):
    plan = form.plan(seed=2**63 + 12345)
    plan.evaluator.prepare_batch()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(plan.batch, fullgraph=True, backend=counter)
    run_on(compiled, plan, first_epoch=2**32 - 1)
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    traced = Counter(name_of(n.target) for n in graph.graph.nodes if n.op.startswith("call"))
    counted = operations(plan)
    assert {kind: traced[kind] for kind in COUNTED} == {kind: counted[kind] for kind in COUNTED}


@slow_to_trace
@pytest.mark.parametrize("name", ["small, gathered", "mixed", "in a row"])
def test_one_graph_serves_a_whole_run_of_torchs_own_operations(name):
    plan = FORMS[name].plan(seed=2**64 - 1)
    plan.batch(number(0), number(0))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(plan.batch, fullgraph=True, backend=counter)
    run_on(compiled, plan, first_epoch=2**62)
    assert counter.frame_count == 1


def test_a_plan_of_another_seed_is_another_graph():
    plan = FORMS["one batch"].plan(seed=1)
    counter = CompileCounterWithBackend("eager")
    for other in (plan, plan.with_seed(2**64 - 2)):
        other.evaluator.prepare_batch()
        run_on(torch.compile(other.batch, fullgraph=True, backend=counter), other, 0, 1)
    assert counter.frame_count == 2


def test_compiled_before_its_first_use_a_plan_says_what_to_do():
    plan = FORMS["samples in order"].plan(seed=1)
    compiled = torch.compile(plan.batch, fullgraph=True, backend="eager")
    # torch wraps what is raised while it traces; the message must come through.
    with pytest.raises(Exception, match=r"plan\.batch was compiled before its first call, but "):
        compiled(number(0), number(0))
    # What it says to do is enough.
    plan.batch(number(0), number(0))
    run_on(compiled, plan, 0, 1)


@pytest.mark.parametrize("device", [None, "numpy"])
def test_a_plan_that_is_not_on_torch_is_refused(device):
    plan = EpochPlan(PatchGroups.from_counts([3, 4]), 2, 0, device=device)
    with pytest.raises(RuntimeError, match=r"needs a torch device, .* on 'numpy'\. Use plan\.on"):
        plan.batch(number(0), number(0))
    there = plan.on("cpu")
    expected = there.evaluate(1, [2]).indices[0]
    assert_batch_equal(there.batch(number(1), number(2)), expected)


# ---------------------------------------------------------------------------------------------
# What is in a graph


KEY = 8
"""Scramblings that make one key: two 64-bit values of two words each, twice a word."""


COUNTED = ("mul", "eq", "gt", "ge", "lt", "floordiv", "where")
SAME = {"bitwise_xor": "xor", "remainder": "mod"}


def name_of(operation: Any) -> str:
    """The name of an operation, alike as an operator, a function and a method of tensors."""
    name = operation if isinstance(operation, str) else operation.__name__
    return SAME.get(name.strip("_"), name.strip("_"))


class Counting(TorchFunctionMode):
    """Counts operations by name, and by name and number where one is given a number."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter = Counter()

    def __torch_function__(self, operation, types, args=(), kwargs=None):
        name = name_of(operation)
        if name != "get":  # a property
            self.found.update([name, "all", *((name, a) for a in args if type(a) is int)])
        return operation(*args, **(kwargs or {}))


def operations(plan: EpochPlan) -> Counter:
    """How often each operation stands in a graph of `plan.batch`.

    They are those of one call, since no value decides what is called; a call takes milliseconds,
    a graph seconds. `test_one_graph_serves_a_whole_run` compares the two.
    """
    plan.evaluator.prepare_batch()
    epoch, slot = number(0), number(0)
    with Counting() as counting:
        plan.batch(epoch, slot)
    return counting.found


def hashes(ops: Counter) -> int:
    """Hashes in a graph; those that make a key multiply by a second constant, too."""
    assert ops["mul", MIX_2] % KEY == 0
    return ops["mul", MIX_1]


def inside(counts: list[int], **settings) -> Counter:
    """The operations that permute the samples inside patches, those of the rest taken off."""
    plan = {"batch_size": 7, "shuffle_patches": False, **settings}
    ops = operations(plan_of(counts, 0, **plan))
    ops.subtract(operations(plan_of(counts, 0, **plan, shuffle_within_batches=False)))
    return ops


def expected_hashes(smallest: int, largest: int) -> int:
    """One for each exchange of a small patch, and one for each round of a large and its coin."""
    small = min(largest, SMALL) - 1 if smallest <= SMALL else 0
    large = rounds_for(max(smallest, SMALL + 1)) + 1 if largest > SMALL else 0
    return KEY + small + large


@pytest.mark.parametrize(
    "counts",
    [
        [1, 5],
        [17, 32],
        [33, 60],
        [60],
        [1, 60],
        [1024, 2000],
        [1024, 65_536],
        [65_536],
        [32, 65_536],
        [1023, 65_536],
        [127, 128],
        [128, 1023],
    ],
)
def test_no_more_is_hashed_than_the_patches_need(counts):
    assert hashes(inside(counts)) == expected_hashes(min(counts), max(counts))


@pytest.mark.parametrize("partial", ["keep", "pad", "drop"])
def test_a_graph_has_the_forms_of_its_patches_and_no_other(partial):
    small = inside([7, 32], partial=partial)
    large = inside([33, 60], partial=partial)
    mixed = inside([7, 32, 33, 60], partial=partial)
    # Each exchange of a small patch compares with both of its places, for every patch size.
    assert (small["eq"], small["gt"]) == (2 * 31, 31)
    # Only an odd round compares for equality, with the last row; only the grid divides.
    assert (large["eq"], large["gt"]) == (rounds_for(60) // 2, 0)
    assert (small["floordiv"], large["floordiv"]) == (0, 1)
    for kind in ("eq", "gt", "ge", "floordiv"):
        assert mixed[kind] == small[kind] + large[kind]
    assert hashes(mixed) == hashes(small) + hashes(large) - KEY
    assert mixed["where"] == small["where"] + large["where"] + 1
    # What they have in common (the key, mostly) a mixed graph has once: less than a third of both.
    both = small["all"] + large["all"]
    assert both * 2 // 3 < mixed["all"] < both


def test_rounds_are_chosen_by_size_only_where_sizes_ask_for_it():
    for counts, choices in [
        ([33, 127], 0),
        ([128, 1023], 0),
        ([33, 1023], 2),
        ([1024, 65_535], 0),
        ([65_536], 0),
        ([1024, 65_536], 2),
        ([33, 1024], 4),
        ([33, 65_536], 6),
    ]:
        # One more comparison is the coin's.
        assert inside(counts)["lt"] == choices + 1, counts


def test_the_order_of_the_batches_costs_what_their_number_needs():
    for num_batches, expected in [(1, 0), (2, KEY + 1), (32, KEY + 31), (33, KEY + 13)]:
        counts = [1] * num_batches
        ops = operations(plan_of(counts, 0, batch_size=1, shuffle_within_batches=False))
        assert hashes(ops) == expected, num_batches
    plan = plan_of([1] * 5, 0, batch_size=1, shuffle_patches=False, shuffle_within_batches=False)
    assert hashes(operations(plan)) == 0


def test_an_order_is_looked_up_only_where_there_is_one():
    contiguous, gathered = [operations(FORMS[n].plan(0)) for n in ("small", "small, gathered")]
    assert gathered["getitem"] == contiguous["getitem"] + 1


# ---------------------------------------------------------------------------------------------
# torch's own compiler


@pytest.fixture
def inductor(tmp_path, monkeypatch):
    """Compile for real: with nothing that an earlier run has left behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with warnings.catch_warnings():
        # The compiler's own modules warn of one another when they are first imported.
        warnings.simplefilter("ignore")
        import_module("torch._inductor.compile_fx")
    # Or it compiles half a dozen programs first, to see which vectors the compiler knows.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": True}):
        yield CompileCounterWithBackend("inductor")


QUICKER = {"realize_opcount_threshold": 8}
"""What docs/how-to/in-memory.md recommends."""


LARGE_STEP = shuffled_ids([70_000, 65_536]), 32_768, QUICKER


@pytest.mark.parametrize(
    ("ids", "batch_size", "options", "is_trained"),
    [
        pytest.param(
            np.repeat([4, 9], [3, 2]),
            2,
            {},
            True,
            id="small",
            marks=pytest.mark.slow("without the option, g++ takes a minute"),
        ),
        pytest.param(
            *LARGE_STEP,
            True,
            id="large",
            marks=pytest.mark.slow("compiles the backward pass, too"),
        ),
        pytest.param(
            *LARGE_STEP,
            False,
            id="large, loss alone",
            marks=pytest.mark.expensive("the one compile by inductor"),
        ),
    ],
)
def test_a_training_step_is_compiled_to_machine_code(
    inductor, tmp_path, ids, batch_size, options, is_trained
):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((len(ids), 3), generator=generator)
    y = torch.randn((len(ids),), generator=generator)
    sampler = PatchBatchSampler(ids, batch_size, seed=2**63 + 5, partial="pad")
    sampler.set_epoch(2**32 - 1)
    scales = torch.linspace(1, 2, sampler.plan.groups.num_patches)

    def made() -> tuple[Any, Any]:
        model, cursor = torch.nn.Linear(3, 1), sampler.cursor()
        with torch.no_grad():
            model.weight.fill_(0.1)
            model.bias.fill_(0.2)
        column = torch.arange(batch_size)

        def loss_of() -> tuple[torch.Tensor, torch.Tensor]:
            batch = cursor()
            errors = (model(x[batch.indices])[:, 0] * scales[batch.group] - y[batch.indices]) ** 2
            return torch.where(column < batch.valid, errors, 0).sum() / batch.valid, batch.indices

        return model, loss_of

    plain, plain_loss = made()
    model, loss_of = made()
    loss_of = torch.compile(loss_of, fullgraph=True, backend=inductor)
    total = sampler.plan.num_batches
    for step in range(total + 2):
        losses = []
        for its_model, its_loss in ((plain, plain_loss), (model, loss_of)):
            with torch._inductor.config.patch(options), torch.set_grad_enabled(is_trained):
                loss, indices = its_loss()
                if is_trained:
                    loss.backward()
            if is_trained:
                with torch.no_grad():
                    for weights in its_model.parameters():
                        weights -= 0.01 * weights.grad
                        weights.grad = None
            losses.append(loss)
            epoch, slot = divmod(step, total)
            expected = sampler.plan.evaluate(2**32 - 1 + epoch, [slot]).indices[0]
            assert indices.tolist() == expected.tolist()
        torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(model.weight, plain.weight)
    assert inductor.frame_count == 1
    assert list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    ("epoch", "slot", "error", "text"),
    [
        (0, ZERO, TypeError, "epoch must be a 0-d int64 tensor, got int"),
        (ZERO.int(), ZERO, TypeError, "epoch must be a 0-d int64 tensor, got torch.int32"),
        (ZERO, ZERO.double(), TypeError, "slot must be a 0-d int64 tensor, got torch.float64"),
        (ZERO, ZERO.reshape(1), TypeError, r"slot must be .*, got torch.int64 of shape \(1,\)"),
        (ZERO, ZERO.to("meta"), ValueError, "slot must be on cpu, got meta"),
    ],
)
def test_places_that_are_none_are_refused(epoch, slot, error, text):
    plan = EpochPlan(PatchGroups.from_counts([5, 3]), 4, 5, device="cpu")
    with pytest.raises(error, match=text):
        plan.batch(epoch, slot)


def test_a_plan_that_was_not_used_before_is_compiled_without_fullgraph():
    plan = EpochPlan(PatchGroups.from_counts([5, 3]), 4, 5, partial="pad", device="cpu")
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Dynamo looks at tables that are read-only.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        result = torch.compile(plan.batch, backend="eager")(ZERO, ZERO)
    assert result.tolist() == plan.evaluate(0, [0]).indices[0].tolist()


def test_patches_that_drop_leaves_out_are_no_part_of_the_graph():
    counts = [5, 40, 70]
    plan = EpochPlan(PatchGroups.from_counts(counts), 33, 5, partial="drop", device="cpu")
    alone = EpochPlan(PatchGroups.from_counts(counts[1:]), 33, 5, partial="drop", device="cpu")
    assert plan._tables.smallest_patch == alone._tables.smallest_patch == 40
    expected = EpochPlan(PatchGroups.from_counts(counts), 33, 5, partial="drop").evaluate(
        0, [0, 1, 2]
    )
    for slot, indices in enumerate(expected.indices):
        assert plan.batch(ZERO, torch.tensor(slot)).tolist() == indices.tolist()
