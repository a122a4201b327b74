"""Preference data: from files, folders and the Hub to prompt trees in token ids."""

from falign.data.blocks import Processing
from falign.data.conversations import Message, Text
from falign.data.examples import Example
from falign.data.files import Row
from falign.data.formats import COLUMNS, FORMATS
from falign.data.inspection import DataReport, Lengths, check
from falign.data.memory import InMemory
from falign.data.preferences import Demonstrations, LoadReport, PreferenceData, demonstrations, load_preferences
from falign.data.prompts import PromptData, PromptReport, PromptRow, PromptSource, RowCheck, load_prompts
from falign.data.reading import TokenizedRow, read_tokenized
from falign.data.recognition import RowReader, read_examples
from falign.data.reports import BadRowPolicy, BadRows, Notice, SourceReport
from falign.data.sources import DEMOS, DataSource, read_rows
from falign.data.tokenization import Encoded, Tokenized, encode, tokenize
from falign.data.windows import LengthPolicy, Window

__all__ = [
    "COLUMNS",
    "DEMOS",
    "FORMATS",
    "BadRowPolicy",
    "BadRows",
    "DataReport",
    "DataSource",
    "Demonstrations",
    "Encoded",
    "Example",
    "InMemory",
    "LengthPolicy",
    "Lengths",
    "LoadReport",
    "Message",
    "Notice",
    "PreferenceData",
    "Processing",
    "PromptData",
    "PromptReport",
    "PromptRow",
    "PromptSource",
    "Row",
    "RowCheck",
    "RowReader",
    "SourceReport",
    "Text",
    "Tokenized",
    "TokenizedRow",
    "Window",
    "check",
    "demonstrations",
    "encode",
    "load_preferences",
    "load_prompts",
    "read_examples",
    "read_rows",
    "read_tokenized",
    "tokenize",
]
