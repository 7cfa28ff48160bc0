"""The recipe: one YAML file that says what ``moedge run`` does, checked before any work starts.

Every value has a type, a range and a default; an unknown key, a wrong type or an impossible value is refused with the
key's dotted path and one sentence. ``recipes/smollm2-135m.yaml`` documents every key.

The keys of ``convert`` are ``method`` and the parameters that the method itself declares in ``convert.methods.METHODS``
(an import without torch): no parameter is written down twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moedge import MoEdgeError
from moedge.configs import devices, tolerances
from moedge.configs import files as yaml_files
from moedge.configs.errors import checked, matching
from moedge.convert.methods import METHODS, GatherParams, Method
from moedge.convert.moe_adapters import FAMILIES as MOE_FAMILIES
from moedge.convert.tasks import KNOWN as TASKS
from moedge.export import targets as registry

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Name = Annotated[
    str,
    Field(min_length=1, max_length=64),
    matching(r"^[A-Za-z0-9][A-Za-z0-9._-]*\Z", "a plain name (letters, digits, '.', '_' and '-')"),
]
Device = Annotated[str, matching(r"^(cpu|cuda(:\d+)?)\Z", "a device of PyTorch; give cpu, cuda or cuda:N")]
"""Where PyTorch computes."""

Spec = Annotated[str, Field(min_length=1)]
"""What ``convert.sources.resolve`` or ``convert.calibration.read_text`` opens: ``asset:NAME``, a path, or a hub id."""


def _one_of(names: Callable[[], Iterable[str]]) -> AfterValidator:
    """Refuse what is not among the names that there are when a value is read."""

    def check(name: str) -> str:
        known = list(names())
        if name not in known:
            *others, last = map(repr, known)
            expected = f"{', '.join(others)} or {last}"
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return name

    return AfterValidator(check)


TargetName = Annotated[str, _one_of(registry.names)]
"""A name in :mod:`moedge.export.targets`, asked when a recipe is read: others may have been registered."""
TaskName = Annotated[str, _one_of(lambda: TASKS)]
"""A task of lm-eval whose questions are packaged."""


def _form(value: Any) -> str:
    return "given" if isinstance(value, dict | tolerances.Given) else "profile"


TolerancesSpec = Annotated[
    Annotated[Spec, Tag("profile")] | Annotated[tolerances.Given, Tag("given")], Discriminator(_form)
]
ControlName = Literal[
    "static mask",
    "FLAP-MLP",
    "Wanda-structured",
    "random router",
    "random partition",
    "LLaMA-MoE random",
    "LLaMA-MoE clustering",
    "MoEfication, centre router",
    "TEAL",
    "WINA",
    "GRIFFIN",
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


Specs = Annotated[
    list[Spec],
    Field(min_length=1),
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    PlainSerializer(lambda value: value[0] if len(value) == 1 else value),
]
"""One or several; one alone is written without a list."""


class TextSection(_Section):
    """Which texts to calibrate on and which to hold out."""

    calibration: Specs = ["asset:wiki"]
    """The calibration windows are dealt out to the texts in turn."""
    held_out: Annotated[list[Spec], Field(min_length=1)] = ["asset:wiki", "asset:c4"]
    holdout_every: Annotated[int, Field(ge=2)] = 10

    @field_validator("calibration", "held_out")
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
    bos: bool | None = None
    """Whether windows start with the BOS token; None: where the tokenizer starts every text with it."""


class GatherSection(GatherParams, _Section):
    """Thresholds on top of what a method makes: which small values are left out, and how many."""


class ConvertSection(_Section):
    """The conversion method; the section of each method, in :data:`CONVERT_SECTIONS`, adds its parameters."""

    model_config = ConfigDict(allow_inf_nan=False)

    method: str = "cmoe"
    gather: GatherSection | None = None
    """Small values are left out on top of what the method makes, until so much of the FFN weights is read."""

    @model_validator(mode="after")
    def _takes_gather(self) -> ConvertSection:
        if self.gather is not None and (reason := METHODS[self.method].no_gather):
            raise ValueError(f"gather: {reason}")
        return self


def _convert_section(name: str, method: Method) -> type[ConvertSection]:
    # The bases' order puts `method` first and lets this file's strictness win over the method's own config.
    section: Any = create_model(f"{name}_section", __base__=(method.params, ConvertSection), method=(str, name))
    return section


CONVERT_SECTIONS = {name: _convert_section(name, method) for name, method in METHODS.items()}
"""Method name -> its ``convert`` section."""


def method(value: Any) -> Any:
    """Choose the section; named as the key, which a refusal says. What is no mapping the default section refuses."""
    return value.get("method", "cmoe") if isinstance(value, dict) else getattr(value, "method", "cmoe")


if TYPE_CHECKING:
    AnyConvert = ConvertSection
else:
    _SECTIONS = tuple(Annotated[section, Tag(name)] for name, section in CONVERT_SECTIONS.items())
    AnyConvert = Annotated[Union[_SECTIONS], Discriminator(method)]  # noqa: UP007 - known at run time


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
    bos: bool | None = None
    """Whether windows start with the BOS token; None: where the tokenizer starts every text with it."""
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
    tolerances: TolerancesSpec = "float32"
    """The weight dtype, first half of a profile's name; or that and a file, see :class:`.tolerances.Given`."""
    threads: Positive | None = None
    thorough: bool = False
    """Larger batches and longer rows in the checks of other shapes, and a text of ``max_length`` tokens."""
    max_length: Annotated[int, Field(ge=32)] | None = None
    """Tokens of that text, also without ``thorough``, which reads 2048."""
    tasks: list[TaskName] = Field(default=[])
    """lm-eval tasks whose answers are a gate too: those of every engine beside those of the checkpoint."""
    shots: NonNegative = 0
    """Solved examples in front of a question."""
    limit: Positive | None = None
    """The first so many questions of each task; None: all."""


class BenchSection(_Section):
    """What is timed."""

    prompt: Positive = 512
    decode: Annotated[int, Field(ge=2)] = 32
    repeats: Annotated[int, Field(ge=3)] = 6
    warmup: NonNegative = 1
    threads: Positive | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    profile: bool = False


class FrontierVariant(_Section):
    """One conversion to compare."""

    label: Annotated[str, Field(max_length=24), matching(r"^[^\s|](.*[^\s|])?\Z", "a name of one line without '|'")]
    convert: AnyConvert

    @field_validator("label")
    @classmethod
    def _not_the_parent(cls, value: str) -> str:
        if value.split()[0] == "dense":
            raise ValueError("begins with dense, which is what the parent is called; choose another name.")
        return value


class FrontierSection(_Section):
    """What ``moedge frontier`` compares, and how; None takes what the rest of the recipe says."""

    run: bool = False
    """Whether ``moedge run`` does it too."""
    variants: Annotated[list[FrontierVariant], Field(min_length=1)] | None = None
    targets: Annotated[list[TargetName], Field(min_length=1)] | None = None
    tokens: Annotated[int, Field(ge=8)] | None = None
    """Tokens of each held-out text, in windows of ``evaluate.window``."""
    prompt: Positive | None = None
    decode: Annotated[int, Field(ge=2)] | None = None
    repeats: Annotated[int, Field(ge=3)] | None = None
    batches: Annotated[list[Positive], Field(min_length=1)] = [1]
    speedup: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.25
    """Decode speed, in units of the dense parent's in the same precision, at which the verdict compares."""

    @field_validator("variants")
    @classmethod
    def _no_repeated_labels(cls, value: list[FrontierVariant] | None) -> list[FrontierVariant] | None:
        labels = [variant.label for variant in value or []]
        if len(set(labels)) != len(labels):
            raise ValueError("names a label twice; give each variant its own.")
        return value

    @field_validator("targets")
    @classmethod
    def _executed_here(cls, value: list[str] | None) -> list[str] | None:
        for name in value or []:
            if registry.find(name).engine is not None:
                raise ValueError(f"{name} runs on a device only; name targets that this machine executes.")
        if value is not None and len(set(value)) != len(value):
            raise ValueError("names a target twice; list each target once.")
        return value


Problems = list[tuple[str, str]]
"""What is wrong: the dotted path of a key, and a sentence about it."""


class Conversion(_Section):
    """The sections that the stages ``source``, ``calibrate`` and ``convert`` read: all of ``moedge convert``."""

    name: Name
    model: ModelSection
    text: TextSection = TextSection()
    calibration: CalibrationSection = CalibrationSection()
    convert: AnyConvert = CONVERT_SECTIONS["cmoe"]()

    @model_validator(mode="after")
    def _sections_agree(self) -> Conversion:
        if problems := self._disagreements():
            raise ValueError("\n".join(f"{key}: {said}" for key, said in problems))
        return self

    def _disagreements(self) -> Problems:
        method, windows, texts = self.convert.method, self.calibration.windows, len(self.text.calibration)
        if windows < (fewest := METHODS[method].fewest_windows):
            return [("calibration.windows", f"{method} compares windows; it needs at least {fewest}.")]
        if windows < texts:
            said = f"{windows} windows cannot be dealt out to {texts} texts (text.calibration); give one a text."
            return [("calibration.windows", said)]
        return []

    def check_model(self, config: dict[str, Any], where: str, *, called: Callable[[str], str] = str) -> None:
        """Check what can only be checked once the model's ``config.json`` is known.

        Args:
            config: of the model.
            where: starts each sentence of a refusal.
            called: turns the dotted path of a key, or ``path: value``, into what the user calls it.

        Raises:
            MoEdgeError: experts that do not divide the FFN width, or lengths beyond what the model was made for.
        """
        if problems := [*self._of_method(config), *self._of_width(config, called), *self._of_lengths(config)]:
            raise MoEdgeError("\n".join(f"{where}: {called(key)}: {said}" for key, said in problems))

    def _of_method(self, config: dict[str, Any]) -> Problems:
        method, model_type = METHODS[self.convert.method], str(config.get("model_type"))
        if (method.parents == "moe") == (model_type in MOE_FAMILIES):
            return []
        wanted = "splits the experts of a Mixture-of-Experts" if method.parents == "moe" else "converts dense models"
        others = ", ".join(name for name, other in METHODS.items() if other.parents != method.parents)
        return [("convert.method", f"{self.convert.method} {wanted}, this is {model_type}; choose {others}.")]

    def _of_width(self, config: dict[str, Any], called: Callable[[str], str]) -> Problems:
        # Qwen3-MoE has dense layers too, so its experts' width has a name of its own.
        width = config.get("moe_intermediate_size") if METHODS[self.convert.method].parents == "moe" else None
        width = width or config.get("intermediate_size")
        if not isinstance(width, int):
            return []
        convert = self.convert.model_dump()
        parts = {name: convert[name] for name in ("experts", "branches", "k_a") if name in convert}
        problems = [
            (f"convert.{name}", f"{wanted} is more than the FFN's {width} neurons.")
            for name, wanted in parts.items()
            if wanted > width
        ]
        experts = parts.get("experts", 1)
        if width >= experts and width % experts and convert.get("padding") == "none":
            near = sorted((n for n in range(2, width) if width % n == 0), key=lambda n: abs(n - experts))[:2]
            options = " or ".join(str(n) for n in sorted(near)) or "another number"
            said = f"{experts} does not divide the FFN width {width}; choose {options}, or set "
            problems.append(("convert.experts", f"{said}{called('convert.padding: uneven')}."))
        for layout in convert.get("layouts", []):
            count = int(layout.partition("E")[2])
            if count > width or (width % count and convert["padding"] == "none"):
                problems.append(("convert.layouts", f"{layout} does not divide the FFN width {width}."))
        return problems

    def _of_lengths(self, config: dict[str, Any]) -> Problems:
        longest = config.get("max_position_embeddings")
        return [
            (key, f"{length} is beyond the model's {longest} positions.")
            for key, length in self._lengths().items()
            if isinstance(longest, int) and length > longest
        ]

    def _lengths(self) -> dict[str, int]:
        """Positions that the model is run over, by the key that asks for them."""
        return {"calibration.length": self.calibration.length}


class Recipe(Conversion):
    """A whole run; see the packaged ``recipes/smollm2-135m.yaml`` for what each key means."""

    export: ExportSection = ExportSection()
    evaluate: EvaluateSection = EvaluateSection()
    verify: VerifySection = VerifySection()
    bench: BenchSection = BenchSection()
    frontier: FrontierSection = FrontierSection()

    def _disagreements(self) -> Problems:
        problems = super()._disagreements()
        if self.verify.prefill >= self.verify.window:
            said = (
                f"{self.verify.prefill} leaves nothing to decode in a window of {self.verify.window} "
                "tokens (verify.window); make it smaller."
            )
            problems.append(("verify.prefill", said))
        lengths = {"verify.window": self.verify.window, "bench.prompt": self.bench.prompt + self.bench.decode}
        if self.verify.max_length:
            lengths["verify.max_length"] = self.verify.max_length
        if self.frontier.prompt or self.frontier.decode:
            lengths["frontier.prompt"] = sum(self.frontier_lengths())
        for key, length in lengths.items():
            if length > self.export.max_length:
                said = f"needs {length} cache positions, but export.max_length is {self.export.max_length}."
                problems.append((key, said))
        for key, tokens in (("evaluate.tokens", self.evaluate.tokens), ("frontier.tokens", self.frontier.tokens)):
            if tokens is not None and tokens < self.evaluate.window:
                said = f"{tokens} is less than one window of {self.evaluate.window} tokens (evaluate.window)."
                problems.append((key, said))
        return problems

    def frontier_lengths(self) -> tuple[int, int]:
        """Return the tokens of the prompt and of the answer that the frontier times."""
        return self.frontier.prompt or self.bench.prompt, self.frontier.decode or self.bench.decode

    def _of_method(self, config: dict[str, Any]) -> Problems:
        problems = super()._of_method(config)
        if not problems and METHODS[self.convert.method].parents == "moe":
            said = (
                f"`moedge run` compares with dense controls, which {self.convert.method} has none of; "
                "use `moedge convert`, `moedge export`, `moedge verify` and `moedge bench`."
            )
            problems.append(("convert.method", said))
        return problems

    def _lengths(self) -> dict[str, int]:
        later = {"evaluate.window": self.evaluate.window, "export.max_length": self.export.max_length}
        return super()._lengths() | later


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
    return checked(Recipe, value, where=where)


def conversion_from(value: dict[str, Any], *, where: str, called: Callable[[str], str] = str) -> Conversion:
    """Check the sections of a recipe that a conversion reads; see :meth:`Conversion.check_model` for ``called``."""
    return checked(Conversion, value, where=where, called=called)
