"""A causal language model with Multi-head Latent Attention (MLA), dense or with a mixture of experts (MoE).

Attention is DeepSeek-V2's (arXiv 2405.04434, section 2.1), MoE layers and parameter names are DeepSeek-V3's (arXiv
2412.19437, section 2.1.2): the same weights give the same logits in `transformers`' ``DeepseekV3ForCausalLM``.

Shapes in this file: B sequences, T new tokens, S tokens seen (cached and new), H heads, R = kv_lora_rank, N = B * T
tokens, E experts, K experts of a token.
"""

# mypy: allow-untyped-calls, allow-untyped-decorators
# (transformers is partly without annotations)

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.utils import GenerationMixin
from transformers.integrations.moe import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import maybe_autocast

from psyche_lightning_mla.configuration import MLAConfig

_LATENT_NORM_EPS = 1e-6
# Signs decide how far a bias moves, here and in Adam; so its gradient may be small beside others in a norm that clips.
_LOAD_SCALE = 1e-3


def inverse_frequencies(config: MLAConfig) -> tuple[list[float], float]:
    """The rotary frequencies.

    Returns:
        ``qk_rope_head_dim / 2`` frequencies in radians per position, and the factor on cosine and sine (YaRN's).
    """
    rope: dict[str, Any] = config.rope_parameters or {}
    with torch.device("cpu"):  # needed even when the model is on the meta device
        if rope["rope_type"] == "default":
            dims = torch.arange(0, config.qk_rope_head_dim, 2, dtype=torch.float)
            frequencies, factor = torch.pow(rope["rope_theta"], dims / config.qk_rope_head_dim).reciprocal(), 1.0
        else:
            frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
        return [float(frequency) for frequency in frequencies], float(factor)


def softmax_scale(config: MLAConfig) -> float:
    """The factor on attention scores: ``1 / sqrt(qk_head_dim)``, times YaRN's squared magnitude if YaRN is in use."""
    scale = 1.0 / math.sqrt(config.qk_head_dim)
    rope: dict[str, Any] = config.rope_parameters or {}
    if rope.get("rope_type") == "default" or not rope.get("mscale_all_dim") or rope["factor"] <= 1:
        return scale
    magnitude: float = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    return scale * magnitude * magnitude


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of the last dimension; the result holds all first elements, then all second ones.

    Args:
        x: [B, heads, T, D].
        cos: [B or 1, 1, T, D / 2].
        sin: like ``cos``.
        interleaved: whether pairs are neighbours; otherwise element i pairs with i + D / 2.
    """
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class MLARMSNorm(nn.RMSNorm):
    """RMSNorm whose result has the dtype of its input, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of ``x``."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ResidualLinear(nn.Linear):
    """A projection that writes to the residual stream; its initial weights are smaller than those of others."""


class MLAAttention(nn.Module):
    """Attention whose keys and values are expanded from one small latent for each token."""

    def __init__(self, config: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.value, self.latent = config.v_head_dim, config.kv_lora_rank
        self.interleaved = config.rope_interleave
        self.scale = softmax_scale(config)

        hidden, queries = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        self.direct_queries = config.q_lora_rank is None
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = MLARMSNorm(config.q_lora_rank, eps=_LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=config.attention_bias)
        self.kv_a_layernorm = MLARMSNorm(self.latent, eps=_LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(self.latent, self.num_heads * (self.nope + self.value), bias=False)
        self.o_proj = ResidualLinear(self.num_heads * self.value, hidden, bias=config.attention_bias)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Attend from ``hidden`` [B, T, hidden_size] to itself and to the tokens in the cache.

        Args:
            hidden: the normalized residual stream.
            cos: [B or 1, 1, T, rope / 2].
            sin: like ``cos``.
            mask: bool or additive, [B, 1, T, S]; None for a plain causal mask.
            cache: the latents and rope keys of earlier tokens; gets the new ones.
        """
        batch, length, _ = hidden.shape
        q = self.q_proj(hidden) if self.direct_queries else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        q_nope, q_rope = q.view(batch, length, self.num_heads, -1).transpose(1, 2).split([self.nope, self.rope], dim=-1)
        q_rope = rotate(q_rope, cos, sin, self.interleaved)

        latent, k_rope = self.kv_a_proj_with_mqa(hidden).unsqueeze(1).split([self.latent, self.rope], dim=-1)
        latent, k_rope = self.kv_a_layernorm(latent), rotate(k_rope, cos, sin, self.interleaved)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx)
        if mask is None and length > 1:
            # A plain causal mask from the first token on: entries of a preallocated cache beyond it need no expansion.
            latent, k_rope = latent[:, :, :length], k_rope[:, :, :length]

        if cache is not None and self._absorbing_is_cheaper(length) and (mask is not None or length == 1):
            heads = self._attend_absorbed(q_nope, q_rope, latent, k_rope, mask)
        else:
            heads = self._attend_expanded(q_nope, q_rope, latent, k_rope, mask)
        out: Tensor = self.o_proj(heads.transpose(1, 2).reshape(batch, length, -1))
        return out

    def _absorbing_is_cheaper(self, length: int) -> bool:
        """Whether scores against latents cost less than expanding them, in multiplications per seen token and head."""
        expanded = self.nope + self.value
        return length * (2 * self.latent - expanded) < self.latent * expanded

    def _attend_expanded(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention over expanded keys and values, for training and prefill. Returns [B, H, T, value]."""
        batch, _, seen, _ = latent.shape
        kv = self.kv_b_proj(latent).view(batch, seen, self.num_heads, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.value], dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        padding = q.shape[-1] - v.shape[-1]
        if padding and q.device.type == "cpu":
            # The CPU's flash kernel needs equal widths; zeros change neither scores nor values.
            q, k, v = (F.pad(x, (0, max(0, p))) for x, p in ((q, -padding), (k, -padding), (v, padding)))
        causal = mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale)
        return out[..., : self.value]

    def _attend_absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attention to the latents themselves, for decoding: `kv_b_proj` moves into query and output.

        No seen token is expanded (arXiv 2405.04434, section 2.1.2). Returns [B, H, T, value].
        """
        up = self.kv_b_proj.weight.to(latent.dtype).view(self.num_heads, self.nope + self.value, self.latent)
        q_latent = q_nope @ up[:, : self.nope]  # [B, H, T, R]
        scores = (q_latent @ latent.mT + q_rope @ k_rope.mT).float() * self.scale
        if mask is not None:
            floor = torch.finfo(scores.dtype).min  # not -inf: a row that sees nothing must not become NaN
            scores = scores.masked_fill(~mask, floor) if mask.dtype == torch.bool else scores + mask
        context = scores.softmax(dim=-1).to(latent.dtype) @ latent
        return context @ up[:, self.nope :].mT


class MLAMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: MLAConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = ResidualLinear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., hidden_size] to [..., hidden_size]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Balanced(torch.autograd.Function):
    """Passes the weights of the chosen experts on, and gives the router's bias the experts' load as its gradient."""

    @staticmethod
    def forward(weights: Tensor, bias: Tensor, experts: Tensor) -> Tensor:
        return weights.view_as(weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, bias, experts = inputs
        ctx.save_for_backward(experts)
        ctx.count = len(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        load = None
        if ctx.needs_input_grad[1]:
            (experts,) = ctx.saved_tensors
            chosen = experts.reshape(-1)
            counts = chosen.new_zeros(ctx.count).scatter_add_(0, chosen, torch.ones_like(chosen))
            load = _LOAD_SCALE * (counts / max(1, chosen.numel()) - 1 / ctx.count)
        return grads[0], load, None


class MLARouter(nn.Module):
    """Chooses the experts of each token.

    A bias for each expert is added to its scores for the choice, and only for the choice. It balances the load without
    a term in the loss: descending along its gradient, an expert's share of the choices minus the mean share, lowers it
    for experts that are chosen too often and raises it for the others (arXiv 2408.15664). It is a parameter, so the
    nodes of a run vote on its steps as on those of all parameters, and it stays the same on all of them.
    """

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.top_k, self.groups, self.top_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.normalize, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route tokens [N, hidden_size].

        Returns:
            The experts' weights, float32 [N, K], and their numbers, int64 [N, K].
        """
        with maybe_autocast(device_type=x.device.type, enabled=False):  # rounded scores would choose other experts
            scores = F.linear(x.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            choice = scores + self.e_score_correction_bias
            if self.groups > 1:
                grouped = choice.view(len(choice), self.groups, -1)
                best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.top_groups, dim=-1, sorted=False).indices
                outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
                choice = grouped.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(1)
            experts = choice.topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        balanced: Tensor = _Balanced.apply(weights * self.factor, self.e_score_correction_bias, experts)
        return balanced, experts


@use_experts_implementation
class MLAExperts(nn.Module):
    """The routed experts, each a SwiGLU MLP; `transformers` replaces the loop by a faster kernel where there is one."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.num_experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Map tokens [N, hidden_size] to the weighted sums of their experts' results; the others are [N, K]."""
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            tokens, places = torch.where(experts == expert)
            gate, up = F.linear(x[tokens], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            out.index_add_(0, tokens, (result * weights[tokens, places, None]).to(out.dtype))
        return out


class MLAMoE(nn.Module):
    """An MoE layer in place of the MLP: the experts chosen for each token, and the shared ones."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__()
        self.gate = MLARouter(config)
        self.experts = MLAExperts(config)
        self.shared_experts = MLAMLP(config, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, T, hidden_size] to [B, T, hidden_size]."""
        tokens = x.flatten(0, 1)
        weights, experts = self.gate(tokens)
        out: Tensor = self.experts(tokens, experts, weights).view_as(x) + self.shared_experts(x)
        return out


class MLADecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention, then a pre-norm MLP or MoE, each added to the residual stream."""

    def __init__(self, config: MLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = MLAAttention(config, layer_idx)
        self.mlp = MLAMoE(config) if config.has_experts(layer_idx) else MLAMLP(config, config.intermediate_size)
        self.input_layernorm = MLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = MLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Map the residual stream [B, T, hidden_size] to the next one."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, mask, cache)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden


class MLAPreTrainedModel(PreTrainedModel):
    """What `transformers` must know about this model family."""

    config_class = MLAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MLADecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias", "gate.weight"]  # noqa: RUF012
    # Signs move the router's weights as fast as any others: what balances the experts has to be faster to keep up.
    advised = {  # noqa: RUF012
        "lr_for": {"*e_score_correction_bias": 10},
        "k_for": {"*e_score_correction_bias": 128},
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        # The residual stream is a sum of two of these per layer: its variance should not grow with depth.
        residual = std / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, ResidualLinear):
            init.normal_(module.weight, mean=0.0, std=residual)
        elif isinstance(module, MLAExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=residual)
        elif isinstance(module, MLARouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)


class MLAModel(MLAPreTrainedModel):
    """The decoder without the output projection."""

    def __init__(self, config: MLAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(MLADecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MLARMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Numbers, not buffers: nodes need not copy them, and casting the model does not round them.
        self.inv_freq, self.rope_factor = inverse_frequencies(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Map tokens to hidden states [B, T, hidden_size]; arguments as in `MLAForCausalLM.forward`."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected either input_ids or inputs_embeds, got both or neither.")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            # Its "keys" are the latents and its "values" the rope keys, with one head each.
            cache = DynamicCache(config=self.config)
        packed_positions = position_ids
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            cache=cache,
            # Positions that count from zero several times mean packed texts; only the caller can give such positions.
            position_ids=packed_positions,
        )
        angles = position_ids[:, None, :, None].float() * torch.tensor(self.inv_freq, device=hidden.device)
        cos, sin = ((x * self.rope_factor).to(hidden.dtype) for x in (angles.cos(), angles.sin()))
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, mask=mask, cache=cache)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden), cache=cache)


class MLAForCausalLM(MLAPreTrainedModel, GenerationMixin):
    """A causal language model with Multi-head Latent Attention."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MLAConfig) -> None:
        super().__init__(config)
        self.model = MLAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # its name before transformers 5.24
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token at each position.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S], 1 for tokens and 0 for padding; None when there is no padding.
            position_ids: int64 [B, T]; None continues from the cache.
            cache: a cache to read and extend; its entries are latents and rope keys.
            inputs_embeds: [B, T, hidden_size] instead of ``input_ids``.
            labels: int64 [B, T], the same tokens as ``input_ids`` (they are shifted here); -100 is ignored.
            use_cache: whether to return a cache; None means ``config.use_cache``, and never in training.
            logits_to_keep: compute only this many last logits (0 for all), or those at these indices.
            kwargs: passed to the loss function (``num_items_in_batch``).

        Returns:
            ``loss`` (float32 scalar, nats per predicted token), ``logits`` [B, T, vocab_size], ``cache``.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, cache=outputs.cache)


# Files have each expert's tensors apart, as DeepSeek's have; the model has those of a layer's experts in one.
register_checkpoint_conversion_mapping(
    MLAConfig.model_type, get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True
)
AutoConfig.register(MLAConfig.model_type, MLAConfig, exist_ok=True)
AutoModelForCausalLM.register(MLAConfig, MLAForCausalLM, exist_ok=True)
