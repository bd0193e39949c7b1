"""What a pruning method sees of a vision tower: how much attention each token of an image gets, and the keys that get it.

One block of the tower is watched while it runs, and its queries and keys are computed again from its input. So nothing depends
on the attention backend, and of an N x N map only some rows exist at a time. What is taken of which tower:
- With a class token (CLIP): the row of the class token over all keys, in the block that makes the features.
- Without one (SigLIP): what a patch receives of all of its tile, as VisPruner takes it, in the block that makes the features.
- With patches that the tower merges (Qwen): what a patch receives of all of its image or frame, in the last block that attends
  to whole images, then the mean over the patches of a token, as VisPruner's author and HoloV's Qwen code take it. Keys are
  after RoPE. (AngelSlim's port takes the mean query for all in images of 6144 patches and more; here all are taken.)
Attention is a mean over heads, and so are keys.
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
    block: nn.Module, hidden_states: torch.Tensor, has_class_token: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """How much attention each patch gets in a block of CLIP's or SigLIP's tower, and the patches' keys.

    Args:
        hidden_states: [tiles, patches (and a class token before them), tower_size], the block's input.

    Returns:
        [tiles, patches] and [tiles, patches, head_dim], float32. The softmax is over the class token too.
    """
    attention = block.self_attn
    normed = block.layer_norm1(hidden_states)
    shape, scaling = (attention.num_heads, attention.head_dim), attention.head_dim**-0.5
    keys = attention.k_proj(normed).unflatten(-1, shape).float()
    if has_class_token:
        query = attention.q_proj(normed[:, 0]).unflatten(-1, shape).float()
        weights = (torch.einsum("thd,tnhd->thn", query, keys) * scaling).softmax(-1)
        return weights.mean(1)[:, 1:], keys.mean(2)[:, 1:]
    queries = attention.q_proj(normed).unflatten(-1, shape)
    tiles = zip(queries.transpose(1, 2), keys.transpose(1, 2), strict=True)
    return torch.stack([attention_received(*tile, scaling) for tile in tiles]), keys.mean(2)


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
    cos, sin = (part[:, None].float() for part in seen["position_embeddings"])
    queries, keys = (_rotated(part, cos, sin) for part in parts.unbind(1)[:2])
    lengths, scaling = seen["cu_seqlens"].diff().tolist(), queries.shape[-1] ** -0.5
    received = torch.cat(
        [
            attention_received(query.transpose(0, 1), key.transpose(0, 1), scaling)
            for query, key in zip(queries.split(lengths), keys.split(lengths), strict=True)
        ]
    )
    return received.unflatten(0, (-1, num_merged)).mean(1), keys.mean(1).unflatten(0, (-1, num_merged)).mean(1)


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin
