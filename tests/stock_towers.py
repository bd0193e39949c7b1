"""What the towers of InternVL, Idefics3 and Mistral3 attend to, by the maps that the stock classes give when they run eagerly.

Each takes a stock model without its head, eager, in any precision, and what its processor makes of pictures. It gives the
attention that each token gets, its states and its keys, [tokens, ...] of each tile or image; and the projector, [1, 1, c].
"""

import sys

import pytest
import torch
from torch.nn.functional import unfold


def internvl_tower(model, inputs, layer=-1):
    """The row of the class token in the block that makes hidden states `layer`; a token has the mean over its four patches."""
    block, seen = layer - 1 if layer > 0 else layer, {}
    attention_module = model.vision_tower.encoder.layer[block].attention
    keep = attention_module.k_norm.register_forward_hook(lambda module, args, output: seen.update(keys=output))
    kwargs = {"output_attentions": True, "output_hidden_states": True}
    outputs = model.vision_tower(inputs["pixel_values"].to(model.dtype), **kwargs)
    keep.remove()
    states = outputs.last_hidden_state if layer == -1 else outputs.hidden_states[layer]
    attention = outputs.attentions[block][:, :, 0, 1:].mean(1)
    keys = seen["keys"].unflatten(-1, (attention_module.num_heads, -1)).mean(2)[:, 1:]
    side = round(attention.shape[1] ** 0.5)
    numbers = torch.arange(side * side, dtype=torch.float32).view(1, side, side, 1)
    patches = model.pixel_shuffle(numbers, scale_factor=model.config.downsample_ratio).flatten(1, 2)[0].long()
    parts = attention[:, patches].mean(2), states[:, 1:][:, patches].flatten(2), keys[:, patches].mean(2)
    return [list(part) for part in parts], model.multi_modal_projector


def idefics3_tower(model, inputs):
    """What a patch receives in the last block of the patches that are no padding; a token has the mean over those it has."""
    pixels, size = inputs["pixel_values"].flatten(0, 1).to(model.dtype), model.config.vision_config.patch_size
    is_tile = pixels.flatten(1).any(1)
    mask = inputs.get("pixel_attention_mask", torch.ones_like(inputs["pixel_values"][:, :, 0])).flatten(0, 1)[is_tile]
    is_patch = mask.unflatten(-1, (-1, size)).unflatten(-3, (-1, size)).sum((-3, -1)) > 0
    attention_module, seen = model.vision_model.encoder.layers[-1].self_attn, {}
    keep = attention_module.k_proj.register_forward_hook(lambda module, args, output: seen.update(keys=output))
    outputs = model.vision_model(pixels[is_tile], patch_attention_mask=is_patch, output_attentions=True)
    keep.remove()
    keys = seen["keys"].unflatten(-1, (attention_module.num_heads, -1)).mean(2)
    numbers = torch.arange(is_patch[0].numel(), dtype=torch.float32).view(1, -1, 1)
    patches = model.connector.pixel_shuffle(numbers, model.config.scale_factor)[0].long()
    found = []
    maps = zip(outputs.attentions[-1], keys, outputs.last_hidden_state, is_patch.flatten(1), strict=True)
    for weights, own_keys, states, real in maps:
        received = weights[:, real].double().mean((0, 1))
        of_tokens = torch.zeros(len(patches), dtype=torch.float64), torch.zeros(len(patches), keys.shape[-1]).double()
        for token, members in enumerate(patches):
            if (members := members[real[members]]).numel():
                of_tokens[0][token] = received[members].mean()
                of_tokens[1][token] = own_keys[members].double().mean(0)
        found.append((of_tokens[0], states[patches].flatten(1), of_tokens[1]))
    return [list(part) for part in zip(*found, strict=True)], model.connector.modality_projection


def pixtral_tower(model, inputs, merge=1):
    """What a patch receives in the last block of its image; a token has the mean over its `merge` x `merge` patches."""
    module = sys.modules[type(model.vision_tower).__module__]
    stock, last, seen = module.eager_attention_forward, model.vision_tower.transformer.layers[-1].attention, {}

    def keep(attention, query, key, *args, **kwargs):
        output, weights = stock(attention, query, key, *args, **kwargs)
        if attention is last:
            seen.update(weights=weights[0].double(), keys=key[0].double().mean(0))
        return output, weights

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", keep)
        states = model.vision_tower(inputs["pixel_values"].to(model.dtype), image_sizes=inputs["image_sizes"])[0][0]
    found, start = [], 0
    for height, width in (inputs["image_sizes"] // model.config.vision_config.patch_size).tolist():
        own = slice(start, start := start + height * width)
        assert float(seen["weights"][:, own, : own.start].sum() + seen["weights"][:, own, own.stop :].sum()) == 0
        numbers = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
        patches = unfold(numbers, kernel_size=merge, stride=merge)[0].T.long()
        received = seen["weights"][:, own, own].mean((0, 1))
        found.append((received[patches].mean(1), states[own][patches].flatten(1), seen["keys"][own][patches].mean(1)))
    return [list(part) for part in zip(*found, strict=True)], model.multi_modal_projector


def mistral3_tower(model, inputs):
    merge, projector = model.config.spatial_merge_size, model.multi_modal_projector

    def project(states):
        patches = projector.norm(states.unflatten(-1, (merge**2, -1)))
        merged = projector.patch_merger.merging_layer(patches.transpose(-1, -2).flatten(-2))  # channel by channel, as unfolded
        return projector.linear_2(projector.act(projector.linear_1(merged)))

    return pixtral_tower(model, inputs, merge)[0], project
