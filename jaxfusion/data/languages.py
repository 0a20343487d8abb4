"""The languages that an encoder is told: texts of NLLB and M2M100 begin with a token of theirs.

NLLB names languages as FLORES-200 does (`sin_Sinh`), M2M100 by ISO 639 (`__si__`), tasks by either.
"""

import re

from jaxfusion.errors import InputError, near_match

# ISO 639-1 (639-3 where there is none) -> FLORES-200 (arXiv:2207.04672, table 1), with the script
# that is written most. NLLB itself calls Santali sat_Beng.
FLORES = dict(pair.split(":") for pair in """
    af:afr_Latn ak:aka_Latn am:amh_Ethi ar:arb_Arab as:asm_Beng ast:ast_Latn ay:ayr_Latn
    az:azj_Latn ba:bak_Cyrl be:bel_Cyrl bg:bul_Cyrl bm:bam_Latn bn:ben_Beng bo:bod_Tibt
    bs:bos_Latn ca:cat_Latn ceb:ceb_Latn cs:ces_Latn cy:cym_Latn da:dan_Latn de:deu_Latn
    dz:dzo_Tibt ee:ewe_Latn el:ell_Grek en:eng_Latn eo:epo_Latn es:spa_Latn et:est_Latn
    eu:eus_Latn fa:pes_Arab ff:fuv_Latn fi:fin_Latn fj:fij_Latn fo:fao_Latn fr:fra_Latn
    ga:gle_Latn gd:gla_Latn gl:glg_Latn gn:grn_Latn gu:guj_Gujr ha:hau_Latn he:heb_Hebr
    hi:hin_Deva hr:hrv_Latn ht:hat_Latn hu:hun_Latn hy:hye_Armn id:ind_Latn ig:ibo_Latn
    ilo:ilo_Latn is:isl_Latn it:ita_Latn ja:jpn_Jpan jv:jav_Latn ka:kat_Geor kg:kon_Latn
    ki:kik_Latn kk:kaz_Cyrl km:khm_Khmr kn:kan_Knda ko:kor_Hang ku:kmr_Latn ky:kir_Cyrl
    lb:ltz_Latn lg:lug_Latn li:lim_Latn ln:lin_Latn lo:lao_Laoo lt:lit_Latn luo:luo_Latn
    lv:lvs_Latn mg:plt_Latn mi:mri_Latn mk:mkd_Cyrl ml:mal_Mlym mn:khk_Cyrl mr:mar_Deva
    ms:zsm_Latn mt:mlt_Latn my:mya_Mymr ne:npi_Deva nl:nld_Latn nn:nno_Latn nb:nob_Latn
    no:nob_Latn ns:nso_Latn ny:nya_Latn oc:oci_Latn om:gaz_Latn or:ory_Orya pa:pan_Guru
    pl:pol_Latn ps:pbt_Arab pt:por_Latn qu:quy_Latn rn:run_Latn ro:ron_Latn ru:rus_Cyrl
    rw:kin_Latn sat_Olck:sat_Beng sa:san_Deva sc:srd_Latn sd:snd_Arab sg:sag_Latn si:sin_Sinh
    sk:slk_Latn sl:slv_Latn sm:smo_Latn sn:sna_Latn so:som_Latn sq:als_Latn sr:srp_Cyrl
    ss:ssw_Latn st:sot_Latn su:sun_Latn sv:swe_Latn sw:swh_Latn ta:tam_Taml te:tel_Telu
    tg:tgk_Cyrl th:tha_Thai ti:tir_Ethi tk:tuk_Latn tl:tgl_Latn tn:tsn_Latn tr:tur_Latn
    ts:tso_Latn tt:tat_Cyrl tw:twi_Latn ug:uig_Arab uk:ukr_Cyrl ur:urd_Arab uz:uzn_Latn
    vi:vie_Latn wo:wol_Latn xh:xho_Latn yi:ydd_Hebr yo:yor_Latn zh:zho_Hans zu:zul_Latn
""".split())  # noqa: SIM905
# Every code -> all codes of the same language.
CODES = {code: names for flores in set(FLORES.values())
         for names in [(flores, *(iso for iso, x in FLORES.items() if x == flores))]
         for code in names}
TOKEN = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}|__[a-z]{2,3}__")
FLORES_CODE = re.compile(r"([a-z]{3})_[A-Z][a-z]{3}")
# ISO 639-1 of languages that FLORES-200 lacks.
OTHERS = frozenset("""
    aa ab ae an av bi br ce ch co cr cu cv dv fy gv ho hz ia ie ii ik io iu kj kl kr ks kv kw la lu
    mh na nd ng nr nv oj os pi rm se to ty ve vo wa za
""".split())  # noqa: SIM905
# ISO 639-3, and each language's shortest code in ISO 639; `ns` is M2M100's own name for nso.
SHORT = {flores[:3]: iso for iso, flores in reversed(FLORES.items()) if iso.isalpha()} | {
    "nso": "nso", "sat": "sat"}


def iso_of(language: str) -> str | None:
    """A language's code in ISO 639-1, or in 639-3 where that has none.

    Args:
      language: FLORES-200's code, or one of ISO 639. None is returned for any other name.
    """
    known = SHORT.values()
    if language in known or language in OTHERS:
        return language
    flores = FLORES_CODE.fullmatch(FLORES.get(language, language))
    three = flores[1] if flores else language
    return SHORT.get(three, three if flores else None)


def language_tokens(tokenizer) -> dict[str, int]:
    """A tokenizer's tokens of languages, by name without underscores around it: `sin_Sinh`, `si`.

    Raises:
      InputError: it has none.
    """
    names = {*tokenizer.get_vocab(), *getattr(tokenizer, "lang_token_to_id", {})}
    tokens = {name.strip("_"): tokenizer.convert_tokens_to_ids(name)
              for name in sorted(names) if TOKEN.fullmatch(name)}
    if not tokens:
        raise InputError("the encoder's texts begin with the token of their language, but its "
                         "tokenizer has no such tokens; put the model's own tokenizer.json next "
                         "to it")
    return tokens


def by_every_code(tokens: dict[str, int]) -> dict[str, int]:
    """The tokens of languages by FLORES-200's codes and by ISO 639's."""
    return {code: i for name, i in tokens.items() for code in CODES.get(name, (name,))} | tokens


def token_of(language: str, tokens: dict[str, int]) -> int:
    """The id of a language's token.

    Args:
      language: a task's code: FLORES-200's, or ISO 639's.

    Raises:
      InputError: the encoder has no token for it; the message names those that it has.
    """
    if not language:
        raise InputError("the encoder's texts begin with the token of their language, which is "
                         f"missing; give one of {', '.join(tokens)} (--language, language=)")
    for code in (language, *CODES.get(language, ())):
        if code in tokens:
            return tokens[code]
    raise InputError(f"the encoder has no token for language '{language:.80}'"
                     f"{near_match(language, tokens)}; it has: {', '.join(tokens)}")
