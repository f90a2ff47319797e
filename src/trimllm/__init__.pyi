from trimllm.blocks.surgery import apply_layout as apply_layout
from trimllm.blocks.surgery import drop_layers as drop_layers
from trimllm.checkpoints.export import save_trimmed as save_trimmed
from trimllm.checkpoints.loading import load_model as load_model
from trimllm.checkpoints.loading import load_tokenizer as load_tokenizer
from trimllm.checkpoints.verification import verify as verify
from trimllm.config import TrimConfig as TrimConfig
from trimllm.console import Console as Console
from trimllm.errors import InputError as InputError
from trimllm.errors import TrimError as TrimError
from trimllm.evaluation.evaluate import evaluate as evaluate
from trimllm.evaluation.paired import difference as difference
from trimllm.handover.hub import push_to_hub as push_to_hub
from trimllm.importance.ranking import scan_layers as scan_layers
from trimllm.run.progressive import trim as trim
from trimllm.tasks import load_task as load_task
from trimllm.tasks import load_text as load_text

__version__: str
