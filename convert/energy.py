"""Cut neurons into balanced experts so that the experts a token selects hold as much of its energy as possible.

The energy of neuron i at a token is ``(h_i - mean_i)^2 * |down_i|^2``: the squared error of replacing it by its mean,
neurons taken as uncorrelated. Its mean over tokens is FLAP's importance. q tokens, n neurons, E experts, k selected.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from moedge.convert.closed_form import select
from moedge.convert.partition import assign_transport


def by_expert(energy: torch.Tensor, labels: np.ndarray, experts: int) -> torch.Tensor:
    """Return the energy of each expert, [q, E], from that of its neurons [q, n]."""
    member = F.one_hot(torch.from_numpy(labels.astype(np.int64)), experts).to(energy)
    return energy @ member


def reassign(energy: torch.Tensor, mask: torch.Tensor, widths: list[int]) -> tuple[np.ndarray, float]:
    """Return (labels int32 [n], captured energy) of the best balanced assignment for given selections.

    A neuron put in expert e gains its energy at the tokens that select e: ``energy^T mask`` [n, E], one product.

    Args:
        energy: [q, n]. mask: 1 where a token selects an expert, [q, E]. widths: neurons of each expert.
    """
    gain = (energy.T @ mask).double().cpu().numpy()
    labels = assign_transport(-gain, widths)
    return labels, float(gain[np.arange(len(labels)), labels].sum())


@dataclass
class Ascent:
    """Result of :func:`ascend`: ``labels`` int32 [n]; ``objective``: captured energy after each half step."""

    labels: np.ndarray
    objective: list[float]


TOLERANCE = 1e-4
""":func:`ascend` stops when an iteration gains less than this share."""


def ascend(energy: torch.Tensor, labels: np.ndarray, widths: list[int], top_k: int, iterations: int) -> Ascent:
    """Coordinate ascent on the captured energy, ``sum over tokens of the energy in the k selected experts``.

    Each iteration selects the top-k experts of every token by energy (best selection for this partition), then assigns
    the neurons again (best balanced partition for this selection); neither step can lower the objective.
    """
    objective: list[float] = []
    for _ in range(iterations + 1):
        energies = by_expert(energy, labels, len(widths))
        mask = select(energies, top_k)
        objective.append(float((mask * energies).sum(dtype=torch.float64)))
        if len(objective) > iterations * 2 or (len(objective) > 2 and objective[-1] < objective[-3] * (1 + TOLERANCE)):
            break
        labels, captured = reassign(energy, mask, widths)
        objective.append(captured)
    return Ascent(labels, objective)


def by_correlation(energy: torch.Tensor, widths: list[int]) -> np.ndarray:
    """Return labels int32 [n] that group neurons whose amplitudes (roots of energy) rise and fall together.

    Balanced spherical K-means, started from the neurons with the most energy; a start for :func:`ascend`.
    """
    amplitude = energy.sqrt()
    amplitude = F.normalize(amplitude - amplitude.mean(dim=0), dim=0)
    centroids = amplitude[:, energy.sum(dim=0).argsort(descending=True, stable=True)[: len(widths)]]
    labels = np.zeros(0, dtype=np.int32)
    for _ in range(5):
        updated = assign_transport(-(amplitude.T @ centroids).double().cpu().numpy(), widths)
        if np.array_equal(updated, labels):
            break
        labels = updated
        centroids = F.normalize(by_expert(amplitude, labels, len(widths)), dim=0)
    return labels
