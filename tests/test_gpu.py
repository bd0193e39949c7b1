"""What needs a CUDA device: `pytest -m gpu`. Skipped elsewhere."""

import contextlib
import copy
import math

import pytest
import torch
from families import load_pruned, make_inputs, picture
from test_device_selection import assert_equal_selections, images, merge_by_loops, random_batch
from test_flash_attention import later_turns
from test_token_pruning import GOLDEN, load_case
from transformers.utils import is_flash_attn_2_available, is_torchvision_available

from vlmpruner import token_pruning
from vlmpruner.pruned_cache import cache_of
from vlmpruner.pruned_decoder import PruningPlan
from vlmpruner.token_pruning import PruningParameters, aggregate_tokens, select_batch, select_random
from vlmpruner.token_pruning_device import GridBatch, triton_stages


pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(params=["triton", "torch"])
def stages(request, monkeypatch):
    """Both ways to select on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr(token_pruning, "triton_stages", lambda: None)
    elif triton_stages() is None:
        pytest.skip("Triton can not compile here")
    return request.param


@contextlib.contextmanager
def no_waiting():
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def to_device(hidden_states, keys, batch, *parameters):
    on_device = GridBatch(batch.grids, batch.num_keep, DEVICE)
    assert on_device.layout.table.is_cuda  # made in advance, as a plan does
    return hidden_states.to(DEVICE), keys.to(DEVICE), on_device, *parameters


def ragged(num_images=8):
    """Eight grids of a real size and width."""
    grids = [(24, 24), (12, 17), (30, 20), (24, 24), (1, 40), (2, 12, 16), (7, 5), (36, 36)][:num_images]
    sizes = [math.prod(grid) for grid in grids]
    generator = torch.Generator().manual_seed(0)
    hidden_states = torch.randn(sum(sizes), 1024, generator=generator) + 0.5
    keys = torch.randn(8, sum(sizes), 64, generator=generator)
    return hidden_states, keys, GridBatch(grids, [max(size // 9, 1) for size in sizes])


@pytest.fixture
def family(request):
    if not is_torchvision_available() and request.param.name not in ("llava", "llava_next"):
        pytest.skip("the processor of this family needs torchvision")
    return request.param


def rows():
    return [([], "Say something."), ([picture(1)], "What is it?"), ([picture(2), picture(3, 200, 300)], "Which one?")]


def on_device(family, dtype=torch.float32):
    return copy.deepcopy(load_pruned(family)).to(DEVICE, dtype)


def generate(model, inputs, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**inputs.to(model.device, model.dtype), **options)


# Selection and merge


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("fill_budget", [False, True])
def test_keeps_what_the_authors_keep(path, fill_budget, stages):
    tensors, grid, budget, parameters = load_case(path)
    parameters = PruningParameters(**parameters, fill_budget=fill_budget)
    inputs = tensors["hidden_states"].float(), tensors["keys"].float(), GridBatch([grid], [budget]), parameters
    found = select_batch(*to_device(*inputs))
    assert torch.equal(found.kept.cpu(), tensors["kept_filled" if fill_budget else "kept"])
    assert_equal_selections(found, select_batch(*inputs))


@pytest.mark.parametrize("block", range(10))
def test_chooses_what_the_cpu_chooses(block, stages):
    """About 2,000 grids, five to a batch."""
    for seed in range(40 * block, 40 * (block + 1)):
        inputs = random_batch(seed)
        assert_equal_selections(select_batch(*to_device(*inputs)), select_batch(*inputs), f"seed {seed}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token_batch", [1, 16])
def test_a_ragged_batch_of_eight(dtype, token_batch, stages):
    hidden_states, keys, batch = ragged()
    parameters = PruningParameters(token_batch=token_batch)
    inputs = hidden_states.to(dtype), keys.to(dtype), batch, parameters
    hidden_states, keys, *_ = to_device(*inputs)
    together = select_batch(*to_device(*inputs))
    assert_equal_selections(together, select_batch(*inputs))
    start = 0
    for grid, size, num_keep, order in zip(
        batch.grids, batch.sizes, batch.num_keep, together.order.split(together.counts), strict=True
    ):
        rows = slice(start, start + size)
        alone = select_batch(hidden_states[rows], keys[:, rows], GridBatch([grid], [num_keep], DEVICE), parameters)
        assert torch.equal(order - start, alone.order)
        start += size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [0.0, 0.3])
def test_merge(dtype, own, stages):
    hidden_states, keys, batch = ragged()
    hidden_states, keys, batch = to_device(hidden_states.to(dtype), keys, batch)
    selection = select_batch(hidden_states, keys, batch)
    merged = aggregate_tokens(hidden_states, selection, own)
    expected = merge_by_loops(hidden_states, selection, own)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(merged.double(), expected, rtol=tolerance, atol=tolerance)
    rows = hidden_states.clone().requires_grad_()
    with_graph = aggregate_tokens(rows, selection, own)
    torch.testing.assert_close(with_graph.detach(), merged, rtol=tolerance, atol=tolerance)
    with_graph.float().sum().backward()
    assert rows.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_choose_valid_tokens(bad, stages):
    hidden_states, keys, batch = to_device(*ragged())
    hidden_states[::3], keys[:, ::5] = bad, bad
    selection = select_batch(hidden_states, keys, batch)
    assert selection.counts == batch.num_keep and len(set(selection.order.tolist())) == sum(batch.num_keep)
    assert torch.equal(selection.members.sort().values, torch.arange(len(hidden_states), device=DEVICE))


def test_nothing_waits_for_the_device(stages):
    inputs = to_device(*ragged())
    for waiting in (contextlib.nullcontext(), no_waiting()):  # first compiled
        with waiting:
            selection = select_batch(*inputs)
            aggregate_tokens(inputs[0], selection, 0.3)
            select_random(*inputs)


def test_replays_from_a_graph(stages):
    hidden_states, keys, batch = to_device(*ragged())
    expected = select_batch(hidden_states, keys, batch)
    other_states, other_keys = hidden_states.flip(1), keys.flip(1)
    other_expected = select_batch(other_states, other_keys, batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        selection = select_batch(hidden_states, keys, batch)
        merged = aggregate_tokens(hidden_states, selection, 0.3)
    graph.replay()
    assert torch.equal(selection.order, expected.order)
    hidden_states.copy_(other_states)
    keys.copy_(other_keys)
    graph.replay()
    assert torch.equal(selection.order, other_expected.order)
    torch.testing.assert_close(merged, aggregate_tokens(other_states, other_expected, 0.3))


def launches(function):
    function()  # compiled first
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def test_few_launches_however_many_images():
    """Triton's way: pivots, deviations, sort, gather, cosines, selection."""
    if triton_stages() is None:
        pytest.skip("Triton can not compile here")
    counts = []
    for num_images in (1, 8):
        inputs = to_device(*images(num_images, (24, 24), 64), PruningParameters(num_channels=16))
        counts.append(launches(lambda inputs=inputs: select_batch(*inputs)))
    assert counts[1] <= counts[0] + 4 and counts[0] <= 45, counts


# Models


def test_the_pruning_layer_does_not_wait(family, stages, monkeypatch):
    """Rows without an image, with one and with two, padded: a FlashAttention mask would wait, sdpa and eager do not."""
    model, inputs = on_device(family), make_inputs(family, rows()).to(DEVICE)
    with torch.no_grad():
        model(**inputs, use_cache=True)  # compiles
    enter = PruningPlan._enter

    def watched(*args):
        with no_waiting():
            return enter(*args)

    monkeypatch.setattr(PruningPlan, "_enter", watched)
    with torch.no_grad():
        assert model(**inputs, use_cache=True).logits.isfinite().all()


@pytest.mark.core
def test_generation_equals_the_one_on_the_cpu(family):
    inputs = make_inputs(family, rows())
    expected = generate(load_pruned(family), inputs)
    found = generate(on_device(family), inputs)
    kept, kept_on_gpu = ([image.kept.tolist() for image in cache_of(each).pruning_record] for each in (expected, found))
    assert kept == kept_on_gpu
    torch.testing.assert_close(torch.stack(found.logits).cpu(), torch.stack(expected.logits), rtol=0, atol=1e-3)


def test_compiled_static_decoding(family):
    model, inputs = on_device(family), make_inputs(family, rows())
    expected = generate(model, inputs)
    for _ in range(2):
        found = generate(model, inputs, cache_implementation="static")
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-3)


def test_offloaded_cache(family):
    model, inputs = on_device(family), make_inputs(family, rows())
    expected, found = generate(model, inputs), generate(model, inputs, cache_implementation="offloaded")
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


def test_flex_attention_decodes(family):
    model, inputs = on_device(family), make_inputs(family, rows())
    expected = generate(model, inputs)
    model.set_attn_implementation("flex_attention")
    found = generate(model, inputs)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_flash_attention_equals_sdpa(family, kind):
    """The package itself; `test_flash_attention.py` tries more with a stand-in. It runs in half precision, so what stays is
    drawn: a choice by value could depend on the rounding."""
    if not is_flash_attn_2_available():
        pytest.skip("needs the package flash-attn")
    if "moe" in family.name:
        pytest.skip("another rounding is another expert")
    model = copy.deepcopy(load_pruned(family, pruning_method="random")).to(DEVICE, torch.float16)
    found = []
    for name in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation(name)
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(later_turns(kind)(family, model))
    torch.testing.assert_close(*found, rtol=0, atol=0.3 if family.is_hybrid else 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_finite(family, dtype):
    outputs = generate(on_device(family, dtype), make_inputs(family, rows()))
    assert torch.stack(outputs.logits).isfinite().all()
