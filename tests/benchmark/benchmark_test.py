"""Memory and speed of compiled programs, against numbers that can be counted."""

import functools
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from binlatent.benchmark import __main__ as benchmark
from binlatent.benchmark import flops, loading, memory, paper_sizes, rows, speed, workloads
from binlatent.data import splits
from binlatent.data.sources import Source
from binlatent.experiment import resolve
from binlatent.runtime import machine
from binlatent.runtime.errors import UserError


@pytest.fixture
def tiny(tiny_config):
    """The tiny config as an experiment, with the classes of the digits."""
    return resolve(tiny_config).change({"data.num_classes": 10})


def size(tree):
    return sum(np.prod(leaf.shape, dtype=int) * 4 for leaf in jax.tree.leaves(tree))


def test_arguments_are_the_state_and_the_images(tiny):
    spec, device = tiny.autoencoder, jax.devices()[0]
    row = memory.train_step_memory(spec, 8, device)
    state = jax.eval_shape(functools.partial(spec.init_state, 0))
    # A key is two words, and counts as one leaf.
    expected = size(state) + 4 + 8 * 28 * 28 * 4
    assert abs(row["arguments"] - expected) < 64
    assert row["total"] == row["arguments"] + row["temporary"]
    twice = memory.train_step_memory(spec, 16, device)
    assert row["temporary"] < twice["temporary"] < 3 * row["temporary"]
    assert 1.8 < twice["flops"] / row["flops"] < 2.1
    spec = tiny.change({"autoencoder.train.accumulate": 2}).autoencoder
    parts = memory.train_step_memory(spec, 16, device)  # half the memory, the same work
    assert parts["temporary"] < twice["temporary"]
    assert 0.9 < parts["flops"] / twice["flops"] < 1.2


def test_decoding_counts_its_multiplications(tiny):
    row = memory.decode_memory(tiny.autoencoder, 4, jax.devices()[0])
    # On the 4x4 grid: 8 bits to 16, five 3x3 convolutions (some taps lie outside), attention.
    tokens, width = 4 * 16, 32
    convolutions = 9 * (16 * width + 4 * width**2 + width * 49)
    attention = 4 * width**2 + 2 * 16 * width
    expected = 2 * tokens * (8 * 16 + convolutions + attention)
    assert 0.5 < row["flops"] / expected < 1.5
    with pytest.raises(UserError, match="Cannot compile for 'x9:7x7'"):
        memory.device_to_compile_for("x9:7x7")


def test_the_command_prints_a_table():
    command = [sys.executable, "-m", "binlatent.benchmark", "memory"]
    flags = ["--config=digits", "--config.autoencoder.base_width=32", "--batch_size=2"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    where, _, _, _, *lines = result.stdout.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:4]] for line in lines]
    assert cells == [["train", "28", "2"], ["decode", "28", "2"]]
    assert where.startswith("1 x cpu (") and where.endswith(f", JAX {jax.__version__}")
    flags = [flags[0], "--config.autoencoder.train.accumulate=0"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "autoencoder.train.accumulate must be at least 1" in result.stderr
    for flags, message in (([], "Give a config"), (["--config=no.py"], "no config file no.py")):
        result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
        assert result.returncode == 1 and message in result.stderr


def test_data_speed_is_that_of_the_examples(tiny, monkeypatch):
    class Slow:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            time.sleep(0.01)
            return {"image": np.zeros((28, 28, 1), np.uint8), "label": 0}

    monkeypatch.setattr(splits, "open_split", lambda data, split, keep: Source(Slow()))
    monkeypatch.setattr(machine, "cores", lambda: 8)
    row = loading.measure_loading(tiny.data, tiny.seed, 5, seconds=2.0)
    least, median, most = (row[f"images_per_second{end}"] for end in ("_min", "", "_max"))
    assert 300 < median <= 1.1 * 800 and least < median < most
    numbers = f"{median:.0f} ({least:.0f} to {most:.0f})"
    assert rows.table_line(loading.COLUMNS, row) == f"| digits | 28 | 5 | {numbers} |"
    head = rows.table_head(loading.COLUMNS, row).splitlines()
    assert head[0] == f"1 x cpu ({machine.processor()}, 8 cores), JAX {jax.__version__}"
    assert head[2:] == ["| data | image | batch | images/s (least to most) |", "|---|---|---|---|"]


@pytest.mark.slow
def test_every_program_is_measured(tiny):
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    named = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    processor = named.group(1).strip() if named else platform.machine()
    for name in workloads.PROGRAMS:
        row = speed.measure_speed(name, tiny, 2, repeats=2, peak=1e12)
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        # Two images on each of four devices.
        assert row["images_per_second"] == pytest.approx(8 / row["seconds"])
        assert row["mfu"] == pytest.approx(row["flops"] / row["seconds"] / 1e12)
        assert row["memory_bytes"] > 0 and row["memory_from"] == "compiler"
        assert row["compile_seconds"] > 0 and row["devices"] == 4
        assert row["device"] == f"cpu ({processor}, {machine.cores()} cores)"
        # XLA also counts Adam, norms and activations, which are many at these widths.
        assert 0.2 < row["flops"] / row["xla_flops"] <= 1, name
        assert (row["steps"], row["guidance"]) == ((4, 1.0) if name == "sample" else (None, None))


def test_the_weights_that_are_drawn_make_finite_steps(tiny):
    for name in ("train_autoencoder", "train_prior"):
        metrics = workloads.PROGRAMS[name](tiny, 8, 2).call()
        assert all(np.all(np.isfinite(value)) for value in metrics.values()), name


def test_programs_that_xla_does_not_count_have_no_flops():
    class Uncounted:
        def cost_analysis(self):  # as in JAX 0.11, where it is compiled for GPUs only
            return None

        memory_analysis = cost_analysis

    counted = workloads.compile_program(jax.jit(jnp.dot), jnp.ones((3, 4)), jnp.ones((4, 5)))
    uncounted = workloads.Program(Uncounted(), 0.0)
    assert workloads.counted_flops((7, counted), (1, counted)) == 8 * 2 * 3 * 4 * 5
    assert workloads.counted_flops((7, counted), (1, uncounted)) is None
    assert uncounted.memory is None and counted.memory == 4 * (3 * 4 + 4 * 5 + 3 * 5)
    row = {"what": "decode", "image_size": 8, "batch_size": 1, "dtype": "float32", "remat": False}
    row |= {"arguments": 2**30, "temporary": 0, "total": 2**30, "flops": None}
    assert rows.table_line(memory.COLUMNS, row).endswith("| no | 1 GiB | 0 GiB | 1 GiB | - |")


def test_each_batch_size_and_number_of_steps_is_a_row(tiny, monkeypatch):
    def measure(name, experiment, batch_size, repeats):
        return name, batch_size, experiment.sample.settings.steps, repeats

    monkeypatch.setattr(speed, "measure_speed", measure)
    measured = list(benchmark.measure_speeds("sample", tiny, [1, 2], [3, 5], repeats=7))
    assert measured == [("sample", n, steps, 7) for n in (1, 2) for steps in (3, 5)]
    title = speed.caption("sample", tiny, 2)
    assert title.startswith("sample of ") and title.endswith(" at batch size 2, 4 steps")
    assert speed.caption("decode", tiny, 2).endswith(" at batch size 2")
    measured = list(benchmark.measure_speeds("sample", tiny, [1, 2], [], repeats=7))
    assert measured == [("sample", n, 4, 7) for n in (1, 2)]
    measured = benchmark.measure_speeds("sample", tiny, [1], [3, 999], repeats=7)
    with pytest.raises(UserError, match="steps"):  # before the first row
        next(measured)


@pytest.mark.parametrize("name", ["train_prior", "sample", "network"])
def test_a_prior_is_asked_for_its_classes_before_it_is_measured(tiny_config, caplog, name):
    caplog.set_level(logging.INFO, "binlatent")
    with pytest.raises(UserError, match="such as --config.data.num_classes=10"):
        next(benchmark.measure_speeds(name, resolve(tiny_config), [1], []))
    assert not caplog.messages


def test_sampling_is_two_programs_that_nothing_compiles_again(tiny, caplog):
    work = workloads.sample_work(tiny, 8, 2)
    sampler, decoder = work.programs
    # All steps are guided: the loop, which XLA counts once, times the number of steps.
    assert work.xla_flops == 4 * sampler.flops + decoder.flops
    work.call()
    jax.config.update("jax_log_compiles", True)
    with caplog.at_level(logging.WARNING):
        images = work.call()
    jax.config.update("jax_log_compiles", False)
    assert images.shape == (8, 28, 28, 1) and np.ptp(images) > 0
    assert "Compiling" not in caplog.text
    # If some steps take one pass and some two, XLA's count cannot be used.
    some = tiny.change({"sample.guidance_interval": (0.0, 0.5)})
    assert workloads.sample_work(some, 8, 2).xla_flops is None


def test_the_median_of_calls_that_take_what_they_take():
    calls = []

    def call():
        calls.append(0.2 if len(calls) in (0, 3) else 0.045)
        time.sleep(calls[-1])

    times = speed.seconds_a_call(call, repeats=3)
    # The first calls are warm-up; two calls fit into a tenth of a second, also at 0.066 s.
    assert len(calls) == 2 + 2 * 3
    assert np.allclose(times, [0.1225, 0.045, 0.045], atol=0.03)


def test_peaks_and_the_table():
    assert speed.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert speed.peak_flops("NVIDIA H100 80GB HBM3", "float32") == 494.7e12
    jax.config.update("jax_default_matmul_precision", "highest")
    assert speed.peak_flops("NVIDIA H100 80GB HBM3", "float32") == 66.9e12
    jax.config.update("jax_default_matmul_precision", None)
    assert speed.peak_flops("cpu", "float32") is None
    row = {"program": "sample", "size": "24x512, 256 tokens", "batch_size": 4, "steps": 16}
    row |= {"guidance": 0.0, "dtype": "bfloat16", "repeats": 10, "memory_bytes": 2**30 / 2000}
    row |= {"seconds": 0.02, "seconds_min": 0.01, "seconds_max": 12.3, "images_per_second": 200.0}
    row |= {"flops": 10**12, "xla_flops": None, "flops_per_second": 5e13, "mfu": 0.05}
    row |= {"compile_seconds": 3.21, "device": "NVIDIA H200", "devices": 1, "jax": "0.10.2"}
    where, _, *head = rows.table_head(speed.COLUMNS, row | {"driver": "570.86"}).splitlines()
    assert where == "1 x NVIDIA H200, JAX 0.10.2, driver 570.86"
    line = rows.table_line(speed.COLUMNS, row)
    assert len({x.count("|") for x in (*head, line)}) == 1
    assert line == (
        "| sample | 24x512, 256 tokens | 4 | 16 | 0 | bfloat16 | 20 (10 to 12,300) | 200 | 1 | - "
        "| 50 | 5.0% | 0.0005 GiB | 3.2 s |"
    )
    untold = rows.table_line(speed.COLUMNS, row | {"memory_bytes": None})
    assert untold == line.replace("0.0005 GiB", "-")


def test_the_papers_rows_are_its_sizes_and_cost_what_a_closed_form_says():
    subjects = paper_sizes.paper_subjects()
    priors = {workloads.describe_size("network", subject.experiment) for subject in subjects}
    sizes = ["24x512, 256 tokens", "24x512, 1024 tokens"]
    assert priors == {*sizes, *(size.replace("512", "768") for size in sizes)}
    assert {subject.name for subject in subjects} == set(workloads.PROGRAMS)
    keys = [json.dumps(speed.subject(*subject)) for subject in subjects]
    assert len(set(keys)) == len(subjects)
    for subject in subjects:
        if subject.name == "network":
            # 12 l d^2 + 2 l^2 d multiplications per layer, for l tokens including time and class.
            prior = subject.experiment.prior.prior
            network = prior.network
            d, layers = network.width, network.num_layers
            classes = network.condition == "class"
            tokens = int(np.prod(prior.code_shape[:2])) + 1 + classes
            expected = 2 * layers * (12 * tokens * d**2 + 2 * tokens**2 * d)
            counted = flops.count_transformer(network, prior.code_shape, classes)
            assert counted == pytest.approx(expected, rel=0.02)


def test_a_row_that_fails_costs_no_other(tiny, monkeypatch, caplog):
    def measure(name, experiment, batch_size, repeats):
        if batch_size == 2:
            raise RuntimeError("cuDNN is not detected.")
        if batch_size == 3:
            raise MemoryError
        return {"batch_size": batch_size}

    monkeypatch.setattr(speed, "measure_speed", measure)
    subjects = [paper_sizes.Subject("sample", tiny, num) for num in (1, 2, 3, 4)]
    with caplog.at_level(logging.INFO):
        new = paper_sizes.measure_subjects(subjects, repeats=2)
        assert next(new)["batch_size"] == 1 and next(new)["batch_size"] == 4
        with pytest.raises(UserError, match="2 of 4 rows failed"):
            next(new)
    assert "This row failed: cuDNN is not detected." in caplog.text
    assert "This row failed: MemoryError" in caplog.text


def test_rows_are_known_of_this_machine_alone(tiny, tmp_path):
    subjects = [paper_sizes.Subject("sample", tiny, num) for num in (1, 2)]
    out = tmp_path / "rows.jsonl"
    assert paper_sizes.known_rows(out, subjects) == {}
    subject = {**speed.subject(*subjects[1]), "compile_seconds": 1.0}
    lines = [{**subject, "seconds": seconds} for seconds in (1.0, 2.0)]
    lines += [{**subject, "driver": "another"}, {**subject, "steps": 7}]
    lines += [speed.subject(*subjects[0])]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert paper_sizes.known_rows(out, subjects) == {1: lines[1]}
    out.write_text("\n7\n")
    with pytest.raises(UserError, match="rows.jsonl, line 2, is not a row of the benchmark"):
        paper_sizes.known_rows(out, subjects)


def test_another_network_is_another_subject(tiny):
    subject = speed.subject("train_prior", tiny, 1)
    other = tiny.change({"prior.cache_codes": not tiny.prior.cache_codes})
    other = speed.subject("train_prior", other, 1)
    assert {name for name in subject if subject[name] != other[name]} == {"config"}


@pytest.fixture
def all_there(tmp_path):
    """A file with all rows of the paper's table, as measured here, and the rows."""
    numbers = dict.fromkeys(("seconds", "seconds_min", "seconds_max", "images_per_second"), 1.0)
    numbers |= {"flops": 10**12, "xla_flops": None, "flops_per_second": 1e12, "mfu": None}
    numbers |= {"memory_bytes": 2**30, "compile_seconds": 1.0}
    there = [{**speed.subject(*x), **numbers} for x in paper_sizes.paper_subjects()]
    out = tmp_path / "performance.jsonl"
    out.write_text("".join(json.dumps(row) + "\n" for row in there[::-1]))
    return out, there


def test_the_papers_table_goes_on_where_it_was(all_there):
    command = [sys.executable, "-m", "binlatent.benchmark", "paper"]
    out, there = all_there
    result = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert result.stdout == table(there) and "already has 18 of 18 rows" in result.stderr
    assert len(out.read_text().splitlines()) == 18  # which were there before
    for flag, message in (
        ("--config=configs/digits.py", "The table paper has its own configs"),
        ("--batch_size=2", ", not for paper"),
        (f"--out={out.parent}", "Cannot write --out="),
    ):
        result = subprocess.run([*command, flag], capture_output=True, text=True, timeout=100)
        assert result.returncode == 1 and message in result.stderr


def test_the_script_writes_the_table(all_there):
    out, there = all_there
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"OUT": str(out.parent), "PATH": path}
    subprocess.run(["bash", "launch/benchmark.sh"], env=env, check=True, timeout=100)
    assert (out.parent / "performance.md").read_text() == table(there)


def table(measured):
    """The table that the command prints for rows of speeds."""
    lines = [rows.table_line(speed.COLUMNS, row) for row in measured]
    return "\n".join([rows.table_head(speed.COLUMNS, measured[0]), *lines, ""])


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--steps=4", "--steps is for sample, not for decode."),
        ("--topology=v5p:2x2x1", "--topology is for memory, not for decode."),
        ("--batch_size=0", "--batch_size must be at least 1, not 0"),
        ("--repeats=0", "--repeats must be at least 1, not 0"),
        ("--peak_tflops=0", "--peak_tflops must be above 0 and finite, not 0"),
        ("--peak_tflops=inf", "--peak_tflops must be above 0 and finite, not inf"),
        ("--out=/nowhere/rows", "Cannot write --out=/nowhere/rows (No such file"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_any_work(flag, message):
    command = [sys.executable, "-m", "binlatent.benchmark", "decode", "--config=configs/digits.py"]
    result = subprocess.run([*command, flag], capture_output=True, text=True, timeout=100)
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1]
    assert not result.stdout


def test_the_command_measures_and_writes_json(tmp_path):
    command = [sys.executable, "-m", "binlatent.benchmark", "decode", "--config=configs/digits.py"]
    out = tmp_path / "rows.jsonl"
    flags = ["--batch_size=1", "--batch_size=2", "--repeats=1", "--peak_tflops=0.1"]
    flags += ["--config.autoencoder.base_width=32", f"--out={out}"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["program"], row["batch_size"], row["peak_flops"]) for row in kept] == [
        ("decode", 1, 1e11),
        ("decode", 2, 1e11),
    ]
    assert result.stdout == table(kept)


def test_a_row_that_does_not_fit_costs_no_other():
    command = [sys.executable, "-m", "binlatent.benchmark", "decode", "--config=configs/digits.py"]
    flags = ["--batch_size=1", f"--batch_size={10**12}", "--repeats=1"]
    flags += ["--config.autoencoder.base_width=32"]
    result = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "Unable to allocate" in result.stderr.splitlines()[-1]
    assert "take a smaller batch" in result.stderr.splitlines()[-1]
    lines = [line for line in result.stdout.splitlines() if line.startswith("| decode ")]
    assert [line.split("|")[3].strip() for line in lines] == ["1"]
