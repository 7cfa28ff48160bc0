"""All FFNs of a model by MoEdge's own method, one after the other; the package says what the steps are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moedge.convert import adapters
from moedge.convert.methods.layers import Layers

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.methods.moedge.params import MoEdgeParams


def plan(
    token_windows: np.ndarray, model: PreTrainedModel, params: MoEdgeParams, progress: Progress | None = None
) -> Layers:
    """Plan every FFN.

    Args:
        token_windows: calibration ids, int64 [N, L], N at least 2; one window in five is held out to choose settings.
        model: the dense parent; it is not changed.
        progress: called with (layers done, layers).

    Raises:
        MoEdgeError: a width that does not divide, too few windows, or a model without GLU FFNs.
    """
    from moedge.convert import modeling, partition, streaming
    from moedge.convert.methods.moedge.layer import make_layer

    # What cannot be done is refused before the budget's passes, which take minutes.
    streaming.held_out(len(token_windows))
    stream = params.fit_to == "stream"
    if stream:
        streaming.check_stream(model)
    blocks = adapters.ffns(model)
    for one in (params, *params.variants()):
        partition.group_widths(blocks[0].width, one.shared, one.experts, one.padding)
    active = [params.active] * len(blocks)
    if params.budget == "measured":
        active = _measured(model, token_windows, params)
    layers = []
    for tokens in streaming.walk(model, token_windows, dense_stream=stream, progress=progress):
        here = params.model_copy(update={"active": active[tokens.block.index]})
        tried = [make_layer(tokens, one) for one in (here, *here.variants())]
        layer = min(tried, key=lambda one: one.report["held_out_error"])
        layers.append(layer)
        if params.sequential:
            tokens.replacement = modeling.build_ffn(tokens.block, layer)
    return Layers(layers)


def _measured(model: PreTrainedModel, token_windows: np.ndarray, params: MoEdgeParams) -> list[int]:
    """Return the active experts of each layer."""
    from moedge.convert import budgets, partition

    curves = budgets.calibration_curves(model, token_windows, params.budget_tokens)
    shared, widths = partition.group_widths(len(curves[0]) - 1, params.shared, params.experts, params.padding)
    return budgets.spread(curves, shared, widths, params.active, params.most_skipped)
