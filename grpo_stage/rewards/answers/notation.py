r"""One notation for mathematics: `plain` writes Unicode, Markdown and the many spellings of LaTeX in the same way."""

import re
import unicodedata


# Rewritten before Unicode's compatibility forms (NFKC), which would make 102 of 10², and 31/2 of 3½.
_SYMBOLS = {
    "\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{FIGURE DASH}": "-", "\N{NON-BREAKING HYPHEN}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ", "\N{MIDDLE DOT}": r"\cdot ", "\N{DOT OPERATOR}": r"\cdot ",
    "\N{DIVISION SIGN}": r"\div ", "\N{FRACTION SLASH}": "/", "\N{DIVISION SLASH}": "/", "\N{ASTERISK OPERATOR}": "*",
    "\N{PLUS-MINUS SIGN}": r"\pm ", "\N{INFINITY}": r"\infty ", "\N{EMPTY SET}": r"\emptyset ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ", "\N{GREATER-THAN OR EQUAL TO}": r"\ge ", "\N{NOT EQUAL TO}": r"\ne ",
    "\N{LESS-THAN OR SLANTED EQUAL TO}": r"\le ", "\N{GREATER-THAN OR SLANTED EQUAL TO}": r"\ge ",
    "\N{ALMOST EQUAL TO}": r"\approx ", "\N{UNION}": r"\cup ", "\N{INTERSECTION}": r"\cap ",
    "\N{ELEMENT OF}": r"\in ", "\N{DEGREE SIGN}": r"^\circ ", "\N{RIGHTWARDS ARROW}": " = ",
    "\N{RIGHTWARDS DOUBLE ARROW}": " = ", "\N{RATIO}": ":",
    "\N{GREEK SMALL LETTER PI}": r"\pi ", "\N{GREEK SMALL LETTER ALPHA}": r"\alpha ",
    "\N{GREEK SMALL LETTER BETA}": r"\beta ", "\N{GREEK SMALL LETTER THETA}": r"\theta ",
    "\N{GREEK SMALL LETTER LAMDA}": r"\lambda ",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_SUBSCRIPT = re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_VULGAR_FRACTION = re.compile("[¼-¾⅐-⅞↉]")
_OTHER_DIGIT = re.compile(r"[^\x00-\x7f]")

_FONT = r"\\(?:text(?!dollar|euro|style)\w*|math(?!bb)\w+|mbox|hbox|operatorname\*?|boldsymbol|bm|emph|underline)"
_UPRIGHT = re.compile(r"(\\(?:mathrm|text|rm)\s*\{)((?:[^{}]|\{-?\d\})*)\}")
_POWER = re.compile(r"\^\s*(?:\{-?\d\}|-?\d)")

# Patterns and their replacements, applied in this order.
_REWRITES = [
    # calculators of GSM8K, Markdown
    (r"<<[^<>\n]*>>", ""),
    (r"```\w*", ""),
    (r"(?<=[\d)])\*\*(?=[\d({-])", "^"),
    (r"\*\*|__|`", ""),
    (r"(?<![\w)])([*_])(?=\S)([^*_\n]+)(?<=\S)\1(?!\w)", r"\2"),
    (r"</?answer>|\\boxed\s*\{\s*\}", " "),
    # delimiters of formulas, currencies
    (r"\\[()\[\]]", ""),
    (r"\b(?:US|CA|AU|HK|NT)?(?:\\?\$)", ""),
    (r"\\?\$|\\(?:pounds|euro|yen|textdollar|texteuro)(?![A-Za-z])|[£€¥₹₩₽¢]", ""),
    (r"\b(?:USD|EUR|GBP|INR|RMB|CNY|JPY|Rs\.?)\s*(?=[\d.])", ""),
    # degrees, spaces, sizes, fonts
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))\s*(?:[CF](?![A-Za-z]))?|\\degree(?![A-Za-z])", " "),
    (r"\\frac\s*\{\s*\\(?:text|mathrm)\{([^{}]*)\}\s*\}\s*\{\s*\\(?:text|mathrm)\{([^{}]*)\}\s*\}", r" \1/\2"),
    (r"(?<!\\)\\!\s*", ""),
    (r"\{,\}", ","),
    (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\(?:hspace|hphantom|phantom|vspace)\*?\{[^{}]*\}", " "),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
    (r"\\(?:displaystyle|textstyle|limits|rm|bf|it|bfseries)(?![A-Za-z])", ""),
    (r"\\(?:tiny|small|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])", ""),
    *[(rf"{_FONT}\s*\{{([^{{}}]*)\}}", r"\1")] * 3,
    (rf"{_FONT}(?=\s*\{{)", ""),
    (r"\\mathbb\s*\{([A-Z])\}", r"\1"),
    # synonyms
    (r"\\[dtc]frac", r"\\frac"),
    (r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(?:\{([^{}]*)\}|(\d|[a-zA-Z]))\s*(?:\{([^{}]*)\}|(\d|[a-zA-Z]))", r"\\frac{\1\2}{\3\4}"),
    (r"(?:(?<![A-Za-z\\])sqrt|√|\\sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?:√|\\sqrt|(?<![A-Za-z\\])sqrt)\s*(\d+|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}"),
    (r"∛\s*\(?(\d+|[a-zA-Z])\)?", r"\\sqrt[3]{\1}"),
    (r"√", r"\\sqrt "),
    (r"(?<![A-Za-z\\])(pi|ln|log|sin|cos|tan|cot|sec|arctan|arcsin|arccos)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![A-Za-z\\])(?:infinity|infty)(?![A-Za-z])", r"\\infty "),
    (r"\\leq?(?:slant)?(?![A-Za-z])|<=", r"\\le "),
    (r"\\geq?(?:slant)?(?![A-Za-z])|(?<!=)>=", r"\\ge "),
    (r"\\neq?(?![A-Za-z])|!=", r"\\ne "),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"=>|->|\\(?:Rightarrow|implies|rightarrow|to|Longrightarrow)(?![A-Za-z])", " = "),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\colon(?![A-Za-z])", ":"),
    (r"\\([%#&_])", r"\1"),
    (r"_\{(\w)\}", r"_\1"),
    (r"[^\S\n]+", " "),
]  # fmt: skip
_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITES]


def plain(text: str) -> str:
    r"""`text` in one notation: ASCII digits and signs, LaTeX without delimiters, fonts, currencies and degrees.

    `\$2{,}000^\circ`, `½`, `10³`, `\dfrac12` become `2,000`, `\frac{1}{2}`, `10^{3}`, `\frac{1}{2}`.
    What has no other spelling stays as it is, line breaks too.
    """
    text = _SYMBOL.sub(lambda found: _SYMBOLS[found[0]], text)
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{found[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _SUBSCRIPT.sub(lambda found: f"_{unicodedata.normalize('NFKC', found[0])}", text)
    text = _VULGAR_FRACTION.sub(_vulgar_fraction, text)
    text = unicodedata.normalize("NFKC", text)
    text = _OTHER_DIGIT.sub(lambda found: str(unicodedata.decimal(found[0], found[0])), text)
    text = _UPRIGHT.sub(lambda found: f"{found[1]}{_POWER.sub('', found[2])}}}", text)  # units: `m s^{-1}`
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text.strip()


def _vulgar_fraction(found: re.Match[str]) -> str:
    numerator, _, denominator = unicodedata.normalize("NFKC", found[0]).partition("\N{FRACTION SLASH}")
    return rf"\frac{{{numerator}}}{{{denominator}}}"
