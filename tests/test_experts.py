"""Families with experts: what the router's logits and the load-balancing loss are, where layers hold fewer tokens."""

import pytest
import torch
from families import FAMILIES, load_pruned, load_stock, make_inputs, picture
from test_families import CLOSE, EXACT, forward_by_hand, supervised


pytestmark = pytest.mark.core  # families with experts are all like one without, but for this


def has_experts(family) -> bool:
    return hasattr(family.config_class.from_pretrained(family.checkpoint).get_text_config(), "num_experts_per_tok")


@pytest.fixture(params=filter(has_experts, FAMILIES.values()), ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture
def inputs(family):
    """A padded batch: one picture, and two with a longer question."""
    rows = [([picture(1)], "What?"), ([picture(2), picture(3, 200, 300)], "What is in these pictures?")]
    return make_inputs(family, rows)


def routers(model) -> dict:
    layers = model.model.language_model.layers
    return {number: layer.mlp.gate for number, layer in enumerate(layers) if hasattr(layer.mlp, "gate")}


def kept_of(family, inputs, record, layer: int) -> torch.Tensor:
    """Whether `layer` ran on a token. [batch, length]"""
    kept = inputs["attention_mask"].bool().clone()
    for image in record if layer >= family.layer else ():
        kept[image.row, image.positions] = False
        kept[image.row, image.positions[image.kept]] = True
    return kept


def test_router_logits_line_up_with_the_tokens(family, inputs):
    model = load_pruned(family)
    with torch.no_grad():
        outputs = model(**inputs, output_router_logits=True)
    numbers = list(routers(model))
    assert len(outputs.router_logits) == len(numbers) > 0
    for number, logits in zip(numbers, outputs.router_logits, strict=True):
        kept = kept_of(family, inputs, outputs.pruning_record, number)
        assert logits.shape == (inputs["input_ids"].numel(), 4)
        rows = logits.view(*inputs["input_ids"].shape, -1)
        assert torch.equal((rows != 0).any(-1), kept if number >= family.layer else torch.ones_like(kept))


def test_router_logits_are_those_of_the_stock_layers_on_what_is_kept(family):
    inputs = make_inputs(family, [([picture(1), picture(2, 200, 300)], "What is in these pictures?")])
    seen, stock = {}, load_stock(family)
    with torch.no_grad():
        outputs = load_pruned(family)(**inputs, output_router_logits=True)
        hooks = [
            gate.register_forward_hook(lambda module, args, output, number=number: seen.update({number: output[0]}))
            for number, gate in routers(stock).items()
        ]
        forward_by_hand(family, inputs, outputs.pruning_record)
    for hook in hooks:
        hook.remove()
    for number, logits in zip(seen, outputs.router_logits, strict=True):
        kept = kept_of(family, inputs, outputs.pruning_record, number)[0]
        torch.testing.assert_close(logits[kept], seen[number], **CLOSE)


def load_balancing_by_hand(rows: list, top_k: int) -> torch.Tensor:
    """num_experts * sum over experts of (share of tokens sent to it) * (mean probability of it), over all rows."""
    probabilities = torch.cat([each.softmax(-1) for each in rows])
    chosen = probabilities.topk(top_k).indices
    shares = torch.stack([(chosen == expert).sum() / len(chosen) for expert in range(probabilities.shape[1])])
    return probabilities.shape[1] * (shares * probabilities.mean(0)).sum()


def test_the_load_balancing_loss_counts_what_was_routed(family, inputs):
    model, labels = load_pruned(family), supervised(inputs)
    text_config = model.config.get_text_config()
    with torch.no_grad():
        outputs = model(**inputs, labels=labels, output_router_logits=True)
        plain = model(**inputs, labels=labels)
    rows = [
        logits[kept_of(family, inputs, outputs.pruning_record, number).flatten()]
        for number, logits in zip(routers(model), outputs.router_logits, strict=True)
    ]
    expected = load_balancing_by_hand(rows, text_config.num_experts_per_tok)
    torch.testing.assert_close(outputs.aux_loss, expected)
    everything = load_balancing_by_hand(list(outputs.router_logits), text_config.num_experts_per_tok)
    assert abs(everything - expected) > 1e-3, "rows of dropped tokens and padding would count"
    torch.testing.assert_close(outputs.loss, plain.loss + text_config.router_aux_loss_coef * expected)
    assert plain.get("aux_loss") is None and plain.get("router_logits") is None


def test_unpruned_it_is_the_stock_loss(family, inputs):
    labels = supervised(inputs)
    with torch.no_grad():
        ours, stock = (
            model(**inputs, labels=labels, output_router_logits=True)
            for model in (load_pruned(family, pruning_ratio=0.0), load_stock(family))
        )
    for name in ("loss", "aux_loss", "router_logits"):
        torch.testing.assert_close(ours[name], stock[name], **EXACT)


def test_the_load_balancing_loss_trains_the_routers_below_and_above(family, inputs):
    model = load_pruned(family)
    model(**inputs, output_router_logits=True).aux_loss.backward()
    for gate in routers(model).values():
        assert gate.weight.grad.abs().max() > 0
    model.zero_grad()
