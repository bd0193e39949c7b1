"""The other families on tiny random models: the tokens and the kept sets of `generate`, for pictures of several sizes."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.video_utils import VideoMetadata

from tests.families import clip, picture
from tests.vllm_plugin.serving import engine, generated, greedy, kept_of, prompt_text, vllm_prompt
from tests.vllm_plugin.tiny import NAMES, tiny_repo


SIZES = ((320, 240), (160, 320), (224, 224))
TEXT = "What is in the picture?"


@pytest.fixture(scope="module", params=NAMES)
def served(request, tmp_path_factory):
    """A repo of the family in vLLM, and its model and processor in transformers."""
    repo = tiny_repo(request.param, tmp_path_factory.mktemp(request.param))
    model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    with engine(repo, max_num_batched_tokens=2048) as llm:
        yield llm, model, processor


def test_tokens_and_kept_sets_are_those_of_generate(served):
    """Requests of no to three pictures, at several ratios, in one batch; then alone."""
    llm, model, processor = served
    pictures = [picture(seed, *size) for seed, size in enumerate(SIZES)]
    requests = [
        (images, ratio) for images in ([], pictures[:1], pictures[1:2], pictures[:2], pictures) for ratio in (0.0, 0.5, 0.889)
    ]
    texts = [prompt_text(processor, len(images), TEXT) for images, _ in requests]
    prompts = [vllm_prompt(images, text) for (images, _), text in zip(requests, texts, strict=True)]
    params = [greedy(8, pruning_ratio=ratio, pruning_record=1) for _, ratio in requests]
    expected = [
        generated(model, processor, images, text, max_tokens=8, pruning_ratio=ratio)
        for (images, ratio), text in zip(requests, texts, strict=True)
    ]
    assert len({tuple(tokens) for tokens, _ in expected}) > len(expected) / 2, "the answers tell the requests apart"
    for outputs in (
        llm.generate(prompts, params, use_tqdm=False),
        [llm.generate(*request, use_tqdm=False)[0] for request in zip(prompts[::4], params[::4], strict=True)],
    ):
        step = 1 if len(outputs) == len(expected) else 4
        for output, (tokens, kept) in zip(outputs, expected[::step], strict=True):
            assert kept_of(output) == kept
            assert list(output.outputs[0].token_ids) == tokens


def test_videos_are_pruned_slice_by_slice(served):
    """Kept sets and tokens of `generate` for the same frames."""
    llm, model, processor = served
    if not hasattr(model.model, "get_video_features"):
        pytest.skip("a family without videos")
    frames, indices = clip(seed=3, num_frames=6), list(range(6))
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": TEXT}]}], add_generation_prompt=True
    )
    metadata = {"total_num_frames": 6, "fps": 2.0, "duration": 3.0, "frames_indices": indices, "do_sample_frames": False}
    options = {"do_sample_frames": False, "video_metadata": [VideoMetadata(6, fps=2.0, frames_indices=indices)]}
    is_qwen, num_slices = "qwen" in model.config.model_type, 6
    if is_qwen:  # which takes two frames as one slice
        num_slices = 3
    prompt = {"prompt": text, "multi_modal_data": {"video": [(frames, metadata) if is_qwen else frames]}}
    inputs = processor(videos=[frames], text=[text], return_tensors="pt", **(options if is_qwen else {}))
    for ratio in (0.0, 0.75):
        output = llm.generate(prompt, greedy(8, pruning_ratio=ratio, pruning_record=1), use_tqdm=False)[0]
        assert inputs["input_ids"][0].tolist() == output.prompt_token_ids
        with torch.inference_mode():
            expected = model.generate(
                **inputs, max_new_tokens=8, do_sample=False, pruning_ratio=ratio, return_dict_in_generate=True
            )
        record = model.get_pruning_record(expected)
        assert kept_of(output) == ([] if record is None else [grid.kept.tolist() for grid in record])
        assert len(kept_of(output)) == (num_slices if ratio else 0)
        assert list(output.outputs[0].token_ids) == expected.sequences[0, inputs["input_ids"].shape[1] :].tolist()
