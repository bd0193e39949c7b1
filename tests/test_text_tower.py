"""CDPruner's relevance by CLIP's text tower: against a restatement on a tiny CLIP, and what a user may get wrong."""

import copy
import json
import string
from functools import partial

import method_oracles
import numpy as np
import pytest
import torch
from families import FAMILIES, load_pruned, load_stock, make_inputs, picture
from test_families import CLOSE, generate, step_logits
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from vlmpruner import text_tower
from vlmpruner.method_cdpruner import INSTRUCTION
from vlmpruner.pruned_cache import cache_of


LLAVA = FAMILIES["llava"]
ROWS = [
    ([picture(1)], "What is in the picture?"),
    ([picture(2), picture(3, 200, 300)], "Which one?"),
]
QUESTIONS = ["What colour is the lamp?" + INSTRUCTION, "Is there any text? " + "where and how much of it " * 6]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP whose vision tower is as wide as LLaVA's, and whose tokenizer knows letters."""
    torch.manual_seed(0)
    letters = list(string.ascii_lowercase + "?.")
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ends = {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={"hidden_size": 16, "projection_dim": 12, "vocab_size": len(vocabulary), **sizes, **ends},
        vision_config={"hidden_size": 32, "image_size": 28, "patch_size": 14, **sizes},
        projection_dim=12,
    )
    model = CLIPModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    CLIPTokenizer({token: number for number, token in enumerate(vocabulary)}, []).save_pretrained(folder)
    return str(folder)


def load(clip, **keys):
    model = copy.deepcopy(load_pruned(LLAVA))
    for key, value in ({"method": "cdpruner", "ratio": 0.97, "text_tower": clip} | keys).items():
        setattr(model.config, f"pruning_{key}", value)
    return model


def test_relevance_is_that_of_clip(clip):
    model, inputs = load(clip), make_inputs(LLAVA, ROWS)
    with torch.no_grad():
        record = model(**inputs, pruning_question=QUESTIONS).pruning_record
        stock, both = load_stock(LLAVA).model, CLIPModel.from_pretrained(clip)
        states = stock.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
        patches = both.visual_projection(both.vision_model.post_layernorm(states)).double().numpy()
        features = stock.multi_modal_projector(states).double().numpy()
        tokenizer, text = CLIPTokenizer.from_pretrained(clip), CLIPTextModelWithProjection.from_pretrained(clip)
        whole = tokenizer(QUESTIONS[0].removesuffix(INSTRUCTION), return_tensors="pt")
        tokens = tokenizer(QUESTIONS[1], add_special_tokens=False).input_ids
        assert len(tokens) > 77 - 2
        halves = [tokenizer.bos_token_id, *tokens[:75], tokenizer.eos_token_id], [tokenizer.bos_token_id, *tokens[75:]]
        halves = [torch.tensor([half]) for half in (halves[0], [*halves[1], tokenizer.eos_token_id])]
        texts = [[text(**whole).text_embeds], [text(half).text_embeds for half in halves]]
    assert [image.row for image in record] == [0, 1, 1]
    for number, image in enumerate(record):
        embeddings = torch.cat(texts[image.row]).double().numpy()
        relevance = -(method_oracles.unit(patches[number]) @ method_oracles.unit(embeddings).T).mean(1)
        facts = method_oracles.Image(num_keep=image.num_kept, hidden_states=features[number])
        assert image.order.tolist() == method_oracles.cdpruner(facts, relevance=relevance)
    with torch.no_grad():
        other = model(**inputs, pruning_question=QUESTIONS[::-1]).pruning_record
        embedded = load(None)(**inputs).pruning_record
    for changed in (other, embedded):
        assert any(not torch.equal(image.order, before.order) for image, before in zip(changed, record, strict=True))


def test_questions_follow_rows_and_beams(clip):
    model, inputs = load(clip), make_inputs(LLAVA, ROWS)
    cached = generate(model, inputs, pruning_question=QUESTIONS)
    uncached = generate(model, inputs, pruning_question=QUESTIONS, use_cache=False)
    torch.testing.assert_close(step_logits(cached), step_logits(uncached), **CLOSE)
    beams = generate(model, inputs, pruning_question=QUESTIONS, num_beams=2)
    of_beams = cache_of(beams).pruning_record
    for row in range(2):
        single = generate(model, make_inputs(LLAVA, [ROWS[row]]), pruning_question=QUESTIONS[row])
        torch.testing.assert_close(step_logits(cached)[row], step_logits(single)[0], **CLOSE)
        expected = [image.order.tolist() for image in cache_of(single).pruning_record]
        for beam in (2 * row, 2 * row + 1):
            assert [image.order.tolist() for image in of_beams if image.row == beam] == expected


def test_it_is_loaded_once_and_is_no_part_of_the_model(clip, tmp_path, monkeypatch):
    model, inputs = load(clip), make_inputs(LLAVA, ROWS[:1])
    names, loaded = set(model.state_dict()), []
    text_tower._load.cache_clear()
    stock = CLIPModel.from_pretrained
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *args, **kwargs: loaded.append(args) or stock(*args, **kwargs))
    with torch.inference_mode():
        model(**inputs, pruning_question="What?")
    outputs = model.train()(**inputs, labels=inputs["input_ids"], pruning_question=["What?"])
    outputs.loss.backward()
    assert len(loaded) == 1 and set(model.state_dict()) == names
    assert not any(parameter.requires_grad for parameter in text_tower._load(clip, torch.device("cpu")).text_model.parameters())
    model.config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["pruning_text_tower"] == clip and not list(tmp_path.glob("*.safetensors"))


@pytest.mark.once
def test_what_is_wrong_is_named(clip, tmp_path):
    inputs = make_inputs(LLAVA, ROWS)
    model = load(clip)
    for question in (None, "one for two rows", ["a", "b", "c"], [1, 2]):
        with pytest.raises(ValueError, match=r"pass pruning_question to forward or generate, a list of one string for each of"):
            model(**inputs, pruning_question=question)
    with pytest.raises(ValueError, match=r"pruning_text_tower '.*nothing' must be a folder or Hub id with a CLIP model"):
        load(str(tmp_path / "nothing"))(**inputs, pruning_question=QUESTIONS)
    with pytest.raises(ValueError, match=r"pruning_text_tower '.*' must be .*it holds a model of type 'llava'"):
        load(str(LLAVA.checkpoint))(**inputs, pruning_question=QUESTIONS)
    config = CLIPConfig.from_pretrained(clip)
    config.vision_config.hidden_size = 48
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"belongs to a vision tower of width 48, but this model's has 32"):
        load(str(tmp_path))(**inputs, pruning_question=QUESTIONS)
    with pytest.raises(ValueError, match=r"pruning_text_tower must be None, or the folder or Hub id"):
        load("").config.pruning_settings()
    with pytest.raises(ValueError, match=r"pruning_text_tower is set to .* but pruning_method is 'fastv'"):
        load(clip, method="fastv").config.pruning_settings()


@pytest.mark.parametrize("method", ["cdpruner", "fastv", "vlm_pruner"])
def test_a_question_that_the_method_would_ignore_is_refused(method):
    """Unless nothing is pruned in the call."""
    model, inputs = load(None, method=method), make_inputs(LLAVA, ROWS[:1])
    message = f"pruning_question is given, but pruning_method is '{method}'.* Only 'cdpruner' with pruning_text_tower set does"
    for call in (model, partial(model.generate, max_new_tokens=2)):
        with pytest.raises(ValueError, match=message):
            call(**inputs, pruning_question="What?")
    plain = model(**inputs, pruning_ratio=0.0).logits
    assert torch.equal(model(**inputs, pruning_question="What?", pruning_ratio=0.0).logits, plain)
    text = make_inputs(LLAVA, [([], "Say something.")])
    assert torch.equal(model(**text, pruning_question=["What?"]).logits, model(**text).logits)
    model.config.pruning_method = "none"
    assert torch.equal(model(**inputs, pruning_question="What?").logits, plain)


@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_other_towers_refuse_it(clip, name):
    """InternVL's has a class token too."""
    family = FAMILIES[name]
    model = copy.deepcopy(load_pruned(family))
    model.config.pruning_method, model.config.pruning_text_tower = "cdpruner", clip
    with pytest.raises(ValueError, match="this model's vision tower is not CLIP's"):
        model(**make_inputs(family, ROWS[:1]), pruning_question="What?")


def test_long_texts_are_cut_into_segments_with_ends(clip):
    tower = text_tower.TextTower(clip, torch.device("cpu"))
    assert [len(tower.of_text(text)) for text in ("", "a b", "a " * 75, "a " * 76, "a " * 151)] == [1, 1, 1, 2, 3]
    first, second = tower.of_text("a " * 75 + "b c")
    assert np.allclose(second, tower.of_text("b c")[0], atol=1e-5) and not np.allclose(first, second, atol=1e-2)
