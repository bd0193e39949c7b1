"""Text alone, and a ratio of 0, are the stock model in vLLM, to the last bit of every log-probability."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from tests.vllm_plugin.serving import ROOT, engine, prompt_text, questions, reference, vllm_prompt


@pytest.fixture
def stock_repo(tmp_path):
    """The root model as a base checkpoint, without our code and keys."""
    for pattern in ("tokenizer*", "*.jinja", "generation_config.json"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, tmp_path)
    config = json.loads((ROOT / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("pruning_") and key != "auto_map"}
    config |= {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}
    processor = json.loads((ROOT / "processor_config.json").read_text())
    for part in (processor, processor["image_processor"]):
        part.pop("auto_map")
    for name, content in (
        ("config.json", config),
        ("processor_config.json", processor | {"processor_class": "LlavaProcessor"}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
    weights = load_file(ROOT / "model.safetensors")
    save_file(
        {name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return tmp_path


def log_probabilities(llm, with_pictures: bool, **arguments):
    _, processor = reference()
    prompts = [
        vllm_prompt([image] if with_pictures else [], prompt_text(processor, int(with_pictures), text))
        for image, text in questions(4)
    ]
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=5, prompt_logprobs=5, extra_args=arguments or None)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        [
            {token: entry.logprob for token, entry in step.items()}
            for step in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs)
        ]
        for output in outputs
    ]


def test_text_alone_and_a_ratio_of_0_are_the_stock_model(stock_repo):
    dtype = "bfloat16"  # in which a sum taken in another order shows
    with engine(ROOT, dtype=dtype) as llm:
        text, unpruned = log_probabilities(llm, False), log_probabilities(llm, True, pruning_ratio=0)
        pruned = log_probabilities(llm, True)
    with engine(stock_repo, dtype=dtype, enable_prefix_caching=False) as llm:
        assert log_probabilities(llm, False) == text
        stock = log_probabilities(llm, True)
    assert stock == unpruned
    assert stock != pruned
