"""The sizes of the models that generation is tested with."""

from fastjax.models import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    initializer_range=0.15,
    max_position_embeddings=256,
)
