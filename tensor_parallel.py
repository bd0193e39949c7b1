"""Tensor parallelism of transformers (`tp_plan="auto"`): each rank has some heads of each layer, all must keep the same tokens.

Hidden states are whole and equal on all ranks, since the library adds them up before a layer ends. Only what belongs to heads
is spread: the keys, and the attention rows that some methods look at. They are put together once a stage, before the
selection, which then is the same on each rank.
"""

import torch
import torch.distributed as dist
from torch import nn


def check_heads(model) -> None:
    """Raise a ValueError where tensor parallelism would cut a key head in two, in which the stock attention fails too. A plan
    that leaves the attention whole on each rank cuts none."""
    size, num_heads = getattr(model, "_tp_size", None) or 1, model.config.get_text_config(decoder=True).num_key_value_heads
    if num_heads % size == 0:
        return
    attentions = [module for module in model.get_decoder().modules() if hasattr(module, "k_proj")]
    if any(_mesh(attention) is not None for attention in attentions):
        raise ValueError(
            f"Tensor parallelism over {size} ranks needs a number of key heads that {size} divides, but this model has "
            f"num_key_value_heads={num_heads}. Use {_divisors(num_heads)} ranks, or a tp_plan that leaves the attention whole "
            "(docs/parallel.md)."
        )


def _divisors(number: int) -> str:
    found = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def all_heads(per_head: torch.Tensor, num_heads: int, layer: nn.Module) -> torch.Tensor:
    """What belongs to the heads of this rank, [batch, heads, ...], with that of the others: [batch, num_heads, ...].

    Args:
        per_head: as it is where it has all heads.
        layer: the decoder layer that they belong to.

    Raises:
        ValueError: where heads are missing, but the library did not spread the projections of the layer.
    """
    if per_head.shape[1] == num_heads:
        return per_head
    group = _group(layer)
    size = 1 if group is None else dist.get_world_size(group)
    if per_head.shape[1] * size != num_heads:
        raise ValueError(
            f"Decoder layer {layer.self_attn.layer_idx} has {per_head.shape[1]} heads on this rank of {size}, the whole model "
            f'{num_heads}. Pruning supports the tensor parallelism of from_pretrained(..., tp_plan="auto"), in which each rank '
            "has as many, because all ranks must choose the same tokens."
        )
    parts = [torch.empty_like(per_head, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, per_head.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def _group(layer: nn.Module):
    """The ranks over which the key heads of a layer are spread, or None."""
    mesh = _mesh(layer.self_attn)
    if mesh is None:
        return None
    return mesh.get_group("tp") if mesh.ndim > 1 else mesh.get_group()


def _mesh(attention: nn.Module):
    """The device mesh over which the library spread the key projection, or None where each rank has all of it."""
    return getattr(attention.k_proj.weight, "device_mesh", None)
