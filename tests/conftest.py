"""Small fixtures shared by all tests: a tiny tokenizer, tiny random models and a cache folder of their own."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported: tiny matrix products lose more to a second thread than they gain, on a busy machine 5 to 20
# times, for idle threads spin. See one_thread and pytest_runtest_setup, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported by anyone.

    A run that selects the device tests (``-m gpu``, ``-m "gpu and not slow"``) compiles them for the device instead.
    """
    selected = " ".join(config.option.markexpr.split())
    if "gpu" not in selected.replace("not gpu", ""):
        os.environ.setdefault("TRITON_INTERPRET", "1")


_frozen_at: tuple[Path | None, int] = (None, 0)


def pytest_runtest_call(item: pytest.Item) -> None:
    """Keep what is there already out of garbage collection: with each file of tests, and when libraries came in.

    torch, transformers and onnx bring a million objects, and caches of traces and kernels as many again. Every full
    collection goes over all of them (``modeling.apply``, the benchmark and ``torch.export`` ask for one each): without
    this they take almost half of the suite's time.
    """
    global _frozen_at
    libraries = len(sys.modules)
    if item.path != _frozen_at[0] or libraries > _frozen_at[1] + 20:
        gc.collect()
        gc.freeze()
        _frozen_at = (item.path, libraries)


def pytest_runtest_setup() -> None:
    """torch has one number of threads for the process: what an engine of an earlier test set must not stay."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """An engine has one thread where a test asks for no number, not all physical cores: every worker needs them."""
    from moedge.runtime.engines import ort, pytorch

    with pytest.MonkeyPatch.context() as patch:
        for module in (ort, pytorch):
            patch.setattr(module, "default_threads", lambda: 1)
        yield


@pytest.fixture(scope="session")
def no_survey() -> Iterator[None]:
    """Keep lm-eval from describing the machine after every evaluation: it starts pip, for a record nobody reads."""
    from lm_eval import evaluator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "add_env_info", lambda results: None)
        yield


VOCAB = 260
"""Tokens of the tiny tokenizer: 256 bytes and 4 special tokens."""


FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 5},
    "phi3": {"tie_word_embeddings": False},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    # Of 2 layers the first is local and the second global, with rotary bases of their own.
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2},
}
"""Config entries that a model type needs besides the common ones of ``tiny_model``."""


METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "cmoe": {"shared": 2, "active": 3, "experts": 8, "k_a": 6},
    "expertweaver": {"experts": 16, "k": 12, "tau_percentile": 50},
    "mlpmoe": {"branches": 8, "p_max": 0.0},
    "moedge": {"shared": 2, "active": 3, "experts": 8, "refit": False},
    "llamamoe": {"experts": 8, "active": 5},
    "moefication": {"experts": 8, "active": 5, "epochs": 2},
    "atopk": {"keep": 1.0},
    "wanda": {"keep": 1.0},
    "flap": {"keep": 1.0},
}
"""Settings for tiny models under which a plan with every expert selected is the dense model, by method."""


@pytest.fixture
def moedge_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, set as MOEDGE_CACHE."""
    folder = tmp_path / "moedge-cache"
    monkeypatch.setenv("MOEDGE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer: one token a byte, BOS <s> = 256, EOS </s> = 257, PAD = 258, UNK = 259."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<s>", "</s>", "<pad>", "<unk>")])
    assert tokenizer.get_vocab_size() == VOCAB
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def reused_traces(session_folder: Path) -> Iterator[None]:
    """Models of one form are traced once a session (``tests/traced.py``)."""
    from moedge.tests import traced

    with traced.reused(session_folder):
        yield


@pytest.fixture
def traced_anew(reused_traces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export of this test traces: it is about tracing, or changes code that is traced."""
    import torch

    monkeypatch.setattr(torch.onnx, "export", torch.onnx.export.__wrapped__)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def tiny_model(reused_traces: None) -> Callable[..., Any]:
    """Return a factory of tiny random models: ``tiny_model("llama", layers=2, width=64, seed=0, **config)``.

    float32, eval mode, no gradients. Weights are larger than usual (0.2), so that activations matter and expert scores
    differ clearly; norms and biases are random but in a Llama without FFN biases.
    """

    def make(
        family: str = "llama", *, layers: int = 2, hidden: int = 32, width: int = 64, seed: int = 0, **more: Any
    ) -> Any:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            family,
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=256,
            eos_token_id=257,
            pad_token_id=258,
            **{"tie_word_embeddings": True, "head_dim": hidden // 4, **FAMILY_CONFIGS.get(family, {}), **more},
        )
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if family != "llama" or more.get("mlp_bias"):
            # Norms start at one value and biases at zero: a family that lost or misplaced one would not show it.
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.2 * torch.randn_like(parameter)
        torch.random.set_rng_state(state)
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def tiny_llama(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """``tiny_model`` for Llama."""
    return lambda **more: tiny_model("llama", **more)


@pytest.fixture(scope="session")
def convert_tiny() -> Callable[..., Any]:
    """Return a function (tiny model, method, **settings) -> plan; ``METHOD_SETTINGS`` unless told otherwise."""

    def convert(model: Any, method: str, **more: Any) -> Any:
        import numpy as np

        from moedge.convert import calibration, methods
        from moedge.convert.methods import METHODS

        tokens = np.random.default_rng(0).integers(0, 256, size=(4, 48))
        entry, settings = METHODS[method], {**METHOD_SETTINGS[method], **more}
        given: Any = None
        if "tokens" in entry.needs:
            given = tokens
        elif entry.needs:
            gate = calibration.GateSampling(sample=12) if "gate_profile" in entry.needs else None
            given = calibration.collect(
                model, tokens, k_a=entry.params(**settings).model_dump().get("k_a", 6), gate=gate
            )
        return methods.convert(method, given, model, **settings)

    return convert


@pytest.fixture(scope="session")
def without_compiler() -> Callable[[], Any]:
    """Return a context in which there is no g++: exports keep ONNX Runtime's own operators."""
    from contextlib import contextmanager

    from moedge import MoEdgeError
    from moedge.export.ort_ops import library

    def missing() -> Path:
        raise MoEdgeError("there is no g++ in this test")

    @contextmanager
    def context() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(library, "compiled", missing)
            yield

    return context


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any, tiny_tokenizer: Any) -> dict[str, Path]:
    """A dense tiny Llama and its CMoE conversion (2 shared, 3 of 6 routed), saved."""
    import numpy as np

    from moedge.convert import calibration, methods, modeling

    root = tmp_path_factory.mktemp("checkpoints")
    model = tiny_llama()
    model.save_pretrained(root / "dense")
    tiny_tokenizer.save_pretrained(root / "dense")
    tokens = np.random.default_rng(0).integers(0, 256, (4, 64))
    statistics = calibration.collect(model, tokens, k_a=8)
    plan = methods.convert("cmoe", statistics, model, shared=2, active=3, experts=8, k_a=8)
    modeling.save(modeling.apply(plan, model), plan, tiny_tokenizer, root / "moe")
    return {"dense": root / "dense", "moe": root / "moe"}


@pytest.fixture(scope="session")
def bundles(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``{kind}/{target}`` folders for both models and both targets; tracing takes seconds, so tests only read them."""
    from moedge.export.pipeline import export

    root = tmp_path_factory.mktemp("bundles")
    made = {}
    for kind, checkpoint in checkpoints.items():
        for target, path in export(checkpoint, root / kind, ["portable", "ort-cpu"], label=kind).items():
            made[f"{kind}/{target}"] = path
    return made


@pytest.fixture(scope="session")
def broken_copy() -> Callable[..., Path]:
    """Return a function (bundle, new folder, change of its graph) -> the folder, a sealed bundle of the changed graph.

    The change gets an ``onnx.GraphProto`` with its weights, and must change something.
    """

    def copied(source: Path, folder: Path, change: Callable[[Any], None]) -> Path:
        import onnx

        from moedge.export import bundle

        shutil.copytree(source, folder)
        manifest = bundle.open_bundle(folder).manifest.document()
        model = onnx.load(folder / "model.onnx")
        before = model.SerializeToString()
        change(model.graph)
        assert model.SerializeToString() != before
        for name in ("model.onnx.data", bundle.MANIFEST):
            (folder / name).unlink()
        onnx.save(model, folder / "model.onnx")
        bundle.seal(folder, bundle.Manifest.model_validate(manifest))
        return folder

    return copied


@pytest.fixture(scope="session")
def lazy_backend() -> None:
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()  # once in a process


@pytest.fixture(params=["lazy", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a device that is not the CPU: one that every machine has, and CUDA.

    PyTorch's lazy backend is a device of its own that computes with the CPU's kernels: like CUDA it refuses to mix
    tensors of two devices, so a tensor that was made on the wrong one is found. What CUDA has and the lazy backend
    lacks is replaced for it: inference mode, autocast, iteration over a tensor, our operators as kernels (their bodies
    run).
    """
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("lazy_backend")
    import torch
    import transformers.masking_utils

    from moedge.convert import ops, scoring

    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "__iter__", lambda tensor: iter([tensor[i] for i in range(len(tensor))]))
    monkeypatch.setattr(scoring, "score_all", scoring.score_all.__wrapped__)
    for name in ("route", "sparse_glu"):
        monkeypatch.setattr(torch.ops.moedge, name, getattr(ops, name)._init_fn)
    return "lazy"


@pytest.fixture(scope="session")
def gathered() -> Callable[..., Any]:
    """Return a function (plan, dense model, share=0.6, ramp=..., x=True, h=True, linears="ffn") -> the plan with
    thresholds.

    ``share`` of the inputs and of the hidden values are kept, about: thresholds of neighbours differ by up to 4, so
    that another order of channels, or the threshold of another, is another model.
    """

    def make(
        plan: Any,
        model: Any,
        share: float = 0.6,
        *,
        ramp: float = 0.1,
        x: bool = True,
        h: bool = True,
        linears: str = "ffn",
    ) -> Any:
        from dataclasses import replace

        import numpy as np

        from moedge.convert import gather

        tokens, generator = np.random.default_rng(0).integers(0, 256, size=(2, 48)), np.random.default_rng(1)
        steps = gather.ladders(model, gather.static_scores(model, "norms", linears), tokens)

        def spread(threshold: Any) -> Any:
            return (threshold * generator.choice([0.5, 1, 2], threshold.shape)).astype(np.float32)

        left_out = {"x_threshold": not x, "h_threshold": not h}
        layers = []
        for layer in gather.with_cuts(plan.layers, steps, gather.cuts_of_share(steps, share), ramp):
            made = {name: None if left_out.get(name) else spread(value) for name, value in layer.thresholds.items()}
            layers.append(replace(layer, **made))
        return replace(plan, layers=layers)

    return make


@pytest.fixture(scope="session")
def gather_only(gathered: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function (dense model, **as ``gathered``) -> a plan without experts, with thresholds alone."""

    def make(model: Any, **more: Any) -> Any:
        import numpy as np

        from moedge.convert import adapters
        from moedge.convert.plan import LayerPlan, MoEPlan

        every = [LayerPlan(np.arange(len(block.gate), dtype=np.int32), [], 0) for block in adapters.ffns(model)]
        return gathered(MoEPlan("gather", {}, adapters.describe(model), every), model, **more)

    return make


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data of the lm-eval tasks sciq and arc_easy, with eight short questions each."""
    import json

    words = ("cat", "hat", "dog", "fog", "sun", "run", "sea", "tea")
    folder = tmp_path_factory.mktemp("tasks")
    sciq = [
        {
            "support": "",
            "question": f"what is {word}",
            "distractor1": words[i - 1] * 3,
            "distractor2": words[i - 2],
            "distractor3": words[i - 3] + " s",
            "correct_answer": word,
        }
        for i, word in enumerate(words)
    ]
    arc = [
        {
            "question": f"which is {word}?",
            "choices": {"text": [word, words[i - 1] * 2], "label": ["A", "B"]},
            "answerKey": "AB"[i % 2],
        }
        for i, word in enumerate(words)
    ]
    for name, rows in (("sciq", sciq), ("arc_easy", arc)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {name: folder / f"{name}.jsonl" for name in ("sciq", "arc_easy")}
