"""FlashAttention on a CPU: its two functions in plain torch, in place of the kernel that the library would fetch from the Hub.

The library's own code runs around them: the choice of a kernel by name, the 2-D mask, the packing of padded rows. Where
FlashAttention takes sizes at their word, and reads past the end of a tensor if they are wrong, this raises an AssertionError.
Unlike the kernels it also runs in float32, has no dropout, and autograd is torch's.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils, modeling_utils
from transformers.integrations import hub_kernels


def attend(query, key, value, scale, causal, window):
    """Attention of one row: queries [queries, heads, head_dim], keys and values [keys, key_value_heads, head_dim].

    The last query and the last key are at one position. A query that sees no key gets zeros.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    distance = torch.arange(len(query))[:, None] + len(key) - len(query) - torch.arange(len(key))  # how far a key lies back
    left, right = window
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        right = 0
    if right >= 0:
        seen &= distance >= -right
    if left >= 0:
        seen &= distance <= left
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hqk,khd->qhd", weights, value)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False):
    """Rows of one length: q [batch, queries, heads, head_dim], k and v [batch, keys, key_value_heads, head_dim]."""
    assert q.ndim == k.ndim == 4 and len(q) == len(k) and k.shape == v.shape, (q.shape, k.shape, v.shape)
    assert dropout_p == 0, dropout_p
    return torch.stack([attend(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
):
    """Rows one after another: q [queries of all rows, heads, head_dim]. `cu_seqlens_q` says where each begins, and the end."""
    assert q.ndim == k.ndim == 3 and k.shape == v.shape, (q.shape, k.shape, v.shape)
    assert dropout_p == 0, dropout_p
    parts = []
    for states, cu_seqlens, max_seqlen in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert cu_seqlens.dtype == torch.int32 and cu_seqlens[0] == 0, cu_seqlens
        assert cu_seqlens[-1] == len(states), f"{len(states)} tokens came, cu_seqlens {cu_seqlens.tolist()} reads past them"
        lengths = cu_seqlens.diff()
        assert lengths.min() >= 0 and lengths.max() <= max_seqlen, (lengths, max_seqlen)
        parts.append(states.split(lengths.tolist()))
    parts.append(v.split([len(keys) for keys in parts[1]]))
    return torch.cat([attend(*row, softmax_scale, causal, window_size) for row in zip(*parts, strict=True)])


KERNEL = SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


def install(monkeypatch) -> None:
    """Let the library find the stand-in where it would fetch a kernel from the Hub, and forget it afterwards."""
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *args, **kwargs: KERNEL)
    for module in (hub_kernels, modeling_utils):
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    for interface in (AttentionInterface, AttentionMaskInterface):  # where kernels are registered
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))


@contextmanager
def flash_attention(model, name: str = "flash_attention_2"):
    """`model`, which runs with sdpa, with the stand-in under a name of FlashAttention; then with sdpa again."""
    model.set_attn_implementation(name)
    try:
        yield model
    finally:
        model.set_attn_implementation("sdpa")
