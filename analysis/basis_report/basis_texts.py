"""Texts and style sheet of the page on causal bases; basis_page.py puts the numbers in."""

INTRODUCTION = (
    "A lens predicts the model's next token from the residual stream of a layer: it maps the "
    "stream to the last layer and applies the model's head (final norm and unembedding). A causal "
    "basis of the layer (Belrose et al., 2023, Tuned Lens, section 4) is k directions of the "
    "residual stream whose ablation changes the lens's prediction most: it maximises "
    "KL(lens(h) ‖ lens(ablated h)), the mean over positions, where ablation replaces the "
    "coordinates along the directions by those of a reference, the mean of the rows. So its "
    "directions are those that the prediction depends on, whereas principal components (PCA) are "
    "those along which the stream varies. What the lens depends on need not matter to the model: "
    "where an influence in the model is given, the layer was ablated in the model itself and all "
    "later blocks were run again."
)
BASIS_GLOSSARY = {
    "energy": "KL(lens(h) ‖ lens(ablated h)) in nats when one direction alone is ablated, the mean "
    "over the n positions of the fit. The fit chose its directions on these rows.",
    "influence": "The same on held-out positions, which the fit has not seen. In the model: "
    "KL(model ‖ model with the layer ablated), at the same positions as the lens beside it.",
    "span": "All combinations of the first k directions. Its KL is that of ablating the k "
    "directions together; it is not the sum of their influences.",
    "ablation": "The coordinates of a row along the directions are replaced by those of a "
    "reference row. The rest of the row stays.",
    "covariance metric": "Ablation by an oblique projection: what is removed is replaced by its "
    "conditional mean given the rest (LEACE; Belrose et al., 2306.03819), so that ablated rows "
    "stay where rows of the layer are. With the covariance S of the rows, coordinates are read by "
    "W'S^-1/2 and directions written by W'S^1/2, with orthonormal W.",
    "euclidean metric": "Ablation by an orthogonal projection, as in the Tuned Lens paper. It can "
    "find directions of little variance to which the lens reacts and the model does not.",
    "method": "How the fit finds its directions; joint: all k together, for the largest KL of "
    "their span; greedy: one after the other, as in the paper.",
    "PCA": "The first k principal components of the layer, ablated in the same way.",
    "random directions": "k random directions of the same metric: the level of any k directions.",
    "ratio to PCA": "KL of the span of all k directions over that of k principal components.",
    "direction": "Directions are numbered from 0, in the order of the basis.",
    "k": "Number of directions ablated together, the first ones of the basis.",
    "n": "Number of positions: of the fit, or held out.",
    "evaluations": "How often the fit computed its objective over its rows.",
    "tokens promoted, suppressed": "Change of the lens's log-probability, in nats, when rows move "
    "along the direction from one standard deviation below to one above: the mean over random "
    "held-out rows. The sign of a direction is arbitrary.",
    "passages": "Text around held-out positions at which the coordinate is largest or smallest, at "
    "most one per document, with the distance from the reference in standard deviations (sd). The "
    "token whose residual stream was read is marked; the lens predicts the one after it.",
    "best match": "The direction of the previous layer of this page whose coordinate has the "
    "largest |Pearson correlation| r with this one, over the same positions, and the cosine of "
    "the two directions as they are written.",
    "overlap": "Mean squared canonical correlation between the coordinates of this layer and of "
    "the previous one: 1 if one set is a linear function of the other. Chance: the same with "
    "random directions of the previous layer.",
    "nats": "Unit of information with the natural logarithm; 1 nat is 1.44 bits.",
    "95 % interval": "Percentile bootstrap over whole documents, in square brackets and as bands: "
    "what another sample of as many documents would give, for this fit. Empty without two "
    "documents.",
}
MODEL_GLOSSARY = {
    "Spearman": "Rank correlation, over the directions, of their influences in the lens and in the "
    "model.",
    "alignment": "Stimulus-response alignment (Tuned Lens, section 4): cosine, in the Aitchison "
    "geometry, between the change of the lens's prediction and that of the model's when the layer "
    "is replaced at one position by that of another; of the span: when only the coordinates along "
    "the k directions are replaced.",
}
"""Words that only a page with the influence in the model uses."""
SUMMARY_NOTE = (
    "One row per layer, on held-out positions: KL in nats when the span of all k directions is "
    "ablated, with 95 % intervals in brackets. Click a column's name to sort by it."
)
BASIS_STYLE = """
.contents a { display: inline-block; margin: 0 12px 4px 0; color: var(--link); }
.numbers a { color: var(--link); }
.directions { border-collapse: collapse; font-size: 13px; width: 100%; }
.directions th { background: var(--panel); padding: 6px 9px; text-align: left;
  vertical-align: bottom; position: sticky; top: 0; }
.directions td { padding: 8px 9px; vertical-align: top; border-top: 1px solid var(--rule); }
.directions .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.directions th.number { white-space: normal; }
.directions .number { width: 1%; padding: 8px 5px; }
.directions .tokens { min-width: 116px; width: 11%; }
.directions .match { white-space: nowrap; width: 1%; }
.directions .tokens div { display: flex; justify-content: space-between; gap: 10px;
  line-height: 1.35; }
.directions bdi { overflow-wrap: anywhere; white-space: pre-wrap; }
.directions .change, .directions .sd { color: var(--faint); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.passage { display: flex; gap: 8px; margin-bottom: 4px; line-height: 1.35; }
.passage .sd { min-width: 52px; text-align: right; }
.passages hr { border: 0; border-top: 1px dashed var(--rule); margin: 6px 0; }
mark { background: var(--passage); color: inherit; padding: 0 1px; }
"""
