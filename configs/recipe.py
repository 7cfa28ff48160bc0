"""The recipe: one YAML file that says what ``moedge run`` does, checked before any work starts.

Every value has a type, a range and a default; an unknown key, a wrong type or an impossible value is refused with the
key's dotted path and one sentence. ``recipes/smollm2-135m.yaml`` documents every key.

The keys of ``convert`` are ``method`` and the parameters that the method itself declares in ``convert.methods.METHODS``
(an import without torch): no parameter is written down twice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from moedge import MoEdgeError
from moedge.configs import devices
from moedge.configs import files as yaml_files
from moedge.configs.files import name_of
from moedge.convert.methods import METHODS, Method
from moedge.convert.moe_adapters import FAMILIES as MOE_FAMILIES
from moedge.export import targets as registry

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
DEVICE = r"^(cpu|cuda(:\d+)?)$"
Device = Annotated[str, Field(pattern=DEVICE)]
"""Where PyTorch computes."""

Spec = Annotated[str, Field(min_length=1)]
"""What ``convert.sources.resolve`` or ``convert.calibration.read_text`` opens: ``asset:NAME``, a path, or a hub id."""


def _known_target(name: str) -> str:
    if name not in registry.names():
        *others, last = map(repr, registry.names())
        expected = f"{', '.join(others)} or {last}"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
    return name


TargetName = Annotated[str, AfterValidator(_known_target)]
"""A name in :mod:`moedge.export.targets`, asked when a recipe is read: others may have been registered."""
ControlName = Literal[
    "static mask",
    "FLAP-MLP",
    "Wanda-structured",
    "random router",
    "random partition",
    "LLaMA-MoE random",
    "LLaMA-MoE clustering",
    "MoEfication, centre router",
    "oracle router",
    "neuron top-k",
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSection(_Section):
    """Which dense model to open."""

    source: Spec
    revision: str | None = None
    device: Device = "cpu"


class TextSection(_Section):
    """Which text to calibrate on and which to hold out."""

    calibration: Spec = "asset:wiki"
    held_out: Annotated[list[Spec], Field(min_length=1)] = ["asset:wiki", "asset:c4"]
    holdout_every: Annotated[int, Field(ge=2)] = 10

    @field_validator("held_out")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("names a text twice; list each text once.")
        return value


class CalibrationSection(_Section):
    """How many tokens the statistics are measured on."""

    windows: Positive = 8
    length: Annotated[int, Field(ge=8)] = 2048
    batch_size: Positive = 1
    bos: bool = False


class ConvertSection(_Section):
    """The conversion method; the section of each method, in :data:`CONVERT_SECTIONS`, adds its parameters."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: str = "cmoe"


def _convert_section(name: str, method: Method) -> type[ConvertSection]:
    # The bases' order puts `method` first and lets this file's strictness win over the method's own config.
    section: Any = create_model(f"{name}_section", __base__=(method.params, ConvertSection), method=(str, name))
    return section


CONVERT_SECTIONS = {name: _convert_section(name, method) for name, method in METHODS.items()}
"""Method name -> its ``convert`` section."""


class _ByMethod:
    """Checks ``convert`` with the section of the method that it names."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        sections = {name: handler.generate_schema(section) for name, section in CONVERT_SECTIONS.items()}
        return core_schema.tagged_union_schema(sections, discriminator=self._method)

    @staticmethod
    def _method(value: Any) -> Any:
        if isinstance(value, dict):
            return value.get("method", "cmoe")
        return getattr(value, "method", "cmoe")  # what is no mapping is refused by the section


class ExportSection(_Section):
    """Which bundles to write."""

    targets: Annotated[list[TargetName], Field(min_length=1)] = list(registry.default())
    build: list[Spec] = []
    """Device profiles for which the bundle ``tensorrt-rtx`` of the MoE becomes one engine."""
    dtype: Literal["float16", "bfloat16"] = "float16"
    """Half-precision type of the targets that leave the choice."""
    dense_parent: bool = True
    max_length: Annotated[int, Field(ge=16)] = 2048

    @field_validator("targets", mode="before")
    @classmethod
    def _left_out_on_purpose(cls, value: Any) -> Any:
        for name in value if isinstance(value, list) else []:
            if isinstance(name, str) and name in registry.REFUSED:
                raise ValueError(registry.REFUSED[name])
        return value

    @field_validator("targets")
    @classmethod
    def _no_repeats(cls, value: list[str]) -> list[str]:
        if len(set(value)) != len(value):
            raise ValueError("names a target twice; list each target once.")
        return value

    @field_validator("build")
    @classmethod
    def _devices_take_engines(cls, value: list[str]) -> list[str]:
        for name in value:
            if reason := devices.refusal("tensorrt-rtx", devices.load(name)):
                raise ValueError(reason)
        return value

    @model_validator(mode="after")
    def _there_is_something_to_build(self) -> ExportSection:
        if self.build and "tensorrt-rtx" not in self.targets:
            raise ValueError("build needs the target tensorrt-rtx; add it to targets.")
        for name in self.build:
            if reason := devices.half_refusal(self.dtype, devices.load(name)):
                raise ValueError(reason)
        return self


class EvaluateSection(_Section):
    """How quality is measured, and against which controls."""

    window: Annotated[int, Field(ge=8)] = 512
    tokens: Annotated[int, Field(ge=8)] = 3072
    batch_size: Positive = 4
    bos: bool = False
    controls: list[ControlName] = [
        "static mask",
        "FLAP-MLP",
        "random router",
        "random partition",
        "oracle router",
    ]
    seeds: Annotated[list[NonNegative], Field(min_length=1)] = [0]
    diagnostics: bool = False


class VerifySection(_Section):
    """How the ONNX engines are compared with PyTorch."""

    tokens: Annotated[int, Field(ge=2048)] = 2048
    window: Annotated[int, Field(ge=8)] = 256
    prefill: Positive = 224
    tolerances: Spec = "float32"
    threads: Positive | None = None


class BenchSection(_Section):
    """What is timed."""

    prompt: Positive = 512
    decode: Annotated[int, Field(ge=2)] = 32
    repeats: Annotated[int, Field(ge=3)] = 5
    warmup: NonNegative = 1
    threads: Positive | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    profile: bool = False


class Recipe(_Section):
    """A whole run; see the packaged ``recipes/smollm2-135m.yaml`` for what each key means."""

    name: Name
    model: ModelSection
    text: TextSection = TextSection()
    calibration: CalibrationSection = CalibrationSection()
    convert: Annotated[ConvertSection, _ByMethod()] = CONVERT_SECTIONS["cmoe"]()
    export: ExportSection = ExportSection()
    evaluate: EvaluateSection = EvaluateSection()
    verify: VerifySection = VerifySection()
    bench: BenchSection = BenchSection()

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        problems = []
        method = self.convert.method
        if self.calibration.windows < 2 and not {"tokens", "gate_profile"}.isdisjoint(METHODS[method].needs):
            problems.append(f"calibration.windows: {method} compares windows; it needs at least 2.")
        if self.verify.prefill >= self.verify.window:
            problems.append(
                f"verify.prefill: {self.verify.prefill} leaves nothing to decode in a window of {self.verify.window} "
                "tokens (verify.window); make it smaller."
            )
        for key, length in (
            ("verify.window", self.verify.window),
            ("bench.prompt", self.bench.prompt + self.bench.decode),
        ):
            if length > self.export.max_length:
                problems.append(
                    f"{key}: needs {length} cache positions, but export.max_length is {self.export.max_length}."
                )
        if self.evaluate.tokens < self.evaluate.window:
            problems.append(
                f"evaluate.tokens: {self.evaluate.tokens} is less than one window of {self.evaluate.window} tokens "
                "(evaluate.window)."
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def check_model(self, config: dict[str, Any], where: str, *, only_convert: bool = False) -> None:
        """Check what can only be checked once the model's ``config.json`` is known.

        ``only_convert`` leaves out what the stages after ``convert`` need.

        Raises:
            MoEdgeError: experts that do not divide the FFN width, or lengths beyond what the model was made for.
        """
        problems = []
        method = METHODS[self.convert.method]
        model_type = str(config.get("model_type"))
        if (method.parents == "moe") != (model_type in MOE_FAMILIES):
            wanted = (
                "splits the experts of a Mixture-of-Experts" if method.parents == "moe" else "converts dense models"
            )
            others = ", ".join(name for name, other in METHODS.items() if other.parents != method.parents)
            problems.append(f"convert.method: {self.convert.method} {wanted}, this is {model_type}; choose {others}.")
        elif method.parents == "moe" and not only_convert:
            problems.append(
                f"convert.method: `moedge run` compares with dense controls, which {self.convert.method} has none of; "
                "use `moedge convert`, `moedge export`, `moedge verify` and `moedge bench`."
            )
        # Qwen3-MoE has dense layers too, so its experts' width has a name of its own.
        width = config.get("moe_intermediate_size") if method.parents == "moe" else None
        width = width or config.get("intermediate_size")
        convert = self.convert.model_dump()
        if isinstance(width, int):
            parts = {name: convert[name] for name in ("experts", "branches", "k_a") if name in convert}
            for name, parts_wanted in parts.items():
                if parts_wanted > width:
                    problems.append(f"convert.{name}: {parts_wanted} is more than the FFN's {width} neurons.")
            experts = parts.get("experts", 1)
            if width >= experts and width % experts and convert.get("padding") == "none":
                near = sorted((n for n in range(2, width) if width % n == 0), key=lambda n: abs(n - experts))[:2]
                options = " or ".join(str(n) for n in sorted(near)) or "another number"
                problems.append(
                    f"convert.experts: {experts} does not divide the FFN width {width}; choose {options}, or set "
                    "convert.padding: uneven."
                )
        longest = config.get("max_position_embeddings")
        if isinstance(longest, int):
            lengths = [("calibration.length", self.calibration.length)]
            if not only_convert:
                lengths += [("evaluate.window", self.evaluate.window), ("export.max_length", self.export.max_length)]
            for key, length in lengths:
                if length > longest:
                    problems.append(f"{key}: {length} is beyond the model's {longest} positions.")
        if problems:
            raise MoEdgeError("\n".join(f"{where}: {problem}" for problem in problems))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read and check a recipe: the name of a packaged one, or a path to a YAML file.

    Raises:
        MoEdgeError: no such recipe, not YAML, or a key that is unknown, of a wrong type or impossible.
    """
    path, text = yaml_files.read(name_or_path, "recipe")
    return parse_recipe(text, where=str(path), name=path.stem)


def parse_recipe(text: str, *, where: str = "recipe", name: str = "recipe") -> Recipe:
    """Check a recipe's YAML text. ``name`` is used when the text has no ``name`` key."""
    value = yaml_files.parse(text, where, "recipe")
    return recipe_from({"name": re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "recipe", **value}, where=where)


def recipe_from(value: dict[str, Any], *, where: str) -> Recipe:
    """Check a recipe that is already a mapping; ``where`` starts each sentence of a refusal."""
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        lines = [line for entry in error.errors(include_url=False) for line in _sentences(entry)]
        raise MoEdgeError("\n".join(f"{where}: {line}" for line in lines)) from None


def _sentences(entry: Any) -> list[str]:
    """Turn one pydantic error into ``dotted.path: one sentence``."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    section = _section(entry["loc"])
    # Below `convert` pydantic puts the method's name, which is no key, into the location.
    location = (*entry["loc"][:1], *entry["loc"][2:]) if entry["loc"][:1] == ("convert",) else entry["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    got = f"got {name_of(value)}" if isinstance(value, list | dict) or value is None else f"got {value!r}"
    if kind == "value_error":
        lines = str(context["error"]).split("\n")
        if section is Recipe:
            return lines
        # A check of a whole section starts its sentence with the key that it is about.
        about = section is not None and lines[0].split(":")[0] in section.model_fields
        return [f"{path}{'.' if about else ': '}{lines[0]}"]
    if kind == "extra_forbidden":
        keys = f"; known keys here: {', '.join(parent.model_fields)}" if (parent := _section(entry["loc"][:-1])) else ""
        return [f"{path}: unknown key{keys}."]
    if kind == "union_tag_invalid":
        known = f"choose {', '.join(CONVERT_SECTIONS)} (`moedge methods`)"
        return [f"{path}.method: unknown value {context['tag']!r}; {known}."]
    if kind == "missing":
        return [f"{path}: is required."]
    if kind == "literal_error":
        return [f"{path}: unknown value {value!r}; choose {context['expected']}."]
    wanted = {
        "int_type": "a whole number",
        "float_type": "a number",
        "string_type": "text",
        "bool_type": "true or false",
        "list_type": "a list",
        "tuple_type": "a list",
        "finite_number": "a finite number",
        "model_type": "a mapping of keys",
        "model_attributes_type": "a mapping of keys",
        "int_from_float": "a whole number",
    }
    if kind in wanted:
        text = " (text)" if isinstance(value, str) else ""
        return [f"{path}: must be {wanted[kind]}, {got}{text}."]
    bounds = {"greater_than_equal": ("ge", "at least"), "less_than_equal": ("le", "at most")}
    bounds |= {"greater_than": ("gt", "more than"), "less_than": ("lt", "less than")}
    if kind in bounds:
        key, words = bounds[kind]
        return [f"{path}: must be {words} {context[key]}, {got}."]
    if kind == "too_short" and context["min_length"] == 1:
        return [f"{path}: must not be empty."]
    if kind in ("too_short", "too_long"):
        limit = f"at least {context['min_length']}" if kind == "too_short" else f"at most {context['max_length']}"
        return [f"{path}: must have {limit} entries, got {len(value)}."]
    if kind == "string_too_short":
        return [f"{path}: must not be empty text."]
    if kind == "string_pattern_mismatch" and context["pattern"] == DEVICE:
        return [f"{path}: {value!r} is not a device of PyTorch; give cpu, cuda or cuda:N."]
    if kind == "string_pattern_mismatch":
        return [f"{path}: {value!r} is not a plain name (letters, digits, '.', '_' and '-')."]
    return [f"{path}: {entry['msg']} ({got})."]


def _section(location: tuple[str | int, ...]) -> type[BaseModel] | None:
    """Return the section at a location of a pydantic error, None when something else is there."""
    if location[:1] == ("convert",) and len(location) == 2:
        return CONVERT_SECTIONS.get(str(location[1]))
    model: Any = Recipe
    for part in location:
        fields = getattr(model, "model_fields", {})
        model = fields[part].annotation if part in fields else None
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None
