"""Text -> token windows -> streamed activation statistics of every FFN.

q tokens, H hidden, D neurons, M samples. The model runs layer by layer, so hidden states [q, H] of all tokens are held
before and behind one layer. The matrix of activations [q, D] is never kept: what a layer leaves behind is
the indices of the K_a largest ``|h|`` of each token, the running mean and variance of h and, when asked for, one mean
gate activation for each sample and neuron.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from moedge import MoEdgeError
from moedge._files import canonical_json, sha256_file
from moedge.convert import processes
from moedge.convert.sources import assets

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from moedge._progress import Progress

Profile = Literal["raw", "normalised"]
Signal = Literal["abs", "signed"]

STATISTICS_SCHEMA = "moedge.statistics/1"
"""Gate profiles are optional in it; a file without them is what it was before they existed."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_DOC = re.compile(r"<doc id=\"(?P<id>[^\"]*)\"[^>]*>\n?(?P<text>.*?)</doc>", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """One document; ``id`` is its id in the file, or its line number."""

    id: str
    text: str


@dataclass(frozen=True)
class TextSet:
    """Documents in file order; ``sha256`` is the hash of the file they came from."""

    name: str
    documents: list[Document]
    sha256: str


def read_text(spec: str) -> TextSet:
    """Read documents from ``asset:NAME`` or a text file.

    A file of ``<doc id=".." ...>`` entries is split at them; a .jsonl file holds ``{"text": .., "id": ..}`` lines; any
    other file is one document a line, blank lines skipped. An asset may say that several lines are one document, or
    which fields of a JSON list are its text.

    Raises:
        MoEdgeError: missing file, not UTF-8, bad JSON line or no text.
    """
    asset = assets.find(spec.removeprefix("asset:")) if spec.startswith("asset:") else None
    path = assets.fetch(asset.name) if asset else Path(spec).expanduser()
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")  # a byte order mark
    except OSError as error:
        raise MoEdgeError(f"Cannot read the text file {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise MoEdgeError(f"{path} is not UTF-8 (byte {error.start}); convert it, e.g. with iconv -t utf-8.") from error
    if path.suffix == ".jsonl":
        documents = _json_lines(path, text)
    elif text.lstrip().startswith("<doc id="):
        documents = [Document(match["id"], match["text"].strip()) for match in _DOC.finditer(text)]
    elif asset and path.suffix == ".json":
        entries = json.loads(text)
        documents = [Document(str(i), "\n".join(str(e[name]) for name in asset.fields)) for i, e in enumerate(entries)]
    elif asset and asset.lines > 1:
        rows = lines(text)
        parts = ["\n".join(rows[start : start + asset.lines]) for start in range(0, len(rows), asset.lines)]
        documents = [Document(str(i), part) for i, part in enumerate(parts) if part.strip()]
    else:
        documents = [Document(str(i), line) for i, line in enumerate(lines(text)) if line.strip()]
    if not documents:
        raise MoEdgeError(f"{path} holds no text.")
    return TextSet(asset.name if asset else path.stem, documents, sha256_file(path))


def lines(text: str) -> list[str]:
    r"""Split at ``\n``, ``\r\n`` and a lone ``\r``, as Python reads text files.

    ``str.splitlines`` also splits at form feeds, U+0085, U+2028 and others, which web text has inside its lines.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def _json_lines(path: Path, text: str) -> list[Document]:
    documents = []
    for number, line in enumerate(text.split("\n")):  # JSON takes a \r before it for a space
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            body, name = entry["text"], str(entry.get("id", number))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MoEdgeError(f'{path} line {number + 1} is not a JSON object with a "text" key.') from error
        if not isinstance(body, str):
            raise MoEdgeError(f'{path} line {number + 1}: "text" is {json.dumps(body)[:40]}, not a string.')
        if _SURROGATE.search(body):
            raise MoEdgeError(f'{path} line {number + 1}: "text" holds half of a character (a lone surrogate).')
        documents.append(Document(name, body))
    return documents


def split(text: TextSet, every: int = 10) -> tuple[TextSet, TextSet]:
    """Return (calibration, held-out): documents whose integer id (else position) is 0 modulo ``every`` are held out."""
    numbered = all(document.id.isdecimal() for document in text.documents)
    parts: tuple[list[Document], list[Document]] = ([], [])
    for position, document in enumerate(text.documents):
        parts[(int(document.id) if numbered else position) % every == 0].append(document)
    return TextSet(text.name, parts[0], text.sha256), TextSet(text.name, parts[1], text.sha256)


def starts_with_bos(tokenizer: PreTrainedTokenizerBase, asked: bool | None = None) -> bool:
    """Whether windows start with the BOS token: as ``asked``; None: where the tokenizer starts every text with it.

    A model that was trained without the token (Qwen's tokenizers name one and never add it) does worse behind it, and
    one that was trained with it (Gemma, Llama) does worse without.
    """
    if asked is not None:
        return asked
    token = tokenizer.bos_token_id
    return token is not None and list(tokenizer("a", verbose=False)["input_ids"][:1]) == [token]


def windows(
    tokenizer: PreTrainedTokenizerBase, text: TextSet, length: int, count: int, *, bos: bool | None, name: str
) -> np.ndarray:
    """Cut the concatenated documents into windows, int64 [count, length].

    Args:
        length: ids in a window, the BOS token included.
        bos: put the BOS token in front of every window; None: as the tokenizer does (:func:`starts_with_bos`).
        name: what the text is for, used in the error message.

    Raises:
        MoEdgeError: the tokenizer has no BOS token, or the text is too short.
    """
    bos = starts_with_bos(tokenizer, bos)
    if bos and tokenizer.bos_token_id is None:
        raise MoEdgeError(f"The tokenizer has no BOS token; take bos: true away for the {name} text.")
    body = length - bos
    needed = body * count
    ids = joined(tokenizer, text, needed)
    if len(ids) < needed:
        raise MoEdgeError(
            f"The {name} text {text.name!r} has {len(ids):,} tokens; {count} windows of {body} need {needed:,}. "
            "Give more text or ask for fewer or shorter windows."
        )
    return cut(ids, count, length, tokenizer.bos_token_id if bos else None)


def joined(tokenizer: PreTrainedTokenizerBase, text: TextSet, enough: int | None = None) -> np.ndarray:
    """Ids int64 [N] of the documents, each with a newline behind it; no further document once ``enough`` are there."""
    parts, total = [np.zeros(0, dtype=np.int64)], 0
    for document in text.documents:
        ids = tokenizer(document.text + "\n", add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(np.asarray(ids, dtype=np.int64))
        total += len(ids)
        if enough is not None and total >= enough:
            break
    return np.concatenate(parts)


def cut(ids: np.ndarray, count: int, length: int, bos: int | None) -> np.ndarray:
    """The first windows, int64 [count, length], of ids [N]; each starts with the token ``bos``, if there is one."""
    body = length - (bos is not None)
    windows = ids[: count * body].reshape(count, body)
    return windows if bos is None else np.insert(windows, 0, bos, axis=1)


@dataclass(frozen=True)
class GateSampling:
    """How gate profiles are made: the mean over a sample's tokens of ``|act(gate x)|`` (ExpertWeaver sec. 3.1).

    ``sample`` consecutive positions of a window are one sample and must divide its length; None: a window is a sample.
    ``signal`` is ``abs``, or ``signed`` for the mean without the absolute value. Tokens whose id is in ``exclude``
    count in no mean: name the BOS token, an attention sink whose activations are far from any other token's.
    """

    sample: int | None = None
    signal: Signal = "abs"
    exclude: tuple[int, ...] = ()


@dataclass
class LayerStatistics:
    """What one FFN leaves behind after calibration.

    ``top_neurons`` uint16 or int32 [q, K_a], ascending within a row: the ATopK marks. ``mean`` and ``variance``
    float32 [D] of the raw h over all q tokens (population variance). ``gate_profile`` float32 [M, D], if it was asked
    for, was made as ``gate_sampling`` says.
    """

    top_neurons: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    profile: Profile = "raw"
    gate_profile: np.ndarray | None = None
    gate_sampling: GateSampling | None = None

    @property
    def tokens(self) -> int:
        """q."""
        return int(self.top_neurons.shape[0])

    @property
    def k_a(self) -> int:
        """Marks per token."""
        return int(self.top_neurons.shape[1])

    @property
    def width(self) -> int:
        """D."""
        return int(self.mean.shape[0])

    @property
    def counts(self) -> np.ndarray:
        """Tokens that marked each neuron, int64 [D]; divided by q it is CMoE's activation rate mu."""
        return np.bincount(self.top_neurons.reshape(-1), minlength=self.width)


def collect(
    model: PreTrainedModel,
    token_windows: np.ndarray,
    *,
    k_a: int,
    batch_size: int = 1,
    profile: Profile = "raw",
    gate: GateSampling | None = None,
    progress: Progress | None = None,
) -> list[LayerStatistics]:
    """Run calibration windows through the dense model and collect the statistics of every FFN.

    Args:
        token_windows: int64 [count, length].
        k_a: marks per token (CMoE's K_a, 10 in the paper).
        profile: what is marked: ``raw`` the true h (the paper), or ``normalised`` h of L2-normalised x and
            L2-normalised rows of gate and up (CMoE's released code). Mean and variance are always of the raw h.
        gate: also make gate profiles, in this way.
        batch_size: windows in one call of a layer.
        progress: called with (layers done, layers).

    Raises:
        MoEdgeError: the model has no GLU FFN, ``k_a`` exceeds the FFN width, or the windows cannot be cut into samples.
    """
    import torch

    from moedge.convert import adapters, offload, streaming

    blocks = adapters.ffns(model)
    token_windows = token_windows[processes.span(len(token_windows))]
    weights = _sample_weights(token_windows, gate) if gate else None
    results = []
    with torch.inference_mode():
        runner = streaming.Runner(model, token_windows)
        states = runner.embed()
        for block in blocks:
            stream = _Stream(block, int(token_windows.size), k_a, profile)
            watched = _GateStream(block, gate, weights) if gate and weights is not None else None
            with offload.loaded(runner.layers[block.index]), streaming.hooked(*_hooks(stream, watched)):
                states = runner.forward(block, states, batch_size)
            results.append(stream.result())
            if watched:
                means = processes.joined(torch.from_numpy(np.concatenate(watched.means))).numpy()
                results[-1].gate_profile, results[-1].gate_sampling = means, gate
            if progress:
                progress(len(results), len(blocks))
    return results


def _hooks(stream: _Stream, watched: _GateStream | None) -> list[Any]:
    """Let the FFN of one layer tell what it does; return the handles that end it."""
    module = stream.block.module
    handles = [watched.block.gate_module.register_forward_hook(watched.on_gate)] if watched else []
    handles.append(module.get_submodule("down_proj").register_forward_pre_hook(stream.on_hidden))
    if stream.profile == "normalised":
        handles.append(module.register_forward_pre_hook(stream.on_input))
    return handles


def _sample_weights(token_windows: np.ndarray, gate: GateSampling) -> np.ndarray:
    """Return the weight of every token in the mean of its sample, float32 [count, samples in a window, sample].

    Raises:
        MoEdgeError: the sample length does not divide the window, or a sample has only excluded tokens.
    """
    count, length = token_windows.shape
    sample = gate.sample or length
    if length % sample:
        raise MoEdgeError(f"A window of {length} tokens cannot be cut into samples of {sample}; choose a divisor.")
    kept = ~np.isin(token_windows, gate.exclude).reshape(count, -1, sample)
    counted = kept.sum(axis=-1, keepdims=True)
    if not counted.all():
        raise MoEdgeError("A calibration sample has only excluded tokens; exclude fewer or make samples longer.")
    return (kept / counted).astype(np.float32)


class _GateStream:
    """Collects one layer's gate profile, one row a sample, from the outputs of its gate projection."""

    def __init__(self, block: Any, gate: GateSampling, weights: np.ndarray) -> None:
        self.block, self.signed, self.weights = block, gate.signal == "signed", weights
        self.means: list[np.ndarray] = []
        self.windows = 0

    def on_gate(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        import torch

        from moedge.convert.ops import activate

        active = activate(self.block.gate_of(output).float(), self.block.hidden_act)
        active = active if self.signed else active.abs()
        weights = torch.from_numpy(self.weights[self.windows : self.windows + len(active)]).to(active.device)
        self.windows += len(active)
        samples, sample = weights.shape[0] * weights.shape[1], weights.shape[2]
        means = torch.bmm(weights.reshape(samples, 1, sample), active.reshape(samples, sample, -1))
        self.means.append(means.squeeze(1).cpu().numpy())


class _Stream:
    """Accumulates one layer's statistics from forward pre-hooks."""

    def __init__(self, block: Any, tokens: int, k_a: int, profile: Profile) -> None:
        width = block.width
        if not 1 <= k_a <= width:
            raise MoEdgeError(f"k_a={k_a} must be between 1 and the FFN width {width}.")
        self.block, self.k_a, self.profile = block, k_a, profile
        self.top = np.empty((tokens, k_a), dtype=np.uint16 if width <= 1 << 16 else np.int32)
        self.count = 0
        # Chan's update of mean and sum of squared deviations: no cancellation, unlike sum(h^2) - n mean^2.
        self.mean = np.zeros(width)
        self.deviations = np.zeros(width)

    def on_hidden(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        h = args[0].reshape(-1, args[0].shape[-1]).float()
        if self.profile == "raw":
            self._mark(h, self.count)
        new = h.shape[0]
        wide = h.double()
        mean = wide.mean(dim=0)
        deviations = (wide - mean).square_().sum(dim=0).cpu().numpy()
        shift = mean.cpu().numpy() - self.mean
        total = self.count + new
        self.mean += shift * (new / total)
        self.deviations += deviations + np.square(shift) * (self.count * new / total)
        self.count = total

    def on_input(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        import torch.nn.functional as F

        from moedge.convert.ops import activate

        x = F.normalize(args[0].reshape(-1, args[0].shape[-1]).float(), dim=-1)
        gate, up = (F.normalize(weight.float(), dim=-1) for weight in (self.block.gate, self.block.up))
        self._mark(activate(x @ gate.T, self.block.hidden_act) * (x @ up.T), self.count)

    def _mark(self, h: torch.Tensor, start: int) -> None:
        marked = h.abs().topk(self.k_a, dim=-1).indices.sort(dim=-1).values
        self.top[start : start + h.shape[0]] = marked.cpu().numpy()

    def result(self) -> LayerStatistics:
        """Return the statistics of the tokens of all processes."""
        top, mean, deviations, count = self.top, self.mean, self.deviations, self.count
        if processes.count() > 1:
            import torch

            top = processes.joined(torch.from_numpy(top.astype(np.int32))).numpy().astype(top.dtype)
            count = len(top)
            mean = processes.total(torch.from_numpy(self.mean * self.count)).numpy() / count
            within = deviations + self.count * np.square(self.mean - mean)
            deviations = processes.total(torch.from_numpy(within)).numpy()
        variance = deviations / max(count, 1)
        return LayerStatistics(top, mean.astype(np.float32), variance.astype(np.float32), self.profile)


def save(statistics: list[LayerStatistics], path: Path) -> None:
    """Write statistics as one safetensors file (equal statistics give equal bytes)."""
    from safetensors.numpy import save_file

    gate = statistics[0].gate_sampling
    tensors = {}
    for i, layer in enumerate(statistics):
        for name in _tensor_names(gate):
            tensors[f"layers.{i}.{name}"] = np.ascontiguousarray(getattr(layer, name))
    head: dict[str, Any] = {"schema": STATISTICS_SCHEMA, "profile": statistics[0].profile, "layers": len(statistics)}
    if gate:
        head["gate"] = asdict(gate)
    # One metadata key: safetensors writes several in no fixed order.
    save_file(tensors, path, metadata={"moedge": canonical_json(head).decode()})


def load(path: Path) -> list[LayerStatistics]:
    """Read statistics written by :func:`save`.

    Raises:
        MoEdgeError: missing or damaged file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            head = json.loads(file.metadata()["moedge"])
            given = head.get("gate")
            gate = GateSampling(given["sample"], given["signal"], tuple(given["exclude"])) if given else None
            names = _tensor_names(gate)
            layers = [{name: file.get_tensor(f"layers.{i}.{name}") for name in names} for i in range(head["layers"])]
            profile = head["profile"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MoEdgeError(f"Statistics file {path} is missing or damaged ({error}); calibrate again.") from error
    return [LayerStatistics(**tensors, profile=profile, gate_sampling=gate) for tensors in layers]


def _tensor_names(gate: GateSampling | None) -> tuple[str, ...]:
    return ("top_neurons", "mean", "variance", *(("gate_profile",) if gate else ()))
