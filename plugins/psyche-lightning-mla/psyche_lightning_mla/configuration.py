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
    """Configuration of a causal language model with Multi-head Latent Attention.

    Fields have the names and meanings of `transformers`' ``DeepseekV3Config``. The defaults give a dense byte-level
    model of 1.8 million parameters that trains on a CPU.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU MLP of dense layers.
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
        n_routed_experts: experts of each MoE layer, of which a router chooses some for each token; 0 for a dense model.
        num_experts_per_tok: experts that each token passes through, besides the shared ones.
        n_shared_experts: experts that every token passes through; together they are one MLP.
        moe_intermediate_size: width of the SwiGLU MLP of one expert.
        first_k_dense_replace: the first layers, which stay dense.
        n_group: groups of experts; the router chooses groups first.
        topk_group: groups from which a token's experts come.
        norm_topk_prob: the weights of a token's experts sum to ``routed_scaling_factor``.
        routed_scaling_factor: the factor on these weights.
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
    attribute_map = {"num_local_experts": "n_routed_experts"}  # noqa: RUF012 - transformers reads it from the class

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
    n_routed_experts: int = 0
    num_experts_per_tok: int = 2
    n_shared_experts: int = 1
    moe_intermediate_size: int = 128
    first_k_dense_replace: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
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
            "num_experts_per_tok",
            "n_shared_experts",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
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
        self._validate_experts()
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {rope_type!r}, expected one of {', '.join(ROPE_TYPES)}.")

    def _validate_experts(self) -> None:
        for name in ("n_routed_experts", "first_k_dense_replace"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 or a positive integer.")
        if not self.n_routed_experts:
            return
        if not self.has_experts(self.num_hidden_layers - 1):
            raise ValueError(
                f"first_k_dense_replace is {self.first_k_dense_replace}, expected less than num_hidden_layers, which "
                f"is {self.num_hidden_layers}: no layer is left for the experts."
            )
        size, rest = divmod(self.n_routed_experts, self.n_group)
        if rest or (self.n_group > 1 and size < 2):
            raise ValueError(
                f"n_group is {self.n_group}, expected a divisor of n_routed_experts, which is {self.n_routed_experts}, "
                "with at least 2 experts in each group."
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group is {self.topk_group}, expected at most n_group, which is {self.n_group}.")
        if self.num_experts_per_tok > self.topk_group * size:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, expected at most {self.topk_group * size}: "
                "so many experts are in the chosen groups."
            )

    def has_experts(self, layer_idx: int) -> bool:
        """Whether this layer is an MoE layer."""
        return self.n_routed_experts > 0 and layer_idx >= self.first_k_dense_replace

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
        attention = queries + keys_values + output + 2 * hidden
        moe = 3 * hidden * self.moe_intermediate_size * (self.n_routed_experts + self.n_shared_experts)
        moe += (hidden + 1) * self.n_routed_experts
        dense = 3 * hidden * self.intermediate_size
        blocks = sum(attention + (moe if self.has_experts(layer) else dense) for layer in range(self.num_hidden_layers))
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return embeddings + blocks + hidden

    def cache_bytes_per_token(self, itemsize: int) -> int:
        """Bytes per token that cached decoding keeps, over all layers.

        Args:
            itemsize: bytes of one element of the cache (2 for bfloat16).
        """
        return (self.kv_lora_rank + self.qk_rope_head_dim) * self.num_hidden_layers * itemsize
