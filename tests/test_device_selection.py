"""Selection of all grids of a call on their device, against the CPU path: plain torch, and kernels in Triton's interpreter."""

import copy
import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, load_pruned, make_inputs, picture
from test_token_pruning import GOLDEN, load_case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from vlmpruner import pruning_contract, stage_packing
from vlmpruner.method_vlm_pruner import VLMPruner
from vlmpruner.pruned_cache import cache_of
from vlmpruner.pruned_decoder import PruningPlan
from vlmpruner.stage_packing import PackedGrids, Packing
from vlmpruner.token_pruning import (
    PruningParameters,
    Selection,
    aggregate_tokens,
    select_batch,
    select_random,
)
from vlmpruner.token_pruning_device import GridBatch, Layout, select_packed_in_torch
from vlmpruner.visual_grids import VisualGrid


def select_in_torch(hidden_states, keys, batch, parameters):
    with torch.no_grad():
        return Selection(*select_packed_in_torch(hidden_states, keys.transpose(0, 1).flatten(1), batch, parameters))


def random_batch(seed, max_images=9, max_side=6):
    """A small random problem: ragged grids of two or three sides; values may tie, tokens repeat, rows be zero."""
    rng = np.random.default_rng(seed)
    num_images = int(rng.integers(1, max_images + 1))
    grids = [tuple(int(side) for side in rng.integers(1, max_side + 1, size=rng.choice([2, 2, 3]))) for _ in range(num_images)]
    sizes = [math.prod(grid) for grid in grids]
    num_tokens, width, heads, head_dim = sum(sizes), *(int(size) for size in rng.integers(1, 10, size=3))
    hidden_states = rng.normal(rng.uniform(0, 2), 1, (num_tokens, width))
    keys = rng.normal(0, 1, (heads, num_tokens, head_dim))
    if seed % 3 == 0:
        hidden_states, keys = np.rint(hidden_states), np.rint(keys)
    if seed % 2 == 0:
        copies = np.concatenate([rng.integers(0, size, size) + sum(sizes[:image]) for image, size in enumerate(sizes)])
        hidden_states, keys = hidden_states[copies], keys[:, copies]
    if seed % 5 == 0:
        hidden_states[rng.random(num_tokens) < 0.2] = 0
    if seed % 7 == 0:
        hidden_states, keys = hidden_states * 1e-3, keys * 1e4
    parameters = PruningParameters(
        num_pivots=int(rng.integers(1, 7)),
        num_channels=int(rng.integers(1, width + 3)),
        threshold=float(rng.choice([-1e30, -0.5, 0.0, 0.5, 0.8, 1.0])),
        threshold_step=float(rng.choice([1e-12, 0.03, 0.1, 0.5])),
        spatial_weight=float(rng.choice([0.0, 0.5, 0.5, 3.0])),
        token_batch=int(rng.integers(1, 21)),
        fill_budget=bool(rng.integers(4)),
    )
    dtype = [torch.float32, torch.float32, torch.bfloat16, torch.float16][rng.integers(4)]
    hidden_states, keys = (torch.from_numpy(values).to(dtype) for values in (hidden_states, keys))
    return hidden_states, keys, GridBatch(grids, [int(rng.integers(1, size + 1)) for size in sizes]), parameters


def assert_equal_selections(found, expected, context=None):
    for name in ("counts", "order", "kept"):
        one, other = (list(getattr(selection, name)) for selection in (found, expected))
        assert [int(value) for value in one] == [int(value) for value in other], (name, context)
    for name in ("members", "offsets"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), (name, context)
    torch.testing.assert_close(found.shares.cpu(), expected.shares, rtol=1e-5, atol=1e-7, msg=str(context))


@pytest.mark.once
@pytest.mark.parametrize("block", range(8))
def test_torch_chooses_what_the_cpu_path_chooses(block):
    """About 2,000 grids, five to a batch."""
    for seed in range(50 * block, 50 * (block + 1)):
        inputs = random_batch(seed)
        assert_equal_selections(select_in_torch(*inputs), select_batch(*inputs), f"seed {seed}")


@pytest.mark.once
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("fill_budget", [False, True])
def test_torch_keeps_what_the_authors_keep(path, fill_budget):
    tensors, grid, budget, parameters = load_case(path)
    inputs = tensors["hidden_states"].float(), tensors["keys"].float(), GridBatch([grid], [budget])
    parameters = PruningParameters(**parameters, fill_budget=fill_budget)
    found = select_in_torch(*inputs, parameters)
    assert torch.equal(found.kept, tensors["kept_filled" if fill_budget else "kept"])
    assert_equal_selections(found, select_batch(*inputs, parameters))


def test_a_grid_is_selected_as_alone():
    for seed in range(20):
        hidden_states, keys, batch, parameters = random_batch(seed)
        together = select_in_torch(hidden_states, keys, batch, parameters)
        starts = np.cumsum([0, *batch.sizes])
        for image, order in enumerate(together.order.split(together.counts)):
            rows = slice(starts[image], starts[image + 1])
            single = GridBatch([batch.grids[image]], [batch.num_keep[image]])
            alone = select_in_torch(hidden_states[rows], keys[:, rows], single, parameters)
            assert torch.equal(order - starts[image], alone.order)


def merge_by_loops(hidden_states, selection, own):
    """X_j <- beta X_j + (1 - beta) E_j, group by group."""
    ends = [*selection.offsets[1:].tolist(), len(hidden_states)]
    merged = []
    for begin, end in zip(selection.offsets.tolist(), ends, strict=True):
        rows, shares = hidden_states[selection.members[begin:end]].double(), selection.shares[begin:end].double()
        mean = (rows[1:] * shares[1:, None]).sum(0)
        merged.append(rows[0] if shares[0] > 0 else own * rows[0] + (1 - own) * mean)
    return torch.stack(merged)


def test_groups_of_a_batch_are_merged_each_into_its_token():
    for seed in range(20):
        hidden_states, keys, batch, parameters = random_batch(seed)
        selection = select_in_torch(hidden_states, keys, batch, parameters)
        assert torch.equal(selection.members[selection.offsets], selection.kept)
        hidden_states = hidden_states.double()
        torch.testing.assert_close(
            aggregate_tokens(hidden_states, selection, 0.3), merge_by_loops(hidden_states, selection, 0.3)
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_values_that_are_not_finite_choose_valid_tokens(bad, share):
    """Without the host there is no error; there must be no endless loop and no index that is no token either."""
    for seed in range(10):
        hidden_states, keys, batch, parameters = random_batch(seed)
        parameters = replace(parameters, fill_budget=True)
        generator = torch.Generator().manual_seed(seed)
        for tensor in (hidden_states, keys):
            tensor[torch.rand(tensor.shape, generator=generator) < share] = bad
        assert_valid(select_in_torch(hidden_states, keys, batch, parameters), batch)


def assert_valid(selection, batch):
    assert selection.counts == batch.num_keep
    ends = np.cumsum(batch.sizes)
    for order, size, end in zip(selection.order.split(batch.num_keep), batch.sizes, ends, strict=True):
        assert len(set(order.tolist())) == len(order) and all(end - size <= token < end for token in order.tolist())
    assert torch.equal(selection.kept, selection.order.sort().values)
    assert torch.equal(selection.members.sort().values, torch.arange(sum(batch.sizes)))


# Cost, counted instead of timed


class OnDevice(TorchDispatchMode):
    """Counts torch operations and refuses those for which a GPU's host has to wait."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique", "_unique2", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.WAITING or by_mask or repeats:
            raise AssertionError(f"{func} makes the host wait")
        self.count += 1
        return func(*args, **(kwargs or {}))


def images(num_images, grid=(6, 7), num_keep=9):
    generator = torch.Generator().manual_seed(0)
    num_tokens = num_images * math.prod(grid)
    hidden_states, keys = (torch.randn(shape, generator=generator) for shape in ((num_tokens, 40), (2, num_tokens, 8)))
    return hidden_states, keys, GridBatch([grid] * num_images, [num_keep] * num_images)


@pytest.mark.parametrize("token_batch", [1, 16])
def test_torch_operations_do_not_grow_with_the_images(token_batch):
    counts = set()
    for num_images in (1, 2, 8):
        hidden_states, keys, batch = images(num_images)
        assert batch.layout.table.shape == (num_images, 9)  # the one copy from the host is made before
        with OnDevice() as operations:
            select_in_torch(hidden_states, keys, batch, PruningParameters(token_batch=token_batch, num_channels=16))
        counts.add(operations.count)
    assert len(counts) == 1 and counts.pop() < 250 + 160 * (9 - 4)


def test_torch_needs_no_host():
    """On tensors without values, on a CUDA device that need not exist: whatever asked for a value would raise."""
    batch = images(3)[2]
    with FakeTensorMode(), torch.no_grad():
        layout = [torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for tensor in batch.layout]
        on_device = GridBatch(batch.grids, batch.num_keep, "cuda")
        on_device.layout = Layout(*layout)
        inputs = torch.empty(126, 40, device="cuda", dtype=torch.bfloat16), torch.empty(126, 16, device="cuda")
        _, *fields = select_packed_in_torch(*inputs, on_device, PruningParameters(num_channels=16))
        assert [tuple(field.shape) for field in fields] == [(27,), (27,), (126,), (27,), (126,)]
        assert all(field.device.type == "cuda" for field in fields)


@pytest.fixture
def device_path(monkeypatch):
    """Models choose by the path of a GPU, in plain torch."""
    monkeypatch.setattr(VLMPruner, "choose", staticmethod(select_in_torch))
    monkeypatch.setattr(pruning_contract, "values_are_free", lambda tensor: False)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_the_pruning_layer_needs_no_host(device_path, monkeypatch, name):
    """Selection, merge and packing of rows of different length, with padding; the operations do not grow with the images."""
    family, counts, enter = FAMILIES[name], [], PruningPlan._enter

    def watched(plan, *args):
        with OnDevice() as operations:
            entered = enter(plan, *args)
        counts.append(operations.count)
        return entered

    monkeypatch.setattr(PruningPlan, "_enter", watched)
    rows = [([picture(1)], "What is it?"), ([picture(2)], "Which one is it?"), ([picture(3)] * 2, "Same?")]
    model = load_pruned(family)
    for chosen in (rows[:2], rows):
        with torch.no_grad():
            outputs = model(**make_inputs(family, chosen), use_cache=True)
        assert outputs.logits.isfinite().all() and len(outputs.pruning_record) == sum(len(images) for images, _ in chosen)
    assert len(set(counts)) == 1


def test_models_choose_the_same_by_both_paths(device_path):
    family = FAMILIES["llava_next"]
    inputs = make_inputs(family, [([picture(1, 200, 300)], "What is it?"), ([picture(2), picture(3, 200, 120)], "Which?")])
    with torch.no_grad():
        found = load_pruned(family)(**inputs)
        VLMPruner.choose = staticmethod(select_batch)  # the fixture puts back what was there before
        expected = load_pruned(family)(**inputs)
    for one, other in zip(found.pruning_record, expected.pruning_record, strict=True):
        assert torch.equal(one.order, other.order) and torch.equal(one.positions, other.positions)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)


# Random tokens, the control


def test_random_keeps_as_many_of_each_grid_and_merges_nothing():
    hidden_states, keys, batch, parameters = random_batch(3)
    torch.manual_seed(5)
    first = select_random(hidden_states, keys, batch, parameters)
    other = select_random(hidden_states, keys, batch, parameters)
    torch.manual_seed(5)
    again = select_random(hidden_states, keys, batch, parameters)
    assert torch.equal(first.order, again.order) and not torch.equal(first.order, other.order)
    assert first.counts == batch.num_keep and first.members is None
    ends = np.cumsum(batch.sizes)
    for order, size, end in zip(first.order.split(batch.num_keep), batch.sizes, ends, strict=True):
        assert len(set(order.tolist())) == len(order) and all(end - size <= token < end for token in order.tolist())
    assert torch.equal(aggregate_tokens(hidden_states, first, 0.3), hidden_states[first.kept])


def test_random_is_uniform_and_needs_no_host():
    hidden_states, keys, batch = images(50, (2, 3), 2)
    times = torch.zeros(50, 6)
    assert len(batch.layout)
    with OnDevice():
        for _ in range(40):
            times.view(-1)[select_random(hidden_states, keys, batch).order] += 1
    expected, deviation = 2000 / 3, math.sqrt(2000 * 2 / 9)
    assert ((times.sum(0) - expected).abs() < 5 * deviation).all()


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_a_model_with_random_tokens(name):
    """Same counts, places and cache as the method, other tokens, states as they were."""
    family = FAMILIES[name]
    inputs = make_inputs(family, [([picture(1)], "What is it?"), ([picture(2), picture(3)], "Which one?")])
    model = copy.deepcopy(load_pruned(family))
    with torch.no_grad():
        expected = model(**inputs, use_cache=True)
        model.config.pruning_method = "random"
        found, other = (model(**inputs, use_cache=True) for _ in range(2))
    counts, expected_counts = ([image.num_kept for image in outputs.pruning_record] for outputs in (found, expected))
    assert counts == expected_counts
    lengths = [[cache_of(outputs).get_seq_length(layer) for layer in range(4)] for outputs in (found, expected)]
    assert lengths[0] == lengths[1] and lengths[0][2] < lengths[0][1]
    kept = [[image.kept.tolist() for image in outputs.pruning_record] for outputs in (found, other, expected)]
    assert kept[0] != kept[1] and kept[0] != kept[2]
    assert found.logits.isfinite().all()


# Triton, in its interpreter, which has to be chosen before Triton is imported: these tests run in a process of their own


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_kernels_in_the_interpreter")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.once
def test_kernels_in_the_interpreter():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:xdist",
        __file__,
        "-k",
        "interpreted",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout + result.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_the_selection_kernel_compiles_and_rounds_as_the_cpu_does():
    """For a GPU that need not be there. A fused multiply-add or an approximate root would choose other tokens."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vlmpruner.token_pruning_triton import _greedy_kernel

    types = dict.fromkeys(_greedy_kernel.arg_names, "*i64") | dict.fromkeys(("similarity", "scratch", "shares"), "*fp32")
    types |= dict.fromkeys(("longest", "num_images", "most_pivots", "batch_size"), "i32") | {"spatial_weight": "fp32"}
    types |= dict.fromkeys(("first_pointer", "step_pointer", "total"), "*fp64")
    constants = {"FILL_BUDGET": True, "BLOCK": 1024}
    source = ASTSource(_greedy_kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert "fma.rn.f32" not in code and "fma.rn.f64" not in code
    assert "sqrt.rn.f32" in code and "div.rn.f32" in code and "sqrt.approx" not in code and "div.full" not in code


def select_in_triton(hidden_states, keys, batch, parameters):
    from vlmpruner.token_pruning_triton import select_packed

    return Selection(*select_packed(hidden_states, keys.transpose(0, 1).flatten(1), batch, parameters))


@interpreted
def test_interpreted_kernels_choose_what_the_cpu_path_chooses():
    from vlmpruner.token_pruning_triton import aggregate_packed

    for seed in range(16):
        hidden_states, keys, batch, parameters = random_batch(seed, max_images=3, max_side=4)
        found = select_in_triton(hidden_states, keys, batch, parameters)
        expected = select_batch(hidden_states, keys, batch, parameters)
        assert_equal_selections(found, expected, f"seed {seed}")
        merged, tolerance = aggregate_packed(hidden_states, found, 0.3), {"rtol": 1e-2, "atol": 1e-2}
        if hidden_states.dtype == torch.float32:
            tolerance = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(merged, aggregate_tokens(hidden_states, expected, 0.3), **tolerance)


@interpreted
@pytest.mark.parametrize("number", [14])
def test_interpreted_kernels_keep_what_the_authors_keep(number):
    tensors, grid, budget, parameters = load_case(GOLDEN[number])
    for fill_budget in (False, True):
        inputs = tensors["hidden_states"].float(), tensors["keys"].float(), GridBatch([grid], [budget])
        found = select_in_triton(*inputs, PruningParameters(**parameters, fill_budget=fill_budget))
        assert torch.equal(found.kept, tensors["kept_filled" if fill_budget else "kept"])


@interpreted
@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_interpreted_kernels_survive_values_that_are_not_finite(bad):
    for seed, share in ((1, 0.1), (2, 1.0)):
        hidden_states, keys, batch, parameters = random_batch(seed, max_images=3, max_side=4)
        generator = torch.Generator().manual_seed(seed)
        for tensor in (hidden_states, keys):
            tensor[torch.rand(tensor.shape, generator=generator) < share] = bad
        assert_valid(select_in_triton(hidden_states, keys, batch, replace(parameters, fill_budget=True)), batch)


@interpreted
def test_interpreted_launches_do_not_grow_with_the_images(monkeypatch):
    """Four pivots, deviations, selection: six kernels, and a few operations of torch for the cosines between them."""
    from triton.runtime.interpreter import GridExecutor

    counts, call = [], GridExecutor.__call__

    def counted(self, *args, **kwargs):
        counts[-1] += 1
        with _disable_current_modes():  # the interpreter itself works with torch
            return call(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    operations_of = []
    for num_images in (1, 3):
        counts.append(0)
        hidden_states, keys, batch = images(num_images, (3, 4), 6)
        assert len(batch.layout)
        with OnDevice() as operations:
            select_in_triton(hidden_states, keys, batch, PruningParameters(num_channels=16))
        operations_of.append(operations.count)
    assert counts == [6, 6] and operations_of[0] == operations_of[1] < 40


# Layers on several devices


def test_what_one_device_packs_another_takes(monkeypatch):
    """A stage on one device, the next on another, outputs on a third; on CUDA devices that need not exist."""
    monkeypatch.setattr(stage_packing, "upload", torch.Tensor.to)  # memory that does not exist can not be pinned
    columns = torch.arange(1, 7), torch.arange(6)
    grids = [VisualGrid(row, row, 0, "image", (2, 3), columns[row], 4) for row in range(2)]
    is_text = torch.ones(2, 8, dtype=torch.bool)
    for grid in grids:
        is_text[grid.row, grid.columns] = False
    on_host = PackedGrids(grids, (4, 2), is_text, torch.device("cpu"))

    def run(first, second, third):
        def packing_of(tokens: PackedGrids, *order: int) -> tuple[Selection, Packing]:
            order = torch.tensor(order, device=tokens.device)
            selection = Selection((len(order) - 2, 2), order, order)
            counts = tokens.counts_of_rows(selection.counts)
            return selection, tokens.packing(selection, counts, tokens.valid(counts), has_merge=True)

        states = torch.arange(1.0, 17, device=first).view(2, 8, 1)
        tokens = copy.copy(on_host)
        tokens.device = first
        for name in ("rows", "columns", "places", "indices", "is_text"):
            setattr(tokens, name, getattr(on_host, name).to(first))
        selection, at_first = packing_of(tokens, 0, 2, 3, 5, 7, 8)
        later = tokens.after(selection, at_first, (2, 2), second)
        packed = at_first.pack(states).to(second)
        _, at_second = packing_of(later, 1, 3, 4, 5)
        whole = at_second.following(at_first)
        outputs = at_second.pack(packed).to(third)
        return whole.unpack(outputs), whole.pack(states), at_first.pack(states.to(third)), later.take(packed)

    places = [torch.device("cuda", number) for number in range(3)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert [tensor.device for tensor in run(*places)] == [places[2], places[0], places[2], places[1]]
    unpacked, packed, *_ = run("cpu", "cpu", "cpu")
    assert unpacked[..., 0].tolist() == [[1, 0, 0, 4, 0, 0, 7, 8], [0, 10, 11, 0, 0, 0, 15, 16]]
    assert packed[..., 0].tolist() == [[1, 4, 7, 8], [10, 11, 15, 16]]
