"""A short lint of the English: phrases that have to be read twice, and what to write instead.

`python tests/voice_test.py [PATHS]` lists what it finds, by default in the whole project.
"""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A phrase may go on in the next line of a comment, of a string, or of Markdown.
GAP = r"(?:\s*\n\s*#\s*|\s*\"?\s+(?:f?\")?)"

COUNTED = (
    r"(?:nats|bits|images|digits|samples|tokens|codes|seconds|minutes|hours|FLOPs?|[GTP]FLOPs?"
    r"|captions|parameters|[KMG]i?B|ms|\d s)"
)
PER = (
    r"(?:bit|image|digit|token|dimension|step|core|second|batch|class|code|sample|file|row|line"
    r"|block|layer|prompt|text|device|process|GB|call)"
)
ITEM = (
    r"(?:row|line|prompt|vector|byte|number|sum|token|uniform|letter|key|file|folder|text|label"
    r"|program|process|call|draw)"
)

# Each phrase, as a regular expression in which a space is any GAP, and what to write instead.
PHRASES = [
    (r"\b(?:is|are|in) one sentence\b|\b(?:said in|with) a sentence\b", "prints a one-line error"),
    (r"\b(?:is|are|was|were|be|bottleneck|`) told\b|\btold of it\b", "reports, or distinguish"),
    (r"\bsays? of\b|\bsaid of\b", "name the quantity: implies, depends on, the log-odds of"),
    (r"\bwhat it (?:says|does not say)\b|\b(?:as far as|what) (?:this|that) tells\b", "state it"),
    (r"\bthat (?:are|is|was|were) none\b", "without, or no such ..."),
    (r"\bthat there (?:is|are) not\b", "unknown, or that does not exist"),
    (r"\bthat is no [a-z]+\b", "not a ..., invalid, or NaN or infinite"),
    (r"(?:(?<!here.)\b(?:is|are)|\bit is) no (?:number|config|path|file)\b", "is not a ..."),
    (r"\bwished\b", "wanted, or requested"),
    (r"\bby hand made\b", "made by hand"),
    (r"\bat most so\b", "upper bound"),
    (r"\bso many\b(?! \w+ that)", "give the number a name: N steps"),
    (r"\btakes? for (?:their|its|the) label\b", "classifier accuracy"),
    (r"\b(?:is|are|was|were) worth\b", "improves ... by"),
    (r"\bcounts? as r = g = b\b", "is expanded to RGB"),
    (r"\bone's own\b|\bof one's\b", "your own"),
    (r"\banybody's?\b", "any"),
    (r"\bdearest\b", "most expensive"),
    (r"\bfor the most part\b", "mostly"),
    (r"\bin silence\b", "silently, or without an error"),
    (r"\bto the last bit\b", "bit for bit, or identical"),
    (r"\bhalf as (?:many|much)(?: \w+)? again\b", "50% more"),
    (r"\bbut for rounding\b|\bbut for what\b", "except for"),
    (r"\bis asked (?:for )?by (?:texts?|labels?|class)|\basked by\b", "conditioned on"),
    (r"\bwere? to (?:tell|say)\b|\bdo not tell\b", "show, or compare"),
    (r"\b(?:PSNR|SSIM|r?FID|accuracy|distances?|numbers?) (?:is|are) of\b", "measured on"),
    (r"\bchanges? places\b", "name the order"),
    (r"\bjudges? nothing\b", "is not used"),
    (r"\bneeds? not be there\b", "may be missing"),
    (r"\bknows? no\b", "does not depend on"),
    (r"\bnothing but\b", "only"),
    # Rates
    (rf"\b{COUNTED} an? {PER}\b", "per: nats per bit, 500 images per file"),
    (r"\d%? an? (?:second|image|step|call|core|device)\b(?! at a time)", "per"),
    (rf"\b(?:an?|one) {ITEM} an? {PER}\b", "one ... per ..."),
    # History of the work
    (r"\bversions? before\b|\bbefore this (?:version|change)\b", "leave it out, or name it"),
    (r"\bof before\b|\b(?:of )?today(?:'s)?\b", "leave it out"),
    (r"\bno longer\b|\bused to be\b", "say what it does, not what it did"),
    (r"\b(?:has|have|is|are) [\w.,\s]{0,12}\bnow\b(?! that)", "leave out: now"),
    (r"\breviewers?\b|\breviewed\b", "leave it out"),
    (r"\b(?:busy|quiet)(?: CPU)? cores?\b|\bkept the (?:cores|machine) busy\b", "N CPU cores"),
    (r"\bshared (?:server|machine|AMD|Intel)", "name the CPU alone"),
    (r"\bother work (?:on it|left|kept)\b|\bOther turns\b", "leave it out"),
    (r"\b(?:none|nothing) of (?:this|these|it) has been tried\b", "not tested"),
    (r"\bnot (?:yet )?(?:been )?tried(?: yet)?\b|\bat hand\. ", "not tested, or not measured"),
    (r"\bwe had no\b|\bwe could not download\b|\bcomes? with us\b", "not tested with ..."),
    (r"\bby us yet\b|\btrained by us\b", "not trained"),
]

EVERYWHERE = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "colabs/*.ipynb"]
EVERYWHERE += ["binlatent/**/*.py", "configs/*.py", "launch/*"]


def findings(text):
    """Yields the line, the phrase and what to write instead, of each finding in a text."""
    for pattern, instead in PHRASES:
        for match in re.finditer(pattern.replace(" ", GAP), text, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), instead


def findings_in(path):
    """The findings in a file, each as a line; of a notebook in its sources, by cell."""
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text())["cells"]
        texts = {f"{name}, cell {i}, line ": "".join(x["source"]) for i, x in enumerate(cells)}
    else:
        texts = {f"{name}:": path.read_text()}
    return [
        f"{place}{line}: {phrase!r}: write {instead!r}"
        for place, text in texts.items()
        for line, phrase, instead in sorted(findings(text))
    ]


def files():
    return [path for pattern in EVERYWHERE for path in sorted(ROOT.glob(pattern))]


# Sentences of the kind that the list is for, each with a clearer one.
EXAMPLES = [
    (
        "whether what a bit's own noisy value says of it is known to the loss and the sampler",
        "Adds the known log-odds log(b_t/(1-b_t)) to the network's output, so that the network "
        "models only what the other bits imply.",
    ),
    (
        "samples that a classifier takes for their label: guidance 1, none",
        "Classifier accuracy on samples (guidance 1 / 0)",
    ),
    ("A loss that is no number stops the run", "A NaN or infinite loss stops the run."),
    ("at most so many bits a digit", "upper bound, in bits per digit"),
    (
        "each is exact a bit at a time, and crossing them is not",
        "Each loss has a matching posterior; mixing them is biased.",
    ),
    ("grey counts as r = g = b (and is told)", "Greyscale is expanded to RGB, with a warning."),
    (
        "A config file that is no config is one sentence.",
        "An invalid config file prints a one-line error.",
    ),
    (
        "Refuses metrics that there are not, or not for such a prior",
        "Rejects unknown metrics and those this prior cannot support.",
    ),
    ("what the bottleneck told", "the bottleneck's auxiliary outputs"),
    (
        "It took six and a half minutes on two quiet cores of a shared server, one of them to "
        "install; on busy ones an older version took 20.",
        "6 to 12 minutes on two CPU cores, 1 to 2 of them to install.",
    ),
]


def test_the_examples_are_found_and_their_rewrites_are_not():
    found = [bool(list(findings(before))) for before, _ in EXAMPLES]
    assert sum(found) >= 7, found
    for _, after in EXAMPLES:
        assert not list(findings(after))


@pytest.mark.parametrize(
    "text, line",
    [
        ("x = 1\n# What a bit says\n# of another.", 2),
        ('raise UserError(\n    "The rate is 3 bits "\n    f"a token"\n)', 2),
        ("A rate of 0.3 nats\na bit.\n", 1),
    ],
)
def test_phrases_that_go_on_in_the_next_line_are_found(text, line):
    assert [found[0] for found in findings(text)] == [line]


@pytest.mark.parametrize(
    "text",
    [
        "Each bit of a code is drawn. A bit is flipped with probability 1/2.",
        "It reads images a user gives, and draws samples a classifier judges.",
        "At d = 1 a bit stays with probability a.",
        "There is no file to read. So many images that memory ends.",
        "0.38 nats per bit, 8 images per batch, one row per class",
    ],
)
def test_plain_sentences_pass(text):
    assert not list(findings(text))


@pytest.mark.parametrize("pattern", EVERYWHERE)
def test_no_phrase_is_found(pattern):
    found = [line for path in sorted(ROOT.glob(pattern)) for line in findings_in(path)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    paths = [Path(argument).resolve() for argument in sys.argv[1:]] or files()
    print(*(line for path in paths for line in findings_in(path)), sep="\n")
