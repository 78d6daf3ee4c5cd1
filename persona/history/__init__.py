"""Events, histories, and the declarative readers that make them from raw records. No torch here."""

from persona.history.config import load_config, parse_config
from persona.history.event import Event, History, check_user, event_from_dict, event_to_dict
from persona.history.readers import read_histories
from persona.history.report import BadRows, ReadReport
from persona.history.source import ColumnSpec, JoinSpec, ReaderSpec, SourceSpec

__all__ = [
    "BadRows",
    "ColumnSpec",
    "Event",
    "History",
    "JoinSpec",
    "ReadReport",
    "ReaderSpec",
    "SourceSpec",
    "check_user",
    "event_from_dict",
    "event_to_dict",
    "load_config",
    "parse_config",
    "read_histories",
]
