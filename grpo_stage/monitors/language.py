"""Completions in another language than their prompt, as far as scripts tell, such as Chinese in an English answer."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from grpo_stage.monitors.alarm import Alarm, History, Watch
from grpo_stage.monitors.monitor import Monitor, MonitorRequest
from grpo_stage.monitors.remedies import lower_rate, stronger_anchor
from grpo_stage.monitors.statistics import current, last_step, level_at_start, share
from grpo_stage.records.metrics import MetricTracker
from grpo_stage.types import ScoredGroup


MIXED = "completions/mixed_language_frac"
LATIN = "LATIN"
FOREIGN_FRAC = 0.05
"""Share of the words in scripts that neither prompt nor reference has, above which a completion is mixed."""
FOREIGN_LATIN_FRAC = 0.4
"""The same where the script is Latin: terms, names and abbreviations are written in it in every language."""
LEAST_WORDS = 2
"""Of a foreign script: one alone may be a name or a symbol."""

# What is no language: code, mathematics, addresses, markup.
_LEFT_OUT = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+|https?://\S+|</?\w+>",
    re.DOTALL,
)
# Scripts of one writing system are one: Japanese mixes three. Greek is the alphabet of mathematics as well.
_SYSTEMS = {
    "CJK": "HAN", "IDEOGRAPHIC": "HAN", "HIRAGANA": "KANA", "KATAKANA": "KANA", "HANGUL": "HANGUL",
    "FULLWIDTH": LATIN, "HALFWIDTH": "KANA",
}  # fmt: skip
_IGNORED = frozenset({"GREEK", "MATHEMATICAL", "DOUBLE-STRUCK", "SCRIPT", "BLACK-LETTER", "MODIFIER", "MICRO", "OHM"})
_CHARACTERS_A_WORD = {"HAN": 2, "KANA": 2, "HANGUL": 2, "THAI": 4, "LAO": 4, "KHMER": 4, "MYANMAR": 4}
_RUN_OF_LETTERS = re.compile(r"[^\W\d_]+")
_SHORTEST_LATIN_WORD = 4
"""Shorter ones are variables, units and abbreviations."""


@lru_cache(maxsize=65_536)
def script_of(character: str) -> str | None:
    """The writing system of a letter; None for what belongs to no language alone."""
    name = unicodedata.name(character, "").partition(" ")[0]
    return None if not name or name in _IGNORED else _SYSTEMS.get(name, name)


def words_by_script(text: str) -> Counter[str]:
    """About how many words of each script `text` has, code and mathematics left out.

    A run of letters of one script is a word; scripts written without spaces have two characters a word (Thai and its
    neighbors four). Latin words of fewer than four letters are left out.
    """
    characters: Counter[str] = Counter()
    words: Counter[str] = Counter()
    for run in _RUN_OF_LETTERS.findall(_LEFT_OUT.sub(" ", text)):
        start, last = 0, None
        for i, script in enumerate([*map(script_of, run), None]):
            if script == last:
                continue
            if last in _CHARACTERS_A_WORD:
                characters[last] += i - start
            elif last is not None and (last != LATIN or i - start >= _SHORTEST_LATIN_WORD):
                words[last] += 1
            start, last = i, script
    for script, count in characters.items():
        words[script] += -(-count // _CHARACTERS_A_WORD[script])
    return words


def is_mixed(completion: str, *contexts: str) -> bool:
    """Whether a completion has words in a script that none of `contexts` (prompt, reference) has.

    A Japanese or Korean context allows Han as well. A completion wholly in another script is mixed, too.
    """
    if completion.isascii() and any(context.isascii() for context in contexts if context):
        return False  # the common case, at no cost
    own = {script for context in contexts for script in words_by_script(context)}
    if own & {"KANA", "HANGUL"}:
        own.add("HAN")
    if not own:
        return False
    words = words_by_script(completion)
    foreign = {script: count for script, count in words.items() if script not in own}
    latin, others = foreign.pop(LATIN, 0), sum(foreign.values())
    return (others >= LEAST_WORDS and others > FOREIGN_FRAC * words.total()) or (
        latin >= LEAST_WORDS and latin > FOREIGN_LATIN_FRAC * words.total()
    )


class LanguageMixing(Monitor):
    """Measures the share of completions with words in a script that neither their prompt nor their reference has."""

    @classmethod
    def of(cls, request: MonitorRequest) -> "LanguageMixing":
        return cls()

    def after_scoring(self, groups: Sequence[ScoredGroup], version: int, metrics: MetricTracker) -> None:
        for scored in groups:
            prompt = scored.group.prompt
            contexts = (*(message["content"] for message in prompt.messages), prompt.reference or "")
            for completion in scored.group.completions:
                written = "\n".join(turn.text for turn in completion.turns if turn.is_sampled) or completion.text
                results = [turn.text for turn in completion.turns if not turn.is_sampled]  # what it may quote
                metrics.add(MIXED, float(is_mixed(written, *contexts, *results)))


class MixedLanguages(Watch):
    """More completions than at the start are written in a script that is not their prompt's.

    The present level of `mixed_language_frac` is above `MIXED_FRAC` and by `RISE` above that at the start: prompts
    that ask for a translation are mixed from the start. Scripts cannot tell languages that share one: German in an
    English answer, Ukrainian in a Russian one, Chinese in a Japanese one.
    """

    MIXED_FRAC = 0.1
    RISE = 0.08
    """Names and quotations are in few completions, and were at the start."""
    LINES = 10

    def judge(self, history: History) -> Alarm | None:
        mixed, start = current(history, MIXED, self.LINES), level_at_start(history, MIXED)
        if start is None or len(mixed) < self.LINES:
            return None
        now = share(mixed.values)
        if now < self.MIXED_FRAC or now < start + self.RISE:
            return None
        return Alarm(
            monitor="language_mixing",
            step=history.step,
            onset=last_step(history.series(MIXED).last(200), lambda value: value <= start + self.RISE / 2),
            seen=(
                f"{now:.0%} of the completions have words in a script that neither their prompt nor their reference "
                f"has; at the start it was {start:.0%}."
            ),
            meaning=(
                "The model changes the language within an answer. The reward does not mind, and so nothing pulls it "
                "back; people who read the answers do. DeepSeek-R1-Zero did so."
            ),
            remedy=(
                "Pay for the prompt's language: a reward function of a few lines that counts words of other scripts "
                "(DeepSeek-R1 added one), or a KL to the reference (`beta`), which keeps the language of the model "
                "that the run began with."
            ),
            settings=stronger_anchor(self.settings) or lower_rate(self.settings),
        )
