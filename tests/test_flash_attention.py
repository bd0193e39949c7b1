"""FlashAttention as the attention of every family and method, on a CPU: `flash_stand_in.py` is in place of its kernels, and all
around it is the library's. Everything is compared with sdpa, for which the other files say what is right."""

from functools import lru_cache

import flash_stand_in
import pytest
import torch
import transformers
from families import FAMILIES, load_pruned, load_stock, make_inputs, picture, small_checkpoint
from flash_stand_in import flash_attention
from packaging.version import Version
from test_families import generate, positions, step_logits
from test_methods import load_method
from test_towers import llava_with_pixtral, pictures_of
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

from vlmpruner import modeling_vlmpruner_llava
from vlmpruner.pruned_cache import CACHE_NAME, cache_of
from vlmpruner.pruning_methods import METHODS


LLAVA, QWEN, GLM_MOE, MISTRAL, HYBRID = (FAMILIES[name] for name in ("llava", "qwen2_vl", "glm4v_moe", "mistral3", "qwen3_5"))
ROW = ([picture(1)], "What is in the picture?")
ROWS = [([], "Say something about nothing at all, please."), ROW]
IS_TOWER_OLD = Version(transformers.__version__) < Version("5.20")
KERNEL = FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"]
STATIC = {"cache_implementation": "static"}


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    flash_stand_in.install(monkeypatch)


def assert_equal(model, run, tolerance=1e-4):
    """What `run` computes with sdpa it computes with FlashAttention."""
    found = []
    for name in ("sdpa", "flash_attention_2"):
        torch.manual_seed(0)  # the random method draws
        with flash_attention(model, name), torch.no_grad():
            found.append(run(model))
    torch.testing.assert_close(*found, rtol=0, atol=tolerance)


def logits_of(rows, padding_side="left", **options):
    def run(family, model):
        options_of_step = {"max_new_tokens": 3} | options
        return step_logits(generate(model, make_inputs(family, rows, padding_side), **options_of_step))

    return run


def later_turns(kind, has_mask=True, padding_side="left"):
    """An image, a turn with another, and decoding: by hand, on one cache."""

    def run(family, model):
        firsts, seconds = ([ROW, ROWS[0]], [([picture(2)], "And now?"), ([], "Why do you say so?")])
        turns = [make_inputs(family, rows[: 2 if has_mask else 1], padding_side).to(model.device) for rows in (firsts, seconds)]
        turns += [{"input_ids": torch.full_like(turns[0]["input_ids"][:, :1], token)} for token in (9, 10)]
        room = sum(turn["input_ids"].shape[1] for turn in turns) + 5
        config = model.config.get_text_config()
        cache = StaticCache(config=config, max_cache_len=room) if kind == "static" else DynamicCache(config=config)
        logits, mask = [], turns[0]["attention_mask"][:, :0]
        for turn in turns:
            mask = torch.cat([mask, turn.get("attention_mask", torch.ones_like(turn["input_ids"]))], dim=1)
            places = {} if "mm_token_type_ids" in turns[0] or not has_mask else positions(turn, mask)
            outputs = model(**{**turn, "attention_mask": mask if has_mask else None, **places}, **{CACHE_NAME: cache})
            is_token = mask[:, -outputs.logits.shape[1] :].bool()
            logits.append(outputs.logits[is_token])
        return torch.cat(logits)

    return run


def forward_of_right_padded_rows(family, model):
    inputs = make_inputs(family, ROWS, "right")
    return model(**inputs).logits[inputs["attention_mask"].bool()]


MODES = {
    "one row": logits_of([ROW]),
    "padded left": logits_of(ROWS),
    "padded right": forward_of_right_padded_rows,
    "no cache": logits_of(ROWS, use_cache=False),
    "static": logits_of(ROWS, **STATIC),
    "beams": logits_of(ROWS, num_beams=2),
    "static, beams": logits_of(ROWS, num_beams=2, **STATIC),
    "later turns": later_turns("dynamic"),
    "later turns, padded right": later_turns("dynamic", padding_side="right"),
    "static, later turns": later_turns("static"),
    "static, no mask": later_turns("static", has_mask=False),
    "prompt lookup": logits_of([ROW], prompt_lookup_num_tokens=2),
    "static, prompt lookup": logits_of([ROW], prompt_lookup_num_tokens=2, max_cache_len=1000, **STATIC),
}
# What has the logits of another mode.
SAME_AS = {
    "no cache": "padded left",
    "static": "padded left",
    "static, beams": "beams",
    "static, later turns": "later turns",
    "prompt lookup": "one row",
    "static, prompt lookup": "one row",
}


@lru_cache
def with_sdpa(family, mode):
    with torch.no_grad():
        return MODES[mode](family, load_pruned(family))


def modes_of(number, family):
    """All; of a family that shares the code of another, two in turn. A hybrid refuses to speculate, as its stock class does."""
    modes = [mode for mode in MODES if "lookup" not in mode or not family.is_hybrid]
    return modes if family.like is None else sorted({"static", modes[number % len(modes)]})


PAIRS = [
    pytest.param(family, mode, id=f"{family.name}-{mode}", marks=[pytest.mark.between] if mode == "static" else [])
    for number, family in enumerate(FAMILIES.values())
    for mode in modes_of(number, family)
]


@pytest.mark.parametrize(("family", "mode"), PAIRS)
def test_a_family_computes_what_it_does_with_sdpa(family, mode):
    if mode == "static, prompt lookup" and not StaticLayer.is_croppable:
        pytest.skip("before transformers 5.24, speculative decoding refuses a static cache")
    expected = with_sdpa(family, SAME_AS.get(mode, mode))
    with flash_attention(load_pruned(family)) as model, torch.no_grad():
        if family is MISTRAL and IS_TOWER_OLD:
            model.config.vision_config._attn_implementation = "sdpa"  # the other is refused
        torch.testing.assert_close(MODES[mode](family, model), expected, rtol=0, atol=family.tolerance)


@pytest.mark.parametrize("family", [LLAVA, QWEN], ids=lambda family: family.name)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "restore"])
def test_a_method_computes_what_it_does_with_sdpa(name, family):
    """In a padded batch on a static cache; several stages too."""
    assert_equal(load_method(family, name), lambda model: MODES["static"](family, model))


@pytest.mark.parametrize("layer", [1, 3])
def test_a_hybrid_pruned_below_all_keys(layer):
    model = load_method(HYBRID, "random", pruning_layer=layer)
    assert_equal(model, lambda model: MODES["static"](HYBRID, model), HYBRID.tolerance)


def test_restore_is_refused():
    model = load_method(LLAVA, "restore")
    for name in ("flash_attention_2", "flash_attention_3"):
        with flash_attention(model, name), pytest.raises(ValueError, match=r"flash.* does not take. .*\('sdpa', 'eager'\)"):
            model(**make_inputs(LLAVA, [ROW]))
    uncorrected = load_method(LLAVA, "restore", pruning_attention_correction="none")
    assert_equal(uncorrected, lambda model: MODES["static"](LLAVA, model))


@pytest.mark.parametrize("name", ["flash_attention_3", "flash_attention_4", "kernels-community/flash-attn3"])
def test_other_names(name):
    model = load_pruned(QWEN)
    expected = MODES["static"](QWEN, model)
    with flash_attention(model, name):
        assert model.get_decoder().config._attn_implementation == FLASH_ATTN_KERNEL_FALLBACK.get(name, name)
        torch.testing.assert_close(MODES["static"](QWEN, model), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"),
    [(QWEN, "flash_attention_2"), (MISTRAL, {"text_config": "flash_attention_2", "vision_config": "sdpa"})],
    ids=["all", "language model"],
)
def test_loaded_by_name(family, name):
    model = family.pruned_class.from_pretrained(small_checkpoint(family), attn_implementation=name)
    names = [config._attn_implementation for config in (model.get_decoder().config, model.config.vision_config)]
    assert names == [KERNEL, KERNEL if family is QWEN else "sdpa"]
    outputs = generate(model, make_inputs(family, ROWS), **STATIC)
    assert isinstance(cache_of(outputs), StaticCache) and len(cache_of(outputs).pruning_record) == 1


def test_off_is_bit_equal_to_the_stock_class():
    inputs = make_inputs(QWEN, ROWS)
    found = []
    for model in (load_pruned(QWEN, pruning_ratio=0.0), load_stock(QWEN)):
        with flash_attention(model):
            found.append(step_logits(generate(model, inputs, **STATIC)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_row_of_glm_with_experts_is_no_packed_row():
    """The stock decoder hands on three axes of positions, which FlashAttention takes for three sequences. Off is right too."""
    inputs = make_inputs(GLM_MOE, [ROW])
    with flash_attention(load_stock(GLM_MOE)) as stock, pytest.raises(AssertionError, match="reads past them"):
        stock(**inputs)
    for ratio in (0.0, 0.889):
        assert_equal(load_pruned(GLM_MOE), lambda model, ratio=ratio: model(**inputs, pruning_ratio=ratio).logits)


@pytest.fixture(params=["mistral3", "llava"])
def with_pixtral(request):
    """A model with a tower of Pixtral's kind, and images of several sizes."""
    model = load_pruned(MISTRAL) if request.param == "mistral3" else llava_with_pixtral()
    return model, pictures_of([(6, 8), (5, 7), (2, 4)], model.config.vision_config.patch_size)


@pytest.mark.skipif(IS_TOWER_OLD, reason="FlashAttention is refused in a Pixtral tower before transformers 5.20")
def test_images_in_a_pixtral_tower(with_pixtral):
    model, pictures = with_pixtral
    assert_equal(model, lambda model: torch.cat(list(model.get_image_features(**pictures).pooler_output)))


def test_an_old_pixtral_tower_is_refused(with_pixtral, monkeypatch):
    """Its positions have two axes, and are no packed rows either. The language model alone may have FlashAttention."""
    model, pictures = with_pixtral
    monkeypatch.setattr(modeling_vlmpruner_llava.transformers, "__version__", "5.19.0")
    with flash_attention(model):
        with pytest.raises(ValueError, match=r'5\.19\.0 computes a Pixtral vision .*flash.*"vision_config": "sdpa"'):
            model.get_image_features(**pictures)
        model.config.vision_config._attn_implementation = "sdpa"
        assert len(model.get_image_features(**pictures).pooler_output) == 3


def test_gradients():
    inputs = make_inputs(QWEN, ROWS)
    found = []
    for name in ("sdpa", "flash_attention_2"):
        with flash_attention(load_pruned(QWEN), name) as model:
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
            found.append([parameter.grad for parameter in model.parameters()])
            model.zero_grad()
    assert sum(grad is not None for grad in found[0]) > 20
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["unmasked", "paged|eager"])
def test_attention_without_a_mask_is_refused_where_it_needs_one(name):
    """On a static cache, and for rows of different length: the stock class runs these, and is wrong. One row needs no mask,
    except by attention of continuous batching, which is not causal by itself."""
    AttentionInterface.register("unmasked", sdpa_attention_forward)
    model, one_row = load_pruned(QWEN), logits_of([ROW])
    refused, refusal = [logits_of([ROW], **STATIC), logits_of(ROWS)], r"no mask for attn_implementation 'unmasked', so pruned"
    expected = one_row(QWEN, model)
    with flash_attention(model, name):
        if name == "unmasked":
            assert torch.equal(one_row(QWEN, model), expected)
        else:
            refused, refusal = [*refused, one_row], r"`?paged\|eager"  # versions up to 5.22 refuse it too
        for run in refused:
            with pytest.raises(ValueError, match=refusal):
                run(QWEN, model)


def test_attention_with_a_registered_mask():
    AttentionInterface.register("masked", sdpa_attention_forward)
    AttentionMaskInterface.register("masked", sdpa_mask)
    expected = MODES["static"](QWEN, load_pruned(QWEN))
    with flash_attention(load_pruned(QWEN), "masked") as model:
        torch.testing.assert_close(MODES["static"](QWEN, model), expected, rtol=0, atol=1e-4)
