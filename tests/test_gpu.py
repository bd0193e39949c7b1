"""What needs a CUDA device: `pytest -m gpu`. Skipped elsewhere."""

import copy
import json

import pytest
import torch
from families import DATA, FAMILIES, load_pruned, make_inputs, picture
from safetensors import safe_open

from vlmpruner.token_pruning import PruningParameters, prune_tokens


pytestmark = pytest.mark.gpu
DEVICE = "cuda"
SELECTIONS = sorted((DATA / "golden").glob("select_*.safetensors"))


@pytest.fixture(params=FAMILIES.values(), ids=lambda family: family.name)
def family(request):
    return request.param


def rows():
    return [([], "Say something."), ([picture(1)], "What is it?"), ([picture(2), picture(3, 200, 300)], "Which one?")]


def on_device(family, dtype=torch.float32):
    return copy.deepcopy(load_pruned(family)).to(DEVICE, dtype)


def generate(model, inputs, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
    return model.generate(**inputs.to(model.device, model.dtype), **options)


@pytest.mark.parametrize("path", SELECTIONS, ids=lambda path: path.stem)
def test_selection_equals_the_one_on_the_cpu(path):
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        hidden_states, keys, kept = (file.get_tensor(name) for name in ("hidden_states", "keys", "kept_filled"))
    names = {"num_pivots": "pivots", "threshold": "threshold", "token_batch": "token_batch"}
    parameters = PruningParameters(**{name: case[source] for name, source in names.items() if source in case})
    inputs = (case["height"], case["width"]), len(kept), parameters
    on_cpu, merged = prune_tokens(hidden_states.float(), keys.float(), *inputs)
    on_gpu, merged_on_gpu = prune_tokens(hidden_states.float().to(DEVICE), keys.float().to(DEVICE), *inputs)
    assert torch.equal(on_cpu, on_gpu.cpu())
    torch.testing.assert_close(merged_on_gpu.cpu(), merged, rtol=1e-4, atol=1e-5)


def test_generation_equals_the_one_on_the_cpu(family):
    inputs = make_inputs(family, rows())
    expected = generate(load_pruned(family), inputs)
    found = generate(on_device(family), inputs)
    kept, kept_on_gpu = ([image.kept.tolist() for image in each.past_key_values.pruning_record] for each in (expected, found))
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_finite(family, dtype):
    outputs = generate(on_device(family, dtype), make_inputs(family, rows()))
    assert torch.stack(outputs.logits).isfinite().all()
