"""Calls without `position_ids`: a padded row is pruned as the row alone, and what follows goes on from its positions."""

import pytest
import torch
from families import FAMILIES, load_pruned, load_stock, make_inputs, picture
from test_families import EXACT
from test_methods import load_method
from transformers import DynamicCache, StaticCache

from vlmpruner.pruned_cache import CACHE_NAME, cache_of
from vlmpruner.pruning_methods import METHODS


ONE_AXIS = "smolvlm"
THREE_AXES = "qwen3_vl"


@pytest.fixture(params=[ONE_AXIS, THREE_AXES])
def family(request):
    return FAMILIES[request.param]


def close(family):
    return {"rtol": 0, "atol": family.tolerance}


def request_of(family, image=1, text="What is in the picture?"):
    return dict(make_inputs(family, [([] if image is None else [picture(image)], text)]))


def padded(inputs, number, side="left"):
    """A request with `number` columns of padding at one side."""
    sides = (number, 0) if side == "left" else (0, number)
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    return inputs | {name: torch.nn.functional.pad(inputs[name], sides) for name in names if name in inputs}


def after(past, inputs):
    """A later turn's inputs, with the mask of what came before: nobody gives `position_ids`."""
    return inputs | {"attention_mask": torch.cat([past["attention_mask"], inputs["attention_mask"]], dim=1)}


def tokens(past, ids=(9,)):
    ids = torch.tensor([ids])
    return after(past, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def orders(record):
    return [image.order.tolist() for image in record]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("number", [7, 150])
def test_left_padded_row_is_pruned_as_the_row_alone(name, number):
    """Its keys have the same positions, so the choice is the same and not only alike."""
    family, inputs = FAMILIES[name], request_of(FAMILIES[name])
    with torch.no_grad():
        alone, row = load_pruned(family)(**inputs), load_pruned(family)(**padded(inputs, number))
    assert orders(row.pruning_record) == orders(alone.pruning_record)
    torch.testing.assert_close(row.logits[:, number:], alone.logits, **close(family))


@pytest.mark.once
@pytest.mark.parametrize("method", METHODS)
def test_every_method_chooses_as_of_the_row_alone(family, method):
    if family.name == THREE_AXES and METHODS[method].counts_positions:
        pytest.skip("is refused where positions have several axes")
    model, inputs, outputs = load_method(family, method), request_of(family), []
    for each in (inputs, padded(inputs, 60)):
        torch.manual_seed(0)  # for "random"
        with torch.no_grad():
            outputs.append(model(**each))
    alone, row = outputs
    assert orders(row.pruning_record) == orders(alone.pruning_record)
    torch.testing.assert_close(row.logits[:, 60:], alone.logits, **close(family))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("keys", [{}, {"pruning_positions": "packed"}], ids=["original", "packed"])
def test_tokens_and_turns_go_on_from_the_positions_of_a_padded_row(family, static, keys):
    """Decoded by hand, forked and cropped, and then another image."""
    if keys and family.name == THREE_AXES:
        pytest.skip("packed positions are refused where positions have several axes")
    model, logits = load_method(family, "vlm_pruner", pruning_ratio=0.889, **keys), []
    for number in (0, 30):
        first = padded(request_of(family), number)
        second = request_of(family, image=2, text="And now?")
        cache = StaticCache(config=model.config, max_cache_len=1200) if static else DynamicCache(config=model.config)
        with torch.no_grad():
            outputs = [model(**first, **{CACHE_NAME: cache})]
            turn = first
            for ids in ((9,), (11, 12)):
                turn = tokens(turn, ids)
                outputs.append(model(**turn, **{CACHE_NAME: cache}))
            if not static:
                cache.crop(-2)
                turn = turn | {"attention_mask": turn["attention_mask"][:, :-2]}
                outputs.append(model(**tokens(turn, (13, 14)), **{CACHE_NAME: cache}))
                turn = tokens(turn, (13, 14))
            outputs.append(model(**after(turn, second), **{CACHE_NAME: cache}))
        logits.append([each.logits[:, -1] for each in outputs])
        logits[-1].append(torch.tensor([len(order) for order in orders(cache.pruning_record)]))
    for alone, row in zip(*logits, strict=True):
        torch.testing.assert_close(row, alone, **close(family))


def test_rows_of_a_batch_go_on_alone(family):
    """Repeated and reordered, each row goes on with its own positions."""
    model, texts = load_pruned(family), ("What?", "What is in the picture, if you please?")
    batch = dict(make_inputs(family, [([picture(1)], text) for text in texts]))
    with torch.no_grad():
        cache = cache_of(model(**batch, use_cache=True))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 2, 0]))
        mask = batch["attention_mask"].repeat_interleave(2, 0)[[3, 1, 2, 0]]
        mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
        logits = model(input_ids=torch.full((4, 1), 9), attention_mask=mask, **{CACHE_NAME: cache}).logits
        for row, number in enumerate((1, 0, 1, 0)):
            first = request_of(family, text=texts[number])
            alone = model(**tokens(first), **{CACHE_NAME: cache_of(model(**first, use_cache=True))})
            torch.testing.assert_close(logits[row : row + 1], alone.logits, **close(family))


@pytest.mark.parametrize("side", ["left", "right"])
def test_image_after_a_padded_turn_of_text(family, side):
    """The first turn is the stock class's, whose decoder counts padding in front of a row. So keys of a later image are rotated
    further than those of the row alone: who looks at them refuses, and who does not chooses the same."""
    text, image = request_of(family, image=None, text="Tell me something first."), request_of(family)
    for method in ("vlm_pruner", "dart", "divprune"):
        model, logits = load_method(family, method), []
        for first in (text, padded(text, 30, side)):
            with torch.no_grad():
                cache = cache_of(model(**first, use_cache=True))
                if side == "left" and first is not text and method != "divprune":
                    with pytest.raises(ValueError, match=f"{method}.*Pass position_ids"):
                        model(**after(first, image), **{CACHE_NAME: cache})
                    break
                logits.append(model(**after(first, image), **{CACHE_NAME: cache}).logits)
        else:
            torch.testing.assert_close(*logits, **close(family))


def test_padding_between_turns_is_not_counted(family):
    """The second turn is padded in front, as in a batch with a longer row."""
    model, first, second = load_pruned(family), request_of(family), request_of(family, image=2, text="And here?")
    logits = []
    for number in (0, 25):
        with torch.no_grad():
            cache = cache_of(model(**first, use_cache=True))
            logits.append(model(**after(first, padded(second, number)), **{CACHE_NAME: cache}).logits[:, number:])
    torch.testing.assert_close(*logits, **close(family))


def test_given_positions_are_used_as_they_are():
    """Also those that count padding: then logits are equal up to rounding, and keys are others."""
    family = FAMILIES[ONE_AXIS]
    inputs = padded(request_of(family), 40)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        given = load_pruned(family)(**inputs, position_ids=torch.arange(length)[None])
        alone = load_pruned(family)(**request_of(family), position_ids=torch.arange(40, length)[None])
    assert orders(given.pruning_record) == orders(alone.pruning_record)
    torch.testing.assert_close(given.logits[:, 40:], alone.logits, **close(family))


def test_a_row_without_padding_and_off_leave_positions_to_the_decoder(family, monkeypatch):
    seen = []
    for model in (load_pruned(family), load_pruned(family, pruning_ratio=0.0)):
        decoder = model.get_decoder()
        stock = type(decoder).forward

        def forward(self, *args, stock=stock, **kwargs):
            seen.append(kwargs["position_ids"])
            return stock(self, *args, **kwargs)

        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(type(decoder), "forward", forward)
            model(**request_of(family))
    assert family.name == THREE_AXES or seen == [None, None]
    inputs = padded(request_of(family), 5)
    with torch.no_grad():
        ours, stock = load_pruned(family, pruning_ratio=0.0)(**inputs), load_stock(family)(**inputs)
    torch.testing.assert_close(ours.logits, stock.logits, **EXACT)


@pytest.mark.once
def test_virtual_tokens_of_prompt_tuning_before_a_padded_row(family):
    """Embeddings that are longer than `mm_token_type_ids`, which M-RoPE takes for text."""
    model, logits = load_pruned(family), []
    for number in (0, 40):
        inputs = padded(request_of(family), number)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        virtual = torch.linspace(-1, 1, embeds.shape[-1]).expand(1, 3, -1)
        embeds = torch.cat([embeds[:, :number], virtual, embeds[:, number:]], dim=1)
        mask = torch.cat([inputs["attention_mask"][:, :number], torch.ones(1, 3), inputs["attention_mask"][:, number:]], dim=1)
        rest = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            outputs = model(inputs_embeds=embeds, attention_mask=mask.long(), **rest)
        logits.append((orders(outputs.pruning_record), outputs.logits[:, number:]))
    assert logits[0][0] == logits[1][0]
    torch.testing.assert_close(logits[0][1], logits[1][1], **close(family))


@pytest.mark.once
@pytest.mark.parametrize("method", [name for name, each in METHODS.items() if each.looks_at <= {"keys", "tower"}])
def test_what_looks_at_images_alone_keeps_the_same_once_an_answer_follows(family, method):
    """As trainers score an answer by `forward`: see docs/training.md."""
    if family.name == THREE_AXES and METHODS[method].counts_positions:
        pytest.skip("is refused where positions have several axes")
    model, prompt, kept = load_method(family, method), request_of(family), []
    answer = torch.tensor([[9, 10, 11, 12]])
    new = {"input_ids": answer, "attention_mask": torch.ones_like(answer), "mm_token_type_ids": torch.zeros_like(answer)}
    scored = prompt | {name: torch.cat([prompt[name], new[name]], dim=1) for name in new if name in prompt}
    for inputs in (prompt, padded(scored, 20)):
        torch.manual_seed(0)  # for "random"
        with torch.no_grad():
            kept.append(orders(model(**inputs).pruning_record))
    assert kept[0] == kept[1]
