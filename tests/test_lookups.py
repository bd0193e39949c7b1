"""What libraries look up of a model by its type, its class name or its source file: ours find what the base model finds.

`LOOKUPS` is the table: library, what asks and for what, and the question. It is asked of the stock model and of ours, in every
family, and once more with the mechanism of `stock_lookups.py` taken out, where the answers have to differ. `INHERITED` is what
subclasses have anyway. A last test finds tables that a newer library brings.
"""

import json
import shutil
import sys
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, load_stock, make_inputs, picture, small_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoProcessor, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, conversion_mapping
from transformers.models.auto import (
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
    video_processing_auto,
)

from vlmpruner import export
from vlmpruner.configuration_vlmpruner import CONFIG_OF_BASE_MODEL
from vlmpruner.processing import DrawMixin, processor_class_of
from vlmpruner.stock_lookups import TABLES, TABLES_BY_CONFIG, AskedAsStockMixin, register_model_type, stock_class
from vlmpruner_lmms_eval.loading import load


SIDES = ("stock", "ours")


@lru_cache
def sides(family) -> list[SimpleNamespace]:
    """What may be asked of the stock model and of ours: their classes, and models on the meta device."""
    for module in TABLES:  # a model that is made looks which of them are there
        with suppress(ImportError):
            import_module(module)
    found = []
    stock_config = stock_class(family.config_class).from_pretrained(family.checkpoint)
    for side, config in zip(SIDES, (stock_config, family.config_class.from_pretrained(family.checkpoint)), strict=True):
        classes = (family.pruned_class, family.model_class)
        if side == "stock":
            classes = tuple(map(stock_class, classes))
        with torch.device("meta"):
            model, body = (each(config) for each in classes)
        found.append(SimpleNamespace(type=config.model_type, cls=classes[0], model=model, body=body))
    return found


def renamings(model) -> dict[tuple, str | None]:
    """Old names of weights, new ones -> the part of the model where they hold. One that comes again for a smaller part adds
    nothing."""
    found = {}
    for each in conversion_mapping.get_model_conversion_mapping(model, add_legacy=False):
        found.setdefault((type(each), *each.source_patterns, *each.target_patterns), each.scope_prefix)
    return found


def by_source(name: str):
    """A question that the library answers from the source file of a class, and keeps on the class, from which ours inherit."""

    def ask(side):
        for each in side.cls.__mro__:
            if f"{name}_cached_value" in vars(each):
                delattr(each, f"{name}_cached_value")
        return getattr(side.cls, name)()

    return ask


def response_template(side):
    utils = pytest.importorskip("transformers.cli.serving.utils")
    return utils.get_response_template(SimpleNamespace(), side.model)


def converted_targets(side):
    """What a LoRA of the time when each expert had layers of its own is put on."""
    peft = pytest.importorskip("peft")
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    convert_peft_config_for_transformers(config, side.model, None)
    return sorted(config.target_modules), sorted(config.target_parameters or ()), config.rank_pattern


def norms_to_tune(side):
    pytest.importorskip("peft")
    from peft.tuners import LNTuningModel

    return LNTuningModel.target_module_mapping.get(LNTuningModel.get_model_config(side.model)["model_type"])


def has_class(name: str):
    return lambda side: side.cls.__name__ in getattr(modeling_auto, name).values()


def has_type(name: str):
    return lambda side: side.type in getattr(modeling_auto, name)


# (library, what asks, for what) -> the question.
LOOKUPS = {
    ("transformers", "from_pretrained", "old names of weights"): lambda side: renamings(side.model),
    ("transformers", "from_pretrained", "old names of weights, without a head"): lambda side: renamings(side.body),
    ("transformers", "fusions and kernels that change layers", "the renaming that theirs is added to"): lambda side: bool(
        conversion_mapping.get_checkpoint_conversion_mapping(side.type)
    ),
    ("transformers", "AutoTokenizer", "the tokenizer class"): lambda side: tokenization_auto.TOKENIZER_MAPPING_NAMES.get(
        side.type
    ),
    ("transformers", "AutoTokenizer", "whether files name a wrong class"): lambda side: (
        side.type in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    ),
    ("transformers", "AutoImageProcessor", "the class"): lambda side: image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES.get(
        side.type
    ),
    ("transformers", "AutoTokenizer", "the class, by that of the config"): lambda side: tokenization_auto.TOKENIZER_MAPPING.get(
        type(side.model.config), None
    ),
    ("transformers", "AutoImageProcessor", "the class, by that of the config"): lambda side: (
        image_processing_auto.IMAGE_PROCESSOR_MAPPING.get(type(side.model.config), None)
    ),
    ("transformers", "AutoVideoProcessor", "the class, by that of the config"): lambda side: (
        video_processing_auto.VIDEO_PROCESSOR_MAPPING.get(type(side.model.config), None)
    ),
    ("transformers", "attention visualizer", "the processor class"): lambda side: processing_auto.PROCESSOR_MAPPING_NAMES.get(
        side.type
    ),
    ("transformers", "pipeline image-text-to-text", "a list of classes"): has_class(
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
    ),
    ("transformers", "pipeline any-to-any, transformers serve", "a list of classes"): has_class(
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"
    ),
    ("transformers", "transformers serve", "whether it takes images"): has_type("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES"),
    ("transformers", "transformers serve", "how thoughts and calls of tools are written"): response_template,
    ("transformers", "set_experts_implementation", "source of the class"): by_source("_can_set_experts_implementation"),
    ("PEFT", "PeftModel.from_pretrained", "whether names of an adapter may be old"): lambda side: bool(
        conversion_mapping.get_checkpoint_conversion_mapping(side.type)
    ),
    ("PEFT", "LoraConfig", "experts that became one parameter"): converted_targets,
    ("PEFT", "LNTuningConfig", "the layers by default"): norms_to_tune,
    ("TRL", "OnlineDPOTrainer", "whether it takes images"): has_type("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    ("vLLM", "its loader of videos", "the video processor"): lambda side: (
        video_processing_auto.VIDEO_PROCESSOR_MAPPING_NAMES.get(side.type)
    ),
}


# What subclasses have anyway: of the library's classes, or by parts of names that stay.
def attributes(side) -> dict:
    names = [name for name in dir(side.cls) if name.startswith(("_supports", "_no_split", "_tp_plan", "_pp_plan", "_keep_in"))]
    return {name: getattr(side.cls, name) for name in names if not callable(getattr(side.cls, name))}


INHERITED = {
    ("transformers", "loss_function", "class name"): lambda side: (side.model.loss_type, side.body.loss_type),
    ("transformers", "generate", "class name: whether a usual cache will do"): lambda side: (
        side.cls._supports_default_dynamic_cache()
    ),
    ("transformers", "set_attn_implementation", "source of the class"): by_source("_can_set_attn_implementation"),
    ("transformers", "backends, plans of parallelism, types of weights", "attributes"): attributes,
    ("accelerate, PEFT", "FSDP, device_map", "names of layer classes"): lambda side: sorted(
        {type(each).__name__ for each in side.body.get_decoder().modules()}
    ),
}


def names(lookups: dict) -> list[str]:
    return [": ".join(key) for key in lookups]


def answers(ask) -> dict[str, list]:
    """Family -> the answers for the stock model and for ours."""
    return {name: [ask(side) for side in sides(family)] for name, family in FAMILIES.items()}


@pytest.mark.between
@pytest.mark.parametrize("ask", [*LOOKUPS.values(), *INHERITED.values()], ids=names(LOOKUPS) + names(INHERITED))
def test_ours_find_what_the_base_finds(ask):
    found = answers(ask)
    assert {name: ours for name, (_, ours) in found.items()} == {name: stock for name, (stock, _) in found.items()}


@pytest.fixture
def taken_out(monkeypatch):
    """`stock_lookups.py` as if it had done nothing; models that exist stay."""
    for family in FAMILIES.values():
        sides(family)
    for module, tables in TABLES.items():
        for name in tables:
            table = getattr(sys.modules.get(module), name, None)
            if isinstance(table, set):
                monkeypatch.setattr(sys.modules[module], name, {each for each in table if not each.startswith("vlmpruner_")})
                continue
            for key in [key for key in table or () if "vlmpruner_" in str(key)]:
                monkeypatch.delitem(table, key)
    for table in TABLES_BY_CONFIG:
        for key in [key for key in table._reverse_config_mapping if key.startswith("VLMPruner")]:
            monkeypatch.delitem(table._reverse_config_mapping, key)
    registered = conversion_mapping._checkpoint_conversion_mapping_cache
    for key in [key for key in registered if key.lower().startswith("vlmpruner")]:
        monkeypatch.delitem(registered, key)
    monkeypatch.setattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", set())
    for name in ("_can_set_attn_implementation", "_can_set_experts_implementation"):
        monkeypatch.delattr(AskedAsStockMixin, name)


@pytest.mark.once
@pytest.mark.parametrize("ask", LOOKUPS.values(), ids=names(LOOKUPS))
def test_ours_find_less_without_the_mechanism(ask, taken_out):
    assert any(ours != stock for stock, ours in answers(ask).values())


# Tables that are keyed by what we have not: they choose the class of a config or a model.
LEFT_OUT = {
    *(
        "CONFIG_MAPPING",
        "CONFIG_MAPPING_NAMES",
        "CONFIG_TO_TYPE",
        "SPECIAL_MODEL_TYPE_TO_MODULE_NAME",
        "_modules",
        "_class_to_module",
    ),
    *("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "TASK_MAPPING"),
    *("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "MODEL_FOR_DECISION_MAPPING_NAMES"),
    *(f"MISSING_{part}_MAPPING_NAMES" for part in ("PROCESSOR", "IMAGE_PROCESSOR", "VIDEO_PROCESSOR")),  # parts of others
}


def types_in(table) -> set[str]:
    """The strings of a set, and of the keys of a dict, also in tuples."""
    return {each for key in table for each in (key if isinstance(key, tuple) else (key,)) if isinstance(each, str)}


def test_no_table_by_model_type_was_forgotten():
    """Looked for in all modules of the libraries that are loaded here, apart from each model's own."""
    for module in TABLES:
        with suppress(ImportError):
            import_module(module)
    for config_class in CONFIG_OF_BASE_MODEL.values():
        register_model_type(config_class)
    forgotten = []
    for module, loaded in list(sys.modules.items()):
        is_model = module.startswith("transformers.models.") and not module.startswith("transformers.models.auto.")
        if is_model or module.split(".")[0] not in ("accelerate", "peft", "transformers", "trl"):
            continue
        for name, table in list(vars(loaded).items()):
            if not isinstance(table, dict | set | frozenset | list | tuple) or name in LEFT_OUT or name.startswith("__"):
                continue
            types = types_in(table)
            lacking = [base for base in CONFIG_OF_BASE_MODEL if base in types and f"vlmpruner_{base}" not in types]
            forgotten += [f"{module}.{name}: {', '.join(lacking)}"] if lacking else []
    assert not forgotten


# What follows from it


@pytest.mark.once
@pytest.mark.parametrize("name", ["llava", "llava_next_video"])
def test_an_adapter_with_old_names_has_its_effect(name, tmp_path):
    """As written with transformers before 4.52, whose language models stood at another place."""
    peft, family = pytest.importorskip("peft"), FAMILIES[name]
    folder, inputs = small_checkpoint(family), make_inputs(family, [([picture(1, 100, 80)], "What is it?")])
    lora = peft.LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    trained = peft.get_peft_model(family.stock_class.from_pretrained(folder, dtype=torch.float32).eval(), lora)
    trained.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    old = {key.replace("model.model.language_model.", "model.language_model.model."): each for key, each in weights.items()}
    assert not old.keys() & weights.keys()
    save_file(old, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    results = [trained]
    for put_on in (peft.PeftModel.from_pretrained, lambda model, adapter: model.load_adapter(adapter) and model):
        model = family.pruned_class.from_pretrained(folder, dtype=torch.float32, pruning_ratio=0.0).eval()
        results.append(put_on(model, tmp_path).eval())
    with torch.no_grad():
        logits = [model(**inputs).logits for model in results]
    assert (logits[0] - load_stock(family)(**inputs).logits).abs().max() > 1e-3
    for found in logits[1:]:
        torch.testing.assert_close(found, logits[0], rtol=0, atol=0)


@pytest.mark.once
def test_lora_on_experts_of_the_old_layout_is_put_on_the_new():
    peft, family = pytest.importorskip("peft"), FAMILIES["glm4v_moe"]
    names = []
    for cls in (family.stock_class, family.pruned_class):
        lora = peft.LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"])
        model = peft.get_peft_model(cls.from_pretrained(family.checkpoint), lora)
        names.append(sorted(name for name, weight in model.named_parameters() if weight.requires_grad))
    assert names[0] == names[1] and any("experts" in name for name in names[0])


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_an_implementation_of_experts_can_be_chosen(implementation):
    family = FAMILIES["qwen3_vl_moe"]
    inputs, results = make_inputs(family, [([picture(1, 100, 80)], "What is it?")]), []
    for cls in (family.stock_class, family.pruned_class):
        model = cls.from_pretrained(family.checkpoint, experts_implementation=implementation, dtype=torch.float32).eval()
        assert model.config.get_text_config()._experts_implementation == implementation
        if cls is family.pruned_class:
            model.config.pruning_ratio = 0.0
        with torch.no_grad():
            results.append(model(**inputs).logits)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_model_without_a_head_reads_all_weights(tmp_path):
    """Of a checkpoint whose experts have weights of their own, as published; and says which are missing."""
    family = FAMILIES["glm4v_moe"]
    ours, stock = (cls.from_pretrained(family.checkpoint) for cls in (family.model_class, stock_class(family.model_class)))
    for (name, weight), expected in zip(ours.state_dict().items(), stock.state_dict().values(), strict=True):
        assert torch.equal(weight, expected), name
    folder = shutil.copytree(family.checkpoint, tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.1.self_attn.q_proj.weight"))
    save_file(
        {name: weight for name, weight in weights.items() if name != lost}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lacks 1 of the weights of VLMPrunerGlm4vMoeModel: .*layers\.1\.self_attn\.q_proj"):
        family.model_class.from_pretrained(folder)
    ours.save_pretrained(tmp_path / "saved")
    again = family.model_class.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in ours.state_dict().items())


# Tokenizers and processors


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokenizer_is_of_the_same_class(name, tmp_path):
    """Read by the library's own class: of the base, and of the base's files with our config."""
    family = FAMILIES[name]
    for path in family.checkpoint.glob("*.*"):
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    config = family.config_class.from_pretrained(family.checkpoint)
    for named in (True, False):
        if not named:  # files do not always say it
            content = json.loads((tmp_path / "tokenizer_config.json").read_text())
            content.pop("tokenizer_class", None)
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
        stock, ours = (AutoTokenizer.from_pretrained(tmp_path, **options) for options in ({}, {"config": config}))
        assert type(ours) is type(stock)
        text = "It's 12345 words, or eBay's  two?"
        assert ours(text)["input_ids"] == stock(text)["input_ids"]


@pytest.mark.once
def test_a_tekken_file_beside_the_tokenizer_is_left_alone(tmp_path, monkeypatch):
    """As by the stock processor, which the library knows by its name."""
    family = FAMILIES["mistral3"]
    folder = shutil.copytree(family.checkpoint, tmp_path / "base")
    (folder / "tekken.json").write_text("{}")

    def read_tekken(*args, **kwargs):
        raise AssertionError("The tekken file is read.")

    monkeypatch.setattr(tokenization_auto, "_use_mistral_format", read_tekken)
    monkeypatch.setitem(tokenization_auto.TOKENIZER_MAPPING_NAMES, "mistral3", "MistralCommonBackend")  # as with mistral-common
    stock, ours = (cls.from_pretrained(folder) for cls in (stock_class(family.processor_class), family.processor_class))
    assert type(ours.tokenizer) is type(stock.tokenizer)
    monkeypatch.delattr(DrawMixin, "_get_arguments_from_pretrained")
    with pytest.raises(AssertionError, match="tekken"):
        family.processor_class.from_pretrained(folder)


LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.once
def test_an_export_mends_a_tokenizer_that_the_library_warns_of(tmp_path):
    """Those of Mistral Small 3.1 split words wrongly. The library knows them by type and version of config.json, of which an
    export states others."""
    base = shutil.copytree(FAMILIES["mistral3"].checkpoint, tmp_path / "base")
    content = json.loads((base / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": LLAMA_3_WORDS}, "behavior": "Isolated", "invert": False}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, whole]}
    content["model"]["vocab"] |= {f"unused{number}": number for number in range(1000, 102000)}  # only large ones are looked at
    (base / "tokenizer.json").write_text(json.dumps(content))
    edit_json(base / "config.json", transformers_version="4.50.0")

    def words(file):
        tokenizer = Tokenizer.from_file(str(file))
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("pH of eBay: 12345")]

    def written(folder):
        """What the export says, and the words of the tokenizer that it writes."""
        folder.mkdir()
        checkpoint, lines = export.Base.open(base), []
        export.write_processor(folder, checkpoint, export.pruned_config(checkpoint, {}), lines.append)
        return lines, words(folder / "tokenizer.json")

    lines, found = written(tmp_path / "mended")
    right = AutoTokenizer.from_pretrained(base, fix_mistral_regex=True)
    assert found == [word for word, _ in right.backend_tokenizer.pre_tokenizer.pre_tokenize_str("pH of eBay: 12345")]
    assert lines == ["the tokenizer of base splits words wrongly: mended, as fix_mistral_regex=True does"]
    edit_json(base / "config.json", transformers_version="5.0.0")  # for which the library takes a tokenizer for a right one
    lines, kept = written(tmp_path / "kept")
    assert (lines, kept) == ([], words(base / "tokenizer.json")) and kept != found


@pytest.fixture
def pixtral(tmp_path):
    """A checkpoint like Pixtral-12B: a `llava` model with a Pixtral tower, whose files name Pixtral's processor."""
    source, folder = FAMILIES["mistral3"].checkpoint, tmp_path / "pixtral"
    content = json.loads((source / "config.json").read_text())
    config = LlavaConfig(
        vision_config=content["vision_config"],
        text_config=content["text_config"],
        image_token_id=content.get("image_token_id", content.get("image_token_index")),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    for path in source.iterdir():
        if any(part in path.name for part in ("token", "process", "template")):
            shutil.copy(path, folder)
    edit_json(folder / "processor_config.json", spatial_merge_size=1)
    return folder


@pytest.mark.once
def test_llava_with_a_pixtral_tower_keeps_its_processor(pixtral, tmp_path):
    exported = export.export_model(pixtral, tmp_path / "pruned", report=lambda line: None)
    stock, ours = AutoProcessor.from_pretrained(pixtral), AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    image = picture(3, 120, 90)
    text = stock.apply_chat_template([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}])
    expected, inputs = (each(images=[image], text=[text], return_tensors="pt") for each in (stock, ours))
    assert expected.keys() == inputs.keys()
    assert all(inputs[name].equal(value) for name, value in expected.items())
    assert (inputs["input_ids"] == stock.tokenizer.convert_tokens_to_ids("[IMG_BREAK]")).sum() == 6
    family = FAMILIES["llava"]
    model = family.pruned_class.from_pretrained(exported, dtype=torch.float32, pruning_ratio=0.5).eval()
    with torch.no_grad():
        record = model(**inputs).pruning_record
    assert [entry.grid for entry in record] == [(7, 9)]
    assert len(ours.draw_kept_tokens(record=record, inputs=inputs)) == len(ours.draw_kept_tokens([image], record)) == 1
    again = export.export_model(exported, tmp_path / "again", report=lambda line: None)
    assert type(AutoProcessor.from_pretrained(again, trust_remote_code=True)).__name__ == type(ours).__name__
    _, evaluated = load(str(pixtral), pruning_ratio=0.5)  # by lmms-eval, without an export
    assert type(evaluated) is FAMILIES["mistral3"].processor_class
    back = export.export_model(exported, tmp_path / "back", to_base=True, report=lambda line: None)
    assert type(AutoProcessor.from_pretrained(back)) is type(stock)


@pytest.mark.once
@pytest.mark.parametrize("file", ["processor_config.json", "preprocessor_config.json", "tokenizer_config.json"])
def test_a_processor_that_is_not_known_is_refused(file, tmp_path):
    base = shutil.copytree(FAMILIES["llava"].checkpoint, tmp_path / "base")
    for path in base.glob("*config.json"):
        content = json.loads(path.read_text())
        content.pop("processor_class", None)
        path.write_text(json.dumps(content))
    edit_json(base / file, processor_class="Blip2Processor")
    with pytest.raises(
        ValueError, match=r"base can not be exported. .*llava model name the processor 'Blip2Processor', which is"
    ):
        export.export_model(base, tmp_path / "pruned", report=lambda line: None)
    assert not (tmp_path / "pruned").exists()


@pytest.mark.once
def test_every_processor_is_found_by_the_name_that_the_library_saves():
    for family in FAMILIES.values():
        for name in (None, family.processor_class.__name__, stock_class(family.processor_class).__name__):
            assert processor_class_of(family.config_class, [{}, {"processor_class": name}]) is family.processor_class
