"""Our models in the hands of the tools that people use around transformers: pickling, trainers, adapters, sharding, export."""

import copy
import functools
import pickle
import re
import textwrap
from pathlib import Path

import pytest
import torch
from families import FAMILIES, load_processor, load_pruned, load_stock, make_inputs, picture, small_checkpoint
from torch.utils._pytree import tree_leaves
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache, Trainer, TrainingArguments

from vlmpruner import pruned_model
from vlmpruner.pruned_cache import CACHE_NAME, cache_of


TESTS = Path(__file__).parent
EXACT = {"rtol": 0, "atol": 0}


@pytest.fixture(params=["llava", "qwen2_vl", pytest.param("qwen3_vl", marks=pytest.mark.once)])
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def inputs(family):
    return make_inputs(family, [([picture(1, 140, 112)], "What is it?"), ([picture(2, 140, 112)], "And here, what?")])


def text_labels(model, inputs):
    """Labels for all text: the first of them is what the last token of the image would have to predict."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return labels.masked_fill(labels == model.config.image_token_id, -100)


def loss_by_hand(outputs, labels):
    """The mean over the labels that tokens which stayed predict; logits of the others are all 0."""
    counted = (outputs.logits[:, :-1] != 0).any(-1) & (labels[:, 1:] != -100)
    assert counted.sum() < (labels[:, 1:] != -100).sum()  # some were dropped
    return torch.nn.functional.cross_entropy(outputs.logits[:, :-1][counted].float(), labels[:, 1:][counted])


# Pickling


LOAD_AND_GO_ON = """
import sys
import torch
from vlmpruner.pruned_cache import CACHE_NAME

folder = sys.argv[1]
model, outputs, cache, token, mask = (
    torch.load(f"{folder}/{name}.pt", weights_only=False) for name in ("model", "outputs", "cache", "token", "mask")
)
kept = [[image.kept.tolist() for image in record] for record in (outputs.pruning_record, cache.pruning_record)]
assert kept[0] == kept[1] == [image.kept.tolist() for image in model.get_pruning_record(outputs)] and kept[0]
with torch.no_grad():
    logits = model(input_ids=token, attention_mask=mask, **{CACHE_NAME: cache}).logits
torch.testing.assert_close(logits, torch.load(f"{folder}/logits.pt"), rtol=0, atol=0)
print(type(model).__name__, type(cache).__name__)
"""


def test_model_outputs_and_cache_go_to_another_process(family, inputs, fresh_python, tmp_path):
    """As a prefix cache on disk, or what a worker returns: the same state there, and the next token from it is the same."""
    # A LLaVA model that has run can not be pickled, the stock class neither: the library's hooks on its tower are local.
    model = family.pruned_class.from_pretrained(small_checkpoint(family), pruning_ratio=0.889).eval()
    torch.save(model, tmp_path / "model.pt")
    token = torch.full((2, 1), 9)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
        saved = {"outputs": outputs, "cache": cache_of(outputs), "token": token, "mask": mask}
        for name, each in saved.items():
            torch.save(each, tmp_path / f"{name}.pt")
        logits = model(input_ids=token, attention_mask=mask, **{CACHE_NAME: cache_of(outputs)}).logits
    torch.save(logits, tmp_path / "logits.pt")
    done = fresh_python.run("-c", LOAD_AND_GO_ON, tmp_path, cwd=tmp_path)
    assert done.stdout.split() == [type(model).__name__, "PrunedDynamicCache"], done.stderr


@pytest.mark.parametrize("ratio", [0.889, 0.0])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_pickled_cache_goes_on_as_the_original(family, inputs, kind, ratio):
    model, length = load_pruned(family, pruning_ratio=ratio), inputs["input_ids"].shape[1]
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=length + 4)
    token, mask = torch.full((2, 1), 9), torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        model(**inputs, **{CACHE_NAME: cache})
        loaded = pickle.loads(pickle.dumps(cache))
        assert type(loaded) is type(cache) and [type(a) for a in loaded.layers] == [type(b) for b in cache.layers]
        order = torch.tensor([1, 0])
        for each in (cache, loaded):
            each.reorder_cache(order)
        steps = [model(input_ids=token, attention_mask=mask[order], **{CACHE_NAME: each}).logits for each in (cache, loaded)]
    torch.testing.assert_close(*steps, **EXACT)


def test_outputs_hold_what_the_stock_class_s_do(family, inputs):
    """Gathering, walking and casting tools meet nothing of ours in them; the record is an attribute."""
    model, stock = load_pruned(family), load_stock(family)
    labels = text_labels(model, inputs)
    with torch.no_grad():
        ours, theirs = (each(**inputs, labels=labels, use_cache=False) for each in (model, stock))
        tuples = [each(**inputs, use_cache=False, return_dict=False) for each in (model, stock)]
    # Before transformers 5.20 it repeats an attribute of the module, set by whatever came before; ours is not set by a forward.
    fields = [[name for name in each if name != "rope_deltas"] for each in (ours, theirs)]
    assert type(ours) is type(theirs) and fields[0] == fields[1]
    leaves = [[type(leaf) for leaf in tree_leaves([each[name] for name in fields[0]])] for each in (ours, theirs)]
    assert leaves[0] == leaves[1]
    if "rope_deltas" not in theirs:
        assert len(tuples[0]) == len(tuples[1])
    assert ours.pruning_record.num_kept < ours.pruning_record.num_visual


# Trainer


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, number):
        return {"seed": number}


def collate(family, model):
    def collated(rows):
        batch = make_inputs(family, [([picture(row["seed"], 140, 112)], "What is it?") for row in rows])
        return dict(batch) | {"labels": text_labels(model, batch)}

    return collated


def trainer(family, model, folder, **options):
    names = ("compute_metrics", "compute_loss_func")
    rest = {name: options.pop(name) for name in names if name in options}
    arguments = TrainingArguments(
        output_dir=folder,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **options,
    )
    data = Rows()
    return Trainer(
        model=model, args=arguments, data_collator=collate(family, model), train_dataset=data, eval_dataset=data, **rest
    )


NOT_TENSORS = ["image_outputs", "video_outputs", "cache", "past_key_values", "image_hidden_states"]  # also of the stock class


@pytest.mark.once
def test_trainer_evaluates_and_predicts(family, tmp_path):
    model = copy.deepcopy(load_pruned(family))
    evaluating = trainer(family, model, tmp_path, compute_metrics=lambda prediction: {"n": len(prediction.label_ids)})
    assert evaluating.evaluate(ignore_keys=NOT_TENSORS)["eval_n"] == 2
    assert evaluating.predict(Rows(), ignore_keys=NOT_TENSORS).metrics["test_n"] == 2


@pytest.mark.once
@pytest.mark.parametrize(("accumulation", "bf16"), [(1, False), (2, False), (2, True)])
def test_loss_of_a_training_step_is_the_one_by_hand(family, tmp_path, accumulation, bf16):
    """`Trainer` divides the sum of a step by its number of labels, counted before the model leaves some out."""
    model = copy.deepcopy(load_pruned(family))
    options = {"bf16": bf16, "per_device_train_batch_size": 2 // accumulation, "gradient_accumulation_steps": accumulation}
    step = trainer(
        family, model, tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0, lr_scheduler_type="constant", **options
    )
    batches = [collate(family, model)([{"seed": seed}]) for seed in (0, 1)]
    if accumulation == 1:
        batches = [collate(family, model)([{"seed": 0}, {"seed": 1}])]
    step.train()
    logged = next(entry["loss"] for entry in step.state.log_history if "loss" in entry)
    with torch.no_grad():
        losses = [
            loss_by_hand(model(**{k: v for k, v in batch.items() if k != "labels"}), batch["labels"]) for batch in batches
        ]
    assert float(logged) == pytest.approx(float(torch.stack(losses).mean()), abs=0.2 if bf16 else 1e-3)


@pytest.mark.once
def test_smoothed_loss_leaves_out_what_dropped_tokens_predict(family, tmp_path):
    """`label_smoothing_factor` takes the labels away before the model sees them, and its loss counts rows of zero states."""
    model = copy.deepcopy(load_pruned(family))
    smoothed = functools.partial(model.loss_of_kept_tokens, label_smoothing=0.1)
    step = trainer(family, model, tmp_path, compute_loss_func=smoothed, max_steps=1, logging_steps=1, learning_rate=0.0)
    batch = collate(family, model)([{"seed": 0}, {"seed": 1}])
    with torch.no_grad():
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        counted = (outputs.logits[:, :-1] != 0).any(-1) & (batch["labels"][:, 1:] != -100)
        expected = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1][counted].float(), batch["labels"][:, 1:][counted], label_smoothing=0.1
        )
    step.train()
    logged = next(entry["loss"] for entry in step.state.log_history if "loss" in entry)
    assert float(logged) == pytest.approx(float(expected), abs=1e-3)


def test_who_computes_the_loss_elsewhere_is_told_once(family, inputs, monkeypatch):
    model, told = copy.deepcopy(load_pruned(family)), []
    monkeypatch.setattr(pruned_model.logger, "warning_once", told.append)
    labels = text_labels(model, inputs)
    model(**inputs, labels=labels)
    with torch.no_grad():
        model.train()(**inputs)
    assert not told
    model(**inputs, labels=labels)
    assert not told
    model(**inputs)
    model.model(**inputs)
    assert len(told) == 2 and all("loss_of_kept_tokens" in message for message in told)


# TRL and PEFT


@pytest.mark.once
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_trl_with_the_loss_of_kept_tokens(name, tmp_path):
    """TRL calls the backbone and computes the loss itself, over the rows of dropped tokens too, unless it is given ours."""
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    family, model = FAMILIES[name], copy.deepcopy(load_pruned(FAMILIES[name]))
    processor = load_processor(family)
    message = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A picture of squares."}]
    rows = Dataset.from_list([{"messages": message, "images": [picture(seed, 140, 112)]} for seed in range(2)])
    arguments = SFTConfig(
        output_dir=tmp_path,
        max_length=None,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        report_to=[],
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=2,
        disable_tqdm=True,
        save_strategy="no",
    )
    losses = {}
    for how, function in (("ours", model.loss_of_kept_tokens), ("theirs", None)):
        training = SFTTrainer(
            model=copy.deepcopy(model),
            args=arguments,
            train_dataset=rows,
            processing_class=processor,
            compute_loss_func=function,
        )
        training.train()
        losses[how] = float(next(entry["loss"] for entry in training.state.log_history if "loss" in entry))
        batch = training.data_collator([rows[0], rows[1]])
    with torch.no_grad():
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
    assert losses["ours"] == pytest.approx(float(loss_by_hand(outputs, batch["labels"])), abs=2e-3)
    assert abs(losses["theirs"] - losses["ours"]) > 0.01  # what the setting is for


@pytest.mark.once
def test_the_trainers_of_the_page_take_the_loss(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    page = (TESTS.parent / "docs" / "training.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    model, options = copy.deepcopy(load_pruned(FAMILIES["llava"])), {"output_dir": tmp_path, "report_to": [], "use_cpu": True}
    names = {"model": model, "data": Rows(), "arguments": TrainingArguments(**options), "Trainer": Trainer}
    sft_config = trl.SFTConfig(**options, bf16=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    made = []

    def sft_trainer(*args, **kwargs):
        message = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A picture."}]
        rows = Dataset.from_list([{"messages": message, "images": [picture(1, 140, 112)]}])
        processor = load_processor(FAMILIES["llava"])
        made.append(trl.SFTTrainer(*args, **kwargs | {"train_dataset": rows, "processing_class": processor}))
        return made[-1]

    from datasets import Dataset

    exec(code, names | {"SFTTrainer": sft_trainer, "sft_config": sft_config})
    assert made[0].compute_loss_func == model.loss_of_kept_tokens


@pytest.mark.once
@pytest.mark.parametrize("ratio", [0.889, 0.0])
def test_prompt_tuning(family, ratio):
    """Virtual tokens come as embeddings before the others, so the token types are shorter; off equals the stock class."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    results, inputs = [], make_inputs(family, [([picture(1, 140, 112)], "What is it?")])
    for model in (load_pruned(family, pruning_ratio=ratio), load_stock(family)):
        text = model.config.get_text_config()
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=4,
            token_dim=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
        )
        torch.manual_seed(0)
        model = copy.deepcopy(model)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = None  # of an earlier request: the stock Qwen model keeps it on the module
        tuned = peft.get_peft_model(model, config)
        outputs = tuned(**inputs, labels=inputs["input_ids"])
        outputs.loss.backward()
        assert tuned.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1
        results.append(outputs.logits.detach())
    if ratio == 0:
        torch.testing.assert_close(*results, **EXACT)
    else:
        assert (results[0] == 0).all(-1).any()


@pytest.mark.once
def test_lora_learns_merges_and_saves(family, tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    batch = collate(family, load_pruned(family))([{"seed": 0}, {"seed": 1}])
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|gate_proj)")
    tuned = peft.get_peft_model(copy.deepcopy(load_pruned(family)).train(), config)
    optimizer, losses = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-2), []
    for _ in range(6):
        outputs = tuned(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(outputs.loss))
    assert losses[-1] < losses[0] - 0.1
    tuned.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(load_pruned(family)), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = tuned(**batch)
        torch.testing.assert_close(again(**batch).logits, expected.logits, **EXACT)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected.logits, rtol=0, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        reloaded = family.pruned_class.from_pretrained(tmp_path / "merged").eval()(**batch)
    torch.testing.assert_close(reloaded.logits, merged(**batch).logits, **EXACT)


# FSDP


@pytest.mark.once
def test_fsdp_wraps_by_the_name_of_the_stock_layer(family):
    from accelerate import FullyShardedDataParallelPlugin

    model, stock = load_pruned(family), load_stock(family)
    name = type(stock.model.language_model.layers[0]).__name__
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=1, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=[name]
    )
    plugin.set_auto_wrap_policy(model)
    (wrapped,) = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
    assert all(type(layer) is wrapped for layer in model.model.language_model.layers)
    outcomes = []  # by default, by `_no_split_modules`: as the stock class, which fails where CLIP names a text layer
    for each in (model, stock):
        default = FullyShardedDataParallelPlugin(fsdp_version=1, auto_wrap_policy="transformer_based_wrap")
        try:
            default.set_auto_wrap_policy(each)
            outcomes.append({layer.__name__ for layer in default.auto_wrap_policy.keywords["transformer_layer_cls"]})
        except ValueError as error:
            outcomes.append(str(error).split(" in ")[0].rsplit(" ", 1)[0])
    assert outcomes[0] == outcomes[1]


FSDP2_STEP = """
    import copy, os, sys
    import torch, torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from families import FAMILIES, load_pruned, make_inputs, picture

    family = FAMILIES[sys.argv[1]]
    model = load_pruned(family).train()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    inputs = make_inputs(family, [([picture(dist.get_rank() + 1, 140, 112)], "What is it?")])
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if sys.argv[2] == "bf16" else MixedPrecisionPolicy()
    alone = copy.deepcopy(model)
    with torch.no_grad():
        expected = alone(**inputs, labels=labels)
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        outputs = model(**inputs, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(outputs.loss))
    assert outputs.pruning_record.num_kept == expected.pruning_record.num_kept
    assert abs(losses[0] - float(expected.loss)) < (1e-3 if sys.argv[2] == "float32" else 0.2), (losses, expected.loss)
    assert losses[1] < losses[0]
    dist.destroy_process_group()
"""


@pytest.mark.once
@pytest.mark.parametrize(("name", "dtype"), [("qwen2_vl", "float32"), ("internvl", "bf16")])
def test_two_processes_train_under_fsdp2(name, dtype, fresh_python, tmp_path):
    path = [TESTS, TESTS.parent]
    ranks = fresh_python.run_ranks(2, "-c", textwrap.dedent(FSDP2_STEP), name, dtype, cwd=tmp_path, path=path)
    assert not any(rank.returncode for rank in ranks), "\n".join(rank.stderr[-3000:] for rank in ranks)


# Continuous batching, export


@pytest.mark.once
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_continuous_batching_takes_text_and_refuses_images(name):
    family = FAMILIES[name]
    model, stock = load_pruned(family), load_stock(family)
    texts = [make_inputs(family, [([], text)])["input_ids"][0].tolist() for text in ("Hello there", "What is this, then?")]
    image = make_inputs(family, [([picture(1)], "What?")])["input_ids"][0].tolist()
    generation = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = {"num_blocks": 8, "max_batch_tokens": 64}
    answers = []
    for each in (model, stock):
        config = ContinuousBatchingConfig(**small)
        outputs = each.generate_batch(texts, generation_config=generation, continuous_batching_config=config, warmup=False)
        answers.append([output.generated_tokens for output in outputs.values()])
    assert answers[0] == answers[1] and all(len(answer) == 4 for answer in answers[0])
    with pytest.raises(ValueError, match=r"Request 1 holds image_token_id=\d+, but continuous batching takes text alone"):
        model.generate_batch([texts[0], image], generation_config=generation)
    manager = model.init_continuous_batching(generation_config=generation)
    with pytest.raises(ValueError, match="continuous batching takes text alone"):
        manager.add_request(image)


@pytest.mark.once
def test_export_traces_what_the_stock_class_s_does(family, inputs):
    text = make_inputs(family, [([], "Hello there")])
    model = load_pruned(family)
    program = torch.export.export(model, (), dict(text) | {"use_cache": False}, strict=False)
    with torch.no_grad():
        expected = model(**text, use_cache=False).logits
    torch.testing.assert_close(program.module()(**text, use_cache=False).logits, expected, **EXACT)
    if family.name == "llava":  # of the others, the stock class's own image code can not be traced either
        off = load_pruned(family, pruning_ratio=0.0)
        program = torch.export.export(off, (), dict(inputs) | {"use_cache": False}, strict=False)
        with torch.no_grad():
            expected = off(**inputs, use_cache=False).logits
        torch.testing.assert_close(program.module()(**inputs, use_cache=False).logits, expected, **EXACT)
        with pytest.raises(ValueError, match=r"torch\.export can not trace which tokens stay"):
            torch.export.export(model, (), dict(inputs) | {"use_cache": False}, strict=False)


def test_video_features_of_a_config_that_returns_tuples():
    """Qwen3-VL's stock method calls the one for images, which then returned a tuple where ours looked for fields."""
    family = FAMILIES["qwen3_vl"]
    outcomes = []
    for model in (copy.deepcopy(load_pruned(family)), copy.deepcopy(load_stock(family))):
        model.config.return_dict = False
        vision = model.config.vision_config
        pixels = torch.zeros(16, 3 * vision.temporal_patch_size * vision.patch_size**2)
        with torch.no_grad():
            outcomes.append(model.model.get_video_features(pixels, torch.tensor([[1, 4, 4]])))
    assert type(outcomes[0]) is type(outcomes[1]) and len(outcomes[0]) == len(outcomes[1])
