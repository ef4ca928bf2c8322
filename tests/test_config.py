import subprocess
import sys
from pathlib import Path

import pytest

from ffssl.config import declarations, help_text, read_options
from ffssl.errors import UserError

ROOT = Path(__file__).parent.parent
REQUIRED = ["--data.train=train.beton", "--run.folder=runs"]
STAGES = ["--resolution.schedule=stages"]


def options(*arguments):
    return read_options([*REQUIRED, *arguments])


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and returns the argument that names it."""

    def write(text, name="config.yaml"):
        (tmp_path / name).write_text(text)
        return f"--config={tmp_path / name}"

    return write


def refused(*arguments, by):
    with pytest.raises(UserError, match=by) as error:
        options(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


# Where values come from


def test_options_have_their_defaults_and_types():
    training = options().training
    assert (training.epochs, training.learning_rate, training.schedule) == (200, 0.1, "cosine")
    assert isinstance(training.epochs, int) and isinstance(training.warmup_epochs, float)
    assert options().data.validation is None and options().method.settings["temperature"] is None


@pytest.mark.parametrize("file_first", [True, False])
def test_the_command_line_wins_over_the_file(config, file_first):
    file = config("training: {epochs: 7, batch_size: 32}")
    arguments = [file, "--training.epochs=9"] if file_first else ["--training.epochs", "9", file]
    training = options(*arguments).training
    assert (training.epochs, training.batch_size) == (9, 32)


def test_a_file_overrides_its_base_key_by_key_and_a_base_may_have_a_base(config):
    config("training: {epochs: 1, batch_size: 16, learning_rate: 0.5}", "a.yaml")
    config("base: a.yaml\ntraining: {epochs: 2, batch_size: 32}", "b.yaml")
    training = options(config("base: b.yaml\ntraining: {epochs: 3}")).training
    assert (training.epochs, training.batch_size, training.learning_rate) == (3, 32, 0.5)


def test_of_several_bases_the_later_wins_and_the_file_over_all(config):
    config("training: {epochs: 1, batch_size: 16, learning_rate: 0.5}", "a.yaml")
    config("base: a.yaml\ntraining: {epochs: 2, batch_size: 32}", "b.yaml")
    config("training: {epochs: 3}", "c.yaml")
    training = options(config("base: [b.yaml, c.yaml]\ntraining: {momentum: 0.5}")).training
    assert (training.epochs, training.batch_size, training.learning_rate, training.momentum) == (
        3,
        32,
        0.5,
        0.5,
    )
    refused(config("base: [a.yaml, gone.yaml]"), by=r"gone\.yaml: .*No such file")
    config("base: [a.yaml, config.yaml]", "other.yaml")
    refused(config("base: [a.yaml, other.yaml]"), by="base config.yaml is built on it in turn")


def test_off_is_a_word_where_it_is_a_choice(config):
    file = config("training: {amp: off}\nhard_augment: {select: off}")
    assert options(file).training.amp == options("--training.amp=off").training.amp == "off"
    assert (
        options(file).hard_augment.select
        == options("--hard_augment.select=off").hard_augment.select
        == "off"
    )


@pytest.mark.parametrize("word, value", [("true", True), ("False", False)])
def test_switches_take_true_and_false(config, word, value):
    assert options(f"--run.tensorboard={word}").run.tensorboard is value
    assert options(config(f"run: {{tensorboard: {word}}}")).run.tensorboard is value


def test_files_are_a_text_or_a_list(config):
    for text, expected in (
        ("train-*.beton", "train-*.beton"),
        ("[a.beton, b-*.beton]", "a.beton,b-*.beton"),
        ("12", "12"),
    ):
        file = config(f"data: {{validation: {text}}}")
        assert options(file).data.validation == expected
    for text in ("[]", "['a,b.beton']", "[[a]]", "[1]"):
        by = "--data.validation: expected a path, several with commas or in a list, or a pattern"
        refused(config(f"data: {{validation: {text}}}"), by=by)


def test_numbers_in_scientific_notation_are_numbers(config):
    assert options("--training.weight_decay=1e-6").training.weight_decay == 1e-6
    # A string to YAML 1.1.
    assert options(config("training: {weight_decay: 1e-6}")).training.weight_decay == 1e-6


@pytest.mark.parametrize(
    "folder", ["123", "2024-01-01", "yes", "[abc", "@home", "*", "a: b", "100%", "it's"]
)
def test_any_string_is_a_folder_on_the_command_line(folder):
    assert read_options(["--data.train=x", f"--run.folder={folder}"]).run.folder == folder


@pytest.mark.parametrize(
    "path", sorted((ROOT / "rn50_configs").glob("*.yaml")), ids=lambda path: path.name
)
def test_the_configs_that_we_ship_are_valid(path):
    options(f"--config={path}")


def test_options_as_plain_sections():
    sections = options("--run.seed=4").as_dict()
    assert sections["run"]["seed"] == 4 and {f"{s}.{k}" for s in sections for k in sections[s]} == {
        d.name for d in declarations()
    }


# What is refused


def test_a_mistyped_option_is_answered_with_the_nearest_known_one(config):
    assert "training.learning_rate" in refused(
        "--training.learnig_rate=1", by="did you mean training.learning_rate"
    )
    assert "config.yaml" in refused(
        config("training: {epoch: 5}"), by=r"training\.epoch: .*did you mean training\.epochs\?"
    )
    assert "config.yaml" in refused(
        config("trainig: {epochs: 5}"), by="'trainig'; did you mean training?"
    )
    refused("--zzzzzzzz=1", by="--zzzzzzzz: unknown option$")


@pytest.mark.parametrize(
    "name, value",
    [
        ("training.epochs", "ten"),
        ("training.epochs", "1.5"),
        ("training.epochs", "0"),
        ("training.epochs", "true"),
        ("training.epochs", "[1]"),
        ("training.epochs", ".inf"),
        ("training.epochs", ""),
        ("training.learning_rate", "-1"),
        ("training.learning_rate", ".nan"),
        ("training.learning_rate", ".inf"),
        ("training.learning_rate", "fast"),
        ("training.schedule", "linear"),
        ("training.schedule", "5"),
        ("training.momentum", "1"),
        ("augment.blur", "1.1"),
        ("run.tensorboard", "yes please"),
        ("run.tensorboard", "2"),
    ],
)
def test_a_value_of_a_wrong_kind_is_named_with_what_is_expected(config, name, value):
    section, key = name.split(".")
    refused(f"--{name}={value}", by=f"--{name}: expected")
    if value:
        refused(config(f"{section}: {{{key}: {value}}}"), by=f"--{name}: expected")


def test_what_is_required_is_asked_for():
    with pytest.raises(UserError, match="--run.folder: required"):
        read_options(["--data.train=x"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["epochs=5"], "'epochs=5': expected"),
        (["--training.epochs"], "value is missing"),
        (["--training.epochs", "--run.seed=1"], "value is missing"),
    ],
)
def test_malformed_arguments(arguments, message):
    refused(*arguments, by=message)


@pytest.mark.parametrize(
    "text",
    [
        "training: [",
        "a: *b",
        "\x00",
        "",
        "just words",
        "- 1\n- 2",
        "training: 5",
        "training:",
        "base: 5",
        "base: [5]",
        "base:",
    ],
)
def test_a_file_that_is_no_config_is_named(config, text):
    refused(config(text), by=r"config\.yaml: ")


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path, config):
    refused(f"--config={tmp_path / 'no.yaml'}", by=r"no\.yaml: .*No such file")
    refused(f"--config={tmp_path}", by="Is a directory")
    refused(config("base: gone.yaml"), by=r"gone\.yaml: .*No such file")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    refused(f"--config={tmp_path / 'binary.yaml'}", by=r"binary\.yaml: not a YAML file")


def test_files_that_are_each_others_base_are_refused(config):
    config("base: config.yaml", "other.yaml")
    refused(config("base: other.yaml"), by="base")


HARD = ["--hard_augment.select=hard", "--augment.views=3"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--resolution.max=100"], r"resolution\.max: 100 .*resolution\.step=32"),
        (["--resolution.schedule=spl", "--resolution.min=100"], r"resolution\.min: 100"),
        (["--resolution.schedule=spl", "--resolution.min=256"], r"resolution\.min: 256 is larger"),
        (["--resolution.schedule=stages"], r"resolution\.stages: they go with"),
        (["--resolution.stages=224:1"], r"resolution\.stages: they go with"),
        ([*STAGES, "--resolution.stages=112:0.75,224:0.25"], "112 is no multiple of .*step=32"),
        ([*STAGES, "--resolution.stages=96:0.5,256:0.5"], r"256 is larger than .*max=224"),
        ([*STAGES, "--resolution.stages=96:0.999,224:0.001"], "0.001 of 200 epochs .* none at 224"),
        ([*STAGES, "--resolution.stages=96:0.75,224:0.75"], r"resolution\.stages: .*sum to 1"),
        ([*STAGES, "--resolution.stages=96:1.5,224:-0.5"], r"resolution\.stages: .*sum to 1"),
        ([*STAGES, "--resolution.stages=96,224"], r"resolution\.stages: .*sum to 1"),
        (["--training.epochs=5", "--training.warmup_epochs=5"], r"training\.warmup_epochs: 5 of 5"),
        (
            ["--training.schedule=1-clr", "--training.warmup_share=1"],
            r"training\.warmup_share: 1 leaves no training",
        ),
        (
            ["--training.weight_decay=0", "--training.weight_decay_end=0.4"],
            r"weight_decay_end: a --training\.weight_decay of 0 stays 0",
        ),
        (["--augment.local_share=0"], r"local_share: expected a number from 0\.01 to 1"),
        (["--training.momentum_low=0.96"], r"training\.momentum_low: 0\.96"),
        (["--augment.views=6"], r"augment\.views: 6 .*give 2, or --hard_augment\.select"),
        (["--hard_augment.select=hard"], r"augment\.views: 2 .*hard_augment"),
        (["--hard_augment.select=random", "--augment.views=2"], r"augment\.views: 2"),
        (
            ["--hard_augment.select=hard", "--augment.views=1"],
            r"augment\.views: expected an integer of 2 or more",
        ),
        (
            [
                "--hard_augment.select=hard",
                "--hard_augment.extra_targets=true",
                "--augment.views=2",
            ],
            r"augment\.views: 2",
        ),
        (
            ["--hard_augment.extra_targets=true"],
            r"hard_augment\.extra_targets: .*hard_augment\.select",
        ),
        (["--hard_augment.loss=method"], r"hard_augment\.loss: .*hard_augment\.select=hard"),
        (
            ["--hard_augment.loss=method", "--hard_augment.select=random", "--augment.views=3"],
            r"hard_augment\.loss: .*hard_augment\.select=hard",
        ),
        (
            [*HARD, "--training.epochs=9", "--hard_augment.start_epoch=9"],
            r"start_epoch: 9 is past the last epoch, 8",
        ),
        (["--hard_augment.start_epoch=1"], r"start_epoch: no pairs are chosen"),
        ([*HARD, "--hard_augment.share_max=1.5"], r"share_max: expected a number from 0 to 1"),
        ([*HARD, "--hard_augment.share_min=-0.1"], r"share_min: expected a number from 0 to 1"),
        (
            [*HARD, "--hard_augment.share_min=0.5", "--hard_augment.share_max=0.4"],
            r"share_min: 0\.5 is larger",
        ),
        (
            ["--hard_augment.share_max=0.5", "--hard_augment.share_min=0"],
            r"share_min: only hard pairs",
        ),
    ],
)
def test_options_at_odds_with_each_other_are_refused(arguments, message):
    refused(*arguments, by=message)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resolution.step=1", "--resolution.max=100"],
        ["--resolution.min=100"],  # plays no role without a schedule
        ["--augment.views=3", "--hard_augment.select=hard"],
        ["--training.momentum_low=0.95"],
        ["--training.epochs=5", "--training.warmup_epochs=4.9"],
        [
            "--training.epochs=5",
            "--training.warmup_epochs=10",
            "--training.schedule=1-clr",
            "--training.warmup_share=0.9",
        ],
        ["--training.warmup_share=1"],  # plays no role but for 1-clr
        [*HARD, "--hard_augment.loss=method"],
        [*HARD, "--training.epochs=9", "--hard_augment.start_epoch=8"],
    ],
)
def test_options_that_agree_are_not(arguments):
    options(*arguments)


# The program


def test_the_help_lists_every_option_with_its_meaning_and_default():
    text = help_text("usage")
    for declared in declarations():
        (line,) = [row for row in text.splitlines() if row.split()[:1] == [f"--{declared.name}"]]
        assert declared.help in line
        if declared.default is not None:
            assert f"default {declared.default}" in line


def test_the_program_answers_help_with_0_and_a_mistake_with_2_and_one_line():
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "ffssl/train.py", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )

    answer = run("--help")
    assert answer.returncode == 0 and "--training.epochs" in answer.stdout
    answer = run("--training.epoch=3")
    assert (answer.returncode, answer.stdout) == (2, "")
    assert (
        answer.stderr == "error: --training.epoch: unknown option; did you mean training.epochs?\n"
    )


def test_a_program_that_needs_no_data_gives_defaults_which_anything_overrides(tmp_path):
    defaults = {"data.train": "none", "run.folder": "somewhere"}
    (tmp_path / "config.yaml").write_text("run: {folder: here}")
    options = read_options([f"--config={tmp_path / 'config.yaml'}"], defaults=defaults)
    assert (options.data.train, options.run.folder) == ("none", "here")
    assert read_options(["--data.train=mine"], defaults=defaults).data.train == "mine"
