"""The sizes of the demo, small enough for two CPU cores and a few minutes."""

import dataclasses
from pathlib import Path

from fastjax.models import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """How large a world, a model and a training run."""

    output_dir: Path = Path("demo-output")
    seed: int = 0
    # world
    countries: int = 24
    held_out: int = 6
    passages: int = 2500
    # base model
    vocab_size: int = 512
    hidden_size: int = 128
    num_layers: int = 4
    base_steps: int = 260
    base_batch: int = 16
    row_length: int = 128
    base_learning_rate: float = 5e-3
    # tuning
    lora_rank: int = 16
    tune_steps: int = 100
    tune_batch: int = 16
    tune_learning_rate: float = 5e-4

    @property
    def model(self) -> LlamaConfig:
        """A Llama in small: grouped queries, SwiGLU, tied embeddings; widths are whole blocks of 64 for NF4."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_layers=self.num_layers,
            num_heads=4,
            num_kv_heads=2,
            head_dim=self.hidden_size // 4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )

    @property
    def base_dir(self) -> Path:
        return self.output_dir / "base"

    @property
    def adapter_dir(self) -> Path:
        return self.output_dir / "adapter"

    @property
    def picture(self) -> Path:
        return self.output_dir / "demo.png"
