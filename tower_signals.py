"""What a pruning method sees of a vision tower: how much attention each token of an image gets, and the keys that get it.

One block of the tower is watched while it runs, and its queries and keys are computed again from its input. So nothing depends
on the attention backend, and of an N x N map only some rows exist at a time. What is taken of which tower:
- With a class token (CLIP, InternViT): the row of the class token over all keys, in the block that makes the features.
- Without one (SigLIP, Idefics3's, Pixtral): what a patch receives of all of its tile or image, as VisPruner takes it, in the
  block that makes the features. Pixtral runs the images of a call as one sequence; each attends to itself alone.
- With patches that the tower merges (Qwen): what a patch receives of all of its image or frame, in the last block that attends
  to whole images. (AngelSlim's port takes the mean query for all in images of 6144 patches and more; here all are taken.)
Where several patches become a token, in the tower (Qwen), before the projector (InternVL, Idefics3) or in it (Mistral3), it has
the mean over its patches, as VisPruner's author and HoloV's Qwen code take it. Attention is a mean over heads, and so are keys,
after RoPE, and after their norm where they have one. Patches that pad a tile count nowhere: none attends, is attended to, or is
part of a mean. For InternViT, Idefics3's tower and Pixtral no author says what to take; they follow from the others.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


WEIGHTS_AT_ONCE = 2**25  # attention weights that exist at a time, over all heads


@contextmanager
def watch(block: nn.Module) -> Iterator[dict]:
    """A dict of what `block` ran on in this thread once it has: its keyword arguments, `hidden_states` and `output`."""
    seen, thread = {}, threading.get_ident()

    def keep(module, args, kwargs, output):
        if threading.get_ident() == thread:
            seen.update(kwargs)
            if args:
                seen["hidden_states"] = args[0]
            seen["output"] = output if isinstance(output, torch.Tensor) else output[0]

    hook = block.register_forward_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@torch.no_grad()
def attention_received(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    """How much attention each of n tokens gets from all of them, mean over queries and heads. [n] float32

    Args:
        queries, keys: [heads, n, head_dim].
    """
    heads, num_tokens, _ = queries.shape
    keys, received = keys.float().transpose(1, 2), 0
    for rows in queries.float().split(max(1, WEIGHTS_AT_ONCE // (heads * num_tokens)), dim=1):
        received = received + (rows @ keys * scaling).softmax(-1).sum(dim=(0, 1))
    return received / (heads * num_tokens)


@torch.no_grad()
def attention_to_patches(
    block: nn.Module, hidden_states: torch.Tensor, has_class_token: bool, is_patch: torch.BoolTensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much attention each patch gets in a block of CLIP's, SigLIP's, Idefics3's or InternVL's tower, and the patches' keys.

    Args:
        hidden_states: [tiles, patches (and a class token before them), tower_size], the block's input.
        is_patch: of a tower without a class token, [tiles, patches], False at what pads a tile; None where nothing does.

    Returns:
        [tiles, patches] and [tiles, patches, head_dim], float32, zero at padding. The softmax is over the class token too.
    """
    attention, normed = _attention_of(block), _normed(block, hidden_states)
    scaling, keys = attention.head_dim**-0.5, _projected(attention, "k", normed)
    if has_class_token:
        query = _projected(attention, "q", normed[:, 0])
        weights = (torch.einsum("thd,tnhd->thn", query, keys) * scaling).softmax(-1)
        return weights.mean(1)[:, 1:], keys.mean(2)[:, 1:]
    tiles = zip(_projected(attention, "q", normed).transpose(1, 2), keys.transpose(1, 2), strict=True)
    if is_patch is None:
        return torch.stack([attention_received(*tile, scaling) for tile in tiles]), keys.mean(2)
    received = torch.zeros_like(keys[..., 0, 0])
    for (query, key), patches, row in zip(tiles, is_patch, received, strict=True):
        if patches.any():
            row[patches] = attention_received(query[:, patches], key[:, patches], scaling)
    return received, keys.mean(2).masked_fill(~is_patch[..., None], 0)


@torch.no_grad()
def attention_to_images(block: nn.Module, seen: dict, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """How much attention each patch gets of all of its image in a block of Pixtral's tower, and its key.

    Args:
        seen: of `watch`; `hidden_states` [1, patches, tower_size] of all images one after another, and `position_embeddings`.
        lengths: number of patches of each image.

    Returns:
        [patches] and [patches, head_dim], float32.
    """
    attention, normed = _attention_of(block), _normed(block, seen["hidden_states"][0])
    queries, keys = (_projected(attention, name, normed) for name in ("q", "k"))
    return _received_of_own(queries, keys, seen["position_embeddings"], lengths)


@torch.no_grad()
def attention_to_merged(block: nn.Module, seen: dict, num_merged: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How much attention each token gets in a block of a tower of Qwen's kind, and its key, as means over its patches.

    Args:
        seen: of `watch`; `hidden_states` [patches, tower_size], where the `num_merged` patches of a token come together,
            `cu_seqlens` between images and frames, and `position_embeddings`.

    Returns:
        [tokens] and [tokens, head_dim], float32, in the order of the block's input.
    """
    attention = block.attn
    parts = attention.qkv(block.norm1(seen["hidden_states"])).unflatten(-1, (3, attention.num_heads, -1)).float()
    queries, keys, _ = parts.unbind(1)
    found = _received_of_own(queries, keys, seen["position_embeddings"], seen["cu_seqlens"].diff().tolist())
    return tuple(part.unflatten(0, (-1, num_merged)).mean(1) for part in found)


def merged_patches(patches: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """The `side` x `side` patches of each token, in raster order. [tiles, height * width, c] to [tiles, tokens, side^2, c]

    Args:
        patches: what is known of those of a `grid` (height, width). Patches at the right and at the bottom that do not fill a
            token belong to none.
    """
    rows, columns = (length // side for length in grid)
    whole = patches.unflatten(1, grid)[:, : rows * side, : columns * side]
    by_token = whole.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3)
    return by_token.flatten(3, 4).flatten(1, 2)


def _received_of_own(
    queries: torch.Tensor, keys: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_received` within each of several images or frames, and the keys as a mean over heads. [patches] and [patches,
    head_dim]

    Args:
        queries, keys: [patches, heads, head_dim], before RoPE.
        position_embeddings: cos and sin, [patches, head_dim].
        lengths: number of patches of each image or frame.
    """
    cos, sin = (part[:, None].float() for part in position_embeddings)
    queries, keys = _rotated(queries, cos, sin), _rotated(keys, cos, sin)
    parts = zip(queries.split(lengths), keys.split(lengths), strict=True)
    scaling = queries.shape[-1] ** -0.5
    received = [attention_received(query.transpose(0, 1), key.transpose(0, 1), scaling) for query, key in parts]
    return torch.cat(received), keys.mean(1)


def _attention_of(block: nn.Module) -> nn.Module:
    return block.self_attn if hasattr(block, "self_attn") else block.attention


def _normed(block: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """What the block's attention gets."""
    names = ("layer_norm1", "layernorm_before", "attention_norm")  # CLIP's, SigLIP's and Idefics3's, InternVL's, Pixtral's
    return next(getattr(block, name) for name in names if hasattr(block, name))(hidden_states)


def _projected(attention: nn.Module, name: str, normed: torch.Tensor) -> torch.Tensor:
    """Queries ("q") or keys ("k"), before RoPE, with the norm that some towers give them. [..., heads, head_dim] float32"""
    states = getattr(attention, f"{name}_proj")(normed)
    if hasattr(attention, f"{name}_norm"):
        states = getattr(attention, f"{name}_norm")(states)
    return states.unflatten(-1, (attention.num_heads, attention.head_dim)).float()


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
