"""The kernels as compiled for a GPU, run on the CPU: batches are NumPy's, every access is valid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpusampler import CostBudget, EpochPlan, PatchGroups
from gpusampler.plan.evaluators.kernels.kernel_spec import KernelSpec
from support.identity_cases import SETTINGS, make_case, quiet
from support.kernels import Kernel, host, kernel_of
from support.ptx import Array, Program, PtxError, UnknownInstructionError, run
from support.ptx.launches import launches

SEED = 2**64 - 1
EPOCH = 2**33 + 5
"""Every word of the keys is needed."""


INSTRUCTIONS = {"triton ptx": 108, "cuda-c ptx": 101}
"""Of PTX, executed per index by a plain plan, at most; see `docs.figures.kernel_instructions`."""


class Case(NamedTuple):
    groups: PatchGroups
    batch_size: Any
    settings: Mapping[str, Any] = MappingProxyType({})
    dtype: str = "int64"

    def plan(self) -> EpochPlan:
        return EpochPlan(self.groups, self.batch_size, SEED, **self.settings)


def contiguous(*counts: int) -> PatchGroups:
    return PatchGroups.from_counts(counts)


def gathered(dtype: str, *counts: int) -> PatchGroups:
    rng = np.random.default_rng(4)
    groups = PatchGroups.from_ids(rng.permutation(np.repeat(np.arange(len(counts)), counts)))
    tables = groups.patch_ids, groups.counts, groups.starts, groups.order.astype(dtype)
    return PatchGroups(*tables, source_size=groups.source_size)


LARGE = contiguous(70_000, 66_000, 65_536)
MIXED = contiguous(20, 70_000, 300, 3, 1200, 33)
SAMPLE_COSTS = np.random.default_rng(3).integers(1, 40, MIXED.source_size)
QUICK = {
    "plain": Case(LARGE, 64),
    "mixed, gathered": Case(gathered("int32", 20, 3000, 300, 3, 33), 48, {"partial": "pad"}),
    # The kernel of the patches' order goes over them in several turns.
    "many patches, in a row": Case(contiguous(*[3] * 600), 2, {"interleave": False}),
    "weights": Case(MIXED, 16, {"weights": [1, 5, 0, 2, 1, 1], "epoch_batches": 300}),
}
SLOW = {
    "plain, int32": Case(LARGE, 64, dtype="int32"),
    "gathered int64, odd width": Case(gathered("int64", 1100, 2100, 5000), 33),
    "few slots": Case(contiguous(40, 20, 7), 8),
    "one slot": Case(contiguous(5), 5, {"shuffle_within_batches": False}),
    "slots as they are": Case(MIXED, 24, {"shuffle_patches": False, "partial": "drop"}),
    "nothing shuffled": Case(
        MIXED, 24, {"shuffle_patches": False, "shuffle_within_batches": False}
    ),
    "64-bit slots, width 1": Case(contiguous(*[2**31 - 1] * 3), 1),
    "small patches": Case(contiguous(*[20, 32, 1] * 9), 16),
    "medium patches": Case(contiguous(*[33, 127, 128, 1023] * 3), 7),
    "wide rows": Case(contiguous(9000, 4100, 20), 4200),
    "sizes by patch": Case(MIXED, {0: 8, 1: 100, 2: 13, 3: 3, 4: 33, 5: 2}),
    "sizes by patch, padded": Case(
        MIXED, {0: 8, 1: 100, 2: 13, 3: 3, 4: 33, 5: 2}, {"partial": "pad"}
    ),
    "even sizes": Case(MIXED, 24, {"partial": "even", "min_partial": 2}),
    "cost budget": Case(MIXED, CostBudget(400, cost=[9, 4, 30, 100, 7, 50])),
    "cost bins": Case(MIXED, CostBudget(400, sample_costs=SAMPLE_COSTS, max_batch_size=64)),
    "balanced": Case(MIXED, 24, {"steps": "balanced", "step_width": 4}),
    "balanced by cost": Case(
        MIXED, 24, {"steps": "balanced", "step_width": 3, "patch_costs": [9, 4, 30, 1, 7, 50]}
    ),
    "in a row": Case(MIXED, 32, {"interleave": False}),
    "same patch": Case(MIXED, 24, {"steps": "same_patch", "step_width": 4}),
    "same patch, in a row": Case(
        MIXED, 24, {"steps": "same_patch", "step_width": 3, "interleave": False}
    ),
    "costliest first": Case(
        MIXED, 24, {"costliest_first": True, "step_width": 4, "patch_costs": [9, 4, 30, 1, 7, 50]}
    ),
    "fewer slots than patches": Case(MIXED, 24, {"epoch_batches": 4}),
    "weights, in a row": Case(
        MIXED, 16, {"weights": [1, 5, 3, 2, 1, 1], "epoch_batches": 300, "interleave": False}
    ),
}
CASES = QUICK | SLOW
FIRST = pytest.mark.expensive("the one start of Triton's compiler")
every_case = pytest.mark.parametrize(
    "case",
    [
        *(
            pytest.param(case, id=name, marks=FIRST if name == "plain" else ())
            for name, case in QUICK.items()
        ),
        *(
            pytest.param(case, id=name, marks=pytest.mark.slow("compiles several kernels"))
            for name, case in SLOW.items()
        ),
    ],
)
every_kernel = pytest.mark.parametrize("kind", ["triton ptx", "cuda-c ptx"])


def slots_of(plan: EpochPlan, count: int = 20) -> np.ndarray:
    """Some slots: the first, the last, and repeated ones."""
    some = np.random.default_rng(1).integers(0, plan.num_batches, count)
    return np.concatenate([some, [0, plan.num_batches - 1, some[0]]])


def check_block(
    plan: EpochPlan, kernel: Kernel, slots: Any, epoch: int = EPOCH, dtype: str = "int64"
) -> None:
    expected = plan.evaluate(epoch, slots, dtype)
    indices, lengths, groups = kernel.block(plan, epoch, slots, dtype)
    np.testing.assert_array_equal(indices, expected.indices)
    np.testing.assert_array_equal(lengths, expected.lengths)
    np.testing.assert_array_equal(groups, expected.groups)


def check_ragged(plan: EpochPlan, kernel: Kernel, slots: Any, epoch: int = EPOCH) -> None:
    locations = plan.evaluator.locate(epoch, slots)
    expected = plan.evaluator.ragged(epoch, locations).samples
    np.testing.assert_array_equal(kernel.ragged(plan, epoch, locations), expected)


@every_case
@every_kernel
def test_blocks_are_those_of_numpy(kind, case):
    plan = case.plan()
    check_block(plan, kernel_of(plan, kind), slots_of(plan), dtype=case.dtype)


@every_case
@every_kernel
def test_ragged_rows_are_those_of_numpy(kind, case):
    plan = case.plan()
    check_ragged(plan, kernel_of(plan, kind), slots_of(plan))


@pytest.mark.battery("58 plans by each kernel")
@pytest.mark.parametrize("name", SETTINGS)
@every_kernel
def test_plans_of_the_identity_check(kind, name):
    for is_gathered in (False, True):
        case, rng = make_case("mixed", name, is_gathered)
        with quiet():
            plan = case.sampler(case.groups("numpy"), "numpy").plan
        slots = rng.integers(0, plan.num_batches, 40)
        kernel = kernel_of(plan, kind)
        for dtype in ("int64", "int32"):
            check_block(plan, kernel, slots, case.epoch, dtype)
        check_ragged(plan, kernel, slots, case.epoch)


@pytest.mark.parametrize("name", ["plain", "mixed, gathered"])
def test_a_batch_whose_epoch_and_slot_are_on_the_device(name):
    plan = CASES[name].plan()
    kernel = kernel_of(plan, "triton ptx")
    torch = pytest.importorskip("torch")
    for slot in (0, plan.num_batches - 1):
        position = torch.tensor(EPOCH), torch.tensor(slot)
        batch = [host(part) for part in kernel.evaluator.batch(plan.evaluator.streams, *position)]
        expected = plan.evaluate(EPOCH, [slot])
        for actual, desired in zip(batch, expected, strict=True):
            np.testing.assert_array_equal(actual, desired[0])


@every_kernel
def test_instructions_per_index(kind):
    plan = CASES["plain"].plan()
    # As many rows as fill whole blocks.
    indices, _, _ = kernel_of(plan, kind).block(plan, EPOCH, np.arange(1024))
    per_index = launches.done[-1].issued / indices.size
    assert per_index <= INSTRUCTIONS[kind]


@every_kernel
def test_the_cases_reach_every_form_of_a_kernel(kind):
    specs: set[KernelSpec] = set()
    for case in CASES.values():
        plan = case.plan()
        kernel = kernel_of(plan, kind)
        kernel.evaluator._launch = lambda spec, *_: specs.add(spec)
        kernel.block(plan, EPOCH, [0])
        kernel.ragged(plan, EPOCH, plan.evaluator.locate(EPOCH, np.arange(1)))
    assert {spec.slots for spec in specs} == {0, 1, 2, 3}
    for name in KernelSpec._fields:
        # Not of blocks: see the tests of cursors.
        if name not in ("epoch_on_device", "advance", "skip_repeats"):
            assert len({getattr(spec, name) for spec in specs}) > 1, name


BOTH = ("triton ptx", "cuda-c ptx")
# Name: pattern in the PTX, what takes its place, how many times (0: everywhere), kernels.
SPOILT = {
    "a barrier is missing": (r"bar\.sync", "// bar.sync", 1, BOTH),
    "loads have no mask": (r"@!?%p\d+ (ld\.global)", r"\1", 0, BOTH[:1]),
    "stores have no mask": (r"@!?%p\d+ (st\.global)", r"\1", 0, BOTH[:1]),
    "one row too many in Triton": (r"setp\.lt\.s32", "setp.le.s32", 0, BOTH[:1]),
    "one row too many in CUDA C": (r"setp\.ge\.s32", "setp.gt.s32", 0, BOTH[1:]),
    "one lane too many": (r"setp\.lt\.u32", "setp.le.u32", 0, BOTH),
    "a comparison of batches is off by one": (r"setp\.lt\.s64", "setp.le.s64", 0, BOTH),
    "a minimum is signed": (r"min\.u32", "min.s32", 0, BOTH),
    "the high word of a product is signed": (r"mul\.hi\.u32", "mul.hi.s32", 0, BOTH),
    "a shift is signed": (r"shr\.u32", "shr.s32", 0, BOTH),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for name, spoilt in SPOILT.items() for kind in spoilt[3]]
)
def test_a_spoilt_kernel_is_noticed(kind, name, monkeypatch):
    pattern, replacement, count, _ = SPOILT[name]
    changes = []

    def spoil(ptx: str) -> str:
        ptx, number = re.subn(pattern, replacement, ptx, count=count)
        changes.append(number)
        return ptx

    plan = CASES["mixed, gathered"].plan()
    kernel = kernel_of(plan, kind)
    check_block(plan, kernel, slots_of(plan, 10))
    monkeypatch.setattr(launches, "change", spoil)
    with pytest.raises((PtxError, AssertionError)):
        check_block(plan, kernel, slots_of(plan, 10))
    assert changes[0] > 0


def run_ptx(body: str, *, blocks: int = 1) -> np.ndarray:
    """Run instructions of which each thread has ``%rd4``, the address of its own word of 4 bytes.

    The array of 64 words, which is returned, starts at ``%rd1``, another one at ``%rd2``, and 256
    bytes of shared memory at 0.
    """
    ptx = f"""
        .visible .entry kernel(.param .u64 kernel_out, .param .u64 kernel_in)
        {{
        .reg .pred %p<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
        .shared .align 16 .b8 buffer[256];
        ld.param.u64 %rd1, [kernel_out]; ld.param.u64 %rd2, [kernel_in];
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd1, %rd3;
        setp.eq.u32 %p1, %r1, 0;
        {body}
        ret;
        }}
    """
    out, read_only = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    arguments = [Array("out", out, 0, True), Array("in", read_only, 0, False)]
    run(Program.parse(ptx), (blocks, 1), 64, arguments)
    return out


class TestEmulation:
    """Faults raise, as does what the emulation does not know."""

    def test_a_valid_kernel(self):
        # Neighbours exchange their numbers through shared memory.
        body = """
            shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 4;
            st.shared.u32 [%r2], %r1; bar.sync 0; ld.shared.u32 %r4, [%r3];
            st.global.u32 [%rd4], %r4;
        """
        assert run_ptx(body).tolist() == [i ^ 1 for i in range(64)]

    @pytest.mark.parametrize(("store", "load"), [("", ""), (".trans", ""), ("", ".trans")])
    def test_matrices_of_halves(self, store, load):
        # The first warp stores two matrices of 8 x 8, whose rows begin where its threads say.
        body = f"""
            shl.b32 %r2, %r1, 4; and.b32 %r2, %r2, 255; add.u32 %r3, %r1, 1000;
            setp.lt.u32 %p2, %r1, 32;
            @%p2 stmatrix.sync.aligned.m8n8.x2{store}.shared.b16 [%r2], {{%r1, %r3}};
            bar.sync 0;
            ldmatrix.sync.aligned.m8n8.x2{load}.shared.b16 {{%r4, %r5}}, [%r2];
            st.global.u32 [%rd4], %r5;
        """
        words = np.arange(1000, 1032, dtype=np.uint32)
        if store or load:
            halves = words.view(np.uint16).reshape(8, 8).T.copy()
            words = halves.view(np.uint32).ravel()
        assert run_ptx(body).tolist() == [*words, *words]

    @pytest.mark.parametrize(
        ("instruction", "expected"),
        [
            ("mul.hi.u32 %r2, -1, -1", 0xFFFFFFFE),
            ("mul.hi.s32 %r2, -1, -1", 0),
            ("div.s32 %r2, -7, 2", 2**32 - 3),
            ("rem.s32 %r2, -7, 2", 2**32 - 1),
            ("shr.s32 %r2, -8, 1", 2**32 - 4),
            ("shr.u32 %r2, -8, 40", 0),
            ("shl.b32 %r2, 1, 32", 0),
            ("min.u32 %r2, -1, 5", 5),
            ("bfe.u32 %r2, 0xABCD, 4, 8", 0xBC),
            ("bfe.s32 %r2, 0xABCD, 4, 4", 2**32 - 4),
            ("bfi.b32 %r2, 0xABC, 0x1234, 4, 8", 0x1BC4),
            ("bfi.b64 %rd5, 9, 7, 32, 32; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r2, %rd5", 9),
            ("mul.hi.u64 %rd5, -1, -1; cvt.u32.u64 %r2, %rd5", 0xFFFFFFFE),
            ("mul.hi.s64 %rd5, -5, 7; cvt.u32.u64 %r2, %rd5", 2**32 - 1),
            ("mov.b64 %rd5, {7, 9}; mov.b64 {%r3, %r2}, %rd5", 9),
            ("cvt.s64.s32 %rd5, -2; shr.u64 %rd5, %rd5, 32; cvt.u32.u64 %r2, %rd5", 2**32 - 1),
            ("{ .reg .pred q; setp.lt.s32 q, -1, 0; selp.u32 %r2, 3, 4, q; }", 3),
            ("popc.b32 %r2, 0xF0F1", 9),
            ("clz.b32 %r2, 0x1000", 19),
            ("clz.b64 %r2, 1", 63),
            ("setp.ge.u32 %p2, %r1, 3; vote.sync.ballot.b32 %r2, %p2, -1", 2**32 - 8),
            ("vote.sync.any.pred %p3, !%p1, -1; selp.u32 %r2, 3, 4, %p3", 3),
            ("vote.sync.all.pred %p3, !%p1, -1; selp.u32 %r2, 3, 4, %p3", 4),
            ("redux.sync.max.u32 %r2, %r1, -1", 31),
            ("shfl.sync.bfly.b32 %r2|%p2, 5, 16, 31, -1", 5),
        ],
    )
    def test_arithmetic(self, instruction, expected):
        assert run_ptx(f"{instruction}; @%p1 st.global.u32 [%rd4], %r2;")[0] == expected

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ("st.global.u32 [%rd4+4], %r1;", "byte 256 of out, which has 256"),
            ("ld.global.u32 %r2, [%rd1+-4];", "an address of no array"),
            ("ld.shared.u32 %r2, [256];", "byte 256 of shared memory, which has 256"),
            ("ld.global.u32 %r2, [%rd4+2];", "not a multiple of 4"),
            ("ld.global.v2.b32 {%r2, %r3}, [%rd4];", "not a multiple of 8"),
            ("add.s64 %rd5, %rd2, %rd3; st.global.u32 [%rd5], %r1;", "in, which is read-only"),
            ("st.global.u32 [%rd1], %r1;", "two threads write"),
            ("@%p1 bar.sync 0;", "a barrier that not all threads"),
            ("@%p1 bra $a; bar.sync 0; $a: bar.sync 0;", "a barrier that not all threads"),
            ("@%p1 ret; shfl.sync.idx.b32 %r2, %r1, 0, 31, -1;", "not all its threads"),
            ("div.u32 %r2, 1, %r1;", "division by zero"),
            ("$a: bra $a;", "does not end"),
            ("st.global.u32 [%rd4], 7; ld.global.u32 %r2, [%rd1];", "is read without a barrier"),
            (
                "ld.global.u32 %r2, [%rd1]; @%p1 bra $a; bra $b; $a: st.global.u32 [%rd1], 1; $b:",
                "is written without a barrier after another's read",
            ),
            (
                "@%p1 st.global.u32 [%rd1], 1; setp.eq.u32 %p2, %r1, 1; "
                "@%p2 st.global.u32 [%rd1], 2;",
                "is written without a barrier after another's write",
            ),
        ],
    )
    def test_what_a_gpu_may_not_notice(self, body, message, monkeypatch):
        monkeypatch.setattr("support.ptx.machine.MAX_BLOCK_EXECUTIONS", 1000)
        with pytest.raises(PtxError, match=re.escape(message)):
            run_ptx(body)

    def test_blocks_do_not_wait_for_each_other(self):
        body = "@%p1 st.global.u32 [%rd1], %ctaid.x; bar.sync 0; ld.global.u32 %r2, [%rd1];"
        run_ptx(body)
        with pytest.raises(PtxError, match="two threads write"):
            run_ptx(body, blocks=2)

    @pytest.mark.parametrize("writer", [0, 1])
    def test_a_barrier_is_one_of_a_single_block(self, writer):
        # As if each block read the epoch, and one advanced it.
        body = f"""
            ld.global.u32 %r2, [%rd1]; bar.sync 0;
            mov.u32 %r3, %ctaid.x; setp.eq.and.u32 %p2, %r3, {writer}, %p1;
            @%p2 st.global.u32 [%rd1], 7;
        """
        if writer == 0:
            assert run_ptx(body)[0] == 7
        with pytest.raises(PtxError, match="without a barrier after another's read"):
            run_ptx(body, blocks=2)

    @pytest.mark.parametrize(
        "instruction",
        ["add.f32 %r2, %r2, %r2", "ld.volatile.global.u32 %r2, [%rd4]", "add.sat.s32 %r2, %r2, 1"],
    )
    def test_an_unknown_instruction_is_named(self, instruction):
        with pytest.raises(UnknownInstructionError, match=re.escape(instruction)):
            run_ptx(f"{instruction};")
