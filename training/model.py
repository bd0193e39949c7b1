"""The small model: a CLIP vision tower, a Llama decoder, its own tokenizer and processor. Real transformers classes."""

import math

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from .scenes import COLORS, PATCH, SHAPES


IMAGE_SIZE = 336
GRID = IMAGE_SIZE // PATCH
# Single-turn and multi-turn prompts of LLaVA-1.5. The answer and </s> follow "ASSISTANT: ".
_TEXT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
)
# No system message was trained on; one is written before the turns, as in the prompts of LLaVA-1.5.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}{% endif %}" + _TEXT + " "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: " + _TEXT + "{{ eos_token }}"
    "{% elif message['role'] == 'system' %}" + _TEXT + " "
    "{% else %}{{ raise_exception('A role must be system, user or assistant, got ' + message['role']) }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the words of the questions; capital letters and digits stay tokens of their own."""
    backend = Tokenizer(models.BPE())
    single = pre_tokenizers.Split(Regex("[A-Z0-9]"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        min_frequency=1,
        special_tokens=[AddedToken(token, special=number < 4, normalized=False) for number, token in enumerate(special)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_vocabulary_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _vocabulary_text() -> list[str]:
    kinds = [*SHAPES, *(f"{kind}{'es' if kind == 'cross' else 's'}" for kind in SHAPES)]
    text = "does the sign say is written on there a an color shape object how many are left right of above below yes no"
    words = [f" {word}" for word in (*text.split(), *kinds, *COLORS)]
    return words * 50 + ["hat ow s re \n ? ."] * 50


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=192,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        # With 32 channels in a head, a base of 10,000 turns most of them within 576 tokens: too few are left to match content.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Random weights, but for the tower's positions: with waves, a neighbour is the same rotation everywhere."""
    model = LlavaForConditionalGeneration(build_config(tokenizer))
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    with torch.no_grad():
        positions[1:] += position_waves(GRID, positions.shape[1])
    return model


def position_waves(side: int, width: int, amplitude: float = 1.5) -> torch.Tensor:
    """[side * side, width]: sines and cosines of the row in one half, of the column in the other, periods from 4 to 100."""
    frequencies = 2 * torch.pi / torch.logspace(math.log10(4), 2, width // 4)
    angles = torch.arange(side)[:, None] * frequencies
    waves = amplitude * torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)
