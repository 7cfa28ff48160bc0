"""What a token needs is what is counted by hand, for every kind of model; the estimate of a device is a roofline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moedge import MoEdgeError
from moedge.configs import devices
from moedge.export import needs
from moedge.export.device import estimate, outlook
from moedge.export.device.outlook import Work
from moedge.export.manifest import (
    CacheFacts,
    ClassSize,
    IOFacts,
    Kept,
    LayerFacts,
    Manifest,
    ModelFacts,
    MoEFacts,
    Plugins,
    Quantization,
)
from moedge.export.needs import of_folder, of_manifest, of_model

H, V, LAYERS, HEADS, GROUPS, D = 8, 100, 2, 4, 2, 4
TABLE = V * H
ATTENTION = 1000
"""Of both layers, norms and routers included: what is not FFN and not the table."""
SHARED, WIDTH, E, K = 3, 5, 6, 2


def model(*, tied: bool | None = True, ffn: int = 0, **more: Any) -> ModelFacts:
    return ModelFacts(
        model_type="llama",
        hidden_size=H,
        vocab_size=V,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        num_kv_heads=GROUPS,
        head_dim=D,
        max_position_embeddings=64,
        eos_token_ids=[],
        parameters=TABLE * (1 if tied else 2) + ATTENTION + ffn,
        tied_embedding=tied,
        **more,
    )


LAYER = LayerFacts(num_experts=E, top_k=K, shared_width=SHARED, expert_width=WIDTH)
MOE = MoEFacts(layers={0: LAYER, 1: LAYER})
ROUTED, ALWAYS = 2 * 3 * E * WIDTH * H, 2 * 3 * SHARED * H


def test_a_dense_model_reads_everything_and_one_row_of_an_embedding_of_its_own() -> None:
    tied = of_model(model(ffn=500), None, weight=4, cached=4)
    assert tied.decode_bytes(0) == 4 * (TABLE + ATTENTION + 500)
    assert tied.stored == tied.decode_bytes(0)
    own = of_model(model(tied=False, ffn=500), None, weight=4, cached=4)
    assert own.stored == tied.stored + 4 * TABLE
    assert own.decode_bytes(0) == pytest.approx(tied.decode_bytes(0) + 4 * H)


def test_keys_and_values_are_read_for_every_token_before() -> None:
    found = of_model(model(), None, weight=4, cached=2)
    each = LAYERS * 2 * GROUPS * D * 2
    assert found.decode_bytes(10) - found.decode_bytes(0) == 10 * each
    assert found.decode_bytes(10, batch=3) - found.decode_bytes(0, batch=3) == 3 * 10 * each
    assert found.decode_products(7) - found.decode_products(0) == 7 * LAYERS * 2 * HEADS * D


def test_a_moe_reads_its_selected_experts() -> None:
    found = of_model(model(ffn=ROUTED + ALWAYS), MOE, weight=2, cached=2)
    one = 2 * (TABLE + ATTENTION + ALWAYS + ROUTED * K / E)
    assert found.decode_bytes(0) == pytest.approx(one)
    assert found.stored == 2 * (TABLE + ATTENTION + ALWAYS + ROUTED)
    # Three rows that choose at random leave an expert out with (1 - k/E)^3.
    three = 2 * (TABLE + ATTENTION + ALWAYS + ROUTED * (1 - (1 - K / E) ** 3))
    assert found.decode_bytes(0, batch=3) == pytest.approx(three)
    assert found.decode_products(0) == pytest.approx(one / 2)


def test_a_prompt_multiplies_every_token_and_the_head_once() -> None:
    found = of_model(model(ffn=ROUTED + ALWAYS), MOE, weight=2, cached=2)
    tokens, body = 10, ATTENTION + ALWAYS + ROUTED * K / E
    seen = sum(range(1, tokens + 1))
    wanted = tokens * body + TABLE + seen * LAYERS * 2 * HEADS * D
    assert found.prompt_products(tokens) == pytest.approx(wanted)
    assert found.prompt_products(tokens, batch=2) == pytest.approx(2 * wanted)
    after = found.prompt_products(tokens, past=5) - found.prompt_products(tokens)
    assert after == tokens * 5 * LAYERS * 2 * HEADS * D
    # Ten tokens read almost every expert, the head once.
    assert found.prompt_bytes(tokens) == pytest.approx(
        2 * (TABLE + ATTENTION + ALWAYS + ROUTED * (1 - (1 - K / E) ** tokens))
    )


def manifest(**more: Any) -> Manifest:
    facts: dict[str, Any] = {
        "schema": "moedge.bundle/1",
        **{"target": "ort-cpu", "kind": "moe", "label": "x", "model": model(ffn=ROUTED + ALWAYS), "moe": MOE},
        **{"taps": {}, "versions": {}, "files": {}, "lowering": []},
        "io": IOFacts(model="model.onnx", inputs=[], outputs=[]),
        "cache": CacheFacts(kind="concat"),
    }
    return Manifest(**{**facts, **more})


def test_a_float_bundle_is_counted_in_its_own_type() -> None:
    wide, half = of_manifest(manifest()), of_manifest(manifest(cache=CacheFacts(kind="concat", dtype="float16")))
    assert wide.decode_bytes(9) == 2 * half.decode_bytes(9)
    assert wide.decode_products(9) == half.decode_products(9)


def sized(**bytes_of: tuple[int, int]) -> Quantization:
    classes = [
        ClassSize(tensor_class=name, parameters=count, float_bytes=4 * count, bytes=size, bits_per_weight=0)
        for name, (count, size) in bytes_of.items()
    ]
    return Quantization(bits=4, block=32, method="rtn", classes=classes, tensors={})


def test_a_quantised_bundle_is_counted_class_by_class() -> None:
    classes = {
        **{"embedding": (TABLE, 500), "attention": (900, 600), "shared": (ALWAYS, 100), "experts": (ROUTED, 900)},
        **{"router": (100, 400), "other": (7, 10_000)},
    }
    found = of_manifest(manifest(quantization=sized(**classes)))
    assert found.decode_bytes(0) == pytest.approx(500 + 600 + 100 + 900 * K / E + 400)
    assert found.decode_products(0) == pytest.approx(TABLE + 900 + ALWAYS + ROUTED * K / E + 100)
    own = of_manifest(manifest(quantization=sized(**classes, head=(TABLE, 300))))
    assert own.decode_bytes(0) == pytest.approx(found.decode_bytes(0) - 500 + 500 / V + 300)
    # Layers of unequal widths: what is read is weighted with what is stored.
    other = LayerFacts(num_experts=3, top_k=3, shared_width=0, expert_width=20)
    mixed = of_manifest(manifest(moe=MoEFacts(layers={0: LAYER, 1: other}), quantization=sized(experts=(1, 900))))
    assert mixed.decode_bytes(0) == pytest.approx(900 * (K * WIDTH + 3 * 20) / (E * WIDTH + 3 * 20))


def test_a_gathered_model_reads_the_share_that_was_measured() -> None:
    pruned = {0: LayerFacts(num_experts=0, top_k=0, shared_width=50, expert_width=0)}
    keeps = {0: {"x": Kept()}}
    ffn = 3 * 50 * H
    facts = {"moe": MoEFacts(layers=pruned, ffn_read_share=0.7), "model": model(ffn=ffn), "keeps": keeps}
    assert of_manifest(manifest(**facts)).decode_bytes(0) == pytest.approx(4 * (TABLE + ATTENTION + 0.7 * ffn))
    with pytest.raises(MoEdgeError, match="how many weights its thresholds leave out: export again"):
        of_manifest(manifest(**{**facts, "moe": MoEFacts(layers=pruned)}))
    quantised = of_manifest(manifest(**facts, quantization=sized(attention=(1, 60), shared=(1, 100))))
    assert quantised.decode_bytes(0) == pytest.approx(60 + 70)


def test_an_engine_reads_what_its_kernels_select_and_half_a_cache() -> None:
    """What ``moedge build`` says is what ``moedge estimate`` says, and as counted by hand."""
    kernels = Plugins(oldest_tensorrt="10.9", kernels=[])
    half = {"cache": CacheFacts(kind="concat", dtype="float16")}
    cache = 5 * LAYERS * 2 * GROUPS * D * 2  # half of ten positions

    def read(batch: int = 1, **more: Any) -> float | None:
        return estimate.decode_read(manifest(**half, **more), max_length=10, batch=batch)

    always = 2 * (TABLE + ATTENTION + ALWAYS)
    assert read(experts="plugins") == pytest.approx(always + 2 * ROUTED * K / E + cache)
    assert read(3, experts="plugins") == pytest.approx(always + 2 * ROUTED * (1 - (1 - K / E) ** 3) + 3 * cache)
    assert read(experts="merged") == pytest.approx(always + 2 * ROUTED + cache)
    dropped = {"moe": MoEFacts(layers=PRUNED, ffn_read_share=0.7), "keeps": {0: {"x": Kept()}}}
    for tied, row in ((True, 0), (False, H)):  # a table of its own is looked up: one row
        gather = {**dropped, "model": model(tied=tied, ffn=GATHERED)}
        rest = 2 * (TABLE + ATTENTION + row) + cache
        assert read(**gather, plugins=kernels) == pytest.approx(rest + 2 * 0.7 * GATHERED)
        assert read(**gather) == pytest.approx(rest + 2 * GATHERED)
    older = model(ffn=ROUTED + ALWAYS).model_copy(update={"parameters": None})
    assert read(model=older) is None


GATHERED = 3 * 50 * H
PRUNED = {0: LayerFacts(num_experts=0, top_k=0, shared_width=50, expert_width=0)}


def gathered(dtype: str, share: float) -> needs.Needs:
    """That share of the FFN weights is read for a token; no experts."""
    facts: dict[str, Any] = {"moe": MoEFacts(layers=PRUNED, ffn_read_share=share), "model": model(ffn=GATHERED)}
    return of_manifest(manifest(**facts, keeps={0: {"x": Kept()}}, cache=CacheFacts(kind="concat", dtype=dtype)))


@pytest.mark.parametrize(("dtype", "few"), [("float32", 20), ("float16", 16)])
def test_a_prompt_reads_and_multiplies_what_a_threshold_leaves_out(dtype: str, few: int) -> None:
    """No kernel leaves anything out for more tokens than ``few``: from there on it is the dense model."""
    found = gathered(dtype, share=0.05)  # so small that 32 tokens still drop something: 0.95 ^ 32 is 0.19
    dense = of_model(model(ffn=GATHERED), None, weight=needs.BYTES[dtype], cached=needs.BYTES[dtype])
    for tokens in (few + 1, 512):
        assert found.prompt_products(tokens) == dense.prompt_products(tokens)
        assert found.prompt_bytes(tokens) == dense.prompt_bytes(tokens)
    assert found.prompt_products(few) < dense.prompt_products(few)
    assert found.prompt_bytes(few) < dense.prompt_bytes(few)
    # Rows of a batch are one call, too.
    assert found.decode_bytes(9, batch=few + 1) == dense.decode_bytes(9, batch=few + 1)
    assert found.decode_products(9, batch=few + 1) == dense.decode_products(9, batch=few + 1)
    half = (few + 2) // 2
    assert found.prompt_products(half, batch=2) == dense.prompt_products(half, batch=2)


def test_few_tokens_multiply_what_any_of_them_keeps() -> None:
    """Three rows leave out a weight that all three drop, 0.3 ^ 3 of them, and multiply the rest for each."""
    found = gathered("float32", share=0.7)
    union = 1 - 0.3**3
    assert found.decode_bytes(0, batch=3) == pytest.approx(4 * (TABLE + ATTENTION + union * GATHERED))
    assert found.decode_products(0, batch=3) == pytest.approx(3 * (TABLE + ATTENTION + union * GATHERED))
    assert found.decode_products(0) == pytest.approx(TABLE + ATTENTION + 0.7 * GATHERED)
    seen = (1 + 2 + 3) * LAYERS * 2 * HEADS * D
    assert found.prompt_products(3) == pytest.approx(3 * (ATTENTION + union * GATHERED) + TABLE + seen)


def test_experts_with_thresholds_keep_what_their_router_leaves_out_of_a_prompt() -> None:
    facts: dict[str, Any] = {"moe": MoEFacts(layers=MOE.layers, ffn_read_share=0.2), "keeps": {0: {"x": Kept()}}}
    found = of_manifest(manifest(**facts))
    seen = sum(range(1, 101)) * LAYERS * 2 * HEADS * D
    selected = ALWAYS + ROUTED * K / E
    assert found.prompt_products(100) == pytest.approx(100 * (ATTENTION + selected) + TABLE + seen)
    assert found.decode_products(0) == pytest.approx(TABLE + ATTENTION + 0.2 * (ALWAYS + ROUTED))
    classes = sized(shared=(ALWAYS, 100), experts=(ROUTED, 900), head=(TABLE, 500))
    whole = of_manifest(manifest(**facts, quantization=classes))
    assert whole.prompt_products(17) == pytest.approx(
        17 * selected + TABLE + sum(range(1, 18)) * LAYERS * 2 * HEADS * D
    )
    assert whole.prompt_products(16) < 16 * selected + TABLE + sum(range(1, 17)) * LAYERS * 2 * HEADS * D
    assert whole.decode_bytes(0) == pytest.approx(0.2 * 1000 + 500)


def test_few_tokens_are_as_many_as_the_kernels_take() -> None:
    source = (Path(needs.__file__).parent / "ort_ops" / "product.h").read_text(encoding="utf-8")
    assert f"few_tokens(int bits) {{ return bits == 32 ? {needs.FEW_FLOATS} : {needs.FEW}; }}" in source
    pytest.importorskip("triton")
    from moedge.convert.ops.kernels.gathered import MOST_TOKENS, PATHS

    assert MOST_TOKENS["gemm16"] == needs.FEW
    assert list(PATHS) == ["gemv", "gemm16", "gemm64", "gemm128"], "the two that follow skip nothing"


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoEdgeError, match="whether the embedding is tied: export again"):
        of_manifest(manifest(model=model(tied=None)))
    inside = {0: LayerFacts(num_experts=2, top_k=1, shared_width=1, expert_width=1, parents=4)}
    with pytest.raises(MoEdgeError, match="experts inside experts"):
        of_manifest(manifest(moe=MoEFacts(layers=inside)))
    # A bundle of an older version: its config.json says it.
    tied = model(ffn=ROUTED + ALWAYS)
    older = manifest(model=tied.model_copy(update={"tied_embedding": None}))
    (tmp_path / "manifest.json").write_text(json.dumps(older.document()))
    with pytest.raises(MoEdgeError, match="export again"):
        of_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true}')
    assert of_folder(tmp_path) == of_manifest(manifest(model=tied))


def test_bundles_and_checkpoints_of_one_model_need_the_same(
    checkpoints: dict[str, Path], bundles: dict[str, Path]
) -> None:
    """Counted from the headers of safetensors, from a manifest, and from what PyTorch holds."""
    from moedge.convert import modeling

    for kind in ("dense", "moe"):
        saved, exported = of_folder(checkpoints[kind]), of_folder(bundles[f"{kind}/portable"])
        assert saved.decode_bytes(10) == pytest.approx(exported.decode_bytes(10), rel=1e-3), kind
        assert saved.cache_bytes == exported.cache_bytes
        half = of_folder(checkpoints[kind], "float16")
        assert half.decode_bytes(10) == pytest.approx(saved.decode_bytes(10) / 2)
    torch_model, plan, _ = modeling.load(checkpoints["moe"])
    count = sum(parameter.numel() for parameter in torch_model.parameters())
    hidden = torch_model.config.hidden_size
    idle = sum(3 * (len(p.experts) - p.top_k) * p.expert_width * hidden for p in plan.layers)
    found = of_folder(bundles["moe/portable"])
    lookup = 0 if torch_model.config.tie_word_embeddings else torch_model.config.vocab_size * hidden - hidden
    assert found.decode_bytes(0) == pytest.approx(4 * (count - idle - lookup), rel=1e-3)
    assert of_folder(bundles["dense/portable"]).decode_bytes(10) > found.decode_bytes(10)


def test_a_config_that_does_not_say_whether_the_embedding_is_tied_is_read_by_the_files(
    tiny_model: Any, tmp_path: Path
) -> None:
    """As of Gemma on the hub: the weights hold no output projection, so the embedding is it, and is read whole."""
    tiny_model("gemma2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    said = of_folder(tmp_path)
    del config["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert of_folder(tmp_path) == said
    assert said.decode_bytes(0) == said.stored


def test_a_checkpoint_whose_files_do_not_say_enough_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    config = {"model_type": "x", "hidden_size": 4, "vocab_size": 5, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": 8}))
    with pytest.raises(MoEdgeError, match=r"holds no \*\.safetensors weights"):
        of_folder(tmp_path)
    save_file({"a": np.zeros((3, 4), np.float16), "lm_head.weight": np.zeros((5, 4))}, tmp_path / "model.safetensors")
    with pytest.raises(MoEdgeError, match="experts that a model has by itself"):
        of_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoEdgeError, match="does not tell max_position_embeddings"):
        of_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 9}))
    assert needs.facts_of_checkpoint(tmp_path)[0].parameters == 12 + 20
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "max_position_embeddings": 9, "tie_word_embeddings": True})
    )
    assert needs.facts_of_checkpoint(tmp_path)[0].parameters == 12, "a tied head that was saved too counts once"
    save_file({"a": np.zeros((3, 4), np.float16)}, tmp_path / "model-00001-of-00002.safetensors")
    index = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(MoEdgeError, match="two sets of weights"):  # which were counted together
        of_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MoEdgeError, match=r"model-00002-of-00002\.safetensors is missing"):
        of_folder(tmp_path)


# --- on a device ----------------------------------------------------------------------------------------------------


def test_a_step_takes_what_its_bytes_or_its_multiplications_take() -> None:
    device = devices.load("jetson-orin-nano")  # 68 GB/s, 10 TFLOPS
    memory = outlook.step_bound(68e9, 1e9, device)
    assert (memory.ms, memory.by) == (1000, "memory")
    arithmetic = outlook.step_bound(68e6, 5e12, device)
    assert (arithmetic.ms, arithmetic.by) == (1000, "arithmetic")
    unknown = outlook.step_bound(68e6, 5e12, device.model_copy(update={"fp16_tflops": None}))
    assert (unknown.ms, unknown.arithmetic_ms) == (1, None)


def rows(device: str, moe: MoEFacts | None = MOE, share: float | None = None, **work: int) -> list[outlook.Outlook]:
    return outlook.outlooks(
        model(ffn=ROUTED + ALWAYS), moe, share, devices.load(device), Work(**{"context": 32, "prompt": 16, **work})
    )


def test_every_precision_is_estimated_and_engines_that_read_every_expert_are_told() -> None:
    found = {(row.model, row.precision): row for row in rows("rtx-4090")}
    assert set(found) == {
        *((kind, "float16") for kind in ("moe", "dense")),
        *((kind, bits) for kind in ("moe, all weights", "dense") for bits in ("int8", "int4")),
    }
    assert found["moe", "float16"].targets == ("tensorrt", "tensorrt-rtx (--expert-form plugins)")
    assert found["moe, all weights", "int4"].targets == ("tensorrt-rtx-int4",)
    half, dense = found["moe", "float16"], found["dense", "float16"]
    assert half.needed == dense.needed, "every expert is stored"
    wanted = of_model(model(ffn=ROUTED + ALWAYS), MOE, weight=2, cached=2)
    assert half.tpot.memory_ms == pytest.approx(1e3 * wanted.decode_bytes(32) / 1008e9)
    assert half.ttft.arithmetic_ms == pytest.approx(1e3 * 2 * wanted.prompt_products(16) / 330.3e12)
    assert half.tpot.ms < dense.tpot.ms == pytest.approx(found["dense", "float16"].tpot.ms)
    assert found["moe, all weights", "int4"].tpot == found["dense", "int4"].tpot
    assert found["dense", "int4"].weights == pytest.approx(dense.weights * (0.5 + 2 / 128) / 2)


def test_a_jetson_whose_tensorrt_takes_no_kernels_gains_nothing() -> None:
    """JetPack 6.2 has TensorRT 10.3; Thor has 10.13."""
    orin = [row for row in rows("jetson-agx-orin") if row.precision == "float16"]
    assert [row.model for row in orin] == ["moe, all weights", "dense"]
    assert outlook.best(orin) == orin[0]
    assert [row.model for row in rows("jetson-agx-thor") if row.precision == "float16"] == ["moe", "dense"]
    none = [row for row in rows("jetson-agx-orin") if row.precision == "int4"]
    assert [row.targets for row in none] == [(), ()], "shown, for what it would be worth"


def test_a_gathered_model_gains_where_its_kernels_are_plugins() -> None:
    pruned = MoEFacts(layers={0: LayerFacts(num_experts=0, top_k=0, shared_width=50, expert_width=0)})
    found = {row.model: row for row in rows("jetson-agx-thor", pruned, 0.7) if row.precision == "float16"}
    read = found["dense"].tpot.memory_ms - found["moe"].tpot.memory_ms
    assert read == pytest.approx(1e3 * 2 * 0.3 * (3 * 50 * H) / 273e9)
    assert "moe" not in {row.model for row in rows("jetson-agx-orin", pruned, 0.7) if row.targets}
    # Experts with thresholds have no kernel.
    assert "moe" not in {row.model for row in rows("jetson-agx-thor", MOE, 0.7) if row.targets}


def test_the_best_fits_and_has_an_engine() -> None:
    found = rows("rtx-4090")
    chosen = outlook.best(found)
    assert chosen is not None
    assert (chosen.model, chosen.precision) == ("moe, all weights", "int4"), "the fastest; of equal ones the converted"
    half = outlook.best([row for row in found if row.precision == "float16"])
    assert half is not None
    assert half.model == "moe"
    small = devices.load("rtx-4090").model_copy(update={"memory_gib": 1e-6})
    assert outlook.best(outlook.outlooks(model(ffn=ROUTED + ALWAYS), MOE, None, small, Work())) is None
    dense = outlook.best(rows("rtx-4090", moe=None))
    assert dense is not None
    assert (dense.model, dense.precision) == ("dense", "int4"), "the fastest"


def test_batches_share_weights_and_not_their_caches() -> None:
    one, eight = (next(row for row in rows("h100", batch=batch) if row.model == "dense") for batch in (1, 8))
    assert eight.tokens_per_s > 2 * one.tokens_per_s
    each = 32 * LAYERS * 2 * GROUPS * D * 2
    assert eight.needed - one.needed == 7 * (2 * each + 16 * V * 2)
