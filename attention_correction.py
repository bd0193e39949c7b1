"""Attention that knows how many tokens a row stands for: additive masks, where a method asks for them.

To the logit of a query and a key is added
- "size": the log of the size of the key's row. So a row of n equal tokens at one position gets what the n would get together.
  Every query adds it, of prompts, later turns and decoded tokens alike, and the cache remembers sizes.
- "distance": log(2 - c(d)), c(d) the mean of cos(d f) over the decoder's inverse frequencies f, d how many tokens of the full
  sequence the two are apart, padding not counted. 0 at d = 0. Added by the queries of a prompt alone: in rows that bring an
  image in the call, up to the prompt's last token.

In float32, and rounded once to the type of the hidden states.
"""

import torch

from .token_pruning_device import upload


BACKENDS = ("sdpa", "eager")
# What masks a key. Its weight is 0 beside any that is seen, and it is finite in every type that attention may run in (with
# autocast that is not the mask's own), also with a logit added: a row that sees nothing, which is padding, has no NaN.
MASKED = -3e4


def refuse_backend(config) -> None:
    """Raise a ValueError where the attention of a decoder takes no additive mask."""
    if config._attn_implementation not in BACKENDS:
        raise ValueError(
            "This pruning corrects the decoder's attention by an additive mask, which attn_implementation "
            f"{config._attn_implementation!r} does not take. Load the model with one of {BACKENDS}, or choose a pruning_method "
            'that corrects none; "restore" with pruning_attention_correction="none" is one.'
        )


def additive_masks(
    allowed: torch.Tensor, sizes: torch.Tensor, dtype: torch.dtype, distance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The masks of a stage's own layer and of those above it, [batch, 1, queries, keys] each of `dtype`.

    Args:
        allowed: [batch or 1, 1, queries, keys], a causal mask: bool, or additive and zero where a key is seen.
        sizes: [batch, n, 2] float32, of the first n keys, for the two masks. Later ones have size 1.
        distance: [batch, queries, n] float32, the distance term of the first n keys; None where there is none.
    """
    allowed = allowed if allowed.dtype == torch.bool else allowed == 0
    room = allowed.shape[-1] - sizes.shape[1]
    bias = torch.nn.functional.pad(sizes.log().movedim(2, 0)[:, :, None, None], (0, room))
    if distance is not None:
        bias = bias + torch.nn.functional.pad(distance[:, None], (0, room))
    own, above = torch.where(allowed, bias.to(dtype), MASKED)
    return own, above


def distance_term(
    places: torch.LongTensor,
    is_prompt: torch.BoolTensor,
    attention_mask: torch.Tensor | None,
    length: int,
    inverse_frequencies: torch.Tensor,
) -> torch.Tensor:
    """The distance term of the last tokens of a cache as queries, and all as keys. [batch, queries, n] float32

    Args:
        places: [batch, n] int64, the column of each entry in the full sequence; anything for padding.
        is_prompt: [batch, queries] bool, which queries add it.
        attention_mask: [batch, length], zero at padding of the full sequence; None where none is.
        length: of the full sequence.
        inverse_frequencies: of the decoder's RoPE.
    """
    device, places = places.device, places.clamp_min(0)
    if attention_mask is not None:
        places = (upload(attention_mask, device).long().cumsum(1) - 1).clamp_min(0).gather(1, places)
    distances = torch.arange(length, dtype=torch.float64, device=device)
    decay = (distances[:, None] * inverse_frequencies.to(device, torch.float64)).cos().mean(1)
    term = (2 - decay).log().float()
    queries = places[:, -is_prompt.shape[1] :]
    return torch.where(is_prompt[..., None], term[(queries[..., None] - places[:, None]).abs()], 0)
