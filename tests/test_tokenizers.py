"""Tokenizers of real and of made models: ids, chats, what is added and what is refused."""

import copy
import json
import re
import shutil
import unicodedata

import pytest
from helpers import write_encoder_family
from tokenizers import normalizers

from jaxfusion.data import sentencepiece_backend as sentencepiece
from jaxfusion.data.batching import tokenize, tokenize_bare
from jaxfusion.data.coverage import check_joints, check_reading, lost_marks
from jaxfusion.data.languages import language_tokens, token_of
from jaxfusion.data.rows.examples import Example, at_hand, read_examples
from jaxfusion.data.tasks.catalogue import TASKS
from jaxfusion.data.tokenizers import (
    LANGBRIDGE_WHITESPACE,
    Tokenizers,
    chat_turn,
    load_tokenizer,
)
from jaxfusion.errors import InputError
from jaxfusion.hf.save import write_tokenizer

TURN = """{% for m in messages %}<|{{ m.role }}|>
{{ m.content | trim }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""
LLAMA_2 = """{{ bos_token }}{% for m in messages %}{% if m.role == "user" %}\
[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}\
{% endfor %}"""
TEMPLATES = {
    "bos": "{{ bos_token }}" + TURN,
    "no_bos": TURN,
    "system": "{{ bos_token }}<|system|>\nIt is {{ date_string }}.<|end|>\n" + TURN,
    "eos": ("{{ bos_token }}" + TURN).replace("<|end|>", "{{ eos_token }}"),
}
MARKS = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
QUERY = "Premise: lala bako Hypothesis: bako Label: "


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory):
    """The two real SentencePiece models, each as the directory of a checkpoint."""
    folder = tmp_path_factory.mktemp("real")
    models = {
        "encoder": ("sentencepiece_cc_all.32000.100extra-sentencepiece.model", "spiece.model",
                    {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}, "mt5"),
        "decoder": ("tokenizer.mistral-v1", "tokenizer.model",
                    {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                     "unk_token": "<unk>"}, "mistral"),
    }
    for role, (model, name, config, family) in models.items():
        (folder / role).mkdir()
        shutil.copy(real_data / "tokenizers" / model, folder / role / name)
        (folder / role / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / role / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


def chat(decoder, template, marks=(), encoder=None):
    """The tokenizers of an LLM with that chat template, and its own ids of question and answer."""
    decoder.add_special_tokens({"additional_special_tokens": list(marks)})
    decoder.chat_template = template
    messages = [{"role": "user", "content": QUERY}, {"role": "assistant", "content": "bako"}]
    theirs = decoder.apply_chat_template(messages, return_dict=False, date_string="26 Jul 2024")
    return Tokenizers(encoder, decoder, chat_turn(decoder)), theirs


def check_chat(ours, theirs):
    """Start, question, answer and end token are the template's own ids."""
    (row,), _ = tokenize_bare([Example(QUERY, "bako", -1)], ours, 200)
    (answer,) = ours.encode_answers([QUERY], ["bako"])
    whole = [*ours.start, *row.text, *answer, ours.eos]
    assert whole == theirs[: len(whole)]
    # Behind a prefix, too, with the question as a text prompt and without one.
    assert ours.encode_prompts([""])[0] == row.text[-len(ours.encode_prompts([""])[0]) :]


def test_a_tokenizer_of_another_model_is_refused(tiny):
    with pytest.raises(InputError, match=r"does not belong to the encoder: it has \d+ tokens"):
        load_tokenizer(tiny / "encoder", 100, "encoder")
    with pytest.raises(InputError, match="does not belong to the decoder"):
        load_tokenizer(tiny / "decoder", 32_000, "decoder")


def test_an_absent_tokenizer_is_one_line(tmp_path):
    with pytest.raises(InputError, match="has no readable decoder tokenizer") as error:
        load_tokenizer(tmp_path, 100, "decoder")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("role,rows", [("encoder", 32_256), ("decoder", 32_000)])
def test_sentencepiece_files_give_sentencepieces_ids(role, rows, real, real_data):
    from sentencepiece import SentencePieceProcessor

    found = load_tokenizer(real / role, rows, role)
    model = SentencePieceProcessor(model_file=str(next((real / role).glob("*.model"))))
    for language in ("eng_Latn", "sin_Sinh"):
        file = real_data / "sib200" / "data" / "annotated" / language / "test.tsv"
        lines = file.read_text("utf-8").splitlines()
        lines += [f"  {line.replace(' ', '  ')} " for line in lines[:20]]
        assert found(lines, add_special_tokens=False)["input_ids"] == model.encode(lines)
    assert found.eos_token_id == model.eos_id()


def test_a_model_that_is_read_otherwise_is_refused(real, monkeypatch):
    from tokenizers import models

    monkeypatch.setattr(sentencepiece, "_bpe", lambda spm, falls_back: models.BPE(
        {spm.id_to_piece(i): i for i in range(len(spm))}, [], unk_token="<unk>"))
    with pytest.raises(InputError, match=r"tokenizers and SentencePiece differ on .* gives \["):
        load_tokenizer(real / "decoder", 32_000, "decoder")


def test_what_is_not_a_sentencepiece_model_is_said(real, tmp_path):
    shutil.copytree(real / "decoder", tmp_path / "llm")
    (tmp_path / "llm" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(InputError, match=r"is not a SentencePiece model .* put the model's own"):
        load_tokenizer(tmp_path / "llm", 32_000, "decoder")


@pytest.fixture(scope="module")
def languages(real_data):
    """Texts of 20 languages as written and with decomposed characters, from the data alone."""
    task, path = TASKS["sib200"], str(real_data / "sib200")
    rows = [x.query for language in at_hand("sib200", task, "dev", path)
            for x in read_examples("sib200", task, "dev", language, path)]
    return [*rows, *(unicodedata.normalize("NFD", x) for x in rows)]


def peculiar(path):
    """A byte-level BPE whose `tokenizer.json` says other things than any family's class."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(False)])
    backend.train_from_iterator(["the man and the girl and 1990"] * 2, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<unk>", "<s>", "</s>"]))
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    return backend


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "llama",
                                    "mistral", "phi3"])
def test_a_tokenizer_json_gives_its_own_ids_whatever_the_family(family, languages, tmp_path):
    """Transformers 5 rebuilds a tokenizer from its class."""
    own = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "phi3": "LlamaTokenizer",
           "llama": "LlamaTokenizer", "mistral": "LlamaTokenizer"}.get(family, "GemmaTokenizer")
    theirs, texts = peculiar(tmp_path / "llm"), languages[::8]
    size = theirs.get_vocab_size() + 8  # a table may have rows to spare
    wanted = [x.ids for x in theirs.encode_batch(texts, add_special_tokens=False)]
    (tmp_path / "llm" / "config.json").write_text(json.dumps({"model_type": family}))
    for kind in (None, own, "PreTrainedTokenizerFast"):
        config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                  "tokenizer_class": kind}
        (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(config))
        ours = load_tokenizer(tmp_path / "llm", size, "decoder")
        assert Tokenizers(None, ours).encode_texts(texts) == wanted
    write_tokenizer(tmp_path / "again", ours)
    again = load_tokenizer(tmp_path / "again", size, "decoder")
    assert Tokenizers(None, again).encode_texts(texts) == wanted


@pytest.fixture(scope="module")
def mt5_like(languages, tmp_path_factory):
    """A bare SentencePiece model with mT5's settings, as the directory of a checkpoint."""
    from sentencepiece import SentencePieceTrainer

    path = tmp_path_factory.mktemp("mt5")
    SentencePieceTrainer.train(
        sentence_iterator=iter(languages[: len(languages) // 2]), vocab_size=5000,
        model_prefix=str(path / "spiece"), model_type="unigram", byte_fallback=True,
        normalization_rule_name="nmt_nfkc", minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    (path / "config.json").write_text(json.dumps({"model_type": "mt5"}))
    return path


@pytest.mark.parametrize("kind", ["T5Tokenizer", "MT5Tokenizer", None])
def test_a_bare_unigram_model_gives_sentencepieces_ids(kind, mt5_like, languages, tmp_path):
    """Decomposed characters, mT5's class, and no `extra_ids`."""
    from sentencepiece import SentencePieceProcessor

    (mt5_like / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    wanted = [[*ids, 1] for ids in
              SentencePieceProcessor(model_file=str(mt5_like / "spiece.model")).encode(languages)]
    spare = load_tokenizer(mt5_like, 5100, "encoder")
    assert Tokenizers(spare, None).encode_queries(languages) == wanted
    assert spare.convert_tokens_to_ids("<extra_id_0>") == 5099
    ours = load_tokenizer(mt5_like, 5056, "encoder")
    assert len(ours) == 5000 and ours.eos_token_id == 1 and ours.pad_token_id == 0
    assert Tokenizers(ours, None).encode_queries(languages) == wanted
    write_tokenizer(tmp_path / "out", ours)
    again = load_tokenizer(tmp_path / "out", 5056, "encoder")
    assert Tokenizers(again, None).encode_queries(languages) == wanted


def test_an_added_token_beyond_the_table_is_left_out(tiny, tmp_path, caplog):
    """Gemma 3 names a token of its image models, which its table has no row for."""
    shutil.copytree(tiny / "decoder", tmp_path / "llm")
    before = load_tokenizer(tmp_path / "llm", 512, "decoder")
    tokenizer = load_tokenizer(tmp_path / "llm", 512, "decoder")
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    rows = len(before)
    assert tokenizer.convert_tokens_to_ids("<image_soft_token>") == rows
    write_tokenizer(tmp_path / "llm", tokenizer)
    found = load_tokenizer(tmp_path / "llm", rows, "decoder")
    assert "tokens beyond the model's table" in caplog.text
    for text in ("lala <image_soft_token> bako", "lala"):
        assert found(text)["input_ids"] == before(text)["input_ids"]
    file = tmp_path / "llm" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<image_soft_token>"}))
    with pytest.raises(InputError, match="'<image_soft_token>' is beyond the model's table"):
        load_tokenizer(tmp_path / "llm", rows, "decoder")


@pytest.mark.parametrize("change, said", [
    ({"eos_token": "<zzz>"}, "eos_token '<zzz>' is missing from tokenizer.json"),
    ({"added_tokens_decoder": {"500": {"content": "<x>"}}}, "token '<x>' has id 500 there, but"),
    ({"add_bos_token": "true"}, "add_bos_token is 'true', expected true or false"),
    ({"sentencepiece_normalizer": "../x"}, r"is '\.\./x', expected the name of a file in the same"),
    ({"sentencepiece_normalizer": ""}, "is '', expected the name of a file in the same"),
])
def test_tokens_that_a_tokenizer_json_lacks_are_named(change, said, tiny, tmp_path):
    shutil.copytree(tiny / "decoder", tmp_path / "llm")
    file = tmp_path / "llm" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=said):
        load_tokenizer(tmp_path / "llm", 512, "decoder")


@pytest.mark.parametrize("settings, begins", [
    ({}, True), ({"add_bos_token": False}, False), ({"add_bos_token": True}, True)])
def test_bos_is_put_where_the_tokenizer_puts_it(settings, begins, tiny, tmp_path):
    """A tokenizer may name BOS and begin no text with it."""
    shutil.copytree(tiny / "decoder", tmp_path / "llm")
    file = tmp_path / "llm" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    ours = Tokenizers(None, load_tokenizer(tmp_path / "llm", 512, "decoder"))
    assert ours.start == ([ours.decoder.bos_token_id] if begins else [])
    # A run keeps which it was.
    assert Tokenizers(None, ours.decoder, bos=False).start == []
    assert Tokenizers(None, ours.decoder, bos=True).start == [ours.decoder.bos_token_id]
    config = json.loads((tmp_path / "llm" / "tokenizer.json").read_text())
    if not settings:
        config["post_processor"] = None
        (tmp_path / "llm" / "tokenizer.json").write_text(json.dumps(config))
        assert Tokenizers(None, load_tokenizer(tmp_path / "llm", 512, "decoder")).start == []


def test_a_token_across_the_seam_leaves_its_answer_whole(tmp_path):
    """Of `(` and `A` some tokenizers make the one token `(A`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {x: i for i, x in enumerate(["</s>", *alphabet, "(A", "(B"])}
    backend = Tokenizer(models.BPE(vocab, [("(", "A"), ("(", "B")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    ours = Tokenizers(None, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>"))
    prompt = "Answer:\n("
    found = ours.encode_answers([prompt, prompt], ["A)", "B)"])
    context = ours.encode_texts([prompt])[0]
    assert found == [[vocab["A"], vocab[")"]], [vocab["B"], vocab[")"]]]
    assert ours.decoder.decode([*context, *found[0]]) == prompt + "A)"


def test_langbridges_whitespace_gets_the_unused_rows(real):
    encoder = load_tokenizer(real / "encoder", 32_256, "encoder", LANGBRIDGE_WHITESPACE)
    first = len(load_tokenizer(real / "encoder", 32_256, "encoder"))
    assert encoder.convert_tokens_to_ids(list(LANGBRIDGE_WHITESPACE)) == [
        first + i for i in range(len(LANGBRIDGE_WHITESPACE))]
    ids = encoder("Premise: one\n  two")["input_ids"]
    assert {encoder.convert_tokens_to_ids(x) for x in ("\n", "  ")} < set(ids)
    with pytest.raises(InputError, match="does not belong to the encoder"):
        load_tokenizer(real / "encoder", first + 2, "encoder", LANGBRIDGE_WHITESPACE)


@pytest.mark.parametrize("role,rows", [("encoder", 32_256), ("decoder", 32_000)])
def test_what_is_written_gives_the_same_ids(role, rows, real, tmp_path):
    added = LANGBRIDGE_WHITESPACE if role == "encoder" else ()
    before = load_tokenizer(real / role, rows, role, added)
    write_tokenizer(tmp_path / "out", before)
    after = load_tokenizer(tmp_path / "out", rows, role)
    for text in ("Premise: one\n  two", "සිංහල මකුළුවා", " a  b", ""):
        assert after(text)["input_ids"] == before(text)["input_ids"]


def test_slow_tokenizers_serve_too(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    encoder = load_tokenizer(tmp_path, 384, "encoder")
    assert not encoder.is_fast
    assert Tokenizers(encoder, None).encode_queries(["ab"]) == [[100, 101, 1]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_has_its_templates_own_ids(name, tiny):
    decoder = load_tokenizer(tiny / "decoder", 512, "decoder")
    ours, theirs = chat(decoder, TEMPLATES[name], MARKS)
    check_chat(ours, theirs)
    assert ours.start.count(decoder.bos_token_id) == (name != "no_bos")
    end = "</s>" if name == "eos" else "<|end|>"
    assert decoder.convert_ids_to_tokens(ours.eos) == end


def test_a_chat_does_not_depend_on_the_day(tiny):
    decoder = load_tokenizer(tiny / "decoder", 512, "decoder")
    decoder.chat_template = "\n{{ strftime_now('%A, %d %B %Y (%m, %b)') }}" + TURN
    assert chat_turn(decoder).before.startswith("\nFriday, 26 July 2024 (07, Jul)<|user|>")


def test_a_real_models_chat(real):
    decoder = load_tokenizer(real / "decoder", 32_000, "decoder")
    ours, theirs = chat(decoder, LLAMA_2)
    check_chat(ours, theirs)
    assert theirs.count(decoder.bos_token_id) == 1 and ours.eos == decoder.eos_token_id


def test_a_chat_round_a_prefix_keeps_both_headers(tokenizers, tiny):
    decoder = load_tokenizer(tiny / "decoder", 512, "decoder")
    ours, _ = chat(decoder, TEMPLATES["bos"], MARKS, tokenizers.encoder)
    (row,), cut = tokenize(
        [Example(QUERY, "bako", 0)], ours, text_prompt="{query}", max_encoder_tokens=50,
        max_decoder_tokens=12, with_target=True)
    assert cut.texts == 1  # from the left: the assistant's header stays
    marks = decoder.convert_ids_to_tokens(row.text)
    assert "<|assistant|>" in marks and "<|end|>" in marks and "<|user|>" not in marks
    assert "<|user|>" in decoder.convert_ids_to_tokens(ours.start)
    assert decoder.decode(row.target) == "bako<|end|>"


@pytest.mark.parametrize("template,message", [
    (None, r"has no chat template; set data\.chat_template"),
    ("{{ messages[0].content | upper }}", "expected the words unchanged, once"),
    ("{{ raise_exception('a system message must come first') }}",
     "does not accept a single user turn: a system message must come first"),
])
def test_templates_that_cannot_serve_are_said(template, message, tiny):
    decoder = load_tokenizer(tiny / "decoder", 512, "decoder")
    decoder.chat_template = template
    with pytest.raises(InputError, match=message):
        chat_turn(decoder)


def test_answers_continue_prompts(tokenizers):
    prompts, answers = ["lala Label: ", ""], ["bako", "bako"]
    first, second = tokenizers.encode_answers(prompts, answers)
    whole = tokenizers.encode_texts(["lala Label:"])[0] + first
    assert tokenizers.decoder.decode(whole).strip() == "lala Label: bako"
    assert tokenizers.decoder.decode(second).strip() == "bako"


def test_a_table_that_is_too_small_is_laid_on_neither_file(tiny):
    with pytest.raises(InputError, match=r"by config\.json .*; one of the two files is from"):
        load_tokenizer(tiny / "decoder", 100, "decoder")


@pytest.mark.parametrize("language", ["sin_Sinh", "si"])
def test_nllbs_texts_begin_with_their_language(language, tiny, tmp_path):
    write_encoder_family("m2m_100", tiny, tmp_path / "encoder")
    encoder = load_tokenizer(tmp_path / "encoder", 544, "encoder")
    ours = Tokenizers(encoder, encoder, languages=language_tokens(encoder), query_prefix="la ")
    plain = encoder("la ru", add_special_tokens=False)["input_ids"]
    token, end = encoder.convert_tokens_to_ids(["sin_Sinh", "</s>"])
    assert ours.encode_queries(["ru"], [language]) == [[token, *plain, end]]
    long, _ = tokenize([Example("ru " * 99, "", 0, language)], ours, text_prompt="",
                       max_encoder_tokens=9, max_decoder_tokens=9, with_target=False)
    assert len(long[0].query) == 9 and long[0].query[0] == token and long[0].query[-1] == end


def test_a_language_without_a_token_is_refused(tiny, tmp_path):
    write_encoder_family("m2m_100", tiny, tmp_path / "encoder")
    tokens = language_tokens(load_tokenizer(tmp_path / "encoder", 544, "encoder"))
    with pytest.raises(InputError, match=r"no token for language 'xx'; it has: eng_Latn, sin_Sinh"):
        token_of("xx", tokens)
    with pytest.raises(InputError, match=r"give one of eng_Latn, sin_Sinh"):
        token_of("", tokens)
    with pytest.raises(InputError, match=r"its tokenizer has no such tokens"):
        language_tokens(load_tokenizer(tiny / "encoder", 544, "encoder"))


def test_m2m100s_own_ids(languages, tmp_path):
    """Its SentencePiece model cuts texts, and `vocab.json` numbers the pieces."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    texts = [x for x in languages if x.strip()][::2]
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), vocab_size=3000, model_type="bpe", minloglevel=2,
        model_prefix=str(tmp_path / "sentencepiece.bpe"))
    spm = SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.bpe.model"))
    pieces = [spm.id_to_piece(i) for i in range(3, len(spm))][::-1]  # in another order
    vocab = {x: i for i, x in enumerate(("<s>", "<pad>", "</s>", "<unk>", *pieces))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "M2M100Tokenizer", "src_lang": "en", "tgt_lang": "en"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "m2m_100"}))
    encoder = load_tokenizer(tmp_path, len(vocab) + 108, "encoder")
    ours = Tokenizers(encoder, None, languages=language_tokens(encoder))
    si = encoder.convert_tokens_to_ids("__si__")
    assert si >= len(vocab)
    wanted = [[si, *(vocab.get(x, 3) for x in spm.encode(text, out_type=str)), 2]
              for text in texts[:200]]
    assert ours.encode_queries(texts[:200], ["sin_Sinh"] * 200) == wanted


def test_a_bare_model_of_xlm_r_has_fairseqs_ids(languages, tmp_path):
    """Glot500 has no tokenizer.json."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(languages[::2]), vocab_size=5000, model_type="unigram",
        normalization_rule_name="nmt_nfkc", minloglevel=2,
        model_prefix=str(tmp_path / "sentencepiece.bpe"))
    spm = SentencePieceProcessor(model_file=str(tmp_path / "sentencepiece.bpe.model"))
    wanted = [[0, *(3 if i == 0 else i + 1 for i in spm.encode(x)), 2] for x in languages]
    ours = load_tokenizer(tmp_path, 5200, "encoder")
    assert Tokenizers(ours, None).encode_queries(languages) == wanted
    assert ours.pad_token_id == 1 and ours.convert_tokens_to_ids("<mask>") == 5001
    write_tokenizer(tmp_path / "again", ours)
    again = load_tokenizer(tmp_path / "again", 5200, "encoder")
    assert Tokenizers(again, None).encode_queries(languages) == wanted


def test_what_a_tokenizer_loses_is_said(tiny, caplog):
    encoder = load_tokenizer(tiny / "encoder", 544, "encoder")
    check_reading(Tokenizers(encoder, None), [Example("ba du fe", "", 0, "en")])
    assert not caplog.records
    check_reading(Tokenizers(encoder, None), [Example("සිංහල භාෂාව", "", 0, "si")])
    assert re.search(r"does not know \d+% of the tokens in 'si'", caplog.text)
    stripped = copy.deepcopy(encoder)
    stripped.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents()])
    assert lost_marks(stripped, ["සිංහල භාෂාව"]) > 0.5 and lost_marks(encoder, ["සිංහල"]) == 0


@pytest.mark.parametrize(("prompt", "answer", "glued"), [
    ("Text: x\nTopic:", "science/technology", "Topic:science/technology"),
    ("The topic is", "travel", "istravel"),
    ("විෂය", "ක්‍රීඩා", "විෂයක්‍රීඩා"), ("हिंदी", "खेल", "हिंदीखेल"),
    ("Topic: ", "travel", ""), ("Topic:\n", "travel", ""), ("", "travel", ""),
    ("(", "A", ""), ("x =", "-3", ""),
    ("Translation:", "科学", ""), ("หัวข้อ:", "กีฬา", ""),  # scripts without spaces
    ("この文の話題は", "travel", ""), ("주제는", "과학", "주제는과학"),
    ("الموضوع:", "علوم", "الموضوع:علوم"), ("x" * 90, "A", "x" * 40 + "A"),
])
def test_an_answer_glued_to_its_prompt_is_said(tiny, caplog, prompt, answer, glued):
    plain = Tokenizers(None, load_tokenizer(tiny / "decoder", 544, "decoder"))
    check_joints(plain, [("", ""), (prompt, answer)])
    assert bool(caplog.records) == bool(glued)
    assert f"glued to its prompt: '{glued}'" in caplog.text or not glued


def test_offsets_are_of_the_text_as_written(languages, tmp_path):
    """SentencePiece's normalizer changes lengths: ligatures, double spaces, composed vowels."""
    from sentencepiece import SentencePieceTrainer

    SentencePieceTrainer.train(
        sentence_iterator=iter(languages[::2]), vocab_size=5000, model_type="unigram",
        normalization_rule_name="nmt_nfkc", minloglevel=2, model_prefix=str(tmp_path / "spiece"),
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    tokenizer = load_tokenizer(tmp_path, 5100, "encoder")
    for text in ("ﬁne ﬁsh  in  the   river.", "Well… ok… the dog ran", *languages[-20:]):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        known = [(x, place) for x, place in zip(encoded["input_ids"], encoded["offset_mapping"],
                                                strict=True) if x != tokenizer.unk_token_id]
        assert len(known) > 3
        for x, (start, end) in known:
            piece = tokenizer.convert_ids_to_tokens(x).replace("▁", " ").strip()
            read = unicodedata.normalize("NFKC", text[start:end]).strip()
            assert piece in read or read in piece


def test_truncation_keeps_the_prefix(tiny):
    encoder = load_tokenizer(tiny / "encoder", 544, "encoder")
    ours = Tokenizers(encoder, encoder, query_prefix="ba du ")
    prefix = encoder("ba du", add_special_tokens=False)["input_ids"]
    for keeps_end in (False, True):
        (row,), cut = tokenize(
            [Example("ru " * 99 + "fe", "", 0)], ours, text_prompt="", max_encoder_tokens=12,
            max_decoder_tokens=9, with_target=False, keeps_end=keeps_end)
        assert cut.queries == 1 and len(row.query) == 12
        assert row.query[: len(prefix)] == prefix and row.query[-1] == encoder.eos_token_id
