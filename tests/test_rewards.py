"""Rewards: jiwer-grade edge cases, and the examples that motivated each rule."""
import jiwer
import pytest

from engine.text import normalize_text
from rewards import (
    asr_accuracy,
    asr_metrics,
    asr_reward,
    change_interval,
    edit_counts,
    hallucination,
    keyword_score,
)

# ---- the normaliser ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, language, expected", [
    ("Hello, World!", "en", "hello world"),
    ("don't  stop\tnow…", "en", "dont stop now"),
    ("Don’t", "en", "dont"),
    ("well-known", "en", "well known"),
    ("ＡＢＣ１２３", "en", "abc 123"),
    ("$1,000.50 and 3.5 %.", "en", "$1000.50 and 3.5%"),
    ("STRASSE Straße", "de", "strasse strasse"),
    ("café naïve", "fr", "café naïve"),
    ("你好，世界！", "zh", "你 好 世 界"),
    ("我用 iPhone 打 3 个电话", "zh-CN", "我 用 iphone 打 3 个 电 话"),
    ("こんにちは、世界。", "ja", "こ ん に ち は 世 界"),
    ("コーヒー", "Japanese", "コ ー ヒ ー"),
    ("ﾊﾟﾝ", "ja", "パ ン"),
    ("안녕하세요 세계", "ko", "안녕하세요 세계"),
    ("Привет, мир", "ru", "привет мир"),
    ("co\u00adoperate \u2764\ufe0f o‘clock", "en", "cooperate oclock"),
    ("2019,2020", "de", "2019 2020"), ("ไทยแลนด์", "th", "ไ ท ย แ ล น ด์"),
    ("", "en", ""), ("?!", "en", ""), (" \n ", "zh", ""),
])
def test_pitfall_16_normaliser(text, language, expected):
    assert normalize_text(text, language) == expected
    assert normalize_text(expected, language) == expected            # done twice it changes nothing


# ---- R1 ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, hypothesis, language, expected", [
    ("a b c d", "a b c d", "en", 1.0),
    ("a b c d", "a x c d", "en", 0.75),
    ("a b c d", "a c d", "en", 0.75),
    ("a b c d", "a b x c d", "en", 0.75),
    ("a b", "x y z a b c d", "en", 0.0),          # WER 2.5: clipped
    ("a b c d", "", "en", 0.0),                   # silence gets the worst score
    ("", "", "en", 1.0),
    ("", "hello", "en", 0.0),
    ("?!", "...", "en", 1.0),
    ("Hello, world", "hello world!", "en", 1.0),
    ("你好世界", "你好世介", "zh", 0.75),           # characters, not one word
    ("你好 世界", "你好世界", "zh", 1.0),
])
def test_pitfall_16_and_9_accuracy(text, hypothesis, language, expected):
    assert asr_accuracy(text, hypothesis, language) == pytest.approx(expected)


def test_accuracy_is_one_minus_jiwer():
    pairs = [("the cat sat on the mat", "the cat sat mat"), ("red green blue", "red grin blue black"), ("x", "x")]
    for text, hypothesis in pairs:
        assert asr_accuracy(text, hypothesis) == pytest.approx(max(0, 1 - jiwer.wer(text, hypothesis)))


def test_edit_counts_by_hand():
    assert edit_counts("a b c d e", "b c x e f") == (1, 1, 1, 5)
    assert edit_counts("", "a b") == (0, 0, 2, 0) and edit_counts("a b", "") == (0, 2, 0, 2)


# ---- R2 ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, hypothesis, language, kind", [
    # nothing was said
    ("", "thank you for watching", "en", "silence"),
    ("", "", "en", ""),
    # a phrase that never stops
    ("call anna on monday", "call anna on monday on monday on monday on monday", "en", "repetition"),
    ("very good", "very very very good", "en", "repetition"),
    ("the library is open", "the library is openononononononon", "en", "repetition"),
    ("你好世界", "你好世界谢谢谢谢谢谢", "zh", "repetition"),
    # genuine repetitions, and one more or less of them, are not
    ("no no no no stop", "no no no no stop", "en", ""),
    ("no no no no stop", "no no no no no stop", "en", ""),
    ("no no no no stop", "no no stop", "en", ""),
    ("went tick tock tick tock tick tock", "went tick tock tick tock tick tock tick tock", "en", ""),
    ("very good", "very very good", "en", ""),
    ("谢谢谢谢谢谢", "谢谢谢谢谢谢", "zh", ""),
    # but twice more than the text has is
    ("no no no no stop", "no no no no no no no no stop", "en", "repetition"),
    # content far beyond the text
    ("turn left", "turn left and then go on to the market", "en", "beyond"),
    ("turn left now", "turn left right now", "en", ""),
    ("turn left", "turn left at the end", "en", ""),            # three words: a plain insertion error
    # translated, or another script
    ("hello world", "你好世界", "en", "language"),
    ("打开空调", "turn on the air conditioner", "zh", "language"),
    ("今天天气很好", "今日はいい天気です", "ja", ""),            # kana and han are one script here: R1 judges that
    ("play a song by 周杰伦", "play a song by 周杰", "en", ""),   # mixed, as the text is
    ("привет мир", "privet mir", "ru", "language"),
    ("25", "twenty five", "en", ""),                            # no letters to tell a script by
    ("人人都来了", "人々都来了", "ja", ""),
    ("我用苹果手机", "我用iPhone手机", "zh", ""),
    ("nah nah nah", "na na na", "en", ""),                      # a genuine repetition, misspelt
    ("哈哈哈", "呵呵呵", "zh", ""),
    ("hmm yes", "hmmmmmmm yes", "en", ""),                      # one letter drawn out
    # wrong words alone are not hallucinations
    ("a b c d", "w x y z", "en", ""),
    ("a b c d", "", "en", ""),
])
def test_hallucination_rules(text, hypothesis, language, kind):
    found = hallucination(text, hypothesis, language)
    assert found.kind == kind and found.found == bool(kind)
    assert found.reward() == (-1.0 if kind else 0.0)
    assert -1 <= found.reward(proportional=True) <= 0 and bool(found.reward(proportional=True)) == bool(kind)


def test_hallucination_span_is_the_surplus():
    found = hallucination("call anna on monday", "call anna on monday on monday on monday on monday")
    assert (found.start, found.end, found.length) == (4, 10, 10)
    assert found.reward(proportional=True) == pytest.approx(-0.6)
    found = hallucination("turn left", "turn left and then go on to the market")
    assert (found.start, found.end) == (2, 9)


def test_hallucination_is_quick_on_a_long_loop():
    assert hallucination("hello there", "na " * 2000).kind == "repetition"
    assert hallucination("hello there", "na" * 2000).kind == "repetition"


# ---- R3 ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, hypothesis, keywords, expected", [
    ("anna met peter", "anna met peter", ["anna", "peter"], 1.0),
    ("anna met peter", "anna met paul", ["anna", "peter"], 0.75),             # precision 1, recall 1/2
    ("anna met peter", "anna met paul", ["anna", "peter", "paul"], 0.5),      # a wrong name costs precision too
    ("anna met peter", "hannah met paul", ["anna", "peter"], 0.0),
    ("anna met peter", "anna anna met peter", ["anna", "peter"], (2 / 3 + 1) / 2),
    ("the dog sat", "the dog sat", ["anna"], 1.0),                            # none said, none claimed
    ("the dog sat", "anna sat", ["anna"], 0.0),
    ("the dog sat", "the cat sat", [], 1.0),
    ("I love New York City", "i love new york city!", ["New York"], 1.0),     # several words, normalised alike
    ("annabel left", "annabel left", ["anna"], 1.0),                          # whole words only
    ("anna anna anna", "anna", ["anna"], (1 + 1 / 3) / 2),
    ("", "", ["anna"], 1.0),
])
def test_keyword_score(text, hypothesis, keywords, expected):
    assert keyword_score(text, hypothesis, keywords) == pytest.approx(expected)


def test_keywords_in_chinese():
    assert keyword_score("我在北京见张伟", "我在北京见张维", ["北京", "张伟"], "zh") == pytest.approx(0.75)


# ---- the mix -----------------------------------------------------------------------------------------------

def test_record_holds_every_part_and_the_total_what_was_asked_for():
    record = asr_reward("anna met peter", "anna met paul", ["anna", "peter"], rewards=("R1", "R3"))
    assert record.accuracy == pytest.approx(2 / 3) and record.keywords == 0.75 and not record.hallucination.found
    assert record.total == pytest.approx(2 / 3 + 0.75)
    silent = asr_reward("", "hello", rewards=("R1", "R2", "R3"))
    assert silent.hallucination.kind == "silence" and silent.total == -1
    assert asr_reward("", "hello", rewards=("R2",), proportional=True).total == -1


def test_wrong_language_overrides_the_total_when_r2_counts():
    for rewards, total in ((("R1", "R2", "R3"), -1.0), (("R1", "R3"), 1.0)):
        assert asr_reward("hello world", "你好世界", rewards=rewards).total == total


def test_unknown_reward_is_named():
    with pytest.raises(ValueError, match="R1, R2, R3"):
        asr_reward("a", "a", rewards=("R4",))


@pytest.mark.parametrize("rewards", [("R1",), ("R2",), ("R3",), ("R1", "R2"), ("R1", "R2", "R3")])
def test_pitfall_8_one_more_error_never_pays(rewards):
    """From the right transcript on, each further error (wrong word, lost word, loop, wrong name) costs or is level."""
    text = "anna will meet peter in paris on monday morning"
    words, keywords = text.split(), ["anna", "peter", "paris", "paul", "rome"]
    chains = [
        [words[:i] + ["zzz"] * (len(words) - i) for i in range(len(words), -1, -1)],          # substitutions
        [words[:i] for i in range(len(words), -1, -1)],                                       # deletions
        [words + ["monday", "morning"] * i for i in range(6)],                                # a loop
        [words + ["so", "we", "then", "went", "home", "again"][:i] for i in range(7)],        # insertions
        [words, ["paul", *words[1:]], ["paul", *words[1:5], "rome", *words[6:]]],             # wrong names
    ]
    for chain in chains:
        totals = [asr_reward(text, " ".join(h), keywords, rewards=rewards).total for h in chain]
        assert all(a >= b - 1e-12 for a, b in zip(totals, totals[1:])), (rewards, totals)
        assert totals[0] == max(totals)


# ---- metrics -----------------------------------------------------------------------------------------------

def test_metrics_of_a_set_by_hand():
    out = asr_metrics(["anna is here", "", "no no no"], ["hannah is here now", "um", "no no"], ["anna", "hannah"])
    assert out["wer"] == pytest.approx(4 / 6) and out["substitutions"] == pytest.approx(1 / 6)
    assert out["insertions"] == pytest.approx(2 / 6) and out["deletions"] == pytest.approx(1 / 6)
    assert out["hallucination_rate"] == pytest.approx(1 / 3) and out["length_ratio"] == pytest.approx(7 / 6)
    assert out["keyword_f1"] == 0 and out["utterances"] == 3


def test_the_interval_of_a_change_in_wer_is_paired_over_the_texts():
    texts = ["a cat sat here", "my dog ran away", "good morning", "the end"]
    wrong, worse, right = ["x cat sat here", "my dog", "morning", ""], ["", "", "", ""], texts
    assert change_interval(texts, wrong, wrong) == [0, 0]
    assert change_interval(texts, right, worse) == [1, 1] and change_interval(texts, worse, right) == [-1, -1]
    low, high = change_interval(texts, wrong, right)                    # by text 1 of 4, 2 of 4, 1 of 2, all of 2
    assert low == pytest.approx(-0.8) and high == pytest.approx(-0.3125)
    assert change_interval(texts * 3, wrong * 3, right * 3) == [low, high]     # three samples of a text are one draw
    assert change_interval(texts, right, wrong) == [-high, -low]
    failed = change_interval(texts * 2, [*wrong, *[None] * 4], right * 2)           # the judge, on the second samples
    assert failed == [low, high]


def test_metrics_where_nothing_was_said():
    out = asr_metrics(["", ""], ["", "hello"])
    assert out["wer"] is None and out["keyword_f1"] is None and out["hallucination_rate"] == 0.5


def test_metrics_refuse_lists_of_different_length():
    with pytest.raises(ValueError):
        asr_metrics(["a"], [])


def test_the_thresholds_of_r2_are_where_they_are_said_to_be():
    """Three times in a row, not two; over 30 % of the tokens in another script; eight characters, not four."""
    kind = lambda *given: hallucination(*given).kind  # noqa: E731
    assert kind("anna met peter", "anna met peter so so") == ""
    assert kind("anna met peter", "anna met peter so so so") == "repetition"
    assert kind("anna met peter today", "anna met петра сегодня") == "language"
    assert kind("anna met peter today", "anna met peter сегодня") == ""
    assert kind("我在北京", "我在北京吃饭看电影", "zh") == ""
    assert kind("我在北京", "我在北京吃饭看电影听音乐", "zh") == "beyond"
