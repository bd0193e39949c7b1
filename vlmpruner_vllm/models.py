"""vLLM's models with pruning: the difference to its classes."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.models.llama import LlamaModel
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.llava_onevision import LlavaOnevisionForConditionalGeneration
from vllm.model_executor.models.mistral import MistralModel
from vllm.model_executor.models.qwen2 import Qwen2Model
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3LLMModel, Qwen3VLForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper

from vlmpruner.token_pruning import aggregate_tokens, select_batch

from .kv_cache import DecoderAttention
from .worker import PruningStep


# Decoders whose layers are called as `layer(positions, hidden_states, residual)` and whose attention, `self_attn.attn`, is
# given keys after RoPE.
SUPPORTED_DECODERS = (LlamaModel, MistralModel, Qwen2Model, Qwen3LLMModel)


class PrunedModelMixin:
    """Put in front of a vLLM model whose decoder is `self.language_model.model`."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.pruning_layer = self.config.pruning_layer
        self.pruning_parameters = self.config.pruning_parameters()
        decoder = self.language_model.model
        if type(decoder) not in SUPPORTED_DECODERS:
            supported = ", ".join(decoder_class.__name__ for decoder_class in SUPPORTED_DECODERS)
            raise ValueError(f"Decoders of class {type(decoder).__name__} are not supported. Supported: {supported}.")
        for number, layer in enumerate(decoder.layers):
            DecoderAttention.mark(layer.self_attn.attn, is_pruned=number >= self.pruning_layer)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors=None,
        inputs_embeds: torch.Tensor | None = None,
        pruning_step: PruningStep | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """As in the stock class. With a `pruning_step`, outputs of dropped tokens are zero."""
        if pruning_step is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        return self.run_pruned(pruning_step, positions, inputs_embeds)

    def run_pruned(self, step: PruningStep, positions: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """The decoder, layer by layer, on fewer tokens from the pruning layer on.

        Args:
            step: the tokens of the step.
            positions: [num_tokens or more], or [3, num_tokens or more].
            inputs_embeds: [num_tokens or more, hidden_size]. What follows the step's tokens is padding.
        """
        decoder, layer = self.language_model.model, self.pruning_layer
        added = self.added_after_layers(len(inputs_embeds))
        hidden_states, residual, rows = inputs_embeds, None, slice(None)
        with KeyRecorder(decoder.layers[layer - 1].self_attn.attn) as recorder:
            for number, decoder_layer in enumerate(decoder.layers):
                if number == layer:
                    hidden_states, residual = self.prune(step, hidden_states, residual, recorder.keys)
                    rows = step.kept_rows()
                    hidden_states, residual, positions = hidden_states[rows], residual[rows], positions[..., rows]
                hidden_states, residual = decoder_layer(positions, hidden_states, residual)
                if number < len(added):
                    hidden_states = hidden_states + added[number][rows]
        hidden_states, _ = decoder.norm(hidden_states, residual)
        return torch.zeros_like(inputs_embeds).index_copy_(0, rows, hidden_states)

    def added_after_layers(self, num_tokens: int) -> Sequence[torch.Tensor]:
        """For each of the first layers, what to add after it to the hidden states [num_tokens, hidden_size]."""
        return ()

    def prune(
        self, step: PruningStep, hidden_states: torch.Tensor, residual: torch.Tensor, keys: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose what is kept, note it in `step`, and merge the discarded tokens into it.

        vLLM's layers pass on a state as two summands, of which a merged state is the second. Text keeps both as they are.
        """
        rows = step.rows
        states, keys = hidden_states[rows] + residual[rows], keys[rows]
        if get_tensor_model_parallel_world_size() > 1:  # all ranks need the keys of all heads, or they choose different tokens
            keys = tensor_model_parallel_all_gather(keys)
        keys = keys.unflatten(-1, (-1, self.language_model.model.layers[0].self_attn.head_dim)).transpose(0, 1)
        step.selection = select_batch(states, keys, step.batch, self.pruning_parameters)
        merged = aggregate_tokens(states, step.selection, self.pruning_parameters.aggregation_weight)
        kept = rows[step.selection.kept]
        return hidden_states.index_fill(0, kept, 0), residual.index_copy(0, kept, merged)


class KeyRecorder:
    """A context in which the keys that an attention layer is given are left in `keys`: [num_tokens, key heads * head_dim]."""

    def __init__(self, attention: nn.Module):
        self.attention = attention
        self.keys: torch.Tensor | None = None

    def __enter__(self) -> "KeyRecorder":
        self.hook = self.attention.register_forward_pre_hook(self._record)
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()

    def _record(self, module, args) -> None:
        _, self.keys, _ = args


# What transformers saves now has no `vision_model` inside the vision tower.
SAVED_TOWER = WeightsMapper(orig_to_new_regex={re.compile(r"vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."})


class VLMPrunerLlavaForConditionalGeneration(PrunedModelMixin, LlavaForConditionalGeneration):
    """LLaVA-1.5 with pruning."""

    hf_to_vllm_mapper = LlavaForConditionalGeneration.hf_to_vllm_mapper | SAVED_TOWER


class VLMPrunerLlavaNextForConditionalGeneration(PrunedModelMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with pruning."""

    hf_to_vllm_mapper = LlavaNextForConditionalGeneration.hf_to_vllm_mapper | SAVED_TOWER


class VLMPrunerLlavaOnevisionForConditionalGeneration(PrunedModelMixin, LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision with pruning."""

    hf_to_vllm_mapper = LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | SAVED_TOWER


class VLMPrunerQwen2VLForConditionalGeneration(PrunedModelMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with pruning."""


class VLMPrunerQwen2_5_VLForConditionalGeneration(PrunedModelMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with pruning."""


class VLMPrunerQwen3VLForConditionalGeneration(PrunedModelMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL with pruning. DeepStack features reach the tokens that are still there."""

    def added_after_layers(self, num_tokens: int) -> Sequence[torch.Tensor]:
        features = self._get_deepstack_input_embeds(num_tokens)
        return () if features is None else list(features.tensors.values())

    def run_pruned(self, step: PruningStep, positions: torch.Tensor, inputs_embeds: torch.Tensor) -> torch.Tensor:
        outputs = super().run_pruned(step, positions, inputs_embeds)
        self._clear_deepstack_input_embeds(len(inputs_embeds))
        return outputs
