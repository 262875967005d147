"""The commands and the Python of the documents, at tiny size, and their links.

Commands are those in ```bash blocks of the pages, and those in the heads of configs/*.py and
launch/*.sh. What is run, and what is only checked:

| command | |
|---|---|
| `binlatent.main`: sample, reconstruct, inpaint, vary | run, with two images, on a workdir of untrained tiny networks, of the config with which the page trains it |
| `binlatent.main`: evaluate | the metrics are checked; those that need no feature network are run |
| `binlatent.main`: what trains or encodes | flags, config and networks are checked: a run takes over ten seconds; tests/train_test.py trains |
| `binlatent.paper` | run until it opens the workdir; tests/paper/ makes the figures and tables |
| `binlatent.evaluation`, `benchmark` | flags, config and metrics are checked: they need published weights, or measure for minutes |
| `binlatent.convert` | flags are checked; tests/convert/documented_test.py runs each |
| scripts | they exist, `bash -n` reads them, and what they pass on to `binlatent.main` is checked |
| other programs, such as pip | `bash -n`, and extras of `pip install` exist |
| Python | run, in a page from top to bottom; without published weights the imports alone |
"""  # noqa: E501

import ast
import collections
import functools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import encoders
import jax
import numpy as np
import pytest
from conftest import TINY, call_main, parse_main, write_checkpoints
from PIL import Image

from binlatent import main
from binlatent.benchmark import workloads
from binlatent.convert import __main__ as convert
from binlatent.convert import texts
from binlatent.evaluation import __main__ as evaluation
from binlatent.evaluation import comparison, quality
from binlatent.experiment import resolve
from binlatent.paper import __main__ as paper
from binlatent.paper import ablations
from binlatent.priors.kinds import KINDS
from binlatent.runtime import command, weights

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SHELL = {"cd", "curl", "docker", "git", "ls", "mkdir", "npm", "pip", "python3", "ruff", "source"}
SHELL |= {"export", "gcloud", "hf", "jupyter", "nvidia-smi", "tar", "tensorboard", "unzip", "wget"}

# Modes that make a workdir, or read images alone.
TRAINING = ("all", "train_autoencoder", "train_prior", "encode", "table4")
# Tiny sizes; T is the paper's, so that any number of steps of the documents is allowed.
SIZES = TINY | {"prior.bernoulli.num_timesteps": 64}
TINY_FLAGS = [f"--config.{key}={value}" for key, value in SIZES.items()]
# The metrics of images and codes, without a feature network and without training.
MEASURED = {"psnr", "ssim", "codes", "bound", "prior"}


class Command(NamedTuple):
    """A command of a page: its line, the words, and variables set before it."""

    page: str
    line: int
    words: tuple[str, ...]
    names: tuple[str, ...] = ()

    @property
    def module(self):
        """`main` of `python -m binlatent.main` and `binlatent`; None of other programs."""
        if self.words[0] == "binlatent":
            return "main"
        found = re.fullmatch(r"python3? -m binlatent\.?(\S*)", " ".join(self.words[:3]))
        return (found[1] or "main") if found else None

    @property
    def flags(self):
        """What comes after the program, with values in place of `...`, HOST and PORT."""
        given = self.words[1:] if self.words[0] == "binlatent" else self.words[3:]
        return [y for x in given for y in with_values(x)]

    @property
    def workdir(self):
        found = [x.partition("=")[2] for x in self.flags if x.startswith("--workdir=")]
        return found[-1] if found else None

    @property
    def mode(self):
        return next((x[7:] for x in self.flags if x.startswith("--mode=")), "all")

    @property
    def reads(self):
        """Whether it needs a workdir that is there."""
        return self.mode not in TRAINING or "workdir" in " ".join(self.config)

    @property
    def trains(self):
        return self.module == "main" and self.mode in TRAINING[:3] and not self.reads

    @property
    def config(self):
        return [x for x in self.flags if x.startswith("--config")]


def with_values(word):
    if word in ("...", "[FLAGS]"):
        return ["--config=digits", "--workdir=runs/any"]
    word = word.replace("HOST:PORT", "localhost:1234")
    return [word.replace("--config=...", "--config=digits").replace("=...", "=runs/any")]


def blocks(path, language):
    """Yields the line and text of each block of a language in a page."""
    text = path.read_text()
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        if match[2] == language:
            lines = [line.removeprefix(match[1]) for line in match[3].splitlines(True)]
            yield text.count("\n", 0, match.start(3)) + 1, "".join(lines)


HERE = re.compile(r"<<-?\s*'?(\w+)'?\n.*?^\1$", re.MULTILINE | re.DOTALL)


def commands_in(page, first, text):
    """Yields the commands of a script, without the lines of here-documents."""
    text = HERE.sub(lambda x: "\n" * x[0].count("\n"), text)
    lines, number = text.replace("\\\n", "\\\0").split("\n"), first
    for line in lines:
        lexer = shlex.shlex(line.replace("\\\0", " "), posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split = True
        words = [[]]
        for word in lexer:
            if set(word) <= set("&|;"):
                words.append([])
            elif set(word) <= set("<>"):
                break
            else:
                words[-1].append(word)
        for part in filter(None, words):
            names = [x for x in part if re.match(r"[A-Z_]+=", x)]
            names = names if part[: len(names)] == names else []
            if len(part) > len(names):
                yield Command(page, number, tuple(part[len(names) :]), tuple(names))
        number += 1 + line.count("\0")


def all_commands():
    for path in PAGES:
        for line, text in blocks(path, "bash"):
            yield from commands_in(str(path.relative_to(ROOT)), line, text)
        text = path.read_text()
        for match in re.finditer(r"(?<!`)`((?:python -m )?binlatent[^`]* --[^`]*)`", text):
            line = text.count("\n", 0, match.start()) + 1
            yield from commands_in(str(path.relative_to(ROOT)), line, " ".join(match[1].split()))
    starts = r"(?:[A-Z]+=\S+ )*(?:python -m |bash launch/|sbatch |binlatent )"
    for path in sorted((ROOT / "configs").glob("*.py")) + sorted((ROOT / "launch").glob("*.sh")):
        text = path.read_text()
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text), clean=False) or ""
        else:  # the comment at the head
            text = re.match(r"(?:#.*\n)*", text)[0].replace("\n# ", "\n")
        for match in re.finditer(rf"^ *({starts}(?:.*\\\n)*.*)$", text, re.MULTILINE):
            line = text.count("\n", 0, match.start(1)) + 1
            yield from commands_in(str(path.relative_to(ROOT)), line, match[1] + "\n")


COMMANDS = list(all_commands())


def of_module(*names):
    """Parametrises a test by the commands of modules."""
    found = [x for x in COMMANDS if x.module in names]
    return pytest.mark.parametrize("command", found, ids=[f"{x.page}:{x.line}" for x in found])


def test_commands_are_found():
    count = collections.Counter(x.module for x in COMMANDS)
    assert count["main"] >= 30 and count["convert"] >= 8
    text = "A=1 B=2 run a 'b c' \\\n  d && binlatent --x > file  # why\npython - <<'E'\nx\nE\nls\n"
    assert list(commands_in("page", 5, text)) == [
        Command("page", 5, ("run", "a", "b c", "d"), ("A=1", "B=2")),
        Command("page", 5, ("binlatent", "--x")),
        Command("page", 7, ("python", "-")),
        Command("page", 10, ("ls",)),
    ]


def test_every_command_is_of_a_known_program():
    assert {x.module for x in COMMANDS} - {None} <= {
        *("main", "paper", "paper.ablations", "convert", "evaluation", "benchmark")
    }
    for x in COMMANDS:
        if x.module is None and x.words[0] not in SHELL:
            assert x.words[0] in ("bash", "python", "sbatch"), x
            scripts = [word for word in x.words[1:] if "/" in word and not word.startswith("-")]
            scripts = [word for word in scripts if not word.startswith("$")]
            assert x.words[1] in ("-", "-m", "-c") or scripts, x
            assert all((ROOT / word).is_file() for word in scripts[:1]), x


def test_bash_reads_the_blocks_and_the_scripts():
    texts_of = [text for path in PAGES for _, text in blocks(path, "bash")]
    texts_of += [path.read_text() for path in sorted((ROOT / "launch").glob("*.sh"))]
    for text in texts_of:
        text = re.sub(r"<this repository>|<[A-Z_]+>", "x", text)
        result = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert not result.stderr, text


def test_extras_that_pip_installs_exist():
    setup = (ROOT / "setup.py").read_text()
    for path in PAGES:
        for extras in re.findall(r"(?:\.|binlatent)\[([\w,]+)\]", path.read_text()):
            for extra in extras.split(","):
                assert re.search(rf'"{extra}": ', setup), (path.name, extra)


# Folders in which the commands of a page are run


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """A small text encoder's file."""
    folder = tmp_path_factory.mktemp("encoder")
    weights.write_npz(folder / "minilm.npz", texts.minilm(encoders.write_bert(folder / "bert")))
    return folder / "minilm.npz"


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_encoder, digits_dir):
    """Makes a page's folder, once: configs, images, a text encoder, modules that the page shows."""

    @functools.cache
    def make(page):
        folder = tmp_path_factory.mktemp(Path(page).stem)
        for name in ("configs", "launch"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copy(text_encoder, folder)
        text = (ROOT / page).read_text()
        for _, code in blocks(ROOT / page, "python") if page.endswith(".md") else []:
            if name := re.match(r"# (\w+\.py)\b", code):
                (folder / name[1]).write_text(code)
        pixels = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
        for name in {"seven.png", *re.findall(r"[\w/]+\.(?:png|jpg)\b", text)}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
        images = folder / "path/to/images"
        images.mkdir(parents=True, exist_ok=True)
        for name in "ab":
            Image.fromarray(pixels).resize((64, 64)).save(images / f"{name}.png")
        return folder

    return make


@pytest.fixture(scope="module")
def untrained(digits_dir, text_encoder):
    """Writes a workdir of untrained tiny networks, by the command that trains it."""
    copies = {}

    def write(path, flags):
        flags = [x for x in flags if x.startswith("--config")] or ["--config=digits"]
        parse_main(*flags, *TINY_FLAGS, "--workdir=x")
        experiment = resolve(command.given_config())
        if experiment.data.image_size > 64:  # compiles for too long
            return write(path, [])
        experiment = experiment.change({"data.num_classes": 10})
        if experiment.data.name == "digits":
            experiment = experiment.change({"data.path": digits_dir})
        if experiment.prior.conditioning.of_texts:
            experiment = experiment.change({"texts.weights": str(text_encoder)})
            experiment = experiment.with_texts(encoders.BERT["width"], weights.sha256(text_encoder))
        key = repr(experiment.without_paths)
        if key in copies:
            shutil.copytree(copies[key], path)
        else:
            write_checkpoints(path, experiment)
            copies[key] = path

    return write


@pytest.fixture
def site(made, untrained, monkeypatch):
    """Enters a page's folder, in which a workdir is as the page's own commands train it."""

    def enter(page, *workdirs):
        monkeypatch.chdir(made(page))
        for workdir in workdirs:
            if not Path(workdir).exists():
                on_it = [x for x in COMMANDS if x.workdir == workdir]
                trains = [x for x in on_it if x.page == page and x.trains]
                if not trains and any("--prompt" in flag for x in on_it for flag in x.flags):
                    trains = [Command(page, 0, ("binlatent", "--config=emoji64"))]
                trains += [x for x in on_it if x.trains]
                untrained(Path(workdir).absolute(), trains[0].flags if trains else [])

    kinds = dict(KINDS)
    yield enter
    KINDS.clear()
    KINDS.update(kinds)


def workdirs_of(flags):
    """The workdirs that flags name, also by --config=workdir:DIR."""
    text = " ".join(flags)
    return re.findall(r"(?:--workdir=|workdir(?:\.py)?:)(\S+)", text)


# The commands


@of_module("main")
def test_the_main_command(command, site, digits_dir):
    flags = command.flags
    site(command.page, *(workdirs_of(flags) if command.reads else []))
    assert len(parse_main(*flags)) == 1
    given = main.command.given_config()
    given = given and resolve(given)
    if command.mode in TRAINING:
        main._Run(Path(main.FLAGS.workdir), given)
        prior = given.with_classes(10).prior
        if given.data.image_size <= 64 and not prior.conditioning.of_texts:
            jax.eval_shape(prior.init, jax.random.key(0))
        return
    if command.mode == "evaluate":
        metrics = main.FLAGS.metrics
        given = given or main._Run(Path(main.FLAGS.workdir), None).pipeline.experiment
        if metrics is not None and "retrieval" not in metrics:
            quality.check(given, metrics, main.FLAGS.num or 100)
        if not MEASURED & set(metrics or []):
            return
        flags = [y for y in flags if not y.startswith("--metrics=")]
        flags += [f"--metrics={','.join(sorted(MEASURED & set(metrics)))}"]
    if given and "workdir" not in " ".join(command.config):
        flags = [*flags, *TINY_FLAGS, f"--config.data.path={digits_dir}"]
    few = [] if command.mode == "reconstruct" else ["--num=2"]
    assert call_main(*flags, *few) == 0, flags


@of_module("paper")
def test_figures_and_tables(command, site, capsys):
    site(command.page)
    if command.flags[0] == "schedules":
        return paper.main([*command.flags, "--out=schedules.png"])
    flags = [x.replace("--workdir=", "--workdir=none/") for x in command.flags]
    with pytest.raises(SystemExit) as end:
        paper.main(flags)
    assert end.value.code == 1 and "There is no workdir none/" in capsys.readouterr().err


@of_module("paper.ablations", "evaluation", "convert")
def test_commands_of_argparse(command, monkeypatch):
    functions = {"paper.ablations": ablations.main, "evaluation": evaluation.main}
    function = functions.get(command.module, convert.main)
    parse, parsed = evaluation.argparse.ArgumentParser.parse_args, []

    def only_parse(self, arguments):
        parsed.append(parse(self, arguments))
        sys.exit(0)

    monkeypatch.setattr(evaluation.argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(SystemExit) as end:
        function(command.flags)
    assert end.value.code == 0
    if command.module == "evaluation":
        comparison.check_metrics(parsed[0].metrics.split(","), evaluation._METRICS)


@of_module("benchmark")
def test_benchmarks(command, site):
    site(command.page)
    source = (ROOT / "binlatent/benchmark/__main__.py").read_text()
    own = re.findall(r"(?:DEFINE_\w+|define_path)\(\s*\"(\w+)\"", source)
    name, *flags = command.flags
    of_config = [x for x in flags if x.startswith("--config")]
    assert {x[2:].partition("=")[0] for x in flags if x not in of_config} <= {*own}
    assert name in ("memory", "data", "paper", *workloads.PROGRAMS)
    assert bool(of_config) != (name == "paper")
    if of_config:
        parse_main(*of_config, "--workdir=x")
        workloads.check_measurable(name, resolve(main.command.given_config()))


SCRIPTS = [x for x in COMMANDS if "launch/" in " ".join(x.words) and x.words[0] != "python"]
PASSED_ON = [x for x in SCRIPTS if any(y.startswith("--config=") for y in x.words)]


@pytest.mark.parametrize("command", PASSED_ON, ids=[f"{x.page}:{x.line}" for x in PASSED_ON])
def test_what_scripts_pass_on_is_flags_of_the_main_command(command, site):
    (at,) = (i for i, x in enumerate(command.words) if x.startswith("launch/"))
    script = (ROOT / command.words[at]).read_text()
    assert re.search(r"binlatent\.main .*(\$@|\$\(printf)", script)
    for name in command.names:
        assert re.search(rf"\b{name.partition('=')[0]}\b", script)
    more = [y for x in command.words[at + 1 :] for y in with_values(x)]
    site(command.page)
    assert len(parse_main(*more)) == 1
    resolve(main.command.given_config())


# Python

PYTHON = {path: list(blocks(path, "python")) for path in PAGES}
NEEDS_WEIGHTS = r"inception\.npz|efficientnet\.npz|vgg16\.npz|clip\.npz"


@pytest.mark.parametrize("path", [p for p in PAGES if PYTHON[p]], ids=lambda path: path.name)
def test_python(path, site):
    names = {}
    for line, code in PYTHON[path]:
        if name := re.match(r"# (\w+\.py)\b", code):  # a file that commands read
            site(str(path.relative_to(ROOT)))
            assert callable(runpy.run_path(name[1])["get_config"])
            continue
        if re.search(NEEDS_WEIGHTS, code):
            tree = ast.parse(code)
            tree.body = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
            code = ast.unparse(tree)
        code = re.sub(r"\bprepare_jax\(\)", "prepare_jax", code)
        site(str(path.relative_to(ROOT)), *re.findall(r"\"(runs/\w+)\"", code))
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)


# Links


def anchors(path):
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    found, count = set(), collections.Counter()
    for heading in re.findall(r"^#+ +(.*?) *$", text, re.MULTILINE):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{count[slug]}" if count[slug] else slug)
        count[slug] += 1
    return found | set(re.findall(r"<a (?:name|id)=\"([^\"]+)\"", text))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(\s*([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        to = Path(os.path.normpath(path.parent / name)) if name else path
        assert to.exists(), target
        if anchor and to.suffix == ".md":
            assert anchor in anchors(to), target


FOLDERS = "docs|tests|configs|launch|binlatent|colabs"
FILE = rf"(?<![\w/.:~-])((?:{FOLDERS})/[\w/]+\.(?:md|py|sh|ipynb))\b"


def test_files_that_are_named_exist():
    sources = [*PAGES, *ROOT.glob("binlatent/**/*.py"), *ROOT.glob("configs/*.py")]
    sources += [*ROOT.glob("launch/*"), *ROOT.glob("colabs/*.ipynb")]
    lost = []
    for path in sources:
        for match in re.finditer(FILE, path.read_text()):
            if match[1] != "configs/X.py" and not (ROOT / match[1]).exists():
                lost.append(f"{path.relative_to(ROOT)}: {match[1]}")
    assert not lost
