"""Tasks: prompts, continuations and answers in disjoint train, calibration and test parts.

>>> from trimllm.tasks import load_task
>>> load_task("demo_medicine").train[0].prompt
'Question: ...\\nAnswer:'
"""

from trimllm.tasks.catalog import list_tasks
from trimllm.tasks.items import Item, Kind, TaskData
from trimllm.tasks.load import find_spec, load_task
from trimllm.tasks.spec import TaskSpec
from trimllm.tasks.splits import NoTrainingRowsError
from trimllm.tasks.text import load_text

__all__ = [
    "Item",
    "Kind",
    "NoTrainingRowsError",
    "TaskData",
    "TaskSpec",
    "find_spec",
    "list_tasks",
    "load_task",
    "load_text",
]
