"""The trained model at the repo's root through vLLM: the same answers and the same kept tokens as in transformers."""

import pytest

from tests.vllm_plugin.serving import (
    assert_kept_alike,
    engine,
    generated_in_batches,
    greedy,
    kept_of,
    prompt_text,
    questions,
    reference,
    vllm_prompt,
)


NUM_QUESTIONS = 140


@pytest.fixture(scope="module", params=["paper", "fine"])
def served(request):
    """The preset and an engine with it, at most 8 requests at once."""
    with engine(max_num_seqs=8, hf_overrides={"pruning_preset": request.param}) as llm:
        yield request.param, llm


RATIOS = {"paper": (0.0, 0.667, 0.889), "fine": (0.944,)}


def test_answers_and_kept_tokens_are_those_of_generate(served, monkeypatch):
    preset, llm = served
    model, processor = reference()
    monkeypatch.setattr(model.config, "pruning_preset", preset)  # the model is shared with other tests
    for ratio in RATIOS[preset]:
        expected = generated_in_batches(model, processor, questions(NUM_QUESTIONS), pruning_ratio=ratio)
        prompts = [vllm_prompt([image], prompt_text(processor, 1, text)) for image, text in questions(NUM_QUESTIONS)]
        params = greedy(pruning_ratio=ratio, pruning_record=1)
        together = llm.generate(prompts, params, use_tqdm=False)
        alone = [llm.generate(prompt, params, use_tqdm=False)[0] for prompt in prompts[::20]]
        for outputs, wanted in ((together, expected), (alone, expected[::20])):
            assert [list(output.outputs[0].token_ids) for output in outputs] == [tokens for tokens, _ in wanted]
            assert_kept_alike([kept_of(output) for output in outputs], [kept for _, kept in wanted])
