"""The record of what was kept is with outputs that wrappers have made anew, or it is said that it was lost."""

import copy
import dataclasses
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, cpu_offload
from accelerate.state import AcceleratorState
from families import FAMILIES, load_processor, load_pruned, load_stock, make_inputs, picture
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import TextStreamer

from vlmpruner.pruned_cache import cache_of
from vlmpruner.record_of_outputs import record_of_call


FAMILY = FAMILIES["smolvlm"]
pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def inputs():
    return dict(make_inputs(FAMILY, [([picture(1)], "What is it?"), ([picture(2)], "And here, what?")]))


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def state_of_accelerate():
    """One for all of a process, which keeps the options of whoever came first."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def kept(record):
    return [(image.row, image.image, image.view, image.order.tolist()) for image in record]


def ddp(**options):
    return lambda model: torch.nn.parallel.DistributedDataParallel(model, **options)


def fsdp2(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def by_accelerate(model):
    return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)


def peft(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"]))


WRAPPERS = {
    "accelerate": by_accelerate,
    "hooks": lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
    "ddp": ddp(),
    "ddp unused": ddp(find_unused_parameters=True),
    "ddp static": ddp(static_graph=True),
    "fsdp": lambda model: FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True),
    "fsdp2": fsdp2,
    "data parallel": torch.nn.DataParallel,
    "peft": peft,
    "peft, ddp": lambda model: ddp(find_unused_parameters=True)(peft(model)),
    "accelerate, ddp": lambda model: ddp(static_graph=True)(by_accelerate(model)),
}


@pytest.mark.parametrize("ratio", [0.889, 0.0])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_record_is_there_through_wrappers(inputs, one_process, wrapper, gradients, ratio):
    model = copy.deepcopy(load_pruned(FAMILY, pruning_ratio=ratio)).train(gradients)
    wrapped = WRAPPERS[wrapper](model)
    labels = {"labels": inputs["input_ids"]} if gradients else {}
    with torch.set_grad_enabled(gradients), record_of_call() as found:
        outputs = wrapped(**inputs, **labels, use_cache=False)
    assert type(outputs).__module__.startswith("transformers.") and cache_of(outputs) is None
    record = load_pruned(FAMILY).get_pruning_record(outputs)
    if ratio == 0:
        assert record is None
    else:
        assert 0 < record.num_kept < record.num_visual and (not found or record is found[0])
    if gradients:
        outputs.loss.backward()


ANEW = {
    "replaced": lambda outputs: dataclasses.replace(outputs, loss=None),
    "of its items": lambda outputs: type(outputs)(dict(outputs)),
    "dict": dict,
    "copy": copy.copy,
    "deep copy": copy.deepcopy,
    "pickle": lambda outputs: pickle.loads(pickle.dumps(outputs)),
}


@pytest.mark.parametrize("way", ANEW)
def test_outputs_made_anew_of_the_same_tensors(inputs, way):
    model = load_pruned(FAMILY)
    with torch.no_grad():
        outputs = model(**inputs, use_cache=False)
        assert kept(model.get_pruning_record(ANEW[way](outputs))) == kept(outputs.pruning_record)
        outputs = load_pruned(FAMILY, pruning_ratio=0.0)(**inputs, use_cache=False)
        assert model.get_pruning_record(ANEW[way](outputs)) is None


def test_tensors_are_saved_without_a_record(inputs, tmp_path):
    with torch.no_grad():
        torch.save(load_pruned(FAMILY)(**inputs).logits, tmp_path / "logits.pt")
    torch.load(tmp_path / "logits.pt", weights_only=True)


def test_outputs_of_the_backbone(inputs):
    model = load_pruned(FAMILY)
    with torch.no_grad():
        backbone = model.model(**inputs, use_cache=False)
        assert kept(model.get_pruning_record(backbone)) == kept(model(**inputs, use_cache=False).pruning_record)


def test_who_can_not_know_says_so(inputs):
    """Not None, which is that nothing was pruned: tensors computed anew without a graph, rows gathered of two calls, and what
    never was of this model."""
    model = load_pruned(FAMILY)
    with torch.no_grad():
        outputs = model(**inputs, use_cache=False)
        lost = [type(outputs)(logits=outputs.logits.double()), load_stock(FAMILY)(**inputs, use_cache=False)]
    first, second = (model(**inputs, use_cache=False).logits for _ in range(2))
    lost.append(type(outputs)(logits=torch.cat([first, second])))
    for each in lost:
        with pytest.raises(ValueError, match=r"not known what was pruned: this SmolVLM\w+ is not what.*use_cache=True"):
            model.get_pruning_record(each)
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
        rebuilt = type(outputs)(**{name: value.double() if name == "logits" else value for name, value in outputs.items()})
    assert kept(model.get_pruning_record(rebuilt)) == kept(outputs.pruning_record)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_record_lives_as_long_as_its_outputs(inputs, gradients):
    model = load_pruned(FAMILY)
    with torch.set_grad_enabled(gradients):
        outputs = model(**inputs, use_cache=False, labels=inputs["input_ids"])
    alive = weakref.ref(outputs.pruning_record)
    logits = outputs.logits
    del outputs
    gc.collect()
    assert alive() is not None
    del logits
    gc.collect()
    assert alive() is None


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 2},
    "streaming": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_generate_tells_what_was_kept(inputs, mode, use_cache):
    model, options = load_pruned(FAMILY), {"max_new_tokens": 3, "do_sample": False} | MODES[mode]
    request = inputs
    if mode in ("streaming", "prompt lookup"):
        request = dict(make_inputs(FAMILY, [([picture(1)], "What is it?")]))
        if mode == "streaming":
            options["streamer"] = TextStreamer(load_processor(FAMILY).tokenizer)
        elif not use_cache:
            pytest.skip("the library refuses speculative decoding without a cache")
    outputs = model.generate(**request, **options, use_cache=use_cache, return_dict_in_generate=True)
    with torch.no_grad():
        expected = {image[0]: [] for image in kept(model(**request).pruning_record)}
        for row, _, view, order in kept(model(**request).pruning_record):
            expected[row].append((view, order))
    record, repeats = model.get_pruning_record(outputs), options.get("num_beams", options.get("num_return_sequences", 1))
    assert (cache_of(outputs) is not None) == use_cache
    found = {}
    for row, _, view, order in kept(record):
        found.setdefault(row, []).append((view, order))
    assert len(found) == repeats * len(expected)
    assert all(found[row] == expected[row // repeats] for row in found)


@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_that_prunes_nothing_says_so(inputs, use_cache):
    model, options = load_pruned(FAMILY), {"max_new_tokens": 2, "use_cache": use_cache, "return_dict_in_generate": True}
    text = dict(make_inputs(FAMILY, [([], "Say something.")]))
    assert model.get_pruning_record(model.generate(**text, **options)) is None
    assert model.get_pruning_record(model.generate(**inputs, **options, pruning_ratio=0.0)) is None


def test_records_of_threads_do_not_meet(inputs):
    model, found = load_pruned(FAMILY), {}
    requests = {seed: dict(make_inputs(FAMILY, [([picture(seed)], "What?")])) for seed in (1, 2, 3)}
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False, "return_dict_in_generate": True}

    def answer(seed):
        found[seed] = kept(model.get_pruning_record(model.generate(**requests[seed], **options)))

    threads = [threading.Thread(target=answer, args=(seed,)) for seed in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        assert found == {seed: kept(model(**request).pruning_record) for seed, request in requests.items()}
