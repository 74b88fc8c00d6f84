"""The command line: one JSON object on request, clear messages, exit codes, help for all."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from residua.analysis.console.options import NumberRanges
from residua.cache.extraction.request import ExtractionRequest
from residua.cache.number_ranges import parse_count
from residua.cache.store.activation_cache import ActivationCache
from residua.cli import main


def invoke(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def json_of(*args: object, code: int = 0) -> dict[str, Any]:
    """The one JSON object that a command prints with --json."""
    result = invoke(*args, "--json")
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def commands(group: click.Group = main, path: str = "") -> list[tuple[str, click.Command]]:
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, f"{path}{name} ")
        else:
            found.append((f"{path}{name}", command))
    return found


@pytest.fixture(scope="module")
def root(tiny_cache: ActivationCache) -> Path:
    return tiny_cache.path.parent


def test_every_command_has_root_json_an_example_and_help_for_every_option() -> None:
    for name, command in commands():
        options = {option for p in command.params for option in p.opts}
        assert {"--root", "--json"} <= options, name
        assert f"residua {name}" in (command.help or ""), name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, (name, parameter.name)


def test_options_of_extract_are_the_fields_of_its_request() -> None:
    names = {p.name for p in dict(commands())["extract"].params}
    names -= {"as_json", "dry_run", "find", "no_tty"}
    names -= {"scheduler", "server"}  # who does the work, not what is asked for
    # What is given in Python has no option.
    assert names == {field.name for field in dataclasses.fields(ExtractionRequest)} - {"given"}


def test_the_whole_flow_as_json(model_folder: Path, texts_file: Path, tmp_path: Path) -> None:
    root = ("--root", tmp_path)
    made = json_of("extract", model_folder, texts_file, "--context", 64, *root)
    assert made["status"] == "extracted"
    assert {"cache", "path", "positions", "layers", "bytes", "head_error"} <= set(made)
    assert made["layers"] == [0, 1, 2, 3]
    assert Path(made["path"], "manifest.json").is_file()
    assert json_of("extract", model_folder, texts_file, "--context", 64, *root)["status"] == "hit"
    short = made["cache"][:6]
    assert json_of("ls", *root)["caches"][0]["cache"] == made["cache"]
    assert json_of("info", short, *root)["positions"] == made["positions"]
    assert json_of("verify", short, *root)["ok"] is True
    fitted = json_of("fit", "ridge", short, "--offsets", "0-2", *root)
    assert {(r["layer"], r["offset"]) for r in fitted["metrics"]} == {
        (layer, offset) for layer in range(4) for offset in range(3)
    }
    measured = json_of("evaluate", short, Path(fitted["probe"]).name, *root)
    rows = measured["rows"]
    assert sum(r["n"] for r in measured["buckets"]) == sum(r["n"] for r in rows)
    inside = json_of("evaluate", short, "--where", "continued", *root)
    assert (measured["where"], inside["where"]) == (None, "continued")
    assert 0 < inside["rows"][0]["n"] < rows[0]["n"]
    assert {row["probe"] for row in rows} == {"logit", "ridge", "bigram"}
    columns = "probe layer offset kl precision_at_1 precision_at_5 precision_at_10 nll surprisal n"
    assert all(set(columns.split()) <= set(row) for row in rows)
    assert {row["offset"] for row in rows if row["probe"] == "bigram"} == {1, 2}
    last = next(r for r in rows if (r["probe"], r["layer"], r["offset"]) == ("logit", 3, 0))
    assert last["kl"] < 1e-5
    assert last["precision_at_1"] == 1.0
    assert last["nll"] == pytest.approx(last["surprisal"])


def test_commands_also_speak_to_people(root: Path, tiny_cache: ActivationCache) -> None:
    short = tiny_cache.id[:8]
    assert short in invoke("ls", "--root", root).stdout
    info = invoke("info", short, "--root", root).stdout
    assert "GPTNeoXForCausalLM" in info
    assert "head error" in info
    assert "ok:" in invoke("verify", short, "--root", root).stdout
    fitted = invoke("fit", "ridge", tiny_cache.path, "--root", root, "--alpha", "10")
    assert "next: residua evaluate" in fitted.stdout
    shown = invoke("evaluate", short, "ridge", "--root", root)
    assert "precision@1 by the model's confidence" in shown.stdout
    assert "90-100 %" in shown.stdout
    assert shown.exit_code == 0, shown.output
    assert "logit KL" in shown.stdout


def test_a_damaged_cache_gives_exit_code_4(tmp_path: Path, root: Path, tiny_cache: Any) -> None:
    import shutil

    copy = tmp_path / tiny_cache.id
    # Kept moments would be read instead of the rows.
    shutil.copytree(tiny_cache.path, copy, ignore=shutil.ignore_patterns("moments"))
    shard = copy / "arrays.zarr/residual/1/c/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    found = json_of("verify", tiny_cache.id, "--root", tmp_path, code=4)
    assert found["damages"][0]["array"] == "residual/1"
    assert invoke("verify", copy).exit_code == 4
    assert json_of("fit", "ridge", copy, "--root", tmp_path, code=4)["error"] == "CorruptError"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["info", "zzz"], 2, "no cache 'zzz'"),
        (["extract", "nowhere/at/all", "x.txt"], 2, "is not a model folder"),
        (["fit", "ridge", "{cache}", "--offsets", "a-b"], 2, "write it like 0-3"),
        (["fit", "ridge", "{cache}", "--layers", "40"], 2, "layer 40 is not in this cache"),
        (["evaluate", "{cache}", "nothing"], 2, "no probe 'nothing'"),
        (["evaluate", "{cache}", "--split", "dev"], 2, "no split 'dev'"),
        (["fit", "lens", "{cache}", "--lr", "nan"], 2, "'nan' is no finite number"),
        (["fit", "ridge", "{cache}", "--alpha", "much"], 2, "'much' is no finite number"),
        (["fit", "ridge", "{cache}", "--out", "{file}"], 2, "is a file; name a folder"),
        (["fit", "ridge", "{cache}", "--out", "{file}/probe"], 2, "name another place"),
        (["fit", "vocab", "{cache}", "--out", "{file}/a/probe"], 2, "name another place"),
        (["evaluate", "{cache}", "--html", "{file}/report.html"], 2, "name another place"),
        (["evaluate", "{cache}", "--html", "{folder}"], 2, "is a folder; name a file"),
        (["evaluate", "{cache}", "--png", "{file}"], 2, "name another place"),
    ],
)
def test_mistakes_end_with_a_message_not_a_traceback(
    args: list[str], code: int, message: str, root: Path, tiny_cache: ActivationCache
) -> None:
    file = tiny_cache.path / "manifest.json"
    args = [arg.format(cache=tiny_cache.id, file=file, folder=root) for arg in args]
    result = invoke(*args, "--root", root)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_errors_are_objects_with_json(root: Path) -> None:
    found = json_of("info", "zzz", "--root", root, code=2)
    assert found["error"] == "NotFoundError"
    assert found["exit_code"] == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["extract", "model", "texts.txt", "--contxt", "64"], "--contxt"),
        (["extract", "model"], "Missing argument 'DATA'"),
        (["extract", "model", "texts.txt", "--on-error", "ignore"], "'ignore' is not one of"),
        (["fit", "ridge", "3f2a", "--offsets", "a-b"], "write it like 0-3"),
        (["fit", "rigde", "3f2a"], "No such command 'rigde'"),
        (["nothing"], "No such command 'nothing'"),
    ],
)
def test_mistyped_commands_are_objects_with_json(args: list[str], message: str) -> None:
    found = json_of(*args, code=2)
    assert found["error"] == "UsageError"
    assert message in found["message"]
    assert found["exit_code"] == 2
    plain = invoke(*args)
    assert plain.exit_code == 2
    assert plain.stdout == ""
    assert message in plain.stderr


def test_help_and_version_do_not_mind_json() -> None:
    assert invoke("extract", "--json", "--help").stdout.startswith("Usage:")
    assert invoke("extract", "--json", "--help").exit_code == 0


def test_numbers_are_read_as_ranges_and_lists() -> None:
    assert NumberRanges().convert("0-3", None, None) == (0, 1, 2, 3)
    assert NumberRanges().convert("5,0,2-3", None, None) == (0, 2, 3, 5)
    with pytest.raises(click.BadParameter):
        NumberRanges().convert("3-1", None, None)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1000000", 10**6), ("1_000", 1000), ("1e6", 10**6), ("10M", 10**7), ("1.5k", 1500),
     ("2B", 2 * 10**9), ("3 G", 3 * 10**9), ("0.1m", 10**5), ("-1", -1)],
)  # fmt: skip
def test_counts_are_taken_as_people_write_them(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "1.5", "1e-3", "k", "M1", "1KB", "10 %", "nan", "1e999", "inf"]
)
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        parse_count(text)


def test_every_count_and_size_takes_units() -> None:
    for name, command in commands():
        for parameter in command.params:
            if parameter.name != "format":
                assert parameter.type.name != "integer", (name, parameter.name)


def test_a_count_in_a_mode_is_one_request_however_it_is_written() -> None:
    command = dict(commands())["extract"]
    words = ["m", "d", "--positions", "sample:1k", "--logits", "topk:0.1k", "--context", "1e3"]
    options = command.make_context("extract", words).params
    assert (options["positions"], options["logits"]) == ("sample:1000", "topk:100")
    assert options["context"] == 1000
