"""MoEdge's own method: energy partition, closed-form router, mean compensation, least-squares refit.

What a token loses when neuron i is replaced by its mean is its energy ``(h_i - mean_i)^2 * |down_i|^2`` (neurons taken
as uncorrelated); FLAP (arXiv 2312.11983) ranks neurons by the mean of it. Everything here spends or predicts energy:

1. shared block: the neurons with the highest mean energy;
2. experts: the balanced partition whose top-k experts capture the most energy (:mod:`moedge.convert.energy`), then a
   few rounds with the selections of a fitted router in place of the best ones, so that experts are predictable;
3. router: ridge regression from the FFN input to each expert's energy or output norm (docs/methods.md 6);
4. compensation: an expert that is left out contributes its mean output over the tokens that leave it out;
5. refit: new down projections and compensations by least squares under the actual routing, anchored to the old ones.

Layers may differ: ``budget: measured`` spreads the active experts over them by what skipping costs the model
(:mod:`moedge.convert.budgets`), ``layouts`` lets each layer choose how many experts it has and shares.

Each step is a switch of :class:`MoEdgeParams`; settings within a step are chosen on held-out calibration tokens.
The work on one layer is in :mod:`moedge.convert.methods.moedge.layer`.
"""

from __future__ import annotations

from moedge.convert.methods.moedge.params import MoEdgeParams
from moedge.convert.methods.moedge.plan import plan

__all__ = ["MoEdgeParams", "plan"]
