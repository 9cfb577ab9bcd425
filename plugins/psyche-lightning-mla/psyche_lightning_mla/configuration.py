"""The configuration of an MLA model and its parameter count."""

# mypy: allow-untyped-calls
# (the base classes in transformers are partly without annotations)

# No `from __future__ import annotations` here: `strict` checks values only against annotations that are types.
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PretrainedConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@strict
class MLAConfig(PretrainedConfig):
    """Configuration of a dense causal language model with Multi-head Latent Attention.

    Fields have the names and meanings of `transformers`' ``DeepseekV3Config``, without its experts. The defaults give a
    byte-level model of 1.8 million parameters that trains on a CPU.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU MLP.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of heads.
        q_lora_rank: width of the query's low-rank projection; None projects queries directly.
        kv_lora_rank: width of the latent, which decoding caches and from which keys and values are expanded.
        qk_nope_head_dim: width per head of the part of queries and keys without position.
        qk_rope_head_dim: width of the rotary part; all heads share one rotary key.
        v_head_dim: width per head of the values.
        max_position_embeddings: longest sequence that the model supports, in tokens.
        rope_parameters: ``rope_type`` (one of `ROPE_TYPES`), ``rope_theta`` and that type's own parameters.
        rope_interleave: rotary pairs are neighbours ``(0, 1), (2, 3)...`` (DeepSeek), not halves (Llama).
        rms_norm_eps: epsilon of the norms before attention, before the MLP and at the end. The norms inside attention
            use 1e-6, like DeepSeek-V3.
        attention_bias: biases on ``q_a_proj``, ``kv_a_proj_with_mqa`` and ``o_proj``.
        initializer_range: standard deviation of new weights. It is smaller, by ``1 / sqrt(2 * num_hidden_layers)``, for
            the projections that write to the residual stream.
        tie_word_embeddings: the output projection is the embedding matrix.
        use_cache: whether forward returns a cache by default, outside training.
        pad_token_id: padding id, or None.
        bos_token_id: first id of a text, or None.
        eos_token_id: id (or ids) that ends generation, or None.

    Raises:
        StrictDataclassError: a field has the wrong type, or the fields do not fit together.
    """

    model_type = "psyche_mla"

    vocab_size: int = 256
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 4
    num_attention_heads: int = 3
    q_lora_rank: int | None = None
    kv_lora_rank: int = 96
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rope_interleave: bool = True
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Set what transformers' rotary functions and caches read."""
        self.head_dim = self.qk_rope_head_dim
        self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def validate_dimensions(self) -> None:
        """Refuse sizes that describe no model; the strict dataclass calls it."""
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "max_position_embeddings",
        )
        for name in (*sizes, "q_lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected a positive integer.")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}, expected an even number: it rotates pairs.")
        for name in ("pad_token_id", "bos_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"{name} is {value}, expected an id below vocab_size, which is {self.vocab_size}.")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}.")

    @property
    def qk_head_dim(self) -> int:
        """Width per head of queries and keys."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def parameter_count(self) -> int:
        """The number of parameters of this model, without building it; tied ones count once."""
        hidden, heads, latent = self.hidden_size, self.num_attention_heads, self.kv_lora_rank
        bias = int(self.attention_bias)
        if self.q_lora_rank is None:
            queries = hidden * heads * self.qk_head_dim
        else:
            queries = self.q_lora_rank * (hidden + bias + 1 + heads * self.qk_head_dim)
        keys_values = (hidden + bias) * (latent + self.qk_rope_head_dim) + latent
        keys_values += latent * heads * (self.qk_nope_head_dim + self.v_head_dim)
        output = (heads * self.v_head_dim + bias) * hidden
        block = queries + keys_values + output + 3 * hidden * self.intermediate_size + 2 * hidden
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * block + hidden

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """Bytes per token that cached decoding keeps, over all layers.

        Args:
            itemsize: bytes of one element of the cache (2 for bfloat16).
        """
        return (self.kv_lora_rank + self.qk_rope_head_dim) * self.num_hidden_layers * itemsize
