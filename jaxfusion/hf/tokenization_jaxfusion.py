"""The tokenizer of an exported bridge: query ids for the encoder, text of the LLM's answers::

    tokenizer = AutoTokenizer.from_pretrained(DIR, trust_remote_code=True)
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)

Self-contained: needs transformers (4 or 5). Queries and answers have separate id ranges, so that
ids of another tokenizer are detected::

    0 … query_offset - 1               the LLM's ids: answers
    query_offset … prompt_offset - 1   the encoder's ids: queries
    prompt_offset …                    the LLM's ids again: the text prompt of a query
"""

import json
import os
import re
import shutil
from itertools import groupby

from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.utils import PaddingStrategy, cached_file

QUERIES, ANSWERS = "encoder_tokenizer", "decoder_tokenizer"
CONFIG = "tokenizer_config.json"
# Key in a tokenizer's config: the SentencePiece model next to it, which normalizes texts.
NORMALIZER, SPM = "sentencepiece_normalizer", "spiece.model"
SPACE = "▁"
QUERY, PROMPT = "query:", "prompt:"  # prefixes of the names of a query's and a prompt's tokens
IGNORED = -100  # the label of a token that is not predicted
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
SETTINGS = ("query_offset", "prompt_offset", "eos_token_id", "target_eos", "text_prompt",
            "turn")
DEFAULTS = {"query_prefix": "", "languages": None}  # of settings that earlier exports lack
WORDS = "the user's words"


def write_tokenizer(out, tokenizer):
    """Writes a tokenizer so that transformers 4 and 5 read the same `tokenizer.json`.

    Version 5 writes a class that 4 does not know, and extra special tokens as a list under a name
    for which 4 expects a dictionary.
    """
    tokenizer.save_pretrained(out)
    if not os.path.isfile(os.path.join(out, "tokenizer.json")):
        return  # a slow tokenizer has its own class in both

    def change(config):
        for name in ("backend", "is_local", "local_files_only"):  # loading options
            config.pop(name, None)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config["model_input_names"] = ["input_ids", "attention_mask"]  # 4 would add token types
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        return config

    _change_config(out, change)


def _change_config(folder, change):
    file = os.path.join(folder, CONFIG)
    with open(file, encoding="utf-8") as opened:
        config = json.load(opened)
    with open(file, "w", encoding="utf-8") as opened:
        opened.write(json.dumps(change(config), indent=2, ensure_ascii=False) + "\n")


def _read_tokenizer(path, subfolder, hub):
    files = {name: cached_file(path, name, subfolder=subfolder,
                               _raise_exceptions_for_missing_entries=False, **hub)
             for name in ("tokenizer.json", SPM)}
    if files["tokenizer.json"] is None:
        return AutoTokenizer.from_pretrained(path, subfolder=subfolder, **hub)
    if files[SPM] is None:
        return FastTokenizer.from_pretrained(path, subfolder=subfolder, **hub)
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceTokenizer.from_pretrained(path, subfolder=subfolder, **hub)
    tokenizer.spm = SentencePieceProcessor(model_file=files[SPM])
    return tokenizer


class SentencePieceTokenizer(FastTokenizer):
    """A tokenizer whose texts are normalized by SentencePiece before the backend.

    The backend's own normalizer splits a text into graphemes first, and so leaves decomposed
    characters decomposed (github.com/huggingface/tokenizers, issue 2116).
    """

    spm = None  # SentencePieceProcessor of a model whose normalizer is not the identity

    def __call__(self, text, *args, **kwargs):
        """As in transformers, for one text or a list of texts; offsets are of the given texts."""
        one = isinstance(text, str)
        normal = [self._normalize(x) for x in ([text] if one else text)]
        texts = [x for x, _ in normal]
        encoded = super().__call__(texts[0] if one else texts, *args, **kwargs)
        if kwargs.get("return_offsets_mapping"):
            rows = [encoded["offset_mapping"]] if one else encoded["offset_mapping"]
            rows = [[(0, 0) if start == end == 0 else (places[start], places[end])
                     for start, end in row]
                    for row, (_, places) in zip(rows, normal, strict=True)]
            encoded["offset_mapping"] = rows[0] if one else rows
        return encoded

    def save_pretrained(self, save_directory, **kwargs):
        """As in transformers; also writes the SentencePiece model."""
        written = super().save_pretrained(save_directory, **kwargs)
        with open(os.path.join(save_directory, SPM), "wb") as file:
            file.write(self.spm.serialized_model_proto())
        _change_config(save_directory, lambda config: {**config, NORMALIZER: SPM})
        return written

    def _normalize(self, text):
        """The text as the backend reads it, and the place in `text` of each of its characters.

        Added tokens are matched before normalization, and stay as they are.
        """
        added = sorted(self.get_added_vocab(), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, added))})", text) if added else [text]
        whole, places, start = "", [], 0
        for i, part in enumerate(parts):
            if i % 2:
                normal, offsets = part, range(len(part))
            else:
                normal, offsets = self.spm.normalize(part, with_offsets=True)
                # The backend adds the space before the first word.
                offsets = offsets[normal.startswith(SPACE) : len(normal)]
                normal = normal.removeprefix(SPACE).replace(SPACE, " ")
            whole += normal
            places += [start + offset for offset in offsets]
            start += len(part)
        return whole, [*places, start]


class BridgeTokenizer(PreTrainedTokenizerBase):
    """The tokenizers of encoder and LLM as one.

    Attributes:
      queries, answers: the tokenizers of encoder and LLM.

    Args:
      settings: `query_offset` and `prompt_offset`; `eos_token_id`, which ends an answer, and
        `target_eos`, whether training targets end in it;
        `text_prompt`, the text after the prefix, with `{query}` where the query is repeated;
        `turn`: `after` and `lead` of the chat template that the bridge was trained with, or None;
        `query_prefix`, in front of every query; `languages`: the encoder's tokens of languages by
        code, or None if it is told none.
      src_lang: the language of queries, for such an encoder.
    """

    model_input_names = ("input_ids", "attention_mask")
    padding_side = "left"
    is_fast = False

    def __init__(self, queries, answers, settings, src_lang=None, **kwargs):
        self.queries, self.answers = queries, answers
        self.settings, self.src_lang = {**DEFAULTS, **settings}, src_lang
        pad = queries.convert_ids_to_tokens(queries.pad_token_id or 0)
        super().__init__(
            bos_token=answers.bos_token, pad_token=QUERY + pad,
            eos_token=answers.convert_ids_to_tokens(settings["eos_token_id"]), **kwargs)

    @classmethod
    def from_pretrained(cls, path, *inputs, **kwargs):
        """As in transformers; `subfolder` and custom special tokens are rejected."""
        refused = [name for name, x in kwargs.items()
                   if x and (name == "subfolder" or "_token" in name)]
        if inputs or refused:
            raise TypeError(f"BridgeTokenizer takes no {', '.join(refused) or 'more arguments'}: "
                            "its tokens are those of the two models")
        hub = {name: kwargs[name] for name in HUB if kwargs.get(name) is not None}
        with open(cached_file(path, CONFIG, **hub), encoding="utf-8") as file:
            config = json.load(file)
        chosen = ("model_max_length", "padding_side", "truncation_side", "src_lang")
        options = {name: x for name, x in {**config, **kwargs}.items() if name in chosen}
        settings = {name: config[name] for name in SETTINGS}
        settings |= {name: config[name] for name in DEFAULTS if name in config}
        return cls(_read_tokenizer(path, QUERIES, hub), _read_tokenizer(path, ANSWERS, hub),
                   settings, name_or_path=str(path), **options)

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Writes a directory that `AutoTokenizer` reads; returns its files."""
        out = os.fspath(save_directory)
        for name, tokenizer in ((QUERIES, self.queries), (ANSWERS, self.answers)):
            write_tokenizer(os.path.join(out, name), tokenizer)
        config = {
            "tokenizer_class": "BridgeTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_jaxfusion.BridgeTokenizer", None]},
            "padding_side": self.padding_side, "truncation_side": self.truncation_side,
            "model_max_length": self.model_max_length, "src_lang": self.src_lang,
            **self.settings,
        }
        with open(os.path.join(out, CONFIG), "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        code = os.path.join(out, "tokenization_jaxfusion.py")
        if os.path.realpath(code) != os.path.realpath(__file__):
            shutil.copyfile(__file__, code)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(out)), **kwargs)
        return tuple(os.path.join(out, name) for name in (CONFIG, QUERIES, ANSWERS))

    # Text to ids.

    def __call__(self, text=None, text_pair=None, *, text_target=None, add_special_tokens=True,
                 padding=False, truncation=None, max_length=None, pad_to_multiple_of=None,
                 padding_side=None, return_tensors=None, return_attention_mask=True,
                 verbose=True, src_lang=None, **others):
        """Ids of queries, of answers, or of both.

        Args:
          text: one query, or a list: `input_ids` are its ids, and those of the text prompt.
          add_special_tokens: False gives the LLM's ids of `text` (or of `text_target`) as part of
            an answer, for stop strings and forbidden words.
          text_target: answers. With `text` they follow the query, with the end token, and
            `labels` are -100 before them; alone they are `input_ids`.
          src_lang: the language of the queries, or a list; default: the attribute of this name.
          truncation, max_length: of a query, which keeps its end token, and of its prompt, which
            is truncated at its beginning.

        Raises:
          ValueError: a pair, no text, both texts without special tokens, or a language that the
            encoder is not told or does not have.
          TypeError: an unsupported argument.
        """
        if unknown := [name for name, x in others.items() if x]:
            raise TypeError(f"BridgeTokenizer takes no {', '.join(unknown)}")
        if text_pair is not None:
            raise ValueError("a bridge reads one text, got a pair: join the two")
        if text is None and text_target is None:
            raise ValueError("expected text, text_target or both, got none")
        if not add_special_tokens:
            if text is not None and text_target is not None:
                raise ValueError("a query ends in the encoder's end token: leave "
                                 "add_special_tokens=False out")
            text, text_target = None, text if text is not None else text_target
        first = text if text is not None else text_target
        single = isinstance(first, str)
        texts, targets = (self._strings(x, single) for x in (text, text_target))
        strategy, cut, max_length, _ = self._get_padding_truncation_strategies(
            padding=padding, truncation=truncation, max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of, verbose=verbose)
        limit = max_length if cut.value != "do_not_truncate" else None
        rows = [[] for _ in targets] if texts is None else self._asked(texts, limit, src_lang)
        labels = None
        if targets is not None:
            ending = [self.settings["eos_token_id"]] if self.settings["target_eos"] else []
            answers = ([[*ids, *ending] for ids in self._answers(texts, targets)]
                       if add_special_tokens else self._llm(targets))
            labels = [[IGNORED] * len(row) + ids for row, ids in zip(rows, answers, strict=True)]
            rows = [row + ids for row, ids in zip(rows, answers, strict=True)]
        data = self._padded(rows, labels if texts is not None else None, strategy, max_length,
                            pad_to_multiple_of, padding_side or self.padding_side)
        if not return_attention_mask:
            data.pop("attention_mask")
        if single and return_tensors is None:
            data = {name: x[0] for name, x in data.items()}
        return BatchEncoding(data, tensor_type=return_tensors)

    def encode(self, text, text_pair=None, **kwargs):
        """The `input_ids` alone."""
        return self(text, text_pair, **kwargs)["input_ids"]

    def tokenize(self, text, pair=None, **kwargs):
        """The names of the tokens of a query."""
        return self.convert_ids_to_tokens(self.encode(text, pair, **kwargs))

    def apply_chat_template(self, conversation, tokenize=True, return_dict=True, **kwargs):
        """The ids of one user message, in the format that the bridge was trained with.

        Raises:
          ValueError: any other conversation; the encoder reads one text.
        """
        for name in ("add_generation_prompt", "tools", "documents", "continue_final_message"):
            given = kwargs.pop(name, None)
            if given and name != "add_generation_prompt":
                raise ValueError(f"a bridge takes no {name}")
        batched = bool(conversation) and isinstance(conversation[0], (list, tuple))
        chats = conversation if batched else [conversation]
        if any(len(chat) != 1 or chat[0]["role"] != "user" for chat in chats):
            raise ValueError("a bridge reads one text: expected one message of the user, got "
                             + ", ".join(message["role"] for chat in chats for message in chat))
        texts = [chat[0]["content"] for chat in chats]
        content = texts if batched else texts[0]
        if not tokenize:
            return content
        encoded = self(content, **kwargs)
        return encoded if return_dict else encoded["input_ids"]

    def _strings(self, texts, single):
        if texts is None:
            return None
        texts = [texts] if isinstance(texts, str) and single else texts
        if isinstance(texts, str) or not all(isinstance(x, str) for x in texts):
            raise ValueError("expected a text or a list of texts, got something else")
        return list(texts)

    def _read(self, texts, src_lang):
        """The encoder's ids of texts."""
        languages, texts = self.settings["languages"], [
            self.settings["query_prefix"] + text for text in texts]
        if languages is None:
            if src_lang is not None:
                raise ValueError("src_lang is for encoders that are told it (NLLB, M2M100): "
                                 "leave it out")
            return self.queries(texts)["input_ids"] if texts else []
        codes = self.src_lang if src_lang is None else src_lang
        codes = list(codes) if isinstance(codes, (list, tuple)) else [codes] * len(texts)
        if len(codes) != len(texts) or not all(code in languages for code in codes):
            raise ValueError(f"src_lang is {codes!r:.80}, expected the language of every text, of "
                             f"{', '.join(languages)}")
        plain = self.queries(texts, add_special_tokens=False)["input_ids"] if texts else []
        return [[languages[code], *ids, self.queries.eos_token_id]
                for code, ids in zip(codes, plain, strict=True)]

    def _asked(self, texts, limit, src_lang):
        """Ids of every query and its prompt."""
        rows = self._read(texts, src_lang)
        if limit is not None:
            rows = [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in rows]
        prompts = self._prompts(texts) if "{query}" in self.settings["text_prompt"] else None
        if prompts is None:
            prompts = [[] for _ in rows]
        start, prompt = self.settings["query_offset"], self.settings["prompt_offset"]
        return [[start + x for x in row] + [prompt + x for x in (ids if limit is None
                                                                 else ids[-limit:])]
                for row, ids in zip(rows, prompts, strict=True)]

    def _llm(self, texts):
        return self.answers(texts, add_special_tokens=False)["input_ids"] if texts else []

    def _filled(self, texts):
        prompt = self.settings["text_prompt"]
        return [prompt.replace("{query}", text) for text in texts]

    def _context(self, prompt):
        turn = self.settings["turn"]
        return prompt.rstrip() if turn is None else prompt.strip() + turn["after"]

    def _prompts(self, texts):
        """Ids of the LLM's prompts, as in training."""
        prompts = self._filled(texts)
        if self.settings["turn"] is None:
            return self._llm([self._context(prompt) for prompt in prompts])
        # Without a text prompt, the prefix takes the place of the user's words.
        lead = [WORDS if not prompt.strip() else "" for prompt in prompts]
        wholes = [words + self._context(x) for words, x in zip(lead, prompts, strict=True)]
        return self._following(lead, wholes)

    def _answers(self, texts, targets):
        """Ids of answers that continue their prompts.

        Raises:
          ValueError: the prompt includes the query, which is missing; or the numbers differ.
        """
        if texts is None:
            if "{query}" in self.settings["text_prompt"]:
                raise ValueError("the query is part of this bridge's prompt, and an answer "
                                 "continues it: give text with text_target")
            texts = [""] * len(targets)
        if len(texts) != len(targets):
            raise ValueError(f"got {len(texts)} texts and {len(targets)} of text_target")
        prompts, turn = self._filled(texts), self.settings["turn"]
        contexts = [self._context(prompt) for prompt in prompts]
        leads = [turn["lead"] if turn else prompt[len(prompt.rstrip()):] for prompt in prompts]
        wholes = ["".join(x) for x in zip(contexts, leads, targets, strict=True)]
        return self._following(contexts, wholes)

    def _following(self, contexts, wholes):
        """Ids of the continuation of each context in its full text. A token may include a space; if
        one spans the boundary, the continuation is encoded alone."""
        return [whole[len(context):] if whole[: len(context)] == context
                else self._alone(text[len(start):])
                for context, whole, start, text in zip(
                    self._llm(contexts), self._llm(wholes), contexts, wholes, strict=True)]

    def _alone(self, text):
        """Ids of a text inside another one."""
        for before in ("\n", "|", "\u2603"):
            start, whole = self._llm([before, before + text])
            if whole[: len(start)] == start:
                return whole[len(start):]
        raise ValueError(f"the LLM's tokenizer merges {text!r} with any text before it")

    def _padded(self, rows, labels, strategy, max_length, multiple, side):
        data = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
        if strategy != PaddingStrategy.DO_NOT_PAD and rows:
            data = dict(self.pad(data, padding=strategy, max_length=max_length,
                                 pad_to_multiple_of=multiple, padding_side=side))
        if labels is not None:
            width = [len(row) for row in data["input_ids"]]
            fill = [[IGNORED] * (n - len(row)) for n, row in zip(width, labels, strict=True)]
            data["labels"] = [pad + row if side == "left" else row + pad
                              for pad, row in zip(fill, labels, strict=True)]
        return data

    # Ids to text.

    def _decode(self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None,
                **kwargs):
        """The text of ids; with `skip_special_tokens`, of the answer alone."""
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        text = ""
        for kind, run in groupby(ids, self._kind):
            if kind and skip_special_tokens:
                continue
            tokenizer, offset, _ = self._part(kind)
            text += tokenizer.decode(
                [i - offset for i in run], skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs)
        return text

    def _kind(self, token):
        """0 for an answer's token, 1 for a query's, 2 for a prompt's."""
        return (token >= self.settings["query_offset"]) + (token >= self.settings["prompt_offset"])

    def _part(self, kind):
        """The tokenizer of a kind, its first id, and the prefix of its token names."""
        return ((self.answers, 0, ""), (self.queries, self.settings["query_offset"], QUERY),
                (self.answers, self.settings["prompt_offset"], PROMPT))[kind]

    def convert_ids_to_tokens(self, ids, skip_special_tokens=False):
        """Names of tokens; those of queries and prompts begin with `query:` or `prompt:`."""
        if isinstance(ids, int):
            tokenizer, offset, start = self._part(self._kind(ids))
            return start + tokenizer.convert_ids_to_tokens(ids - offset)
        special = set(self.answers.all_special_ids) if skip_special_tokens else ()
        return [self.convert_ids_to_tokens(int(i)) for i in ids
                if not skip_special_tokens or not (self._kind(i) or i in special)]

    def convert_tokens_to_ids(self, tokens):
        """Ids of tokens by name; names without `query:` or `prompt:` are the LLM's."""
        if tokens is None:
            return None
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        for kind in (1, 2):
            tokenizer, offset, start = self._part(kind)
            name = tokens.removeprefix(start)
            if name != tokens and name in tokenizer.get_vocab():
                return offset + tokenizer.convert_tokens_to_ids(name)
        return self.answers.convert_tokens_to_ids(tokens)

    def convert_tokens_to_string(self, tokens):
        """The text of tokens by name."""
        return self.decode(self.convert_tokens_to_ids(tokens))

    def get_vocab(self):
        """Token name -> id."""
        return {start + name: offset + i for tokenizer, offset, start in map(self._part, (2, 1, 0))
                for name, i in tokenizer.get_vocab().items()}

    @property
    def vocab_size(self):
        """The number of ids; those of answers are below the LLM's own vocabulary size."""
        return self.settings["prompt_offset"] + len(self.answers)

    def __len__(self):
        return self.vocab_size

    @property
    def added_tokens_decoder(self):
        """The LLM's added tokens by id."""
        return self.answers.added_tokens_decoder

    def add_tokens(self, new_tokens, special_tokens=False):
        """Raises ValueError: the tables of the two models are fixed."""
        raise ValueError("a bridge's tokens are those of its two models: none can be added")

    def add_special_tokens(self, special_tokens_dict, *args, **kwargs):
        """Raises ValueError, as `add_tokens`."""
        return self.add_tokens(list(special_tokens_dict))

    def num_special_tokens_to_add(self, pair=False):
        """The number of special tokens added to a query."""
        return self.queries.num_special_tokens_to_add(pair)
