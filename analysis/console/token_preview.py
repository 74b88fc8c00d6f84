"""First tokens of a request's sequences with readable labels, for `residua extract --dry-run`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...cache.extraction.plan import Estimate
    from ...cache.extraction.request import ExtractionRequest


def with_token_labels(request: "ExtractionRequest", estimate: "Estimate") -> dict[str, Any]:
    """The JSON object of `estimate`, whose `beginnings` also have the labels `tokens`.

    Labels are those of heatmaps: `␣` is a space, `\\n` a line break. Positions of images are
    numbers.
    """
    from ...cache.extraction.answer import request_tokenizer
    from ..token_texts.token_names import TokenNames

    tokenizer = request_tokenizer(request)
    names = str if tokenizer is None else TokenNames.of_tokenizer(tokenizer)
    value = estimate.to_dict()
    for beginning in value["beginnings"]:
        beginning["tokens"] = [names(token) for token in beginning["ids"]]
    return value
