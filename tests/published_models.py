"""The sizes of models as they are published, as `config.json` says them, and how many parameters they have."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Published:
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    num_parameters: int
    tie_word_embeddings: bool = False
    head_dim: int | None = None
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    num_active: int | None = None  # of the parameters, where a token does not meet all

    def save(self, folder: Path) -> Path:
        """`folder`, with this model's config.json and nothing else."""
        values: dict[str, Any] = {key: value for key, value in vars(self).items() if value is not None}
        for ours in ("num_parameters", "num_active"):
            values.pop(ours, None)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 4096}))
        return folder


PUBLISHED = {
    "Qwen2.5-0.5B": Published("qwen2", 151936, 896, 4864, 24, 14, 2, 494_032_768, True),
    "Qwen2.5-1.5B": Published("qwen2", 151936, 1536, 8960, 28, 12, 2, 1_543_714_304, True),
    "Qwen2.5-3B": Published("qwen2", 151936, 2048, 11008, 36, 16, 2, 3_085_938_688, True),
    "Qwen2.5-7B": Published("qwen2", 152064, 3584, 18944, 28, 28, 4, 7_615_616_512),
    "Qwen2.5-14B": Published("qwen2", 152064, 5120, 13824, 48, 40, 8, 14_770_033_664),
    "Qwen2.5-32B": Published("qwen2", 152064, 5120, 27648, 64, 40, 8, 32_763_876_352),
    "Qwen2.5-72B": Published("qwen2", 152064, 8192, 29568, 80, 64, 8, 72_706_203_648),
    "Qwen3-0.6B": Published("qwen3", 151936, 1024, 3072, 28, 16, 8, 596_049_920, True, 128),
    "Qwen3-1.7B": Published("qwen3", 151936, 2048, 6144, 28, 16, 8, 1_720_574_976, True, 128),
    "Qwen3-4B": Published("qwen3", 151936, 2560, 9728, 36, 32, 8, 4_022_468_096, True, 128),
    "Qwen3-8B": Published("qwen3", 151936, 4096, 12288, 36, 32, 8, 8_190_735_360, False, 128),
    "Qwen3-14B": Published("qwen3", 151936, 5120, 17408, 40, 40, 8, 14_768_307_200, False, 128),
    "Qwen3-32B": Published("qwen3", 151936, 5120, 25600, 64, 64, 8, 32_762_123_264, False, 128),
    "Qwen3-30B-A3B": Published(
        "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 30_532_122_624, False, 128, 128, 8, 768, 3_353_032_704
    ),
    "Llama-3.2-1B": Published("llama", 128256, 2048, 8192, 16, 32, 8, 1_235_814_400, True),
    "Llama-3.2-3B": Published("llama", 128256, 3072, 8192, 28, 24, 8, 3_212_749_824, True),
    "Llama-3.1-8B": Published("llama", 128256, 4096, 14336, 32, 32, 8, 8_030_261_248),
    "Llama-3.1-70B": Published("llama", 128256, 8192, 28672, 80, 64, 8, 70_553_706_496),
    "Mistral-7B-v0.3": Published("mistral", 32768, 4096, 14336, 32, 32, 8, 7_248_023_552),
    "Mistral-Nemo-12B": Published("mistral", 131072, 5120, 14336, 40, 32, 8, 12_247_782_400, False, 128),
    "SmolLM3-3B": Published("smollm3", 128256, 2048, 11008, 36, 16, 4, 3_075_098_624, True),
}
