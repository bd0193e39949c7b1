"""A loaded stock model is pruned as it is, whatever lies around it, and is the stock model again afterwards."""

import copy
import functools
import hashlib
import pickle
import threading
from types import MethodType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
from accelerate import Accelerator, cpu_offload, dispatch_model
from families import FAMILIES, load_processor, load_pruned, load_stock, make_inputs, picture, prompt, small_checkpoint
from test_families import generate, step_logits
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    Qwen2Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import vlmpruner
from vlmpruner.pruned_cache import CACHE_NAME, cache_of
from vlmpruner.pruning_methods import METHODS


EXACT = {"rtol": 0, "atol": 0}
ROWS = [([picture(1)], "What is in the picture?"), ([picture(2, 300, 200), picture(3)], "And in these two?")]


LLAVA, QWEN = FAMILIES["llava_next_video"], FAMILIES["qwen2_vl"]  # positions of one axis and of three, of few tokens
SOME = pytest.mark.parametrize("some", [LLAVA, QWEN], ids=lambda family: family.name)


def fresh_stock(family):
    """A stock model that has not run."""
    return family.stock_class.from_pretrained(small_checkpoint(family), dtype=torch.float32).eval()


def copy_of_stock(family):
    return copy.deepcopy(load_stock(family))


def state_hash(model) -> str:
    state = hashlib.sha256()
    for name, value in model.state_dict().items():
        state.update(name.encode() + value.numpy().tobytes())
    return state.hexdigest()


def assert_pruned(model, family, outputs, inputs, **keys):
    """`outputs` of `model` say what was kept, and are those of our own class."""
    ours = load_pruned(family, **keys)
    expected = generate(ours, inputs)
    torch.testing.assert_close(step_logits(outputs), step_logits(expected), **EXACT)
    assert model.get_pruning_record(outputs).num_kept == ours.get_pruning_record(expected).num_kept > 0


def answer_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


# Equal to our own loading, and to the stock class afterwards


@pytest.mark.core
@pytest.mark.core
def test_a_pruned_model_is_equal_to_our_class_and_the_stock_model_again_afterwards(family):
    inputs, model = make_inputs(family, ROWS), copy_of_stock(family)
    assert vlmpruner.prune(model, layer=family.layer) is model
    assert_pruned(model, family, generate(model, inputs), inputs)
    assert vlmpruner.unprune(model) is model
    assert type(model) is family.stock_class and not hasattr(model, "get_pruning_record")
    torch.testing.assert_close(step_logits(generate(model, inputs)), step_logits(generate(load_stock(family), inputs)), **EXACT)


@pytest.mark.core
def test_nothing_is_left_behind(family):
    model = fresh_stock(family)
    before = pickle.dumps(model), state_hash(model), model.config.to_dict(), [type(each) for each in model.modules()]
    vlmpruner.prune(model, layer=family.layer, ratio=0.5)
    assert [type(each) for each in model.modules()] != before[3]
    vlmpruner.unprune(model)
    after = pickle.dumps(model), state_hash(model), model.config.to_dict(), [type(each) for each in model.modules()]
    assert after[1:] == before[1:]
    assert after[0] == before[0]


@pytest.mark.once
@SOME
@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_named(method, some):
    model, keys = copy_of_stock(some), {"pruning_method": method}
    if METHODS[method].counts_positions and some is QWEN:
        with pytest.raises(ValueError, match="median"):
            vlmpruner.prune(model, method=method)
        assert type(model) is some.stock_class
        return
    inputs = make_inputs(some, ROWS[:1])
    vlmpruner.prune(model, method=method)
    logits = []
    for each in (model, load_pruned(some, **keys)):
        torch.manual_seed(0)  # of "random"
        logits.append(answer_of(each, inputs))
    torch.testing.assert_close(*logits, **EXACT)


@SOME
def test_a_model_without_a_head(some):
    model = AutoModel.from_pretrained(small_checkpoint(some), dtype=torch.float32).eval()
    inputs = make_inputs(some, ROWS[:1])
    vlmpruner.prune(model)
    with torch.no_grad():
        outputs = model(**inputs)
    assert cache_of(outputs).pruning_record.num_kept < cache_of(outputs).pruning_record.num_visual
    vlmpruner.unprune(model)
    with torch.no_grad():
        assert not hasattr(cache_of(model(**inputs)), "pruning_record")


# Keys


@pytest.mark.once
def test_keys_are_set_anew_by_each_call():
    model = copy_of_stock(LLAVA)
    vlmpruner.prune(model, 0.5, layer=3)
    assert (model.config.pruning_ratio, model.config.pruning_layer) == (0.5, 3)
    vlmpruner.prune(model, method="dart", pruning_num_image_pivots=2)
    assert (model.config.pruning_ratio, model.config.pruning_layer) == (0.889, 2)
    assert (model.config.pruning_method, model.config.pruning_num_image_pivots) == ("dart", 2)
    vlmpruner.prune(model, pruning_ratio=0.25, pruning_method="random")
    assert model.config.pruning_num_image_pivots is None
    assert (model.config.pruning_method, model.config.pruning_ratio) == ("random", 0.25)


@pytest.mark.once
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ratio": 1.5}, r"pruning_ratio must be a number in \[0, 1\), .* got 1\.5"),
        ({"method": "other"}, "pruning_method must be one of .* got 'other'"),
        ({"layer": 9}, "pruning_layer must be an integer from 1 to 3"),
        ({"rate": 0.5}, r"Unknown key 'rate'\. prune takes \["),
        ({"layer": 2, "pruning_layer": 3}, "layer comes twice, as 2 and as 3"),
        ({"ratio": 0.2, "pruning_ratio": 0.3}, r"ratio comes twice, as 0\.2 and as 0\.3"),
        ({"token_batch": 4, "method": "random"}, "pruning_token_batch is set to 4"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_key_is_refused_and_changes_nothing(keys, message):
    for model in (copy_of_stock(LLAVA), vlmpruner.prune(copy_of_stock(LLAVA), 0.5)):
        before = type(model), dict(vars(model.config))
        with pytest.raises(ValueError, match=message):
            vlmpruner.prune(model, **keys)
        assert (type(model), dict(vars(model.config))) == before


def test_a_pruned_repo_takes_other_keys_and_becomes_its_base_model():
    model, inputs = copy.deepcopy(load_pruned(QWEN)), make_inputs(QWEN, ROWS)
    vlmpruner.prune(model, 0.5)
    assert_pruned(model, QWEN, generate(model, inputs), inputs, pruning_ratio=0.5)
    model.generation_config.pruning_ratio = 0.7  # comes before the config's
    with vlmpruner.pruning(model, 0.5):
        assert_pruned(model, QWEN, generate(model, inputs), inputs, pruning_ratio=0.5)
    assert_pruned(model, QWEN, generate(model, inputs), inputs, pruning_ratio=0.7)
    vlmpruner.unprune(model)
    assert type(model) is QWEN.stock_class and model.config.model_type == "qwen2_vl"
    assert not hasattr(model.generation_config, "pruning_ratio")
    torch.testing.assert_close(step_logits(generate(model, inputs)), step_logits(generate(load_stock(QWEN), inputs)), **EXACT)


def test_what_is_saved_while_pruned_is_a_pruned_repo_and_afterwards_a_base(tmp_path):
    model, inputs = copy_of_stock(QWEN), make_inputs(QWEN, ROWS)
    vlmpruner.prune(model, 0.7)
    model.save_pretrained(tmp_path / "pruned")
    vlmpruner.unprune(model)
    model.save_pretrained(tmp_path / "base")
    pruned = QWEN.pruned_class.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert pruned.config.pruning_ratio == 0.7 and (tmp_path / "pruned" / "pruned_decoder.py").is_file()
    assert not list((tmp_path / "base").glob("*.py")) and "pruning" not in (tmp_path / "base" / "config.json").read_text()
    stock = QWEN.stock_class.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    torch.testing.assert_close(answer_of(stock, inputs), answer_of(load_stock(QWEN), inputs), **EXACT)


# For a while


@SOME
def test_a_block_prunes_and_gives_back_what_was(some):
    model, inputs = copy_of_stock(some), make_inputs(some, ROWS)
    with vlmpruner.pruning(model, ratio=0.5) as inner:
        assert inner is model
        assert_pruned(model, some, generate(model, inputs), inputs, pruning_ratio=0.5)
        with vlmpruner.pruning(model, ratio=0.9, method="divprune"):
            assert model.config.pruning_method == "divprune"
        assert_pruned(model, some, generate(model, inputs), inputs, pruning_ratio=0.5)
    assert type(model) is some.stock_class
    torch.testing.assert_close(answer_of(model, inputs), answer_of(load_stock(some), inputs), **EXACT)
    vlmpruner.prune(model, 0.25, layer=3)
    with pytest.raises(KeyError, match="from inside"), vlmpruner.pruning(model):
        raise KeyError("from inside")
    assert (model.config.pruning_ratio, model.config.pruning_layer) == (0.25, 3)


@pytest.mark.once
def test_a_block_that_can_not_begin_leaves_the_model():
    model = copy_of_stock(LLAVA)
    with pytest.raises(ValueError, match="got 2"), vlmpruner.pruning(model, 2):
        pass
    assert type(model) is LLAVA.stock_class
    with vlmpruner.pruning(model):
        pass


@pytest.mark.once
def test_another_thread_is_refused_while_a_block_is_open():
    model, errors = copy_of_stock(LLAVA), []

    def try_all():
        for attempt in (vlmpruner.prune, vlmpruner.unprune, lambda model: vlmpruner.pruning(model).__enter__()):
            try:
                attempt(model)
            except RuntimeError as error:
                errors.append(str(error))

    with vlmpruner.pruning(model, 0.5):
        thread = threading.Thread(target=try_all)
        thread.start()
        thread.join()
        assert model.config.pruning_ratio == 0.5
    assert len(errors) == 3 and all("Another thread" in error for error in errors)
    thread = threading.Thread(target=lambda: vlmpruner.prune(model))
    thread.start()
    thread.join()
    assert model.config.pruning_ratio == 0.889


# What lies around a model


@SOME
@pytest.mark.parametrize("kind", ["cpu_offload", "dispatch"])
def test_hooks_of_accelerate(kind, some):
    model, inputs = copy_of_stock(some), make_inputs(some, ROWS)
    if kind == "cpu_offload":
        cpu_offload(model, torch.device("cpu"))
    else:
        dispatch_model(model, {"": "cpu"}, force_hooks=True)
    stock = answer_of(model, inputs)
    vlmpruner.prune(model)
    with (
        torch.no_grad()
    ):  # the library's generate asks for the features outside of a hook, which stock LLaVA-NeXT does not bear
        outputs, expected = model(**inputs), load_pruned(some)(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits, **EXACT)
    assert model.get_pruning_record(outputs).num_kept == expected.pruning_record.num_kept
    vlmpruner.unprune(model)
    torch.testing.assert_close(answer_of(model, inputs), stock, **EXACT)


def test_device_map_with_layers_on_disk(tmp_path):
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.image_newline": "cpu", "lm_head": "cpu"}
    model = LLAVA.stock_class.from_pretrained(
        small_checkpoint(LLAVA),
        dtype=torch.float32,
        device_map=parts | {"model.language_model": "disk"},
        offload_folder=tmp_path,
    ).eval()
    inputs = make_inputs(LLAVA, ROWS)
    vlmpruner.prune(model)
    outputs = generate(model, inputs)
    expected = LLAVA.pruned_class.from_pretrained(small_checkpoint(LLAVA), dtype=torch.float32).eval()
    torch.testing.assert_close(step_logits(outputs), step_logits(generate(expected, inputs)), **EXACT)
    assert model.get_pruning_record(outputs).num_kept > 0


@SOME
def test_mixed_precision_of_accelerate(some):
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    inputs = make_inputs(some, ROWS) | {"labels": make_inputs(some, ROWS)["input_ids"]}
    model = accelerator.prepare(copy_of_stock(some).train())
    stock = model(**inputs).loss
    vlmpruner.prune(model)
    ours = accelerator.prepare(copy.deepcopy(load_pruned(some)).train())
    outputs, expected = model(**inputs, use_cache=False), ours(**inputs, use_cache=False)
    torch.testing.assert_close(outputs.loss, expected.loss, **EXACT)
    assert model.get_pruning_record(outputs).num_kept == ours.get_pruning_record(expected).num_kept
    vlmpruner.unprune(model)
    torch.testing.assert_close(model(**inputs).loss, stock, **EXACT)
    assert type(accelerator.unwrap_model(model, keep_fp32_wrapper=False)) is some.stock_class


@pytest.mark.parametrize("kind", ["module", "in place", "forward"])
def test_torch_compile(kind):
    family = FAMILIES["llava"]  # whose stock class has the least to trace
    model, inputs = copy_of_stock(family), make_inputs(family, ROWS[:1])
    compiled = model
    if kind == "module":
        compiled = torch.compile(model, backend="eager")
    elif kind == "in place":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    stock = answer_of(compiled, inputs)
    vlmpruner.prune(compiled)
    # What was compiled is not to run; to compile it anew takes half a minute and is not what is asked here.
    with torch.no_grad(), torch.compiler.set_stance("eager_on_recompile"):
        outputs, expected = compiled(**inputs), load_pruned(family)(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert model.get_pruning_record(outputs).num_kept == expected.pruning_record.num_kept
    vlmpruner.unprune(compiled)
    torch.testing.assert_close(answer_of(compiled, inputs), stock)


@pytest.mark.once
@SOME
def test_adapters_stay(some):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ".*(vision|visual).*"}
    lora = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    adapted, expected = peft.get_peft_model(copy_of_stock(some), lora), copy.deepcopy(load_pruned(some))
    expected = peft.get_peft_model(expected, lora)
    expected.load_state_dict(adapted.state_dict())
    inputs = make_inputs(some, ROWS)
    stock = answer_of(adapted, inputs)
    vlmpruner.prune(adapted)
    outputs = generate(adapted, inputs)
    torch.testing.assert_close(step_logits(outputs), step_logits(generate(expected, inputs)), **EXACT)
    assert adapted.get_pruning_record(outputs).num_kept > 0
    vlmpruner.unprune(adapted)
    torch.testing.assert_close(answer_of(adapted, inputs), stock, **EXACT)


@SOME
def test_checkpointing_wrappers_around_layers(some):
    inputs = make_inputs(some, ROWS) | {"labels": make_inputs(some, ROWS)["input_ids"]}
    losses, gradients = [], []
    for model in (copy_of_stock(some), copy.deepcopy(load_pruned(some))):
        layers = model.get_decoder().layers
        if type(model) is some.stock_class:
            for number, layer in enumerate(layers):
                layers[number] = checkpoint_wrapper(layer)
            vlmpruner.prune(model)
        outputs = model.train()(**inputs, use_cache=False)
        outputs.loss.backward()
        losses.append(outputs.loss.detach())
        gradients.append(model.get_input_embeddings().weight.grad)
        assert model.get_pruning_record(outputs).num_kept > 0
    torch.testing.assert_close(*losses, **EXACT)
    torch.testing.assert_close(*gradients)


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp2"])
@SOME
def test_distributed_wrappers(kind, some, one_rank):
    model, inputs = copy_of_stock(some), make_inputs(some, ROWS)
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel

        layer_class = type(model.get_decoder().layers[0])
        policy = functools.partial(
            torch.distributed.fsdp.wrap.transformer_auto_wrap_policy, transformer_layer_cls={layer_class}
        )
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in model.get_decoder().layers:
            dist.fsdp.fully_shard(layer, mesh=mesh)
        wrapped = dist.fsdp.fully_shard(model, mesh=mesh)
    sharded = [module for module in wrapped.modules() if isinstance(module, dist.fsdp.FSDPModule)]
    assert bool(sharded) == (kind == "fsdp2")
    stock = answer_of(wrapped, inputs)
    vlmpruner.prune(wrapped)
    with torch.no_grad():
        outputs, expected = wrapped(**inputs), load_pruned(some)(**inputs)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert model.get_pruning_record(outputs).num_kept == expected.pruning_record.num_kept
    assert all(isinstance(module, dist.fsdp.FSDPModule) for module in sharded)
    vlmpruner.unprune(wrapped)
    torch.testing.assert_close(answer_of(wrapped, inputs), stock)
    assert all(isinstance(module, dist.fsdp.FSDPModule) for module in sharded)


@pytest.mark.once
def test_an_engine_that_holds_the_model():
    """As DeepSpeed's: a module that calls the one that it holds."""

    class Engine(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    engine, inputs = Engine(copy_of_stock(LLAVA)), make_inputs(LLAVA, ROWS)
    vlmpruner.prune(engine)
    torch.testing.assert_close(answer_of(engine, inputs), answer_of(load_pruned(LLAVA), inputs), **EXACT)


def test_a_trainer_in_the_middle_of_a_run(tmp_path):
    """From the second step on, losses are those of our class at the same weights."""
    losses, model = [], fresh_stock(QWEN)
    inputs = dict(make_inputs(QWEN, ROWS[:1]))
    rows = [{**inputs, "labels": inputs["input_ids"]}] * 3

    class PruneAfterOneStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                vlmpruner.prune(model, 0.8)
            expected = copy.deepcopy(model)
            with torch.no_grad():
                losses.append((vlmpruner.prune(expected, 0.8).train()(**rows[0])).loss.item())

    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=lambda rows: rows[0], callbacks=[PruneAfterOneStep()])
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged[1:] == pytest.approx(losses[:2], abs=1e-3) and logged[0] != pytest.approx(losses[0], abs=1e-3)
    assert type(trainer.model) is QWEN.pruned_class


# A cache in flight


@SOME
def test_a_conversation_that_began_unpruned(some):
    """The first image stays whole, the second is pruned; both equal our class with ratio 0 in the first turn."""
    first, second = (make_inputs(some, [([picture(seed)], "What?")]) for seed in (1, 2))
    model, ours, found = copy_of_stock(some), load_pruned(some), []
    for each, options in ((model, {}), (ours, {"pruning_ratio": 0.0})):
        with torch.no_grad():
            cache = cache_of(each(**first, use_cache=True, **options))
            generate(each, make_inputs(some, [([picture(5, 500, 300)], "Another request?")]), **options)
        if each is model:
            with torch.no_grad():
                each(**first)  # the last request that the stock class saw is the one that goes on
            vlmpruner.prune(model)
        mask = {"attention_mask": torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)}
        with torch.no_grad():
            found.append(each(**(dict(second) | mask), **{CACHE_NAME: cache}))
    torch.testing.assert_close(found[0].logits, found[1].logits)
    records = [cache_of(outputs).pruning_record for outputs in found]
    assert records[0].num_kept == records[1].num_kept < records[0].num_visual


# What can not be pruned


@pytest.mark.once
def test_what_is_no_model_of_a_family():
    text = AutoModelForCausalLM.from_config(
        Qwen2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=16)
    )
    for model, message in (
        (text, "There is nothing to prune in a Qwen2ForCausalLM of model_type 'qwen2'"),
        (torch.nn.Linear(2, 2), "There is nothing to prune in a Linear"),
        (SimpleNamespace(), "There is nothing to prune in a SimpleNamespace"),
    ):
        for attempt in (vlmpruner.prune, vlmpruner.unprune):
            with pytest.raises(ValueError, match=f"{message}.* Supported are .* glm4v,.* smolvlm"):
                attempt(model)


@pytest.mark.once
def test_a_class_with_code_of_its_own():
    class Fork(LLAVA.stock_class):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = copy_of_stock(LLAVA)
    model.__class__ = Fork
    with pytest.raises(ValueError, match=r"Fork has code of its own on top of the class of transformers"):
        vlmpruner.prune(model)


@pytest.mark.once
def test_a_layer_of_another_class():
    class Layer(torch.nn.Module):
        pass

    model = copy_of_stock(LLAVA)
    model.get_decoder().layers[1] = Layer()
    with pytest.raises(ValueError, match=r"not supported: decoder layer 1 is a Layer\. Supported: "):
        vlmpruner.prune(model)
    assert type(model) is LLAVA.stock_class


@pytest.mark.once
def test_a_forward_that_was_replaced():
    model = copy_of_stock(LLAVA)
    layer = model.get_decoder().layers[3]
    layer.forward = MethodType(lambda self, hidden_states, **kwargs: hidden_states, layer)
    with pytest.raises(ValueError, match=r"forward of a \w+DecoderLayer was replaced by .*lambda.*Prune the model first"):
        vlmpruner.prune(model)
    assert type(model) is LLAVA.stock_class and type(layer).__module__.startswith("transformers.")


@pytest.mark.once
def test_a_class_that_another_library_has_patched(monkeypatch):
    model = copy_of_stock(LLAVA)

    def faster_forward(self, *args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(LLAVA.stock_class, "forward", faster_forward)
    with pytest.raises(ValueError, match=r"forward was replaced by code of 'test_in_place' for all models"):
        vlmpruner.prune(model)


def test_a_layer_that_is_replaced_later_does_not_run_unpruned():
    model, inputs = vlmpruner.prune(copy_of_stock(LLAVA)), make_inputs(LLAVA, ROWS)
    model.get_decoder().layers[2] = copy.deepcopy(load_stock(LLAVA).get_decoder().layers[2])
    with pytest.raises((RuntimeError, TypeError), match=r"Nothing was pruned|pruning_plan"):
        answer_of(model, inputs)


@pytest.mark.once
def test_a_tower_that_a_method_does_not_know(monkeypatch):
    model = copy_of_stock(LLAVA)
    before = type(model), dict(vars(model.config))
    monkeypatch.setattr(LLAVA.model_class, "tower_blocks", lambda self: None)
    with pytest.raises(ValueError, match="looks at the attention in the vision tower"):
        vlmpruner.prune(model, method="visionzip")
    assert (type(model), dict(vars(model.config))) == before


# Processors


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_vl", "internvl", "mistral3", "smolvlm"])
def test_a_processor_draws(name):
    family = FAMILIES[name]
    processor = AutoProcessor.from_pretrained(small_checkpoint(family))
    stock, before = type(processor), set(vars(processor))
    assert vlmpruner.prune(processor) is processor
    images = [picture(1)]
    inputs = processor(
        images=[images] if family.nested else images, text=[prompt(load_processor(family), 1)], return_tensors="pt"
    )
    with torch.no_grad():
        record = load_pruned(family)(**inputs).pruning_record
    assert processor.draw_kept_tokens(images, record) == processor.draw_kept_tokens(record=record, inputs=inputs)
    assert vlmpruner.unprune(processor) is processor
    assert type(processor) is stock and set(vars(processor)) == before


@pytest.mark.once
def test_a_processor_of_another_model():
    processor = copy.copy(load_processor(LLAVA))
    processor.__class__ = type("OtherProcessor", (type(processor),), {})
    with pytest.raises(ValueError, match=r"A OtherProcessor can not draw what was kept\. Supported are .*LlavaProcessor"):
        vlmpruner.prune(processor)
