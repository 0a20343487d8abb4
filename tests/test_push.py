"""Exports on their way to the hub: model cards, and uploads to a stand-in of the hub's API."""

import base64
import hashlib
import json
import os
import threading
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import make_run, run_script
from huggingface_hub import ModelCard, constants, metadata_load
from huggingface_hub.utils import close_session

from jaxfusion import config as configs
from jaxfusion.data.languages import iso_of
from jaxfusion.data.tasks.spec import Source
from jaxfusion.fields import Config, DataConfig, TaskConfig
from jaxfusion.files import write_checked
from jaxfusion.hf.hub import hub_in_reach
from jaxfusion.runs.export import bridge
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.export.card import (
    Base,
    Scores,
    _is_published,
    base_of,
    joint_licence,
    metadata,
    read_scores,
)
from jaxfusion.runs.exported import open_export
from jaxfusion.training.checkpoint import Best, Notes

RESULTS = {"xnli": {
    "sw": {"likelihood": {"accuracy": 0.5, "n": 60, "ci95": [0.38, 0.62]},
           "exact_match": {"accuracy": 1 / 3, "n": 60, "ci95": [0.2, 0.4], "unfinished": 2}},
    "ur": {"likelihood": {"accuracy": 0.25, "n": 60, "ci95": [0.1, 0.3]}}}}
DETAILS = {"xnli": {
    language: {"queries": [f"Premise: {text} Label: ", "second"], "answers": ["Neutral", "x"]}
    for language, text in (("sw", "Anaimba."), ("ur", "وہ گاتی ہے۔"))}}


def write_scores(run, step=3, data_path=None):
    """What eval.py leaves in a workdir."""
    (run / "eval").mkdir(exist_ok=True)
    about = json.dumps({"step": step, "data_path": data_path})
    for name, content in (("results", RESULTS), ("details", DETAILS)):
        write_checked(run / "eval" / f"{name}.json", json.dumps(content))
        write_checked(run / "eval" / f"{name}.about.json", about)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A bridge of step 3."""
    workdir = tmp_path_factory.mktemp("push") / "run"
    make_run(workdir, tiny, "global_softmax")
    return workdir


def test_a_card_says_what_the_run_shows(run, tmp_path, monkeypatch):
    write_scores(run)
    monkeypatch.setattr(bridge, "read_notes", lambda place: Notes(
        {}, 0.5, None, Best(3, 0.5, name="likelihood")))
    export(run, tmp_path / "out", merge=True)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    found = {(x.dataset_config, x.metric_name): x.metric_value for x in card.data.eval_results}
    assert found == {
        (language, f"xnli, {scoring}, 60 rows"): score["accuracy"]
        for language, by in RESULTS["xnli"].items() for scoring, score in by.items()}
    assert {(x.dataset_type, x.dataset_split) for x in card.data.eval_results} == {
        ("facebook/xnli", "test")}
    data = card.data.to_dict()
    assert (data["language"], data["datasets"]) == (["en", "sw", "ur"], ["facebook/xnli"])
    assert "license" not in data and "base_model" not in data  # its towers are nobody's
    assert data["widget"][1]["text"] == DETAILS["xnli"]["ur"]["queries"][0]
    assert data["widget"][1]["output"] == {"text": "Neutral"}
    assert "3, which has the run's best `likelihood` on development rows (0.500)." in card.text
    assert 'texts = ["Premise: ... Hypothesis: ... Label: "]' in card.text
    assert "| xnli | sw | likelihood | 50.0 | 38.0 to 62.0 | 60 |" in card.text
    assert "- encoder: `encoder` (a local directory), licence: not stated there" in card.text


def test_others_can_read_it_and_learn_no_path(run, tmp_path):
    write_scores(run, data_path=str(tmp_path))  # rows of somebody's own
    before = os.umask(0o027)
    try:
        export(run, tmp_path / "out")
        export(run, tmp_path / "merged", merge=True)
    finally:
        os.umask(before)
    for path in (tmp_path / "merged").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640)
        assert path.is_dir() or str(run.parent.parent).encode() not in path.read_bytes()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert str(run.parent.parent) not in card and "Anaimba" not in card
    assert metadata_load(tmp_path / "out" / "README.md")["model-index"][0]["results"][0][
        "dataset"]["name"] == "xnli, sw, not from the hub"


def test_a_row_without_an_answer_is_shown_without_one(run, monkeypatch):
    monkeypatch.setitem(DETAILS["xnli"]["sw"], "answers", ["", ""])
    write_scores(run)
    first, second = read_scores(run, Config(), 3).examples
    assert "output" not in first and second["output"] == {"text": "Neutral"}


def test_own_rows_of_a_pocket_task_stay_with_their_owner(tmp_path):
    source = Source(str(tmp_path / "pocket_nli" / "{split}-{language}.jsonl"))
    assert not _is_published("pocket_nli", source)
    (tmp_path / "world.json").touch()
    assert _is_published("pocket_nli", source) and not _is_published("mine", source)


def test_scores_of_another_checkpoint_are_left_out(run, tmp_path, caplog):
    write_scores(run, step=2)
    export(run, tmp_path / "out")
    data = metadata_load(tmp_path / "out" / "README.md")
    assert "model-index" not in data and "widget" not in data and data["language"] == ["en"]
    assert "has scores of step 2, and the export is of step 3" in caplog.text


def test_licences_are_those_of_the_parts(tmp_path):
    def base(text):
        (tmp_path / "README.md").write_text(text)
        return base_of("LLM", "my-org/llm", tmp_path)

    apache = base("---\nlicense: apache-2.0\n---\n")
    llama = base("---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n")
    unknown = [base(x) for x in ("license: mit", "---\n- a\n---\n", "---\na: [\n---\n")]
    assert apache == Base("LLM", "my-org/llm", True, {"license": "apache-2.0"})
    assert llama.licence["license_link"] == "https://huggingface.co/my-org/llm/blob/main/LICENSE"
    assert joint_licence([apache, apache]) == {"license": "apache-2.0"}
    assert joint_licence([apache, llama]) == {
        "license": "other", "license_name": "apache-2.0-and-llama3"}
    assert joint_licence([apache, unknown[0]]) == {} and not any(x.licence for x in unknown)


def test_base_models_of_the_hub_are_named(run, tmp_path):
    bases = [Base("encoder", "google/mt5-large", True, {"license": "apache-2.0"}),
             Base("LLM", "my-llm", False, {"license": "apache-2.0"})]
    found = metadata("bridge", bases, [Config()], Scores(), tags=["x"]).to_dict()
    assert found == {"base_model": ["google/mt5-large"], "datasets": ["facebook/xnli"],
                     "language": ["en"], "license": "apache-2.0", "tags": ["x"]}
    config = replace(Config(), data=DataConfig(path="hub:us/private"))  # its rows are not shown
    write_scores(run)
    scores = read_scores(run, config, 3)
    assert scores.index()[0].dataset_type == "us/private" and not scores.examples


def test_all_languages_and_stages_of_training_are_named(tiny, tmp_path):
    """Own parallel text in all languages of the task, then NLI in English."""
    own = {"pairs": TaskConfig("{text}", languages=("si", "sw"), source="{split}.{language}",
                               answers="{split}.en", extract="last_number")}
    make_run(tmp_path / "run", tiny)
    make_run(tmp_path / "run" / "first", tiny)
    for folder, data in (("run/first", DataConfig("pairs", language="all")), ("run", DataConfig())):
        file = tmp_path / folder / "config.json"
        config = replace(configs.load(file), data=data, tasks=own)
        first = {"data": {"task": "pairs", "language": "all"}} if folder == "run" else {}
        configs.save(replace(config, first=first), file)
        export(tmp_path / folder, tmp_path / "out" / data.task)
    text = (tmp_path / "out" / "xnli" / "README.md").read_text()
    assert "on `xnli` in `en` only, after a stage on `pairs` in `si`, `sw` only" in text
    assert metadata_load(tmp_path / "out" / "xnli" / "README.md")["language"] == ["en", "si", "sw"]
    assert metadata_load(tmp_path / "out" / "pairs" / "README.md")["language"] == ["si", "sw"]
    back = open_export(tmp_path / "out" / "pairs").config
    assert back.data.language == "all"
    assert back.tasks["pairs"] == replace(own["pairs"], source=None, answers=None)


def test_languages_have_the_hubs_codes():
    names = {"sin_Sinh": "si", "swh_Latn": "sw", "zho_Hant": "zh", "ns": "nso", "no": "nb",
             "ceb": "ceb", "br": "br", "acm_Arab": "acm", "latn_a": None, "deva": None, "": None}
    assert {name: iso_of(name) for name in names} == names


class Hub(BaseHTTPRequestHandler):
    """What of the hub's API an upload uses; the server's `files`, `repos` and `asked` say what
    happened, and `refuses` which paths are answered with 403."""

    def log_message(self, *_):
        pass

    def reply(self, body, status=200, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json",
                            **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self):
        self.reply({})

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path == "/api/whoami-v2":
            if token not in ("hf_read", "hf_write"):
                return self.reply({"error": "Invalid username or password."}, 401)
            return self.reply({"name": "me", "orgs": [{"name": "us", "roleInOrg": "write"},
                                                      {"name": "them", "roleInOrg": "read"}],
                               "auth": {"accessToken": {"displayName": "laptop",
                                                        "role": token.removeprefix("hf_")}}})
        name = "/".join(path.split("/")[3:5])
        if name not in hub.repos:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        if "/tree/" in path:
            return self.reply([{"type": "file", "path": x, "size": len(data), "oid": "0" * 40}
                               for x, data in hub.files.items()])
        return self.reply({"id": name, "private": hub.repos[name], "sha": "0" * 40,
                           "siblings": [], "tags": [], "downloads": 0, "likes": 0})

    def do_PUT(self):
        oid, data = self.path.split("/")[-1], self.body()
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.blobs[oid] = data
        self.reply({})

    def do_POST(self):
        hub, path, body = self.server, self.path.split("?")[0], self.body()
        hub.asked.append(path)
        if any(fnmatch(path, pattern) for pattern in hub.refuses):
            return self.reply({"error": "Storage limit reached, 100 GB"}, 403,
                              X_Error_Message="Storage limit reached, 100 GB")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repos
            hub.repos.setdefault(name, asked.get("visibility") == "private")
            return self.reply({"url": f"{constants.ENDPOINT}/{name}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            return self.reply({"errors": [], "warnings": []})
        if "/preupload/" in path:
            return self.reply({"files": [
                {"path": x["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if x["path"].endswith(".safetensors") else "regular"}
                for x in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self.reply({"transfer": "basic", "objects": [
                {**x, "actions": {"upload": {"href": f"{constants.ENDPOINT}/lfs/{x['oid']}"}}}
                for x in json.loads(body)["objects"]]})
        assert "/commit/" in path
        self.commit([json.loads(line) for line in body.splitlines()])
        name = "/".join(path.split("/")[3:5])
        return self.reply({"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{'1' * 40}",
                           "commitOid": "1" * 40})

    def commit(self, lines):
        hub = self.server
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.files[value["path"]] = hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del hub.files[value["path"]]


@contextmanager
def standing_in(monkeypatch, tmp_path, token="hf_write"):
    """The hub's stand-in, where huggingface_hub looks for the hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.blobs, server.repos, server.cards = {}, {}, {}, []
    server.asked, server.refuses = [], []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", token)
    hub_in_reach.cache_clear()
    close_session()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        hub_in_reach.cache_clear()
        close_session()


def test_an_export_is_on_the_hub_byte_for_byte(run, tmp_path, monkeypatch, capsys):
    write_scores(run)
    words = ["export.py", f"--workdir={run}", f"--out={tmp_path / 'out'}", "--merge"]
    with standing_in(monkeypatch, tmp_path) as hub:
        assert run_script(*words, "--push=us/bridge", "--private") == ""
        said = capsys.readouterr().out
        assert said.endswith(f"pushed: {constants.ENDPOINT}/us/bridge\n")
        written = {str(x.relative_to(tmp_path / "out")): x.read_bytes()
                   for x in (tmp_path / "out").rglob("*") if x.is_file()}
        assert hub.files == written and hub.repos == {"us/bridge": True}
        card = ModelCard(hub.cards[0])
        assert card.data.model_name == "bridge" and 'from_pretrained("us/bridge"' in card.text
        earlier = ("model-00001-of-00002.safetensors", "chat_template.jinja",
                   "encoder/spiece.model", "pretraining.json", "tokenizer.model")
        mine = ("picture.png", "adapter/adapter_model.safetensors", "scripts/ask_jaxfusion.py",
                "tokenizers/tokenizer.json", "vocab.md")
        hub.files |= dict.fromkeys(earlier, b"old") | dict.fromkeys(mine, b"mine")
        assert run_script(*words, "--push=us/bridge", "--overwrite") == ""
        assert hub.files.keys() == {*written, *mine}
        hub.repos["us/bridge"] = False
        assert "exists and is public, and --private does not" in run_script(
            *words, "--push=us/bridge", "--private", "--overwrite")


@pytest.mark.parametrize("token,words,line", [
    ("hf_write", ["--push=bridge", "--merge"], "--push is 'bridge', expected ORG/NAME"),
    ("hf_write", ["--push=us/a--b", "--merge"], "Cannot have -- or .. in repo_id"),
    ("hf_write", ["--push=them/bridge", "--merge"], "may not write to 'them'; it may to me, us"),
    ("hf_write", ["--push=us/bridge"], "on this machine alone; add --merge to push it"),
    ("hf_write", ["--private"], "--private is for --push"),
    ("hf_read", ["--push=us/bridge", "--merge"], "the token 'laptop' may read, but not write"),
    ("hf_wrong", ["--push=us/bridge", "--merge"], "answered 401"),
    ("", ["--push=us/bridge", "--merge"], "hf auth login, with a token from"),
])
def test_what_the_hub_would_refuse_is_said_first(token, words, line, run, tmp_path, monkeypatch):
    with standing_in(monkeypatch, tmp_path, token) as hub:
        error = run_script("export.py", f"--workdir={run}", f"--out={tmp_path / 'out'}", *words)
    assert error.startswith("error: ") and line in error and "\n" not in error
    assert not (tmp_path / "out").exists() and not hub.asked


def test_a_hub_out_of_reach_is_said_first(run, tmp_path, monkeypatch):
    with standing_in(monkeypatch, tmp_path):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        error = run_script("export.py", f"--workdir={run}", f"--out={tmp_path / 'out'}",
                           "--push=us/bridge", "--merge")
    assert "cannot be reached" in error and "hf upload us/bridge HFDIR ." in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("refused", ["/api/repos/create", "*/objects/batch", "*/commit/main"])
def test_a_failed_push_leaves_the_export(refused, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with standing_in(monkeypatch, tmp_path) as hub:
        hub.refuses.append(refused)
        error = run_script("export.py", f"--workdir={run}", f"--out={out}", "--push=me/bridge",
                           "--merge")
    assert "is written, but not all of it is on the hub: the hub answered 403" in error
    assert "Storage limit reached" in error and "\n" not in error
    assert f"hf upload me/bridge {out} . --delete model.safetensors --delete " in error
    assert (out / "config.json").is_file() and not hub.files
