"""The real server on loopback and the real `openai` client: what a user does, compiled as the engine's default is."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest

from tests.vllm_plugin.serving import ROOT, assert_kept_alike, generated, prompt_text, questions, reference


START_SECONDS = 480  # beside other tests


@contextmanager
def server(log, *options: str):
    """A client of a server of its own, which is ended by its process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` of the CPU build asks for the metadata of a package named vllm; this is the module behind it.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(ROOT), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "2048", *options]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120)
        assert process.poll() is None, log.read_text()[-3000:]
        assert "Prefix caching is switched off" in log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with server(tmp_path_factory.mktemp("server") / "log") as client:
        yield client


def wait_for(url: str, process: subprocess.Popen, log) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"The server did not start:\n{log.read_text()[-3000:]}")


def message(images: list, text: str) -> list[dict]:
    content = []
    for image in images:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def ask(client, images, text, stream: bool = False, **arguments):
    extra = {"vllm_xargs": arguments} if arguments else None
    return client.chat.completions.create(
        model=str(ROOT), messages=message(images, text), temperature=0, max_tokens=12, stream=stream, extra_body=extra
    )


def expected(images, text, **kwargs) -> tuple[str, list]:
    model, processor = reference()
    tokens, kept = generated(model, processor, images, prompt_text(processor, len(images), text), **kwargs)
    return processor.decode(tokens, skip_special_tokens=True), kept


def test_answers_with_a_ratio_of_their_own_and_what_was_kept(client):
    image, text = questions(1)[0]
    for arguments, ratio in (({}, 0.889), ({"pruning_ratio": 0.667}, 0.667), ({"pruning_ratio": 0}, 0)):
        response = ask(client, [image], text, pruning_record=1, **arguments)
        answer, kept = expected([image], text, pruning_ratio=ratio)
        assert response.choices[0].message.content == answer
        assert response.usage.prompt_tokens > 576
        record = (response.kv_transfer_params or {}).get("pruning_record", [])
        assert_kept_alike([[grid["kept"] for grid in record]], [kept])
    assert ask(client, [image], text).kv_transfer_params["pruning_record"] == [
        {"modality": "image", "number": 0, "grid": [24, 24], "num_visual": 576, "num_kept": 64}
    ]


def test_eight_requests_at_once_stream_their_answers(client):
    def streamed(question) -> str:
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, [question[0]], question[1], stream=True))

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(streamed, questions(24)))
    assert answers == [expected([image], text)[0] for image, text in questions(24)]


def test_several_pictures_a_second_turn_and_text_alone(client):
    (first, text), (second, _) = questions(3)[0], questions(3)[2]
    response = ask(client, [first, second], text)
    assert response.choices[0].message.content == expected([first, second], text)[0]
    assert len(response.kv_transfer_params["pruning_record"]) == 2
    assert ask(client, [], text).choices[0].message.content == expected([], text)[0]
    assert ask(client, [], text).kv_transfer_params is None
    turns = [*message([first], text), {"role": "assistant", "content": "yes"}, *message([], "How many stars are there?")]
    response = client.chat.completions.create(model=str(ROOT), messages=turns, temperature=0, max_tokens=12)
    assert response.kv_transfer_params["pruning_record"][0]["num_kept"] == 64


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"pruning_ratio": 1.5}, "pruning_ratio must be a number in [0, 1)"),
        ({"pruning_ratio": "half"}, "pruning_ratio must be a number in [0, 1)"),
        ({"pruning_layer": 3}, "pruning_layer can not be set for one request"),
        ({"pruning_record": 7}, "pruning_record must be 1"),
    ],
)
def test_bad_values_are_a_400_with_a_sentence_and_the_server_lives_on(client, arguments, sentence):
    image, text = questions(1)[0]
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, [image], text, **arguments)
    assert sentence in error.value.body["message"]
    assert ask(client, [image], text).choices[0].message.content == expected([image], text)[0]


def test_a_broken_picture_is_a_400(client):
    broken = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}, {"type": "text", "text": "What?"}]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=str(ROOT), messages=[{"role": "user", "content": broken}], max_tokens=5)


def test_clients_that_leave_do_not_stop_others(client):
    """A client that closes its stream aborts its request."""
    image, text = questions(1)[0]

    def leave():
        stream = ask(client, [image], text, stream=True)
        next(iter(stream))
        stream.close()

    threads = [threading.Thread(target=leave) for _ in range(8)]
    for thread in threads:
        thread.start()
    answer = ask(client, [image], text).choices[0].message.content
    for thread in threads:
        thread.join()
    assert answer == expected([image], text)[0]


def test_two_ranks_of_tensor_parallelism_choose_the_same_tokens(tmp_path):
    """Each has half of the key heads, and selection needs all."""
    with server(tmp_path / "log", "--tensor-parallel-size", "2", "--enforce-eager") as client:
        for image, text in questions(6):
            response = ask(client, [image], text, pruning_record=1)
            answer, kept = expected([image], text)
            assert response.choices[0].message.content == answer
            assert_kept_alike([[grid["kept"] for grid in response.kv_transfer_params["pruning_record"]]], [kept])
