"""The seven sub-tasks of UQABench, and `route`, which tells a question's sub-task by its wording."""

from __future__ import annotations

from dataclasses import dataclass

from persona.errors import DataError


@dataclass(frozen=True)
class SubTask:
    """One sub-task (UQABench, arXiv 2502.19178)."""

    name: str
    """Name, as in the recipes."""
    dimension: str
    """What it measures; one of `DIMENSIONS`."""
    abbreviation: str
    """Two letters."""
    routes: tuple[str, ...]
    """A question with any of these substrings belongs here, unless an earlier sub-task takes it."""


SUB_TASKS = (
    SubTask("direct_feature", "sequence understanding", "df", ("次浏览的商品的", "次（从1开始计数）浏览的")),
    SubTask("match_feature", "sequence understanding", "mf", ("长度是多少？", "的商品有多少个")),
    SubTask("next_item", "action prediction", "ip", ("下一个可能点击的商品的标题是什么",)),
    SubTask("next_attribute", "action prediction", "ap", ("用户下一个可能点击的商品的",)),
    SubTask("long_term_interest", "interest perception", "li", ("用户最感兴趣的3个",)),
    SubTask("short_term_interest", "interest perception", "si", ("用户近期最感兴趣的",)),
    SubTask("interest_trajectory", "interest perception", "it", ("偏好的转移路径是什么",)),
)
"""In the order in which they are tried: the route of next_attribute also stands in next_item's questions."""

DIMENSIONS: dict[str, tuple[str, ...]] = {
    dimension: tuple(task.name for task in SUB_TASKS if task.dimension == dimension)
    for dimension in dict.fromkeys(task.dimension for task in SUB_TASKS)
}
"""Dimension to the names of its sub-tasks."""


def route(question: str) -> SubTask:
    """The first sub-task with a route in `question`; raises `DataError` for a question that no route takes."""
    for task in SUB_TASKS:
        if any(part in question for part in task.routes):
            return task
    raise DataError(f"no sub-task of UQABench asks {question[:60]!r}; its questions are in Chinese")
