"""Thousands of short requests, many of them aborted, on a tiny model: nothing leaks."""

import os
import random

import pytest

from tests.families import picture
from tests.vllm_plugin.serving import (
    assert_kept_alike,
    engine,
    greedy,
    kept_of,
    num_free_blocks,
    prompt_text,
    reference,
    runner_of,
    scheduler_of,
    vllm_prompt,
)
from tests.vllm_plugin.tiny import tiny_repo


NUM_REQUESTS = int(os.environ.get("SOAK_REQUESTS", "2000"))
# Of 32 tokens, for a few requests: many have to wait, and some give up their blocks for others.
NUM_BLOCKS = 60


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    repo = tiny_repo("qwen2_5_vl", tmp_path_factory.mktemp("soak"))
    with engine(repo, num_gpu_blocks_override=NUM_BLOCKS, max_num_batched_tokens=1024, max_model_len=640) as llm:
        yield llm, reference(repo)[1]


def test_thousands_of_requests_with_aborts_leave_every_block_free(served):
    llm, processor = served
    llm_engine, scheduler, runner = llm.llm_engine, scheduler_of(llm), runner_of(llm)
    rng = random.Random(0)
    # So many that the encoder's cache has to let some go and meets others again.
    pictures = [picture(seed, *size) for seed, size in enumerate([(112, 112), (224, 112), (168, 224), (280, 280)] * 25)]
    texts = {count: prompt_text(processor, count, "What is in the picture?") for count in range(4)}
    before = num_free_blocks(llm)
    preempted, preempt = [], scheduler._preempt_request
    scheduler._preempt_request = lambda request, *args, **kwargs: (preempted.append(request), preempt(request, *args, **kwargs))
    requests, running, finished, aborted = {}, set(), {}, set()

    def abort(number: int) -> None:
        llm_engine.abort_request([str(number)])
        running.discard(number)
        aborted.add(number)

    while len(requests) < NUM_REQUESTS or llm_engine.has_unfinished_requests():
        while len(requests) < NUM_REQUESTS and len(running) < 24:
            number, images = len(requests), rng.sample(pictures, rng.choice((0, 1, 1, 1, 2, 3)))
            arguments = {"pruning_record": 1, "pruning_ratio": rng.choice((0.0, 0.5, 0.889))}
            params = greedy(rng.randint(1, 40), **arguments)
            params.ignore_eos = True
            requests[number] = vllm_prompt(images, texts[len(images)]), params
            llm_engine.add_request(str(number), *requests[number])
            running.add(number)
            if rng.random() < 0.1:  # before its first step
                abort(number)
        if running and rng.random() < 0.2:  # while it waits, or in the middle of its answer
            abort(rng.choice(sorted(running)))
        for output in llm_engine.step():
            if output.finished and (number := int(output.request_id)) in running:
                finished[number] = output
                running.discard(number)
    del scheduler._preempt_request
    assert len(finished) + len(aborted) == NUM_REQUESTS
    assert min(len(finished), len(aborted)) > NUM_REQUESTS / 10 and len(preempted) > NUM_REQUESTS / 100
    assert num_free_blocks(llm) == before
    assert not scheduler.pruning and not scheduler.kept and not scheduler.requests
    for number in sorted(finished)[:: max(len(finished) // 20, 1)]:
        alone = llm.generate(*requests[number], use_tqdm=False)[0]
        assert list(alone.outputs[0].token_ids) == list(finished[number].outputs[0].token_ids)
        assert_kept_alike([kept_of(alone)], [kept_of(finished[number])])
    llm.generate("x", greedy(1), use_tqdm=False)  # a runner forgets when the next step begins
    assert len(runner.pruning) == len(runner.requests) == 1
    print(f"{NUM_REQUESTS} requests: {len(finished)} finished, {len(aborted)} aborted, {len(preempted)} preemptions")
