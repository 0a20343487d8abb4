"""The server: its answers are those of eval.py, in OpenAI's shapes; bad requests get one line."""

import json
import threading
import time

import pytest
from helpers import make_run, run_script
from starlette.testclient import TestClient

from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.evaluation.scoring import softmax
from jaxfusion.runs.open_run import open_run
from jaxfusion.serving.app import make_app
from jaxfusion.serving.batcher import Batcher
from jaxfusion.serving.served import open_models

TEXT = "Premise: la ru so. Hypothesis: bako dimofu. Label: "


@pytest.fixture(scope="module")
def workdir(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("serving") / "mine"
    make_run(path, tiny, "transformer_softmax")
    return path


@pytest.fixture(scope="module")
def opened(workdir):
    return open_models(workdir)


@pytest.fixture(scope="module")
def client(opened):
    run, models = opened
    with TestClient(make_app(models, Batcher(run.on_mesh))) as client:
        yield client


def chat(client, text=TEXT, model="mine", **fields):
    return client.post("/v1/chat/completions", json={
        "model": model, "messages": [{"role": "user", "content": text}], **fields})


@pytest.mark.parametrize("model", ["mine", "llm"])
def test_it_answers_as_eval_does(client, workdir, model):
    run = open_run(workdir, llm_only=model == "llm")
    with run.on_mesh():
        scored = run.scorer(run.task)(run.params, [Example(TEXT, "", -1)], run.task)
    reply = chat(client, model=model).json()
    print(reply, scored)
    assert reply["choices"][0]["message"]["content"] == scored.answers[0]
