"""What public checkpoints have and the small ones of `data/checkpoints` have not: tags of several tokens, ids at other places,
sides that patches do not fill, a head that is the embedding. Each test makes a copy that has it."""

import copy
import json
import shutil
from itertools import chain

import numpy as np
import pytest
import torch
from families import (
    FAMILIES,
    clip,
    load_pruned,
    load_stock,
    make_inputs,
    picture,
    prompt,
    small_checkpoint,
    spread_weights,
)
from test_families import CLOSE, EXACT, forward_by_hand, generate, step_logits

from vlmpruner.processing import LEGEND_HEIGHT
from vlmpruner.pruned_cache import CACHE_NAME, cache_of


pytestmark = pytest.mark.once

RATIO = 0.889


# Tags of tiles


def tags_as_text(tokenizer: dict, settings: dict) -> None:
    """Public Idefics3 and the first SmolVLM have no tokens for the tags in front of tiles: they are text."""

    def is_tag(word: str) -> bool:
        return word == "<global-img>" or word.startswith("<row_")

    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if not is_tag(token["content"])]
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {(f"unused{id}" if is_tag(word) else word): id for word, id in vocabulary.items()}
    for named in (settings, settings["extra_special_tokens"]):
        named.pop("global_image_token", None)
    tokens = settings["added_tokens_decoder"]
    settings["added_tokens_decoder"] = {id: token for id, token in tokens.items() if not is_tag(token["content"])}


def retokenized(family, folder, change):
    """The family's processor, of our class, with `change` made to tokenizer.json and tokenizer_config.json."""
    names = ("tokenizer.json", "tokenizer_config.json")
    shutil.copytree(small_checkpoint(family), folder, ignore=shutil.ignore_patterns("*.safetensors", "special_tokens_map.json"))
    contents = [json.loads((folder / name).read_text()) for name in names]
    change(*contents)
    for name, content in zip(names, contents, strict=True):
        (folder / name).write_text(json.dumps(content))
    processor = family.processor_class.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return processor


@pytest.fixture(params=["idefics3", "smolvlm"])
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(params=["text", "tokens", "both"])
def tagged(request, family, tmp_path):
    """A processor whose tags are several tokens, one, or one for some: tokenizers have none for tiles far to the right."""
    processor = retokenized(family, tmp_path / "tagged", tags_as_text if request.param == "text" else lambda *_: None)
    length = len(processor.tokenizer("<global-img>", add_special_tokens=False).input_ids)
    assert (length > 1) == (request.param == "text")
    if request.param == "both":
        side = processor.image_processor.max_image_size["longest_edge"]
        processor.image_processor.size = {"longest_edge": 7 * side}
        assert len(processor.tokenizer("<row_1_col_7>", add_special_tokens=False).input_ids) > 1
    return processor


WIDE = (560, 80)
ROWS = [[picture(1, *WIDE), picture(2, 120, 120), picture(3, *WIDE)], [], [picture(4, *WIDE)]]


def numbered(record):
    return [(entry.row, entry.image, entry.view) for entry in record]


def expected_numbers(processor, rows, **options):
    numbers, image = [], 0
    for row, images in enumerate(rows):
        for each in images:
            seen = processor.image_processor([[each]], return_row_col_info=True, return_tensors="pt", **options)
            numbers += [(row, image, view) for view in range(seen["rows"][0][0] * seen["cols"][0][0] + 1)]
            image += 1
    return numbers


@pytest.mark.parametrize("options", [{}, {"do_image_splitting": False}], ids=["split", "whole"])
def test_tiles_are_numbered_by_image_whatever_tokens_their_tags_are(family, tagged, options):
    """A tag was one token, that of the whole view. Of tags that are text it was `>`, which all of them end with."""
    model, texts = load_pruned(family), [prompt(tagged, len(images), "Which?" * (1 + row)) for row, images in enumerate(ROWS)]
    inputs = tagged(images=ROWS, text=texts, return_tensors="pt", padding=True, **options)
    numbers = expected_numbers(tagged, ROWS, **options)
    embeds = {name: value for name, value in inputs.items() if name != "input_ids"}
    embeds["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        record = model(**inputs).pruning_record
        assert numbered(record) == numbers == numbered(model(**embeds).pruning_record)
    generated = generate(model, inputs, max_new_tokens=2)
    assert numbered(cache_of(generated).pruning_record) == numbers
    placeholders = (inputs["input_ids"] == model.config.image_token_id).nonzero()
    for row in (0, 2):
        places = torch.cat([entry.positions for entry in record if entry.row == row])
        assert torch.equal(places, placeholders[placeholders[:, 0] == row, 1])
    drawn = tagged.draw_kept_tokens(record=record, inputs=inputs)
    again = tagged.draw_kept_tokens(ROWS, record, **options)
    assert len(drawn) == len(again) == 4
    for one, other in zip(drawn, again, strict=True):
        assert one.size == other.size
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 2


def test_beams_and_later_turns_number_tiles_of_tags_that_are_text(family, tmp_path):
    processor, model = retokenized(family, tmp_path / "tagged", tags_as_text), load_pruned(family)
    rows = [[picture(1), picture(2)], [picture(3)]]
    texts = [prompt(processor, len(images)) for images in rows]
    inputs = processor(images=rows, text=texts, return_tensors="pt", padding=True)
    beams = cache_of(generate(model, inputs, num_beams=2, num_return_sequences=2)).pruning_record
    assert numbered(beams) == expected_numbers(processor, [rows[0], rows[0], rows[1], rows[1]])
    first = processor(images=rows[:1], text=texts[:1], return_tensors="pt")
    turn = processor(images=rows[1:], text=texts[1:], return_tensors="pt")
    with torch.no_grad():
        cache = cache_of(model(**first, use_cache=True))
        mask = torch.cat([first["attention_mask"], turn["attention_mask"]], dim=1)
        outputs = model(**turn | {"attention_mask": mask}, **{CACHE_NAME: cache})
    assert numbered(outputs.pruning_record) == expected_numbers(processor, rows[1:])


def test_frames_are_images_where_tags_are_text(tmp_path):
    family = FAMILIES["smolvlm"]
    processor = retokenized(family, tmp_path / "tagged", tags_as_text)
    text = [prompt(processor, 0, num_videos=2)]
    inputs = processor(videos=[[clip(1, 3), clip(2, 3)]], text=text, return_tensors="pt", do_sample_frames=False)
    with torch.no_grad():
        record = load_pruned(family)(**inputs).pruning_record
    assert numbered(record) == [(0, frame, 0) for frame in range(6)]
    assert len(processor.draw_kept_tokens(record=record, inputs=inputs)) == 6


# Sides that patches do not fill


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_a_tile_is_drawn_without_the_rest_that_no_token_covers(name):
    """SmolVLM of 2.2 B has tiles of 384 pixels and patches of 14, so no token sees 6 pixels at the right and at the bottom."""
    family, rest = FAMILIES[name], 3
    model, processor = copy.deepcopy(load_pruned(family)), family.processor_class.from_pretrained(family.checkpoint)
    side = model.config.vision_config.image_size
    model.config.vision_config.image_size = side + rest
    processor.image_processor.max_image_size = processor.image_processor.size = {"longest_edge": side + rest}
    image = np.zeros((side + rest, side + rest, 3), dtype=np.uint8)
    image[:, side:] = image[side:] = 255
    inputs = processor(images=[[image]], text=[prompt(processor, 1)], do_image_splitting=False, return_tensors="pt")
    with torch.no_grad():
        record = model(**inputs).pruning_record
    for drawn in (
        processor.draw_kept_tokens(record=record, inputs=inputs, first=0),
        processor.draw_kept_tokens([image], record, first=0, do_image_splitting=False),
    ):
        assert np.asarray(drawn[0])[:-LEGEND_HEIGHT].max() <= 2


# Ids and heads


def ids_reversed(vocabulary_size: int):
    """A change that counts ids from the end, so that special tokens have the last ones."""

    def change(tokenizer: dict, settings: dict) -> None:
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        tokenizer["model"]["vocab"] = {word: vocabulary_size - 1 - id for word, id in vocabulary.items()}
        for token in tokenizer["added_tokens"]:
            token["id"] = vocabulary_size - 1 - token["id"]
        tokens = settings.get("added_tokens_decoder", {})
        settings["added_tokens_decoder"] = {str(vocabulary_size - 1 - int(id)): token for id, token in tokens.items()}

    return change


def model_of_reversed_ids(family):
    model = copy.deepcopy(load_pruned(family))
    last = model.config.get_text_config().vocab_size - 1
    for config in (model.config, model.config.get_text_config(), model.generation_config):
        for name, id in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")) and id is not None and hasattr(config, name):
                setattr(config, name, [last - each for each in id] if isinstance(id, list) else last - id)
    for holder in (model, model.model):
        if hasattr(holder, "image_token_id"):
            holder.image_token_id = model.config.image_token_id
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.copy_(module.weight.flip(0))
    return model


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_nothing_depends_on_where_ids_are(family, tmp_path):
    """Public ones are the last of a vocabulary (LLaVA, Qwen, GLM, SmolVLM), or in its beginning (Mistral), and pad is any."""
    model, last = model_of_reversed_ids(family), load_pruned(family).config.get_text_config().vocab_size - 1
    processor = retokenized(family, tmp_path / "reversed", ids_reversed(last + 1))
    rows = [[], [picture(1, 120, 120)], [picture(2, 120, 120), picture(4, 200, 80)]]
    texts = [prompt(processor, len(images), "Which one?" * (1 + len(images))) for images in rows]
    images = rows if family.nested else list(chain(*rows))
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    assert int(inputs["input_ids"].max()) > last - 8
    same = {**inputs, "input_ids": last - inputs["input_ids"]}
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 2}
    generated, expected = generate(model, inputs, **beams), generate(load_pruned(family), same, **beams)
    torch.testing.assert_close(step_logits(generated).flip(-1), step_logits(expected), **CLOSE)
    with torch.no_grad():
        record, again = model(**inputs).pruning_record, load_pruned(family)(**same).pruning_record
    assert numbered(record) == numbered(again) and [entry.image for entry in record][-1] == 2
    assert [entry.order.tolist() for entry in record] == [entry.order.tolist() for entry in again]
    assert len(processor.draw_kept_tokens(record=record, inputs=inputs)) == 3


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm", "internvl"])
def test_a_head_that_is_the_embedding_is_read_and_saved(name, tmp_path):
    """Small public models are tied (Qwen2-VL-2B, LLaVA-OneVision-0.5B): their files hold no head."""
    family = FAMILIES[name]
    config = copy.deepcopy(load_stock(family).config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    spread_weights(family.stock_class(config)).save_pretrained(tmp_path / "base")
    stock = family.stock_class.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    family.pruned_class.from_pretrained(tmp_path / "base", pruning_ratio=RATIO).save_pretrained(tmp_path / "pruned")
    model = family.pruned_class.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    inputs = make_inputs(family, [([picture(1)], "What is in the picture?")])
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, pruning_ratio=0.0).logits, stock(**inputs).logits, **EXACT)
        outputs = model(**inputs)
        logits, columns = forward_by_hand(family, inputs, outputs.pruning_record, stock=stock)
    torch.testing.assert_close(outputs.logits[0, columns], logits, **CLOSE)
