"""LaMP's seven tasks as data: inputs, retrieval texts, profile prompts and labels, one `Task` each.

An item of a profile is an `Event`: its id is the event's id, its fields are the event's attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Formatter
from typing import Literal

from persona.errors import DataError
from persona.history import Event


@dataclass(frozen=True)
class Task:
    """How one task writes its inputs and its profiles."""

    name: str
    """As in the official outputs files: LaMP_1 ... LaMP_7, and LaMP_2N."""
    kind: Literal["classification", "rating", "generation"]
    """Which metrics count: accuracy and macro-F1; MAE and RMSE; ROUGE-1 and ROUGE-L."""
    input: str
    """The input, with places for the fields of what is asked about."""
    payload: str
    """Regular expression: its groups, joined by a space, are what the input asks about; also the retrieval query."""
    document: str
    """What retrieval reads of a profile item."""
    part: str
    """A profile item in a prompt."""
    long: str
    """The field of `part` that is cut when the budget is short."""
    label: str
    """The field of a profile item that answers the task's question about it."""
    joined: str
    """Prompt with a profile: places `{join}` and `{input}`."""
    labels: tuple[str, ...] = ()
    """All answers of a classification or rating task."""
    splice_after: str = ""
    """LaMP_1: the parts stand inside the input, after the first occurrence of this word, instead of in `joined`."""

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields that a profile item must have, besides its id."""
        names = [name for text in (self.document, self.part) for _, name, _, _ in Formatter().parse(text) if name]
        return tuple(dict.fromkeys([*names, self.label]))

    def query(self, text: str) -> str:
        """What an input asks about. An input without its instruction (it happens, in LaMP_2) is all payload."""
        found = re.search(self.payload, text, re.DOTALL)
        return " ".join(found.groups()) if found else text

    def describe(self, item: Event) -> str:
        """What retrieval reads of a profile item."""
        return self.document.format_map(item.attributes)

    def labelled(self, fields: Mapping[str, str | float | None]) -> str:
        """What retrieval reads of an item with these fields, after its label if that is not in there anyway."""
        label = f"{{{self.label}}}"
        return (self.document if label in self.document else f"{label}: {self.document}").format_map(fields)

    def unlabelled(self, item: Event) -> Event:
        """The item without its answer: what an encoder sees that is to know only what the user was asked."""
        text = item.attributes[self.long]
        return replace(item, text=text, value=None, attributes={self.long: text})


def read_task(name: str) -> Task:
    """The task of a name such as "LaMP_5", "5" or "2N"; raises `DataError` for another."""
    key = f"LaMP_{name.removeprefix('LaMP_').upper()}"
    if key not in TASKS:
        raise DataError(f"there is no LaMP task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[key]


_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip
_CATEGORIES = (
    "women", "religion", "politics", "style & beauty", "entertainment", "culture & arts", "sports",
    "science & technology", "travel", "business", "crime", "education", "healthy living", "parents", "food & drink",
)  # fmt: skip

TASKS = {
    task.name: task
    for task in (
        Task(
            name="LaMP_1",
            kind="classification",
            input='For an author who has written the paper with the title "{title}", which reference is related? '
            'Just answer with [1] or [2] without explanation. [1]: "{first}" [2]: "{second}"',
            payload=r'explanation\. \[1\]: "(.*?)" \[2\]: "(.*)"\s*$',
            document="{title} {abstract}",
            part='"{title}"',
            long="title",
            label="title",
            joined="",
            labels=("[1]", "[2]"),
            splice_after="title",
        ),
        Task(
            name="LaMP_2",
            kind="classification",
            input="Which tag does this movie relate to among the following tags? Just answer with the tag name without "
            f"further explanation. tags: [{', '.join(_TAGS)}] description: {{description}}",
            payload=r"description: ?(.*)$",
            document="{description}",
            part='the tag for the movie: "{description}" is "{tag}" ',
            long="description",
            label="tag",
            joined="{join}. {input}",
            labels=_TAGS,
        ),
        Task(
            name="LaMP_2N",
            kind="classification",
            input="Which category does this article relate to among the following categories? Just answer with the "
            f"category name without further explanation. categories: [{', '.join(_CATEGORIES)}] article: {{text}}",
            payload=r"article: ?(.*)$",
            document="{text}",
            part='the category for the article: "{text}" is "{category}" ',
            long="text",
            label="category",
            joined="{join}. {input}",
            labels=_CATEGORIES,
        ),
        Task(
            name="LaMP_3",
            kind="rating",
            input="What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
            "without further explanation. review: {text}",
            payload=r"review: ?(.*)$",
            document="{text}",
            part='{score} is the score for "{text}" ',
            long="text",
            label="score",
            joined="{join}. {input}",
            labels=("1", "2", "3", "4", "5"),
        ),
        Task(
            name="LaMP_4",
            kind="generation",
            input="Generate a headline for the following article: {text}",
            payload=r"article: ?(.*)$",
            document="{title} {text}",
            part='"{title}" is the title for "{text}" ',
            long="text",
            label="title",
            joined="{join}. {input}",
        ),
        Task(
            name="LaMP_5",
            kind="generation",
            input="Generate a title for the following abstract of a paper: {abstract}",
            payload=r"paper: ?(.*)$",
            document="{title} {abstract}",
            part='"{title}" is a title for "{abstract}" ',
            long="abstract",
            label="title",
            joined="{join}. Following the given patterns {input}",
        ),
        Task(
            name="LaMP_6",
            kind="generation",
            input="Generate a subject for the following email: {text}",
            payload=r": ?(.*)$",
            document="{text}",
            part='"{title}" is the title for "{text}" ',
            long="text",
            label="title",
            joined="{join}. {input}",
        ),
        Task(
            name="LaMP_7",
            kind="generation",
            input="Paraphrase the following tweet without any explanation before or after it: {text}",
            payload=r": ?(.*)$",
            document="{text}",
            part='"{text}" ',
            long="text",
            label="text",
            joined="{join} are written by a person. Following the given patterns {input}",
        ),
    )
}
