"""Flags are the fields of BalanceConfig, and wrong ones stop the program with a sentence."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from megatron_ultraep.config import BalanceConfig
from megatron_ultraep.megatron import arguments

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "megatron-job.md"

# A value of every field that is not its default, as words of a command line; a new field wants a line here.
WORDS = {
    "enabled": (["--no-ultraep-enabled"], False),
    "slots": (["--ultraep-slots", "5"], 5),
    "node_size": (["--ultraep-node-size", "4"], 4),
    "min_tokens": (["--ultraep-min-tokens=7"], 7),
    "tolerance": (["--ultraep-tolerance", "0.5"], 0.5),
    "gate": (["--no-ultraep-gate"], False),
    "slot_sets": (["--ultraep-slot-sets", "2"], 2),
    "token_ns": (["--ultraep-token-ns", "80"], 80),
    "copy_ns_per_mib": (["--ultraep-copy-ns-per-mib", "9000"], 9000),
    "transport": (["--ultraep-transport", "collective"], "collective"),
    "record": (["--ultraep-record", "some/where"], "some/where"),
    "record_mib": (["--ultraep-record-mib", "12"], 12),
    "profile": (["--ultraep-profile"], True),
    "allow_untested": (["--ultraep-allow-untested"], True),
}


def test_no_flags_give_the_defaults():
    assert arguments.parse([]) == BalanceConfig()


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(BalanceConfig)])
def test_every_field_has_its_flag(name):
    words, value = WORDS[name]
    assert value != getattr(BalanceConfig(), name)
    assert arguments.parse(words) == dataclasses.replace(BalanceConfig(), **{name: value})


def test_the_last_of_repeated_flags_counts():
    words = ["--ultraep-slots", "1", "--no-ultraep-gate", "--ultraep-slots", "3", "--ultraep-gate"]
    assert arguments.parse(words) == BalanceConfig(slots=3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ultraep-slotz", "2"], "there is no flag --ultraep-slotz; is --ultraep-slots meant?"),
        (["--ultraep-slo", "2"], "there is no flag --ultraep-slo"),
        (["--no-ultraep-slots"], "there is no flag --no-ultraep-slots"),
        (["--ultraep-slots", "two"], "argument --ultraep-slots: invalid int value: 'two'"),
        (["--ultraep-slots"], "argument --ultraep-slots: expected one argument"),
        (["--ultraep-slots", "0"], "slots must be >= 1, got 0"),
        (["--ultraep-transport", "pigeon"], "argument --ultraep-transport: invalid choice: 'pigeon'"),
        (["--no-ultraep-gate=false"], "ignored explicit argument 'false'"),
        (["--no-ultraep-gate", "--ultraep-token-ns", "80"], "copy_ns_per_mib belong to the gate, which is off"),
        (["--ultraep-slots", "0", "--ultraep-min-tokens", "0"], "min_tokens must be >= 1 token, got 0"),
    ],
)  # fmt: skip
def test_wrong_flags_stop_with_a_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        arguments.parse(words)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_our_words_are_taken_out_of_a_command_line():
    line = [
        "--num-layers",
        "4",
        "--ultraep-slots",
        "3",
        "--no-ultraep-gate",
        "train.py",
        "--ultraep-tolerance=0.1",
        "-v",
    ]
    ours, others = arguments.split(line)
    assert ours == ["--ultraep-slots", "3", "--no-ultraep-gate", "--ultraep-tolerance=0.1"]
    assert others == ["--num-layers", "4", "train.py", "-v"]


def test_help_states_unit_and_default():
    parser = arguments.add_arguments(argparse.ArgumentParser(formatter_class=lambda prog: _wide(prog)))
    text = parser.format_help()
    for field in dataclasses.fields(BalanceConfig):
        assert f"{field.metadata['help']} (default: {arguments.shown_default(field)})" in text


def test_the_documentation_lists_the_flags():
    assert arguments.markdown_table() in DOCUMENT.read_text()


def _wide(prog):
    return argparse.HelpFormatter(prog, width=1000)
