"""Tables of the study of lens quality: titles and headings."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..results.study_result import StudyTable

TITLES = {
    "layers": "Lenses by layer",
    "early-guesses": "Top tokens by frequency, and how many are revised",
    "transfer": "Translators on the states of other layers",
    "drift": "Spearman correlation of transfer penalty and similarity of layers",
    "layer-pairs": "How alike layers are",
    "layer-spread": "How the variance of a layer is spread",
    "profile-classifiers": "Classes told from entropy profiles, documents held out",
    "profiles": "Entropy by class and layer",
    "passage": "Prediction trajectories of the passage",
}
MOST_SHOWN = {"transfer": 0, "profiles": 0, "passage": 0, "layer-pairs": 21}
"""Most rows in a terminal, of tables that pages show whole."""
HEADINGS = {
    "layers": {
        "lens": "lens",
        "layer": "layer",
        "n": "n",
        "perplexity": "perplexity",
        "cross_entropy": "cross-entropy (nats)",
        "bits": "bits per token",
        "kl": "KL (nats)",
        "marginal_bias_bits": "marginal bias (bits)",
        "echo": "input echo",
        "echo_excess": "more than the model",
        "agreement": "top-1 agreement",
        "entropy": "entropy (nats)",
        "rank": "median rank",
    },
    "early-guesses": {
        "lens": "lens",
        "layer": "layer",
        "bucket": "frequency rank",
        "n": "n",
        "share": "share of guesses",
        "model_share": "of the model",
        "text_share": "of the text",
        "revised": "revised",
    },
    "transfer": {
        "lens": "lens",
        "translator": "translator of",
        "layer": "on layer",
        "n": "n",
        "kl": "KL to the model (nats)",
        "penalty": "penalty (nats)",
        "cross_entropy_penalty": "cross-entropy penalty (nats)",
        "kl_to_native": "KL to the native lens (nats)",
    },
    "drift": {
        "lens": "lens",
        "similarity": "similarity",
        "layers": "layers",
        "given": "given",
        "pairs": "pairs",
        "correlation": "rho",
        "p_value": "p (permuted layers)",
    },
    "layer-pairs": {
        "layer": "layer",
        "other": "and",
        "similarity": "covariance similarity",
        "similarity_without_largest": "without largest coordinates",
        "cosine_overlap": "overlap of spans",
        "cosine_chance": "chance",
        "coordinate_overlap": "overlap of coordinates",
        "coordinate_chance": "random directions",
    },
    "layer-spread": {
        "layer": "layer",
        "n": "n",
        "variance": "variance",
        "effective_dimension": "effective dimension",
        "largest_direction": "largest direction",
        "largest_coordinate": "largest coordinate",
    },
    "profile-classifiers": {
        "lens": "lens",
        "classifier": "classifier",
        "features": "entropy of",
        "n": "n",
        "classes": "classes",
        "accuracy": "accuracy",
        "majority": "largest class",
        "permuted": "permuted labels",
        "permuted_high": "highest permuted",
    },
    "profiles": {
        "lens": "lens",
        "label": "class",
        "layer": "layer",
        "n": "n",
        "entropy": "entropy (nats)",
    },
    "passage": {
        "lens": "lens",
        "index": "index",
        "token": "token",
        "target": "model says",
        "layer": "layer",
        "top": "lens says",
        "kl": "KL (nats)",
        "entropy": "entropy (nats)",
        "rank": "rank",
        "tracked_rank": "rank of the tracked token",
    },
}


def quality_tables(rows: Mapping[str, Sequence[Any]]) -> list[StudyTable]:
    """The tables that have rows, by name."""
    return [
        StudyTable(name, TITLES[name], HEADINGS[name], found, MOST_SHOWN.get(name, 40))
        for name, found in rows.items()
        if found
    ]
