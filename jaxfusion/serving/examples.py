"""Example texts of the page: the same in several scripts, or rows of the pocket world."""

import re
from dataclasses import asdict, dataclass

from jaxfusion.data.languages import CODES
from jaxfusion.data.pocket.world import TASKS, task_rows
from jaxfusion.serving.served import Served

# ISO 639 -> name, a sentence, and one that follows from it.
SENTENCES = {
    "en": ("English", "The new vaccine protects children against malaria.",
           "The vaccine helps children."),
    "si": ("සිංහල", "නව එන්නත ළමයින් මැලේරියාවෙන් ආරක්ෂා කරයි.", "එන්නත ළමයින්ට උපකාර කරයි."),
    "ta": ("தமிழ்", "புதிய தடுப்பூசி குழந்தைகளை மலேரியாவிலிருந்து பாதுகாக்கிறது.",
           "தடுப்பூசி குழந்தைகளுக்கு உதவுகிறது."),
    "bn": ("বাংলা", "নতুন টিকা শিশুদের ম্যালেরিয়া থেকে রক্ষা করে।", "টিকা শিশুদের সাহায্য করে।"),
    "hi": ("हिन्दी", "नया टीका बच्चों को मलेरिया से बचाता है।", "टीका बच्चों की मदद करता है।"),
    "ur": ("اردو", "نئی ویکسین بچوں کو ملیریا سے بچاتی ہے۔", "ویکسین بچوں کی مدد کرتی ہے۔"),
    "ar": ("العربية", "يحمي اللقاح الجديد الأطفال من الملاريا.", "اللقاح يساعد الأطفال."),
    "sw": ("Kiswahili", "Chanjo mpya inawalinda watoto dhidi ya malaria.",
           "Chanjo inawasaidia watoto."),
    "zh": ("中文", "新疫苗保护儿童免受疟疾侵害。", "疫苗帮助儿童。"),
    "ja": ("日本語", "新しいワクチンは子どもたちをマラリアから守る。",
           "ワクチンは子どもの助けになる。"),
}


@dataclass(frozen=True)
class Sample:
    """An example: its language's code and name, and a text for each column.

    Attributes:
      told: the encoder's own code of the language, if it is told one.
    """

    language: str
    name: str
    columns: tuple[str, ...]
    told: str = ""


def examples_of(model: Served) -> list[dict]:
    """Texts for the columns of a bridge's task, in languages that its encoder takes; none for a
    task of more than two columns."""
    columns = columns_of(model)
    task = model.config.data.task
    if task in TASKS:
        return [asdict(_pocket(task, language, columns)) for language in model.task.languages]
    if len(columns) > 2:
        return []
    return [asdict(Sample(code, name, tuple(texts[: len(columns)]), told))
            for code, (name, *texts) in SENTENCES.items()
            if (told := _told(model, code)) is not None]


def columns_of(model: Served) -> tuple[str, ...]:
    """The columns of the task's prompt, in order."""
    return tuple(re.findall(r"{(\w+)}", model.task.prompt))


def _told(model: Served, code: str) -> str | None:
    """The encoder's own code of a language; empty if it is told none, None if it lacks this one."""
    tokens = model.tokenizers.languages
    if tokens is None:
        return ""
    return next((x for x in (code, *CODES.get(code, ())) if x in tokens), None)


def _pocket(task: str, language: str, columns: tuple[str, ...]) -> Sample:
    row = next(iter(task_rows(task, "test", language, 1)))
    return Sample(language, language, tuple(row[name] for name in columns))
