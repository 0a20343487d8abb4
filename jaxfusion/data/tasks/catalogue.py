"""The papers' tasks: prompt, labels, languages, and sources."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace

from jaxfusion.data.pocket.lexicon import LANGUAGES as POCKET
from jaxfusion.data.tasks.spec import (
    HUB_SPLITS,
    SAME,
    SPLITS,
    Row,
    Source,
    Task,
    last_number,
    last_unsigned,
)
from jaxfusion.errors import InputError, choose
from jaxfusion.fields import TaskConfig

NLI_PROMPT = "Premise: {premise} Hypothesis: {hypothesis} Label: "
NLI_LABELS = ("Entailment", "Neutral", "Contradiction")
QA_PROMPT = "Text: {text} Question: {question} Answer: "

# MetaMath's prompt (arXiv:2309.12284), as LangBridge's authors use it
# (github.com/kaistAI/LangBridge), and with the words that MetaMath's authors append to score it.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{query}\n\n### Response:"
)
LANGBRIDGE_MATHS = ALPACA_PROMPT + "\n"
STEP_BY_STEP = ALPACA_PROMPT + " Let's think step by step."
# The word before a question in MGSM's few-shot rows; LangBridge's authors put it there, too.
QUESTIONS = {"en": "Question:", "es": "Pregunta:", "fr": "Question :", "de": "Frage:",
             "ru": "Задача:", "zh": "问题:", "ja": "問題:", "th": "โจทย์:", "sw": "Swali:",
             "bn": "প্রশ্ন:", "te": "ప్రశ్న:"}
MGSM_FILES = Source("mgsm_{language}.tsv", splits={"test": "test"}, columns=("query", "target"))
MGSM_HUB = Source("hub:juletxara/mgsm", "{language}", {"train": "train", "test": "test"},
                  rename={"question": "query", "answer_number": "target"})


def _question(row: Row, language: str) -> Row:
    """MGSM's row with its language's word for "question" prepended."""
    word = QUESTIONS[language]
    query = row["query"] if row["query"].startswith(word) else f"{word} {row['query']}"
    return {**row, "query": query}


def _winograd(row: Row, language: str) -> Row:
    """XWinograd's row with a blank in the pronoun's place."""
    tokens, (_, (first, last), _) = json.loads(row["tokens"]), json.loads(row["pronoun"])
    sentence, offset, spans = row["sentence"], 0, []
    for token in tokens[:last]:
        # Quotes and elisions are spelled differently in the tokens and are not found.
        start = sentence.find(token, offset)
        spans.append((start, start + len(token)))
        offset = max(offset, spans[-1][1]) if start >= 0 else offset
    begin, end = spans[first][0], spans[last - 1][1]
    if begin < 0 or end < begin:
        raise ValueError(f"pronoun {tokens[first:last]} is not in the sentence")
    (one, *_, right), (two, *_) = json.loads(row["options"])
    end = begin + len(sentence[begin:end].rstrip(".,"))  # some spans include punctuation
    return {"sentence": f"{sentence[:begin]}_{sentence[end:]}".strip(), "option1": one,
            "option2": two, "label": "1" if right else "2"}


def _mmlu(row: Row, language: str) -> Row:
    """English MMLU in the columns of the translated one."""
    return {"Question": row["question"], **dict(zip("ABCD", row["choices"], strict=True)),
            "label": row["answer"]}


def _translations(row: Row, language: str) -> Row:
    """One language of a row of tensorflow-datasets' XNLI, which has all languages."""
    translations = row["hypothesis"]
    hypotheses = dict(zip(translations["language"], translations["translation"], strict=True))
    return {"premise": row["premise"][language], "hypothesis": hypotheses[language],
            "label": row["label"]}


# The translated MMLU names languages with their country.
MMMLU = {"ar": "AR_XY", "bn": "BN_BD", "de": "DE_DE", "es": "ES_LA", "fr": "FR_FR", "hi": "HI_IN",
         "id": "ID_ID", "it": "IT_IT", "ja": "JA_JP", "ko": "KO_KR", "pt": "PT_BR", "sw": "SW_KE",
         "yo": "YO_NG", "zh": "ZH_CN"}

BELEBELE = tuple("""
    acm_Arab afr_Latn als_Latn amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab
    asm_Beng azj_Latn bam_Latn ben_Beng ben_Latn bod_Tibt bul_Cyrl cat_Latn ceb_Latn ces_Latn
    ckb_Arab dan_Latn deu_Latn ell_Grek eng_Latn est_Latn eus_Latn fin_Latn fra_Latn fuv_Latn
    gaz_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hin_Latn hrv_Latn hun_Latn
    hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kac_Latn kan_Knda
    kat_Geor kaz_Cyrl kea_Latn khk_Cyrl khm_Khmr kin_Latn kir_Cyrl kor_Hang lao_Laoo lin_Latn
    lit_Latn lug_Latn luo_Latn lvs_Latn mal_Mlym mar_Deva mkd_Cyrl mlt_Latn mri_Latn mya_Mymr
    nld_Latn nob_Latn npi_Deva npi_Latn nso_Latn nya_Latn ory_Orya pan_Guru pbt_Arab pes_Arab
    plt_Latn pol_Latn por_Latn ron_Latn rus_Cyrl shn_Mymr sin_Latn sin_Sinh slk_Latn slv_Latn
    sna_Latn snd_Arab som_Latn sot_Latn spa_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn
    tam_Taml tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi tsn_Latn tso_Latn tur_Latn ukr_Cyrl
    urd_Arab urd_Latn uzn_Latn vie_Latn war_Latn wol_Latn xho_Latn yor_Latn zho_Hans zho_Hant
    zsm_Latn zul_Latn
""".split())  # noqa: SIM905

# SIB-200's 205 languages, English first.
SIB_LANGUAGES = tuple("""
    eng_Latn ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn als_Latn
    amh_Ethi apc_Arab arb_Arab arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva
    ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn ban_Latn bel_Cyrl bem_Latn ben_Beng bho_Deva
    bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn cjk_Latn
    ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek epo_Latn
    est_Latn eus_Latn ewe_Latn fao_Latn fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn
    gaz_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva
    hne_Deva hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn
    jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor kaz_Cyrl kbp_Latn
    kea_Latn khk_Cyrl khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kmr_Latn knc_Arab knc_Latn
    kon_Latn kor_Hang lao_Laoo lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn ltg_Latn ltz_Latn
    lua_Latn lug_Latn luo_Latn lus_Latn lvs_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Arab
    min_Latn mkd_Cyrl mlt_Latn mni_Beng mos_Latn mri_Latn mya_Mymr nld_Latn nno_Latn nob_Latn
    npi_Deva nqo_Nkoo nso_Latn nus_Latn nya_Latn oci_Latn ory_Orya pag_Latn pan_Guru pap_Latn
    pbt_Arab pes_Arab plt_Latn pol_Latn por_Latn prs_Arab quy_Latn ron_Latn run_Latn rus_Cyrl
    sag_Latn san_Deva sat_Olck scn_Latn shn_Mymr sin_Sinh slk_Latn slv_Latn smo_Latn sna_Latn
    snd_Arab som_Latn sot_Latn spa_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn
    szl_Latn tam_Taml taq_Latn taq_Tfng tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi
    tpi_Latn tsn_Latn tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl
    umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr yor_Latn
    yue_Hant zho_Hans zho_Hant zsm_Latn zul_Latn
""".split())  # noqa: SIM905

TASKS: dict[str, Task] = {
    "xnli": Task(
        NLI_PROMPT,
        NLI_LABELS,
        (
            "en", "ar", "bg", "de", "el", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi",
            "zh",
        ),
        source=Source("hub:facebook/xnli", "{language}"),
        others=(Source("tfds:xnli", splits={"dev": "validation", "test": "test"},
                       make=_translations),),
        # XNLI's released TSVs have 830 premises of 3 pairs each; splits do not divide a premise.
        files=Source(
            "{split}-{language}.tsv",
            splits={"train": "dev[0:1890]", "dev": "dev[1890:2190]", "test": "dev[2190:2490]"},
            columns=("premise", "hypothesis", "label"),
        ),
        parallel=True,
    ),
    "indicxnli": Task(
        NLI_PROMPT,
        NLI_LABELS,
        ("as", "bn", "gu", "hi", "kn", "ml", "mr", "or", "pa", "ta", "te"),
        source=Source("hub:Divyanshu/indicxnli", "{language}"),
        # A sample of its test rows, all languages in one file.
        files=Source("indicxnli_test_50.tsv", splits={"test": "test"}, rename={"lang": "language"}),
        parallel=True,
    ),
    # The authors' loader also tests on the configuration train_{language}; this one reads
    # test_{language}, so scores do not compare with theirs.
    "sinhala_news": Task(
        "News Sentence: {sentence} Category: ",
        ("Business", "Entertainment", "Political", "Sports", "Science"),
        ("en", "si"),
        source=Source(
            "hub:Themira/en_si_news_classification_with_label_name", "{split}_{language}",
            {"train": "train[500:]", "dev": "train[:500]", "test": "train"},
        ),
    ),
    "amazon_reviews": Task(
        "Review: {text} Label: ",
        ("Very Negative", "Negative", "Neutral", "Positive", "Very Positive"),
        ("en", "es", "fr", "de", "zh", "ja"),
        source=Source("hub:mteb/amazon_reviews_multi", "{language}"),
    ),
    "sib200": Task(
        "{text}",
        ("science/technology", "travel", "politics", "sports", "health", "entertainment",
         "geography"),
        SIB_LANGUAGES,
        source=Source("hub:Davlan/sib200", "{language}", rename={"category": "label"}),
        files=Source("data/annotated/{language}/{split}.tsv", splits=SAME,
                     rename={"category": "label"}, quoted=True),
        parallel=True,
    ),
    # The made-up world in data/pocket/world.py.
    "pocket_translation": Task("{text}", (), tuple(x for x in POCKET if POCKET[x].pairs),
                               translation=True),
    "pocket_nli": Task(NLI_PROMPT, NLI_LABELS, tuple(POCKET), parallel=True),
    "pocket_qa": Task(QA_PROMPT, (), tuple(POCKET), parallel=True),
    # Multiple choice as in Lens: options have letters, and the likelihoods of letters are compared.
    # Many of XCOPA's questions (cause or effect) are wrong in Swahili, Indonesian and others;
    # Estonian has the original ones.
    "xcopa": Task(
        "Premise: {premise}\nWhich is more likely to be its {question}?\nA: {choice1}\n"
        "B: {choice2}\nAnswer: ",
        ("A", "B"),
        ("en", "et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh"),
        source=Source("hub:cambridgeltl/xcopa", "{language}", borrowed={"question": "et"}),
        sources={"en": Source("hub:pkavumba/balanced-copa", None,
                              {"train": "train", "test": "test"})},
        files=Source("data/{language}/{split}.{language}.jsonl",
                     splits={"dev": "val", "test": "test"}, borrowed={"question": "et"}),
        parallel=True,
    ),
    "xstorycloze": Task(
        "Story: {input_sentence_1} {input_sentence_2} {input_sentence_3} {input_sentence_4}\n"
        "Which sentence ends it?\nA: {sentence_quiz1}\nB: {sentence_quiz2}\nAnswer: ",
        ("A", "B"),
        ("en", "ar", "es", "eu", "hi", "id", "my", "ru", "sw", "te", "zh"),
        source=Source("hub:juletxara/xstory_cloze", "{language}",
                      {"train": "train", "dev": "train", "test": "eval"},
                      rename={"answer_right_ending": "label"}),
        spellings=("1", "2"),
        parallel=True,
    ),
    "xwinograd": Task(
        "Sentence: {sentence}\nWhat belongs in the place of _?\nA: {option1}\nB: {option2}\n"
        "Answer: ",
        ("A", "B"),
        ("en", "fr", "ja", "pt", "ru", "zh"),
        source=Source("hub:Muennighoff/xwinograd", "{language}", {"test": "test"},
                      rename={"answer": "label"}, names={"ja": "jp"}),
        # The file of the authors' repository, all languages in one.
        files=Source("dataset.tsv", splits={"test": "test"}, make=_winograd, names={"ja": "jp"},
                     columns=("language", "part", "original", "sentence", "tokens", "pronoun",
                              "options")),
        spellings=("1", "2"),
    ),
    "mmmlu": Task(
        "Question: {Question}\nA: {A}\nB: {B}\nC: {C}\nD: {D}\nAnswer: ",
        ("A", "B", "C", "D"),
        ("en", *MMMLU),
        source=Source("hub:openai/MMMLU", "{language}", {"test": "test"},
                      rename={"Answer": "label"}, names=MMMLU),
        sources={"en": Source("hub:cais/mmlu", "all", make=_mmlu)},
        files=Source("{language}.json", splits={"test": "test"}, rename={"Answer": "label"}),
        parallel=True,
    ),
    # Machine-translated MMLU, first 1,000 rows, as in Lens; `mmmlu` is by human translators.
    "m_mmlu": Task(
        "Question: {instruction}\nA: {option_a}\nB: {option_b}\nC: {option_c}\nD: {option_d}\n"
        "Answer: ",
        ("A", "B", "C", "D"),
        ("en", "ar", "bn", "ca", "da", "de", "es", "eu", "fr", "gu", "hi", "hr", "hu", "hy", "id",
         "is", "it", "kn", "ml", "mr", "nb", "ne", "nl", "pt", "ro", "ru", "sk", "sr", "sv", "ta",
         "te", "uk", "vi", "zh"),
        source=Source("hub:alexandrainst/m_mmlu", "{language}",
                      {"train": "train", "dev": "val", "test": "test[:1000]"},
                      rename={"answer": "label"}),
    ),
    "belebele": Task(
        "Passage: {flores_passage}\nQuestion: {question}\nA: {mc_answer1}\nB: {mc_answer2}\n"
        "C: {mc_answer3}\nD: {mc_answer4}\nAnswer: ",
        ("A", "B", "C", "D"),
        BELEBELE,
        keeps_end=True,
        source=Source("hub:facebook/belebele", "{language}", {"test": "test"},
                      rename={"correct_answer_num": "label"}),
        files=Source("{language}.jsonl", splits={"test": "test"},
                     rename={"correct_answer_num": "label"}),
        spellings=("1", "2", "3", "4"),
    ),
    "mgsm": Task(
        LANGBRIDGE_MATHS,
        (),
        tuple(QUESTIONS),
        source=replace(MGSM_HUB, make=_question),
        files=replace(MGSM_FILES, make=_question),
        extract=last_unsigned,
        parallel=True,
        keeps_end=True,
        max_new_tokens=1024,
        stop={language: (word, "[END]", "</s>", "<|im_end|>")
              for language, word in QUESTIONS.items()},
    ),
    "mgsm_step_by_step": Task(
        STEP_BY_STEP,
        (),
        tuple(QUESTIONS),
        source=MGSM_HUB,
        files=MGSM_FILES,
        extract=last_number,
        parallel=True,
        keeps_end=True,
        max_new_tokens=1024,
    ),
    # LangBridge's labelled corpora: English question and answer, no classes.
    "metamath": Task(
        LANGBRIDGE_MATHS,
        (),
        ("en",),
        source=Source(
            "hub:meta-math/MetaMathQA", None,
            {"train": "train[1000:]", "dev": "train[:500]", "test": "train[500:1000]"},
            rename={"response": "target"},
        ),
        extract=last_unsigned,
        max_new_tokens=512,
    ),
}


def get_task(name: str, own: Mapping[str, TaskConfig] | None = None) -> Task:
    """The task with that name.

    Args:
      own: the config's own tasks, by name.

    Raises:
      InputError: unknown name (the closest match is suggested), or an invalid own task.
    """
    own = own or {}
    if duplicates := sorted(TASKS.keys() & own.keys()):
        raise InputError(f"config.tasks: '{duplicates[0]}' already exists; choose another name")
    choose("task", name, (*TASKS, *own))
    return own_task(name, own[name]) if name in own else TASKS[name]


def own_task(name: str, c: TaskConfig) -> Task:
    """A task that a config declares.

    Raises:
      InputError: a prompt without a column, no languages, or invalid labels or splits.
    """
    where = f"config.tasks.{name}"
    columns = re.findall(r"{(\w+)}", c.prompt)
    try:
        c.prompt.format(**dict.fromkeys(columns, ""))
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise InputError(f"{where}.prompt is not a valid template ({error!r}): write {{NAME}} for "
                         "a column, and double other braces") from None
    if not columns:
        raise InputError(f"{where}.prompt is {c.prompt!r}, expected a text with a column such as "
                         "{text}")
    if not c.languages:
        raise InputError(f"{where}.languages is empty, expected at least one")
    if len({label.casefold() for label in c.labels}) < len(c.labels):
        raise InputError(f"{where}.labels contains duplicates: {', '.join(c.labels)}")
    if c.spellings and len(c.spellings) != len(c.labels):
        raise InputError(f"{where}.spellings has {len(c.spellings)} entries, expected one for each "
                         f"of the {len(c.labels)} labels")
    if c.unlabelled and c.labels:
        raise InputError(f"{where} is unlabelled, but has labels")
    if c.answers:
        _check_answers(where, c)
    source = _own_source(c, c.source)
    for split in c.splits:
        choose(f"split in {where}.splits:", split, SPLITS)
        if source is not None:
            source.rows(split)
    # Without a source of its own, what data.path names has the task's columns and splits, too.
    others = () if c.source else tuple(_own_source(c, place) for place in ("", "hub:", "tfds:"))
    return Task(c.prompt, c.labels, c.languages, source, others=others,
                spellings=c.spellings, unlabelled=c.unlabelled, translation=c.answers is not None,
                parallel=c.parallel, extract=c.extract and EXTRACTS[
                    choose(f"{where}.extract", c.extract, EXTRACTS)])


def _check_answers(where: str, c: TaskConfig) -> None:
    """Raises InputError if a task's answers cannot be the lines of text files."""
    if c.labels or c.unlabelled or c.columns or re.findall(r"{(\w+)}", c.prompt) != ["text"]:
        raise InputError(f"{where}.answers is for parallel text: leave labels, unlabelled and "
                         "columns out, and let {text} be the prompt's only column")
    if c.source is None or Source(c.source).kind != "files":
        raise InputError(f"{where}.answers needs {where}.source, the text files whose lines they "
                         "answer")


EXTRACTS = {"last_number": last_number, "last_unsigned": last_unsigned}


def _own_source(c: TaskConfig, place: str | None) -> Source | None:
    if place is None:
        return None
    source = Source(place, c.subset, revision=c.revision, names=c.names, answers=c.answers,
                    rename={theirs: ours for ours, theirs in c.columns.items()})
    return replace(source, splits=c.splits or (SAME if source.kind == "files" else HUB_SPLITS))


def check_languages(
    name: str, languages: tuple[str, ...], own: Mapping[str, TaskConfig] | None = None
) -> None:
    """Raises InputError if the task lacks one of the languages."""
    known = get_task(name, own).languages
    for language in languages:
        if language not in known:
            raise InputError(
                f"task '{name}' has no language '{language}'; it has {', '.join(known)}"
            )
