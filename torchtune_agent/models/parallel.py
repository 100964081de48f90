"""How a model of ours is split by tensor parallelism."""

from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from torchtune_agent.models.architecture import Architecture


def tp_plan(model_dir: str) -> dict[str, ParallelStyle]:
    """The plan for the model in the folder `model_dir`: heads, hidden units and the vocabulary are divided.

    For `tensor_parallel_plan`; with biases, tied embeddings and norms of queries and keys where the model has them.
    """
    architecture = Architecture.from_folder(model_dir)
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.attn.q_proj": ColwiseParallel(),
        "layers.*.attn.k_proj": ColwiseParallel(),
        "layers.*.attn.v_proj": ColwiseParallel(),
        "layers.*.attn.output_proj": RowwiseParallel(),
        "layers.*.mlp.w1": ColwiseParallel(),
        "layers.*.mlp.w2": RowwiseParallel(),
        "layers.*.mlp.w3": ColwiseParallel(),
    }
    if architecture.qk_norm:
        # Every rank normalizes its own heads (dimension 2), so that each has but a part of the scale's gradient.
        plan["layers.*.attn.q_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
        plan["layers.*.attn.k_norm"] = SequenceParallel(sequence_dim=2, use_local_output=True)
    if not architecture.tied:
        plan["output"] = ColwiseParallel(output_layouts=Replicate())
    return plan
