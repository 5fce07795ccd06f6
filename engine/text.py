"""Text as it is compared: one normaliser for rewards and evaluation, so that what is trained is what is measured.

    language_code(name)             "zh" for zh-CN, zho, Chinese, mandarin, 中文
    normalize_text(text, language)  the tokens that WER counts, joined by single spaces
"""
import functools
import re
import unicodedata

import pycountry
from transformers.models.whisper.english_normalizer import EnglishNumberNormalizer
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

# Languages written without spaces between words: their unit of error is the character.
NO_SPACES = {"zh", "yue", "wuu", "nan", "hak", "gan", "hsn", "ja", "th", "lo", "km", "my", "bo", "dz"}
# Own names that processors take (Fun-ASR-Nano) or people write, and codes that ISO has twice.
OWN_NAMES = {"中文": "zh", "汉语": "zh", "漢語": "zh", "普通话": "zh", "國語": "zh", "国语": "zh", "cmn": "zh",
             "mandarin chinese": "zh", "粤语": "yue", "粵語": "yue", "英文": "en", "英语": "en", "英語": "en",
             "日文": "ja", "日语": "ja", "日本語": "ja", "ไทย": "th", "한국어": "ko", "deutsch": "de", "français": "fr",
             "español": "es", "italiano": "it", "português": "pt", "русский": "ru", "türkçe": "tr", "iw": "he"}
SYMBOLS = {"&": "and", "+": "plus", "=": "equals", "@": "at", "°": "degrees"}


@functools.cache
def language_code(name):
    """The code of a language by any of its names, of regions without it: "zh" for zh-CN, zho, Chinese, mandarin, 中文.

    The names are Whisper's, ISO 639's (pycountry) and `OWN_NAMES`. Raises ValueError for any other: a language taken
    for another would be counted in the wrong units.
    """
    whole = " ".join(re.sub(r"\(.*?\)", "", name.casefold()).split())
    for key in (whole, re.split("[-_]", whole)[0]):
        if code := OWN_NAMES.get(key) or TO_LANGUAGE_CODE.get(key) or key * (key in TO_LANGUAGE_CODE.values()):
            return code
        if key and (found := pycountry.languages.get(alpha_2=key) or pycountry.languages.get(alpha_3=key)
                    or pycountry.languages.get(bibliographic=key) or pycountry.languages.get(name=key.title())):
            return getattr(found, "alpha_2", found.alpha_3)
    raise ValueError(f"{name!r} is no language that is known here; give its code, en or zh, or its English name")


def by_character(language):
    """Whether errors in `language` ("en", "zh-CN", "Japanese", ...) are counted by character."""
    return language_code(language) in NO_SPACES


def fold(text, code):
    """`text` without case, by the rules of its language: Turkish and Azerbaijani have an i with and one without dot."""
    if code in ("tr", "az"):
        text = text.replace("İ", "i").replace("I", "ı")
    return text.casefold().replace("i\u0307", "i")


@functools.lru_cache(maxsize=2 ** 16)
def normalize_text(text, language="en"):
    """The tokens that WER counts, joined by single spaces [choice].

    Full-width forms become plain ones (NFKC), case and punctuation go, apostrophes inside words too ("don't" ->
    "dont"), a number keeps its decimal point. In languages without spaces every character is a token, except that
    Latin words and numbers stay whole ("我用 iPhone" -> "我 用 iphone"). In English "fifty dollars" and "$50", "five
    percent" and "5 %", "&" and "and" are the same, by Whisper's rules: a number said in several words is one token.
    Raises ValueError for an unknown language.
    """
    code = language_code(language)
    text = fold(unicodedata.normalize("NFKC", text), code)
    text = re.sub(r"(?<=\w)['’‘ʼʻ`](?=\w)", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if code == "en":
        text = re.sub(r"(?<=\d)\s+(?=%)|(?<=[$€£])\s+(?=\d)|(?<=\d):(?=\d\d(?!\d))", "", text)     # 5 %, $ 5, 3:30
        text = re.sub(r"(\d+)\s*¢", r"¢\1", re.sub(r"(?<!\S)[-−](?=[$€£]?\d)", "minus ", text))
        text = re.sub("[&+=@°]", lambda found: f" {SYMBOLS[found[0]]} ", text)
    split, after_character, kept = code in NO_SPACES, False, []
    for i, c in enumerate(text):
        kind = unicodedata.category(c)
        before, after = text[i - 1:i].isdigit(), text[i + 1:i + 2].isdigit()
        unit = code == "en" and (c in "$€£¢" and after or c == "%" and before)
        if kind == "Cf" or "\ufe00" <= c <= "\ufe0f" or "\U000e0100" <= c <= "\U000e01ef":
            continue                                    # invisible: joiners, soft hyphens, variation selectors
        if kind[0] == "M":
            kept.append(c)                              # a mark belongs to the character before it
        elif kind[0] in "LN" or unit or c == "." and before and after:
            alone = split and c > "\u024f"              # beyond Latin: a token of its own
            kept.append(f" {c}" if alone or after_character else c)
            after_character = alone
        else:
            kept.append(" ")
            after_character = False
    words = " ".join("".join(kept).split())
    return numbers_in_digits(words) if code == "en" else words


@functools.cache
def number_rules():
    """Whisper's rules for English numbers, except that "plus five" stays two words."""
    rules = EnglishNumberNormalizer()
    rules.words -= rules.preceding_prefixers.keys()
    return rules


def numbers_in_digits(words):
    """"fifty turns" -> "50 turns", "twenty twenty four" and "20 24" -> "2024", "five percent" -> "5%"; a lone "one" or
    "1" is "one"."""
    try:
        words = re.sub(r"(?<!\S)one(?!\S)", "1", number_rules()(words))
    except (ValueError, TypeError, IndexError):         # thousands of digits in a row: a sample that loops
        return words
    words = re.sub(r"(?<!\S)\d+(?: \d+)+(?!\S)", lambda found: found[0].replace(" ", ""), " ".join(words.split()))
    return re.sub(r"(?<!\S)1(?!\S)", "one", words)
