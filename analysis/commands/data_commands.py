"""`residua data`: texts for studies."""

from pathlib import Path
from typing import Any

import click

from ..console.options import (
    NUMBERS,
    WHOLE_NUMBER,
    JsonErrorGroup,
    device_option,
    residua_command,
)


@click.group(cls=JsonErrorGroup)
def data() -> None:
    """Make texts for studies."""


@data.command("icl")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    "kinds",
    metavar="KIND,...",
    help="Kinds of text: induction, map, arithmetic, period.  [default: all of them]",
)
@click.option(
    "--shots",
    type=NUMBERS,
    default="0-8",
    show_default=True,
    help="Numbers of examples in the context.",
)
@click.option(
    "--documents",
    type=WHOLE_NUMBER,
    default=50,
    show_default=True,
    help="Texts of each kind and number of shots.",
)
@click.option(
    "--period",
    "periods",
    type=NUMBERS,
    default="3,5",
    show_default=True,
    help="Words, or tokens, of a period.",
)
@click.option("--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of the texts.")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Folder of a model: write random token ids of its tokenizer (induction and period).",
)
@residua_command
def in_context(root: Path, quiet: bool, out: Path, kinds: str | None, **options: Any) -> Any:
    """Write OUT.jsonl: texts whose end follows from examples in the context.

    induction: a list of words said k times, cued once more. map: k lines `a -> b` of a hidden rule.
    arithmetic: k lines `a ? b = c` of a hidden operation. period: k periods of a list of words.
    Labels: kind, shots (k), needed, known_until or horizon, period, rule.

    \b
    residua data icl icl.jsonl --kind induction,period --shots 0-4
    residua extract MODEL icl.jsonl --no-pack --positions answer
    residua data icl ids.jsonl --kind period --model MODEL
    residua extract MODEL ids.jsonl --no-pack --positions explicit
    """
    from ...cache.files.disk_errors import check_file_target
    from ..studies.texts.in_context_data import write_in_context_data

    check_file_target(out, "texts.jsonl")
    names = None if kinds is None else [kind.strip() for kind in kinds.split(",")]
    value = write_in_context_data(out, kinds=names, **options)
    text = f"{value['texts']:,} texts, the longest of {value['longest']:,} {value['unit']}: {out}"
    return value, lambda: print(text)


@data.command("injection")
@click.argument("source", metavar="QUESTIONS", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--questions",
    type=WHOLE_NUMBER,
    help="Most questions; each gives three texts.  [default: all of the file]",
)
@click.option(
    "--place",
    type=click.Choice(["question", "start", "middle"]),
    default="question",
    show_default=True,
    help="Where the insertion stands: before the question (the last two lines where it is not "
    "known), at the start, or before a random line between.",
)
@click.option("--before", help="Text before whose last occurrence the insertion stands instead.")
@click.option(
    "--wanted", multiple=True, help="An answer that attackers want.  [default: other answers]"
)
@click.option(
    "--templates",
    type=click.Path(path_type=Path),
    help='File of own templates: lines {"name", "injected", "benign"} with {wanted} in both.',
)
@click.option(
    "--end",
    type=click.Choice(["answer", "question"]),
    default="answer",
    show_default=True,
    help="Where texts end: with their answer, or before it.",
)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    help="Folder of a model whose tokens count as lengths.  [default: characters]",
)
@click.option("--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of the draws.")
@residua_command
def injection(root: Path, quiet: bool, source: Path, out: Path, **options: Any) -> Any:
    """Write OUT.jsonl: each question clean, with an injected instruction, with a benign sentence.

    QUESTIONS is a .jsonl or .jsonl.gz file of texts that end with their answer: columns text,
    answer, question, such as `residua data kv` writes; one row of each question is taken. Labels:
    arm (clean, injected, benign), template, wanted (the attacker's answer), question, inserted
    (length), and other columns of the file.

    \b
    residua data kv kv.jsonl --pairs 8 --layout record
    residua data injection kv.jsonl injection.jsonl
    residua extract MODEL injection.jsonl --no-pack --positions answer
    """
    from ...cache.files.disk_errors import check_file_target
    from ..studies.texts.injection_data import write_injection_data

    check_file_target(out, "texts.jsonl")
    value = write_injection_data(source, out, **options)
    lengths = ", ".join(f"{arm} {mean:.1f}" for arm, mean in value["inserted"].items())
    text = (
        f"{value['texts']:,} texts of {value['questions']:,} questions, the longest of "
        f"{value['longest']:,} characters: {out}\n"
        f"inserted on average, in {value['unit']}: {lengths}"
    )
    return value, lambda: print(text)


@data.command("continue")
@click.argument("model")
@click.argument("texts", metavar="DATA")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--tokens",
    type=WHOLE_NUMBER,
    default=11,
    show_default=True,
    help="Tokens of each continuation.",
)
@click.option(
    "--least-context",
    type=WHOLE_NUMBER,
    default=535,
    show_default=True,
    help="Fewest tokens of a context; its length is drawn between this and what fits.",
)
@click.option(
    "--contexts", type=WHOLE_NUMBER, default=1000, show_default=True, help="Most contexts."
)
@click.option(
    "--context",
    type=WHOLE_NUMBER,
    help="Most tokens that the model reads at once.  [default: the model's, at most 1024]",
)
@click.option(
    "--batch", type=WHOLE_NUMBER, default=8, show_default=True, help="Contexts of one pass."
)
@click.option("--text-column", help="Column that holds the text.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option(
    "--seed", type=WHOLE_NUMBER, default=0, show_default=True, help="Seed of order and lengths."
)
@device_option
@residua_command
def continue_texts(
    root: Path, quiet: bool, model: str, texts: str, out: Path, **options: Any
) -> Any:
    """Write OUT.jsonl: contexts of DATA with the model's own greedy continuations.

    A row has the token ids of a context and its continuation, so that no boundary between tokens
    moves, the positions from the context's last token on, and labels: document, prefix_len,
    gen_len, and matches, how many of the first continued tokens are the text's own.

    \b
    residua data continue MODEL texts.jsonl continued.jsonl --contexts 2000
    residua extract MODEL continued.jsonl --no-pack --text-column input_ids --positions explicit
    residua study future-lens 3f2a ridge-81d9 --split all --first-only
    """
    from ...cache.files.disk_errors import check_file_target
    from ...cache.optional_libraries import require_extra
    from ..console.terminal import Meter
    from ..studies.texts.continuations import write_continuations

    require_extra("extract", "running a model")
    check_file_target(out, "texts.jsonl")
    with Meter(quiet) as meter:
        value = write_continuations(model, texts, out, root=root, progress=meter.stage, **options)
    text = (
        f"{value['rows']:,} contexts of {value['mean_context']:.0f} tokens on average; the first "
        f"token is the text's in {value['first_token_is_text']:,}, all are in "
        f"{value['all_tokens_are_text']:,}: {out}"
    )
    return value, lambda: print(text)


@data.command("future-lens")
@click.argument("source", metavar="CSV", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--phrase",
    default="decoded_phrase",
    show_default=True,
    help="Column that follows the context: the text's own, or a teacher's (teacher_phrase).",
)
@click.option(
    "--most-characters",
    type=WHOLE_NUMBER,
    help="Keep only so many characters at the end of each context.  [default: all]",
)
@residua_command
def published_contexts(root: Path, quiet: bool, source: Path, out: Path, **options: Any) -> Any:
    """Write OUT.jsonl: the published test rows of Future Lens, as texts with an answer.

    CSV has the columns decoded_prefix and decoded_phrase. The phrase is the answer, so that an
    extraction of --positions answer keeps the last token T of the context and the phrase's. Rows
    longer than the model's context are left out there, and counted.

    \b
    residua data future-lens test.csv published.jsonl
    residua extract MODEL published.jsonl --no-pack --positions answer
    residua study future-lens 3f2a ridge-81d9 --split all --first-only
    """
    from ...cache.files.disk_errors import check_file_target
    from ..studies.texts.published_contexts import write_published_contexts

    check_file_target(out, "texts.jsonl")
    value = write_published_contexts(source, out, **options)
    text = f"{value['texts']:,} texts, the longest of {value['longest']:,} characters: {out}"
    return value, lambda: print(text)


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
