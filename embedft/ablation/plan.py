"""Plans a grid: completes what was asked, checks every cell before the first one starts, and names cells by content.

    grid = plan({"model": "...", "data": ["train.csv"]}, out, axes={"lr": [1e-5, 2e-5]}, seeds=[0, 1, 2], tests={...})

A key is the hash of the settings that change results, defaults included, and of the contents of model, data and code;
so equal data in another place makes no new cell, and a changed default or source file does.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..commands.adapter import check_adapter
from ..commands.finetune import Options, load_datasets
from ..commands.options import Bm25, load_data, load_model
from ..config import part
from ..data.dataset import RetrievalDataset
from ..data.mixture import join_datasets
from ..encoders.embedder import Embedder
from ..encoders.loading import load_embedder
from ..recipe.finetune import check_finetune
from ..recipe.job import measures
from ..retrieval.evaluate import evaluate_run
from ..retrieval.pca import check_pca
from ..retrieval.run import Run
from ..retrieval.search import Setting, check_settings
from ..retrieval.suite import about
from ..retrieval.teacher import load_teacher
from ..training.configs import AdapterConfig, FinetuneConfig
from ..training.run_folder import FREE
from .grid import (
    AVERAGE,
    VALIDATION,
    Cell,
    Grid,
    Point,
    apply,
    as_text,
    axes_of,
    code_sha256,
    describe,
    digest,
    product,
    value_at,
)
from .settings import (
    DATA,
    MODEL,
    OF_ADAPTERS,
    PARTS,
    Evaluation,
    check_key,
    complete,
    complete_parts,
    settings_of,
)


@dataclass
class _Point:
    """A point, and what its cells consist of."""

    name: str  # in messages
    point: Point
    config: dict[str, Any]
    options: Options
    evaluation: Evaluation
    adapter: AdapterConfig | None = None  # fitted on the frozen model in place of fine-tuning
    hashes: dict[str, str] = field(default_factory=dict)

    def training(self) -> dict[str, Any]:
        """The settings that change what is trained, defaults included; what data and model are is in the hashes."""
        parts = complete_parts(self.config)
        if self.adapter is not None:
            return {name: self.config[name] for name in ("max_length", "passages")} | {"adapter": parts["adapter"]}
        left_out = {*FREE, *MODEL, *DATA, "seed", *PARTS}
        found = {name: value for name, value in self.config.items() if name not in left_out}
        return found | parts

    def cell(self, seed: int | None, tests: Mapping[str, str], select: str) -> Cell:
        """The cell of a seed, given the hash of each test, and the metric to select by."""
        names = ["model", VALIDATION, "code", *(["train"] if self.evaluation.pca else [])]
        evaluated = {name: self.hashes[name] for name in names if name in self.hashes}
        precision = {"tf32": self.options.tf32, "compile": self.options.compile}
        how = {"evaluate": asdict(self.evaluation), **precision, "select": select}
        run = None if seed is None else digest(self.training(), seed, self.hashes)
        config = self.config | {"seed": seed, "evaluate": how["evaluate"]}
        key = digest(run or evaluated, how, tests)
        hashes = evaluated if seed is None else self.hashes
        hashes = hashes | {f"test {name}": sha256 for name, sha256 in tests.items()}
        return Cell(key, self.point, seed, config, hashes, run)


def plan(
    base: Mapping[str, Any],
    out: str | Path,
    *,
    tests: Mapping[str, str | Path],
    seeds: Sequence[int],
    axes: Mapping[str, Sequence[Any]] | None = None,
    points: Sequence[Point] | None = None,
) -> Grid:
    """The grid with all its cells. Nothing is written.

    Args:
        base: settings of `embedft finetune`, and under "evaluate" those of `Evaluation`; with "adapter", settings
            of `AdapterConfig`, cells fit an adapter on the frozen model. Others keep their defaults.
        axes: {dotted key: values} [those of `points`].
        points: some combinations of the values [all of them]. BASE is always one, and comes first.

    Raises `ValueError` for everything that would fail or make no sense: unknown keys, cells that cannot train, data or
    models that do not load, an axis that changes nothing, the same cell twice, tests that share training questions."""
    base, tests = complete(base), {name: str(path) for name, path in tests.items()}
    if not tests:
        raise ValueError("tests is empty, expected at least one")
    reserved = (VALIDATION, AVERAGE)
    if wrong := [name for name in tests if name in reserved or Path(name).name != name or name[:1] in ("", ".")]:
        raise ValueError(f"a test is named {wrong[0]!r}, expected the name of a new folder")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds are {list(seeds)}, expected different ones, at least one")
    for seed in seeds:
        settings_of(base | {"seed": seed})  # raises for one that is none
    axes = _checked_axes(axes or axes_of(points or []))
    asked = list(product(axes)) if points is None else [_in_data_lists(point) for point in points]
    labelled = base | complete_parts(base)
    base_point = {key: value_at(labelled, key) for key in axes}
    planned = [_planned(base, base_point, "BASE", {})]
    planned += [_planned(base, base_point | point, describe(point), point) for point in asked]
    loaded = _Tests(tests, planned[0].options)
    for _, group in itertools.groupby(sorted(planned, key=_model_of), key=_model_of):
        loaded.check(list(group))
    planned = _distinct(planned, axes)
    measured, untrained = (loaded.hashes, base["select"]), {}
    for cell in (each.cell(None, *measured) for each in planned):
        untrained.setdefault(cell.key, cell)
    cells = [*untrained.values(), *(each.cell(seed, *measured) for each in planned for seed in seeds)]
    points = [each.point for each in planned]
    return Grid(base, axes, points, list(seeds), tests, base["select"], cells, Path(out))


def _checked_axes(axes: Mapping[str, Sequence[Any]] | None) -> dict[str, list[Any]]:
    """The axes with keys as settings are named. Raises `ValueError` for unknown keys, no values, or one twice."""
    found: dict[str, list[Any]] = {}
    for given, values in (axes or {}).items():
        key = _as_setting(given)
        check_key(key)
        if key in found:
            raise ValueError(f"axis {key} is given twice")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"axis {key} is {values!r}, expected a list of values, at least one")
        found[key] = [_in_data_lists({key: value})[key] for value in values]
        texts = list(map(as_text, found[key]))
        if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
            raise ValueError(f"axis {key} has {twice[0]} twice")
    return found


def _as_setting(key: str) -> str:
    """The key as JSON has it: batch_size for batch-size; an option's own keys stay."""
    first, dot, rest = key.partition(".")
    return f"{first.replace('-', '_')}{dot}{rest}"


def _in_data_lists(point: Point) -> Point:
    """A point with one path of training data as a list of one."""
    point = {_as_setting(key): value for key, value in point.items()}
    return {key: [value] if key == "data" and isinstance(value, str) else value for key, value in point.items()}


def _planned(base: dict[str, Any], label: Point, name: str, point: Point) -> _Point:
    with about(name):
        config = apply(base, point)
        options, evaluation, adapter = settings_of(config)
        part(options, FinetuneConfig)  # raises for settings that cannot be combined
        if adapter and (unused := [key for key in point if key.partition(".")[0] not in OF_ADAPTERS]):
            raise ValueError(
                f"{unused[0]} changes nothing where an adapter is fitted; its own settings are adapter.KEY"
            )
    if evaluation.passages == "training":
        evaluation = replace(evaluation, passages=options.passages)
    if evaluation.fuse_weight is None:  # which changes nothing then
        evaluation = replace(evaluation, **asdict(Bm25()))
    return _Point(name, label, config, options, evaluation, adapter)


def _model_of(each: _Point) -> str:
    return as_text([each.config[name] for name in MODEL])


def _distinct(planned: list[_Point], axes: Mapping[str, list[Any]]) -> list[_Point]:
    """BASE and the points that differ from it. Raises `ValueError` for two points with the same cells."""
    seen: dict[str, _Point] = {}
    base = planned[0]
    for i, each in enumerate(planned):
        key = each.cell(0, {}, "").key
        if i and key in seen and (other := seen[key]) is not base:
            keys = [name for name in each.point if as_text(each.point[name]) != as_text(other.point[name])]
            if len(keys) == 1:
                values = " and ".join(as_text(one.point[keys[0]]) for one in (other, each))
                raise ValueError(f"axis {keys[0]} changes nothing: {values} make the same cells")
            raise ValueError(f"{describe(each.point)} is the same cell as {describe(other.point)}")
        seen[key] = each
    found = list(seen.values())
    for key, values in axes.items():
        if {as_text(value) for value in values} == {as_text(found[0].point[key])}:
            raise ValueError(f"axis {key} changes nothing: the base has {as_text(values[0])} too")
    return found


class _Tests:
    """The test sets, and what points are checked against."""

    def __init__(self, tests: Mapping[str, str], options: Options):
        how = replace(options, format=None, split=None)
        self.tests = {name: load_data(path, how) for name, path in tests.items()}
        self.hashes = {name: test.sha256() for name, test in self.tests.items()}
        self.questions = {name: set(test.answers()) for name, test in self.tests.items()}
        self.code, self.data, self.references, self.warned = code_sha256(), {}, {}, set()
        for name, test in self.tests.items():
            with about(f"test {name}"):  # raises if no question has an answer
                evaluate_run(Run.from_dict({}), test, **measures(options.select))

    def check(self, points: list[_Point]) -> None:
        """Checks points with the same model, and fills in their hashes."""
        plain = replace(points[0].options, tf32=False, compile=False)
        embedder = load_model(plain, device="cpu")
        sha256 = embedder.sha256()
        for each in points:
            with about(each.name):
                if (dtype := each.evaluation.dtype) == "int8":  # raises where there are no such products
                    load_model(plain, device="cpu", dtype=dtype)
                dataset, validation, hashes = self._data(each.options)
                each.hashes |= {"model": sha256, "code": self.code, **hashes, **self._references(each.options)}
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    _check_cell(embedder, each, dataset, validation)
                self._warn(caught)
            _leave_out_defaults(each, embedder)

    def _warn(self, caught: list[warnings.WarningMessage]) -> None:
        """Shows what was said of a point, unless it was said of another."""
        for text in dict.fromkeys(str(one.message) for one in caught):
            if text not in self.warned:
                self.warned.add(text)
                warnings.warn(text, stacklevel=3)

    def _data(self, options: Options) -> tuple:
        """Training data, validation data and their hashes; loaded once for each way of loading."""
        key = as_text([getattr(options, name) for name in (*DATA, "examples")])  # which may be bare texts
        if key not in self.data:
            dataset, validation = load_datasets(options)
            parts = {"train": join_datasets(dataset)}
            parts |= {VALIDATION: join_datasets(validation)} if validation is not None else {}
            for (kind, data), (name, questions) in itertools.product(parts.items(), self.questions.items()):
                _check_apart(name, questions, "training" if kind == "train" else kind, data)
            self.data[key] = dataset, validation, {kind: data.sha256() for kind, data in parts.items()}
        return self.data[key]

    def _references(self, options: Options) -> dict[str, str]:
        """The hashes of reference models and teachers."""
        found = {}
        for name, model in options.references.items():
            if model is not None:
                if model not in self.references:
                    self.references[model] = load_embedder(model, device="cpu").sha256()
                found[f"reference {name}"] = self.references[model]
        if teacher := part(options, FinetuneConfig).teacher_config():
            key = as_text(options.teacher)
            if key not in self.references:
                how = {name: getattr(teacher, name) for name in ("passages", "scale", "api", "bm25")}
                self.references[key] = load_teacher(teacher.models, device="cpu", **how).sha256()
            found |= {f"teacher {name}": sha256 for name, sha256 in self.references[key].items()}
        return found


def _check_cell(embedder: Embedder, each: _Point, dataset: Any, validation: Any) -> None:
    if each.adapter is None:
        check_finetune(embedder, dataset, part(each.options, FinetuneConfig), validation=validation)
    else:
        check_adapter(embedder, join_datasets(dataset), each.adapter)
    how = each.evaluation
    if how.pca is not None:
        check_pca(embedder, join_datasets(dataset), how.pca)
    own = embedder.max_length
    for length in {own, each.options.max_length or own}:  # raises for windows longer than either
        embedder.max_length = length
        check_settings(embedder, [Setting(how.dim, how.precision, "flat", how.passages)])
    embedder.max_length = own


def _leave_out_defaults(each: _Point, embedder: Embedder) -> None:
    """Leaves out what the model does by itself, so that it makes no other cells: its own length, all its dimensions."""
    if each.config["max_length"] == embedder.max_length:
        each.config["max_length"] = None
        each.options = replace(each.options, max_length=None)
    if each.adapter is None and each.evaluation.dim == embedder.full_dim:
        each.evaluation = replace(each.evaluation, dim=None)


def _check_apart(name: str, questions: set[str], kind: str, other: RetrievalDataset) -> None:
    if shared := questions & other.answers().keys():
        found = f"{len(shared):,} of its {len(questions):,} questions are {kind} questions too"
        raise ValueError(f"test {name}: {found}, for example {min(shared)!r}; leave them out of one of the two")
