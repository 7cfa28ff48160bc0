"""A toy decoder as real bundles: written by hand with onnx.helper, small enough to check against numpy.

One layer: token + position embedding, causal attention with a KV cache, and a routed FFN in dense-all form. The same
weights are written with both cache kinds, so the two bundles check each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, numpy_helper
from onnx import helper as oh

from moedge._files import hash_tree, write_json

VOCAB, HIDDEN, HEADS, SIZE, EXPERTS, TOP_K, LENGTH = 300, 16, 2, 8, 6, 2, 64

_ROUTE = """
<domain: "moedge", opset_import: ["" : 18]>
Route <top_k, rule> (scores, selection_bias) => (indices, weights) {
    k = Constant <value_int: int = @top_k> ()
    axis = Constant <value_ints = [0]> ()
    k1 = Unsqueeze (k, axis)
    biased = Add (scores, selection_bias)
    best, chosen = TopK <axis = -1, largest = 1, sorted = 1> (biased, k1)
    indices = Cast <to = 6> (chosen)
    ones = Cast <to = 1> (chosen)
    zero = Sub (ones, ones)
    one = Constant <value_float = 1.0> ()
    weights = Add (zero, one)
}"""


def toy_weights(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    shapes = {
        "embed": (VOCAB, HIDDEN),
        "positions": (LENGTH, HIDDEN),
        **dict.fromkeys(("wq", "wk", "wv", "wo"), (HIDDEN, HIDDEN)),
        "router": (HIDDEN, EXPERTS),
        "expert": (EXPERTS, HIDDEN, HIDDEN),
        "head": (HIDDEN, VOCAB),
    }
    weights = {name: generator.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    weights["selection_bias"] = np.zeros(EXPERTS, dtype=np.float32)
    return weights


def toy_logits(weights: dict[str, np.ndarray], ids: np.ndarray, top_k: int = TOP_K) -> tuple[np.ndarray, np.ndarray]:
    """Reference in float64 for one row of ids [S]: logits [S, V] and routes [S, k]."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    x = w["embed"][ids] + w["positions"][: len(ids)]
    q, k, v = ((x @ w[name]).reshape(len(ids), HEADS, SIZE).transpose(1, 0, 2) for name in ("wq", "wk", "wv"))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(SIZE)
    scores = np.where(np.tril(np.ones(scores.shape[1:], dtype=bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    x = x + (p @ v).transpose(1, 0, 2).reshape(len(ids), HIDDEN) @ w["wo"]
    chosen = np.argsort(-(x @ w["router"]), axis=1, kind="stable")[:, :top_k]
    outputs = np.tanh(np.einsum("th,ehi->tei", x, w["expert"]))
    picked = np.take_along_axis(outputs, chosen[:, :, None], 1).sum(1)
    return (x + picked) @ w["head"], chosen.astype(np.int32)


_FRONT = """
    word = Gather <axis = 0> (embed, input_ids)
    place = Gather <axis = 0> (positions, position_ids)
    x = Add (word, place)
    q = MatMul (x, wq)  k = MatMul (x, wk)  v = MatMul (x, wv)
"""
_CONCAT = """
    heads = Constant <value_ints = [0, 0, 2, 8]> ()  flat = Constant <value_ints = [0, 0, 16]> ()
    q4 = Reshape (q, heads)  k4 = Reshape (k, heads)  v4 = Reshape (v, heads)
    qt = Transpose <perm = [0, 2, 1, 3]> (q4)  kt = Transpose <perm = [0, 2, 1, 3]> (k4)
    vt = Transpose <perm = [0, 2, 1, 3]> (v4)
    present_0_key = Concat <axis = 2> (past_0_key, kt)  present_0_value = Concat <axis = 2> (past_0_value, vt)
    keys = Transpose <perm = [0, 1, 3, 2]> (present_0_key)
    raw = MatMul (qt, keys)
    root = Constant <value_float = 0.35355339059327373> ()
    scaled = Mul (raw, root)
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()
    total1 = Shape <start = 1, end = 2> (attention_mask)  new1 = Shape <start = 1, end = 2> (input_ids)
    total = Squeeze (total1)  new = Squeeze (new1)  past = Sub (total, new)
    columns = Range (zero, total, one)  rows = Range (past, total, one)
    last = Constant <value_ints = [-1]> ()
    rows1 = Unsqueeze (rows, last)
    causal = LessOrEqual (columns, rows1)
    alive2 = Cast <to = 9> (attention_mask)
    middle = Constant <value_ints = [1, 2]> ()
    alive = Unsqueeze (alive2, middle)
    visible = And (causal, alive)
    low = Constant <value_float = -1e9> ()
    scores = Where (visible, scaled, low)
    p = Softmax <axis = -1> (scores)
    mixed = MatMul (p, vt_all)
    back = Transpose <perm = [0, 2, 1, 3]> (mixed)
    attended = Reshape (back, flat)
""".replace("vt_all", "present_0_value")
# The kernel takes lengths, not a mask: padding is hidden by a bias, as export/lowering/ort/attention.py does.
_GROUP_QUERY = """
    one = Constant <value_int = 1> ()
    total1 = Shape <start = 1, end = 2> (attention_mask)  new1 = Shape <start = 1, end = 2> (input_ids)
    batch1 = Shape <start = 0, end = 1> (input_ids)
    total64 = Squeeze (total1)
    total = Cast <to = 6> (total64)
    before = Sub (total64, one)
    before32 = Cast <to = 6> (before)
    seqlens = Expand (before32, batch1)
    alive = Cast <to = 9> (attention_mask)
    zero = Constant <value_float = 0.0> ()  low = Constant <value_float = -1e9> ()
    hidden = Where (alive, zero, low)
    middle = Constant <value_ints = [1, 2]> ()  one1 = Constant <value_ints = [1]> ()
    hidden4 = Unsqueeze (hidden, middle)
    shape = Concat <axis = 0> (batch1, one1, new1, total1)
    bias = Expand (hidden4, shape)
    attended, present_0_key, present_0_value = com.microsoft.GroupQueryAttention <num_heads = 2, kv_num_heads = 2>
        (q, k, v, past_0_key, past_0_value, seqlens, total, , , , bias)
"""
_BACK = """
    out = MatMul (attended, wo)
    x1 = Add (x, out)
    rows16 = Constant <value_ints = [-1, 16]> ()
    t = Reshape (x1, rows16)
    route_scores = MatMul (t, router)
    route_indices, route_weights = moedge.Route <top_k: int = 2, rule: string = "unit"> (route_scores, selection_bias)
    depth = Constant <value_ints = [6]> ()  onoff = Constant <value_floats = [0.0, 1.0]> ()
    hit = OneHot <axis = -1> (route_indices, depth, onoff)
    middle1 = Constant <value_ints = [1]> ()
    weights3 = Unsqueeze (route_weights, last1)
    hitw = Mul (hit, weights3)
    gates = ReduceSum <keepdims = 0> (hitw, middle1)
    first = Constant <value_ints = [0]> ()
    t3 = Unsqueeze (t, first)
    inner = MatMul (t3, expert)
    squashed = Tanh (inner)
    gt = Transpose <perm = [1, 0]> (gates)
    gt3 = Unsqueeze (gt, last1)
    picked = Mul (squashed, gt3)
    y = ReduceSum <keepdims = 0> (picked, first)
    t_out = Add (t, y)
    like = Shape (x1)
    x2 = Reshape (t_out, like)
    logits = MatMul (x2, head)
""".replace("route_indices, depth", "indices64, depth").replace(
    "    depth =", "    last1 = Constant <value_ints = [-1]> ()  indices64 = Cast <to = 7> (route_indices)\n    depth ="
)


def toy_model(kind: str, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    middle = _CONCAT if kind == "concat" else _GROUP_QUERY
    cache = "float[B,2,P,8]"
    text = f"""
    <ir_version: 10, opset_import: ["" : 18, "moedge" : 1, "com.microsoft" : 1]>
    toy (int64[B,S] input_ids, int64[B,T] attention_mask, int64[B,S] position_ids,
         {cache} past_0_key, {cache} past_0_value)
     => (float[B,S,{VOCAB}] logits, float[B,2,N,8] present_0_key, float[B,2,N,8] present_0_value)
    {{ {_FRONT} {middle} {_BACK} }}"""
    # The text form has no dots in names; the bundle's names have.
    model = onnx.parser.parse_model(text)
    rename = {
        f"{a}_0_{b}": f"{c}.0.{b}"
        for a, c in (("past", "past_key_values"), ("present", "present"))
        for b in ("key", "value")
    }
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = rename.get(name, name)
    for value in (*model.graph.input, *model.graph.output):
        value.name = rename.get(value.name, value.name)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    model.functions.append(onnx.parser.parse_function(_ROUTE))
    # A shape recorded for k = 2: an engine that changes k must not trip over it.
    model.graph.value_info.append(oh.make_tensor_value_info("route_indices", TensorProto.INT32, ["R", TOP_K]))
    onnx.checker.check_model(model)
    return model


def write_toy_bundle(folder: Path, kind: str = "concat", tap: str = "indices", seed: int = 0) -> dict[str, np.ndarray]:
    """Write a bundle with external data and return its weights."""
    folder.mkdir(parents=True)
    weights = toy_weights(seed)
    onnx.save_model(
        toy_model(kind, weights),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
        convert_attribute=False,
    )
    write_json(folder / "config.json", {"model_type": "toy"})
    write_json(folder / "generation_config.json", {"eos_token_id": [298, 299]})
    toy_tokenizer(folder)
    cache = [f"0.{name}" for name in ("key", "value")]
    manifest: dict[str, Any] = {
        "schema": "moedge.bundle/1",
        "target": "portable" if kind == "concat" else "ort-cpu",
        "kind": "moe",
        "label": "toy",
        "model": {**toy_facts(), "parameters": sum(array.size for array in weights.values())},
        "moe": {
            "plan_sha256": "0" * 64,
            "layers": {"0": {"num_experts": EXPERTS, "top_k": TOP_K, "shared_width": 0, "expert_width": HIDDEN}},
        },
        "io": {
            "model": "model.onnx",
            "inputs": ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in cache)],
            "outputs": ["logits", *(f"present.{name}" for name in cache)],
        },
        "cache": {"kind": kind, "max_length": LENGTH if kind == "shared_buffer" else None},
        "taps": {"0": {"output": f"route_{tap}", "kind": tap, "top_k": TOP_K}},
        "lowering": [],
        "versions": {"onnx": onnx.__version__},
        "parent": None,
        "files": hash_tree(folder),
    }
    write_json(folder / "manifest.json", manifest)
    return weights


def toy_facts() -> dict[str, Any]:
    """The ``model`` section of the toy's manifest."""
    return {
        "model_type": "toy",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_layers": 1,
        "num_attention_heads": HEADS,
        "num_kv_heads": HEADS,
        "head_dim": SIZE,
        "max_position_embeddings": LENGTH,
        "eos_token_ids": [298, 299],
        "bos_token_id": None,
        "pad_token_id": None,
        "dtype": "float32",
    }


def toy_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: one token a byte, so most characters beyond ASCII take several tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<|start|>", "<|end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": template})


@pytest.fixture(scope="session")
def toy_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``concat``, ``shared_buffer`` and ``scores`` (concat, tap of scores): the same weights."""
    root = tmp_path_factory.mktemp("toy")
    write_toy_bundle(root / "concat")
    write_toy_bundle(root / "shared_buffer", kind="shared_buffer")
    write_toy_bundle(root / "scores", tap="scores")
    return {name: root / name for name in ("concat", "shared_buffer", "scores")}


@pytest.fixture(scope="session")
def reference() -> Any:
    """``reference(ids [S], top_k) -> logits [S, V], routes [S, k]`` of the toy model in float64."""
    weights = toy_weights()
    return lambda ids, top_k=TOP_K: toy_logits(weights, np.asarray(ids), top_k)


@pytest.fixture(scope="session")
def make_toy_bundle() -> Any:
    """:func:`write_toy_bundle`, for a test that damages or varies a bundle."""
    return write_toy_bundle


SHA = "0123456789abcdef" * 4


class SampleRun:
    """Results as the stages of a run leave them, with ``text`` wherever a user's text can get."""

    def __init__(self, text: str) -> None:
        self.text = text

    def distribution(self, scale: float) -> dict[str, float]:
        names = ("mean", "standard_error", "p50", "p90", "p99", "p99.9", "max")
        return {name: scale * (1 + i) for i, name in enumerate(names)}

    def phase(self, tokens: int) -> dict[str, Any]:
        agreement = {"agreement": 1.0, "compared": tokens - 3, "disagreements": 0, "near_ties_excluded": 3}
        return {
            "tokens": tokens,
            "non_finite": 0,
            "constant": 0,
            "abs_error": {"max": 1e-4, "mean": 1e-5},
            "rel_error": self.distribution(1e-6),
            "cosine": {"mean": 1.0, "min": 0.99999},
            "kl_ref_test": self.distribution(1e-11),
            "kl_test_ref": self.distribution(1e-11),
            "top1": agreement,
            "top5": agreement,
            "perplexity": {"tokens": tokens - 1, "reference": 25.0, "test": 25.0, "ratio": 1.0},
        }

    def info(self, label: str) -> dict[str, Any]:
        return {
            "name": label,
            "runtime": "toy 1.0",
            "device": "CPU",
            "dtype": "float32",
            "threads": 2,
            "model": {"moe": label.endswith("moe"), "target": label.split()[0], "label": self.text},
        }

    def parity(self, test: str, reference: str) -> dict[str, Any]:
        layers = {str(i): {"agreement": 1.0, "flips": i, "overlap": 1.0} for i in range(3)}
        moe = test.endswith("moe")
        return {
            "schema": "moedge.parity/1",
            "name": f"{test} vs {reference}",
            "reference": self.info(reference),
            "test": self.info(test),
            "tokens": {"windows": 8, "window": 256, "prefill": 192, "decode": 512},
            "phases": {"prefill": self.phase(2048), "decode": self.phase(512)},
            "overall": self.phase(2560),
            "routing": {"compared": True, "agreement": 0.99999, "layers": layers}
            if moe
            else {"compared": False, "reason": self.text},
            "tolerances": {"max_kl": 0.1},
            "verdict": {
                "passed": True,
                "checks": [{"name": "prefill.kl", "value": 1e-9, "relation": "<=", "limit": 1e-6, "passed": True}],
            },
        }

    def shapes(self, test: str) -> dict[str, Any]:
        case = {"tokens": 34, "identical": 5, "replayed": 0, "excused": 0}
        case |= {"rel_error": {"mean": 4e-7, "max": 1e-6}, "kl": {"mean": 1e-13, "max": 1e-12}}
        names = ("determinism", "batch.padding.prefill.rel_error.mean")
        checks = [
            {"name": name, "value": 4e-7 * i, "relation": "<=", "limit": 1.4e-4 * i} for i, name in enumerate(names)
        ]
        return {
            "schema": "moedge.shapes/1",
            "name": f"{test} in other shapes",
            "test": self.info(test),
            "prompts": [21, 12, 1],
            "cases": {"batch.padding.prefill": {**case, "worst": {"row": 1, "position": 3, "rel_error": 1e-6}}},
            "not_run": {"batch.chunked": self.text},
            "verdict": {
                "passed": True,
                "outcome": "passed",
                "parts": {"determinism": True, "batch.padding.prefill": True},
                "checks": [{**check, "passed": True, "decided": True} for check in checks],
                "notes": [self.text],
            },
        }

    def verification(self) -> dict[str, Any]:
        identity = {
            "schema": "moedge.identity/1",
            "name": "ort-cpu moe = torch dense",
            "reference": self.info("torch dense"),
            "test": self.info("ort-cpu moe"),
            "tokens": 512,
            "max_rel_error": 3e-6,
            "limit": 1e-4,
            "passed": True,
        }
        return {
            "schema": "moedge.verify/1",
            "text": self.text,
            "identity": [identity],
            "parity": [self.parity("ort-cpu moe", "torch moe"), self.parity("ort-cpu dense", "torch dense")],
            "shapes": [self.shapes("ort-cpu moe"), self.shapes("ort-cpu dense")],
            "passed": True,
        }

    def speed(self) -> dict[str, Any]:
        labels = ["torch dense", "torch moe", "ort-cpu dense", "ort-cpu moe"]
        tails = {name: [19.0, 26.0] for name in ("p90", "p99", "mean")}
        times = {"p50": 20.0, "p90": 22.0, "p99": 25.0, "mean": 20.5, "ci95": [19.5, 20.4], "ci95_of": tails}
        ratios = [
            {"metric": metric, "label": one, "baseline": two, "speedup": 1.5, "ci95": [1.4, 1.6], "verdict": "faster"}
            for metric in ("ttft_ms", "tpot_ms")
            for one in labels
            for two in labels
            if one != two
        ]
        row = {"ttft_ms": times, "tpot_ms": times, "prefill_tokens_per_s": 900.0, "decode_tokens_per_s": 50.0}
        row["rounds"] = {"ttft_ms": [20.0] * 10, "tpot_ms": [20.0] * 10}
        engine = {"sha256": SHA, "peak_rss_mib": 900.5, "load_s": 1.2}
        point = {"prompt": 512, "decode": 64, "batch": 1, "depth": 0, "threads": None, "rounds": 10}
        point |= {"warmup_rounds": 1, "settled": True, "seconds": 60.0, "ratios": ratios}
        protocol = {"repeats": 10, "warmup": 1, "min_duration_s": 0.0, "seed": 0, "sampling": "s", "steady": "w"}
        return {
            "schema": "moedge.bench/2",
            "text": "wiki",
            "protocol": {**protocol, "order": "o", "intervals": "i", "memory": "m"},
            "machine": {"processor": self.text, "cores": 2, "memory_gib": 8.0},
            "engines": {label: {**engine, "info": self.info(label)} for label in labels},
            "points": [{**point, "rows": [{"label": label, **row} for label in labels]}],
            "batches": [
                {**point, "prompt": 8, "decode": 3, "batch": batch, "rows": [{"label": one, **row} for one in labels]}
                for batch in (1, 2, 4, 8)
            ],
            "not_batched": {},
        }

    def quality(self) -> dict[str, Any]:
        def row(label: str, kind: str, ppl: float, **more: Any) -> dict[str, Any]:
            kl = None if kind == "dense" else {"wiki": 0.2, self.text: 0.3}
            values = {
                "label": label,
                "kind": kind,
                "form": "dense" if kind == "dense" else "routed",
                "active_width_fraction": 0.75,
                "ffn_read_share": 1.0 if kind == "dense" else 0.754,
                "ppl": {"wiki": ppl, self.text: 2 * ppl},
            }
            return {**values, "ppl_std": None, "kl_to_dense": kl, "seeds": None, **more}

        return {
            "schema": "moedge.evaluation/1",
            "protocol": {
                "window": 512,
                "bos": False,
                "dtype": "float32",
                "texts": ["wiki", self.text],
                "tokens": {"wiki": 4088, self.text: 4088},
            },
            "rows": [
                row("dense", "dense", 23.0),
                row("cmoe", "method", 31.0),
                row("static mask", "control", 30.0),
                row("random partition", "control", 9e5, ppl_std={"wiki": 1.0, self.text: 2.0}, seeds=[0, 1]),
            ],
            "second_half": {
                "tokens": {"wiki": 2040, self.text: 2040},
                "rows": [
                    row("dense", "dense", 22.0),
                    row("cmoe", "method", 30.5),
                    row("GRIFFIN", "control", 41.5, form="prompted"),
                ],
            },
            "verdict": {"router_beats": {"static mask": False}, "sentences": [f"cmoe loses {self.text}."]},
            "where": [f"cmoe, {self.text}: a gain in decoding."],
        }

    def make(self, folder: Path) -> Path:
        """A run folder as the stages leave it, with a hostile string wherever a user's text can get."""
        root = folder / "run"
        source = {"label": self.text, "spec": self.text, "kind": "folder", "sha256": SHA, "folder": "/x", "files": {}}
        write_json(root / "source" / "source.json", {**source, "config": {"model_type": self.text, "hidden_size": 576}})
        params = {"shared": 6, "active": 6, "experts": 16, "note": self.text}
        facts = {"dead_share": 0.2, "dead_share_of_routed": 0.3, "note": self.text}
        layer = {"expert_widths": [96] * 10, "top_k": 6, "combine": "unit", "router": None, "report": facts}
        plan = {"method": "cmoe", "params": params, "provenance": {"text": self.text}, "sha256": SHA}
        plan |= {"model": {"intermediate_size": 1536}, "layers": [layer] * 3}
        write_json(root / "convert" / "checkpoint" / "plan.json", plan)
        write_json(
            root / "convert" / "checkpoint" / "config.json",
            {"moedge": {"layers": [{"shared_width": 576, "expert_width": 96}] * 3}},
        )
        rewrites = [
            {
                "rewrite": "moe",
                "nodes": 30,
                "status": "applied",
                "reason": "",
                "self_test": {"max_rel_error": 1e-7, "ok": True},
            },
            {"rewrite": self.text, "nodes": 0, "status": "refused", "reason": self.text, "self_test": None},
        ]
        manifest: dict[str, Any] = {"schema": "moedge.bundle/1", "target": "ort-cpu", "kind": "moe", "label": "toy"}
        manifest |= {"cache": {"kind": "shared_buffer", "max_length": 2048}, "taps": {}, "versions": {}}
        manifest |= {"lowering": rewrites, "files": {"model.onnx": {"sha256": SHA, "size": 5 << 20}}}
        manifest |= {"model": toy_facts(), "moe": {"layers": {}}}
        manifest |= {"io": {"model": "model.onnx", "inputs": [], "outputs": []}}
        write_json(root / "export" / "ort-cpu" / "manifest.json", manifest)
        write_json(root / "evaluate" / "evaluation.json", self.quality())
        write_json(root / "verify" / "verify.json", self.verification())
        write_json(root / "bench" / "bench.json", self.speed())
        for stage in ("source", "convert", "evaluate"):
            record = {"stage": stage, "key": SHA, "seconds": 1.5, "parts": {"versions": {"torch": "2.13"}}}
            write_json(root / stage / "stage.json", {**record, "outputs": {"f": {"sha256": SHA, "size": 10}}})
        return root


@pytest.fixture(scope="session")
def sample_runs() -> type[SampleRun]:
    """:class:`SampleRun`: ``sample_runs(text).make(folder)`` writes a finished run and returns its folder."""
    return SampleRun
