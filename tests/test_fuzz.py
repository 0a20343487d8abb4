"""What users hand in, damaged and mixed at random: a right value, or one line that says what is
wrong. Fields of configs are in test_schema.py."""

import ast
import copy
import csv
import dataclasses
import gzip
import io
import json
import shutil
import sys
import zlib
from contextlib import ExitStack, chdir
from unittest import mock

import pandas
import pyarrow as pa
import pytest
from helpers import DECODERS, ENCODERS, ROOT, command, leaves, own_flags
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from jaxfusion import cli
from jaxfusion import config as configs
from jaxfusion.data.rows.examples import read_examples
from jaxfusion.data.rows.files import READERS, read_file
from jaxfusion.data.tasks.spec import Source, Task
from jaxfusion.data.tokenizers import load_tokenizer, read_end_tokens
from jaxfusion.errors import BREAKS, InputError
from jaxfusion.fields import JOBS
from jaxfusion.hf.decoders import decoder_config, decoder_json
from jaxfusion.hf.encoders import encoder_config, encoder_json
from jaxfusion.hf.load import INDEX, SINGLE, open_tensors, read_shape
from jaxfusion.pretraining.corpus import read_corpus

pytestmark = pytest.mark.slow
RANDOM = st.randoms(use_true_random=False)
BAD = (None, True, False, 0, 1, 2, -1, 7, 10**9, 10**400, 0.0, 0.5, -2.5, 1e300, float("nan"),
       float("inf"), "", "x", "silu", "two\nlines", "\0", "\ud800", "x" * 10_000, [], [0], [1, "x"],
       ["full_attention"], [[]], {}, {"x": 1}, {"rope_type": "linear"}, {"type": "x\ny"})


def often(examples):
    """So many examples, the same ones each time."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                    suppress_health_check=list(HealthCheck))


def ours(read, *args):
    """The value, or None for an error that is one line of a reasonable length."""
    try:
        return read(*args)
    except InputError as error:
        said = str(error)
        assert said and not BREAKS.search(said) and len(said) < 1000, said[:2000]
        return None


def places(tree, path=()):
    """Every value inside of JSON, by its path."""
    for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def with_value(tree, path, value):
    tree = copy.deepcopy(tree)
    at(tree, path[:-1])[path[-1]] = value
    return tree


PIECES = (b'"', b"'", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\r\n", b",", b"\t", b"{",
          b"\\", b"null", b"1e999", b"NaN", b"\xed\xa0\x80", b"\\ud800", b'"text"', b"[" * 5000,
          b"9" * 5000, b"x" * 200_000)


def damaged(rng, data):
    """The bytes with some changed, put in, left out or said again, or in another encoding."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        start, length = rng.randint(0, len(data)), rng.choice((1, 1, 2, 30))
        before, part, after = data[:start], data[start : start + length], data[start + length :]
        data = before + rng.choice((rng.choice(PIECES) + part, rng.choice(PIECES), b"", part * 2,
                                    bytes([rng.randrange(256)]))) + after
    if rng.random() < 0.1:
        code = rng.choice(("utf-16", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-8-sig"))
        data = data.decode("utf-8", "ignore").encode(code, "ignore")
    return data


# Checkpoints


def of_transformers_5(values):
    """A config.json of an LLM with its rotary embeddings as transformers 5 spells them."""
    values = dict(values)
    rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta"),
            **(values.pop("rope_scaling") or {})}
    rope["rope_type"] = rope.pop("type", rope["rope_type"])
    if "rope_local_base_freq" in values:
        local = {"rope_type": "default", "rope_theta": values.pop("rope_local_base_freq")}
        rope = {"full_attention": rope, "sliding_attention": local}
    return {**values, "rope_parameters": rope}


def by_layer(values):
    """One of Qwen's whose windows begin at a layer."""
    return {name: value for name, value in values.items() if name != "layer_types"}


SHAPES = {
    **{name: (encoder_config, encoder_json, c) for name, c in ENCODERS.items()},
    **{name: (decoder_config, decoder_json, c) for name, c in DECODERS.items()},
    **{f"{name}_v5": (decoder_config, lambda c: of_transformers_5(decoder_json(c)), c)
       for name, c in DECODERS.items()},
    "qwen25_by_layer": (decoder_config, lambda c: by_layer(decoder_json(c)),
                        DECODERS["qwen25_window"]),
}


def is_read(values, name):
    """Whether a field decides anything beside these."""
    if name in ("use_sliding_window", "sliding_window", "max_window_layers") and (
            not values.get("use_sliding_window", True) or values["sliding_window"] is None):
        return False  # Qwen's, of models without windows
    return not (name == "max_window_layers" and "layer_types" in values) and name not in (
        "architectures", "is_encoder_decoder", "dropout_rate", "pad_token_id", "eos_token_id")


@pytest.mark.parametrize("name", SHAPES)
def test_every_field_of_a_checkpoints_config(name):
    """What is taken is what the file says: it is there again when the shape is written."""
    read, write, shape = SHAPES[name]
    values = write(shape)
    assert read(values, "config.json") == shape
    for path in places(values):
        for value in BAD:
            changed = with_value(values, path, value)
            found = ours(read, changed, "config.json")
            if found is None or value in (None, {}) or not is_read(values, path[0]):
                continue
            if path == ("use_sliding_window",) and value is False:
                assert found.windows == ()
                continue
            if path == ("max_window_layers",):  # number of layers without a window
                assert found.windows == tuple(
                    None if i < value else 7 for i in range(3)) or value > 2, value
                continue
            again = at(write(found), path)
            assert again == value and isinstance(again, bool) == isinstance(value, bool), (
                path, value)


@often(300)
@given(rng=RANDOM)
@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_a_damaged_config_of_a_checkpoint(role, rng, tiny, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / role
    if not path.exists():
        shutil.copytree(tiny / role, path)
    read = {"encoder": encoder_config, "decoder": decoder_config}[role]
    data = damaged(rng, (tiny / role / "config.json").read_bytes())
    (path / "config.json").write_bytes(data)
    found = ours(read_shape, role, path)
    assert found is None or found == read(json.loads(data.decode()), "config.json")


SHARD = "model-00001-of-00001.safetensors"
FILES = ("../other.safetensors", "/", ".", "..", "sub/x.safetensors", f"./{SHARD}", f"{SHARD}\0",
         "config.json", "sub")


def tensors(path):
    found = open_tensors(path)
    return {name: found.read(name).tolist() for name in found.shapes()}


@pytest.fixture(scope="module")
def decoder(tiny, tmp_path_factory):
    """A copy of a decoder's directory, beside another file of tensors."""
    path = tmp_path_factory.mktemp("fuzz") / "decoder"
    shutil.copytree(tiny / "decoder", path)
    (path / "sub").mkdir()
    for place in (path / SHARD, path / "sub" / "x.safetensors", path.parent / "other.safetensors"):
        shutil.copy(path / SINGLE, place)
    return path


def test_every_field_of_an_index(decoder, tiny):
    whole = tensors(tiny / "decoder")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(whole, SHARD)}
    (decoder / SINGLE).unlink(missing_ok=True)
    for place in [*places(index)][:8]:
        for value in BAD + FILES:
            (decoder / INDEX).write_text(json.dumps(with_value(index, place, value)))
            found = ours(tensors, decoder)
            assert found is None or (place[0] == "metadata" and found == whole), (place, value)


@often(150)
@given(rng=RANDOM)
def test_a_damaged_index(decoder, tiny, rng):
    (decoder / SINGLE).unlink(missing_ok=True)
    data = damaged(rng, json.dumps({"weight_map": dict.fromkeys(
        open_tensors(tiny / "decoder").files, SHARD)}).encode())
    (decoder / INDEX).write_bytes(data)
    found = ours(open_tensors, decoder)
    assert found is None or (found.files and found.files == json.loads(data.decode())["weight_map"])


@often(150)
@given(rng=RANDOM)
def test_a_damaged_header_of_tensors(decoder, tiny, rng):
    """Tensors themselves have no sums: only what is around them shows damage."""
    data = (tiny / "decoder" / SINGLE).read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    (decoder / SINGLE).write_bytes(damaged(rng, data[:size]) + data[size:])
    ours(tensors, decoder)


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_every_kind_of_end_token(decoder, file):
    (decoder / "generation_config.json").unlink(missing_ok=True)
    for value in BAD:
        (decoder / file).write_text(json.dumps({"eos_token_id": value}))
        found = ours(read_end_tokens, decoder, 500)
        assert found is None or list(found) == (
            [] if value is None else value if isinstance(value, list) else [value])


TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
OF_TOKENIZERS = (*TOKENS, "add_bos_token", "added_tokens_decoder", "chat_template",
                 "tokenizer_class", "model_max_length", "sentencepiece_normalizer", "padding_side",
                 "additional_special_tokens", "extra_special_tokens", "truncation_side",
                 "model_input_names", "auto_map", "tokenizer_file")
ENTRIES = ({"3": {}}, {"x": {"content": "a"}}, {"3": {"content": 3}}, {"-1": {"content": "zz"}},
           {"3": {"content": "</s>", "x": 1}}, {"content": "</s>"}, {"content": 3}, "</s>", "<s>",
           "../decoder/tokenizer.json", "{{", [{"name": "default", "template": "{{"}])


@pytest.mark.parametrize("name", OF_TOKENIZERS)
def test_every_field_of_a_tokenizers_config(decoder, tiny, name):
    """A text has the ids of tokenizer.json, and special tokens are those named."""
    file, text = decoder / "tokenizer_config.json", "lala bako</s>"
    values = json.loads((tiny / "decoder" / file.name).read_text())
    usual = load_tokenizer(tiny / "decoder", 512, "decoder")(text)["input_ids"]
    for value in BAD + ENTRIES:
        file.write_text(json.dumps({**values, name: value}))
        found = ours(load_tokenizer, decoder, 512, "decoder")
        if found is not None:
            begun = usual if name != "add_bos_token" or value is not False else usual[1:]
            assert found(text)["input_ids"] == begun, value
            if name in TOKENS:
                token = value["content"] if isinstance(value, dict) else value
                assert getattr(found, name) == token, value


# Rows


def table(rng, more=""):
    """Rows of texts that a file may hold, with `more` characters."""
    letters = 'ab ,;\t"\'{}\\0.é\u0dc3\u200d\U0001f600\u2028\x0b' + more
    columns = rng.sample(["text", "label", "id", "ලකුණ", "a b", "language"], rng.randint(1, 4))

    def text():
        return "".join(rng.choice(letters) for _ in range(rng.choice((1, 2, 5, 20))))

    return [{name: f"x{text()}x" for name in columns} for _ in range(rng.choice((1, 2, 9)))]


def as_bytes(rows, kind):
    """A file's content as other programs write it."""
    lines, binary = io.StringIO(newline=""), io.BytesIO()
    if kind == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), binary)
        return binary.getvalue()
    if kind == ".json":
        return json.dumps(rows).encode()
    if kind == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if kind == ".tsv":
        return "".join("\t".join(x) + "\n" for x in [rows[0], *map(dict.values, rows)]).encode()
    csv.writer(lines, delimiter="," if kind == ".csv" else "\t").writerows(
        [rows[0], *map(dict.values, rows)])
    return lines.getvalue().encode()


def theirs(data, kind):
    """The rows as pandas, pyarrow or json read them; None where they do not."""
    hows = {".csv": {}, "quoted": {"sep": "\t"},
            ".tsv": {"sep": "\t", "quoting": csv.QUOTE_NONE, "skip_blank_lines": False}}
    try:
        if kind == ".parquet":
            return parquet.read_table(io.BytesIO(data)).to_pylist()
        if kind == ".json":
            return json.loads(data.decode("utf-8-sig"))
        if kind == ".jsonl":
            lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
            return [json.loads(line) for line in lines if line.strip()]
        if kind == ".tsv" and b"\r" in data.replace(b"\r\n", b""):
            return None  # ends a line for pandas, alone among line feeds not for us
        columns, *rows = pandas.read_csv(io.BytesIO(data), dtype=str, keep_default_na=False,
                                         header=None, **hows[kind]).values.tolist()
        return [dict(zip(columns, row, strict=True)) for row in rows]
    except (ValueError, RecursionError, pa.ArrowException, OSError):
        return None


def filled(rows):
    """The rows without blank ones at the end."""
    while rows and not any(str(x).strip() for x in rows[-1].values()):
        rows = rows[:-1]
    return rows


@often(250)
@given(rng=RANDOM, damage=st.booleans() | st.just(True), packed=st.booleans())
@pytest.mark.parametrize("kind", [*READERS, "quoted"])
def test_files_of_rows(kind, rng, damage, packed, tmp_path_factory):
    """Whole ones are read as they are; of damaged ones the rows are those that others read."""
    suffix, packed = kind if kind in READERS else ".tsv", packed and kind != ".parquet"
    rows = table(rng, "" if kind == ".tsv" else "\n\r")
    if kind == ".tsv":
        rows = [{name: x.replace("\t", " ") for name, x in row.items()} for row in rows]
    data = as_bytes(rows, kind)
    data = damaged(rng, data) if damage else data
    file = tmp_path_factory.getbasetemp() / f"rows{suffix}{'.gz' if packed else ''}"
    file.write_bytes(gzip.compress(data) if packed else data)
    found = ours(lambda: [row for row, _ in read_file(file, quoted=kind == "quoted")])
    assert damage or found == rows
    if found is not None and (expected := theirs(data, kind)) is not None:
        assert repr(filled(found)) == repr(filled(expected))  # NaN is not NaN
    if found is not None:
        json.dumps(found, ensure_ascii=False, default=str).encode()  # all of it is text
    task = Task("{text}", (), ("en",), Source(str(file), splits={"train": ""},
                                              rename={"label": "target"}, quoted=kind == "quoted"))
    examples = ours(read_examples, "mine", task, "train", "en", None)
    assert examples != [] and (examples is None or found is not None)
    if examples is not None and not any("id" in row or "language" in row for row in found):
        assert [x.query for x in examples] == [str(row["text"]) for row in found]


@often(150)
@given(rng=RANDOM)
def test_packed_files_that_are_damaged(rng, tmp_path_factory):
    data = as_bytes(table(rng), ".jsonl")
    file = tmp_path_factory.getbasetemp() / "rows.jsonl.gz"
    file.write_bytes(damaged(rng, gzip.compress(data)))
    found = ours(lambda: [row for row, _ in read_file(file)])
    try:
        expected = theirs(gzip.decompress(file.read_bytes()), ".jsonl")
    except (EOFError, OSError, zlib.error):
        return
    assert found is None or expected is None or found == expected


KINDS = [pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.binary(), pa.string(),
         pa.large_string(), pa.date32(), pa.date64(), pa.time32("s"), pa.time64("ns"),
         *(kind(unit) for kind in (pa.timestamp, pa.duration) for unit in ("s", "us", "ns")),
         pa.timestamp("us", "UTC"), pa.timestamp("us", "Mars/X"), pa.list_(pa.string())]


@often(200)
@given(kind=st.sampled_from(KINDS), number=st.integers(-2**63, 2**63 - 1),
       names=st.lists(st.sampled_from(["text", "label", "id"]), min_size=1, max_size=4))
def test_columns_of_parquet_of_every_kind(kind, number, names, tmp_path_factory):
    file = tmp_path_factory.getbasetemp() / "kinds.parquet"
    try:
        cells = pa.array([number]).cast(kind)
    except pa.ArrowException:
        cells = pa.array([None], kind)
    try:
        parquet.write_table(pa.Table.from_arrays([cells] * len(names), names), file)
    except pa.ArrowException:
        return
    found = ours(lambda: [row for row, _ in read_file(file)])
    assert found is None or (len(found) == 1 and list(found[0]) == names)
    if found is not None:
        assert found == parquet.read_table(file).to_pylist()


@often(150)
@given(rng=RANDOM)
def test_texts_to_pretrain_on(rng, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "corpus"
    path.mkdir(exist_ok=True)
    texts = [row["text"].replace("\t", " ") for row in table(rng) if "text" in row] or ["a"]
    mark = rng.choice(("", "\ufeff"))
    (path / "text-en.txt").write_text(mark + "\n".join(texts), "utf-8")
    assert [x.text for x in read_corpus(path).documents] == texts
    data = damaged(rng, (mark + "\n".join(texts)).encode())
    (path / "text-en.txt").write_bytes(data)
    found = ours(read_corpus, path)
    lines = io.StringIO(data.decode("utf-8-sig", "replace"), newline=None).read().split("\n")
    assert found is None or [x.text for x in found.documents] == [x for x in lines if x.strip()]


# Command lines

CONFIGS = {"bridge": "xnli_paper", "compare": "quickstart", "pretrain": "pocket_encoder",
           "lens": "lens_paper"}
FIELDS = [(job, path) for job, kind in JOBS.items()
          for path in leaves(json.loads(json.dumps(dataclasses.asdict(kind()))))]
TEXTS = ("", "x", "-1", "0", "1", "2", "0.5", "1e3", "1e400", "nan", "True", "None", "()", "(1,)",
         "('a',)", "[1]", "{}", "{'a': 1}", "a,b", "two\nlines", "(", "'", "\0", "9" * 5000, "é",
         "__import__('os')", "(" * 500, "\udcff", "3:5", "5:3", "gs://x/y", "v4-32", "float32")
FLAGS = {
    "train.py": ("workdir", "compile_only", "nocompile_only", "topology", "profile_steps", "nosuch",
                 "distributed", "config", "config.nosuch", "config.train"),
    "eval.py": ("tasks", "languages", "limit", "data_path", "drop_seen", "llm_only", "distributed",
                "ask", "input", "output", "compare", "scoring", "report", "max_new_tokens", "seed",
                "temperature", "top_p", "stop", "batch_size", "workdir", "nosuch"),
    "export.py": ("out", "merge", "dtype", "format", "enc", "lm", "overwrite", "workdir", "nosuch"),
}
WORK = ("bridge.job.train", "pretraining.job.pretrain", "bridge.compare.compare", "lens.job.lens",
        "bridge.compile_only.compile_only")


class Begun(Exception):
    """A script's words are right: its work begins."""


def begin(*args):
    raise Begun(*args)


def run_script(place, script, words):
    """The config with which a script would begin its work, or none where it refuses to."""
    room = command(script).__name__.removeprefix("jaxfusion.")
    nothing = (f"{room}.set_up_logging", f"{room}.set_up_jax", "sharding.hosts.join")
    with ExitStack() as stack:
        stack.enter_context(chdir(place))
        own = stack.enter_context(own_flags(script))
        stack.enter_context(mock.patch.object(sys, "argv", [script, *words]))
        for name in nothing:
            stack.enter_context(mock.patch(f"jaxfusion.{name}"))
        stack.enter_context(mock.patch("jaxfusion.miniatures.inputs.make_inputs", lambda x: x))
        for name in WORK:
            stack.enter_context(mock.patch(f"jaxfusion.{name}", begin))
        try:
            command(script).main(cli.parse_flags(sys.argv, own, ""))
        except Begun as begun:
            return begun.args[0]


def as_said(text, value):
    """Whether a field holds what a command line gives it; a tuple may be given entry by entry."""
    try:
        meant = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError):
        meant = text
    wide = meant if isinstance(meant, list | dict | tuple) else (meant,)
    if isinstance(value, tuple):
        return value in ((text,), tuple(wide))
    return value in (text, meant)


@often(600)
@given(chosen=st.sampled_from(FIELDS), more=st.lists(
    st.tuples(st.integers(0, 1000), st.sampled_from(TEXTS)), min_size=1, max_size=3))
def test_fields_on_the_command_line(chosen, more, tmp_path_factory):
    """One to three fields of a job."""
    (job, first), ((_, text), *others) = chosen, more
    paths = [path for name, path in FIELDS if name == job]
    given_ = {first: text} | {paths[i % len(paths)]: text for i, text in others}
    config = ours(run_script, tmp_path_factory.getbasetemp(), "train.py", [
        f"--config={ROOT}/configs/{CONFIGS[job]}.py:debug",
        *(f"--config.{'.'.join(path)}={text}" for path, text in given_.items())])
    for path, text in given_.items() if config is not None else ():
        value = config
        for name in path:
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        assert as_said(text, value), (path, text, value)


WORDS = st.lists(st.tuples(st.integers(0, 100), st.none() | st.sampled_from(TEXTS)), max_size=4)


@often(200)
@given(words=WORDS, job=st.sampled_from([*JOBS, "none"]), loose=st.sampled_from([[]] * 9 + [["x"]]))
@pytest.mark.parametrize("script", FLAGS)
def test_flags_in_any_combination(script, words, job, loose, tmp_path_factory):
    """Of workdirs in which nothing was trained: each ends in a line, whatever is asked of it."""
    place = tmp_path_factory.getbasetemp() / f"run-{job}"
    if job != "none" and not place.exists():
        place.mkdir()
        configs.save(JOBS[job](), place / configs.CONFIG_FILE)
    start = {"train.py": [f"--config={ROOT}/configs/{CONFIGS.get(job, 'none')}.py:debug"],
             "eval.py": [f"--workdir={place}"],
             "export.py": [f"--workdir={place}", f"--out={place}-out"]}[script]
    known = FLAGS[script]
    given_ = [f"--{known[i % len(known)]}" + ("" if text is None else f"={text}")
              for i, text in words]
    found = ours(run_script, place.parent, script, [*start, *given_, *loose])
    assert script == "train.py" or found is None
