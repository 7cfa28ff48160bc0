"""ExpertWeaver: gate activation patterns say what to share and what to route (arXiv 2602.15521v1).

From the gate profiles a_ij = mean over the tokens of sample j of ``|act(gate x)|_i``, layer by layer:

1. configuration: CV_i = std_i / (mean_i + eps) over the samples; r_l = share of neurons with CV > tau; shared share
   alpha_l = alpha_max - (alpha_max - alpha_min) r_l, in whole experts N_se; the routed ones that run are k - N_se, so
   every layer runs k of N_e experts but layers differ in what is shared (sec. 3.2);
2. shared block: the neurons with the highest mean activation (sec. 3.3);
3. routed experts: balanced K-means on the profiles of the rest, squared L2 (sec. 3.3, App. I);
4. router: a linear map, row e the mean gate row of expert e; the top experts are added with weight 1 (sec. 3.3).

No code is published and v1 leaves points open. The readings taken here, each a parameter (docs/methods.md 2.3):
D1 the absolute activation (``signal``); D2 variation over samples, or over the means of ``tasks``; D3 population
standard deviation, ``eps`` 1e-6; D4 "highest absolute average" = |mean of the profile|; D5 profiles clustered as they
are (``scaling``); D6 all (neuron, centroid) pairs in order of distance (``assignment``); D7 random rows as first
centroids, until nothing moves or ``max_iters`` (``init``, ``seed``); D8 the router has a row for each routed expert
only; D9 one pass over the dense model; D10 N_se above k - 1 is cut to it (``clip``); D11
softmax over all routed logits when downcycling (``rescale``); D12 fixed windows, whose excluded
tokens count in no mean (``calibration.GateSampling``). Averages over longer samples vary less, so tau is tied to the
sample length: ``tau_percentile`` takes it from the CVs of all layers instead.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from moedge import MoEdgeError
from moedge._progress import reported
from moedge.convert import adapters, partition
from moedge.convert.methods.layers import Layers, measured
from moedge.convert.plan import CombineRule, LayerPlan, RouterPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moedge._progress import Progress
    from moedge.convert.calibration import LayerStatistics


class ExpertWeaverParams(BaseModel):
    """Typed parameters with the paper's defaults (N_e 64, alpha 0.2 to 0.7, tau 0.6); k = 48 is 25% sparsity.

    ``k`` counts the experts that run for a token, the shared ones too. ``tasks`` gives each sample the number of its
    task. ``clip="k"`` allows layers whose whole budget is shared: they have no router, and their rest is pruned.

    ``downcycle`` makes a start for continued pre-training (sec. 4): the same shared size in every layer, few experts
    active, and a softmax gate. Its defaults are E64-A14-S2 of the paper: k 16, alpha_min and alpha_max 2 / experts.
    Expert e then weighs its softmax probability over all routed experts, as printed, which makes the routed part small
    at first (D11); ``rescale="selected"`` divides by the sum over the selected ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    experts: int = Field(default=64, ge=2)
    """Experts that a layer is cut into, N_e."""
    k: int = Field(default=48, ge=1)
    """Experts that run for a token, the shared ones too."""
    alpha_min: float = Field(default=0.2, ge=0, le=1)
    """Share of the experts that a layer shares when every neuron's activation varies."""
    alpha_max: float = Field(default=0.7, ge=0, le=1)
    """The same when none varies; layers lie between."""
    tau: float = Field(default=0.6, ge=0)
    """A neuron varies when std / mean over the samples exceeds this."""
    tau_percentile: float | None = Field(default=None, ge=0, le=100)
    """Take tau from this percentile of all layers instead: it depends on the sample length."""
    eps: float = Field(default=1e-6, gt=0)
    """Added to the mean before dividing by it."""
    signal: Literal["abs", "signed"] = "abs"
    """Gate activation of a sample: mean of its absolute value, or of the value."""
    tasks: Annotated[tuple[int, ...], Strict(False)] | None = None  # a YAML list will do
    """Number of each window's task: variation is then over task means."""
    scaling: Literal["none", "l2", "zscore"] = "none"
    """Of the profiles before clustering."""
    assignment: Literal["greedy", "lap"] = "greedy"
    """Of neurons to clusters: pairs in order of distance, or the optimum."""
    init: Literal["random", "k-means++"] = "random"
    """First centroids."""
    max_iters: int = Field(default=50, ge=1)
    """Most rounds of balanced K-means."""
    seed: int = Field(default=0, ge=0)
    """Of the first centroids."""
    clip: Literal["k-1", "k"] = "k-1"
    """``k`` allows layers whose whole budget is shared: they have no router, and their rest is pruned."""
    padding: partition.Padding = "none"
    """``uneven`` allows any width: experts then differ by one neuron."""
    downcycle: bool = False
    """Start for continued pre-training: few active experts behind a softmax gate (k 16, alpha 2 / experts)."""
    rescale: Literal["none", "selected"] = "none"
    """With downcycle: divide the weights by the sum over the selected experts."""

    @model_validator(mode="before")
    @classmethod
    def _downcycle_defaults(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("downcycle") is not True:
            return given
        share = 2 / given["experts"] if isinstance(given.get("experts"), int) and given["experts"] > 0 else 2 / 64
        return {"k": 16, "alpha_min": given.get("alpha_max", share), "alpha_max": given.get("alpha_min", share)} | given

    @model_validator(mode="after")
    def _fits(self) -> ExpertWeaverParams:
        if self.downcycle and self.alpha_min != self.alpha_max:
            raise ValueError("alpha_min: downcycling shares as much in every layer; set it to alpha_max.")
        if self.rescale != "none" and not self.downcycle:
            raise ValueError("rescale: belongs to downcycle; unit weights need none.")
        if self.k > self.experts:
            raise ValueError(f"k: {self.k} exceeds experts = {self.experts}.")
        if self.alpha_min > self.alpha_max:
            raise ValueError(f"alpha_min: {self.alpha_min} exceeds alpha_max = {self.alpha_max}.")
        return self


def plan(
    statistics: list[LayerStatistics],
    model: PreTrainedModel,
    params: ExpertWeaverParams,
    progress: Progress | None = None,
) -> Layers:
    """Plan every FFN; the vectors r_l and N_se, tau and any warning go into ``provenance["expertweaver"]``.

    Args:
        statistics: one entry a layer, collected with a gate profile of this ``signal`` and at least two samples.
        model: the dense parent (router rows are means of its gate rows).

    Raises:
        MoEdgeError: statistics of another model or without the profile, or a width that the experts do not divide.
    """
    pairs = measured(model, statistics)
    profiles = [_profile(*pair, params) for pair in pairs]
    variations = [variation(profile, params.tasks, params.eps) for profile in profiles]
    pooled = params.tau_percentile
    tau = params.tau if pooled is None else float(np.percentile(np.concatenate(variations), pooled))
    shares = [float(np.mean(variation > tau)) for variation in variations]
    parts = list(zip((block for block, _ in pairs), profiles, shares, strict=True))
    layers = [_layer(*part, params) for part in reported(parts, progress)]
    sizes = [layer.report["n_se"] for layer in layers]
    note = {"tau": tau, "r_l": [round(share, 6) for share in shares], "n_se": sizes}
    if params.downcycle:
        note["training"] = {"balance": "loss", "balance_weight": 0.01}  # sec. 4; `moedge finetune` takes it up
    if text := bound_warning(sizes, params, tau):
        note["warning"] = text
        warnings.warn(text, stacklevel=3)  # to the caller of `methods.convert`
    return Layers(layers, provenance={"expertweaver": note})


def _profile(block: adapters.FFN, statistics: LayerStatistics, settings: ExpertWeaverParams) -> np.ndarray:
    """Return the layer's gate profile, float64 [M, D], after checking that it is the one asked for."""
    sampling, profile, tasks = statistics.gate_sampling, statistics.gate_profile, settings.tasks
    if profile is None or sampling is None:
        raise MoEdgeError(f"Statistics of {block.name} have no gate profile; calibrate again with one.")
    if sampling.signal != settings.signal:
        raise MoEdgeError(
            f"Statistics of {block.name} have a gate profile of signal={sampling.signal}; the plan needs "
            f"signal={settings.signal}. Calibrate again."
        )
    samples = len(profile)
    if tasks is not None and len(tasks) != samples:
        raise MoEdgeError(f"tasks names {len(tasks)} samples, the statistics have {samples}; give one task a sample.")
    if (samples if tasks is None else len(set(tasks))) < 2:
        raise MoEdgeError(
            "ExpertWeaver needs 2 samples or tasks at least, to see variation; calibrate on more windows."
        )
    return profile.astype(np.float64)


def variation(profile: np.ndarray, tasks: tuple[int, ...] | None, eps: float) -> np.ndarray:
    """Return the coefficient of variation of each neuron, float64 [D], over samples or over the means of tasks.

    The divisor is |mean| + eps: with ``signal="signed"`` means can be negative, which would hide the neuron.
    """
    rows = profile
    if tasks is not None:
        labels = np.asarray(tasks)
        rows = np.stack([profile[labels == task].mean(axis=0) for task in np.unique(labels)])
    result: np.ndarray = rows.std(axis=0) / (np.abs(rows.mean(axis=0)) + eps)
    return result


def shared_experts(share: float, width: int, settings: ExpertWeaverParams) -> tuple[int, int]:
    """Return (N_se, N_se before it is cut to k) of a layer in which ``share`` of the neurons vary (sec. 3.2)."""
    alpha = settings.alpha_max - (settings.alpha_max - settings.alpha_min) * share
    wanted = round(round(alpha * width) / (width / settings.experts))
    return min(wanted, settings.k - (settings.clip == "k-1")), wanted


def bound_warning(sizes: list[int], settings: ExpertWeaverParams, tau: float) -> str:
    """Return a sentence when no layer's N_se lies inside its bounds, so nothing was adapted; else an empty string."""
    if settings.alpha_min == settings.alpha_max:
        return ""  # a uniform share was asked for
    limit = settings.k - (settings.clip == "k-1")
    wanted = round(settings.alpha_max * settings.experts)
    low, high = min(round(settings.alpha_min * settings.experts), limit), min(wanted, limit)
    if any(low < size < high for size in sizes):
        return ""
    at_high = sum(size >= high for size in sizes)
    cut = limit < wanted and at_high == len(sizes)
    return (
        f"ExpertWeaver: every layer hits a bound of its shared size ({at_high} of {len(sizes)} the upper, N_se={high}; "
        f"{len(sizes) - at_high} the lower, N_se={low}), so nothing is adapted to the layer (tau={tau:.3g}, k="
        f"{settings.k}). "
        + ("Lower alpha_max." if cut else "Set tau_percentile, or calibrate on samples of another length.")
    )


def _layer(block: adapters.FFN, profile: np.ndarray, share: float, settings: ExpertWeaverParams) -> LayerPlan:
    width = profile.shape[1]
    n_se, wanted = shared_experts(share, width, settings)
    order = np.argsort(-np.abs(profile.mean(axis=0)), kind="stable").astype(np.int32)
    report: dict[str, Any] = {"r_l": round(share, 6), "n_se": n_se, "n_se_before_clip": wanted}
    if n_se == settings.k:
        shared_width = round(width * n_se / settings.experts)
        return LayerPlan(np.sort(order[:shared_width]), [], 0, report=report)
    shared_width, widths = partition.group_widths(width, n_se, settings.experts, settings.padding)
    rest = np.sort(order[shared_width:])
    generator = np.random.default_rng([settings.seed, block.index])
    labels, iterations, converged = cluster(profile[:, rest].T, widths, settings, generator)
    experts = [rest[labels == e] for e in range(len(widths))]
    gate = block.gate.float().cpu().numpy()
    router = {"weight": np.stack([gate[e].mean(axis=0, dtype=np.float64) for e in experts]).astype(np.float32)}
    if block.gate_bias is not None:
        bias = block.gate_bias.double().cpu().numpy()
        router["bias"] = np.array([bias[expert].mean() for expert in experts], dtype=np.float32)
    return LayerPlan(
        shared=np.sort(order[:shared_width]),
        experts=experts,
        top_k=settings.k - n_se,
        router=RouterPlan("linear", router, {"bias": True} if "bias" in router else {}),
        combine=_combine(settings),
        selection_bias=np.zeros(len(widths), dtype=np.float32),
        report={**report, "iterations": iterations, "converged": converged},
    )


def _combine(settings: ExpertWeaverParams) -> CombineRule:
    if not settings.downcycle:
        return "unit"
    return "probability" if settings.rescale == "none" else "softmax"


def cluster(
    points: np.ndarray, widths: list[int], settings: ExpertWeaverParams, generator: np.random.Generator
) -> tuple[np.ndarray, int, bool]:
    """Balanced K-means on profiles [n, M]: return (group of each point int32 [n], iterations, converged)."""
    if settings.scaling == "zscore":
        points = points - points.mean(axis=1, keepdims=True)
    if settings.scaling != "none":  # after centring, length and standard deviation differ by a constant factor
        points = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), settings.eps)
    assign = partition.assign_greedy if settings.assignment == "greedy" else partition.assign_balanced
    centroids = points[_first(points, len(widths), settings.init, generator)]
    labels = np.full(len(points), -1, dtype=np.int32)
    for iteration in range(1, settings.max_iters + 1):
        updated = assign(partition.squared_distances(points, centroids), widths)
        if np.array_equal(updated, labels):
            return labels, iteration, True
        labels = updated
        centroids = np.stack([points[labels == e].mean(axis=0) for e in range(len(widths))])
    return labels, settings.max_iters, False


def _first(points: np.ndarray, groups: int, init: str, generator: np.random.Generator) -> np.ndarray:
    """Choose the points that are the first centroids: at random, or far apart (k-means++)."""
    if init == "random":
        return generator.choice(len(points), groups, replace=False)
    chosen = [int(generator.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < groups:
        nearest = np.minimum(nearest, partition.squared_distances(points, points[chosen[-1:]])[:, 0])
        total = nearest.sum()
        chosen.append(int(generator.choice(len(points), p=nearest / total if total else None)))
    return np.asarray(chosen)
