"""The server: its answers are those of eval.py, in OpenAI's shapes; bad requests get one line."""

import json
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from helpers import make_run, run_script, write_encoder_family
from starlette.testclient import TestClient

from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.evaluation.scoring import softmax
from jaxfusion.fields import AlignerConfig, DataConfig
from jaxfusion.runs.open_run import open_run
from jaxfusion.serving.answers import Answer, Part
from jaxfusion.serving.app import make_app
from jaxfusion.serving.batcher import Batcher, Full, Job
from jaxfusion.serving.engine import TOP, Ask, Token
from jaxfusion.serving.guard import BODY
from jaxfusion.serving.replies import chat_choice
from jaxfusion.serving.served import name_of, open_models

TEXT = "la ru so. bako dimofu"
TOKEN = "open sesame"


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "mine"
    make_run(path, tiny, "transformer_softmax")
    return path


@pytest.fixture(scope="module")
def opened(workdir):
    return open_models(workdir)


@pytest.fixture(scope="module")
def batcher(opened):
    return Batcher(opened[0].on_mesh)


@pytest.fixture(scope="module")
def client(opened, batcher):
    with TestClient(make_app(opened[1], batcher)) as client:
        yield client


def chat(client, text=TEXT, model="mine", **fields):
    """The reply to one message."""
    return client.post("/v1/chat/completions", json={
        "model": model, "messages": [{"role": "user", "content": text}], **fields})


def complete(client, prompt=TEXT, model="llm", **fields):
    """The reply to a prompt."""
    return client.post("/v1/completions", json={"model": model, "prompt": prompt, **fields})


def events(reply):
    """What a stream sends, after its end is checked."""
    *lines, end = [x.removeprefix("data: ") for x in reply.text.strip().split("\n\n")]
    assert end == "[DONE]" and reply.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line) for line in lines]


def said(reply, status=400):
    """The message of an error, whose shape is checked."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert "\n" not in body["error"]["message"]
    return body["error"]["message"]


def by_eval(workdir, model, text=TEXT, **decoding):
    """eval.py's answer."""
    run = open_run(workdir, decoding, llm_only=model == "llm")
    with run.on_mesh():
        return run.scorer(run.task)(run.params, [Example(text, "", -1)], run.task).answers[0]


# Answers


def test_a_bridge_answers_as_eval_does_whole_and_streamed(client, workdir):
    wanted = by_eval(workdir, "mine", max_new_tokens=6)
    reply = chat(client, max_tokens=6).json()
    assert reply["object"] == "chat.completion" and reply["model"] == "mine"
    choice, = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": wanted}
    assert choice["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 6
    *pieces, counted = events(chat(client, max_tokens=6, stream=True,
                                   stream_options={"include_usage": True}))
    assert counted["choices"] == [] and counted["usage"] == reply["usage"]
    assert len(pieces) > 1 and pieces[0]["object"] == "chat.completion.chunk"
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(x["choices"][0]["delta"]["content"] for x in pieces) == wanted
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    text = complete(client, model="mine", max_tokens=6).json()["choices"][0]["text"]
    assert text == wanted


@pytest.mark.slow
def test_the_llm_alone_and_samples_are_those_of_eval(client, workdir):
    assert chat(client, model="llm", max_tokens=6).json()["choices"][0]["message"]["content"] == (
        by_eval(workdir, "llm", max_new_tokens=6))
    drawn = {"temperature": 1.5, "top_p": 0.95, "seed": 7}
    for model in ("mine", "llm"):
        reply = chat(client, model=model, max_tokens=6, **drawn).json()
        assert reply["choices"][0]["message"]["content"] == by_eval(
            workdir, model, max_new_tokens=6, **drawn)


def test_prompts_of_one_request_and_of_many_are_answered_as_alone(client):
    texts = ["la", TEXT, "so ru la ru so", "bako"]
    alone = [complete(client, text, max_tokens=5).json()["choices"][0]["text"] for text in texts]
    together = complete(client, texts, max_tokens=5).json()["choices"]
    assert [x["text"] for x in together] == alone and [x["index"] for x in together] == [0, 1, 2, 3]
    with ThreadPoolExecutor(4) as pool:
        many = pool.map(lambda text: complete(client, text, max_tokens=5).json(), texts)
        assert [x["choices"][0]["text"] for x in many] == alone
    streamed = [""] * 4
    for event in events(complete(client, texts, max_tokens=5, stream=True)):
        streamed[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert streamed == alone


def test_log_probabilities_of_prompt_and_answer(client, opened):
    """Those of a prompt with its greedy answer are those of the answer as it was made; a chosen
    token's is among the likeliest ones where it is greedy."""
    model = opened[1]["llm"]
    ids = [*model.tokenizers.start, *model.tokenizers.encode_texts([TEXT])[0]]
    reply = complete(client, [ids], max_tokens=3, logprobs=2).json()["choices"][0]["logprobs"]
    made = reply["token_logprobs"]
    assert len(made) == 3 and all(x == max(top.values()) for x, top in zip(
        made, reply["top_logprobs"], strict=True))
    echoed = complete(client, TEXT, max_tokens=3, echo=True, logprobs=2).json()["choices"][0]
    chances = echoed["logprobs"]["token_logprobs"]
    assert chances[0] is None and len(chances) == len(ids) + 3
    assert np.allclose(chances[-3:], made, atol=1e-4)
    assert echoed["text"].strip().startswith(TEXT)
    none = complete(client, TEXT, max_tokens=0, echo=True, logprobs=1).json()["choices"][0]
    assert np.allclose(none["logprobs"]["token_logprobs"][1:], chances[1:-3], atol=1e-5)
    reply = chat(client, max_tokens=2, logprobs=True, top_logprobs=TOP).json()
    content = reply["choices"][0]["logprobs"]["content"]
    assert len(content) == 2 and all(len(x["top_logprobs"]) == TOP for x in content)
    assert content[0]["logprob"] == content[0]["top_logprobs"][0]["logprob"] < 0


def test_seeds_decide_samples_and_rows_differ_within_a_batch(client):
    def drawn(**fields):
        reply = complete(client, [TEXT] * 4, max_tokens=6, **fields).json()
        return [x["text"] for x in reply["choices"]]

    hot = drawn(temperature=2, seed=3)
    assert hot == drawn(temperature=2, seed=3) != drawn(temperature=2, seed=4)
    assert len(set(hot)) > 1 and len(set(drawn(seed=3))) == 1


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it(client):
    whole = complete(client, max_tokens=12).json()["choices"][0]["text"]
    stop = whole[3:5]
    cut = whole[: whole.find(stop)]
    for fields in ({"stop": stop}, {"stop": ["never", stop]}):
        choice = complete(client, max_tokens=12, **fields).json()["choices"][0]
        assert choice["text"] == cut and choice["finish_reason"] == "stop"
    pieces = events(complete(client, max_tokens=12, stop=stop, stream=True))
    assert "".join(x["choices"][0]["text"] for x in pieces) == cut


def test_tokens_are_where_the_text_has_them(client):
    """Behind BOS, which the text has not."""
    choice = complete(client, "la ru so", max_tokens=3, echo=True,
                      logprobs=0).json()["choices"][0]
    chances, text = choice["logprobs"], choice["text"]
    first, *others = zip(chances["tokens"], chances["text_offset"], strict=True)
    assert first == ("<s>", 0) and others
    assert all(text[at:].startswith(name) for name, at in others)


def test_the_bytes_of_tokens_join_to_the_text(tokenizers):
    ids = tokenizers.encode_texts(["la සිංහල ß"])[0]
    parts = chat_choice(Part("", tuple(Token(i, 0.0) for i in ids)), tokenizers, 0, whole=True)
    found = [x["bytes"] for x in parts["logprobs"]["content"]]
    assert bytes(byte for part in found for byte in part).decode().strip() == "la සිංහල ß"


def test_a_long_stop_string_holds_up_nobody():
    answer = Answer(Tokenizers(None, Letters()), ("x" * 900_000,), 100, True)
    begun = time.monotonic()
    assert answer.add([Token(97), Token(120)]).text == "a"  # the x may be its beginning
    assert time.monotonic() - begun < 2


class Letters:
    """A tokenizer of single bytes."""

    eos_token_id, bos_token_id = 0, None

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if i).decode(errors="replace")


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 100])
def test_pieces_join_to_the_answer_with_no_half_character_or_stop(strips, stride):
    data = " සිංහල a\nb STO STOP c".encode() + b"\0zz"
    tokens = [Token(byte) for byte in data]
    wanted = " සිංහල a\nb STO ".strip() if strips else " සිංහල a\nb STO "
    answer = Answer(Tokenizers(None, Letters()), ("STOP",), 100, strips)
    pieces = []
    for start in range(0, len(tokens), stride):
        pieces.append(answer.add(tokens[start : start + stride]))
        assert "\ufffd" not in pieces[-1].text
        if pieces[-1].last:
            break
    assert "".join(x.text for x in pieces) == wanted and pieces[-1].finish == "stop"
    assert all(wanted.startswith("".join(x.text for x in pieces[:n])) for n in range(len(pieces)))
    assert bytes(answer.ids) == data[: data.index(b"STOP") + 4]
    ended = Answer(Tokenizers(None, Letters()), (), 100, strips).add([Token(97), Token(0)])
    assert (ended.text, ended.finish, len(ended.tokens)) == ("a", "stop", 1)
    assert Answer(Tokenizers(None, Letters()), (), 1, strips).add(tokens[1:3]).finish == "length"


# What else there is


def test_what_the_page_asks_for(client, opened, workdir):
    about = client.get("/api/about").json()
    assert about["model"] == "mine" and about["llm"] == "llm" and about["languages"] is None
    assert about["columns"] == ["premise", "hypothesis"]
    assert {x["language"] for x in about["examples"]} > {"en", "si", "ur", "ar"}
    assert all(len(x["columns"]) == 2 for x in about["examples"])
    found = client.post("/api/explain", json={"model": "mine", "text": TEXT}).json()
    assert sum(x["probability"] for x in found["labels"]) == pytest.approx(1)
    run = opened[0]
    assert {k: found[k] for k in ("tokens", "weights")} == run.layers_of(TEXT)
    page = client.get("/")
    assert page.status_code == 200 and "default-src 'self'" in (
        page.headers["content-security-policy"])
    assert "http://" not in page.text and "https://" not in page.text


def test_models_health_and_metrics(client):
    assert [x["id"] for x in client.get("/v1/models").json()["data"]] == ["mine", "llm"]
    assert client.get("/v1/models/llm").json()["object"] == "model"
    assert said(client.get("/v1/models/gpt"), 404).startswith("unknown model 'gpt'")
    assert client.get("/health").json() == {"status": "ok", "models": ["mine", "llm"]}
    text = client.get("/metrics").text
    assert 'jaxfusion_requests_total{path="/health",status="200"}' in text
    assert "jaxfusion_queue_length 0.0" in text
    assert 'jaxfusion_tokens_total{kind="completion"}' in text


# Bad input


@pytest.mark.parametrize("fields,wanted", [
    ({"max_tokens": -1}, "max_tokens: should be greater than or equal to 0, got -1"),
    ({"temperature": 3}, "temperature"), ({"temperature": 1e-40}, "0 (the likeliest token) or"),
    ({"top_p": 0}, "top_p"), ({"logprobs": 9}, "logprobs"),
    ({"n": 2}, "n: this server supports 1 alone, got 2"), ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"), ({"presence_penalty": 1}, "presence_penalty"),
    ({"top_k": 1}, "unknown field 'top_k'"), ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": []}, "prompt"), ({"prompt": [0, 10**6]}, "token id 1000000, expected ids from 0"),
    ({"prompt": "x", "language": "si"}, "language is for encoders that are told it"),
    ({"max_tokens": 10**6}, "max_tokens is 1,000,000; shorten one of them"),
    ({"prompt": "la " * 3000}, "the prompt takes"),
    ({"model": "mine", "prompt": "la " * 3000}, "longer than what the encoder reads, 512 tokens"),
    ({"model": "mine", "prompt": [1, 2]}, "send no token ids"),
    ({"model": "mine", "prompt": "  "}, "the prompt is empty"),
    ({"model": "mine", "echo": True}, "echo is for the model 'llm'"),
])
def test_a_request_that_is_wrong_gets_one_line(client, fields, wanted):
    assert wanted in said(client.post("/v1/completions", json={
        "model": "llm", "prompt": "a", **fields}))


def test_more_requests_that_are_wrong(client):
    post = client.post
    assert "not JSON" in said(post("/v1/completions", content="{bad", headers={
        "content-type": "application/json"}))
    assert "Content-Type: application/json" in said(post("/v1/completions", content="prompt=a"))
    assert "surrogate" in said(post("/v1/completions", content=(
        r'{"model": "llm", "prompt": "\ud800"}'), headers={"content-type": "application/json"}))
    assert "unicode" in said(post("/v1/completions", content=(
        r'{"model": "llm", "prompt": "a", "\ud800": 1}'), headers={
            "content-type": "application/json"}))
    assert "unknown model 'gpt-4'" in said(complete(client, model="gpt-4"), 404)
    assert "1,000,000 bytes" in said(complete(client, "a" * (BODY + 1)), 413)
    assert "no such address" in said(client.get("/v1/nothing"), 404)
    assert "expected 'user'" in said(post("/v1/chat/completions", json={
        "model": "mine", "messages": [{"role": "assistant", "content": "a"}]}))
    assert "messages" in said(post("/v1/chat/completions", json={"model": "mine", "messages": []}))
    assert "top_logprobs needs" in said(chat(client, top_logprobs=2))


def test_earlier_messages_are_not_read_and_the_reply_says_so(client):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
    reply = client.post("/v1/chat/completions", json={
        "model": "mine", "messages": turns, "max_tokens": 4})
    alone = chat(client, max_tokens=4)
    assert reply.json()["choices"] == alone.json()["choices"]
    assert "only the last message" in reply.headers["x-jaxfusion-warning"]
    assert "x-jaxfusion-warning" not in alone.headers


def test_a_token_is_wanted_for_the_models_and_the_page_is_open(opened, batcher):
    with_token = TestClient(make_app(opened[1], batcher, TOKEN))
    for reply in (complete(with_token), with_token.get("/v1/models"),
                  with_token.get("/api/about")):
        assert "Authorization: Bearer" in said(reply, 401)
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert with_token.get("/v1/models", headers=right).status_code == 200
    assert with_token.get("/v1/models", headers={
        "Authorization": f"Bearer {TOKEN}x"}).status_code == 401
    assert with_token.get("/").status_code == with_token.get("/health").status_code == 200


def test_a_full_queue_refuses_whole_requests(opened):
    """A worker that waits for its context computes nothing meanwhile."""
    run, models = opened
    go, model = threading.Event(), models["llm"]

    def held():
        go.wait(60)
        return run.on_mesh()

    waiting = Batcher(held, limit=2)
    client = TestClient(make_app(models, waiting))
    refused = complete(client, ["a", "b", "c"], max_tokens=1)
    assert "queue is full" in said(refused, 429) and refused.headers["retry-after"] == "1"
    row, parts = model.literal("a"), []
    jobs = [Job(model, Ask(row, 4), Answer(model.tokenizers, (), 4, False), parts.append)
            for _ in range(2)]
    waiting.submit(jobs)
    with pytest.raises(Full):
        waiting.submit(jobs[:1])
    jobs[0].cancelled = True  # as its client has gone
    go.set()
    waiting.close()
    assert jobs[1].done and not jobs[0].done and waiting.length == 0
    assert parts[-1].finish == "length" and jobs[0].answer.ids == []


def test_a_batch_that_fails_is_reported_and_the_next_one_is_answered(client, batcher, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory\nand more")

    with monkeypatch.context() as patch:
        patch.setattr("jaxfusion.serving.engine.proceed", fail)
        assert said(complete(client), 500) == "the computation failed: out of memory"
        stream = complete(client, stream=True).text.strip().split("\n\n")
        assert "out of memory" in json.loads(stream[-1].removeprefix("data: "))["error"]["message"]
    assert complete(client, max_tokens=1).status_code == 200


def test_the_script_refuses_what_it_cannot_serve(tiny, tmp_path, workdir):
    def refused(*words):
        return run_script("serve.py", *words)

    assert "lets others in; give a --token" in refused("--workdir", str(workdir), "--host=0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} (Address already in use)" in refused(
            "--workdir", str(workdir), f"--port={port}")
    for place in (tmp_path, tiny / "encoder"):
        line = refused("--workdir", str(place), "--port=0")
        assert line.endswith("a run of Lens, and LLMs in Hugging Face format"), line


def test_a_missing_extra_is_named(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "jaxfusion.serving.server", raising=False)
    assert run_script("serve.py", "--workdir", str(workdir)) == (
        "error: uvicorn is not installed: pip install 'jaxfusion[serve]', or pip install -e "
            "'.[serve]' in the repository")


def test_names_of_bridges(tmp_path):
    assert name_of(tmp_path / "mine") == "mine"
    assert name_of(tmp_path / "last" / "seed_0") == "last-seed_0"
    assert name_of(tmp_path / "llm") == "model"


# Every kind of bridge


def kind_of_run(kind, tiny, path):
    """A run that differs from the plain one."""
    if kind == "told":
        write_encoder_family("m2m_100", tiny, path.parent / "encoder")
        return make_run(path, tiny, encoder=path.parent / "encoder")
    fields = {
        "latents": {"projector": "resampler"},
        "aligned": {"aligner": AlignerConfig("linear")},
        "trained": {"trained": ["decoder/.*"]},
        "augmented": {"data": DataConfig(text_prompt="Text: {query}\nLabel: ")},
    }[kind]
    return make_run(path, tiny, "global_softmax", **fields)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latents", "aligned", "trained", "augmented", "told"])
def test_every_kind_of_bridge_answers_as_eval_does(kind, tiny, tmp_path):
    kind_of_run(kind, tiny, tmp_path / "run")
    language = {"language": "si"} if kind == "told" else {}
    run, models = open_models(tmp_path / "run")
    texts = ["la", TEXT, "la ru so " * 12]
    with TestClient(make_app(models, Batcher(run.on_mesh))) as client:
        for model in ("run", "llm"):
            given = language if model == "run" else {}
            alone = open_run(tmp_path / "run", {"max_new_tokens": 6}, llm_only=model == "llm")
            examples = [Example(text, "", -1, **given) for text in texts]
            with alone.on_mesh():
                scored = alone.scorer(alone.task)(alone.params, examples, alone.task)
            for text, answer, chances in zip(texts, scored.answers, scored.likelihoods,
                                             strict=True):
                reply = chat(client, text, model, max_tokens=6, **given).json()
                assert reply["choices"][0]["message"]["content"] == answer
                found = client.post("/api/explain", json={"model": model, "text": text, **given})
                by_label = {x["label"]: x["probability"] for x in found.json()["labels"]}
                wanted = dict(zip(alone.task.labels, softmax(chances), strict=True))
                assert by_label == pytest.approx(wanted, abs=1e-4)
        if kind == "told":
            assert client.get("/api/about").json()["languages"] == ["eng_Latn", "sin_Sinh"]
            assert "has: eng_Latn, sin_Sinh" in said(chat(client, language="xx", model="run"))
            assert "missing; give one of" in said(chat(client, model="run"))
        same = jax.tree.map(lambda a, b: a is b, *(
            models[name].params["decoder"] for name in ("run", "llm")))
        assert all(jax.tree.leaves(same)) is (kind != "trained")
