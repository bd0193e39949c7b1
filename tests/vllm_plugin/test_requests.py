"""What an engine does with requests beside answering them: many at once, preempted, aborted, cut into steps."""

import math
import random
import re

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from tests.vllm_plugin.serving import (
    BLOCK,
    assert_kept_alike,
    engine,
    generated,
    greedy,
    kept_of,
    num_free_blocks,
    prompt_text,
    questions,
    reference,
    runner_of,
    scheduler_of,
    vllm_prompt,
)


TEXT = "Is the green cross left of the red circle? How many stars are there? What does the sign say? "
RATIOS = (None, 0.0, 0.5, 0.889, 0.944)
NUM_BLOCKS = 500


@pytest.fixture(scope="module")
def llm():
    """An engine whose cache holds about five requests, so that those that come after push each other out."""
    with engine(num_gpu_blocks_override=NUM_BLOCKS, max_num_batched_tokens=1200) as llm:
        yield llm


@pytest.fixture
def free_blocks(llm):
    """Every block is free again after the test, and nothing is remembered of its requests."""
    before = num_free_blocks(llm)
    yield
    scheduler, runner = scheduler_of(llm), runner_of(llm)
    assert num_free_blocks(llm) == before
    assert not scheduler.pruning and not scheduler.kept
    llm.generate("x", greedy(1), use_tqdm=False)  # a runner forgets when the next step begins
    assert len(runner.pruning) == 1 and not runner.kept_places and runner.pruning_step is None


def mixes(number: int, seed: int) -> list[tuple[list, str, float | None]]:
    """Requests of no to three pictures, of texts of any length, and of any ratio."""
    rng, pictures = random.Random(seed), [image for image, _ in questions(20)]
    chosen = []
    for _ in range(number):
        images = rng.sample(pictures, rng.choice((0, 1, 1, 1, 2, 3)))
        chosen.append((images, TEXT * rng.randint(0, 2) + rng.choice(questions(20))[1], rng.choice(RATIOS)))
    return chosen


def arguments(ratio: float | None) -> dict:
    return {"pruning_record": 1} | ({} if ratio is None else {"pruning_ratio": ratio})


def run(llm, requests, aborted=()):
    """Outputs by number; requests of `aborted` are aborted after a few steps."""
    llm_engine, done, rng = llm.llm_engine, {}, random.Random(3)
    for number, (prompt, params) in enumerate(requests):
        llm_engine.add_request(str(number), prompt, params)
    waiting = list(aborted)
    while llm_engine.has_unfinished_requests():
        if waiting and rng.random() < 0.5:
            llm_engine.abort_request([str(waiting.pop())])
        for output in llm_engine.step():
            if output.finished:
                done[int(output.request_id)] = output
    return done


def test_a_hundred_mixes_with_preemption_and_aborts_are_as_alone(llm, free_blocks):
    model, processor = reference()
    chosen = mixes(100, seed=0)
    aborted = range(5, 100, 9)
    # Longer answers than the model needs, so that running requests grow and push each other out.
    params = [greedy(40, **arguments(ratio)) for _, _, ratio in chosen]
    for param in params:
        param.ignore_eos = True
    prompts = [vllm_prompt(images, prompt_text(processor, len(images), text)) for images, text, _ in chosen]
    preempted = []
    scheduler = scheduler_of(llm)
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **kwargs: (preempted.append(request), preempt(request, *args, **kwargs))
    done = run(llm, list(zip(prompts, params, strict=True)), aborted)
    del scheduler._preempt_request
    assert len(preempted) >= 10
    assert set(range(100)) - set(done) <= set(aborted)
    finished = [number for number in done if done[number].outputs[0].finish_reason == "length"]
    assert len(finished) >= 100 - len(aborted)
    kept_alone, kept_elsewhere = {}, {}
    for number in finished[::3]:
        alone = llm.generate(prompts[number], params[number], use_tqdm=False)[0]
        assert alone.outputs[0].token_ids == done[number].outputs[0].token_ids
        kept_alone[number] = kept_of(alone)
    for number in finished[::7]:
        images, text, ratio = chosen[number]
        tokens, kept = generated(model, processor, images, prompt_text(processor, len(images), text), pruning_ratio=ratio)
        answer = [token for token in tokens if token != processor.tokenizer.eos_token_id]
        assert list(done[number].outputs[0].token_ids)[: len(answer)] == answer
        kept_elsewhere[number] = kept
    for kept in (kept_alone, kept_elsewhere):
        assert_kept_alike([kept_of(done[number]) for number in kept], list(kept.values()))


def test_text_may_be_cut_before_and_after_a_picture_and_a_picture_not(llm, free_blocks):
    """600 tokens a step: text of any length, then a picture that does not fit behind it, then text."""
    _, processor = reference()
    scheduler = scheduler_of(llm)
    image, question = questions(1)[0]
    for before in (0, 40, 300, 590, 640):
        text = prompt_text(processor, 1, question).replace("USER: ", "USER: " + (TEXT * 8)[:before])
        whole = llm.generate(vllm_prompt([image], text), greedy(**arguments(None)), use_tqdm=False)[0]
        limit = scheduler.max_num_scheduled_tokens
        scheduler.max_num_scheduled_tokens = 600
        cut = llm.generate(vllm_prompt([image], text), greedy(**arguments(None)), use_tqdm=False)[0]
        scheduler.max_num_scheduled_tokens = limit
        assert cut.outputs[0].token_ids == whole.outputs[0].token_ids
        assert_kept_alike([kept_of(cut)], [kept_of(whole)])


def test_a_request_that_waits_at_its_picture_is_not_cut_there(llm, free_blocks):
    """600 tokens a step are one picture's and some of the next request's: it gets up to its picture, then waits for room."""
    _, processor = reference()
    scheduler, pairs = scheduler_of(llm), questions(6)
    prompts = [vllm_prompt([image], prompt_text(processor, 1, text)) for image, text in pairs]
    alone = [llm.generate(prompt, greedy(**arguments(None)), use_tqdm=False)[0] for prompt in prompts]
    limit = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = 600
    done = run(llm, [(prompt, greedy(**arguments(None))) for prompt in prompts])
    scheduler.max_num_scheduled_tokens = limit
    for number, output in enumerate(alone):
        assert done[number].outputs[0].token_ids == output.outputs[0].token_ids
        assert_kept_alike([kept_of(done[number])], [kept_of(output)])


def test_one_picture_in_several_requests_at_several_ratios(llm, free_blocks):
    """The encoder's cache gives all of them the same features."""
    model, processor = reference()
    image, question = questions(1)[0]
    text = prompt_text(processor, 1, question)
    done = run(llm, [(vllm_prompt([image], text), greedy(**arguments(ratio))) for ratio in RATIOS])
    for number, ratio in enumerate(RATIOS):
        tokens, kept = generated(model, processor, [image], text, pruning_ratio=ratio)
        assert list(done[number].outputs[0].token_ids) == tokens
        assert_kept_alike([kept_of(done[number])], [kept])


def test_a_prompt_that_ends_with_a_picture_keeps_its_last_token(llm, free_blocks):
    image, _ = questions(1)[0]
    output = llm.generate(vllm_prompt([image], "USER: <image>"), greedy(**arguments(0.944)), use_tqdm=False)[0]
    (kept,) = kept_of(output)
    assert len(kept) == 32 and kept[-1] == 575
    assert len(output.outputs[0].token_ids) > 0


def test_layers_below_hold_all_tokens_and_layers_above_the_kept_ones(llm, free_blocks):
    """Blocks that a running request of 589 tokens holds in each group, 64 of 576 visual tokens kept."""
    _, processor = reference()
    image, question = questions(1)[0]
    prompt = vllm_prompt([image], prompt_text(processor, 1, question))
    llm.llm_engine.add_request("0", prompt, greedy(4, pruning_ratio=0.889))
    llm.llm_engine.step()
    coordinator = scheduler_of(llm).kv_cache_manager.coordinator
    length = len(next(iter(scheduler_of(llm).requests.values())).prompt_token_ids)
    held = {}
    for manager in coordinator.single_type_managers:
        (blocks,) = manager.req_to_blocks.values()
        held.setdefault(manager.kv_cache_spec.is_pruned, []).append(len(blocks))
    assert held == {False: [-(-length // BLOCK)], True: [-(-(length - 512) // BLOCK)] * 2}
    groups = runner_of(llm).kv_cache_config.kv_cache_groups
    layers = {group.kv_cache_spec.is_pruned: set() for group in groups}
    for group in groups:
        layers[group.kv_cache_spec.is_pruned] |= {int(re.search(r"layers\.(\d+)", name)[1]) for name in group.layer_names}
    assert layers == {False: {0, 1}, True: {2, 3, 4, 5}}
    run(llm, [])


def test_layers_above_run_on_the_kept_tokens_alone(llm, free_blocks):
    _, processor = reference()
    image, question = questions(1)[0]
    decoder = runner_of(llm).model.language_model.model
    rows = {number: [] for number in range(len(decoder.layers))}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, number=number: rows[number].append(len(args[1])))
        for number, layer in enumerate(decoder.layers)
    ]
    output = llm.generate(vllm_prompt([image], prompt_text(processor, 1, question)), greedy(2), use_tqdm=False)[0]
    for hook in hooks:
        hook.remove()
    length = len(output.prompt_token_ids)
    assert {number: found[0] for number, found in rows.items()} == dict(enumerate([length, length] + [length - 512] * 4))
    assert all(found[1] == 1 for found in rows.values())


def test_more_requests_run_at_once(llm, free_blocks, capsys):
    """In the bytes of one cache, pruned and unpruned. Theory: the blocks that a request holds at its end."""
    _, processor = reference()
    prompts = [vllm_prompt([image], prompt_text(processor, 1, text)) for image, text in questions(40)]
    num_new, most, lengths = 40, {}, []
    for ratio in (0.889, 0.0):
        llm_engine, scheduler, most[ratio] = llm.llm_engine, scheduler_of(llm), 0
        params = greedy(num_new, pruning_ratio=ratio)
        params.ignore_eos = True
        for number, prompt in enumerate(prompts):
            llm_engine.add_request(f"{ratio}-{number}", prompt, params)
        while llm_engine.has_unfinished_requests():
            llm_engine.step()
            decoding = [request for request in scheduler.running if request.num_output_tokens > 0]
            lengths += [request.num_prompt_tokens + num_new for request in decoding]
            most[ratio] = max(most[ratio], len(decoding))
    full, kept = (math.ceil(length / BLOCK) for length in (max(lengths), max(lengths) - 512))
    theory = {0.889: (NUM_BLOCKS - 1) // (full + 2 * kept), 0.0: (NUM_BLOCKS - 1) // (3 * full)}
    with capsys.disabled():
        print(f"\nrequests at once in {NUM_BLOCKS} blocks: pruned {most[0.889]}, unpruned {most[0.0]}; by theory {theory}")
    assert most[0.889] >= theory[0.889] >= 2 * most[0.0] and most[0.0] <= theory[0.0] + 1


def test_values_of_a_request_are_checked(llm, free_blocks):
    _, processor = reference()
    image, question = questions(1)[0]
    prompt = vllm_prompt([image], prompt_text(processor, 1, question))
    for wrong, message in (
        ({"pruning_ratio": 1.0}, r"pruning_ratio must be a number in \[0, 1\), .* got 1\.0"),
        ({"pruning_ratio": "0.5"}, "pruning_ratio must be a number"),
        ({"pruning_layer": 3}, "pruning_layer can not be set for one request"),
        ({"pruning_record": "yes"}, "pruning_record must be 1"),
    ):
        with pytest.raises(VLLMValidationError, match=message):
            llm.generate(prompt, greedy(**wrong), use_tqdm=False)
    assert llm.generate(prompt, greedy(), use_tqdm=False)[0].outputs[0].text


def test_a_cut_picture_stops_the_step():
    """What protects from wrong answers if a scheduler cut one all the same."""
    from vlmpruner_vllm.requests import PrunedGrid, PrunedMedium, RequestPruning

    grid = PrunedGrid("image", 0, (2, 2), torch.arange(10, 14), num_keep=1, keeps_last=False)
    pruning = RequestPruning((PrunedMedium(10, 14, (grid,)),))
    assert pruning.media_between(0, 10) == [] and pruning.media_between(14, 20) == []
    assert pruning.media_between(0, 14) == list(pruning.media)
    assert [pruning.num_dropped(length) for length in (0, 10, 13, 14, 20)] == [0, 0, 0, 3, 3]
    with pytest.raises(RuntimeError, match="cut an image or a video at 10 to 14"):
        pruning.media_between(0, 12)
