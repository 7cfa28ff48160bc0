"""Model types of converted checkpoints, known to transformers once this module is imported.

For each family in :data:`moedge.convert.adapters.FAMILIES` one config and one model class are registered with the Auto
classes: model type ``moedge_<family>``, whose FFNs are built from the ``moedge`` section of config.json; likewise for
:data:`moedge.convert.moe_adapters.FAMILIES` (:mod:`moedge.convert.hierarchical`). Without this import transformers
refuses such a checkpoint as an unknown architecture, which is meant: loading it as its dense family would silently give
random FFNs.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moedge import MoEdgeError
from moedge.convert import adapters, hierarchical, kept_inputs, moe_adapters
from moedge.convert.sparse_ffn import FLOAT32, SparseFFN

CHECKPOINT_SCHEMA = "moedge.checkpoint/1"


def _register(base: str) -> tuple[type, type]:
    """Make and register the config and model class of ``moedge_<base>``."""
    dense_config = CONFIG_MAPPING[base]
    dense_model = MODEL_FOR_CAUSAL_LM_MAPPING[dense_config]
    name = "MoEdge" + dense_config.__name__.removesuffix("Config")
    config_class = type(
        f"{name}Config",
        (dense_config,),
        {"__module__": __name__, "__doc__": f"{dense_config.__name__} with a ``moedge`` section.", "moedge": None}
        | {"model_type": adapters.MOE_PREFIX + base},
    )

    def __init__(self: Any, config: Any) -> None:
        if not getattr(config, "moedge", None):
            raise MoEdgeError(f"config.json of a {config.model_type} model has no moedge section; convert again.")
        if (schema := config.moedge.get("schema")) != CHECKPOINT_SCHEMA:
            raise MoEdgeError(
                f"The checkpoint is of schema {schema}, this version of MoEdge reads {CHECKPOINT_SCHEMA}; convert "
                "again or install the version that wrote it."
            )
        dense_model.__init__(self, config)
        try:
            for index, (layer, spec) in enumerate(zip(self.model.layers, config.moedge["layers"], strict=True)):
                if base in adapters.FAMILIES:
                    layer.mlp = SparseFFN(index, config.hidden_size, spec)
                elif spec is not None:
                    layer.mlp = hierarchical.HierarchicalFFN(index, config.hidden_size, spec, layer.mlp.gate)
            kept_inputs.prepare(self, config.moedge.get("kept_inputs", []))
        except (KeyError, TypeError, ValueError) as error:
            raise MoEdgeError(f"The moedge section of config.json is damaged ({error!r}); convert again.") from error

    model_class = type(
        f"{name}ForCausalLM",
        (dense_model,),
        {
            "__module__": __name__,
            "__doc__": f"{dense_model.__name__} with the FFNs of a plan.",
            "__init__": __init__,
            "config_class": config_class,
            "_keep_in_fp32_modules_strict": {*FLOAT32, *kept_inputs.FLOAT32},
        },
    )
    AutoConfig.register(adapters.MOE_PREFIX + base, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


CONFIGS: dict[str, Any] = {}
MODELS: dict[str, Any] = {}
for _base in (*adapters.FAMILIES, *moe_adapters.FAMILIES):
    CONFIGS[_base], MODELS[_base] = _register(_base)
