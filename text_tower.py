"""CLIP's text tower beside a vision-language model: how relevant an image's patches are to a question.

It comes from a CLIP checkpoint of its own, is loaded when it is first needed, and kept for the process: it is no part of the
model, so it is neither saved nor trained with it. It runs in float32.
"""

import threading
from functools import lru_cache

import torch
from transformers import AutoConfig, AutoTokenizer, CLIPModel


_loading = threading.Lock()


def text_tower(name: str, device: torch.device) -> "TextTower":
    """The one of a folder or Hub id, which is loaded once. The last one asked for stays in memory."""
    with _loading:
        return _load(name, device)


class TextTower:
    """What is needed of a CLIP model to compare patches and text.

    Args:
        name: a folder or Hub id with a CLIP model of both towers, and its tokenizer.

    Raises:
        ValueError: naming it, if there is no such model, or one that lacks weights.
    """

    def __init__(self, name: str, device: torch.device):
        self.name, self.device = name, device
        try:
            model_type = AutoConfig.from_pretrained(name).model_type
            if model_type != "clip":
                raise ValueError(f"it holds a model of type {model_type!r}")
            clip, info = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"it lacks {len(missing)} weights: {', '.join(missing[:5])}")
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"pruning_text_tower {name!r} must be a folder or Hub id with a CLIP model (text and vision tower) and its "
                f"tokenizer, but can not be loaded: {error}"
            ) from error
        parts = clip.text_model, clip.text_projection, clip.vision_model.post_layernorm, clip.visual_projection
        parts = [part.to(device).eval().requires_grad_(False) for part in parts]
        self.text_model, self.text_projection, self.patch_norm, self.patch_projection = parts
        self.max_length = clip.config.text_config.max_position_embeddings

    @torch.no_grad()
    def of_text(self, text: str) -> torch.Tensor:
        """Embeddings of a text, [segments, projection_dim]: one, unless it has more tokens than the tower has places. Each
        segment has a start and an end token."""
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        segments = torch.tensor(tokens, dtype=torch.long).split(self.max_length - 2)
        ids = (torch.tensor([[first, *segment.tolist(), last]], device=self.device) for segment in segments)
        return torch.cat([self.text_projection(self.text_model(segment).pooler_output) for segment in ids])

    @torch.no_grad()
    def of_patches(self, states: torch.Tensor) -> torch.Tensor:
        """Embeddings of patches, [n, tower_size] (the vision tower's hidden states) to [n, projection_dim].

        Raises:
            ValueError: for states of another width than CLIP's vision tower has.
        """
        if states.shape[-1] != self.patch_projection.in_features:
            raise ValueError(
                f"pruning_text_tower {self.name!r} belongs to a vision tower of width {self.patch_projection.in_features}, but "
                f"this model's has {states.shape[-1]}."
            )
        return self.patch_projection(self.patch_norm(states.to(self.device, torch.float32)))


@lru_cache(maxsize=1)
def _load(name: str, device: torch.device) -> TextTower:
    with torch.inference_mode(False):
        return TextTower(name, device)
