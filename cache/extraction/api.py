"""`residua.extract`: runs a frozen language model on texts once and returns the cache.

The keywords become an `ExtractionRequest`, which `answer_request.py` answers on this machine and
`distributed.py` on a dask cluster.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.paths import as_path
from ..format.manifest import FORMAT
from ..number_ranges import as_tuple
from ..progress import Auto, StageProgress, show_stages
from ..store.activation_cache import ActivationCache
from ..store.catalog import cache_root
from .answer import answer_request
from .given_inputs import hold_inputs
from .request import ExtractionRequest

if TYPE_CHECKING:
    import torch
    from distributed import Client


def extract(
    model: "str | Path | torch.nn.Module",
    data: str | Path | Iterable[str | Mapping[str, Any] | None],
    *,
    root: str | Path | None = None,
    context: int | None = None,
    pack: bool = True,
    text_column: str | None = None,
    separator: str | None = None,
    split: str | None = None,
    data_format: str | None = None,
    bos: str = "auto",
    generation_prompt: bool = False,
    layers: Iterable[int] | int | None = None,
    positions: str = "all",
    logits: str = "recompute",
    max_tokens: int | None = None,
    max_bytes: int | None = None,
    codec: str = "raw",
    dtype: str = "auto",
    seed: int = 0,
    device: str = "auto",
    device_map: "str | dict[str, Any] | None" = None,
    batch_tokens: int | None = None,
    part_positions: int | None = None,
    part: str | None = None,
    on_error: str = "quarantine",
    attention: str = "default",
    revision: str | None = None,
    trust_remote_code: bool = False,
    format: int = FORMAT,
    tokenizer: Any = None,
    client: "Client | None" = None,
    progress: StageProgress | Auto | None = "auto",
) -> ActivationCache:
    """Run `model` on the texts of `data` once and return the cache of its residual streams.

    A cache under `root` that holds the request, or more, is returned at once; an unfinished cache
    is finished, a cache that lacks layers or tokens is extended. `ModelError`, `DataError`,
    `HeadMismatchError`, `UsageError` and `NoSpaceError` are raised before anything is written.

    Args:
        model: Folder of a model saved by transformers, a hub id, or a loaded model of transformers
            (in eval mode, on its device). A loaded model has the identity of its tensors: while
            they are those of the folder it came from, both find the same caches.
        data: .txt, .jsonl, .json, .csv, .tsv or .parquet file; a pattern (`data/*.jsonl`) or a
            folder of such files; `-` for standard input; a saved `datasets` folder; or a hub id
            (`name` or `name:config`); or the texts: a list of strings, an iterable of dictionaries
            (one per row, read once), a data frame, a `datasets.Dataset`. docs/data.md says what a
            document is in each.
        root: Folder of caches, or the URL of an object store. Default $RESIDUA_ROOT, else the XDG
            cache folder.
        context: Longest sequence in tokens. Default the model's, at most 1024.
        pack: Pack documents to the context length; False keeps one sequence per document.
        text_column: Column that holds the text, conversations (rendered with the model's chat
            template) or lists of token ids. Default the obvious one.
        separator: Separator of columns in .csv and .tsv files, one character or `tab`. Default
            comma and tab.
        split: Split of a data set that has several. Default `train`.
        data_format: Format of files whose names do not tell it, and of standard input: `txt`,
            `jsonl`, `json`, `csv`, `tsv` or `parquet`.
        bos: Special tokens: `auto` (those that the tokenizer adds to a text; if it adds none, BOS
            or EOS before each packed document), `none`, `document` (BOS before each), `context`
            (also at the start of every packed context), `bos-eos` (BOS before and EOS after each).
        generation_prompt: End each conversation with the beginning of a turn of the assistant.
        layers: Layers to keep, 0 (embedding) to L; layer L is always kept. Default all.
        positions: Positions to keep: `all`, `last`, `sample:K`, `answer` or `explicit` (columns
            of the data).
        logits: Logits to keep: `recompute` (none: layer L and the head give them), `topk:K` or
            `full`.
        max_tokens: Stop after this many tokens, at the end of a sequence.
        max_bytes: Stop before the cache exceeds this size, at the end of a sequence.
        codec: Encoding of chunks: `raw`, which reads fastest, or `compact`, for cold storage.
        dtype: Stored dtype: `auto` (by the range of values), `float16`, `bfloat16` or `float32`.
        seed: Seed of the permutation of the documents.
        device: Device of the model: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        device_map: Devices of a model that is larger than one, through accelerate: `auto` (all
            GPUs, then the host's memory and disk), `balanced`, `sequential`, or a dict of module
            name and device. Not part of the cache's identity.
        batch_tokens: Tokens of one forward batch. Default 4096 on a CPU, on a GPU as many as fit,
            at most 32768.
        part_positions: Positions of a part, the unit of commit and resume. Default 24-48 MiB per
            layer.
        part: Write only share i of n of the parts, as `i/n`, for job arrays.
        on_error: What to do with a sequence whose activations are not finite: `quarantine` or
            `raise`.
        attention: Attention kernel: `default`, `eager`, `sdpa`, `flash_attention_2`.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Run code that comes with the model.
        format: Format of the cache; 1 finds, finishes and extends caches of the first version.
        tokenizer: Tokenizer of a loaded model, a fast one of transformers or a
            `tokenizers.Tokenizer`. Default that of the folder that the model was loaded from.
        client: Client of `dask.distributed` whose workers share the work; they must see the same
            files.
        progress: "auto" (bars in a terminal or notebook, elsewhere lines of the logger
            `residua`), None (nothing), or a function that is called with (stage, done, total) for
            the stages `tokenize` (documents) and `extract` (positions).
    """
    with (
        show_stages(progress) as report,
        hold_inputs(model, data, tokenizer, cache_root(root)) as inputs,
    ):
        request = ExtractionRequest(
            model=inputs.model,
            data=inputs.data,
            root=None if root is None else as_path(root),
            context=context,
            pack=pack,
            text_column=text_column,
            separator=separator,
            split=split,
            data_format=data_format,
            bos=bos,
            generation_prompt=generation_prompt,
            layers=None if layers is None else as_tuple(layers, "layers"),
            positions=positions,
            logits=logits,
            max_tokens=max_tokens,
            max_bytes=max_bytes,
            codec=codec,
            dtype=dtype,
            seed=seed,
            device=device,
            device_map=device_map,
            batch_tokens=batch_tokens,
            part_positions=part_positions,
            part=part,
            on_error=on_error,
            attention=inputs.attention(attention),
            revision=revision,
            trust_remote_code=trust_remote_code,
            format=format,
            given=inputs.given,
        )
        if client is not None:
            from .distributed import answer_on_cluster

            return answer_on_cluster(client, request, report).cache
        return answer_request(request, report).cache
