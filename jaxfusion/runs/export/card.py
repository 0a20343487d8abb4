"""The metadata of an export's model card, as the Hugging Face hub reads it."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from jaxfusion.config import CONFIG_FILE, stage_before
from jaxfusion.data.languages import iso_of
from jaxfusion.data.pocket.lexicon import WORLD_FILE
from jaxfusion.data.pocket.world import TASKS as POCKET_TASKS
from jaxfusion.data.rows.examples import find_source
from jaxfusion.data.tasks.catalogue import TASKS, get_task
from jaxfusion.data.tasks.spec import Source, configured
from jaxfusion.errors import InputError
from jaxfusion.fields import Config
from jaxfusion.files import read_json
from jaxfusion.reports.scored_runs import DETAILS
from jaxfusion.reports.terminal import Results, read_results
from jaxfusion.runs.open_run import open_run

REPAIR = "score the run again, or remove it"
EXAMPLES = 4  # widget examples, each in a language of its own
LICENCE = ("license", "license_name", "license_link")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """A model that an export is made of.

    Attributes:
      role: encoder, LLM.
      name: its hub id, or the name of its directory.
      on_hub: whether `name` is a hub id.
      licence: what its own model card says: `license`, `license_name`, `license_link`.
    """

    role: str
    name: str
    on_hub: bool
    licence: dict[str, str]

    def line(self) -> str:
        """The model in a list of the card."""
        place, unknown = ("", "see its own page") if self.on_hub else (
            " (a local directory)", "not stated there")
        said = self.licence.get("license_name") or self.licence.get("license") or unknown
        return f"- {self.role}: `{self.name}`{place}, licence: {said}"


def base_of(role: str, checkpoint: str, path: Path) -> Base:
    """A backbone, named without any path of this machine.

    Args:
      checkpoint: its name in the config. path: where its files are.
    """
    local = Path(checkpoint).expanduser()
    on_hub = not local.is_dir()
    name = checkpoint if on_hub else local.resolve().name
    return Base(role, name, on_hub, _licence_of(path / "README.md", name if on_hub else None))


def _licence_of(card: Path, hub_id: str | None) -> dict[str, str]:
    """What a model card says about the licence; a link to a file needs the repository's name."""
    try:
        text = card.read_text("utf-8", "replace")  # in any encoding: what counts is ASCII
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # no card, or a broken one
        return {}
    found = {name: data[name] for name in LICENCE if isinstance(data.get(name), str)}
    if (link := found.pop("license_link", "")).startswith("https://"):
        found["license_link"] = link
    elif link and hub_id:
        found["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return found if "license" in found else {}


def joint_licence(bases: Iterable[Base]) -> dict[str, str]:
    """The licence of what is made of all these models; nothing if one of them states none."""
    said = [base.licence for base in bases]
    if not all(said):
        return {}
    if all(x == said[0] for x in said):
        return said[0]
    names = dict.fromkeys((x.get("license_name") or x["license"]).lower() for x in said)
    return {"license": "other", "license_name": "-and-".join(names)}


@dataclass(frozen=True)
class Scores:
    """What eval.py wrote about the exported step.

    Attributes:
      sources: where the rows of a task and language are; languages that cannot be told are left
        out.
      examples: widget examples, of published rows.
    """

    results: Results = field(default_factory=dict)
    sources: dict[tuple[str, str], Source] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> str:
        """All scores as a table in Markdown."""
        if not self.results:
            return "Not scored yet (`eval.py`)."
        lines = ["| task | language | scoring | accuracy | 95% interval | rows |",
                 "|---|---|---|---|---|---|"]
        lines += [
            f"| {task} | {language} | {scoring} | {100 * x['accuracy']:.1f} | "
            f"{100 * x['ci95'][0]:.1f} to {100 * x['ci95'][1]:.1f} | {x['n']} |"
            for task, languages in self.results.items()
            for language, by in languages.items() for scoring, x in by.items()]
        return "\n".join(lines)

    def index(self) -> list[EvalResult]:
        """All scores as the hub's `model-index`; accuracies are from 0 to 1."""
        return [self._entry(task, language, scoring, score)
                for task, languages in self.results.items()
                for language, by in languages.items() for scoring, score in by.items()]

    def _entry(self, task: str, language: str, scoring: str, score: dict[str, Any]) -> EvalResult:
        source = self.sources.get((task, language))
        on_hub = source is not None and source.kind == "hub"
        config = _filled(source.config, source, language) if on_hub and source.config else language
        return EvalResult(
            task_type="text-generation", dataset_type=source.name if on_hub else task,
            dataset_name=f"{task}, {language}" + ("" if on_hub else ", not from the hub"),
            dataset_config=config,
            dataset_split=source.rows("test")[0] if on_hub else "test",
            dataset_revision=source.revision if on_hub else None,
            metric_type="exact_match" if scoring == "exact_match" else "accuracy",
            metric_value=score["accuracy"],
            metric_name=f"{task}, {scoring}, {score['n']} rows")


def _filled(pattern: str, source: Source, language: str) -> str:
    theirs = source.names.get(language, language)
    return pattern.replace("{language}", theirs).replace("{split}", source.rows("test")[0])


def read_scores(workdir: Path, config: Config, step: int) -> Scores:
    """The run's scores, unless they are another checkpoint's.

    Raises:
      InputError: the file of results is damaged.
    """
    file = workdir / "eval" / "results.json"
    if not file.is_file():
        return Scores()
    about_file = file.with_suffix(".about.json")
    about = read_json(about_file, REPAIR) if about_file.is_file() else {}
    if about.get("step") != step:
        logger.warning("%s has scores of step %s, and the export is of step %s: the model card "
                       "leaves them out; score the run again", file, about.get("step", "unknown"),
                       step)
        return Scores()
    results = read_json(file, REPAIR)
    places = {(task, language): _source(config, task, "test", language, about.get("data_path"))
              for task, languages in results.items() for language in languages}
    sources = {key: source for key, source in places.items() if source}
    details = read_results(file.with_name(DETAILS), about)
    return Scores(results, sources, list(_examples(details, sources, config.data.task)))


def _source(
    config: Config, name: str, split: str, language: str, path: str | None = None
) -> Source | None:
    """Where rows are read from; None if that cannot be told any more."""
    try:
        task = get_task(name, config.tasks)
        if name == config.data.task:
            task, path = configured(task, config.data), path or config.data.path
        return find_source(name, task, split, language, path)
    except (InputError, OSError):
        return None


def _examples(
    details: dict[str, Any], sources: dict[tuple[str, str], Source], trained: str
) -> Iterable[dict[str, Any]]:
    """The first row and its answer in some languages, the training task first. The user's own rows
    are nobody else's to read, and stay where they are."""
    seen: set[str] = set()
    for task in sorted(details, key=lambda name: name != trained):
        for language, rows in details[task].items():
            public = _is_published(task, sources.get((task, language)))
            if public and language not in seen and len(seen) < EXAMPLES and rows["queries"]:
                seen.add(language)
                answer = rows["answers"][0]  # empty where labels were scored alone
                yield {"text": rows["queries"][0], "example_title": f"{task}, {language}",
                       **({"output": {"text": answer}} if answer else {})}


def _is_published(name: str, source: Source | None) -> bool:
    """Whether a task's rows are from the pocket world, or from where this project's task has them:
    another data set of the hub may be private."""
    task = TASKS.get(name)
    if task is None or source is None:
        return False
    if name in POCKET_TASKS:
        folder = Path(source.place).parent
        return any((x / WORLD_FILE).is_file() for x in (folder, folder.parent))
    known = (task.source, *task.sources.values(), *task.others)
    return source.place in [x.place for x in known if x]


def stages(config: Config, workdir: Path) -> list[Config]:
    """The run's config, and those of the runs that it started from, as far as they are there."""
    found = [config]
    while (before := stage_before(config, workdir)) and (before / CONFIG_FILE).is_file():
        config, workdir = open_run(before).config, before
        found.append(config)
    return found


def trained_in(config: Config) -> tuple[str, ...]:
    """The languages of a run's training rows."""
    return get_task(config.data.task, config.tasks).training_languages(config.data.language)


def learned(config: Config) -> str:
    """What a run was trained on, for a sentence."""
    return f"`{config.data.task}` in {', '.join(f'`{x}`' for x in trained_in(config))} only"


def metadata(
    name: str, bases: list[Base], trained: list[Config], scores: Scores, **fields: Any
) -> ModelCardData:
    """The front matter of a bridge's card. Nothing is claimed that the run does not show.

    Args:
      name: of the model in `model-index`.
      bases: the backbones. trained: configs of all stages.
      fields: more of `ModelCardData`.
    """
    of = [(x, language) for x in trained for language in trained_in(x)]
    sources = [_source(x, x.data.task, "train", language) for x, language in of]
    datasets = [source.name for source in sources if source and source.kind == "hub"]
    languages = [language for _, language in of]
    languages += [x for by_language in scores.results.values() for x in by_language]
    index = scores.index()
    return ModelCardData(
        **joint_licence(bases), **listed_fields(
            base_model=[base.name for base in bases if base.on_hub], datasets=datasets,
            language=map(iso_of, languages), metrics=[x.metric_type for x in index]),
        **({"model_name": name, "eval_results": index} if index else {}),
        **({"widget": scores.examples} if scores.examples else {}), **fields)


def listed_fields(**fields: Iterable[str | None]) -> dict[str, list[str]]:
    """Fields of a card without repeated and unknown entries; empty ones are left out."""
    unique = {name: [x for x in dict.fromkeys(values) if x] for name, values in fields.items()}
    return {name: values for name, values in unique.items() if values}


def write_card(folder: Path, data: ModelCardData, text: str) -> None:
    """Writes `README.md`."""
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", "utf-8")


TOLD = """
tokenizer.src_lang = "{}"  # of the texts"""
USAGE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({place}, trust_remote_code=True)
texts = [{text}]{told}
inputs = tokenizer(texts, padding=True, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.batch_decode(tokens, skip_special_tokens=True))
```

`pipeline("text-generation", model={place}, trust_remote_code=True)`, `Trainer`, peft and
`save_pretrained` work as with any causal LM. `tokenizer(texts, text_target=answers)` returns
`input_ids` and `labels` for training; encoder and LLM are frozen until you unfreeze them.
"""
CARD = """\
# A multilingual bridge

A frozen multilingual encoder in front of a frozen LLM, connected by a small module (fusion
`{fusion}`, projector `{projector}`) that was trained on {learned}, with jaxfusion. This is step
{step}{chosen}.

{usage}
## Parts

{parts}

The trained part is under the terms of both.

## Scores

{scores}

## Config

```json
{config}
```
"""
