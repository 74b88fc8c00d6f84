"""`residua data`: texts for studies."""

from pathlib import Path
from typing import Any

import click

from ..console.options import NUMBERS, WHOLE_NUMBER, residua_command


@click.group()
def data() -> None:
    """Make texts for studies."""


@data.command("kv")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--pairs",
    type=NUMBERS,
    default="4,8",
    show_default=True,
    help="Numbers of pairs in a text; the longest text must fit the context of the model.",
)
@click.option(
    "--questions",
    type=WHOLE_NUMBER,
    default=100,
    show_default=True,
    help="Questions for each number of pairs; each stands at every position.",
)
@click.option(
    "--layout",
    type=click.Choice(["json", "record", "assignments", "sentences"]),
    default="json",
    show_default=True,
    help="How pairs are written; json is that of Liu et al.",
)
@click.option("--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of the codes.")
@residua_command
def key_value(root: Path, quiet: bool, out: Path, **options: Any) -> Any:
    """Write OUT.jsonl: lists of keys and values that ask for one of them, at every position.

    Labels: documents (number of pairs), gold (position of the answer's pair, from 0), question.

    \b
    residua data kv kv.jsonl --pairs 4,8,16 --questions 200
    residua extract MODEL kv.jsonl --no-pack --positions answer
    residua study essential-layers 3f2a --question question
    """
    from ...cache.files.disk_errors import check_file_target
    from ..studies.texts.key_value_data import write_key_value_data

    check_file_target(out, "texts.jsonl")
    value = write_key_value_data(out, **options)
    text = f"{value['texts']:,} texts, the longest of {value['longest']:,} characters: {out}"
    return value, lambda: print(text)


@data.command("multidoc")
@click.argument("gold", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--documents",
    type=NUMBERS,
    default="3,5",
    show_default=True,
    help="Numbers of documents in a text; the longest text must fit the context of the model.",
)
@click.option(
    "--questions",
    type=WHOLE_NUMBER,
    default=100,
    show_default=True,
    help="Most questions for each number of documents; each stands at every position.",
)
@click.option("--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of the draws.")
@residua_command
def multi_document(root: Path, quiet: bool, gold: Path, out: Path, **options: Any) -> Any:
    """Write OUT.jsonl: questions among documents, with the answer's at every position.

    GOLD is a .jsonl or .jsonl.gz file of questions with the passage that answers each, such as
    nq-open-oracle: fields question, answers, ctxs (title, text, isgold). The other documents are
    passages of other questions without any of the answers. Labels: documents, gold, question.

    \b
    residua data multidoc nq-open-oracle.jsonl.gz multidoc.jsonl --documents 3,5 --questions 200
    residua extract MODEL multidoc.jsonl --no-pack --positions answer
    residua study essential-layers 3f2a --question question
    """
    from ...cache.files.disk_errors import check_file_target
    from ..studies.texts.multi_document_data import write_multi_document_data

    check_file_target(out, "texts.jsonl")
    value = write_multi_document_data(gold, out, **options)
    text = f"{value['texts']:,} texts, the longest of {value['longest']:,} characters: {out}"
    return value, lambda: print(text)
