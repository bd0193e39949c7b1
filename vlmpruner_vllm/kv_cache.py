"""Cache groups of their own for the layers from the pruning layer on, whose blocks hold kept tokens alone.

vLLM puts layers of one spec into one group, and gives each group blocks by a number of tokens of the request. So every decoder
layer has a spec of one class, which tells the two kinds of layers apart, and a manager turns a number of tokens of the request
into the number of those that are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm.model_executor.layers.attention import Attention
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from .requests import RequestPruning


# vLLM registers its own specs on first use, but only while nothing is registered: ours alone would keep them out.
KVCacheSpecRegistry._ensure_registered()


class KeptTokensManager(FullAttentionManager):
    """Blocks for the tokens of a request that its layers hold.

    `pruning` is what each request loses, by request id; the scheduler keeps it, for all groups.
    """

    pruning: Mapping[str, RequestPruning] = {}

    def num_held(self, request_id: str, num_tokens: int) -> int:
        """How many of the request's first `num_tokens` the layers of this group hold."""
        if not self.kv_cache_spec.is_pruned:
            return num_tokens
        return num_tokens - self.pruning[request_id].num_dropped(num_tokens)

    def get_num_blocks_to_allocate(self, request_id: str, num_tokens: int, *args, **kwargs) -> int:
        return super().get_num_blocks_to_allocate(request_id, self.num_held(request_id, num_tokens), *args, **kwargs)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, *args, **kwargs):
        return super().allocate_new_blocks(request_id, self.num_held(request_id, num_tokens), *args, **kwargs)


@register_kv_cache_spec(manager_class=KeptTokensManager)
@dataclass(frozen=True, kw_only=True)
class DecoderLayerSpec(FullAttentionSpec):
    """The spec of every decoder layer of a pruned model, also of those that hold all tokens: a stock spec takes any subclass of
    itself into its group, and that saves nothing."""

    is_pruned: bool

    @classmethod
    def merge(cls, specs: Sequence["DecoderLayerSpec"]) -> "DecoderLayerSpec":
        if any(spec != specs[0] for spec in specs):
            raise AssertionError("Layers that hold all tokens and layers that hold the kept ones are groups apart.")
        return specs[0]

    def is_uniform_with_collection(self, kv_cache_specs) -> bool:
        return all(spec == self for spec in kv_cache_specs.values())


class DecoderAttention(Attention):
    """The attention of a decoder layer of a pruned model. `is_pruned` says whether the layer holds kept tokens alone."""

    is_pruned: bool

    @classmethod
    def mark(cls, attention: Attention, is_pruned: bool) -> None:
        """Make `attention` one of these.

        Raises:
            ValueError: for attention of another kind, whose keys or cache may mean something else.
        """
        if type(attention) is not Attention:
            raise ValueError(f"Pruning needs plain attention in every decoder layer, but one has {type(attention).__name__}.")
        attention.__class__ = cls
        attention.is_pruned = is_pruned

    def get_kv_cache_spec(self, vllm_config) -> DecoderLayerSpec:
        """See `Attention`.

        Raises:
            ValueError: where the stock spec is not that of full attention.
        """
        spec = super().get_kv_cache_spec(vllm_config)
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            raise ValueError(
                f"Pruning needs full attention in every decoder layer, but {self.layer_name} caches by {type(spec).__name__}."
            )
        return replace_as(spec, DecoderLayerSpec, is_pruned=self.is_pruned)


def check_groups(groups: Sequence[KVCacheGroupSpec]) -> None:
    """Raise a RuntimeError unless layers that hold all tokens and layers that hold the kept ones are groups apart."""
    specs = [group.kv_cache_spec for group in groups]
    kinds = {spec.is_pruned for spec in specs if isinstance(spec, DecoderLayerSpec)}
    if kinds != {False, True} or not all(isinstance(spec, DecoderLayerSpec) for spec in specs):
        found = ", ".join(f"{type(group.kv_cache_spec).__name__} of {len(group.layer_names)} layers" for group in groups)
        raise RuntimeError(
            f"vLLM made these KV cache groups: {found}. Pruned and unpruned decoder layers must be groups apart, or pruning "
            "would save no memory. Do not disable the hybrid KV cache manager."
        )
